"""Training pairs: how they are made, their stores on disk, and batches of them."""

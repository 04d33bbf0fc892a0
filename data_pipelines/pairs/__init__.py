"""Training pairs: what they are, their stores on disk, and batches of them."""

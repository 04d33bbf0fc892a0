"""Reading files with one-line errors, atomic writing, NIfTI volumes, cameras in JSON, and checks of compressed images."""

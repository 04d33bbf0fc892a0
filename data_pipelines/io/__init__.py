"""Files: reading with one clear error line, atomic writing, NIfTI, cameras in JSON."""

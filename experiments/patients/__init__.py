"""Prepared patients: the folder that `prepare` writes and `register` reads."""

"""Prepared patients: the workdir that `prepare` writes and `register` reads, the models in it, and start poses."""

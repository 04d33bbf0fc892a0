"""The systems of the paper's Table 1 on the same cases."""

"""Scores on cases of known pose, and the methods that ours is compared with."""

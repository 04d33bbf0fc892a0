"""Scores on cases of known pose, and other methods for comparison."""

"""The procedural spine that stands in for patients' data."""

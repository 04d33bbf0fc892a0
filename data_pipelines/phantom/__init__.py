"""The procedural spine: a synthetic CT with labels that takes the place of patient data in tests, demos and training."""

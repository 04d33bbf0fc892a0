"""Baselines: methods that this one is compared with."""

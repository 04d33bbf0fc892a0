"""Deprecated: renamed to `data_pipelines.simulation` in 0.2. Removed in 0.3."""

"""Where the simulator was before 0.2; it is `data_pipelines.simulation`. This goes with 0.3."""

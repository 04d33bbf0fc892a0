"""Training as pure functions: batches, objectives, the sharded update."""

"""Training as pure functions: batches, examples, the losses of the phases, and the sharded update."""

"""Programs round the operators: benchmark, ahead-of-time compilation, comparison with a peer."""

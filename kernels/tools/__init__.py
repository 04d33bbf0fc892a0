"""Programs around the operators: benchmarks, ahead-of-time compilation, comparison with DiffDRR."""

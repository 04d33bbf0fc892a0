"""Deprecated: `python -m data_pipelines.simulator.bench` runs `data_pipelines.simulation.bench`. Removed in 0.3."""

import runpy

if __name__ == "__main__":
    runpy.run_module("data_pipelines.simulation.bench", run_name="__main__")

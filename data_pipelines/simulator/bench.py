"""`python -m data_pipelines.simulator.bench`: the name that `data_pipelines.simulation.bench` had before 0.2. It goes with 0.3."""

import runpy

if __name__ == "__main__":
    runpy.run_module("data_pipelines.simulation.bench", run_name="__main__")

"""`python -m kernels.bench`: the name that `kernels.tools.bench` had before 0.2. It goes with 0.3."""

import runpy

if __name__ == "__main__":
    runpy.run_module("kernels.tools.bench", run_name="__main__")

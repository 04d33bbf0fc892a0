"""`python -m kernels.compile_check`: the name that `kernels.tools.compile_check` had before 0.2. It goes with 0.3."""

import runpy

if __name__ == "__main__":
    runpy.run_module("kernels.tools.compile_check", run_name="__main__")

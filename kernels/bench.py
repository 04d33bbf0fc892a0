"""`python -m kernels.bench`: the old name of `python -m kernels.tools.bench`, deprecated since 0.2, to be removed in 0.3."""

import runpy

if __name__ == "__main__":
    runpy.run_module("kernels.tools.bench", run_name="__main__")

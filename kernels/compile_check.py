"""`python -m kernels.compile_check`: the old name of `python -m kernels.tools.compile_check`, deprecated since 0.2, to be removed
in 0.3."""

import runpy

if __name__ == "__main__":
    runpy.run_module("kernels.tools.compile_check", run_name="__main__")

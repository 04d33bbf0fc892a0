"""X-ray splatting: an image of line integrals through radiative Gaussians."""

from kernels.splat.api import splat

__all__ = ["splat"]

"""X-ray splatting: radiative Gaussians to an image of line integrals."""

from kernels.splat.api import splat

__all__ = ["splat"]

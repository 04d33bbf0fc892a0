"""Digitally reconstructed radiographs: line integrals through a voxel volume by trilinear ray marching."""

from kernels.drr.api import drr
from kernels.drr.api import drr_and_motion

__all__ = ["drr", "drr_and_motion"]

"""Digitally reconstructed radiographs: line integrals through a voxel volume by trilinear ray marching."""

from kernels.drr.api import drr

__all__ = ["drr"]

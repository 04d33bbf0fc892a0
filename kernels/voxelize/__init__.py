"""Voxelisation: the density of radiative Gaussians, sampled at voxel centres."""

from kernels.voxelize.api import voxelize

__all__ = ["voxelize"]

"""Additive radiative-Gaussian and voxel X-ray operators, one subpackage each: `splat`, `voxelize`, `drr`.

    from kernels.drr import drr, drr_and_motion
    from kernels.splat import splat
    from kernels.voxelize import voxelize

A subpackage holds `oracle` (the definition), one module per backend, and `api` (the public function, with one custom gradient
and `implementation=`). This package knows arrays only; cameras and poses live in `radgs_jax`.
"""

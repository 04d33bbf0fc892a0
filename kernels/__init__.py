"""Additive radiative-Gaussian and voxel X-ray operators: `splat`, `voxelize`, `drr`.

Each operator is a folder: `oracle` (the definition), one file per backend, and `api` (the public function, with one
custom gradient and `implementation=`). This package knows arrays only; cameras and poses live in `radgs_jax`.
"""

"""Additive radiative-Gaussian and voxel X-ray operators: `splat`, `voxelize`, `drr` and `drr_and_motion`.

Each operator is a subpackage: `oracle` (the definition), one module per backend, and `api` (the public function, with one
custom gradient and `implementation=`). This package knows arrays only; cameras and poses live in `radgs_jax`.

The names below are loaded at first use, so that importing the package imports no jax.
"""

import importlib
import sys
import types
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kernels.drr.api import drr as drr
    from kernels.drr.api import drr_and_motion as drr_and_motion
    from kernels.splat.api import splat as splat
    from kernels.voxelize.api import voxelize as voxelize

_HOMES = {
    "drr": "kernels.drr",
    "drr_and_motion": "kernels.drr",
    "splat": "kernels.splat",
    "voxelize": "kernels.voxelize",
}
__all__ = ["drr", "drr_and_motion", "splat", "voxelize"]


class _Face(types.ModuleType):
    """A package whose attributes `drr`, `splat` and `voxelize` are the operators, not the subpackages of the same names.

    Importing a subpackage sets the attribute of that name to the module. Here it is set to the operator instead, so that
    `kernels.splat` means the same whatever was imported before. Modules are still imported as usual, for example by
    `from kernels.splat import oracle`.
    """

    def __setattr__(self, name: str, value: object) -> None:
        is_operator = name in _HOMES and isinstance(value, types.ModuleType)
        super().__setattr__(name, getattr(value, name) if is_operator else value)


sys.modules[__name__].__class__ = _Face


def __getattr__(name: str) -> object:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])

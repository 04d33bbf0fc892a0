"""RadGS-Reg: registers vertebrae of a CT to calibrated X-rays through radiative Gaussians.

The names below are loaded when they are first used, so that importing the package costs nothing.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from radgs_jax.gaussians import Gaussians as Gaussians
    from radgs_jax.geometry.camera import Camera as Camera
    from radgs_jax.geometry.xray import XRay as XRay
    from radgs_jax.localization.locate import Localizer as Localizer
    from radgs_jax.localization.locate import locate as locate
    from radgs_jax.localization.locate import Located as Located
    from radgs_jax.registration.confidence import judge as judge
    from radgs_jax.registration.pipeline import Outcome as Outcome
    from radgs_jax.registration.pipeline import register as register
    from radgs_jax.registration.pipeline import RegisterOptions as RegisterOptions
    from radgs_jax.registration.prepared import Prepared as Prepared

__version__ = "0.2.0"

_HOMES = {
    "Camera": "radgs_jax.geometry.camera",
    "Gaussians": "radgs_jax.gaussians",
    "Localizer": "radgs_jax.localization.locate",
    "Located": "radgs_jax.localization.locate",
    "Outcome": "radgs_jax.registration.pipeline",
    "Prepared": "radgs_jax.registration.prepared",
    "RegisterOptions": "radgs_jax.registration.pipeline",
    "XRay": "radgs_jax.geometry.xray",
    "judge": "radgs_jax.registration.confidence",
    "locate": "radgs_jax.localization.locate",
    "register": "radgs_jax.registration.pipeline",
}
__all__ = ["__version__", *_HOMES]


def __getattr__(name: str) -> object:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])

"""Finds a vertebra in calibrated X-rays."""

import dataclasses
import functools
from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any
from typing import cast

import jax
import numpy as np
from jaxtyping import Bool
from jaxtyping import Float
from jaxtyping import Real

from kernels.common.types import Array
from radgs_jax import errors
from radgs_jax.geometry.xray import XRay
from radgs_jax.levels import level_name
from radgs_jax.localization import agreement
from radgs_jax.localization import network
from radgs_jax.localization import upright
from radgs_jax.localization.chain import Chain
from radgs_jax.localization.chain import decode
from radgs_jax.localization.chain import Found


@dataclasses.dataclass(frozen=True)
class Localizer:
    """A localizer.

    Attributes:
      params: of the network; None before training.
      config: sizes of the network.
      chain: relations of its levels; None before training.
      centres_ct: centres of the vertebrae, (3,) CT mm by VerSe number, of the patient it was adapted to; empty for a generic one.
    """

    params: Mapping[str, Any] | None
    config: network.DetectorConfig
    chain: Chain | None
    centres_ct: dict[int, Float[np.ndarray, "3"]] = dataclasses.field(default_factory=dict)

    @property
    def levels(self) -> tuple[int, ...]:
        """VerSe numbers of the levels it was trained on, head to feet."""
        assert self.chain is not None
        return tuple(n for n, trained in zip(self.config.levels, self.chain.trained) if trained)


@functools.partial(jax.jit, static_argnums=1)
def predict(
    params: Mapping[str, Any],
    config: network.DetectorConfig,
    images: Real[Array, "batch height width"],
    valid: Bool[Array, "batch height width"],
    beam: Real[Array, "batch 3"],
) -> network.Levels:
    """The compiled network; arguments are those of `network.Detector`."""
    return cast(network.Levels, network.Detector(config).apply(params, images, valid, beam))


def look(
    model: Localizer,
    image: Real[Array, "height width"],
    valid: Bool[Array, "height width"] | None,
    intrinsics: Real[Array, "4"],
    camera_from_world: Real[Array, "4 4"],
) -> tuple[upright.Upright, Found]:
    """Turns one X-ray upright and finds the levels in it.

    Args:
      image: line integrals up to scale and offset.

    Raises:
      InputError: a beam along the patient.
    """
    assert model.params is not None and model.chain is not None and valid is not None
    try:
        view = upright.upright(image, valid, intrinsics, camera_from_world, model.config.pixel_mm)
    except ValueError as error:
        errors.fail("X-rays", "camera", error, "views from the front and the side")
    beam = view.camera_from_world[None, 2, :3].astype(np.float32)
    prediction = jax.device_get(predict(model.params, model.config, view.image[None], view.valid[None], beam))
    step_mm = network.STRIDE * model.config.pixel_mm
    return view, decode(prediction.cells[0], prediction.absent[0], model.chain, step_mm)


@dataclasses.dataclass(frozen=True)
class Located:
    """A vertebra that was found.

    Attributes:
      centre: world mm.
      covariance: of the centre, mm^2.
      report: plain values for a JSON file (see `locate`).
      centres: (3,) world mm of every level that two views show, by VerSe number.
    """

    centre: Float[np.ndarray, "3"]
    covariance: Float[np.ndarray, "3 3"]
    report: dict[str, Any]
    centres: dict[int, Float[np.ndarray, "3"]]


def locate(model: Localizer, xrays: Sequence[XRay], label: int) -> Located:
    """Finds one vertebra in two or more X-rays of one patient.

    Args:
      xrays: line integrals may be wrong by a factor and an offset.
      label: VerSe number.

    Returns:
      The vertebra. Its report contains the `level`, its centre and covariance, and the centres of all levels (`centres_mm`); the
      entries `shifts`, `probability`, `apart_mm` and `own_apart_mm` of `agreement.Agreement`, by name of level; `mixed_up`, whether
      the views' own numberings differ; and for each of the `views` the levels found, their pixels in the view and confidences.

    Raises:
      InputError: a level that the localizer was not trained on, that is not found in two views, or for which the views' rays are
        more than `agreement.MAX_RAY_GAP_MM` apart; a camera that is given twice.
    """
    name = level_name(label)
    if label not in model.levels:
        wanted = f"one of {level_name(model.levels[0])} to {level_name(model.levels[-1])}"
        errors.fail("localizer", "label", name, wanted)
    seen = [look(model, x.line_integrals, x.valid, x.camera.intrinsics, x.camera.camera_from_world) for x in xrays]
    found = [f for _, f in seen]
    cameras = [u.intrinsics for u, _ in seen], [u.camera_from_world for u, _ in seen]
    try:
        together = agreement.agree(found, *cameras)
    except ValueError:
        errors.fail(
            "X-rays", "cameras", "rays that are parallel or meet in a source", "views from the front and the side"
        )
    level = model.levels.index(label)
    if together is None or level not in together.centres:
        listed = [", ".join(level_name(model.levels[n]) for n in f.levels) or "nothing" for f in found]
        errors.fail("X-rays", name, "; ".join(listed), "that level in two views")
    if together.apart_mm[level] > agreement.MAX_RAY_GAP_MM:
        errors.fail("X-rays", name, f"rays that pass {together.apart_mm[level]:.0f} mm apart", "one point in all views")
    names = {n: level_name(model.levels[n]) for n in range(len(model.levels))}
    report = {
        "level": name,
        "centre_mm": together.centres[level].tolist(),
        "covariance_mm2": together.covariances[level].tolist(),
        "probability": together.probability,
        "shifts": list(together.shifts),
        "mixed_up": len(set(together.shifts)) > 1,
        "apart_mm": {names[n]: d for n, d in together.apart_mm.items()},
        "own_apart_mm": {names[n]: d for n, d in together.own_apart_mm.items()},
        "centres_mm": {names[n]: c.tolist() for n, c in together.centres.items()},
        "views": [
            [
                {"level": names[int(n)], "uv": (u.matrix @ uv + u.offset).tolist(), "confidence": float(c)}
                for n, uv, c in zip(f.levels, f.uv, f.confidence)
            ]
            for u, f in seen
        ],
    }
    centres = {model.levels[n]: centre for n, centre in together.centres.items()}
    return Located(together.centres[level], together.covariances[level], report, centres)


def start_pose(
    model: Localizer, located: Located, label: int, centre_ct: Real[np.ndarray, "3"] | Sequence[float]
) -> Float[np.ndarray, "4 4"]:
    """Start pose world_from_ct of a vertebra that was found.

    A localizer that was adapted to the patient also knows the neighbours' centres in the CT, which turn the pose
    (`agreement.pose_from_centres`). With a generic localizer the CT's axes are those of the world.

    Args:
      centre_ct: centroid of the vertebra's mask, CT mm (the origin of `Vertebra.ct_from_box`).
    """
    return agreement.pose_from_centres(located.centres, {**model.centres_ct, label: np.asarray(centre_ct)}, label)

"""Finds a vertebra in calibrated X-rays."""

import dataclasses
import functools

import jax
import numpy as np

from radgs_jax import errors
from radgs_jax.levels import level_name
from radgs_jax.localization import agreement
from radgs_jax.localization import network
from radgs_jax.localization import upright
from radgs_jax.localization.chain import Chain
from radgs_jax.localization.chain import decode


@dataclasses.dataclass(frozen=True)
class Localizer:
    """A detector: parameters, their configuration, and the chain of its levels.

    centres_ct: VerSe number -> (3,) CT mm, of the patient whom it was adapted to; empty for a generic one.
    """

    params: dict
    config: network.DetectorConfig
    chain: Chain
    centres_ct: dict = dataclasses.field(default_factory=dict)

    @property
    def levels(self):
        """VerSe numbers that it answers with, head to feet."""
        return tuple(n for n, trained in zip(self.config.levels, self.chain.trained) if trained)


@functools.partial(jax.jit, static_argnums=1)
def predict(params, config, images, valid, beam):
    return network.Detector(config).apply(params, images, valid, beam)


def look(model, image, valid, intrinsics, camera_from_world):
    """What a detector finds in one X-ray: `upright.Upright` and the `chain.Found` in it.

    Args:
      image, valid: (H, W), line integrals up to scale and offset; intrinsics (4,), camera_from_world (4, 4).
    Raises:
      InputError: a beam along the patient.
    """
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
    """centre (3,): a vertebra's centre, world mm; covariance (3, 3) mm^2; report: a plain dict, as `write_json` takes it.

    centres: VerSe number -> (3,), of every level that two views show.
    """

    centre: np.ndarray
    covariance: np.ndarray
    report: dict
    centres: dict


def locate(model, xrays, label):
    """Finds one vertebra in two X-rays or more of one patient.

    Args:
      xrays: `XRay`s, whose line integrals may be off by a factor and an offset; label: VerSe number.
    Returns:
      `Located`. Its report has, for each view, the levels found (level, u, v in the view's pixels, confidence); `shifts`,
      by how many levels each view's own answer had to move for the views to agree; `probability` of that numbering;
      `apart_mm`, by level, how far the views' rays pass each other, and `own_apart_mm`, before the move.
    Raises:
      InputError: a level that the detector was not trained on, that is not found in two views, or whose rays pass
        each other by more than `agreement.APART_MM`; one camera given twice.
    """
    name = level_name(label)
    if label not in model.levels:
        wanted = f"one of {level_name(model.levels[0])} to {level_name(model.levels[-1])}"
        errors.fail("detector", "label", name, wanted)
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
    if together.apart_mm[level] > agreement.APART_MM:
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


def start_pose(model, located, label, centre_ct):
    """A first pose world_from_ct (4, 4) of a vertebra that was found.

    A localizer adapted to the patient knows the neighbours in the CT, too (`agreement.pose_from_centres`). With a generic one
    the axes stay the world's.

    Args:
      centre_ct: (3,) CT mm, the centroid of the vertebra's mask (the origin of `Vertebra.ct_from_box`).
    """
    return agreement.pose_from_centres(located.centres, {**model.centres_ct, label: np.asarray(centre_ct)}, label)

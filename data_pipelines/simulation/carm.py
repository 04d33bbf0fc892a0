"""The C-arm: its geometry, cameras by angles, and random views, patients' places and start poses; numpy, float64.

Lengths are mm, angles degrees where a name says so and rad in twists. The ranges of the random draws were chosen by hand.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from radgs_jax.geometry import rigid
from radgs_jax.geometry import rigid_host


@dataclasses.dataclass(frozen=True)
class CArm:
    """Geometry of a C-arm whose isocentre is the world's origin.

    The distance from source to panel and the panel's pixels are the paper's; the other defaults were chosen by hand.

    Attributes:
      source_detector_mm: from the source to the panel.
      source_isocentre_mm: from the source to the isocentre.
      detector_px: pixels along each side of the panel.
      pixel_mm: side of a panel pixel.
    """

    source_detector_mm: float = 1124.0
    source_isocentre_mm: float = 700.0
    detector_px: int = 976
    pixel_mm: float = 0.3


VIEWS = {"AP": 0.0, "LAT": 90.0}
"""Nominal primary angle of each view, degrees."""


ARTICULATION_DEG, ARTICULATION_MM = 6.0, 3.0
"""Largest turn and shift along each axis of the rest of the body against the vertebra. Chosen by hand: about two to three times
the bend of neighbouring vertebrae in `acquisition.Preset`; half is an easy case, twice would have bones intersect."""


def extrinsics(primary_deg: float, secondary_deg: float, source_isocentre_mm: float) -> np.ndarray:
    """camera_from_world (4, 4) of a C-arm turned by its primary angle about +z and tilted by its secondary angle.

    At angles 0 and 0 the source is anterior of the patient: the beam runs to -y (posterior), u to -x (patient's left), v to -z
    (feet). At a primary angle of 90 the source is on the patient's left.
    """
    a, b = np.radians(primary_deg), np.radians(secondary_deg)
    z = np.array([np.sin(a) * np.cos(b), -np.cos(a) * np.cos(b), -np.sin(b)])
    x = np.array([-np.cos(a), -np.sin(a), 0.0])
    camera_from_world = np.eye(4)
    camera_from_world[:3, :3] = np.stack([x, np.cross(z, x), z])
    camera_from_world[2, 3] = source_isocentre_mm
    return camera_from_world


def intrinsics(carm: CArm, binning: int = 1) -> np.ndarray:
    """Intrinsics (4,) fx, fy, cx, cy of a whole panel, in pixels that each cover `binning` x `binning` panel pixels."""
    focal = carm.source_detector_mm / carm.pixel_mm / binning
    centre = (0.5 * (carm.detector_px - 1) - 0.5 * (binning - 1)) / binning
    return np.array([focal, focal, centre, centre])


def sample_views(
    rng: np.random.Generator, carm: CArm, spread_deg: float = 15.0, apart_deg: float | None = None
) -> np.ndarray:
    """camera_from_world (2, 4, 4) of an AP and a lateral view; each angle deviates from the nominal by up to `spread_deg`.

    Args:
      apart_deg: instead of a lateral, a second view that is turned by exactly this angle about +z; neither is tilted.
    """
    if apart_deg is not None:
        first = rng.uniform(-spread_deg, spread_deg)
        return np.stack([extrinsics(first + turn, 0.0, carm.source_isocentre_mm) for turn in (0.0, apart_deg)])
    return np.stack(
        [
            extrinsics(
                nominal + rng.uniform(-spread_deg, spread_deg),
                rng.uniform(-spread_deg, spread_deg),
                carm.source_isocentre_mm,
            )
            for nominal in VIEWS.values()
        ]
    )


def sample_world_from_ct(
    rng: np.random.Generator, centre_ct: np.ndarray, rotation_deg: float = 10.0, offset_mm: float = 15.0
) -> np.ndarray:
    """Draws a patient's place on the table, (4, 4).

    Args:
      centre_ct: (3,) point to bring near the isocentre, CT mm.
      rotation_deg: largest turn about each axis.
      offset_mm: largest distance of the point from the isocentre along each axis.
    """
    T = rigid_host.matrix(np.radians(rng.uniform(-rotation_deg, rotation_deg, 3)), 0.0)
    T[:3, 3] = rng.uniform(-offset_mm, offset_mm, 3) - T[:3, :3] @ centre_ct
    return T


def sample_articulation(rng: np.random.Generator, strength: float = 1.0) -> np.ndarray:
    """Draws the motion of the rest of the body against the vertebra as a twist (6,), rad and mm.

    Args:
      strength: factor on ARTICULATION_DEG and ARTICULATION_MM, the largest turn and shift along each axis.
    """
    turn = np.radians(rng.uniform(-ARTICULATION_DEG, ARTICULATION_DEG, 3))
    return strength * np.concatenate([turn, rng.uniform(-ARTICULATION_MM, ARTICULATION_MM, 3)])


def sample_start_twist(rng: np.random.Generator, size_mm: float) -> np.ndarray:
    """Draws the error of a start pose as a twist (6,), rad and mm.

    Args:
      size_mm: root of the summed squares of the shift and of the turn times `rigid.LEVER_MM`, divided between them at
        random. The turn is limited to `rigid.START_RAD`, which makes some twists smaller.
    """
    share = np.sqrt(rng.uniform(0.0, 1.0))
    direction = rng.normal(size=6)
    w, t = direction[:3] / np.linalg.norm(direction[:3]), direction[3:] / np.linalg.norm(direction[3:])
    angle = min(size_mm * np.sqrt(1 - share**2) / rigid.LEVER_MM, rigid.START_RAD)
    return np.concatenate([w * angle, t * size_mm * share])


def start_of_mtre(
    rng: np.random.Generator, world_from_ct: np.ndarray, centre_ct: np.ndarray, points_ct: np.ndarray, target_mm: float
) -> np.ndarray:
    """Draws a start pose (4, 4) with a given mean target registration error (mTRE).

    Args:
      world_from_ct: (4, 4) true pose.
      centre_ct: (3,) point that the start pose is turned about, CT mm.
      points_ct: (P, 3) targets, CT mm.
      target_mm: the mTRE, reached within 0.01 mm; the turn is limited to `rigid.START_RAD`.
    """
    centre = world_from_ct[:3, :3] @ centre_ct + world_from_ct[:3, 3]
    points = points_ct @ world_from_ct[:3, :3].T + world_from_ct[:3, 3]
    twist = sample_start_twist(rng, max(target_mm, 1e-6))
    for _ in range(100):
        motion = rigid_host.motion_about(centre, twist)
        size = np.linalg.norm(points @ motion[:3, :3].T + motion[:3, 3] - points, axis=1).mean()
        if abs(size - target_mm) < 0.01:
            break
        twist *= target_mm / max(size, 1e-9)
        # Beyond the largest turn, the next rounds enlarge the translation alone.
        twist[:3] *= min(1.0, rigid.START_RAD / max(np.linalg.norm(twist[:3]), 1e-9))
    return rigid_host.motion_about(centre, twist) @ world_from_ct


def cameras_off(
    camera_from_world: Sequence[np.ndarray],
    shift_mm: float,
    turn_deg: float,
    rng: np.random.Generator,
    about_source: bool = True,
) -> list[np.ndarray]:
    """camera_from_world (4, 4) of wrong cameras: each turned and shifted, in random directions.

    Args:
      about_source: turned about its source, which moves what it sees; otherwise about the isocentre.
    """
    moved = []
    for E in camera_from_world:
        turn, shift = (d / np.linalg.norm(d) for d in rng.normal(size=(2, 3)))
        motion = rigid_host.matrix(np.radians(turn_deg) * turn, shift_mm * shift)
        moved.append(motion @ E if about_source else E @ motion)
    return moved

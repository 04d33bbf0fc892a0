"""The C-arm and its random poses: cameras by angles, the paper's geometry, articulations and start poses. numpy, float64."""

import dataclasses

import numpy as np

from radgs_jax.geometry import rigid
from radgs_jax.geometry import rigid_host


@dataclasses.dataclass(frozen=True)
class CArm:
    """Geometry of a C-arm whose isocentre is the world's origin; lengths in mm."""

    source_detector_mm: float = 1124.0
    source_isocentre_mm: float = 700.0
    detector_px: int = 976
    pixel_mm: float = 0.3


VIEWS = {"AP": 0.0, "LAT": 90.0}
"""Primary angle of the nominal views, degrees."""


def extrinsics(primary_deg, secondary_deg, source_isocentre_mm):
    """camera_from_world (4, 4) of a C-arm turned by its primary angle about +z and tilted by its secondary angle.

    At 0, 0 the source is anterior: the beam runs to -y (posterior), u to -x (patient's left), v to -z (feet). At primary 90
    the source is on the patient's left. Angles in degrees, distances in mm.
    """
    a, b = np.radians(primary_deg), np.radians(secondary_deg)
    z = np.array([np.sin(a) * np.cos(b), -np.cos(a) * np.cos(b), -np.sin(b)])
    x = np.array([-np.cos(a), -np.sin(a), 0.0])
    camera_from_world = np.eye(4)
    camera_from_world[:3, :3] = np.stack([x, np.cross(z, x), z])
    camera_from_world[2, 3] = source_isocentre_mm
    return camera_from_world


def intrinsics(carm, binning=1):
    """Intrinsics (4,) of a `CArm`: fx, fy, cx, cy in pixels of `binning` x `binning` detector pixels, exactly binned."""
    focal = carm.source_detector_mm / carm.pixel_mm / binning
    centre = (0.5 * (carm.detector_px - 1) - 0.5 * (binning - 1)) / binning
    return np.array([focal, focal, centre, centre])


def sample_views(rng, carm, spread_deg=15.0):
    """camera_from_world (2, 4, 4) of an AP and a lateral view of a `CArm`, each angle off by up to `spread_deg`."""
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


def sample_world_from_ct(rng, centre_ct, rotation_deg=10.0, offset_mm=15.0):
    """A patient on the table, (4, 4): CT axes turned by up to `rotation_deg` an axis, `centre_ct` (3,) near the isocentre.

    The centre, the vertebra's in CT mm, is up to `offset_mm` off it along each axis.
    """
    T = rigid_host.matrix(np.radians(rng.uniform(-rotation_deg, rotation_deg, 3)), 0.0)
    T[:3, 3] = rng.uniform(-offset_mm, offset_mm, 3) - T[:3, :3] @ centre_ct
    return T


def sample_articulation(rng, strength=1.0):
    """Twist (6,), rad, then mm, of the rest of the body against the vertebra: up to 6 degrees and 3 mm an axis at strength 1."""
    return strength * np.concatenate([np.radians(rng.uniform(-6, 6, 3)), rng.uniform(-3, 3, 3)])


def sample_start_twist(rng, size_mm):
    """Twist (6,), rad, then mm, of a start pose: mm of translation and of rotation at the lever, split at random.

    Its size is `size_mm`, or less where that would turn it by more than START_RAD.
    """
    share = np.sqrt(rng.uniform(0.0, 1.0))
    direction = rng.normal(size=6)
    w, t = direction[:3] / np.linalg.norm(direction[:3]), direction[3:] / np.linalg.norm(direction[3:])
    angle = min(size_mm * np.sqrt(1 - share**2) / rigid.LEVER_MM, rigid.START_RAD)
    return np.concatenate([w * angle, t * size_mm * share])


def start_of_mtre(rng, world_from_ct, centre_ct, points_ct, target_mm):
    """A start pose (4, 4) whose mTRE over `points_ct` (P, 3) is `target_mm` within 0.01 mm, turned by at most START_RAD.

    It is the pose `world_from_ct` (4, 4) moved about `centre_ct` (3,); both points in CT mm.
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
        # What a full turn cannot make up, translation does.
        twist[:3] *= min(1.0, rigid.START_RAD / max(np.linalg.norm(twist[:3]), 1e-9))
    return rigid_host.motion_about(centre, twist) @ world_from_ct

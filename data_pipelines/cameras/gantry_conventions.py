"""Cameras of programs that describe a gantry, to and from ours: ITK's two projections, RTK, plastimatch, DICOM. numpy, float64.

Conventions, options and errors: `conventions`. The formulas are those of the programs' documentation and sources.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
import scipy
from jaxtyping import Float

from data_pipelines.cameras import conventions
from data_pipelines.cameras.conventions import Options
from data_pipelines.cameras.conventions import Pinhole
from data_pipelines.io import camera_files
from data_pipelines.simulation import carm
from data_pipelines.xrays import view_geometry
from radgs_jax import errors
from radgs_jax.geometry import rigid_host

OFF_PLANE = 1e-3
"""Largest part of the source's direction that leaves ITK's plane of rotation, or entry of a rotation that DICOM's angles cannot
say: 0.06 degrees. Chosen by hand: half refuses angles rounded to 0.1 degree, twice moves a source by 1.4 mm in 700."""
OFF_CENTRE_PX = 0.5
"""Largest distance of a principal point from the image's middle that DICOM's tags leave out, px. Chosen by hand: half refuses half
a pixel between two conventions, twice moves what is seen by another half pixel."""
MATRIX_TOLERANCE = 1e-3
"""Largest difference of RTK's matrix from its parameters, relative to its row's largest entry or 1. RTK's reader takes 0.001."""
SOURCE_AXES = np.array([[1.0, 0, 0], [0, 0, 1], [0, -1, 0]])
"""Axes of ITK's source, as rows, in the frame that is turned with its gantry."""


@dataclasses.dataclass(frozen=True)
class Circular:
    """A projection of RTK's ThreeDCircularProjectionGeometry: its parameters, mm and degrees, as its documentation names them."""

    source_isocenter: float
    source_detector: float
    gantry: float
    out_of_plane: float = 0.0
    in_plane: float = 0.0
    source_offset: tuple[float, float] = (0.0, 0.0)
    projection_offset: tuple[float, float] = (0.0, 0.0)


def _itk_axes(angle_rad):
    """Rotation from LPS to the axes of ITK's source."""
    return SOURCE_AXES @ rigid_host.matrix([0.0, 0.0, -angle_rad], 0.0)[:3, :3]


def from_itk(
    source: object,
    angle_rad: float,
    distance: float,
    origin: Float[np.ndarray, "3"],
    spacing: Float[np.ndarray, "2"],
    direction: Float[np.ndarray, "3 3"],
    size: tuple[int, int],
    options: Options,
) -> tuple[np.ndarray, np.ndarray]:
    """Our K and E of ITK's two-projection registration (SiddonJacobsRayCastInterpolateImageFunction).

    A point p, LPS, is turned with the gantry, r = Rz(-angle) (p - isocenter), where the source is at (0, -distance, 0), and then
    seen from the source, q = (r_x, r_z, -(r_y + distance)). The image lies in q's frame by its own origin, spacing and direction.
    Our origin is the isocenter.

    Args:
      angle_rad: `ProjectionAngle`. distance: `FocalPointToIsocenterDistance`, mm.
      origin, spacing, direction: of the image, mm. size: (height, width).
    """
    q_from_world = np.eye(4)
    q_from_world[:3, :3] = _itk_axes(angle_rad) @ conventions.ras_from(options, "lps")[:3, :3].T
    q_from_world[2, 3] = -distance
    # A point on a ray is a multiple of what the pixel (u, v, 1) is in q's frame.
    q_from_pixel = np.stack([direction[:, 0] * spacing[0], direction[:, 1] * spacing[1], origin], 1)
    if np.linalg.matrix_rank(q_from_pixel) < 3:
        errors.fail(source, "origin, direction", "an image in the source's plane", "one in front of the source")
    P = np.linalg.inv(q_from_pixel) @ q_from_world[:3]
    return conventions.split(source, "origin, direction", _upright(options, size[0]) @ P)


def _upright(options, height):
    """(3, 3) from pixels of a file to ours, where only the sense of rows may differ."""
    return conventions.flip_rows(height) if options.rows == "up" else np.eye(3)


def to_itk(source: object, view: Pinhole, options: Options) -> dict[str, Any]:
    """Inverse of `from_itk`: the angle in degrees, the distance, and the image's origin, spacing and direction, at the isocentre's
    depth, or with a pixel pitch on the panel.

    Raises:
      InputError: the source is not in the plane in which ITK's gantry turns.
    """
    lps_from_world = conventions.ras_from(options, "lps")[:3, :3].T
    place = lps_from_world @ (-view.E[:3, :3].T @ view.E[:3, 3])
    distance = float(np.linalg.norm(place))
    if abs(place[2]) > OFF_PLANE * distance:
        found = f"a source {place[2]:.4g} mm along the patient's axis from the isocentre"
        errors.fail(source, "E", found, "one in the axial plane, in which ITK's gantry turns")
    depth = distance
    if view.pixel_mm or options.pixel_mm:
        depth, _ = conventions.focal_mm(source, view, options)
    angle = float(np.arctan2(place[0], -place[1]))
    q_from_camera = _itk_axes(angle) @ lps_from_world @ view.E[:3, :3].T
    K = _upright(options, view.height) @ view.K
    steps = depth / K[[0, 1], [0, 1]]  # mm along the camera's axes for a pixel to the right and one down
    return {
        "projection_angle_deg": float(np.degrees(angle)),
        "focal_point_to_isocenter_mm": distance,
        "isocenter": np.zeros(3),
        "origin": q_from_camera @ [-K[0, 2] * steps[0], -K[1, 2] * steps[1], depth] + 0.0,
        "spacing": np.array([*np.abs(steps), 1.0]),
        "direction": q_from_camera @ np.diag([*np.sign(steps), 1.0]) + 0.0,
        "size": [view.width, view.height],
    }


def rtk_matrix(geometry: Circular) -> Float[np.ndarray, "3 4"]:
    """RTK's projection matrix, from its world to mm on the detector, as its documentation defines it (Geometry, final matrix)."""
    sid, sdd = geometry.source_isocenter, geometry.source_detector
    (sx, sy), (px, py) = geometry.source_offset, geometry.projection_offset
    turn = np.eye(4)
    angles = [-geometry.in_plane, -geometry.out_of_plane, -geometry.gantry]
    turn[:3, :3] = scipy.spatial.transform.Rotation.from_euler("ZXY", angles, degrees=True).as_matrix()
    shift = np.eye(4)
    shift[:2, 3] = -sx, -sy
    magnify = np.array([[-sdd, 0, 0, 0], [0, -sdd, 0, 0], [0, 0, 1, -sid]])
    return np.array([[1, 0, sx - px], [0, 1, sy - py], [0, 0, 1.0]]) @ magnify @ shift @ turn


def _rtk_pixels(source, options, size, pitch):
    """(3, 3) from mm on RTK's detector to our pixels."""
    if options.image_origin is None:
        wanted = "--image_origin=centred, or x,y of the projections' Origin in mm"
        errors.fail(source, "--image_origin", "nothing", wanted)
    height, width = size
    origin = options.image_origin
    if isinstance(origin, str):
        origin = -pitch[0] * (width - 1) / 2, -pitch[1] * (height - 1) / 2
    to_pixels = np.array(
        [[1 / pitch[0], 0, -origin[0] / pitch[0]], [0, 1 / pitch[1], -origin[1] / pitch[1]], [0, 0, 1]]
    )
    return _upright(options, height) @ to_pixels


def from_rtk(
    source: object, geometry: Circular, size: tuple[int, int], options: Options
) -> tuple[np.ndarray, np.ndarray]:
    """Our K and E of a projection of RTK. The third row of its matrix is minus the depth.

    Args:
      size: (height, width) of the projections.
    """
    pixels = _rtk_pixels(source, options, size, conventions.options_pitch(source, options))
    P = -pixels @ rtk_matrix(geometry) @ conventions.ras_from(options, "iec").T
    return conventions.split(source, "Projection", P)


def to_rtk(source: object, view: Pinhole, options: Options) -> Circular:
    """Inverse of `from_rtk`.

    Raises:
      InputError: the image's axes are those of no RTK detector, whose y axis goes up where x goes to the right.
    """
    sdd, pitch = conventions.focal_mm(source, view, options)
    pixels = _rtk_pixels(source, options, (view.height, view.width), pitch)
    K, E = np.linalg.inv(pixels) @ view.K, view.E @ conventions.ras_from(options, "iec")
    # In camera axes, RTK's detector axes are +x or -x, +y or -y, and minus the beam's direction.
    signs = np.array([np.sign(K[0, 0]), np.sign(K[1, 1]), -1.0])
    if signs.prod() < 0:
        wanted = "--rows=up, with images whose first row is their lowest, or cameras of mirrored images"
        errors.fail(source, "rows", "an image seen from its source, rows downwards", wanted)
    turn = signs[:, None] * E[:3, :3]
    angles = scipy.spatial.transform.Rotation.from_matrix(turn).as_euler("ZXY", degrees=True)
    place = turn @ (-E[:3, :3].T @ E[:3, 3])
    offset = place[:2] - K[:2, 2]
    in_plane, out_of_plane, gantry = (-angles) % 360.0
    return Circular(
        float(place[2]),
        sdd,
        float(gantry),
        float(out_of_plane),
        float(in_plane),
        (float(place[0]), float(place[1])),
        (float(offset[0]), float(offset[1])),
    )


def from_plastimatch(
    source: object,
    centre: Float[np.ndarray, "2"],
    matrix: Float[np.ndarray, "3 4"],
    size: tuple[int, int],
    options: Options,
) -> tuple[np.ndarray, np.ndarray]:
    """Our K and E of plastimatch's projection matrix file: pixels are the image's centre (column, row) plus what the matrix gives.

    Args:
      centre: pixels, with the first pixel at 0. matrix: from LPS mm; its third row is positive before the source.
    """
    to_pixels = np.array([[1, 0, centre[0]], [0, 1, centre[1]], [0, 0, 1.0]])
    P = _upright(options, size[0]) @ to_pixels @ matrix @ conventions.ras_from(options, "lps").T
    return conventions.split(source, "projection matrix", P)


def to_plastimatch(source: object, view: Pinhole, options: Options) -> dict[str, np.ndarray | float]:
    """Inverse of `from_plastimatch`: centre, matrix, sad, sid, nrm, extrinsic (4, 4), intrinsic (3, 4)."""
    sid, pitch = conventions.focal_mm(source, view, options)
    K = _upright(options, view.height) @ view.K
    E = view.E @ conventions.ras_from(options, "lps")
    intrinsic = np.zeros((3, 4))
    intrinsic[[0, 1, 2], [0, 1, 2]] = np.sign(K[0, 0]) / pitch[0], np.sign(K[1, 1]) / pitch[1], 1.0 / sid
    return {
        "centre": K[:2, 2],
        "matrix": intrinsic @ E,
        "sad": float(np.linalg.norm(E[:3, 3])),
        "sid": sid,
        "nrm": E[2, :3],
        "extrinsic": E,
        "intrinsic": intrinsic,
    }


def from_dicom(source: object, tags: Mapping[str, Any], size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Our K and E of a C-arm's nominal geometry by DICOM's keywords: `view_geometry.carm_camera`, as the source sees the image.

    Args:
      tags: DistanceSourceToDetector and DistanceSourceToPatient, mm; PositionerPrimaryAngle and PositionerSecondaryAngle, degrees;
        ImagerPixelSpacing, mm between rows and between columns.
    """
    down, across = tags["ImagerPixelSpacing"]
    found = view_geometry.carm_camera(
        size,
        (across, down),
        tags["DistanceSourceToDetector"],
        tags["DistanceSourceToPatient"],
        tags["PositionerPrimaryAngle"],
        tags["PositionerSecondaryAngle"],
    )
    return camera_files.matrix_of(found), np.asarray(found.camera_from_world)


def to_dicom(source: object, view: Pinhole, options: Options) -> dict[str, Any]:
    """Inverse of `from_dicom`.

    Raises:
      InputError: a rolled detector, a beam that misses the isocentre, or a principal point that is not the image's middle.
    """
    sdd, pitch = conventions.focal_mm(source, view, options)
    off = np.abs(view.K[:2, 2] - [(view.width - 1) / 2, (view.height - 1) / 2]).max()
    if off > OFF_CENTRE_PX:
        errors.fail(
            source, "K", f"a principal point {off:.4g} px off the middle", "the middle: DICOM has no tag for it"
        )
    z, distance = view.E[2, :3], view.E[2, 3]
    secondary, primary = np.degrees(-np.arcsin(np.clip(z[2], -1, 1))), np.degrees(np.arctan2(z[0], -z[1]))
    nominal = carm.extrinsics(primary, secondary, distance)
    worst = max(np.abs(nominal[:3, :3] - view.E[:3, :3]).max(), np.abs(nominal[:3, 3] - view.E[:3, 3]).max() / distance)
    if worst > OFF_PLANE or view.K[0, 0] < 0:
        found = "a detector that is turned about the beam, mirrored, or aims past the isocentre"
        errors.fail(source, "E", found, "a camera that DICOM's two angles and two distances can say")
    return {
        "DistanceSourceToDetector": sdd,
        "DistanceSourceToPatient": float(distance),
        "PositionerPrimaryAngle": float(primary % 360.0 - 180.0),
        "PositionerSecondaryAngle": float(-secondary),
        "ImagerPixelSpacing": [pitch[1], pitch[0]],
        "Rows": view.height,
        "Columns": view.width,
    }

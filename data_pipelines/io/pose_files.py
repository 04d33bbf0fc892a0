"""Poses of a CT in files: 4x4 matrices in JSON, the program's own results, and ITK transforms as 3D Slicer writes them."""

import pathlib
import typing

import numpy as np

from data_pipelines.io import camera_files
from data_pipelines.io import files
from radgs_jax import errors
from radgs_jax.geometry import rigid_host

ITK_START = "#Insight Transform File V1.0"
"""First line of an ITK transform as text."""
MAX_ITK_BYTES = 2**16
"""Bytes of an ITK transform: a bound on files of another kind. Chosen by hand, far above a rigid one; not sensitive."""
MAX_VERSOR_EXCESS = 1e-6
"""By how much the square of a versor's vector may exceed 1, from rounding. Chosen by hand; not sensitive."""


def read_pose(path: pathlib.Path | str) -> np.ndarray:
    """A pose world_from_ct (4, 4), rigid, mm, float64.

    JSON: a 4x4 matrix; an object with it as `world_from_ct` (such as pose.json) or `T`; a result file of one case. Text: a rigid
    ITK transform, such as pose.tfm, or one that 3D Slicer has written of a transform that moves the CT into the world: ITK stores
    its inverse, in LPS.

    Raises:
      InputError: the file is missing, unreadable or of another kind, holds several poses, or one that is not rigid.
    """
    if files.file_size(path, "a pose in JSON or as an ITK transform") <= MAX_ITK_BYTES and _is_itk(path):
        return _read_itk(path)
    value, where = files.read_json(path), "world_from_ct"
    if isinstance(value, dict) and isinstance(value.get("results"), list):
        if len(value["results"]) != 1:
            errors.fail(path, "results", f"{len(value['results'])} poses", "the results of one case, or its T alone")
        value, where = value["results"][0], "results[0]"
    if isinstance(value, dict):
        keys = [key for key in ("world_from_ct", "T") if key in value]
        if len(keys) != 1:
            found = "both world_from_ct and T" if keys else f"an object with the keys {list(value)}"
            errors.fail(path, where, found, "a 4x4 matrix, or an object with one as world_from_ct or T")
        value, where = value[keys[0]], keys[0]
    return camera_files.check_rigid(path, where, value)


def _is_itk(path):
    try:
        with open(path, "rb") as stream:
            return stream.read(len(ITK_START)) == ITK_START.encode()
    except OSError as error:
        errors.fail(path, "file", error.strerror, "a file that can be read")


def _read_itk(path):
    """world_from_ct of an ITK transform, which holds ct_from_world in LPS."""
    lines = files.read_text(path, "an ITK transform as text", MAX_ITK_BYTES).splitlines()
    entries = [tuple(part.strip() for part in line.split(":", 1)) for line in lines if ":" in line and line[:1] != "#"]
    names = [name for name, *_ in entries]
    if sorted(names) != ["FixedParameters", "Parameters", "Transform"]:
        errors.fail(path, "fields", names, "one Transform with Parameters and FixedParameters")
    fields = dict(entries)
    kind = fields["Transform"].removesuffix("_3_3").removesuffix("_double").removesuffix("_float")
    if kind not in _KINDS or fields["Transform"] == kind:
        known = ", ".join(f"{name}_double_3_3" for name in _KINDS)
        errors.fail(path, "Transform", repr(fields["Transform"]), f"a rigid transform: {known}")
    count, matrix_of = _KINDS[kind]
    values = _numbers(path, "Parameters", fields["Parameters"], (count,))
    fixed = _numbers(path, "FixedParameters", fields["FixedParameters"], (3, 4) if kind == "Euler3DTransform" else (3,))
    matrix = matrix_of(path, values, fixed)
    ct_from_world = np.eye(4)
    ct_from_world[:3, :3] = matrix
    ct_from_world[:3, 3] = values[-3:] + fixed[:3] - matrix @ fixed[:3]
    ct_from_world = camera_files.check_rigid(path, "Parameters", ct_from_world)
    # The inverse of what is rigid within a tolerance, so that what was written comes back.
    return camera_files.check_rigid(path, "Parameters", rigid_host.between_lps(np.linalg.inv(ct_from_world)))


def _numbers(path, name, text, counts):
    try:
        values = np.array([float(word) for word in text.split()])
    except ValueError:
        errors.fail(path, name, repr(text)[:60], "numbers")
    if len(values) not in counts or not np.isfinite(values).all():
        found = f"{len(values)} numbers" if len(values) not in counts else "values that are not finite"
        errors.fail(path, name, found, f"{' or '.join(map(str, counts))} finite numbers")
    return values


def _affine(path, values, fixed):
    return values[:9].reshape(3, 3)


def _versor(path, values, fixed):
    """The rotation of the vector part x, y, z of a unit quaternion whose scalar part is not negative."""
    x, y, z = values[:3]
    square = 1.0 - float(values[:3] @ values[:3])
    if square < -MAX_VERSOR_EXCESS:
        errors.fail(path, "Parameters", f"a versor of length {np.sqrt(1 - square):.6g}", "1 at most")
    w = np.sqrt(max(square, 0.0))
    cross = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    return np.eye(3) + 2 * w * cross + 2 * cross @ cross


def _euler(path, values, fixed):
    """Rotations about x, y and z, multiplied as Rz Rx Ry, or as Rz Ry Rx where a fourth fixed parameter is not 0."""
    turns = []
    for axis, angle in enumerate(values[:3]):
        a, b = [i for i in range(3) if i != axis]
        turn, sign = np.eye(3), -1.0 if axis == 1 else 1.0
        turn[a, a] = turn[b, b] = np.cos(angle)
        turn[b, a], turn[a, b] = sign * np.sin(angle), -sign * np.sin(angle)
        turns.append(turn)
    x, y, z = turns
    return z @ y @ x if len(fixed) == 4 and fixed[3] != 0 else z @ x @ y


_KINDS: dict[str, tuple[int, typing.Callable]] = {
    "AffineTransform": (12, _affine),
    "MatrixOffsetTransformBase": (12, _affine),
    "Rigid3DTransform": (12, _affine),
    "Euler3DTransform": (6, _euler),
    "VersorRigid3DTransform": (6, _versor),
}
"""Number of parameters and rotation by ITK's names; the last three parameters are the translation in all of them."""

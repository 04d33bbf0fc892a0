"""Text files of gantry geometries: RTK's XML and plastimatch's projection matrices, read and written."""

import pathlib
import xml.etree.ElementTree
from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any

import numpy as np

from data_pipelines.cameras import gantry_conventions
from data_pipelines.cameras.gantry_conventions import Circular
from data_pipelines.cameras.gantry_conventions import MATRIX_TOLERANCE
from data_pipelines.io import files
from radgs_jax import errors

MAX_BYTES = 2**24
"""Bytes of a geometry file: RTK's for 20,000 projections. A bound on files of another kind; not sensitive."""
VERSIONS = ("2", "3")
"""Versions of RTK's file that its reader takes for the same format."""
PARAMETERS = (
    "SourceToIsocenterDistance",
    "SourceToDetectorDistance",
    "GantryAngle",
    "OutOfPlaneAngle",
    "InPlaneAngle",
    "SourceOffsetX",
    "SourceOffsetY",
    "ProjectionOffsetX",
    "ProjectionOffsetY",
)


def read_rtk(path: pathlib.Path | str) -> list[dict[str, Circular]]:
    """The projections in an RTK geometry file, each under "geometry".

    Parameters above the projections hold for those below, and a projection's own hold until the next one says otherwise, as RTK's
    reader has it.

    Raises:
      InputError: another kind of file, a cylindrical detector, parallel rays, or a matrix that contradicts its parameters.
    """
    wanted = "an RTKThreeDCircularGeometry XML file"
    text = files.read_text(path, wanted, MAX_BYTES)
    if "<!ENTITY" in text:
        errors.fail(path, "content", "an entity declaration", wanted)
    try:
        root = xml.etree.ElementTree.fromstring(text)
    except (xml.etree.ElementTree.ParseError, ValueError) as error:
        errors.fail(path, "content", error, wanted)
    if root.tag != "RTKThreeDCircularGeometry" or root.get("version") not in VERSIONS:
        errors.fail(path, "content", f"<{root.tag}> of version {root.get('version')}", f"{wanted} of version 2 or 3")
    held, found = dict.fromkeys(PARAMETERS, 0.0), []
    for element in root:
        if element.tag == "Projection":
            found.append({"geometry": _projection(path, len(found) + 1, element, held)})
        elif element.tag == "RadiusCylindricalDetector" and _value(path, element) != 0.0:
            errors.fail(path, element.tag, element.text, "a flat detector")
        elif element.tag in PARAMETERS:
            held[element.tag] = _value(path, element)
    if not found:
        errors.fail(path, "Projection", "none", "one at least")
    return found


def _value(path, element):
    try:
        value = float(element.text or "")
    except ValueError:
        value = np.nan
    if not np.isfinite(value):
        errors.fail(path, element.tag, repr(element.text)[:40], "a number")
    return value


def _projection(path, number, element, held):
    matrix = None
    for inner in element:
        # RTK's first files have Angle for GantryAngle.
        name = "GantryAngle" if inner.tag == "Angle" else inner.tag
        if name in PARAMETERS:
            held[name] = _value(path, inner)
        elif name == "Matrix":
            matrix = _numbers(path, f"Projection {number}: Matrix", (inner.text or "").split(), 12).reshape(3, 4)
    sid, sdd, gantry, out_of_plane, in_plane, sx, sy, px, py = (held[name] for name in PARAMETERS)
    if not (sdd > 0 and sid > 0):
        found = f"SourceToDetectorDistance {sdd:g}, SourceToIsocenterDistance {sid:g}"
        errors.fail(path, f"Projection {number}", found, "distances above 0: diverging rays")
    geometry = Circular(sid, sdd, gantry, out_of_plane, in_plane, (sx, sy), (px, py))
    if matrix is not None:
        own = gantry_conventions.rtk_matrix(geometry)
        apart = np.abs(matrix - own) / np.maximum(1.0, np.abs(own).max(1, keepdims=True))
        if apart.max() > MATRIX_TOLERANCE:
            found = f"a matrix that differs from that of its parameters by {np.abs(matrix - own).max():.3g}"
            errors.fail(path, f"Projection {number}", found, "one geometry")
    return geometry


def _numbers(path, field, words, count):
    try:
        values = np.array([float(word) for word in words])
    except ValueError as error:
        errors.fail(path, field, error, f"{count} numbers")
    if len(values) != count or not np.isfinite(values).all():
        errors.fail(path, field, f"{len(values)} numbers", f"{count} finite ones")
    return values


def rtk_text(projections: Sequence[Circular]) -> str:
    """An RTK geometry file, version 3, with every parameter and the matrix of each projection."""
    lines = ['<?xml version="1.0"?>', "<!DOCTYPE RTKGEOMETRY>", '<RTKThreeDCircularGeometry version="3">']
    for p in projections:
        values = p.source_isocenter, p.source_detector, p.gantry, p.out_of_plane, p.in_plane
        lines.append("  <Projection>")
        for name, value in zip(PARAMETERS, (*values, *p.source_offset, *p.projection_offset)):
            lines.append(f"    <{name}>{value + 0.0:.15g}</{name}>")
        lines.append("    <Matrix>")
        lines += [" ".join(f"{v + 0.0:22.15g}" for v in row) for row in gantry_conventions.rtk_matrix(p)]
        lines += ["    </Matrix>", "  </Projection>"]
    return "\n".join([*lines, "</RTKThreeDCircularGeometry>", ""])


def read_plastimatch(path: pathlib.Path | str) -> dict[str, Any]:
    """`centre` (2,) and `matrix` (3, 4) of a projection matrix file that plastimatch's drr writes.

    Raises:
      InputError: another kind of file, or a matrix that contradicts the distance and normal behind it.
    """
    wanted = "a plastimatch projection matrix file: 2 + 12 + 1 + 1 + 3 numbers"
    words = files.read_text(path, wanted, MAX_BYTES).split("Extrinsic")[0].split()
    values = _numbers(path, "content", words, 19)
    matrix, sid, normal = values[2:14].reshape(3, 4), values[15], values[16:]
    length = np.linalg.norm(matrix[2, :3])
    # The file's normal is the beam's direction or, as its documentation says, the opposite.
    apart = min(np.abs(matrix[2, :3] - sign * length * normal).max() for sign in (1, -1))
    if length == 0 or apart > MATRIX_TOLERANCE * length or abs(length * sid - 1) > MATRIX_TOLERANCE:
        found = f"a third row of length {length:.6g}, a SID of {sid:.6g} and the normal {normal.tolist()}"
        errors.fail(path, "projection matrix", found, "a third row that is the normal over the SID")
    return {"centre": values[:2], "matrix": matrix}


def plastimatch_text(values: Mapping[str, Any]) -> str:
    """A projection matrix file of what `gantry_conventions.to_plastimatch` returns."""

    def rows(matrix):
        return [" ".join(f"{v + 0.0:18.8e}" for v in row) for row in np.atleast_2d(matrix)]

    head = [*rows(values["centre"]), *rows(values["matrix"]), *rows(values["sad"]), *rows(values["sid"])]
    tail = [*rows(values["nrm"]), "Extrinsic", *rows(values["extrinsic"]), "Intrinsic", *rows(values["intrinsic"])]
    return "\n".join([*head, *tail, ""])

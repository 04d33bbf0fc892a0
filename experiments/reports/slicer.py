"""A registered vertebra as a scene for 3D Slicer 5: an .mrb file, which is a zip of an .mrml file and its data.

The scene's world, RAS+ mm, is the C-arm's. The CT and the vertebra's surface lie under the linear transform `pose`. The formats
are those that Slicer writes itself: NRRD volumes in LPS, legacy VTK models whose header says SPACE=RAS, and MRML's attributes as in
the ReadXMLAttributes of its node classes. Slicer does not keep textures of models in a scene (Slicer issue 2671), so an X-ray is a
mesh with a number at each vertex, to be seen in 3D, and a volume of one slice, to be measured in.
"""

import pathlib
import xml.etree.ElementTree as ElementTree
import zipfile
from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any

import matplotlib.colors
import numpy as np
from jaxtyping import Float
from jaxtyping import Real

from data_pipelines.io import files
from experiments.reports import image_planes
from experiments.reports import pictures
from experiments.reports import surfaces
from experiments.reports import verdicts
from radgs_jax.geometry import camera as cameras
from radgs_jax.geometry import rigid_host
from radgs_jax.geometry.xray import XRay
from radgs_jax.levels import level_name
from radgs_jax.registration.prepared import Vertebra

FOLDER = "scene"
"""Folder in the zip. Slicer opens the first .mrml file that it finds there."""
BONE_WINDOW_HU = (1800.0, 400.0)
"""Width and middle of the range of HU that is shown from black to white: a usual window for bone. It can be changed in Slicer."""
PLANE_PX = 512
"""Most pixels along a side of an X-ray as a mesh. Chosen by hand: half blurs bone's edges, twice is slow to turn. The volume of the
X-ray has all pixels."""
OPACITY = {"estimate": 1.0, "start": 0.4, "truth": 0.4}
"""Of the surfaces, so that the estimate is seen through the others."""
CONE_COLOUR = (1.0, 0.85, 0.3)
LINE_WIDTH = 2
GREY = "vtkMRMLColorTableNodeGrey"
"""Slicer's own colour table from black to white."""
SLICE_VIEWS = ("Red", "Green", "Yellow")
VIEW_ANGLE_DEG = 30.0
"""Slicer's own angle of view."""
AWAY = 1.7
"""Distance of the eye from the vertebra, relative to that of the point between the sources. Chosen by hand: at half, the planes
do not fit into the view."""
APART = 0.3
"""Distance of that point from the vertebra, relative to the first source's, below which the first source takes its place. Chosen by
hand: half or twice only changes how sources 120 to 170 degrees apart are first seen."""
ABOVE = 0.35
"""How far the eye is above the plane of the sources, relative to its distance. Chosen by hand, so that no plane hides another."""
NRRD_TYPES = {"int16": "short", "float32": "float"}


def write(
    path: pathlib.Path | str,
    ct: Real[np.ndarray, "x y z"],
    ct_from_index: Float[np.ndarray, "4 4"],
    vertebra: Vertebra,
    xrays: Sequence[XRay],
    poses: Mapping[str, np.ndarray],
) -> None:
    """Writes the scene: the CT at the estimate, the vertebra's surface at each pose, X-rays on planes behind it, and their cones.

    Args:
      path: the file; Slicer knows it by its ending .mrb.
      ct: HU; ct_from_index: from its voxels to RAS+ mm.
      vertebra: of this CT.
      xrays: as they were corrected.
      poses: world_from_ct (4, 4) of 'start', 'estimate' and possibly 'truth', mm. The estimate's transform is called `pose`.
    """
    scene = _Scene()
    centre = (poses["estimate"] @ vertebra.ct_from_box)[:3, 3]
    transforms = {}
    for pose, world_from_ct in poses.items():
        name = "pose" if pose == "estimate" else pose
        transforms[pose] = scene.add("LinearTransform", name, matrixTransformToParent=_numbers(world_from_ct))
    volume = scene.volume("CT", "ct", ct, ct_from_index, BONE_WINDOW_HU, transforms["estimate"])
    vertices, triangles = surfaces.surface(vertebra.mask, vertebra.ct_from_index)
    mesh = vtk_mesh(vertices, triangles)
    for pose, transform in transforms.items():
        colour = matplotlib.colors.to_rgb(pictures.STYLES[pose]["colors"])
        look = {"color": _numbers(colour), "opacity": OPACITY[pose], "visibility2D": "true"}
        scene.model(f"{level_name(vertebra.label)} {pose}", f"vertebra_{pose}", mesh, look, transform)
    to_sources = []
    for number, xray in enumerate(xrays, start=1):
        name = f"X-ray {number}, {verdicts.view_name(xray, poses['start'])}"
        to_sources.append(_add_xray(scene, name, number, xray, centre))
    _add_viewers(scene, volume, centre, np.array(to_sources))
    scene.write(path)


def _add_xray(scene, name, number, xray, centre):
    """Adds an X-ray's volume, mesh and cone; returns the place of its source relative to the vertebra's centre (3,), mm."""
    world_from_pixel = image_planes.world_from_pixel(xray.camera, centre)
    shown = np.asarray(xray.line_integrals, np.float32)
    low, high = map(float, pictures.contrast(shown, np.asarray(xray.valid)))
    window = (high - low, (high + low) / 2)
    scene.volume(name, f"xray_{number}", shown.T[:, :, None], world_from_pixel, window)
    factor = -(-max(shown.shape) // PLANE_PX)
    binned = cameras.bin_image(shown, factor)
    v, u = np.mgrid[: binned.shape[0], : binned.shape[1]] * factor + 0.5 * (factor - 1)
    points = np.stack([u, v, np.zeros_like(u), np.ones_like(u)], -1).reshape(-1, 4) @ world_from_pixel.T
    index = np.arange(binned.size).reshape(binned.shape)
    quads = np.stack([index[:-1, :-1], index[:-1, 1:], index[1:, 1:], index[1:, :-1]], -1).reshape(-1, 4)
    look = {"scalarVisibility": "true", "activeScalarName": "line_integral", "colorNodeID": GREY, "lighting": "false"}
    look |= {"scalarRangeFlag": "UseManual", "scalarRange": _numbers((low, high))}
    scene.model(f"{name}, plane", f"xray_{number}_plane", vtk_mesh(points[:, :3], quads, binned.ravel()), look)
    source = image_planes.source(xray.camera)
    cone = np.concatenate([source[None], image_planes.corners(xray.camera, world_from_pixel)])
    edges = [[0, 1], [0, 2], [0, 3], [0, 4], [1, 2], [2, 3], [3, 4], [4, 1]]
    look = {"color": _numbers(CONE_COLOUR), "lineWidth": LINE_WIDTH, "lighting": "false"}
    scene.model(f"{name}, source and cone", f"xray_{number}_cone", vtk_mesh(cone, np.array(edges)), look)
    return source - centre


def _add_viewers(scene, volume, centre, to_sources):
    """Shows the CT in the slice views, and the whole in the 3D view, from between the sources and above them."""
    for view in SLICE_VIEWS:
        scene.add("SliceComposite", view, {"backgroundVolume": volume}, view, layoutName=view)
    middle, length = np.mean(to_sources, axis=0), np.linalg.norm(to_sources[0])
    # Sources on opposite sides have the vertebra between them.
    away = AWAY * (middle if np.linalg.norm(middle) > APART * length else to_sources[0])
    eye = centre + away + [0.0, 0.0, ABOVE * np.linalg.norm(away)]
    scene.add(
        "Camera",
        "Camera",
        singleton="1",
        layoutName="1",
        position=_numbers(eye),
        focalPoint=_numbers(centre),
        viewUp="0 0 1",
        viewAngle=VIEW_ANGLE_DEG,
    )


CLASSES = {
    "LinearTransform": "vtkMRMLLinearTransformNode",
    "Volume": "vtkMRMLScalarVolumeNode",
    "VolumeDisplay": "vtkMRMLScalarVolumeDisplayNode",
    "VolumeArchetypeStorage": "vtkMRMLVolumeArchetypeStorageNode",
    "Model": "vtkMRMLModelNode",
    "ModelDisplay": "vtkMRMLModelDisplayNode",
    "ModelStorage": "vtkMRMLModelStorageNode",
    "SliceComposite": "vtkMRMLSliceCompositeNode",
    "Camera": "vtkMRMLCameraNode",
}
"""MRML's tags, and the classes that ids are made of."""


class _Scene:
    """The nodes of a scene, and its files as lists of buffers by name."""

    def __init__(self):
        self.root = ElementTree.Element("MRML", version="Slicer 5.6.1", userTags="")
        self.data = {}

    def add(self, tag: str, name: str, references: Mapping[str, str] | None = None, singleton: str = "", **more: Any):
        """Adds a node, and returns its id."""
        count = len(self.root.findall(tag)) + 1
        own = {"id": f"{CLASSES[tag]}{singleton or count}", "name": name}
        if singleton:
            own["singletonTag"] = singleton
        if references:
            own["references"] = "".join(f"{role}:{node};" for role, node in references.items())
        own["hideFromEditors"] = "false" if tag in ("LinearTransform", "Volume", "Model") else "true"
        ElementTree.SubElement(self.root, tag, own | {key: str(value) for key, value in more.items()})
        return own["id"]

    def volume(self, name, file, array, frame_from_index, window, transform=None):
        """Adds a volume with a window (width, middle), perhaps under a transform; returns its id."""
        header, voxels = nrrd(array, frame_from_index)
        self.data[f"{file}.nrrd"] = [header, memoryview(voxels).cast("B")]
        shown = {"window": window[0], "level": window[1], "autoWindowLevel": 0, "interpolate": 1, "colorNodeID": GREY}
        display = self.add("VolumeDisplay", f"{name} display", **shown)
        storage = self.add(
            "VolumeArchetypeStorage",
            f"{name} storage",
            fileName=f"Data/{file}.nrrd",
            useCompression=1,
            centerImage=0,
            UseOrientationFromFile=1,
        )
        spacing = np.linalg.norm(frame_from_index[:3, :3], axis=0)
        place = {
            "spacing": _numbers(spacing),
            "origin": _numbers(frame_from_index[:3, 3]),
            "ijkToRASDirections": _numbers(frame_from_index[:3, :3] / spacing),
        }
        return self.add("Volume", name, _references(display, storage, transform), **place)

    def model(self, name, file, mesh, look, transform=None):
        """Adds a model with attributes of its display, perhaps under a transform."""
        self.data[f"{file}.vtk"] = [mesh]
        both_sides = {"visibility": "true", "backfaceCulling": "false"}
        display = self.add("ModelDisplay", f"{name} display", **both_sides, **look)
        storage = self.add("ModelStorage", f"{name} storage", fileName=f"Data/{file}.vtk", coordinateSystem="RAS")
        self.add("Model", name, _references(display, storage, transform))

    def write(self, path):
        """Writes the zip, atomically."""
        ElementTree.indent(self.root)
        text = ElementTree.tostring(self.root, "utf-8", xml_declaration=True)
        entries = {f"{FOLDER}.mrml": [text]} | {f"Data/{name}": parts for name, parts in self.data.items()}
        with files.replacing(path) as temporary:
            with zipfile.ZipFile(temporary, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
                for name, parts in entries.items():
                    # Opened by name, entries have no date of now, and equal scenes equal bytes.
                    with archive.open(f"{FOLDER}/{name}", "w", force_zip64=True) as stream:
                        for part in parts:
                            stream.write(part)


def _references(display, storage, transform):
    return {"display": display, "storage": storage} | ({"transform": transform} if transform else {})


def _numbers(values):
    """Numbers, row by row, as MRML writes vectors and matrices; floats read them back exactly."""
    return " ".join(repr(float(v)) for v in np.ravel(values))


def nrrd(
    array: Real[np.ndarray, "x y z"], frame_from_index: Float[np.ndarray, "4 4"]
) -> tuple[bytes, Real[np.ndarray, "z y x"]]:
    """A volume as NRRD: the header, and the numbers that follow it, with the first axis fastest.

    int16 stays; everything else becomes float32. The space is LPS, as Slicer writes it.

    Args:
      frame_from_index: (4, 4) from voxels to RAS+ mm.
    """
    kept = "int16" if array.dtype == np.int16 else "float32"
    lps = rigid_host.LPS_FROM_RAS @ frame_from_index
    vectors = [f"({','.join(repr(float(v)) for v in column)})" for column in lps[:3].T]
    lines = (
        "NRRD0004",
        f"type: {NRRD_TYPES[kept]}",
        "dimension: 3",
        "space: left-posterior-superior",
        f"sizes: {' '.join(map(str, array.shape))}",
        f"space directions: {' '.join(vectors[:3])}",
        "kinds: domain domain domain",
        "endian: little",
        "encoding: raw",
        f"space origin: {vectors[3]}",
    )
    voxels = np.ascontiguousarray(array.T, np.dtype(kept).newbyteorder("<"))
    return ("\n".join(lines) + "\n\n").encode(), voxels


def vtk_mesh(
    points: Float[np.ndarray, "n 3"],
    cells: np.ndarray,
    scalars: Real[np.ndarray, " n"] | None = None,
) -> bytes:
    """A mesh as a legacy VTK file of polydata, RAS+ mm, binary.

    Args:
      cells: (M, K) numbers of points: lines if K is 2, else polygons.
      scalars: `line_integral` of each point.
    """
    count, corners = cells.shape
    listed = np.concatenate([np.full((count, 1), corners), cells], 1)
    parts = [
        b"# vtk DataFile Version 3.0\nradgs_jax, mm; SPACE=RAS\nBINARY\nDATASET POLYDATA\n",
        f"POINTS {len(points)} float\n".encode(),
        np.asarray(points, ">f4").tobytes(),
        f"\n{'LINES' if corners == 2 else 'POLYGONS'} {count} {listed.size}\n".encode(),
        np.asarray(listed, ">i4").tobytes(),
        b"\n",
    ]
    if scalars is not None:
        parts += [f"POINT_DATA {len(points)}\nSCALARS line_integral float 1\nLOOKUP_TABLE default\n".encode()]
        parts += [np.asarray(scalars, ">f4").tobytes(), b"\n"]
    return b"".join(parts)

"""ITK's two-projection registration (PyPI: itk-twoprojectionregistration) as rows of Table 1.

It is Wu, "ITK-Based Implementation of Two-Projection 2D/3D Registration Method with an Application in Patient Setup for External
Beam Radiotherapy", Insight Journal 2010: Siddon's projector, normalised correlation of both views, and Powell's search over three
angles and a translation. ITK is no dependency: `Peer` runs it in another Python (`itk_script.py`).

ITK's projector knows one machine: sources go round the isocentre in a plane. Any two views are of that kind, with a plane through
both sources and the vertebra's centre at the start, and the following frames, all of them in mm.
  volume: the moving volume's axes, its first corner at 0.
  itk: that of the plane, z along its normal. The centre of rotation has the same coordinates in both, so that ITK's transform
    itk_from_volume turns about it and does not move it at the start.
  source: of a view at the angle a. r = Rz(-a) (p - isocentre) of a point p is turned with the machine, which has the source at
    (0, -distance, 0); the source's frame has the axes (r_x, r_z, -r_y), so that it looks along -z.
An image may have any orientation in the last frame, so that detectors stay where they are and no pixel is resampled. ITK divides
line integrals by the length of the ray as far as the image; the X-rays are divided in the same way.
"""

import atexit
import contextlib
import dataclasses
import json
import pathlib
import subprocess
import tempfile
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import scipy
from absl import logging
from jaxtyping import Bool
from jaxtyping import Float

from data_pipelines.io import files
from experiments.comparison import registering
from experiments.comparison.subjects import Answer
from experiments.comparison.subjects import REGISTRATION
from experiments.comparison.subjects import System
from experiments.runtime import kept_programs
from radgs_jax import errors
from radgs_jax.baselines import box
from radgs_jax.geometry import camera
from radgs_jax.geometry import rigid_host
from radgs_jax.geometry.xray import XRay
from radgs_jax.registration import pyramid
from radgs_jax.registration.parts import on_device

PACKAGE = "itk-twoprojectionregistration"
WINDOW_PX = 64
"""Pixels of `box.PIXEL_MM` along the window of each view that is compared, 72 mm wide as DiffPose's, so that the faces of a cube of
96 mm stay outside."""
SCRIPT = pathlib.Path(__file__).with_name("itk_script.py")
SOURCE_FROM_TURNED = np.array([[1.0, 0.0, 0.0], [0.0, 0.0, 1.0], [0.0, -1.0, 0.0]])
"""The source's axes, as rows, in the frame that is turned with the machine."""
ORTHOGONAL = 1e-3
"""Largest cosine between axes of a volume, which ITK takes for a box. Chosen by hand: above float32's rounding; not sensitive."""


@dataclasses.dataclass(frozen=True)
class Window:
    """A part of a view.

    Attributes:
      image: (H, W) line integrals; valid: pixels that count.
      intrinsics: (4,) fx, fy, cx, cy of the window, pixels; camera_from_world: (4, 4) mm.
    """

    image: Float[np.ndarray, "h w"]
    valid: Bool[np.ndarray, "h w"]
    intrinsics: Float[np.ndarray, "4"]
    camera_from_world: Float[np.ndarray, "4 4"]


@dataclasses.dataclass(frozen=True)
class Setup:
    """A case as ITK is given it.

    Attributes:
      arrays: by the names that `itk_script.py` explains.
      world_from_itk, box_from_volume: (4, 4) rigid, mm.
    """

    arrays: dict[str, np.ndarray]
    world_from_itk: Float[np.ndarray, "4 4"]
    box_from_volume: Float[np.ndarray, "4 4"]

    def world_from_box(
        self, rotation: Float[np.ndarray, "3 3"], translation: Float[np.ndarray, "3"]
    ) -> Float[np.ndarray, "4 4"]:
        """The pose that ITK's rotation about the centre and translation stand for, mm."""
        itk_from_volume, centre = np.eye(4), self.arrays["centre"]
        itk_from_volume[:3, :3] = rotation
        itk_from_volume[:3, 3] = centre + translation - rotation @ centre
        return self.world_from_itk @ itk_from_volume @ np.linalg.inv(self.box_from_volume)


def cut(xrays: Sequence[XRay], centre: Float[np.ndarray, "3"]) -> list[Window]:
    """The windows of X-rays around the projection of a point of the world, mm."""
    seen, world_from_centre = pyramid.at_resolution(xrays, box.PIXEL_MM), np.eye(4)
    world_from_centre[:3, 3] = centre
    poses = np.stack([np.asarray(xray.camera.camera_from_world, np.float64) for xray in xrays])
    views = seen.images, seen.valid, seen.intrinsics, on_device(poses @ world_from_centre)
    crops = jax.device_get(camera.windows(*views, WINDOW_PX))
    return [Window(*view) for view in zip(*crops, poses)]


def _plane(sources, isocentre):
    """The unit normal of the plane of both sources and the isocentre; of any such plane where they are in one line."""
    arms = sources - isocentre
    normal = np.cross(*arms)
    lengths = np.linalg.norm(arms, axis=-1)
    if np.linalg.norm(normal) < 1e-6 * lengths.prod():
        normal = np.cross(arms[0], np.eye(3)[np.argmin(np.abs(arms[0]))])
    return normal / np.linalg.norm(normal)


def _as_box(volume, box_from_index, normal):
    """The volume with its axes in an order in which the third is nearest to a normal in the box's frame.

    Returns:
      the volume, the size of its voxels, and box_from_volume, which is a rotation and a translation.

    Raises:
      ValueError: the volume's axes are not perpendicular.
    """
    voxel = np.linalg.norm(box_from_index[:3, :3], axis=0)
    axes = box_from_index[:3, :3] / voxel
    if np.abs(axes.T @ axes - np.eye(3)).max() > ORTHOGONAL:
        raise ValueError("itk_peer: found a volume with slanted axes, wanted perpendicular ones")
    third = int(np.argmax(np.abs(normal @ axes)))
    order = [(third + 1) % 3, (third + 2) % 3, third]
    to_index = np.zeros((4, 4))
    to_index[order, [0, 1, 2]] = to_index[3, 3] = 1.0
    volume = np.transpose(volume, order)
    if np.linalg.det(axes[:, order]) < 0:
        to_index[order[0], 0] = -1.0
        to_index[order[0], 3] = volume.shape[0] - 1
        volume = volume[::-1]
    affine = box_from_index @ to_index
    corner = affine @ [-0.5, -0.5, -0.5, 1.0]
    box_from_volume = affine / np.append(voxel[order], 1.0)
    box_from_volume[:, 3] = corner
    return volume, voxel[order], rigid_host.nearest_rigid(box_from_volume)


def prepare(
    volume: Float[np.ndarray, "x y z"],
    box_from_index: Float[np.ndarray, "4 4"],
    windows: Sequence[Window],
    world_from_box: Float[np.ndarray, "4 4"],
) -> Setup:
    """A case in ITK's frames.

    Args:
      volume: that is moved, 1/mm; box_from_index: of its voxels.
      windows: of both views; world_from_box: start pose.

    Raises:
      InputError: there are not two views.
      ValueError: the volume's axes are not perpendicular.
    """
    if len(windows) != 2:
        errors.fail("ITK, two-projection registration", "views", len(windows), "two", errors.BadGeometry)
    box_from_index = np.asarray(box_from_index, np.float64)
    world_from_box = rigid_host.nearest_rigid(np.asarray(world_from_box, np.float64))
    world_from_camera = [np.linalg.inv(window.camera_from_world) for window in windows]
    sources, isocentre = np.stack([pose[:3, 3] for pose in world_from_camera]), world_from_box[:3, 3]
    normal = _plane(sources, isocentre)
    moving, voxel, box_from_volume = _as_box(np.asarray(volume), box_from_index, world_from_box[:3, :3].T @ normal)
    axes = world_from_box[:3, :3] @ box_from_volume[:3, :3]
    z = normal if normal @ axes[:, 2] > 0 else -normal
    # x is as near to the volume's as it can be, so that the start's angles are small.
    y = np.cross(z, axes[:, 0])
    y /= np.linalg.norm(y)
    itk_axes = np.stack([np.cross(y, z), y, z])
    centre = np.linalg.inv(box_from_volume)[:3, 3]
    world_from_itk = np.eye(4)
    world_from_itk[:3, :3] = itk_axes.T
    world_from_itk[:3, 3] = isocentre - itk_axes.T @ centre
    arms = (sources - isocentre) @ itk_axes.T
    angle, distance = np.arctan2(arms[:, 0], -arms[:, 1]), np.linalg.norm(arms, axis=-1)
    views = []
    for a, d, window, pose in zip(angle, distance, windows, world_from_camera):
        direction = SOURCE_FROM_TURNED @ rigid_host.matrix([0.0, 0.0, -a], 0.0)[:3, :3] @ itk_axes @ pose[:3, :3]
        fx, fy, cx, cy = np.asarray(window.intrinsics, np.float64)
        rows, columns = np.indices(window.image.shape)
        ray = np.sqrt(1.0 + ((columns - cx) / fx) ** 2 + ((rows - cy) / fy) ** 2)
        views.append(
            {
                "images": (window.image / ray).astype(np.float32),
                "valid": window.valid,
                "direction": direction,
                "origin": direction @ [-cx * d / fx, -cy * d / fy, d],
                "spacing": [d / fx, d / fy, 1.0],
            }
        )
    turned = scipy.spatial.transform.Rotation.from_matrix(itk_axes @ axes).as_euler("xyz")
    arrays = {name: np.stack([view[name] for view in views]) for name in views[0]} | {
        "angle": angle,
        "distance": distance,
        "volume": moving.astype(np.float32),
        "voxel": voxel,
        "centre": centre,
        "start": np.concatenate([turned, np.zeros(3)]),
    }
    return Setup(arrays, world_from_itk, box_from_volume)


class Peer:
    """ITK in a process of its own, which ends with this one or with `close`."""

    def __init__(self, python: str) -> None:
        """Starts the process.

        Args:
          python: path of a Python that has ITK's package.

        Raises:
          InputError: it is no such Python.
        """
        wanted = f"a Python that has {PACKAGE}"
        self._folder = tempfile.TemporaryDirectory()
        with open(pathlib.Path(self._folder.name) / "messages.txt", "w") as messages:
            try:
                self._process = subprocess.Popen(
                    [python, "-I", str(SCRIPT)],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=messages,
                    text=True,
                )
            except OSError as error:
                errors.fail("flags", "--itk_python", f"{python} ({error.strerror})", wanted)
        try:
            first = self._answer()
        except errors.RunError as error:
            self.close()
            errors.fail("flags", "--itk_python", f"{python} ({error})", wanted)
        if "missing" in first:
            self.close()
            errors.fail("flags", "--itk_python", f"{python} ({first['missing']})", wanted)

    def _answer(self) -> dict[str, Any]:
        """The next line of the process."""
        line = self._process.stdout.readline()
        with contextlib.suppress(ValueError):
            found = json.loads(line)
            if isinstance(found, dict):
                return found
        said = (pathlib.Path(self._folder.name) / "messages.txt").read_text(errors="replace").strip().splitlines()
        raise errors.RunError(f"ITK stopped: {(said or [line.strip() or 'without a word'])[-1]}")

    def ask(self, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The arrays that `itk_script.py` answers to others. Its CPU seconds count in a `Stopwatch` of the caller.

        Raises:
          RunError: ITK cannot register this, or has stopped.
        """
        given, found = (pathlib.Path(self._folder.name) / name for name in ("given.npz", "found.npz"))
        with open(given, "wb") as stream:
            np.savez(stream, **arrays)
        try:
            self._process.stdin.write(json.dumps([str(given), str(found)]) + "\n")
            self._process.stdin.flush()
        except OSError:
            pass  # it has stopped; why, `_answer` says
        answer = self._answer()
        if "error" in answer:
            raise errors.RunError(f"ITK: {answer['error']}")
        kept_programs.count_cpu(answer["cpu_s"])
        return files.read_npz(found, "rotation", "translation", "correlation")

    def close(self) -> None:
        """Ends the process by closing its standard input, and removes its files."""
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()
        self._folder.cleanup()


def moving(peer: Peer, name: str) -> Answer:
    """The answer of ITK, which moves one of a `Subject`'s volumes."""

    def register(subject, params, sizes, xrays, cameras, start):
        start = np.asarray(start, np.float64)
        setup = prepare(*getattr(subject, name), cut(xrays, start[:3, 3]), start)
        found = peer.ask(setup.arrays)
        return setup.world_from_box(found["rotation"], found["translation"])

    return registering.from_box(register)


def systems(python: str | None) -> tuple[System, ...]:
    """The rows of Table 1 that ITK answers, in a process that ends with this one.

    Args:
      python: path of a Python that has ITK's package. None: there are no rows, and a warning says so.

    Raises:
      InputError: it is no such Python.
    """
    if python is None:
        logging.warning("ITK's rows are left out: --itk_python=PATH names a Python that has %s", PACKAGE)
        return ()
    peer = Peer(python)
    atexit.register(peer.close)
    volumes = (("crop", "crop_volume"), ("vertebra", "vertebra_volume"))
    return tuple(System(f"ITK two-projection, {title}", REGISTRATION, moving(peer, name)) for title, name in volumes)

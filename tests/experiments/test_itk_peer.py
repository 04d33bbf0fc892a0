"""ITK's two-projection registration: its frames against a definition of its projector, its process, and a case that it solves."""

import os
import sys
import textwrap

import numpy as np
import pytest
import tiny
from scipy.spatial.transform import Rotation

from data_pipelines.phantom import generate
from data_pipelines.simulation import quick
from experiments.comparison import itk_peer
from experiments.runtime import kept_programs
from radgs_jax import attenuation
from radgs_jax import errors
from radgs_jax.geometry import camera
from radgs_jax.geometry import rigid_host
from radgs_jax.geometry.camera import Camera
from radgs_jax.geometry.xray import XRay

PYTHON = os.environ.get("RADGS_ITK_PYTHON")
BLANK = (20, 30)
"""Height and width of images whose values do not matter."""
POSES = (
    rigid_host.matrix([0.2, -0.1, 0.4], [12.0, -7.0, 9.0]),
    rigid_host.matrix([1.2, 0.9, -1.4], [-20.0, 31.0, 4.0]),
    rigid_host.matrix([0.1, 3.0, 0.2], [0.0, 0.0, 0.0]),
)
"""Start poses: as usual, lying across, and turned round."""


def _looking(turn, shift):
    """A camera_from_world that has turned from one whose v axis is -z."""
    return rigid_host.matrix([0.5 * np.pi, 0.0, 0.0], 0.0) @ rigid_host.matrix(turn, shift)


def _views():
    """Blank windows of two views with unlike focal lengths along u and v, whose rays do not meet."""
    poses = _looking([0.1, 0.0, 0.2], [0.0, 690.0, 20.0]), _looking([-0.2, 0.1, 1.7], [0.0, 720.0, 5.0])
    intrinsics = np.array([[620.0, 580.0, 11.0, 9.5], [600.0, 640.0, 17.0, 4.0]])
    return [itk_peer.Window(np.ones(BLANK), np.ones(BLANK, bool), k, pose) for k, pose in zip(intrinsics, poses)]


def _volume(mirrored=False, shape=(5, 6, 7)):
    """A volume of distinct voxels of unlike sides, and box_from_index."""
    affine = rigid_host.matrix([0.3, 0.2, -0.1], [-4.0, 2.0, 3.0]) @ np.diag([2.0, 1.0, 1.5, 1.0])
    if mirrored:
        affine[:3, 1] *= -1.0
    return np.arange(np.prod(shape), dtype=np.float32).reshape(shape), affine


def _projected(arrays, view, rotation, translation, points):
    """Pixels (N, 2), u and v, of points (N, 3) of the volume's frame, as ITK's projector and image are defined.

    The volume is moved, turned by minus the angle about the isocentre, moved so that the source is at the origin, and turned by -90
    degrees about x. A pixel sees what lies on the ray from the origin through it.
    """
    centre = arrays["centre"]
    p = (points - centre) @ rotation.T + centre + translation
    p = (p - centre) @ Rotation.from_euler("z", -arrays["angle"][view]).as_matrix().T + centre
    p = p - centre + [0.0, arrays["distance"][view], 0.0]
    p = p @ Rotation.from_euler("x", -0.5 * np.pi).as_matrix().T
    rays = np.linalg.solve(arrays["direction"][view], p.T).T
    first = np.linalg.solve(arrays["direction"][view], arrays["origin"][view])
    on_image = rays * (first[2] / rays[:, 2])[:, None]
    return ((on_image - first) / arrays["spacing"][view])[:, :2]


@pytest.mark.parametrize("mirrored", [False, True])
@pytest.mark.parametrize("start", POSES)
def test_itk_sees_what_our_cameras_see(start, mirrored):
    """At the start and where ITK has moved the volume."""
    volume, box_from_index = _volume(mirrored)
    views, rng = _views(), np.random.default_rng(0)
    setup = itk_peer.prepare(volume, box_from_index, views, start)
    first = Rotation.from_euler("xyz", setup.arrays["start"][:3]).as_matrix()
    assert np.allclose(setup.world_from_box(first, np.zeros(3)), start, atol=1e-9)
    turned = Rotation.from_rotvec([0.05, -0.1, 0.02]).as_matrix() @ first
    for rotation, translation in ((first, np.zeros(3)), (turned, np.array([3.0, -2.0, 5.0]))):
        pose = setup.world_from_box(rotation, translation)
        points = rng.uniform(-40.0, 40.0, (50, 3))
        in_volume = (points - setup.box_from_volume[:3, 3]) @ setup.box_from_volume[:3, :3]
        for number, view in enumerate(views):
            in_camera = (np.c_[points, np.ones(50)] @ (view.camera_from_world @ pose).T)[:, :3]
            fx, fy, cx, cy = view.intrinsics
            wanted = in_camera[:, :2] / in_camera[:, 2:] * [fx, fy] + [cx, cy]
            found = _projected(setup.arrays, number, rotation, translation, in_volume)
            assert np.abs(found - wanted).max() < 1e-8
    # Both sources are where the projector has them.
    assert np.allclose([np.linalg.det(d) for d in setup.arrays["direction"]], 1.0)


@pytest.mark.parametrize("mirrored", [False, True])
@pytest.mark.parametrize("start", POSES)
def test_voxels_stay_where_they_are(start, mirrored):
    volume, box_from_index = _volume(mirrored)
    setup = itk_peer.prepare(volume, box_from_index, _views(), start)
    moving, voxel = setup.arrays["volume"], setup.arrays["voxel"]
    assert np.array_equal(np.sort(moving.ravel()), volume.ravel())
    for index in np.ndindex(moving.shape):
        middle = setup.box_from_volume @ np.append((np.array(index) + 0.5) * voxel, 1.0)
        there = np.linalg.solve(box_from_index, middle)[:3]
        assert np.allclose(there, np.unravel_index(int(moving[index]), volume.shape), atol=1e-9)
    # Angles about y of 90 degrees would be ambiguous.
    assert np.abs(setup.arrays["start"][1]) < np.radians(46.0)


def test_pixels_are_divided_by_the_length_of_their_rays():
    views = _views()
    images = itk_peer.prepare(*_volume(), views, POSES[0]).arrays["images"]
    fx, fy, cx, cy = views[0].intrinsics
    assert images[0, 4, 25] == pytest.approx(1.0 / np.linalg.norm([(25 - cx) / fx, (4 - cy) / fy, 1.0]), rel=1e-6)


def test_sources_in_one_line_with_the_vertebra_have_a_plane():
    """Opposite views of the vertebra."""
    views = _views()
    poses = _looking([0.0, 0.0, 0.0], [0.0, 700.0, 0.0]), _looking([0.0, 0.0, np.pi], [0.0, 700.0, 0.0])
    views = [itk_peer.Window(v.image, v.valid, v.intrinsics, pose) for v, pose in zip(views, poses)]
    setup = itk_peer.prepare(*_volume(), views, np.eye(4))
    angle = setup.arrays["angle"]
    assert abs(angle[1] - angle[0]) == pytest.approx(np.pi) and np.allclose(setup.arrays["distance"], 700.0)


def test_windows_show_the_start():
    """The pixel that a window has of the vertebra's centre is its middle one, and outside the image nothing is valid."""
    pose, size = _looking([0.1, 0.0, 0.2], [0.0, 690.0, 20.0]), (200, 300)
    xray = XRay(np.ones(size), None, Camera(np.array([1900.0, 1850.0, 140.0, 95.0]), pose, *size))
    centre = np.array([30.0, -20.0, 15.0])
    (window,) = itk_peer.cut([xray], centre)
    u, v = np.asarray(camera.project(Camera(window.intrinsics, pose, 64, 64), centre[None]))[0]
    assert abs(u - 32) <= 0.51 and abs(v - 32) <= 0.51
    assert window.image.shape == (64, 64) and 0.1 < window.valid.mean() < 1.0


def test_other_numbers_of_views_and_slanted_volumes_are_refused():
    views, (volume, affine) = _views(), _volume()
    with pytest.raises(errors.BadGeometry, match="found 1, wanted two"):
        itk_peer.prepare(volume, affine, views[:1], np.eye(4))
    with pytest.raises(ValueError, match="slanted"):
        itk_peer.prepare(volume, affine @ (np.eye(4) + np.eye(4, k=1) * [0, 0.1, 0, 0]), views, np.eye(4))


def test_rows_need_a_python_with_the_package(run_command, tmp_path, caplog):
    assert itk_peer.systems(None) == () and "--itk_python=PATH" in caplog.text
    if sys.executable != PYTHON:
        with pytest.raises(
            errors.InputError, match=rf"--itk_python: found .*itk.*, wanted a Python that has {itk_peer.PACKAGE}"
        ):
            itk_peer.systems(sys.executable)
    done = run_command("table1", f"--workdir={tmp_path}", f"--out={tmp_path}", "--itk_python=/nowhere/python")
    assert done.returncode == 2
    assert done.stderr == (
        "error: flags: --itk_python: found /nowhere/python (No such file or directory), "
        f"wanted a Python that has {itk_peer.PACKAGE}\n"
    )


SPOKEN = """
    import json, sys
    import numpy as np
    print(json.dumps({"itk": "0"}), flush=True)
    for line in sys.stdin:
        given, found = json.loads(line)
        scale = float(np.load(given)["scale"])
        if scale == 0.0:
            print(json.dumps({"error": "no scale"}), flush=True)
            continue
        if scale < 0.0:
            sys.exit("it fell over")
        np.savez(found, rotation=scale * np.eye(3), translation=np.zeros(3), correlation=np.zeros(2))
        print(json.dumps({"cpu_s": 100.0}), flush=True)
"""


def test_what_the_process_says_is_heard(monkeypatch, tmp_path):
    """Its answer, its CPU seconds, that it cannot answer, and that it has stopped."""
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(SPOKEN))
    monkeypatch.setattr(itk_peer, "SCRIPT", script)
    peer = itk_peer.Peer(sys.executable)
    with kept_programs.Stopwatch() as watch:
        assert np.array_equal(peer.ask({"scale": np.array(2.0)})["rotation"], 2.0 * np.eye(3))
    assert 100.0 < watch.cpu_s < 110.0
    with pytest.raises(errors.RunError, match="ITK: no scale"):
        peer.ask({"scale": np.array(0.0)})
    for _ in range(2):
        with pytest.raises(errors.RunError, match="ITK stopped: it fell over"):
            peer.ask({"scale": np.array(-1.0)})
    peer.close()


@pytest.mark.slow
@pytest.mark.skipif(PYTHON is None, reason=f"RADGS_ITK_PYTHON names no Python that has {itk_peer.PACKAGE}")
def test_itk_registers_a_crop_of_a_phantom():
    """From 3 mm and 2 degrees off: the projections agree at the truth as far as voxels of 3 mm let them, and the search ends nearer
    to it. A third of a view is not valid, and is nonsense."""
    phantom = generate.make_phantom(0, tiny.config().phantom)
    middle = np.round(np.linalg.solve(phantom.affine, np.append(phantom.centroids[21], 1.0))[:3]).astype(int)
    size = np.array([38, 38, 32])
    part = tuple(slice(max(0, low), low + n) for low, n in zip(middle - size // 2, size))
    volume = np.asarray(attenuation.from_hounsfield(phantom.hu[part]), np.float32)
    box_from_index = phantom.affine.copy()
    box_from_index[:3, 3] = -phantom.affine[:3, :3] @ (middle - [s.start for s in part])
    truth = rigid_host.matrix([0.1, -0.1, 0.2], [12.0, -7.0, 9.0])
    poses = np.stack([view.camera_from_world for view in _views()])
    intrinsics = np.array([[1900.0, 1850.0, 240.0, 245.0], [1880.0, 1900.0, 250.0, 235.0]])
    images = quick.render(volume, box_from_index, truth, intrinsics, poses, (488, 488), 0.5)
    valid = np.ones(images.shape, bool)
    valid[1, :, 280:] = False
    images = np.where(valid, images, 50.0)
    xrays = [XRay(i, m, Camera(k, pose, 488, 488)) for i, m, k, pose in zip(images, valid, intrinsics, poses)]
    peer = itk_peer.Peer(PYTHON)

    def registered(start):
        setup = itk_peer.prepare(volume, box_from_index, itk_peer.cut(xrays, start[:3, 3]), start)
        found = peer.ask(setup.arrays)
        return found["correlation"], setup.world_from_box(found["rotation"], found["translation"])

    (at_truth, _), _ = registered(truth)
    off = rigid_host.matrix([np.radians(2.0), 0.0, 0.0], [1.0, -2.0, 2.0])
    (before, after), pose = registered(truth @ off)
    peer.close()
    assert at_truth > 0.98 and before < after
    assert rigid_host.distance(pose, truth) < 1.0 < 3.0 < rigid_host.distance(truth @ off, truth)

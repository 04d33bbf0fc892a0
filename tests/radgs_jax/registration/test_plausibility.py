"""Geometry before a search: what cannot be meant is one line that names the mistake, and real set-ups pass."""

import dataclasses
import inspect
import time

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from radgs_jax import errors
from radgs_jax import gaussians
from radgs_jax.geometry import rigid_host
from radgs_jax.geometry.camera import Camera
from radgs_jax.geometry.xray import XRay
from radgs_jax.registration import confidence
from radgs_jax.registration import plausibility
from radgs_jax.registration import view_checks
from radgs_jax.registration.prepared import Vertebra

LPS = np.diag([-1.0, -1.0, 1.0, 1.0])
CENTRE_CT = np.array([-60.0, -85.0, -240.0])


def vertebra(scale=1.0):
    """A bone of 90 x 70 x 45 mm times `scale`, at CENTRE_CT."""
    rng = np.random.default_rng(0)
    points = rng.normal(size=(500, 3))
    points = points / np.linalg.norm(points, axis=1, keepdims=True) * [45, 35, 22] * scale
    box = np.eye(4)
    box[:3, 3] = CENTRE_CT
    cloud = gaussians.from_density(np.ones((4, 4, 4)), np.eye(4), 27)
    return Vertebra(20, np.ones((2, 2, 2)), np.ones((2, 2, 2), bool), np.eye(4), box, cloud, points + CENTRE_CT)


def turned_about_z(degrees, distance_mm=700.0):
    """camera_from_world of a source that turns round the patient at the isocentre's height."""
    a = np.radians(degrees)
    E = np.eye(4)
    E[:3, :3] = [[-np.cos(a), -np.sin(a), 0], [0, 0, -1], [np.sin(a), -np.cos(a), 0]]
    E[2, 3] = distance_mm
    return E


def camera(degrees=0.0, distance_mm=700.0, sdd_mm=1124.0, panel_mm=290.0, size=(488, 488)):
    """A centred camera; size: (width, height)."""
    focal = sdd_mm / panel_mm * size[0]
    k = np.array([focal, focal, 0.5 * (size[0] - 1), 0.5 * (size[1] - 1)])
    return Camera(k, turned_about_z(degrees, distance_mm), size[1], size[0])


def xrays(*cameras):
    """X-rays of waves in a direction of their own."""
    rng, made = np.random.default_rng(1), []
    for c in cameras:
        v, u = np.indices((c.height, c.width)) / max(c.height, c.width)
        along_u, along_v, phase = rng.uniform(5.0, 15.0, 3)
        made.append(XRay(np.sin(along_u * u + along_v * v + phase), np.ones((c.height, c.width), bool), c))
    return made


def start(place_mm=(12.0, -18.0, 9.0), turn=(0.1, -0.15, 0.2)):
    """world_from_ct that puts the vertebra's centre at a place of the world."""
    T = rigid_host.matrix(turn, 0.0)
    T[:3, 3] = np.asarray(place_mm) - T[:3, :3] @ CENTRE_CT
    return T


def least_seconds(work, times=5):
    """Least time of this thread that `work()` takes."""
    taken = []
    for _ in range(times):
        began = time.thread_time()
        work()
        taken.append(time.thread_time() - began)
    return min(taken)


def note_or_refusal(bone, views):
    """What the check says of views, raised or returned."""
    try:
        return plausibility.check(bone, views, start())
    except errors.BadGeometry as error:
        return str(error)


def shifted(T, factor):
    T = T.copy()
    T[:3, 3] *= factor
    return T


def refusal(cameras, T, bone=None):
    """The line of a refusal."""
    with pytest.raises(errors.BadGeometry) as caught:
        plausibility.check(bone or vertebra(), xrays(*cameras), T)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def every(change):
    """Cameras of two views, each changed by `change(intrinsics, E)`."""
    made = []
    for view in (camera(0.0), camera(90.0)):
        k, E = change(view.intrinsics.copy(), view.camera_from_world.copy())
        made.append(view.replace(intrinsics=k, camera_from_world=E))
    return made


WRONG_CAMERAS = {
    "metres": (lambda k, E: (k, shifted(E, 1e-3)), r"views\[0\].E.*times 1000, from metres"),
    "centimetres": (lambda k, E: (k, shifted(E, 0.1)), r"views\[0\].E.*times 10, from centimetres"),
    "micrometres": (lambda k, E: (k, shifted(E, 1e3)), r"views\[0\].E.*over 1000, from micrometres"),
    "inverse": (lambda k, E: (k, np.linalg.inv(E)), r"views\[0\].E: found .*isocentre at .*the inverse of E"),
    "axes of OpenGL": (lambda k, E: (k, np.diag([1, -1, -1, 1.0]) @ E), r"views\[0\].E.*rows 2 and 3 of E negated"),
    "K in metres": (lambda k, E: (1e-3 * k, E), r"views\[0\].K.*angle of view 17.*1000 times these numbers"),
    "K in mm": (lambda k, E: (0.594 * k, E), r"views\[0\].K.*over 0.594 .*look like mm"),
    "K in mm about the middle": (
        lambda k, E: (np.array([1124.0, 1124.0, 0, 0]), E),
        r"views\[0\].K.*fx 1124.*look like mm",
    ),
    "K in mm near the middle": (
        lambda k, E: (np.array([1124.0, 1124.0, 2.5, -1.0]), E),
        r"views\[0\].K.*fx 1124.*look like mm about",
    ),
    "K of an image twice as large": (
        lambda k, E: (np.array([2 * k[0], 2 * k[1], 487.5, 487.5]), E),
        r"views\[0\].K.*about 2 times as large",
    ),
    "K of an image half as large": (lambda k, E: (0.5 * k - [0, 0, 0.25, 0.25], E), r"views\[0\].K.*another image's"),
    "wide": (
        lambda k, E: (k * [0.26, 0.26, 1, 1], E),
        r"views\[0\].K.*angle of view 52.* wanted focal lengths in pixels",
    ),
    "fx and fy": (lambda k, E: (k * [1, 4, 1, 1], E), r"views\[0\].K.*fx / fy 0.25"),
}


@pytest.mark.parametrize("name", WRONG_CAMERAS)
def test_a_mistake_in_the_cameras_is_named(name):
    change, said = WRONG_CAMERAS[name]
    with_mistake = every(change)
    with pytest.raises(errors.BadGeometry, match=f"^cameras.json: {said}") as caught:
        plausibility.check(vertebra(), xrays(*with_mistake), start(), "cameras.json", "T.json")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600


WRONG_STARTS = {
    "metres": (lambda T: shifted(T, 1e-3), "times 1000, from metres"),
    "centimetres": (lambda T: shifted(T, 0.1), "times 10, from centimetres"),
    "LPS": (lambda T: LPS @ T @ LPS, "this looks like LPS"),
    "inverse": (np.linalg.inv, "its inverse .this looks like ct_from_world"),
    "ITK": (lambda T: LPS @ np.linalg.inv(T) @ LPS, "the inverse in RAS .this looks like an ITK transform"),
    "elsewhere": (lambda T: rigid_host.matrix([0, 0, 0], (0, 0, 400.0)) @ T, "it there in part at least"),
}


@pytest.mark.parametrize("name", WRONG_STARTS)
def test_a_mistake_in_the_start_is_named(name):
    """With a place that its mirror image does not share."""
    change, said = WRONG_STARTS[name]
    T = change(start((-40.0, 30.0, 5.0)))
    with pytest.raises(errors.BadGeometry, match=rf"^T.json: world_from_ct: found in view \d the isocentre .*{said}"):
        plausibility.check(vertebra(), xrays(camera(0.0), camera(90.0)), T, "cameras.json", "T.json")


def test_mistakes_of_cameras_and_start_together():
    made = every(lambda k, E: (k, shifted(E, 1e-3)))
    assert "metres to mm, and of the start pose its translation times 1000, from metres" in refusal(
        made, shifted(start(), 1e-3)
    )
    one = camera(0.0), camera(90.0).replace(camera_from_world=np.linalg.inv(camera(90.0, 700.0).camera_from_world))
    one[1].camera_from_world[:3, 3] += [5.0, 0, 0]
    assert "views[1].E" in refusal(one, start())


def test_the_vertebra_is_at_a_possible_distance_and_size():
    assert "from the source" in refusal([camera(0.0), camera(90.0, distance_mm=90.0)], start((0, 0, 0)), vertebra(0.1))
    assert "behind the source" in refusal([camera(0.0, distance_mm=-700.0)], start())
    coarse = [camera(d, size=(24, 24)) for d in (0.0, 90.0)]
    assert "size in the image" in refusal(coarse, start((0, 0, 0)), vertebra(0.4))
    close = [camera(d, panel_mm=30.0) for d in (0.0, 90.0)]
    assert "size against the image" in refusal(close, start((0, 0, 0)), vertebra(2.0))


def test_views_that_see_different_places():
    away = camera(90.0)
    away.camera_from_world[:3, 3] += [0, 900.0, 0]
    found = refusal([camera(0.0), away], start())
    assert found.startswith("cameras: views 1 and 2: found central rays 900 mm apart")


def test_one_camera_or_one_image_twice():
    views = xrays(camera(0.0), camera(0.02), camera(90.0))
    with pytest.raises(errors.BadGeometry, match="^cameras: views 1 and 2: found cameras .*one camera twice"):
        plausibility.check(vertebra(), views, start())
    views = xrays(camera(0.0), camera(90.0))
    for copy in (
        views[0].line_integrals,
        0.5 * views[0].line_integrals + 2.0,
        np.round(50 * views[0].line_integrals) / 50,
    ):
        again = dataclasses.replace(views[1], line_integrals=copy)
        with pytest.raises(errors.BadGeometry, match="^X-rays: views 1 and 2: found a correlation .*one image twice"):
            plausibility.check(vertebra(), [views[0], again], start())
    # What is invalid is not compared: there it may be anything.
    valid = np.broadcast_to(np.arange(488) < 244, (488, 488))
    for elsewhere in (np.nan, 7.0):
        images = [np.where(valid, x.line_integrals, elsewhere) for x in views]
        pair = [dataclasses.replace(x, line_integrals=image, valid=valid) for x, image in zip(views, images)]
        assert plausibility.check(vertebra(), pair, start()) == ()


@pytest.mark.parametrize(
    "degrees, said", [(5.0, "5."), (19.0, "1"), (165.0, "1"), (180.0, "0."), (25.0, None), (155.0, None)]
)
def test_views_from_one_side_are_said_and_not_refused(degrees, said):
    notes = plausibility.check(vertebra(), xrays(camera(0.0), camera(degrees)), start((0.0, 0.0, 0.0)))
    assert len(notes) == (said is not None)
    if said:
        assert f"the views are {said}" in notes[0] and "no pose is accepted" in notes[0]


SETUPS = {
    "C-arm": dict(sdd_mm=1124.0, distance_mm=700.0, panel_mm=290.0),
    "small C-arm": dict(sdd_mm=900.0, distance_mm=500.0, panel_mm=200.0, size=(1024, 1024)),
    "large C-arm": dict(sdd_mm=1300.0, distance_mm=900.0, panel_mm=410.0, size=(1440, 1024)),
    "EOS": dict(sdd_mm=1300.0, distance_mm=987.0, panel_mm=450.0, size=(1764, 1900)),
    "panel on a wall": dict(sdd_mm=1800.0, distance_mm=1500.0, panel_mm=430.0, size=(3000, 3000)),
    "panel near": dict(sdd_mm=1000.0, distance_mm=850.0, panel_mm=430.0, size=(512, 400)),
    "tiny": dict(size=(32, 32)),
    "a window of 64 pixels": dict(sdd_mm=1124.0, panel_mm=64 * 1.5, size=(64, 48)),
    "bench-top": dict(sdd_mm=400.0, distance_mm=160.0, panel_mm=150.0, size=(1500, 1000)),
    "wrist": dict(sdd_mm=1400.0, distance_mm=1000.0, panel_mm=317.0, size=(1760, 1760)),
}


@pytest.mark.parametrize("name", SETUPS)
@pytest.mark.parametrize("off_mm", [0.0, 25.0, 70.0])
def test_real_set_ups_pass(name, off_mm):
    """With a principal point off the middle, one view or two, images of two sizes, and starts to 70 mm off."""
    setup, scale = SETUPS[name], 0.3 if name in ("bench-top", "wrist") else 1.0
    off_mm = min(off_mm, 25.0) if "window" in name else off_mm  # 70 mm is further than such a window reaches
    first, second = camera(0.0, **setup), camera(100.0, **setup)
    first.intrinsics[:] *= [1, 1.002, 1.1, 0.93]
    second = second.replace(height=second.height - 2)
    rng = np.random.default_rng(3)
    for views in ([first], [first, second]):
        for _ in range(5):
            away = rng.normal(size=3)
            place = (12.0, -8.0, 5.0) + off_mm * scale * away / np.linalg.norm(away)
            turn = Rotation.random(random_state=int(rng.integers(2**31))).as_rotvec()
            notes = plausibility.check(vertebra(scale), xrays(*views), start(scale * place, turn))
            notes = [n for n in notes if "share" not in n and "single view" not in n and "size against" not in n]
            assert notes == []


def test_windows_and_long_bones_pass():
    """The principal point may lie anywhere outside a window that shows the vertebra; a long bone may be larger than the image."""
    views = [camera(0.0), camera(90.0)]
    for view in views:
        u, v = np.round(view.intrinsics[2:] + [30, -60])
        view.intrinsics[2:] -= [u - 50, v - 100]
    small = [view.replace(width=200, height=260) for view in views]
    notes = plausibility.check(vertebra(0.4), xrays(*small), start((0.0, 0.0, 0.0)))
    assert all("principal point" in note or "share" in note for note in notes)
    notes = plausibility.check(vertebra(4.0), xrays(camera(0.0), camera(90.0)), start((0.0, 0.0, 0.0)))
    assert notes and all("size against the image" in note or "share" in note for note in notes)


def test_half_a_pixel_is_said_and_widens_the_radius():
    views = [camera(0.0), camera(90.0)]
    for view in views:
        view.intrinsics[2:] += 0.5
    notes = plausibility.check(vertebra(), xrays(*views), start((0, 0, 0)))
    assert len(notes) == 2 and all("half the image's size" in note for note in notes)
    mm_per_px = 700.0 / views[0].intrinsics[0]
    assert plausibility.half_pixel_error(views, np.zeros(3)) == pytest.approx(np.sqrt(3) * 0.5 * mm_per_px)
    # Both views show the vertebra where it is at the shifted place.
    moved = np.array([-0.5, -0.5, 0.5]) * mm_per_px
    for view, exact in zip(views, (camera(0.0), camera(90.0))):
        p = view.camera_from_world[:3, :3] @ moved + view.camera_from_world[:3, 3]
        assert np.abs(p[:2] / p[2] * view.intrinsics[:2] + view.intrinsics[2:] - exact.intrinsics[2:]).max() < 1.01
    binned = [dataclasses.replace(v, intrinsics=v.intrinsics + [0, 0, -0.25, -0.25]) for v in views]
    assert plausibility.half_pixel_error(binned, np.zeros(3)) == pytest.approx(np.sqrt(3) * 0.25 * mm_per_px)
    assert plausibility.half_pixel_error([camera(0.0), camera(90.0)], np.zeros(3)) == 0.0


def test_a_hint_after_a_refused_search():
    """A start in LPS that every image shows; a right one has no hint."""
    views, T = xrays(camera(0.0), camera(90.0)), start((-20.0, 15.0, 5.0))
    swapped = LPS @ T @ LPS
    box = vertebra()
    assert "LPS" in plausibility.hint(box, xrays(*(camera(d, panel_mm=600.0) for d in (0.0, 90.0))), swapped)
    near = start((2.0, 1.0, 5.0), (0.0, 0.0, 0.0))
    assert plausibility.hint(box, views, near) == ""


def test_every_check_has_bounds_and_a_reason_and_takes_milliseconds():
    for name, bounds in view_checks.CHECKS.items():
        assert bounds.why.endswith((".", "`.")) and bounds.wanted and bounds.possible[0] < bounds.possible[1], name
        assert (
            bounds.usual[0] >= bounds.possible[0]
            and bounds.usual[1] <= bounds.possible[1]
            or bounds.usual == view_checks.ANY
        )
    assert inspect.signature(plausibility.check).parameters["cameras_from"].default == "cameras"
    views, bone = xrays(*(camera(d, size=(1024, 1024)) for d in (0.0, 90.0))), vertebra()
    made = xrays(*every(lambda k, E: (k, np.linalg.inv(E))))
    # Against a median of as many pixels, about 15 ms of a laptop's core, so that a slow machine is no failure.
    pixels = np.random.default_rng(0).random(1024 * 1024)
    median = least_seconds(lambda: np.median(pixels))
    for given in (views, made):
        assert least_seconds(lambda given=given: note_or_refusal(bone, given)) < 3 * median


def test_the_angle_between_views():
    E = np.stack([turned_about_z(a) for a in (0.0, 90.0, 10.0)])
    assert confidence.view_angle(E[:1], np.zeros(3)) is None
    assert confidence.view_angle(E[:2], np.zeros(3)) == pytest.approx(np.pi / 2)
    assert np.degrees(confidence.view_angle(E[[0, 2]], np.zeros(3))) == pytest.approx(10.0)
    assert np.degrees(confidence.view_angle(E, np.zeros(3))) == pytest.approx(90.0)
    opposite = np.stack([turned_about_z(0.0), turned_about_z(178.0)])
    assert np.degrees(confidence.view_angle(opposite, np.zeros(3))) == pytest.approx(2.0)


@pytest.mark.parametrize(
    "change", [lambda a: 0 * a + 11.0, lambda a: 1000 * a, lambda a: a / 1000], ids=["black", "x", "/"]
)
def test_line_integrals_that_no_body_has_are_refused(change):
    first, second = xrays(camera(), camera(90.0))
    changed = XRay(change(second.line_integrals), second.valid, second.camera)
    with pytest.raises(
        errors.BadGeometry, match=r"X-rays: view 2: found line integrals from .*, wanted line integrals"
    ):
        plausibility.check(vertebra(), [first, changed], start())


def test_images_of_noise_are_told_from_noisy_ones():
    first, second = xrays(camera(), camera(90.0))
    shape = second.line_integrals.shape
    noise, (v, u) = np.random.default_rng(0).normal(3.0, 0.5, shape), np.indices(shape) / max(shape)
    given = lambda image: [first, XRay(image.astype(np.float32), second.valid, second.camera)]
    with pytest.raises(errors.InputError, match=r"X-rays: view 2: found areas that have nothing in common"):
        plausibility.check(vertebra(), given(noise), start())
    assert plausibility.check(vertebra(), given(noise + 0.5 * np.sin(9.0 * u + 5.0 * v)), start()) == ()


def test_contrast_is_measured_where_pixels_count():
    first, second = xrays(camera(), camera(90.0))
    image, valid = second.line_integrals.copy(), second.valid.copy()
    image[:50], valid[:50] = 1e4, False
    assert plausibility.check(vertebra(), [first, XRay(image, valid, second.camera)], start()) == ()

"""DDGS-CT: its start, its colours by direction, and small fits and registrations."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels.drr import drr
from radgs_jax.baselines import blending
from radgs_jax.baselines import box
from radgs_jax.baselines import ddgs
from radgs_jax.geometry import rigid
from radgs_jax.registration.gauss_newton import LevelViews

SMALL = ddgs.Config(
    surface=70, inside=60, features=4, steps=120, tile_px=16, listed=130, pixel_mm=3.0, crop_px=32, pose_steps=60
)
PX = 32
BOX_FROM_INDEX = np.array([[0, 3.5, 0.6, -40.0], [-4.0, 0, 0, 33.0], [0, -0.5, 3.8, -32.0], [0, 0, 0, 1.0]])
"""Turned, sheared and with voxels of different sides."""


def _lump():
    """A dense shell with a weaker inside and a process, 1/mm."""
    index = np.stack(np.meshgrid(*[np.arange(n) for n in (18, 20, 17)], indexing="ij"), -1).astype(float)
    body = np.linalg.norm((index - [9.0, 9.0, 8.0]) / [5.5, 4.0, 5.0], axis=-1)
    process = np.linalg.norm((index - [9.0, 15.0, 8.0]) / [1.5, 3.5, 2.0], axis=-1)
    density = 0.05 / (1.0 + np.exp(8.0 * (np.abs(body - 0.9) - 0.2))) + 0.02 / (1.0 + np.exp(8.0 * (body - 0.9)))
    return np.maximum(density, 0.04 / (1.0 + np.exp(8.0 * (process - 1.0))))


def _cameras(count, seed):
    """Intrinsics, and camera_from_box around two directions at a right angle."""
    rng = np.random.default_rng(seed)
    turns = rng.uniform(-0.25, 0.25, (count, 3))
    turns[count // 2 :, 1] += 0.5 * np.pi
    cameras = np.tile(np.eye(4), (count, 1, 1))
    cameras[:, :3, :3] = np.asarray(rigid.exp_so3(jnp.asarray(turns)))
    cameras[:, 2, 3] = 700.0
    return np.tile([700.0 / 3.0, 700.0 / 3.0, 15.5, 15.5], (count, 1)).astype(np.float32), cameras.astype(np.float32)


def _views(count, seed):
    intrinsics, cameras = _cameras(count, seed)
    index_from_camera = np.linalg.inv(cameras @ BOX_FROM_INDEX)[:, :3].astype(np.float32)
    images = drr(jnp.asarray(_lump(), jnp.float32), jnp.asarray(index_from_camera), jnp.asarray(intrinsics), PX, PX)
    return images, intrinsics, cameras


def _init(config=SMALL, key=0):
    return ddgs.init(config, _lump(), BOX_FROM_INDEX, jax.random.key(key))


def _psnr(params, views):
    images, intrinsics, cameras = views
    off = ddgs.render(params, SMALL, intrinsics, cameras, PX, PX) - images
    return float(-10 * jnp.log10(jnp.mean((off / params["scale"]) ** 2)))


def test_vertices_are_the_crossings_of_every_edge():
    density = np.random.default_rng(0).normal(size=(4, 5, 3))
    expected = []
    for index in np.ndindex(*density.shape):
        for axis in range(3):
            other = tuple(n + (i == axis) for i, n in enumerate(index))
            if other[axis] < density.shape[axis] and (density[index] - 0.2) * (density[other] - 0.2) < 0:
                t = (0.2 - density[index]) / (density[other] - density[index])
                expected.append(np.array(index) + t * np.eye(3)[axis])
    found = ddgs.crossings(density, 0.2)
    np.testing.assert_allclose(sorted(found.tolist()), sorted(np.array(expected).tolist()))


def test_the_start_is_on_the_surface_and_in_what_is_dense():
    density, params = _lump(), _init()
    index = {
        name: (box.UNIT_MM * params[name]["position"] - BOX_FROM_INDEX[:3, 3]) @ np.linalg.inv(BOX_FROM_INDEX[:3, :3]).T
        for name in ("isotropic", "directional")
    }
    assert len(index["isotropic"]) == 100 and len(index["directional"]) == 30
    vertices = ddgs.crossings(density, 0.5 * (density.min() + density.max()))
    away = np.linalg.norm(np.asarray(index["isotropic"])[:70, None] - vertices, axis=-1).min(1)
    assert away.max() < 1e-3
    drawn = np.concatenate([index["isotropic"][70:], index["directional"]])
    np.testing.assert_allclose(drawn, np.rint(drawn), atol=1e-3)
    at = density[tuple(np.rint(drawn).astype(int).T)]
    assert abs(at.mean() / ((density**2).sum() / density.sum()) - 1.0) < 0.15
    for part in (params["isotropic"], params["directional"]):
        mean = np.asarray(part["position"])
        distances = np.sort(np.linalg.norm(mean[:, None] - mean, axis=-1), 1)[:, 1:4]
        np.testing.assert_allclose(np.exp(part["size"][:, 1]), np.sqrt((distances**2).mean(1)), rtol=1e-4)
        np.testing.assert_allclose(jax.nn.sigmoid(part["opacity"]), 0.1, rtol=1e-6)
    assert np.array_equal(_init()["isotropic"]["position"], params["isotropic"]["position"])
    assert not np.array_equal(_init(key=1)["isotropic"]["position"], params["isotropic"]["position"])


def test_too_few_points_are_refused():
    with pytest.raises(ValueError, match="on the surface, wanted 100000"):
        _init(dataclasses.replace(SMALL, surface=100_000))
    with pytest.raises(ValueError, match="of positive density, wanted 7000"):
        _init(dataclasses.replace(SMALL, inside=7000))


def test_harmonics_are_orthonormal_on_the_sphere_and_have_no_constant():
    heights, weights = np.polynomial.legendre.leggauss(8)
    angles = np.arange(16) * np.pi / 8
    r = np.sqrt(1 - heights**2)[:, None]
    d = np.stack(np.broadcast_arrays(r * np.cos(angles), r * np.sin(angles), heights[:, None]), -1)
    w = (weights[:, None] * np.pi / 8 * np.ones(16)).ravel()
    Y = np.asarray(ddgs.harmonics(jnp.asarray(d))).reshape(-1, 3)
    np.testing.assert_allclose(np.einsum("n,ni,nj->ij", w, Y, Y), np.eye(3), atol=1e-5)
    np.testing.assert_allclose(w @ Y, 0.0, atol=1e-5)


def _shaken(params, seed=0):
    """Parameters with colours and shapes as after a fit."""
    rng = np.random.default_rng(seed)
    noise = {"features": 1.0, "opacity": 0.5, "size": 0.2, "rotation": 0.3}
    return jax.tree_util.tree_map_with_path(
        lambda path, a: a + noise.get(path[-1].key, 0.0) * jnp.asarray(rng.normal(size=a.shape), a.dtype), params
    )


def test_colours_are_those_of_the_rays_in_the_frame_of_the_box():
    params = _shaken(_init())
    _, cameras = _cameras(4, 3)
    alike, turned = ddgs.colours(params, cameras)
    p = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
    expected = p["isotropic"]["features"] @ p["isotropic"]["basis"]
    np.testing.assert_allclose(alike, np.tile(1 / (1 + np.exp(-expected)), (4, 1)), rtol=1e-4)
    for camera, found in zip(cameras.astype(np.float64), turned):
        ray = 48.0 * p["directional"]["position"] - np.linalg.inv(camera)[:3, 3]
        x, y, z = ray.T / np.linalg.norm(ray, axis=1)
        Y = np.sqrt(3 / (4 * np.pi)) * np.stack([y, z, x], -1)
        logit = np.einsum("nl,lk,nk->n", Y, p["directional"]["basis"], p["directional"]["features"])
        np.testing.assert_allclose(found, 1 / (1 + np.exp(-logit)), rtol=1e-4)
    # A turn of the C-arm about the beam changes the image's axes, not the rays.
    about_beam = rigid.transform(rigid.exp_so3(jnp.asarray([0.0, 0.0, 0.7])), jnp.zeros(3))
    np.testing.assert_allclose(ddgs.colours(params, rigid.matmul(about_beam, cameras))[1], turned, atol=1e-5)
    assert np.abs(turned[0] - turned[2]).max() > 0.2


def test_both_sets_are_drawn_in_one_order():
    """The image is the dense one of all Gaussians together, and its gradients reach every parameter."""
    params = {**_shaken(_init()), "scale": jnp.asarray(2.5)}
    intrinsics, cameras = _cameras(2, 4)
    both = {
        part: jnp.concatenate([params[name][part] for name in ("directional", "isotropic")])
        for part in ("position", "size", "rotation", "opacity")
    }
    quaternion = both["rotation"] / jnp.linalg.norm(both["rotation"], axis=1, keepdims=True)
    shape = 48.0 * both["position"], 48.0 * jnp.exp(both["size"]), quaternion, jax.nn.sigmoid(both["opacity"])
    colour = jnp.concatenate(ddgs.colours(params, cameras)[::-1], 1)
    expected = blending.blend(blending.footprints(*shape, intrinsics, cameras), colour, PX, PX)
    found = ddgs.render(params, SMALL, intrinsics, cameras, PX, PX)
    np.testing.assert_allclose(found, 2.5 * expected, atol=2e-5)
    gradient = jax.grad(lambda p: jnp.sum(ddgs.render(p, SMALL, intrinsics, cameras, PX, PX) ** 2))(params)
    assert all(np.isfinite(g).all() and np.abs(g).max() > 0 for g in jax.tree.leaves(gradient))


def test_a_fit_shows_unseen_views_better_than_from_a_uniform_start():
    seen, unseen = _views(12, 0), _views(4, 1)
    start = _init()
    params = ddgs.fit(SMALL, start, seen, jax.random.key(0))
    np.testing.assert_allclose(params["scale"], jnp.max(seen[0]))
    first = _psnr({**start, "scale": params["scale"]}, unseen)
    found = _psnr(params, unseen)
    assert found > first + 8.0 and found > 24.0
    assert all(np.isfinite(a).all() for a in jax.tree.leaves(params))
    anywhere = ddgs.init_uniform(SMALL, jax.random.key(0))
    assert jax.tree.map(jnp.shape, anywhere) == jax.tree.map(jnp.shape, start)
    place = np.concatenate([anywhere[name]["position"] for name in ("isotropic", "directional")])
    assert np.abs(place).max() <= 1.0 and np.allclose(place.std(0), 3**-0.5, atol=0.1)
    assert found > _psnr(ddgs.fit(SMALL, anywhere, seen, jax.random.key(0)), unseen) + 1.0


def _dependence(params, cameras):
    """How much colours of the directional set change from view to view."""
    return float(jnp.mean(jnp.std(ddgs.colours(params, cameras)[1], 0)))


def test_colours_depend_on_the_direction_only_where_targets_do():
    """Fitted to an isotropic model's images, the directional set stays isotropic; it follows a haze of one direction."""
    intrinsics, cameras = _cameras(12, 0)
    start = _init()
    truth = _shaken(start)
    truth["directional"] = start["directional"]
    images = ddgs.render(truth, SMALL, intrinsics, cameras, PX, PX)
    near = {**truth, "isotropic": {**truth["isotropic"], "features": 0.8 * truth["isotropic"]["features"]}}
    alike = ddgs.fit(SMALL, near, (images, intrinsics, cameras), jax.random.key(0))
    haze = images.at[6:].multiply(0.5)
    turned = ddgs.fit(SMALL, near, (haze, intrinsics, cameras), jax.random.key(0))
    assert _dependence(alike, cameras) < 0.03
    assert _dependence(turned, cameras) > 2.5 * _dependence(alike, cameras)


def _seen(params, world_from_box, camera_from_world, intrinsics, size):
    images = ddgs.render(params, SMALL, intrinsics, rigid.matmul(camera_from_world, world_from_box), *size)
    return LevelViews(list(0.8 * images + 0.4), list(jnp.ones(images.shape, bool)), jnp.asarray(intrinsics))


def test_registration_finds_the_pose_of_its_own_images_whatever_their_gain():
    params = _shaken(_init())
    intrinsics, _ = _cameras(2, 0)
    camera_from_world = jnp.asarray(_cameras(2, 5)[1])
    truth = rigid.motion_about(jnp.zeros(3), jnp.asarray([0.2, -0.1, 0.3, 4.0, -6.0, 5.0]))
    off = rigid.motion_about(truth[:3, 3], jnp.asarray([0.05, -0.06, 0.04, 2.5, -2.0, 2.0]))
    start = rigid.matmul(off, truth)
    seen = _seen(params, truth, camera_from_world, intrinsics + np.array([0, 0, 6.0, 4.0], np.float32), (40, 44))
    found = ddgs.register(params, SMALL, seen, camera_from_world, start)
    distance = [float(rigid.distance(pose, truth, jnp.zeros(3))) for pose in (start, found)]
    assert distance[0] > 3.5 and distance[1] < 0.6
    # The first pose that is judged is the start, and none that is less similar replaces it.
    once = dataclasses.replace(SMALL, pose_steps=1)
    np.testing.assert_allclose(ddgs.register(params, once, seen, camera_from_world, start), start, atol=1e-5)
    few = dataclasses.replace(SMALL, pose_steps=4)
    again = ddgs.register(params, few, seen, camera_from_world, truth)
    assert float(rigid.distance(again, truth, jnp.zeros(3))) < 0.1


def test_presets():
    assert ddgs.QUICK == dataclasses.replace(ddgs.Config(), steps=750, pose_steps=75)
    assert (ddgs.ORIGINAL.surface, ddgs.ORIGINAL.inside, ddgs.ORIGINAL.steps) == (15_000, 10_000, 30_000)

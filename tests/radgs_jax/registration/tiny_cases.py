"""Made-up refinements, and a tiny prepared vertebra with its X-rays."""

import jax
import numpy as np
import tiny
from scipy import ndimage

from radgs_jax import gaussians
from radgs_jax.geometry import resample
from radgs_jax.geometry import rigid_host
from radgs_jax.geometry.camera import Camera
from radgs_jax.geometry.xray import XRay
from radgs_jax.models import radgs_reg
from radgs_jax.models import trained
from radgs_jax.registration.gauss_newton import Level
from radgs_jax.registration.gauss_newton import RefineConfig
from radgs_jax.registration.gauss_newton import Refined
from radgs_jax.registration.parts import on_device_parts
from radgs_jax.registration.parts import Parts
from radgs_jax.registration.prepared import fine_cloud
from radgs_jax.registration.prepared import PART_MM
from radgs_jax.registration.prepared import Prepared
from radgs_jax.registration.prepared import Vertebra

REFINE = RefineConfig(levels=(Level(6.0, 24, 2, 4.0, 8.0, 0.1), Level(3.0, 32, 1, 3.0, 6.0)))


def refined_like(support, step, error_scale, seed):
    """A `Refined` in numpy of two views: their support, the last step in mm, and a factor on its random covariance's root."""
    rng = np.random.default_rng(seed)
    root = (0.2 * rng.normal(size=(6, 6)) + np.eye(6)) * ([25.0] * 3 + [1.0] * 3)
    information = root.T @ root / error_scale**2
    like = np.array([support, support])
    return Refined(
        np.eye(4),
        np.eye(4),
        information,
        np.linalg.inv(information),
        like,
        like - 0.05,
        np.float32(step),
        np.float32(0.01),
        np.float32(0),
        np.float32(2),
        np.eye(4)[None],
        np.mean(like, keepdims=True),
    )


def tiny_prepared():
    """A vertebra of a few centimetres in a small body, with the untrained tiny network and without an acceptance rule."""
    rng = np.random.default_rng(0)
    shape = (20, 18, 12)
    x, y, z = (3.0 * (np.indices(shape)[axis] - 0.5 * (shape[axis] - 1)) for axis in range(3))
    mask = (x / 24) ** 2 + (y / 20) ** 2 + (z / 14) ** 2 < 1
    density = np.where(mask, 0.03 + 0.01 * rng.uniform(size=shape), 0.0)
    ct_from_index = np.diag([3.0, 3.0, 3.0, 1.0])
    ct_from_index[:3, 3] = [-28.5, -25.5, -16.5]
    points = np.stack([x[mask], y[mask], z[mask]], -1)[::7]
    cloud = gaussians.from_density(density, ct_from_index, tiny.MODEL.gaussians)
    vertebra = Vertebra(20, density, mask, ct_from_index, np.eye(4), cloud, points)
    excess, box_from_excess = resample.block_average(0.5 * density, ct_from_index, PART_MM)
    rest = np.maximum(ndimage.gaussian_filter(rng.normal(0.015, 0.02, (24, 22, 24)), 1.0), 0.0)
    box_from_rest = np.diag([6.0, 6.0, 6.0, 1.0])
    box_from_rest[:3, 3] = [-69.0, -63.0, -69.0]
    parts = on_device_parts(Parts(excess, box_from_excess, rest, box_from_rest))
    params = jax.jit(lambda key: radgs_reg.init(tiny.MODEL, key))(jax.random.key(0))
    model = trained.Model(params, tiny.MODEL, {0: np.zeros(trained.MEAN_SHAPE, np.float32)})
    return Prepared(model, vertebra, fine_cloud(vertebra), parts, REFINE)


def two_xrays(seed=0):
    """Two X-rays of 60 x 60 pixels of 3 mm, from the front and the side, of smooth noise."""
    poses = np.zeros((2, 4, 4))
    poses[0, :3, :3] = [[-1, 0, 0], [0, 0, -1], [0, -1, 0]]
    poses[1, :3, :3] = [[0, -1, 0], [0, 0, -1], [1, 0, 0]]
    poses[:, 2, 3], poses[:, 3, 3] = 700.0, 1.0
    images = 2.0 + 5.0 * ndimage.gaussian_filter(np.random.default_rng(seed).normal(size=(2, 60, 60)), (0, 2, 2))
    cameras = [Camera(np.array([233.0, 233.0, 29.5, 29.5]), pose, 60, 60) for pose in poses]
    return [XRay(image, None, camera) for image, camera in zip(images, cameras)]


def start():
    """A start pose world_from_ct, some millimetres off the isocentre."""
    return rigid_host.matrix([0.05, -0.04, 0.03], (3.0, -2.0, 4.0))

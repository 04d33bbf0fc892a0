"""X-rays of a scan with one vertebra at its own pose, and what a real detector does to them."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import scipy

from data_pipelines.ct import whole_body
from kernels.drr import drr


@functools.partial(jax.jit, static_argnums=(3, 4, 5))
def _drr(volume, index_from_camera, intrinsics, height, width, step_mm):
    return drr(volume, index_from_camera, intrinsics, height, width, step_mm=step_mm)


def render(volume, ct_from_index, world_from_ct, intrinsics, camera_from_world, size, step_mm, oversample=1):
    """Line integrals (V, height, width) of one voxel volume at a pose.

    Args:
      volume: (X, Y, Z) 1/mm; ct_from_index, world_from_ct: (4, 4).
      intrinsics: (V, 4); camera_from_world: (V, 4, 4); size: (height, width); step_mm: sample distance.
      oversample: rays per pixel side; each pixel is the mean of oversample^2 rays, as a detector integrates.
    """
    index_from_camera = np.linalg.inv(camera_from_world @ world_from_ct @ ct_from_index)[:, :3]
    fine = np.array(intrinsics, np.float64) * oversample
    fine[:, 2:] += 0.5 * (oversample - 1)
    height, width = size
    image = _drr(
        jnp.asarray(_pad(volume)),
        jnp.asarray(index_from_camera, jnp.float32),
        jnp.asarray(fine, jnp.float32),
        height * oversample,
        width * oversample,
        step_mm,
    )
    blocks = np.asarray(image).reshape(len(fine), height, oversample, width, oversample)
    return blocks.mean((2, 4))


def _pad(volume, multiple=32):
    # Volumes differ in size from vertebra to vertebra; few distinct shapes mean few compilations.
    return np.pad(volume, [(0, -n % multiple) for n in volume.shape])


class RigidBody:
    """A scan split into one vertebra and the rest, ready to be X-rayed."""

    def __init__(self, whole, vertebra):
        """whole: `whole_body.WholeBody`, shared by the vertebrae of a scan; vertebra: `prepared.Vertebra` of the same scan."""
        self.vertebra = vertebra
        self.rest, self.rest_ct_from_index = whole.without(vertebra), whole.ct_from_index
        self.excess = whole_body.excess_over_fill(vertebra)

    def render_rest(self, world_from_rest, intrinsics, camera_from_world, size, step_mm=2.0):
        """Line integrals (V, H, W) of everything but the vertebra, placed by `world_from_rest` (4, 4); arguments as `render`."""
        return render(self.rest, self.rest_ct_from_index, world_from_rest, intrinsics, camera_from_world, size, step_mm)

    def render_vertebra(self, world_from_ct, intrinsics, camera_from_world, size, step_mm=0.75, oversample=2):
        """Line integrals, (V, H, W) each, of the vertebra's excess over muscle and of the vertebra alone; arguments as `render`."""
        arguments = (
            self.vertebra.ct_from_index,
            world_from_ct,
            intrinsics,
            camera_from_world,
            size,
            step_mm,
            oversample,
        )
        return render(self.excess, *arguments), render(self.vertebra.density, *arguments)


@dataclasses.dataclass(frozen=True)
class PanelFaults:
    """What a detector and a beam do to ideal line integrals; 0 switches a part off."""

    photons: float = 1e5
    hardening: float = 0.03  # relative loss of a line integral per unit of it
    scatter: float = 0.5  # scatter to primary, spread over 12 % of the image's width
    blur_px: float = 0.7
    gain_ramp: float = 0.06  # relative gain difference across the image
    air: float = 0.1  # relative error of the assumed air value


def degrade(line_integrals, rng, detector):
    """Line integrals (V, H, W) as a detector would give them: hardened, scattered, blurred, noisy, with a wrong air value.

    Each strength but the photons is drawn between half and all of its setting; the same draw holds for both views.

    Args:
      rng: np.random.Generator; detector: `Detector`.
    """
    strength = {
        field.name: getattr(detector, field.name) * rng.uniform(0.5, 1.0) for field in dataclasses.fields(detector)
    }
    result = []
    for image in line_integrals:
        height, width = image.shape
        hardened = image / (1.0 + strength["hardening"] * image)
        primary = scipy.ndimage.gaussian_filter(np.exp(-hardened), strength["blur_px"])
        intensity = primary + strength["scatter"] * scipy.ndimage.gaussian_filter(primary, 0.12 * width)
        ramp = rng.normal(size=2)
        ramp /= np.linalg.norm(ramp)
        v, u = np.mgrid[-0.5 : 0.5 : height * 1j, -0.5 : 0.5 : width * 1j]
        intensity = intensity * (1.0 + strength["gain_ramp"] * (ramp[0] * v + ramp[1] * u))
        if detector.photons:
            intensity = rng.poisson(intensity * detector.photons) / detector.photons + rng.normal(0, 1e-4, image.shape)
        air = 1.0 + strength["air"] * rng.choice([-1.0, 1.0])
        result.append(-np.log(np.maximum(intensity, 1e-5) / air))
    return np.stack(result).astype(np.float32)

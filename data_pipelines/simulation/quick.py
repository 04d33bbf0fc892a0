"""A quick simulator: X-rays of a scan with one vertebra at its own pose, and simple faults of a panel."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import scipy

from data_pipelines.ct import whole_body
from kernels.drr import drr
from radgs_jax.registration import prepared

SHAPE_STEP = 32
"""Multiple that volumes are padded to along each axis: few distinct shapes mean few compilations. Chosen by hand; half of it
compiles more often, twice it marches through more air."""
SCATTER_WIDTH = 0.12
"""Standard deviation of scatter, relative to the image's width. Chosen by hand for a broad haze; half of it follows the
anatomy, twice it is nearly a constant."""
ELECTRONIC_NOISE = 1e-4
"""Standard deviation of the electronic noise, relative to the full beam. Chosen by hand: it matters behind dense bone alone."""
LEAST_INTENSITY = 1e-5
"""Lowest intensity, relative to the full beam, that a line integral is taken of. Chosen by hand: it limits them to about 11.5."""


@functools.partial(jax.jit, static_argnums=(3, 4, 5))
def _drr(volume, index_from_camera, intrinsics, height, width, step_mm):
    return drr(volume, index_from_camera, intrinsics, height, width, step_mm=step_mm)


def render(
    volume: np.ndarray,
    ct_from_index: np.ndarray,
    world_from_ct: np.ndarray,
    intrinsics: np.ndarray,
    camera_from_world: np.ndarray,
    size: tuple[int, int],
    step_mm: float,
    oversample: int = 1,
) -> np.ndarray:
    """Line integrals of one voxel volume at a pose.

    Args:
      volume: (X, Y, Z) 1/mm.
      ct_from_index, world_from_ct: (4, 4).
      intrinsics: (V, 4) fx, fy, cx, cy in pixels.
      camera_from_world: (V, 4, 4).
      size: height and width of the images.
      step_mm: sample distance along the rays.
      oversample: rays along each side of a pixel, which is the mean of its rays, as a panel integrates over pixels.

    Returns:
      (V, height, width) float32.
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


def _pad(volume):
    return np.pad(volume, [(0, -n % SHAPE_STEP) for n in volume.shape])


class RigidBody:
    """A scan divided into one vertebra and the rest of the body, each of which moves as one piece.

    Attributes:
      vertebra: the vertebra.
      rest: (X, Y, Z) 1/mm, the scan with muscle in the vertebra's place.
      rest_ct_from_index: (4, 4) of the rest's grid.
      excess: 1/mm, what the vertebra adds to muscle, on the vertebra's grid.
    """

    def __init__(self, whole: whole_body.WholeBody, vertebra: prepared.Vertebra) -> None:
        """Takes a vertebra out of a body; `whole` is of the same scan and may serve several vertebrae."""
        self.vertebra = vertebra
        self.rest, self.rest_ct_from_index = whole.without(vertebra), whole.ct_from_index
        self.excess = whole_body.excess_over_fill(vertebra)

    def render_rest(
        self,
        world_from_rest: np.ndarray,
        intrinsics: np.ndarray,
        camera_from_world: np.ndarray,
        size: tuple[int, int],
        step_mm: float = 2.0,
    ) -> np.ndarray:
        """Line integrals (V, H, W) of everything except the vertebra at the pose `world_from_rest` (4, 4); others as `render`."""
        return render(self.rest, self.rest_ct_from_index, world_from_rest, intrinsics, camera_from_world, size, step_mm)

    def render_vertebra(
        self,
        world_from_ct: np.ndarray,
        intrinsics: np.ndarray,
        camera_from_world: np.ndarray,
        size: tuple[int, int],
        step_mm: float = 0.75,
        oversample: int = 2,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Line integrals (V, H, W) of the vertebra's excess over muscle, and of the vertebra alone; arguments as `render`."""
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
    """Strengths of the faults that a panel and a beam add to ideal line integrals; 0 switches a fault off.

    The defaults were chosen by hand. What other values do to registration is measured by `experiments.study`
    (docs/accuracy.md).

    Attributes:
      photons: number detected in a pixel without a body; 0 for no noise.
      hardening: relative loss of a line integral per unit of it.
      scatter: ratio of scatter to primary.
      blur_px: standard deviation of the blur, pixels.
      gain_ramp: relative difference of the gain across the image.
      air: relative error of the air value.
    """

    photons: float = 1e5
    hardening: float = 0.03
    scatter: float = 0.5
    blur_px: float = 0.7
    gain_ramp: float = 0.06
    air: float = 0.1


def degrade(line_integrals: np.ndarray, rng: np.random.Generator, faults: PanelFaults) -> np.ndarray:
    """Adds a panel's faults to ideal X-rays.

    Each strength is drawn between half and all of its setting, once for all views; `photons` keeps its setting.

    Args:
      line_integrals: (V, H, W).
      faults: their settings.

    Returns:
      (V, H, W) float32.
    """
    strength = {field.name: getattr(faults, field.name) * rng.uniform(0.5, 1.0) for field in dataclasses.fields(faults)}
    result = []
    for image in line_integrals:
        height, width = image.shape
        hardened = image / (1.0 + strength["hardening"] * image)
        primary = scipy.ndimage.gaussian_filter(np.exp(-hardened), strength["blur_px"])
        intensity = primary + strength["scatter"] * scipy.ndimage.gaussian_filter(primary, SCATTER_WIDTH * width)
        ramp = rng.normal(size=2)
        ramp /= np.linalg.norm(ramp)
        v, u = np.mgrid[-0.5 : 0.5 : height * 1j, -0.5 : 0.5 : width * 1j]
        intensity = intensity * (1.0 + strength["gain_ramp"] * (ramp[0] * v + ramp[1] * u))
        if faults.photons:
            counted = rng.poisson(intensity * faults.photons) / faults.photons
            intensity = counted + rng.normal(0, ELECTRONIC_NOISE, image.shape)
        air = 1.0 + strength["air"] * rng.choice([-1.0, 1.0])
        result.append(-np.log(np.maximum(intensity, LEAST_INTENSITY) / air))
    return np.stack(result).astype(np.float32)

"""A vertebra that is ready to be registered: its density, the parts that an X-ray is modelled with, and the network."""

import dataclasses

import numpy as np
from jaxtyping import Bool
from jaxtyping import Float

from radgs_jax import gaussians
from radgs_jax.geometry import resample
from radgs_jax.models.metal import MetalFinder
from radgs_jax.models.trained import Model
from radgs_jax.registration.confidence import AcceptanceRule
from radgs_jax.registration.confidence import method_digest
from radgs_jax.registration.gauss_newton import RefineConfig
from radgs_jax.registration.parts import on_device
from radgs_jax.registration.parts import Parts
from radgs_jax.registration.search import SearchConfig

PART_MM = 1.0
"""Voxels of the vertebra that refinement projects. They are also what reconstructions are compared at; halving them makes
a refinement four times slower."""
FINE_GAUSSIANS = 4096
"""Gaussians of a reported reconstruction, eight times what the network works with; more than that does not show at 1 mm."""


@dataclasses.dataclass(frozen=True)
class Vertebra:
    """One vertebra of a scan.

    Attributes:
      label: VerSe number.
      density: (X, Y, Z) attenuation inside the mask in 1/mm, 0 elsewhere, on a crop of the scan's own grid.
      mask: (X, Y, Z) bool.
      ct_from_index: (4, 4) of that crop, mm.
      ct_from_box: (4, 4) the vertebra's own frame: origin at its mask's centroid, +z along the spine to the head.
      cloud: its Gaussians (N,), box frame.
      points: (P, 3) on its surface, CT mm.
    """

    label: int
    density: Float[np.ndarray, "x y z"]
    mask: Bool[np.ndarray, "x y z"]
    ct_from_index: Float[np.ndarray, "4 4"]
    ct_from_box: Float[np.ndarray, "4 4"]
    cloud: gaussians.Gaussians
    points: Float[np.ndarray, "p 3"]


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A vertebra as `radgs_jax.register` needs it.

    Attributes:
      model: the network; vertebra: what is registered.
      fine_cloud: the vertebra in FINE_GAUSSIANS Gaussians, box frame: the detail of reported reconstructions.
      parts: on the device.
      refine, search: how poses are refined and searched for.
      metal: what finds metal in X-rays; None uses all valid pixels.
      rule: what says whether a pose is accepted; None judges nothing. It belongs to the `refine` and `search` that it was
        fitted with.

    Raises:
      ValueError: a rule that was fitted with another refinement or search.
    """

    model: Model
    vertebra: Vertebra
    fine_cloud: gaussians.Gaussians
    parts: Parts
    refine: RefineConfig = RefineConfig()
    search: SearchConfig = SearchConfig()
    metal: MetalFinder | None = None
    rule: AcceptanceRule | None = None

    def __post_init__(self):
        if self.rule is not None and self.rule.fitted_for != (wanted := method_digest(self.refine, self.search)):
            raise ValueError(
                f"Prepared: found an acceptance rule fitted for refinement and search {self.rule.fitted_for}, "
                f"wanted one for {wanted}"
            )


def bare_parts(prepared: Prepared) -> Parts:
    """The vertebra in air as `Parts`, in the shapes of the prepared ones, so that the same program takes them."""
    vertebra, parts = prepared.vertebra, prepared.parts
    alone, _ = resample.block_average(vertebra.density, vertebra.ct_from_index, PART_MM)
    padded = np.pad(alone, [(0, n - m) for n, m in zip(parts.excess.shape, alone.shape)])
    return dataclasses.replace(parts, excess=on_device(padded), rest=on_device(np.zeros(parts.rest.shape)))


def fine_cloud(vertebra: Vertebra) -> gaussians.Gaussians:
    """The vertebra's native voxels as FINE_GAUSSIANS Gaussians, box frame."""
    box_from_index = np.linalg.inv(vertebra.ct_from_box) @ vertebra.ct_from_index
    return gaussians.from_density(vertebra.density, box_from_index, FINE_GAUSSIANS)

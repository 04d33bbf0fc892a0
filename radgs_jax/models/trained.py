"""A trained model: parameters, their configuration, and mean shapes."""

import dataclasses
from typing import Any

import numpy as np

from radgs_jax.models.config import ModelConfig

MEAN_SHAPE = (56, 56, 48)
"""Voxels of a mean shape, in the vertebra's own frame: 112 x 112 x 96 mm, which an adult's vertebra fits into. Part of the file
format. At half, processes are cut off; at twice, the file is eight times larger."""
MEAN_SHAPE_MM = 2.0
"""Spacing of those voxels, mm. Part of the file format. Chosen by hand: a mean over patients has no finer detail; at half, the
file is eight times larger, at twice, the arch is lost."""


@dataclasses.dataclass(frozen=True)
class Model:
    """A trained model.

    Attributes:
      params: {'recm': ..., 'regm': ...}, in the form of `radgs_reg.init`.
      config: sizes of the networks.
      mean_shapes: mean density (MEAN_SHAPE) in 1/mm by VerSe label; 0 is the mean over all labels.
    """

    params: dict[str, Any]
    config: ModelConfig
    mean_shapes: dict[int, np.ndarray]

    def mean_shape(self, label: int) -> np.ndarray:
        """Mean density (MEAN_SHAPE) of a level in 1/mm, float32; the mean over all levels if this one was not trained on."""
        return self.mean_shapes.get(label, self.mean_shapes[0]).astype(np.float32)


def mean_shape_grid() -> np.ndarray:
    """box_from_index (4, 4) in mm of the mean-shape grid, whose middle is the origin of the vertebra's frame."""
    affine = np.diag([MEAN_SHAPE_MM] * 3 + [1.0])
    affine[:3, 3] = -0.5 * MEAN_SHAPE_MM * (np.array(MEAN_SHAPE) - 1)
    return affine

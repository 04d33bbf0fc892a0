"""Sizes of the networks, frozen."""

import dataclasses
from typing import Any

Backbone = tuple[str | type, tuple[tuple[str, Any], ...]]
"""A family of `backbones` by name, or a Flax module's class, with its options: (name, ((option, value), ...)). Hashable, so that a
config can be a static argument."""


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Sizes of RadGS-Reg, chosen by hand for a CPU.

    Attributes:
      backbone_2d: encoder of the X-rays.
      backbone_3d: encoder of RegM's volumes; with None, RegM is its closed form with learned weights.
      head: 'anchored' (queries at the CT's Gaussians read features of the X-rays there) or 'paper' (one global Linear-ReLU-Linear).
      gaussians: number of Gaussians.
      anchors: number of Gaussians that are looked for in the X-rays; the others follow them.
      matching_heads: number of descriptors of an anchor.
      matching_width: channels of the features that descriptors are compared with.
      attention_maps: number of maps of the counterfactual attention.
      counterfactual_draws: number of samples of the expectation in Eq. 1 in training; inference takes the mean map. With 0 there is
        no attention.
      hidden: width of the heads' layers.
      context: width of the context that views share ('anchored').
      crop_px: side of a view's window, pixels.
      pixel_mm: pixel size at the isocentre, to which X-rays are binned.
      grid: side of RegM's volume, voxels.
      voxel_mm: side of such a voxel.
      grid_blur_mm: standard deviation by which Gaussians are blurred before that volume samples them.
    """

    backbone_2d: Backbone = ("small", (("widths", (24, 64, 96)), ("blocks", (0, 1, 2)), ("reduce", 2), ("out", 64)))
    backbone_3d: Backbone | None = None
    head: str = "anchored"
    gaussians: int = 512
    anchors: int = 128
    matching_heads: int = 2
    matching_width: int = 48
    attention_maps: int = 8
    counterfactual_draws: int = 1
    hidden: int = 96
    context: int = 128
    crop_px: int = 64
    pixel_mm: float = 1.5
    grid: int = 24
    voxel_mm: float = 4.5
    grid_blur_mm: float = 2.0

    @property
    def own_backbones(self) -> tuple[type, ...]:
        """The backbones that are classes. A file can name a family of `backbones`, but not the code of a class."""
        chosen = (backbone[0] for backbone in (self.backbone_2d, self.backbone_3d) if backbone)
        return tuple(one for one in chosen if not isinstance(one, str))

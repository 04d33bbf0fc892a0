"""Sizes of the networks, frozen."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Sizes of RadGS-Reg.

    backbone_2d, backbone_3d: a family and its options, as (name, ((option, value), ...)); hashable, so a config can key jit.
    backbone_3d None leaves RegM with its closed form and learned weights.
    head: 'anchored' (queries at the CT's Gaussians see back-projected features) or 'paper' (one global Linear-ReLU-Linear).
    gaussians: number of Gaussians N. anchors: so many of them are looked for in the X-rays, the others follow.
    matching_heads, matching_width: descriptors an anchor has, channels of their features.
    attention_maps: M of the counterfactual attention. counterfactual_draws: samples of the expectation in Eq. 1 in training
    (inference takes the mean map and is deterministic); 0 for no attention at all.
    hidden, context: widths of the heads' layers and of the context that views share ('anchored').
    crop_px, pixel_mm: the X-ray window of a view, and the pixel size at the isocentre it is binned to.
    grid, voxel_mm, grid_blur_mm: RegM's volume; Gaussians are blurred by grid_blur_mm so that it can sample them.
    """

    backbone_2d: tuple = ("small", (("widths", (24, 64, 96)), ("blocks", (0, 1, 2)), ("reduce", 2), ("out", 64)))
    backbone_3d: tuple | None = None
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

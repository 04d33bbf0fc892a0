"""Image encoders for X-rays and volumes: ResNet-18 and -50, DenseNet-121, ViT-12 and a small one for CPUs.

Every encoder maps (B, *spatial, C_in) to a feature map (B, *spatial / stride, C_out), channels last, and takes the number of
spatial axes from the rank of its input. Convolutions pad with SAME, so a strided one rounds a size up. Parameters are float32.
`apply` is a pure function of the parameters and the input. Where the published networks have BatchNorm, these have GroupNorm (Wu &
He, "Group Normalization", ECCV 2018): it has as many parameters, keeps no running statistics and does not make an example depend
on the rest of its batch, and batches of volumes (one or two) are too small for BatchNorm.
"""

import functools
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Float
from jaxtyping import Shaped

from kernels.common.types import Array

Input = Float[Array, "batch *spatial channels"]
"""An image or a volume."""
Features = Float[Array, "batch *cells features"]
"""A feature map."""


def space_to_depth(x: Shaped[Array, "batch *spatial channels"], factor: int) -> Shaped[Array, "batch *cells features"]:
    """Moves cells of `factor` samples per spatial axis into the channels.

    Args:
      x: with any number of spatial axes.
      factor: edge of a cell in samples.

    Returns:
      (B, *(spatial / factor), factor**dims * C), with channels in row-major order of (place in the cell, input channel).

    Raises:
      ValueError: a spatial size that `factor` does not divide.
    """
    batch, *spatial, channels = x.shape
    if any(n % factor for n in spatial):
        raise ValueError(f"space_to_depth: spatial shape {tuple(spatial)} is not divisible by {factor}")
    dims = len(spatial)
    split = [m for n in spatial for m in (n // factor, factor)]
    cells = x.reshape(batch, *split, channels)
    cells = cells.transpose(0, *range(1, 2 * dims, 2), *range(2, 2 * dims + 1, 2), 2 * dims + 1)
    return cells.reshape(batch, *split[::2], factor**dims * channels)


_HE = nn.initializers.he_normal()


# The three helpers below create submodules of the compact method that calls them.


def _conv(x, features, size, stride=1, use_bias=False, kernel_init=_HE):
    dims = x.ndim - 2
    return nn.Conv(features, (size,) * dims, (stride,) * dims, use_bias=use_bias, kernel_init=kernel_init)(x)


def _norm(x, groups=32):
    # 32 groups as in Wu & He, or fewer if 32 does not divide the channels. The two-pass variance stays accurate where the mean is
    # large compared with it, as for a bright and nearly flat image.
    return nn.GroupNorm(math.gcd(groups, x.shape[-1]), use_fast_variance=False)(x)


def _stem(x, width=64, groups=32):
    """Stem shared by ResNet and DenseNet: (B, *spatial, C) to (B, *spatial / 4, width)."""
    x = nn.relu(_norm(_conv(x, width, 7, 2), groups))
    dims = x.ndim - 2
    return nn.max_pool(x, (3,) * dims, (2,) * dims, "SAME")


class Bottleneck(nn.Module):
    """Bottleneck residual block, (B, *spatial, C) to (B, *spatial / stride, 4 * width)."""

    width: int
    stride: int

    @nn.compact
    def __call__(self, x: Input) -> Features:
        y = nn.relu(_norm(_conv(x, self.width, 1)))
        # The 3-wide convolution has the stride, as in torchvision; in a 1-wide one it would skip samples.
        y = nn.relu(_norm(_conv(y, self.width, 3, self.stride)))
        y = _norm(_conv(y, 4 * self.width, 1))
        if x.shape != y.shape:
            x = _norm(_conv(x, 4 * self.width, 1, self.stride))
        return nn.relu(x + y)


class ResNet50(nn.Module):
    """ResNet-50 without its classifier (He et al., "Deep Residual Learning for Image Recognition", CVPR 2016).

    (B, *spatial, C) to (B, *ceil(spatial / 32), 2048). `blocks` is the number of bottlenecks in each stage; each stage
    after the first halves the size and doubles the width.
    """

    blocks: tuple[int, ...] = (3, 4, 6, 3)

    @nn.compact
    def __call__(self, x: Input) -> Features:
        x = _stem(x)
        for stage, count in enumerate(self.blocks):
            for block in range(count):
                x = Bottleneck(64 * 2**stage, 2 if stage > 0 and block == 0 else 1)(x)
        return x


class BasicBlock(nn.Module):
    """Residual block of two 3-wide convolutions, (B, *spatial, C) to (B, *spatial / stride, width).

    `groups` is the largest number of groups of its norms.
    """

    width: int
    stride: int
    groups: int

    @nn.compact
    def __call__(self, x: Input) -> Features:
        y = nn.relu(_norm(_conv(x, self.width, 3, self.stride), self.groups))
        y = _norm(_conv(y, self.width, 3), self.groups)
        if x.shape != y.shape:
            x = _norm(_conv(x, self.width, 1, self.stride), self.groups)
        return nn.relu(x + y)


class ResNet18(nn.Module):
    """ResNet-18 without its classifier (He et al., CVPR 2016).

    (B, *spatial, C) to (B, *ceil(spatial / 32), 8 * width).

    Attributes:
      width: channels of the stem and the first stage; the published network has 64. Norms have width / 2 groups, so that a group
        has as many channels as with 32 groups at 64: in groups of one channel, a map of one cell would always be zero.
      blocks: number of blocks in each stage; each stage after the first halves the size and doubles the width.
    """

    width: int = 64
    blocks: tuple[int, ...] = (2, 2, 2, 2)

    @nn.compact
    def __call__(self, x: Input) -> Features:
        groups = self.width // 2
        x = _stem(x, self.width, groups)
        for stage, count in enumerate(self.blocks):
            for block in range(count):
                x = BasicBlock(self.width * 2**stage, 2 if stage > 0 and block == 0 else 1, groups)(x)
        return x


class DenseLayer(nn.Module):
    """Layer of a dense block, (B, *spatial, C) to the (B, *spatial, growth) that it adds."""

    growth: int

    @nn.compact
    def __call__(self, x: Input) -> Features:
        x = _conv(nn.relu(_norm(x)), 4 * self.growth, 1)
        return _conv(nn.relu(_norm(x)), self.growth, 3)


class DenseNet121(nn.Module):
    """DenseNet-121 without its classifier (Huang et al., "Densely Connected Convolutional Networks", CVPR 2017).

    (B, *spatial, C) to (B, *ceil(spatial / 32), 1024). `blocks` is the number of layers in each dense block; between
    two blocks a transition halves the channels and the size.
    """

    growth: int = 32
    blocks: tuple[int, ...] = (6, 12, 24, 16)

    @nn.compact
    def __call__(self, x: Input) -> Features:
        x = _stem(x)
        dims = x.ndim - 2
        for block, count in enumerate(self.blocks):
            if block > 0:
                x = _conv(nn.relu(_norm(x)), x.shape[-1] // 2, 1)
                # An odd size pools its last sample alone, not with the padding's zeros.
                x = nn.avg_pool(x, (2,) * dims, (2,) * dims, "SAME", count_include_pad=False)
            for _ in range(count):
                x = jnp.concatenate([x, DenseLayer(self.growth)(x)], -1)
        return nn.relu(_norm(x))


class TransformerLayer(nn.Module):
    """Pre-norm self-attention and two-layer perceptron, (B, tokens, width) to the same shape."""

    heads: int
    mlp: int

    @nn.compact
    def __call__(self, x: Input) -> Features:
        x = x + nn.MultiHeadDotProductAttention(self.heads)(nn.LayerNorm()(x))
        y = nn.gelu(nn.Dense(self.mlp)(nn.LayerNorm()(x)), approximate=False)
        return x + nn.Dense(x.shape[-1])(y)


class ViT12(nn.Module):
    """ViT-Base without class token and head (Dosovitskiy et al., "An Image is Worth 16x16 Words", ICLR 2021).

    (B, *spatial, C) to (B, *(spatial / patch), width): the tokens, at their places on the grid. The position embedding is learned
    for the grid of `init`, so `apply` accepts that spatial size only.

    Attributes:
      patch: edge of a patch in samples; None for 16 in 2D and 8 in 3D.
      depth: number of layers.
      width: channels of a token.
      heads: number of attention heads.
      mlp: width of the perceptrons' hidden layer.

    Raises:
      ValueError: a spatial size that the patch does not divide.
    """

    patch: int | None = None
    depth: int = 12
    width: int = 768
    heads: int = 12
    mlp: int = 3072

    @nn.compact
    def __call__(self, x: Input) -> Features:
        patch = self.patch or (16 if x.ndim == 4 else 8)
        x = nn.Dense(self.width)(space_to_depth(x, patch))
        shape = x.shape
        x = x + self.param("position", nn.initializers.normal(0.02), (1, *shape[1:]))
        x = x.reshape(shape[0], -1, self.width)
        for _ in range(self.depth):
            x = TransformerLayer(self.heads, self.mlp)(x)
        return nn.LayerNorm()(x).reshape(shape)


class ResidualBlock(nn.Module):
    """Two 3-wide convolutions and a skip, without norms; (B, *spatial, C) to the same shape.

    The second convolution starts at zero, so a block starts as the identity on its rectified input, and depth does not change the
    scale of the signal at the start of training (Zhang et al., "Fixup Initialization", ICLR 2019).
    """

    @nn.compact
    def __call__(self, x: Input) -> Features:
        y = nn.relu(_conv(x, x.shape[-1], 3, use_bias=True))
        y = _conv(y, x.shape[-1], 3, use_bias=True, kernel_init=nn.initializers.zeros)
        return nn.relu(x + y)


class SmallCNN(nn.Module):
    """Small residual encoder with a top-down path (after Lin et al., "Feature Pyramid Networks", CVPR 2017), for CPUs.

    Level i has widths[i] channels at stride reduce * 2**i. (B, *spatial, C) to (B, *ceil(spatial / stride), out), where
    the stride is 2 * reduce, that of level 1, or reduce if there is only level 0. The output is linear, not
    rectified. There are no norms, so that the absolute attenuation of the input reaches the features.

    Attributes:
      widths: channels of each level, finest first.
      blocks: number of residual blocks of each level.
      reduce: space-to-depth factor at the input, which must divide the spatial sizes.
      out: output channels.
      pyramid: False omits the top-down path and returns the coarsest level, of stride reduce * 2**(len(widths) - 1).

    Raises:
      ValueError: widths and blocks of different length, or a spatial size that `reduce` does not divide.
    """

    widths: tuple[int, ...] = (32, 64, 96)
    blocks: tuple[int, ...] = (1, 2, 2)
    reduce: int = 2
    out: int = 64
    pyramid: bool = True

    @nn.compact
    def __call__(self, x: Input) -> Features:
        if len(self.widths) != len(self.blocks):
            raise ValueError(f"SmallCNN: widths {self.widths} and blocks {self.blocks} differ in length")
        x = space_to_depth(x, self.reduce)
        levels = []
        for level, (width, count) in enumerate(zip(self.widths, self.blocks)):
            # A strided 2-wide kernel keeps each sample at the middle of its cell, as `resize` assumes; a 3-wide one would shift the
            # features by half a sample per level.
            x = nn.relu(_conv(x, width, 2, 2, use_bias=True) if level else _conv(x, width, 3, use_bias=True))
            for _ in range(count):
                x = ResidualBlock()(x)
            levels.append(x)
        top = self._lateral(levels[-1])
        for level in reversed(levels[1:-1] if self.pyramid else []):
            lateral = self._lateral(level)
            top = lateral + jax.image.resize(top, lateral.shape, "linear")
        return top

    def _lateral(self, x):
        return _conv(x, self.out, 1, use_bias=True, kernel_init=nn.initializers.lecun_normal())


_BACKBONES = {"small": SmallCNN, "resnet18": ResNet18, "resnet50": ResNet50, "densenet121": DenseNet121, "vit12": ViT12}


def make_backbone(name: str | type, bfloat16: bool = False, remat: bool = False, **kwargs: Any) -> Any:
    """Backbone by name: 'small', 'resnet18', 'resnet50', 'densenet121' or 'vit12', or by its class.

    Args:
      name: of a family, or the class of another Flax module that maps as the families do.
      bfloat16: compute in bfloat16; parameters, input and features are float32 as ever.
      remat: compute once more for the gradient what would otherwise be kept; it takes a third more time and less memory.
      kwargs: the module's attributes.
    Raises:
      ValueError: an unknown name, or another class.
    """
    module = _BACKBONES.get(name) if isinstance(name, str) else name
    if not (isinstance(module, type) and issubclass(module, nn.Module)):
        known = ", ".join(_BACKBONES)
        raise ValueError(f"make_backbone: unknown backbone {name!r}, expected one of {known}, or a Flax module's class")
    if not (bfloat16 or remat):
        return module(**kwargs)
    # The name that it has by itself, so that parameters fit with and without.
    kwargs["name"] = f"{module.__name__}_0"
    if remat:
        module = nn.remat(module)
    if not bfloat16:
        return module(**kwargs)
    lowered = nn.map_variables(module, "params", functools.partial(jax.tree.map, _bfloat16), init=True)(**kwargs)
    return lambda x: lowered(_bfloat16(x)).astype(jnp.float32)


def _bfloat16(x):
    return x.astype(jnp.bfloat16)


def count_parameters(params: Any) -> int:
    """Number of scalars in a tree of arrays or of their abstract shapes."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))

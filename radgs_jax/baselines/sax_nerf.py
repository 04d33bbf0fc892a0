"""SAX-NeRF (Cai et al., CVPR 2024, arXiv 2311.10959): a density from a hash grid and attention along rays, fitted to X-rays.

A point of the box is encoded by trilinear interpolation in tables of several resolutions (Müller et al. 2022). A small network
with one block of attention between the consecutive samples of a ray's segment turns that into a density. A step fits the line
integrals of one view: whole windows of pixels, and single pixels outside them (the paper's local and global sampling).

Here rays are integrated from where they enter the box to where they leave it; the public code takes samples from a larger range
and moves those outside onto the box's faces. A sample counts for its share of the ray, not for its distance to the next one, so
that a constant density is integrated exactly. As in the public code that the paper came with, windows come from all of the image,
where the paper wants them on the bone: this alone teaches that the surroundings are empty. Single pixels come from all valid ones,
not from positive ones. The last step's density is taken; the public code takes that which is best against the truth.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any
from typing import cast
from typing import TYPE_CHECKING

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool
from jaxtyping import Float
from jaxtyping import Int

from kernels.common.types import Array
from radgs_jax.baselines import box
from radgs_jax.geometry import rigid

if TYPE_CHECKING:
    import optax

PRIMES = (1, 2654435761, 805459861)
"""Factors of a corner's indices in its hash (Müller et al. 2022)."""
TABLE_START = 1e-4
"""Half-width of the uniform distribution of table entries at the start: SAX-NeRF's."""
SLOPE = 0.01
"""Of leaky rectifiers below 0: SAX-NeRF's, PyTorch's default."""
EXPANSION = 4
"""Width of the attention block's dense layers relative to the network's: SAX-NeRF's."""
NORM_EPS = 1e-5
"""Added to variances in normalisations: PyTorch's default."""
DROP = 0.1
"""Factor on the rate after a share `Config.drop` of the steps: SAX-NeRF's."""


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes and steps; by default a scene takes a CPU about two minutes.

    Attributes:
      levels: number of resolutions; coarsest: cells along a side at the first; each further level has twice as many.
      table: log2 of the entries of a level at most; features: numbers an entry.
      width: of the network; heads, head_width: of its attention.
      line: samples in a segment; it divides `samples` and `box.SIDE`.
      samples: on a ray.
      windows, window_px: number and side of a step's windows of pixels; rays: number of its single pixels.
      steps: number of steps.
      start: density at the start relative to `box.UNIT_DENSITY`.
      rate: Adam's.
      drop: share of the steps after which the rate falls.
      body: voxels around the box, or None where X-rays show the vertebra alone.

    Raises:
      ValueError: segments that do not fill a ray or a row of voxels.
    """

    levels: int = 8
    coarsest: int = 8
    table: int = 15
    features: int = 2
    width: int = 32
    heads: int = 8
    head_width: int = 4
    line: int = 2
    samples: int = 48
    windows: int = 2
    window_px: int = 8
    rays: int = 128
    steps: int = 1000
    start: float = 0.05
    rate: float = 5e-3
    drop: float = 0.75
    body: box.BodyConfig | None = None

    def __post_init__(self):
        if self.samples % self.line or box.SIDE % self.line:
            raise ValueError(f"sax_nerf: segments of {self.line} samples fill neither {self.samples} nor {box.SIDE}")


QUICK = Config(steps=500)
"""Half the steps."""
ORIGINAL = Config(
    levels=16, coarsest=16, table=19, samples=256, windows=16, rays=1024, steps=75_000, start=0.5, rate=1e-3, drop=1.0
)
"""SAX-NeRF's configuration of a chest; 1,500 epochs of 50 views are 75,000 steps."""


def level_sizes(config: Config) -> list[tuple[int, int]]:
    """Cells along a side and table entries of each level."""
    cells = [config.coarsest * 2**level for level in range(config.levels)]
    return [(n, min(2**config.table, (n + 1) ** 3)) for n in cells]


def table_index(corner: Int[Array, "*points 3"], cells: int, entries: int) -> Int[jax.Array, "*points"]:
    """Entry of a corner in a level's table: its place in a dense grid where that fits, otherwise its hash."""
    i, j, k = (corner[..., axis] for axis in range(3))
    if (cells + 1) ** 3 <= entries:
        return jnp.asarray(i + (cells + 1) * (j + (cells + 1) * k))
    i, j, k = (jnp.asarray(c).astype(jnp.uint32) * np.uint32(prime) for c, prime in zip((i, j, k), PRIMES))
    return ((i ^ j ^ k) % np.uint32(entries)).astype(jnp.int32)


def encode(
    table: Float[Array, "entries features"], points: Float[Array, "points 3"], config: Config
) -> Float[jax.Array, "points encoding"]:
    """Features of points in [0, 1]^3, trilinear in each level; those outside are moved onto its faces.

    A level of N cells has a point at x (N - 1) + 1/2, which keeps it half a cell away from the outermost corners.

    Args:
      table: all levels, one after the other.
    """
    points = jnp.clip(points, 0.0, 1.0)
    corners = np.stack(np.meshgrid(*[[0, 1]] * 3, indexing="ij"), -1).reshape(8, 3)
    rows, weights, first = [], [], 0
    for cells, entries in level_sizes(config):
        place = points * (cells - 1) + 0.5
        cell = jnp.floor(place)
        rows.append(first + table_index(cell.astype(jnp.int32) + corners[:, None], cells, entries))
        part = jnp.stack([1.0 - place + cell, place - cell])
        i, j, k = corners.T
        weights.append(part[i, :, 0] * part[j, :, 1] * part[k, :, 2])
        first += entries
    found = jnp.asarray(table).at[jnp.stack(rows)].get(mode="promise_in_bounds") * jnp.stack(weights)[..., None]
    return jnp.moveaxis(jnp.sum(found, 1), 0, 1).reshape(points.shape[0], -1)


def _dense(inputs, outputs, bias=True):
    """A dense layer with PyTorch's initial weights and biases: uniform within 1 / sqrt(inputs)."""
    limit = inputs**-0.5

    def uniform(key, shape, dtype=jnp.float32):
        return jax.random.uniform(key, shape, dtype, -limit, limit)

    return nn.Dense(outputs, use_bias=bias, kernel_init=uniform, bias_init=uniform)


def _gelu(x):
    # jax.nn.gelu has the complementary error function, which is twice as slow on a CPU.
    return 0.5 * x * (1.0 + jax.lax.erf(x * 2.0**-0.5))


class LineAttention(nn.Module):
    """Attention of a sample to those of its segment, with learned additive terms for pairs of places in it."""

    config: Config

    @nn.compact
    def __call__(self, x: Float[Array, "samples width"]) -> Float[jax.Array, "samples width"]:
        """`x` ray by ray; segments are runs of `Config.line` samples."""
        c = self.config
        inner = c.heads * c.head_width
        lines = x.reshape(-1, c.line, c.width)
        q, k, v = (_dense(c.width, inner, False)(lines).reshape(-1, c.line, c.heads, c.head_width) for _ in range(3))
        normal = nn.initializers.truncated_normal(1.0)
        bias = self.param("bias", normal, (c.heads, c.line, c.line))
        # Sums of products: for segments this short they are much faster than batches of tiny matrix products.
        logits = jnp.sum(q[:, :, None] * k[:, None], -1) * c.head_width**-0.5 + jnp.moveaxis(bias, 0, -1)
        weights = jax.nn.softmax(logits, 2)
        return _dense(inner, c.width)(jnp.sum(weights[..., None] * v[:, None], 2).reshape(-1, inner))


class Net(nn.Module):
    """The density at points, relative to `box.UNIT_DENSITY`."""

    config: Config

    @nn.compact
    def __call__(self, points: Float[Array, "samples 3"]) -> Float[jax.Array, " samples"]:
        """`points` in [0, 1]^3, ray by ray, or in rows of neighbouring ones."""
        c = self.config
        wide = EXPANSION * c.width

        def uniform(key, shape):
            return jax.random.uniform(key, shape, minval=-TABLE_START, maxval=TABLE_START)

        entries = sum(entries for _, entries in level_sizes(c))
        encoding = encode(self.param("table", uniform, (entries, c.features)), points, c)
        x = nn.leaky_relu(_dense(encoding.shape[-1], c.width)(encoding), SLOPE)
        x = x + LineAttention(c)(nn.LayerNorm(NORM_EPS)(x))
        y = nn.LayerNorm(NORM_EPS)(x)
        y = _gelu(_dense(c.width, wide, False)(y))
        y = _gelu(_dense(wide, wide, False)(y))
        x = nn.leaky_relu(x + _dense(wide, c.width, False)(y), SLOPE)
        x = jnp.concatenate([encoding, x], -1)
        x = nn.leaky_relu(_dense(x.shape[-1], c.width)(x), SLOPE)
        return nn.sigmoid(_dense(c.width, 1)(x)[:, 0] + math.log(c.start / (1.0 - c.start)))


def density(params: Any, config: Config, points: Float[Array, "samples 3"]) -> Float[jax.Array, " samples"]:
    """Density, 1/mm, at points in the box's frame, mm, ordered as `Net` wants them."""
    found = Net(config).apply(params, points / box.BOX_MM + 0.5)
    return box.UNIT_DENSITY * cast(jax.Array, found)


def integrals(
    params: Any, config: Config, key: jax.Array, source: Float[Array, "3"], direction: Float[Array, "rays 3"]
) -> Float[jax.Array, " rays"]:
    """Line integrals through the box, from one sample at random in each of equal parts of a ray."""
    near, far = box.crossing(source, direction)
    step = (far - near) / config.samples
    place = jnp.arange(config.samples) + jax.random.uniform(key, (direction.shape[0], config.samples))
    along = near[:, None] + step[:, None] * place
    points = source + direction[:, None] * along[..., None]
    found = density(params, config, points.reshape(-1, 3)).reshape(along.shape)
    return step * jnp.sum(found, -1)


def draw_pixels(key: jax.Array, valid: Bool[Array, "size size"], config: Config) -> Int[jax.Array, " pixels"]:
    """Flat indices of a step's pixels in an image: those of different whole windows, then different valid ones outside these.

    Windows tile the image from its first pixel. Where there are too few valid pixels outside them, others follow.
    """
    size = valid.shape[0]
    of_windows, of_rays = jax.random.split(key)
    across = size // config.window_px
    tiles = jax.random.choice(of_windows, across**2, (config.windows,), replace=False)
    inside = jnp.arange(config.window_px)
    rows, columns = (config.window_px * part[:, None] + inside for part in (tiles // across, tiles % across))
    windows = (size * rows[:, :, None] + columns[:, None]).reshape(-1)
    chance = jax.random.uniform(of_rays, (size**2,)) - ~jnp.asarray(valid).reshape(-1)
    _, single = jax.lax.top_k(chance.at[windows].add(-1.0), config.rays)
    return jnp.concatenate([windows, single])


def loss(params: Mapping[str, Any], key: jax.Array, config: Config, views: box.BoxViews) -> Float[jax.Array, ""]:
    """Mean squared difference over the valid pixels of `draw_pixels` of one view, of `box.parameters` of `Net`."""
    of_view, of_pixels, of_samples = jax.random.split(key, 3)
    view = jax.random.randint(of_view, (), 0, views.images.shape[0])
    around, penalty = box.surroundings(params, config.body, views)
    one = jax.tree.map(lambda a: a[view], views)
    pixels = draw_pixels(of_pixels, one.valid, config)
    source, directions = box.box_rays(jax.tree.map(lambda a: a[None], one))
    seen = integrals(params["box"], config, of_samples, source[0], directions.reshape(-1, 3)[pixels])
    error = seen + (around[view] - one.images).reshape(-1)[pixels]
    return box.masked_mean(error**2, one.valid.reshape(-1)[pixels]) + penalty


def optimiser(config: Config) -> "optax.GradientTransformation":
    """Adam, whose rate falls once."""
    import optax

    return optax.adam(optax.piecewise_constant_schedule(config.rate, {round(config.drop * config.steps): DROP}))


def voxels(params: Any, config: Config) -> Float[jax.Array, "96 96 96"]:
    """Density on the result's voxels; segments lie along the last axis, as in SAX-NeRF's evaluation."""
    centres = box.box_grid(box.SIDE)
    index = jnp.stack(jnp.meshgrid(*[jnp.arange(box.SIDE, dtype=jnp.float32)] * 3, indexing="ij"), -1)
    points = rigid.apply(centres.frame_from_index, index.reshape(box.SIDE, -1, 3))
    found = jax.lax.map(lambda slab: density(params, config, slab), points)
    return found.reshape((box.SIDE,) * 3)


@functools.partial(jax.jit, static_argnames="config")
def _fit(config, views, key):
    # Not a number times zero is not a number, so that invalid pixels are emptied before anything is computed from them.
    views = views.replace(images=jnp.where(views.valid, views.images, 0.0))
    first, rest = jax.random.split(key)
    net = Net(config).init(first, jnp.zeros((config.line, 3)))
    params = box.parameters(net, config.body, views)
    tx = box.with_body(optimiser(config), config.body)
    keys = jax.random.split(rest, config.steps)
    params, _, _ = box.descend(lambda params, key: loss(params, key, config, views), tx, params, tx.init(params), keys)
    return voxels(params["box"], config)


def fit(config: Config, views: box.BoxViews, key: jax.Array) -> Float[jax.Array, "96 96 96"]:
    """Density of the box, 1/mm, in voxels of 1 mm."""
    return _fit(config, views, key)

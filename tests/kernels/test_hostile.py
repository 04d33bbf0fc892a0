"""Random hostile inputs to every operator and backend: no crash, and no NaN gradient where the value is finite.

An input of `splat` or `voxelize` is one cloud (and camera), one of `drr` a pose and camera before a volume that a batch
shares. A batch of them makes one hypothesis example, at one fixed shape, so that each backend compiles once.
"""

import functools
import warnings
from unittest import mock

import hypothesis
import jax
import numpy as np
import pytest
from hypothesis import strategies as st

from kernels.common import instances
from kernels.drr import api as drr_api
from kernels.splat import api as splat_api
from kernels.voxelize import api as voxelize_api

BATCH, N = 8, 3
IMAGE = (9, 13)
GRID = (5, 7, 6)
VOLUME = (5, 6, 4)
LONGEST_MM = 300.0
DETECTOR = (4, 5)

_cases = pytest.mark.parametrize("cases", [240, pytest.param(10_000, marks=pytest.mark.slow)])
_implementations = pytest.mark.parametrize("implementation", ["ffi_cpu", "xla"])


# Inputs.

_magnitudes = [0.0, 1e-45, 1e-38, 1e-20, 1e-12, 1e-6, 1.0, 1e6, 1e9, 1e12, 2.0**31, 1e19, 3e38, np.inf]
_special = st.sampled_from([sign * x for x in _magnitudes for sign in (1.0, -1.0)] + [np.nan])
_number = st.one_of(st.floats(-1e3, 1e3, width=32), _special, st.floats(width=32))


def _choice(*strategies):
    """Like `one_of`, but with equal shares, also for strategies that are choices themselves."""
    return st.integers(0, len(strategies) - 1).flatmap(strategies.__getitem__)


def _between(low, high):
    return st.floats(float(np.float32(low)), float(np.float32(high)), width=32)


def _vector(*bounds):
    return st.tuples(*(_between(low, high) for low, high in bounds))


def _numbers(count):
    return st.tuples(*[_number] * count)


def _spoiled(vectors):
    """`vectors` with one component replaced by any number."""
    return st.builds(lambda v, i, x: (*v[: i % len(v)], x, *v[i % len(v) + 1 :]), vectors, st.integers(0, 11), _number)


def _rotation(quaternion):
    if not any(quaternion):
        return np.eye(3)
    w, x, y, z = np.array(quaternion) / np.linalg.norm(quaternion)
    return np.array(
        [
            [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
            [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
            [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
        ]
    )


_turns = st.tuples(*[st.integers(-3, 3)] * 4).map(_rotation)


def _packed(turn, exponents, signs=(1.0, 1.0, 1.0)):
    """The packed symmetric matrix with half-axes 10^exponents along the columns of `turn`, and signs of its eigenvalues."""
    K = turn * (np.array(signs) * 10.0 ** (-2.0 * np.array(exponents))) @ turn.T
    return tuple(K[[0, 0, 0, 1, 1, 2], [0, 1, 2, 1, 2, 2]])


def _gaussians(mean, means, low, high):
    """Density, mean, precision: ordinary (`mean`, half-axes of 10^low to 10^high), or hostile in one part or in all.

    Args:
      mean: strategy of ordinary means; means: of hostile ones.
    """
    density, densities = _between(0.0, 0.1), _choice(_between(-0.1, 0.0), _number)
    axes = _vector(*[(low, high)] * 3)
    precision = st.builds(_packed, _turns, axes)
    precisions = _choice(
        st.builds(_packed, _turns, _vector(*[(-5.0, 6.0)] * 3)),  # needles, flakes, tiny and huge ones
        st.builds(_packed, _turns, axes, st.tuples(*[st.sampled_from([-1.0, 0.0, 1.0])] * 3)),  # singular, indefinite
        _spoiled(precision),
        _numbers(6),
        _number.map(lambda x: (x,) * 6),
    )
    ordinary, hostile = (density, mean, precision), (densities, means, precisions)
    mixed = [(*ordinary[:i], hostile[i], *ordinary[i + 1 :]) for i in range(3)]
    return _choice(*(st.tuples(*parts) for parts in (ordinary, *mixed, hostile)))


def _cameras(height, width, focal):
    usual = _vector(*[(0.5 * focal, 2.0 * focal)] * 2, (0.0, width), (0.0, height))
    focals = _choice(_between(-6.0, 8.0).map(lambda e: 10.0**e), st.sampled_from([-600.0, -1.0, 0.0, 1e-30, np.nan]))
    extreme = st.tuples(focals, focals, *[_between(-1e5, 1e5)] * 2)
    return _choice(usual, usual, usual, extreme, _spoiled(usual), _numbers(4))


def _stack(rows):
    """Columns of rows of numbers and vectors, as float32."""
    with np.errstate(over="ignore"):
        return tuple(np.array(column, np.float64).astype(np.float32) for column in zip(*rows))


def _batches(case):
    return st.lists(case, min_size=BATCH, max_size=BATCH).map(lambda cases: tuple(np.stack(a) for a in zip(*cases)))


def _clouds(gaussian):
    return st.lists(gaussian, min_size=N, max_size=N).map(_stack)


_before = _vector((-15, 15), (-10, 10), (500, 800))
_in_grid = _vector(*[(-1, 7)] * 3)
_splat_gaussians = _gaussians(
    _before,
    _choice(
        _vector((-5, 5), (-5, 5), (-10, 10)),
        st.tuples(*[_between(-5, 5)] * 2, st.sampled_from([0.0, 1e-30, 1e-6, 0.01, -1e-3])),
        _vector((-1e4, 1e4), (-1e4, 1e4), (-1e3, 1e3)),
        _spoiled(_before),
        _numbers(3),
    ),
    -1.5,
    2.0,
)
_voxelize_gaussians = _gaussians(
    _in_grid,
    _choice(st.tuples(*[st.integers(0, 6)] * 3), _vector(*[(-1e4, 1e4)] * 3), _spoiled(_in_grid), _numbers(3)),
    -1.0,
    1.0,
)
splat_batches = _batches(
    st.builds(lambda cloud, k: (*cloud, np.array(k, np.float32)), _clouds(_splat_gaussians), _cameras(*IMAGE, 300.0))
)
voxelize_batches = _batches(_clouds(_voxelize_gaussians))


def _pose(turn, spacing, shift, depth):
    """An affine (12 numbers, row by row) that puts the volume's centre at (shift, depth) mm before the camera."""
    R = turn / spacing
    offset = 0.5 * (np.array(VOLUME) - 1.0) - R @ [*shift, depth]
    return tuple(np.concatenate([R, offset[:, None]], 1).reshape(-1))


def _flattened(affine, rows, how):
    """A singular affine: rows set to 0, or all of them the same."""
    matrix = np.array(affine).reshape(3, 4)
    matrix[list(rows), :3] = 0.0 if how == "zero" else matrix[0, :3]
    return tuple(matrix.reshape(-1))


_shifts = _vector((-8, 8), (-8, 8))
_usual_poses = st.builds(_pose, _turns, _between(1.0, 8.0), _shifts, _between(20, 200))
_affines = _choice(
    _usual_poses,
    _usual_poses,
    st.builds(_pose, st.just(np.eye(3)), _between(1.0, 8.0), _shifts, st.sampled_from([0.0, 1e-3, 30.0, -100.0])),
    st.builds(_flattened, _usual_poses, st.sets(st.integers(0, 2), min_size=1), st.sampled_from(["zero", "same"])),
    _spoiled(_usual_poses),
    _numbers(12),
)


def _longest_ray(affine, camera):
    """Millimetres that the longest ray of every view is inside the volume, (BATCH,), in float32 as the operator has it."""
    fx, fy, cx, cy = camera.T[:, :, None, None]
    v, u = np.meshgrid(*(np.arange(n, dtype=np.float32) for n in DETECTOR), indexing="ij")
    with np.errstate(all="ignore"), warnings.catch_warnings(action="ignore"):
        d = np.stack(np.broadcast_arrays((u - cx) / fx, (v - cy) / fy, np.float32(1.0)), -1)
        d /= np.linalg.norm(d, axis=-1, keepdims=True)
        direction = np.sum(affine[:, None, None, :, :3] * d[..., None, :], -1)
        origin = affine[:, None, None, :, 3]
        ends = np.stack([(-1.0 - origin) / direction, (np.array(VOLUME) - origin) / direction])
        length = np.nanmin(np.nanmax(ends, 0), -1) - np.nanmax(np.nanmin(ends, 0), -1).clip(0)
    return np.nan_to_num(length, nan=0.0, posinf=np.inf, neginf=0.0).max((1, 2))


@st.composite
def _drr_batches(draw):
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    volume = rng.uniform(0.0, 0.05, VOLUME)
    for index, number in draw(st.lists(st.tuples(st.integers(0, volume.size - 1), _number), max_size=4)):
        volume.flat[index] = number
    view = st.tuples(_affines, _cameras(*DETECTOR, 60.0))
    affine, camera = _stack(draw(st.lists(view, min_size=BATCH, max_size=BATCH)))
    affine = affine.reshape(BATCH, 3, 4)
    # Long rays are slow by nature, so they are excluded.
    harmless = np.array(_pose(np.eye(3), 4.0, (0.0, 0.0), 60.0), np.float32).reshape(3, 4)
    affine = np.where((_longest_ray(affine, camera) < LONGEST_MM)[:, None, None], affine, harmless)
    return volume.astype(np.float32), affine, camera


drr_batches = _drr_batches()


# Properties.

OPERATORS = {
    "splat": (splat_api.splat, IMAGE),
    "voxelize": (voxelize_api.voxelize, (GRID,)),
    "drr": (drr_api.drr, DETECTOR),
}


@functools.cache
def _compiled(operator, implementation):
    """The value and the gradients of a batch, as numpy."""
    function, size = OPERATORS[operator]
    shape = (BATCH, *np.ravel(size))
    cotangent = np.random.default_rng(5).normal(0.3, 1.0, shape).astype(np.float32)

    @jax.jit
    def both(*arrays):
        # A batch fills several chunks of this size and part of another; of the usual size it would not fill one.
        with mock.patch.object(instances, "CHUNK", 64):
            value, pull = jax.vjp(lambda *a: function(*a, *size, implementation=implementation), *arrays)
            return value, pull(cotangent)

    def run(*arrays):
        value, gradients = jax.tree.map(np.asarray, both(*arrays))
        assert value.shape == shape
        assert [g.shape for g in gradients] == [a.shape for a in arrays]
        return value, gradients

    return run


def _for_all(batches, cases, check, *names):
    """Runs `check(run, arrays)` on `cases` inputs; `names` are operator and implementation."""
    run = _compiled(*names)
    settings = hypothesis.settings(
        max_examples=cases // BATCH,
        derandomize=True,
        database=None,
        deadline=None,
        # Shrinking a batch takes minutes and printing it pages; the checks name the one case that failed.
        phases=[hypothesis.Phase.generate],
        verbosity=hypothesis.Verbosity.quiet,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    try:
        settings(hypothesis.given(batches)(lambda arrays: check(run, arrays)))()
    except NotImplementedError as reason:
        pytest.skip(f"{names[1]}: {reason}")


def _assert_no_nan(value, gradients, *arrays):
    """Of every case with a finite value no gradient is NaN; `gradients` and `arrays` have the batch first."""
    # For larger values a gradient may overflow, and a sum of infinities is NaN.
    usual = (np.abs(value) < 1e30).reshape(BATCH, -1).all(-1)
    for gradient in gradients:
        bad = usual & np.isnan(gradient).reshape(BATCH, -1).any(-1)
        assert not bad.any(), [a[bad.argmax()].tolist() for a in (*arrays, *gradients)]


def _ignored(operator, density, mean, precision):
    """Gaussians that are documented to add nothing and get zero gradients, (BATCH, N)."""
    finite = np.isfinite(density) & np.isfinite(mean).all(-1) & np.isfinite(precision).all(-1)
    K = np.where(finite[..., None], precision, 0.0)[..., [0, 1, 2, 1, 3, 4, 2, 4, 5]].reshape(BATCH, N, 3, 3)
    eigenvalues = np.linalg.eigvalsh(K.astype(np.float64))
    # Clearly indefinite; near a singular matrix rounding decides.
    ignored = ~finite | (eigenvalues[..., 0] < -1e-3 * np.abs(eigenvalues[..., 2]))
    if operator == "splat":
        ignored |= mean[..., 2] <= 0.0
    return ignored


def _check_cloud(operator, run, arrays):
    density, mean, precision, *camera = arrays
    value, gradients = run(*arrays)
    _assert_no_nan(value, gradients, *arrays)
    ignored = _ignored(operator, density, mean, precision)
    for gradient in gradients[:3]:
        bad = np.argwhere(ignored & np.any(gradient.reshape(BATCH, N, -1) != 0, -1))
        assert not len(bad), (bad[0], [a[bad[0][0]].tolist() for a in (*arrays, gradient)])
    # The same result as without them.
    rest = (
        np.where(ignored, np.float32(0), density),
        np.where(ignored[..., None], np.float32([-99, 0, -99]), mean),
        np.where(ignored[..., None], np.float32([1, 0, 0, 1, 0, 1]), precision),
        *camera,
    )
    value_of_rest, gradients_of_rest = run(*rest)
    np.testing.assert_array_equal(value, value_of_rest)
    for gradient, wanted in zip(gradients[:3], gradients_of_rest[:3]):
        np.testing.assert_array_equal(gradient[~ignored], wanted[~ignored])
    np.testing.assert_array_equal(gradients[3:], gradients_of_rest[3:])


@_cases
@_implementations
def test_splat(implementation, cases):
    _for_all(splat_batches, cases, functools.partial(_check_cloud, "splat"), "splat", implementation)


@_cases
@_implementations
def test_voxelize(implementation, cases):
    _for_all(voxelize_batches, cases, functools.partial(_check_cloud, "voxelize"), "voxelize", implementation)


def _check_drr(run, arrays):
    volume, *view = arrays
    value, (to_volume, *to_view) = run(*arrays)
    _assert_no_nan(value, to_view, *view)
    assert not (np.abs(value) < 1e30).all() or not np.isnan(to_volume).any()


@_cases
@_implementations
def test_drr(implementation, cases):
    _for_all(drr_batches, cases, _check_drr, "drr", implementation)

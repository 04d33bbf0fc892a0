"""Measures simulated acquisitions per second, and compares their time with that of the sampling alone.

python -m data_pipelines.simulation.bench --scan=CT --mask=MASK --label=22 [--pairs=20]
"""

import time

import jax.numpy as jnp
import numpy as np
from absl import flags

from data_pipelines.ct import scans
from data_pipelines.simulation import acquisition
from data_pipelines.simulation import articulated_body
from data_pipelines.simulation import posture
from kernels.tools import program
from radgs_jax import errors


def _seconds(function, repeats=5):
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return min(times)


def _index_from_camera(camera_from_world, world_from_ct, ct_from_index):
    return jnp.asarray(np.linalg.inv(camera_from_world @ world_from_ct @ ct_from_index)[:, :3], jnp.float32)


def _samples(shape, index_from_camera, intrinsics, size, step_mm, oversample):
    """Number of samples of the rays inside a volume: the line integrals of a volume of ones, divided by the step."""
    ones = (jnp.ones(tuple(int(n) for n in shape), jnp.float32),)
    image = articulated_body._project(
        ones, index_from_camera, jnp.asarray(intrinsics, jnp.float32), size, step_mm, oversample
    )
    return float(np.sum(np.asarray(image[0]), dtype=np.float64)) * oversample**2 / step_mm


def report(
    body: articulated_body.ArticulatedBody,
    label: int,
    pairs: int = 20,
    seed: int = 0,
    geometry: acquisition.Geometry = acquisition.Geometry(),
) -> dict[str, float]:
    """Times acquisitions (pairs of views) after compilation, and the rates of the ray march and of the warp in the same run.

    The bound is the time that a pair's samples take at those rates: two materials through the rest of the body, two through
    each vertebra in sight (three through the target), and the voxels that the posture's warp reads.

    Args:
      label: VerSe number of the target.
      pairs: number of acquisitions, which are simulated once to compile and once to be timed.
      seed: of the acquisitions.

    Returns:
      Figures by name; the names contain the units.

    Raises:
      InputError: a label whose vertebra is absent or incomplete.
    """
    preset = acquisition.Preset()
    for index in range(pairs):
        acquisition.simulate(body, label, np.random.default_rng([seed, label, index]), preset, geometry)
    times, march, crops, warped = [], [], [], []
    for index in range(pairs):
        start = time.perf_counter()
        sample = acquisition.simulate(body, label, np.random.default_rng([seed, label, index]), preset, geometry)
        times.append(time.perf_counter() - start)
        E, k, size = sample.camera_from_world.astype(np.float64), sample.intrinsics, geometry.window
        world_from_ct = sample.world_from_box @ np.linalg.inv(body.spine.ct_from_box[body.spine.labels.index(label)])
        from_camera = _index_from_camera(E, world_from_ct, body.ct_from_index)
        march.append(2 * _samples(body._rest[0].shape, from_camera, k, size, geometry.rest_step_mm, 1))
        for level, (volumes, ct_from_index, _) in zip(body.spine.labels, body._crops):
            from_camera = _index_from_camera(E, world_from_ct, ct_from_index)
            shape = np.argwhere(np.asarray(volumes[2])).max(0) + 1
            count = _samples(shape, from_camera, k, size, geometry.vertebra_step_mm, 2)
            crops.append(count * (3 if level == label else 2))
        _, slices = body._slices_in_sight(world_from_ct, k, E, size, 0)
        warped.append(2 * np.prod(body._rest[0].shape[:2]) * slices)
    from_camera = _index_from_camera(E, world_from_ct, body.ct_from_index)
    intrinsics = jnp.asarray(k, jnp.float32)
    best = _seconds(
        lambda: np.asarray(
            articulated_body._project(body._rest, from_camera, intrinsics, size, geometry.rest_step_mm, 1)[0]
        )
    )
    rate = march[-1] / best
    still = np.tile(np.eye(4), (len(body.spine.labels), 1, 1))
    X, Y, Z = body._rest[0].shape
    pull_back = jnp.asarray(posture.pull_back(body.spine, still, body.ct_from_index, 0, Z), jnp.float32)
    posture.warp(body._rest, pull_back, (X, Y), 0)
    warp_rate = 2 * X * Y * Z / _seconds(lambda: np.asarray(posture.warp(body._rest, pull_back, (X, Y), 0)[1]))
    march_s = (np.mean(march) + np.sum(crops) / pairs) / rate
    warp_s = np.mean(warped) / warp_rate
    return {
        "pairs a second": 1.0 / np.mean(times),
        "seconds a pair, median": np.median(times),
        "samples a pair, rest, M": np.mean(march) / 1e6,
        "samples a pair, vertebrae, M": np.sum(crops) / pairs / 1e6,
        "voxels warped a pair, M": np.mean(warped) / 1e6,
        "march rate, M/s": rate / 1e6,
        "warp rate, M/s": warp_rate / 1e6,
        "bound of the march, s": march_s,
        "bound with the warp, s": march_s + warp_s,
        "time over the march's bound": np.median(times) / march_s,
        "time over the bound with the warp": np.median(times) / (march_s + warp_s),
    }


FLAGS = flags.FlagValues()
SCAN = flags.DEFINE_string("scan", None, "CT: NIfTI file or DICOM folder.", flag_values=FLAGS)
MASK = flags.DEFINE_string("mask", None, "Label map on the scan's grid.", flag_values=FLAGS)
LABEL = flags.DEFINE_integer("label", None, "VerSe number of the target.", flag_values=FLAGS)
PAIRS = flags.DEFINE_integer("pairs", 20, "Number of pairs to time.", lower_bound=1, flag_values=FLAGS)
HELP = flags.DEFINE_bool("help", False, "Show this help.", short_name="?", flag_values=FLAGS)


def _check():
    missing = [f"--{flag.name}" for flag in (SCAN, MASK, LABEL) if flag.value is None]
    if missing:
        raise flags.Error(f"{', '.join(missing)}: found nothing, wanted --scan, --mask and --label")


def main() -> None:
    """Reads the flags and prints the figures; bad flags or input end the program with one line and status 2."""
    if not program.read_flags(FLAGS, HELP, __doc__, _check):
        return
    try:
        figures = report(
            articulated_body.ArticulatedBody(scans.read_scan(SCAN.value, MASK.value)), LABEL.value, PAIRS.value
        )
    except errors.InputError as error:
        program.stop(error)
    for name, value in figures.items():
        print(f"{name}: {value:.4g}")


if __name__ == "__main__":
    main()

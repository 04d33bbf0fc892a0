"""Home tests: what the systems of Table 1 reach where their authors used them.

Systems that reconstruct get a vertebra alone from few and from many sides. Systems that register get a body that has moved as one
since its CT, and starts near the truth. What DDGS-CT and TS-SAR learn is also tested by itself.
"""

import contextlib
import dataclasses
import functools
import pathlib
from collections.abc import Callable
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from data_pipelines.io import files
from data_pipelines.simulation import around
from experiments.comparison import answers
from experiments.comparison import registering
from experiments.comparison import subjects
from experiments.comparison import tables
from experiments.comparison.answers import Table
from experiments.comparison.subjects import Given
from experiments.comparison.subjects import Sizes
from experiments.comparison.subjects import Subject
from experiments.comparison.subjects import System
from radgs_jax import metrics
from radgs_jax.baselines import box
from radgs_jax.baselines import ddgs
from radgs_jax.baselines import ts_sar
from radgs_jax.geometry.camera import Camera
from radgs_jax.geometry.xray import XRay

VIEWS = (2, 6, 30)
"""Numbers of X-rays that a vertebra is reconstructed from."""
PANEL_PX = box.CROP_PX + 4
"""Pixels along a side of these X-rays, which the windows of all views lie in."""
VIEWS_A_TABLE = 2
"""Number of X-rays in the table. A step of SAX-NeRF sees one, so that it makes as many steps for each as there. From 30 X-rays it
ends at 22 dB after 2,500 steps, and at 24.2 dB after 10,000."""
VARIANT = "full"
"""The variant of the case format in which a body has not changed since its CT."""
EARLY_STEPS = 500
"""Steps after which two starts of DDGS-CT are compared: the paper's."""
OTHER_SEED = 50
"""Added to a seed for acquisitions that nothing was trained on."""
HELD_OUT_PAIRS = 64
"""Pairs that TS-SAR's steps are tested on. Chosen by hand: the error of a mean is an eighth of the errors' own spread."""
RECONSTRUCTING = ("DiffVox", "SAX-NeRF", "3DGR-CAR", "3DGR-CAR from backprojection", "R2-Gaussian")
REGISTERING = ("DiffPose, crop", "DDGS-CT, crop")
DRAWING = {"DDGS-CT, vertebra": "vertebra_volume", "DDGS-CT, crop": "crop_volume"}
TS_SAR = "TS-SAR, reconstructed from its title"
"""Titles of the systems that are tested in each part, of DDGS-CT with the `Subject`'s volume that it draws."""
STEPS_MM = "start_mm", *(f"{step}_mm" for step in ts_sar.STEPS)
"""Names of TS-SAR's errors, in their order."""
PARTS = ("reconstruction", "registration", "projections", "steps")
"""Kinds of home tests."""
Result = dict[str, Any]
"""Plain values by name, as they are kept in a JSON file."""


@dataclasses.dataclass(frozen=True)
class Test:
    """One home test of a system.

    Attributes:
      part: one of `PARTS`; system: that is tested.
      sizes: of the system; name: of the test among the system's: its file's.
      run: makes the result.
    """

    part: str
    system: System
    sizes: Sizes
    name: str
    run: Callable[[], Result]


def sizes_for(sizes: Sizes, views: int) -> Sizes:
    """The sizes of the systems that reconstruct from so many views."""
    nerf = sizes.sax_nerf
    steps = nerf.steps * max(views, VIEWS_A_TABLE) // VIEWS_A_TABLE
    return dataclasses.replace(sizes, sax_nerf=dataclasses.replace(nerf, steps=steps))


def seen_around(subject: Subject, views: int) -> Given:
    """X-rays of a subject's vertebra alone, from all around it, at its true pose; the world has the axes of its box."""
    vertebra = subject.prepared.vertebra
    images, intrinsics, cameras = around.xrays_around(vertebra, views, box.PIXEL_MM, PANEL_PX)
    xrays = [XRay(image, None, Camera(K, E, *image.shape)) for image, K, E in zip(images, intrinsics, cameras)]
    return Given(xrays, "easy", np.linalg.inv(vertebra.ct_from_box))


def reconstruct(subject: Subject, system: System, sizes: Sizes, seed: int, views: int) -> Result:
    """Scores of a reconstruction (`metrics.reconstruction_scores`) and its times (`Stopwatch.times`)."""
    params = None if system.prepare is None else system.prepare(subject, sizes, seed)[0]
    key = answers.key_of(seed, f"{system.title}/{views} views")
    found, times = answers.timed(system, subject, seen_around(subject, views), params, sizes, key)
    density, mask = around.in_box(subject.prepared.vertebra, box.SIDE, box.BOX_MM / box.SIDE)
    return metrics.reconstruction_scores(found[0], density, metrics.near(mask)) | times


def register(table: Table, system: System) -> Result:
    """Errors and times of all cases: `tables.as_values`."""
    answers.answer_all(table, system, VARIANT)
    return tables.as_values(answers.row(table, system, VARIANT))


def _drawn_db(config, params, views):
    """PSNR of projections, dB, whose range is up to the largest line integral that the fit has seen."""
    images, intrinsics, cameras = (jnp.asarray(a, jnp.float32) for a in views)
    size, square = images.shape[1:], 0.0
    for i, image in enumerate(images):
        drawn = ddgs.render(params, config, intrinsics[i : i + 1], cameras[i : i + 1], *size)[0]
        square += float(jnp.mean((drawn - image) ** 2)) / len(images)
    return metrics.psnr(square, float(params["scale"]))


def draw_unseen(subject: Subject, sizes: Sizes, seed: int, volume: str) -> Result:
    """PSNR, dB, of DDGS-CT's images of a subject's volume from angles that it was not fitted to: of the prepared model, and of two
    that are fitted for few steps, from the paper's start and from a uniform one."""
    config, (density, affine) = sizes.ddgs, getattr(subject, volume)
    place = np.asarray(density), np.asarray(affine, np.float64)
    unseen = registering.projections(config, *place, np.random.default_rng([seed, OTHER_SEED]))
    seen = registering.projections(config, *place, np.random.default_rng(seed))
    params, _ = registering.prepare_ddgs(volume)(subject, sizes, seed)
    early = dataclasses.replace(config, steps=min(EARLY_STEPS, config.steps))
    key, found = jax.random.key(seed), {"psnr": _drawn_db(config, params, unseen), "early_steps": early.steps}
    for name, first in (("aware", ddgs.init(config, *place, key)), ("uniform", ddgs.init_uniform(config, key))):
        fitted = ddgs.fit(early, first, seen, jax.random.fold_in(key, 1))
        found[f"early_{name}_psnr"] = _drawn_db(config, fitted, unseen)
    return found | {"views": len(unseen[0])}


def step_twice(subject: Subject, system: System, sizes: Sizes, seed: int) -> Result:
    """Mean errors of TS-SAR on pairs that it was not trained on, mm with turns at `rigid.LEVER_MM`: of the starts, and after each
    step."""
    assert system.prepare is not None
    params, _ = system.prepare(subject, sizes, seed)
    config, model_config = sizes.ts_sar, subject.prepared.model.config
    pairs = registering.pairs_of(subject, [subject.target], min(HELD_OUT_PAIRS, sizes.pairs), OTHER_SEED)
    loss = jax.jit(functools.partial(ts_sar.loss, config=config, model_config=model_config))
    key, parts = answers.key_of(seed, system.title), []
    with contextlib.closing(pairs.batches(seed, config.batch)) as batches:
        for number in range(len(pairs) // config.batch):
            parts.append(loss(params, jax.random.fold_in(key, number), next(batches))[1])
    means = {name: float(np.mean([part[name] for part in parts])) for name in STEPS_MM}
    return {"pairs": len(parts) * config.batch} | means


def kept(out: pathlib.Path, test: Test, seed: int) -> Result:
    """The result of a test, made where it is not in its file in `out` yet."""
    mark = answers.digest(test.system, test.sizes, seed)
    path = out / "answers" / answers.slug(test.system.title) / f"{test.name}_{mark}.json"
    if not path.exists():
        files.write_json(path, test.run())
    return files.read_json(path)


def tests_of(system: System, table: Table, subject: Subject, views: Sequence[int]) -> list[Test]:
    """The home tests of a system, in their order.

    Args:
      table: about cases of a body that has not changed; subject: its vertebra.
    """
    sizes, seed, title = table.sizes, table.seed, system.title
    if system.kind == subjects.RECONSTRUCTION:
        found = []
        for count in views:
            its = sizes_for(sizes, count)
            run = functools.partial(reconstruct, subject, system, its, seed, count)
            found.append(Test("reconstruction", system, its, f"views_{count}", run))
        return found
    runs: dict[str, Callable[[], Result]] = {}
    if title in REGISTERING:
        runs["registration"] = functools.partial(register, table, system)
    if title in DRAWING:
        runs["projections"] = functools.partial(draw_unseen, subject, sizes, seed, DRAWING[title])
    if title == TS_SAR:
        runs["steps"] = functools.partial(step_twice, subject, system, sizes, seed)
    return [Test(part, system, sizes, part, run) for part, run in runs.items()]

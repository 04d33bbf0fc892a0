"""Answers of the systems of Table 1 on a case file: made once, kept on disk, and scored."""

import dataclasses
import functools
import hashlib
import pathlib
import re
import zlib
from collections.abc import Collection
from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from data_pipelines import cases
from data_pipelines.io import files
from experiments.comparison import subjects
from experiments.comparison import tables
from experiments.comparison.subjects import Given
from experiments.comparison.subjects import Sizes
from experiments.comparison.subjects import Subject
from experiments.comparison.subjects import System
from experiments.patients.workdir import Target
from experiments.patients.workdir import target_of
from experiments.runtime import compile_times
from experiments.runtime import progress
from radgs_jax import errors
from radgs_jax import metrics
from radgs_jax.geometry import resample

DIGEST_CHARACTERS = 16
"""Length of the digest of a system's sizes: 64 bits."""
ARRAYS = {subjects.REGISTRATION: ("world_from_ct",), subjects.RECONSTRUCTION: ("density", "world_from_index")}
"""Names of the arrays of a kept answer, of each kind of system."""


@dataclasses.dataclass(frozen=True)
class Table:
    """What a table is made of.

    Attributes:
      case_file: with true poses and points, which are for scores alone; subject_of: the subject of each target in it.
      sizes, seed: as in `System`; out: folder of the answers.
    """

    case_file: cases.CaseFile
    subject_of: Mapping[Target, Subject]
    sizes: Sizes
    seed: int
    out: pathlib.Path

    def subject(self, scene: str) -> Subject:
        """The subject of a scene."""
        return self.subject_of[target_of(self.case_file.volumes[self.case_file.scenes[scene].volume])]


def slug(title: str) -> str:
    """A title as the name of a folder."""
    return re.sub(r"[^a-z0-9]+", "_", title.lower()).strip("_")


def digest(system: System, sizes: Sizes, seed: int) -> str:
    """Of what a system's answers depend on besides the case."""
    values = [repr(getattr(sizes, name)) for name in system.uses]
    return hashlib.sha256(repr((system.title, values, seed)).encode()).hexdigest()[:DIGEST_CHARACTERS]


@dataclasses.dataclass(frozen=True)
class Item:
    """What one answer is about: a case, of which systems that reconstruct get the first of each scene."""

    name: str
    scene: str
    case: cases.Case


def items(case_file: cases.CaseFile, system: System) -> list[Item]:
    """What a system is asked, in file order."""
    found, seen = [], set()
    for case in case_file.cases:
        if system.kind == subjects.REGISTRATION:
            found.append(Item(case.name, case.scene, case))
        elif case.scene not in seen:
            seen.add(case.scene)
            found.append(Item(case.scene, case.scene, case))
    return found


def _path(table, system, variant, item, ending):
    """The file of an item's answer, '.npz', of its times, '_times.json', or of its score, '_score.json'."""
    mark = digest(system, table.sizes, table.seed)
    return table.out / "answers" / slug(system.title) / f"{variant}_{mark}" / f"{item.name}{ending}"


def key_of(seed: int, name: str) -> jax.Array:
    """A PRNG key of what is random in something with a name."""
    return jax.random.fold_in(jax.random.key(seed), zlib.crc32(name.encode()))


def timed(
    system: System, subject: Subject, given: Given, params: Any, sizes: Sizes, key: jax.Array
) -> tuple[Any, dict[str, float]]:
    """A system's answer once it is there, and the seconds that it took without compiling: `Stopwatch.times`."""
    with compile_times.Stopwatch() as watch:
        found = jax.block_until_ready(system.answer(subject, given, params, sizes, key))
    return found, watch.times()


def answer_all(table: Table, system: System, variant: str, targets: Collection[Target] | None = None) -> None:
    """Asks a system about all cases of a variant, as far as its answers are not there yet. Nothing true is used.

    Args:
      targets: vertebrae to ask about; None for all.
    """
    asked = items(table.case_file, system)
    if targets is not None:
        asked = [item for item in asked if table.subject(item.scene).target in targets]
    missing = [item for item in asked if not _path(table, system, variant, item, ".npz").exists()]
    # Cases of one scene follow each other.
    xrays_of = functools.lru_cache(1)(lambda scene: cases.read_xrays(table.case_file.scenes[scene], variant))
    prepared: dict[Target, Any] = {}
    with progress.Bar(len(asked), f"{system.title}: {variant}", len(asked) - len(missing)) as bar:
        for item in missing:
            subject = table.subject(item.scene)
            if system.prepare is not None and subject.target not in prepared:
                prepared[subject.target], _ = system.prepare(subject, table.sizes, table.seed)
            given = Given(xrays_of(item.scene), variant, item.case.world_from_ct)
            key = key_of(table.seed, f"{system.title}/{variant}/{item.name}")
            found, times = timed(system, subject, given, prepared.get(subject.target), table.sizes, key)
            files.write_json(_path(table, system, variant, item, "_times.json"), times)
            if system.kind == subjects.REGISTRATION:
                arrays = (np.asarray(found, np.float64),)
            else:
                arrays = np.asarray(found[0], np.float16), found[1]
            files.write_npz(_path(table, system, variant, item, ".npz"), **dict(zip(ARRAYS[system.kind], arrays)))
            bar.update()


def kept_answer(table: Table, system: System, variant: str, item: Item) -> dict[str, np.ndarray]:
    """The answer of a system about one item, as it is kept: its `ARRAYS`."""
    return files.read_npz(_path(table, system, variant, item, ".npz"), *ARRAYS[system.kind])


def _volume_score(subject, truth, answer):
    vertebra = subject.prepared.vertebra
    ct_from_grid, shape = resample.evaluation_grid(vertebra), resample.GRID_SHAPE
    in_ct = lambda volume, affine, order=1: resample.resample(volume, affine, ct_from_grid, shape, order=order)
    estimate = in_ct(answer["density"].astype(np.float32), np.linalg.inv(truth) @ answer["world_from_index"])
    density = in_ct(vertebra.density, vertebra.ct_from_index)
    near = metrics.near(in_ct(vertebra.mask, vertebra.ct_from_index, 0) > 0.5)
    return metrics.reconstruction_scores(estimate, density, near)


def _score(table, system, variant, item):
    answer, scene = kept_answer(table, system, variant, item), table.case_file.scenes[item.scene]
    truth = cases.truth(table.case_file, scene)
    if system.kind == subjects.RECONSTRUCTION:
        return _volume_score(table.subject(item.scene), truth, answer)
    points = cases.points(table.case_file, scene.volume)
    poses = {"start_mm": item.case.world_from_ct, "error_mm": answer["world_from_ct"]}
    return {name: metrics.mtre(points, pose, truth) for name, pose in poses.items()}


def row(table: Table, system: System, variant: str) -> tables.Row:
    """The scores of a system's answers, which true poses enter here for the first time."""
    scores, times, asked = [], [], items(table.case_file, system)
    for item in asked:
        path = _path(table, system, variant, item, "_score.json")
        if not path.exists():
            files.write_json(path, _score(table, system, variant, item))
        scores.append(files.read_json(path))
        times.append(files.read_json(_path(table, system, variant, item, "_times.json")))
    used = {subject.target: subject for subject in (table.subject(item.scene) for item in asked)}
    costs = [
        system.prepare(subject, table.sizes, table.seed)[1] if system.prepare else subjects.Cost()
        for subject in used.values()
    ]
    return tables.Row(
        system.title,
        tuple(item.scene for item in asked),
        {name: np.array([score[name] for score in scores]) for name in scores[0]},
        np.array([one["runtime_s"] for one in times]),
        np.array([one["cpu_s"] for one in times]),
        float(np.mean([cost.cpu_s for cost in costs])),
        max(cost.parameters for cost in costs),
        system.paper,
    )


def write_results(table: Table, system: System, variant: str) -> None:
    """A registering system's answers as a result file of the case format."""
    results = []
    for item in items(table.case_file, system):
        pose = kept_answer(table, system, variant, item)["world_from_ct"]
        times = files.read_json(_path(table, system, variant, item, "_times.json"))
        results.append({"id": item.name, "T": pose.tolist(), **times})
    path = table.out / f"results_{slug(system.title)}_{variant}.json"
    cases.write_results(path, system.title, variant, results)


def chosen(titles: Sequence[str], known: Sequence[System]) -> list[System]:
    """The systems whose title starts with one of `titles`, without regard to case; all where none is given.

    Raises:
      InputError: there is none.
    """
    starts = [title.lower() for title in titles]
    found = [one for one in known if not starts or any(one.title.lower().startswith(s) for s in starts)]
    if not found:
        wanted = f"beginnings of: {'; '.join(system.title for system in known)}"
        errors.fail("flags", "--systems", ",".join(titles), wanted)
    return found

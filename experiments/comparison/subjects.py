"""What the systems of Table 1 are given, and what a system is."""

import dataclasses
import functools
import pathlib
from collections.abc import Callable
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from data_pipelines import cases
from data_pipelines.ct import extraction
from data_pipelines.ct import scans
from experiments import configs
from experiments.patients import models
from experiments.patients import untrained
from experiments.patients import workdir as workdirs
from experiments.patients.workdir import Target
from kernels.common.types import Array
from radgs_jax import attenuation
from radgs_jax.baselines import ddgs
from radgs_jax.baselines import diffpose
from radgs_jax.baselines import diffvox
from radgs_jax.baselines import gr_car
from radgs_jax.baselines import r2_gaussian
from radgs_jax.baselines import sax_nerf
from radgs_jax.baselines import ts_sar
from radgs_jax.baselines.ddgs import Config as DdgsConfig
from radgs_jax.baselines.diffpose import Config as DiffPoseConfig
from radgs_jax.baselines.diffvox import Config as DiffVoxConfig
from radgs_jax.baselines.gr_car import Config as GrCarConfig
from radgs_jax.baselines.r2_gaussian import Config as R2GaussianConfig
from radgs_jax.baselines.sax_nerf import Config as SaxNerfConfig
from radgs_jax.baselines.ts_sar import Config as TsSarConfig
from radgs_jax.geometry.xray import XRay
from radgs_jax.registration.prepared import bare_parts
from radgs_jax.registration.prepared import Prepared

RECONSTRUCTION, REGISTRATION = "reconstruction", "registration"
CROP_PX, CROP_MM = 96, 1.0
"""Voxels along a side of the CT's crop that render-and-compare systems move, and their size, mm: the case format's crop."""


@dataclasses.dataclass(frozen=True)
class Subject:
    """A vertebra of a patient's CT, which systems are prepared for.

    Attributes:
      target: where it is; prepared: ready to register, with nothing trained on it.
      crop: (96, 96, 96) attenuation of the CT around it, 1/mm; box_from_crop: (4, 4).
      folder: for what is trained for its scan; shared_folder: for what is trained for all.
      targets: all vertebrae of that scan, which share networks.
      config: of RadGS-Reg's data: pairs and phantoms; base: folder of its base model.
    """

    target: Target
    prepared: Prepared
    crop: Float[Array, "96 96 96"]
    box_from_crop: Float[np.ndarray, "4 4"]
    folder: pathlib.Path
    shared_folder: pathlib.Path
    targets: tuple[Target, ...]
    config: configs.Config
    base: pathlib.Path

    @property
    def vertebra_volume(self) -> tuple[Float[Array, "x y z"], Float[Array, "4 4"]]:
        """The vertebra alone, 1/mm, and box_from_index."""
        alone = bare_parts(self.prepared)
        return alone.excess, alone.box_from_excess

    @property
    def crop_volume(self) -> tuple[Float[Array, "x y z"], Float[Array, "4 4"]]:
        """`crop` and `box_from_crop`."""
        return self.crop, jnp.asarray(self.box_from_crop, jnp.float32)


@dataclasses.dataclass(frozen=True)
class Given:
    """An acquisition and a start pose: all that a system may know of a case.

    Attributes:
      xrays: its views; variant: what they show: 'easy' is the bone alone, 'real' has an unknown exposure in air.
      world_from_ct: (4, 4) the start, mm.
    """

    xrays: Sequence[XRay]
    variant: str
    world_from_ct: Float[np.ndarray, "4 4"]


@dataclasses.dataclass(frozen=True)
class Sizes:
    """How large and how long everything is: a preset of the table.

    Attributes:
      diffvox, sax_nerf, gr_car, r2_gaussian, diffpose, ddgs, ts_sar: of the seven systems.
      plain_steps: training steps of the plain 2D network.
      pairs: number of simulated pairs of a vertebra that networks are trained on.
      phantoms, predictor_steps: number of phantoms that 3DGR-CAR's predictor is trained on, and of its steps.
      ours_minutes: training time of RadGS-Reg's network on a patient, minutes.
    """

    diffvox: DiffVoxConfig = DiffVoxConfig()
    sax_nerf: SaxNerfConfig = SaxNerfConfig()
    gr_car: GrCarConfig = GrCarConfig()
    r2_gaussian: R2GaussianConfig = R2GaussianConfig()
    diffpose: DiffPoseConfig = DiffPoseConfig()
    ddgs: DdgsConfig = DdgsConfig()
    ts_sar: TsSarConfig = TsSarConfig()
    plain_steps: int = 1500
    pairs: int = 256
    phantoms: int = 8
    predictor_steps: int = 2000
    ours_minutes: float = 5.0


CPU = Sizes()
"""A couple of hours for the bench on two cores (docs/table1.md)."""
QUICK = Sizes(
    diffvox.QUICK, sax_nerf.QUICK, gr_car.QUICK, r2_gaussian.QUICK, diffpose.QUICK, ddgs.QUICK, ts_sar.QUICK,
    plain_steps=300, pairs=96, phantoms=3,
    predictor_steps=500, ours_minutes=1.0,
)  # fmt: skip
"""Half the steps or less: half an hour for one vertebra."""
ORIGINAL = Sizes(
    diffvox.ORIGINAL, sax_nerf.ORIGINAL, gr_car.ORIGINAL, r2_gaussian.ORIGINAL, diffpose.ORIGINAL, ddgs.ORIGINAL, ts_sar.ORIGINAL,
    plain_steps=6750, pairs=300, phantoms=253,
    predictor_steps=100_000, ours_minutes=600.0,
)  # fmt: skip
"""The published sizes and steps; it takes accelerators."""
PRESETS = {"cpu": CPU, "quick": QUICK, "original": ORIGINAL}


@dataclasses.dataclass(frozen=True)
class Cost:
    """What preparing a system took.

    Attributes:
      cpu_s: CPU seconds; nan where it was interrupted. parameters: their number.
    """

    cpu_s: float = 0.0
    parameters: int = 0


Pose = Float[Array, "4 4"]
"""world_from_ct, mm."""
Densities = tuple[Float[Array, "x y z"], Float[Array, "4 4"]]
"""Densities, 1/mm, and their world_from_index, mm."""
Answer = Callable[[Subject, Given, Any, Sizes, jax.Array], Any]
"""(subject, given, params, sizes, key) -> `Pose` or `Densities`."""
Prepare = Callable[[Subject, Sizes, int], tuple[Any, Cost]]
"""(subject, sizes, seed) -> params, kept in the subject's folder, and what they cost."""


@dataclasses.dataclass(frozen=True)
class System:
    """A row of the table.

    Attributes:
      title: its name there; kind: `RECONSTRUCTION` or `REGISTRATION`.
      answer: of which a reconstruction gives `Densities` and a registration a `Pose`.
      prepare: None where nothing is prepared.
      uses: names of the fields of `Sizes` that its answers depend on.
      paper: the paper's own row: "SSIM, PSNR" or "mTRE, capture range, success, run time".
      variants: what it is run on; None: everything.
    """

    title: str
    kind: str
    answer: Answer
    prepare: Prepare | None = None
    uses: tuple[str, ...] = ()
    paper: str = ""
    variants: tuple[str, ...] | None = None


def subjects(
    case_file: cases.CaseFile, config: configs.Config, workdir: pathlib.Path, base: pathlib.Path | str | None = None
) -> dict[Target, Subject]:
    """A `Subject` for each vertebra of a case file.

    Args:
      config: of RadGS-Reg and of the data that networks are trained on.
      workdir: for what is trained for all, with a folder for what is trained for a scan.
      base: folder of RadGS-Reg's base model; None takes the one that is shipped.
    Raises:
      InputError: as `models.load_model`, `scans.read_scan` and `extraction.vertebra_cube`.
    """
    base, digests = pathlib.Path(models.base_folder() if base is None else base), workdirs.ScanDigests()
    model, rule = models.load_model(base), workdirs.base_rule(base, config.refine)
    load = untrained.untrained_loader(model, config.refine, rule, digests)
    targets = list(dict.fromkeys(workdirs.target_of(volume) for volume in case_file.volumes.values()))
    found, read = {}, functools.lru_cache(1)(scans.read_scan)
    for target in targets:
        scan = read(target.ct, target.mask, target.patient, target.labels)
        prepared = load(target)
        frame = prepared.vertebra.ct_from_box
        centre = np.asarray(frame[:3, 3], np.float64)
        cube = extraction.vertebra_cube(scan, target.label, CROP_MM, (CROP_PX,) * 3, centre=centre)
        crop = jnp.asarray(attenuation.from_hounsfield(cube.hu), jnp.float32)
        together = tuple(t for t in targets if (t.ct, t.mask) == (target.ct, target.mask))
        box_from_crop = np.linalg.inv(frame) @ cube.ct_from_index
        folder = workdir / digests.of(target)
        found[target] = Subject(target, prepared, crop, box_from_crop, folder, workdir, together, config, base)
    return found

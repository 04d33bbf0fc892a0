"""Frozen configurations of a training run, with presets."""

import dataclasses

from data_pipelines import simulation
from data_pipelines.pairs.examples import PairConfig
from data_pipelines.phantom.generate import PhantomConfig
from data_pipelines.simulation.quick import PanelFaults
from radgs_jax.models.config import ModelConfig
from radgs_jax.registration.gauss_newton import RefineConfig
from radgs_jax.training.objectives import LossConfig
from radgs_jax.training.update import UpdateConfig

DATA_STAGES = ("p1", "p2", "p3")
STARTS_MM = ((0, 5), (5, 10), (10, 15), (15, 20), (20, 25))
"""Bins (low, high) of start errors, mTRE in mm, that scores are grouped by."""


@dataclasses.dataclass(frozen=True)
class StageConfig:
    """One data stage.

    Attributes:
      pairs: number of X-ray pairs per vertebra; in P2, of simulated acquisitions per vertebra.
      ct_pairs: number of CT pairs per vertebra.
      steps: number of steps of each phase (RecM, RegM, joint).
      learning_rate: peak of each phase's schedule.
    """

    pairs: int
    ct_pairs: int
    steps: tuple[int, int, int]
    learning_rate: float


@dataclasses.dataclass(frozen=True)
class Config:
    """Everything that a training run depends on besides its inputs.

    The field names and their values are hashed into workdirs, so a renamed field makes every existing workdir unusable.

    Attributes:
      seed: of everything random.
      model, pairs, losses, phantom: of the network, the training pairs, the losses, the phantoms.
      detector: faults of the X-ray panel in P2's simulation and in scores.
      labels: VerSe numbers that P1 and P2 train on.
      p1_patients, p2_patients: number of phantoms in P1 and P2.
      p2_folds: number of folds by patient; p2_fold: index of the one that is held out.
      patient_labels: VerSe numbers of the vertebrae that P3 prepares.
      p1, p2, p3: the data stages.
      batch: number of examples per step.
      checkpoint_seconds: minimum time between checkpoints, s; trace_steps: as in `loop.run_steps`.
      passes: number of the network's passes in scores.
      refine: the refinement after them.
      judged: whether P3 adds the shipped acceptance rule.
      eval_scenes: number of held-out acquisitions per vertebra.
      update: how a training step is made.
      mesh: sizes of axes of `sharding.make_mesh`, of which no result depends.
    """

    seed: int = 0
    model: ModelConfig = ModelConfig()
    pairs: PairConfig = PairConfig()
    losses: LossConfig = LossConfig()
    phantom: PhantomConfig = PhantomConfig()
    detector: PanelFaults = PanelFaults()
    labels: tuple[int, ...] = (17, 18, 19, 20, 21, 22, 23, 24)
    p1_patients: int = 8
    p2_patients: int = 5
    p2_folds: int = 5
    p2_fold: int = 0
    patient_labels: tuple[int, ...] = (20, 21, 22, 23, 24)
    p1: StageConfig = StageConfig(pairs=16, ct_pairs=32, steps=(400, 60, 60), learning_rate=2e-3)
    p2: StageConfig = StageConfig(pairs=2, ct_pairs=16, steps=(40, 20, 40), learning_rate=1e-3)
    p3: StageConfig = StageConfig(pairs=192, ct_pairs=96, steps=(600, 40, 100), learning_rate=1.5e-3)
    batch: int = 16
    checkpoint_seconds: float = 60.0
    trace_steps: int = 0
    passes: int = 5
    refine: RefineConfig = RefineConfig()
    judged: bool = True
    eval_scenes: int = 2
    update: UpdateConfig = UpdateConfig()
    mesh: tuple[tuple[str, int], ...] = ()

    def stage(self, name: str) -> StageConfig:
        """The settings of 'p1', 'p2' or 'p3'.

        Raises:
          KeyError: another name.
        """
        return {"p1": self.p1, "p2": self.p2, "p3": self.p3}[name]


DEMO = Config()
"""For a laptop: sizes and step counts were chosen by hand, training time against accuracy (docs/accuracy.md, `make train`)."""
BASE = dataclasses.replace(
    DEMO,
    p1_patients=16,
    p1=StageConfig(pairs=24, ct_pairs=32, steps=(2000, 100, 200), learning_rate=2e-3),
    p2=StageConfig(pairs=2, ct_pairs=16, steps=(100, 20, 60), learning_rate=1e-3),
    p3=StageConfig(pairs=256, ct_pairs=128, steps=(1000, 40, 160), learning_rate=1.5e-3),
)
"""Settings that `base/` is made with, and patients are prepared with from there: the demo's model, trained on more spines and for
longer (docs/performance.md)."""
PAPER = Config(
    model=ModelConfig(
        backbone_2d=("resnet50", ()),
        backbone_3d=("resnet50", ()),
        head="anchored",
        gaussians=10000,
        anchors=1250,
        matching_heads=4,
        matching_width=96,
        attention_maps=32,
        counterfactual_draws=4,
        hidden=256,
        context=512,
        crop_px=128,
        pixel_mm=0.75,
        grid=64,
        voxel_mm=1.7,
        grid_blur_mm=0.6,
    ),
    pairs=PairConfig(
        geometry=simulation.Geometry(window=224, binning=4, vertebra_step_mm=0.5, rest_step_mm=1.0),
        poses=1,
        rest_mm=1.5,
        vertebra_mm=0.75,
        ct_shift_mm=50.0,
        ct_near=0.0,
    ),
    p1_patients=253,
    p2_patients=10,
    labels=(20, 21, 22, 23, 24),
    p1=StageConfig(pairs=25, ct_pairs=1, steps=(120000, 48000, 120000), learning_rate=1e-4),
    p2=StageConfig(pairs=3, ct_pairs=100, steps=(900, 900, 900), learning_rate=1e-4),
    p3=StageConfig(pairs=300, ct_pairs=100, steps=(6750, 2250, 6750), learning_rate=1e-4),
    batch=8,
    checkpoint_seconds=600.0,
)
"""The paper's sizes: counts of pairs, ranges and steps are from the paper (docs/data.md); it takes accelerators."""
PRESETS = {"demo": DEMO, "base": BASE, "paper": PAPER}

"""The smallest configuration that still runs every stage: a coarse phantom, a small network, two steps a phase."""

import dataclasses

from data_pipelines import simulation
from data_pipelines.pairs.examples import PairConfig
from data_pipelines.phantom.generate import PhantomConfig
from experiments import configs
from radgs_jax.models.config import ModelConfig
from radgs_jax.registration.gauss_newton import Level
from radgs_jax.registration.gauss_newton import RefineConfig

MODEL = ModelConfig(
    backbone_2d=("small", (("widths", (8, 16)), ("blocks", (1, 1)), ("reduce", 2), ("out", 16))),
    backbone_3d=("small", (("widths", (8, 16)), ("blocks", (1, 1)), ("reduce", 3), ("out", 16), ("pyramid", False))),
    gaussians=64,
    anchors=16,
    matching_width=8,
    attention_maps=4,
    hidden=16,
    context=16,
    crop_px=32,
    pixel_mm=3.0,
    grid=12,
    voxel_mm=8.0,
    grid_blur_mm=3.0,
)


def config(**changes):
    """The tiny `configs.Config`."""
    stage = configs.StageConfig(pairs=2, ct_pairs=4, steps=(3, 3, 3), learning_rate=1e-3)
    base = configs.Config(
        model=MODEL,
        pairs=PairConfig(
            simulation.Geometry(window=56, binning=16, vertebra_step_mm=4.0, rest_step_mm=6.0),
            rest_mm=6.0,
            vertebra_mm=3.0,
            poses=2,
        ),
        phantom=PhantomConfig(spacing_mm=(2.5, 2.5, 3.0), levels=(20, 21, 22, 23, 24)),
        labels=(21, 22),
        p1_patients=2,
        p2_patients=2,
        p2_folds=2,
        patient_labels=(21, 22),
        p1=stage,
        p2=dataclasses.replace(stage, pairs=1),
        p3=stage,
        batch=2,
        passes=2,
        judged=False,
        refine=RefineConfig(levels=(Level(6.0, 24, 2, 4.0, 8.0, 0.1, 2), Level(3.0, 32, 1, 3.0, 6.0))),
        eval_scenes=1,
        checkpoint_seconds=0.0,
    )
    return dataclasses.replace(base, **changes)

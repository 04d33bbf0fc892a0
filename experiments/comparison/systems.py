"""The rows of Table 1."""

from experiments.comparison import reconstructing
from experiments.comparison import registering
from experiments.comparison.subjects import RECONSTRUCTION
from experiments.comparison.subjects import REGISTRATION
from experiments.comparison.subjects import System
from radgs_jax.baselines import diffvox
from radgs_jax.baselines import gr_car
from radgs_jax.baselines import r2_gaussian
from radgs_jax.baselines import sax_nerf

OURS, OURS_WITHHELD = "RadGS-Reg, as users run it", "RadGS-Reg, CT withheld"
"""Titles of the rows that the others are tested against: of registration, and of reconstruction without the patient's CT."""


def _fitted(title, fit, name, paper="", own_body=True, variants=None, **changes):
    """A reconstructing system that nothing is trained for."""
    answer = reconstructing.in_box(reconstructing.unprepared(fit), name, own_body, **changes)
    return System(title, RECONSTRUCTION, answer, None, (name,), paper, variants)


def _registered(title, answer, prepare=None, uses=(), paper=""):
    return System(title, REGISTRATION, answer, prepare, uses, paper)


def _rows():
    of_diffpose = registering.prepare_diffpose, ("diffpose", "pairs")
    moving = registering.diffpose_moving
    ddgs_ct = registering.from_box(registering.ddgs_pose)
    return (
        System("zero volume", RECONSTRUCTION, reconstructing.zero),
        System("mean shape at the start", RECONSTRUCTION, reconstructing.mean_shape),
        System("CT at the start", RECONSTRUCTION, reconstructing.ct_at_start),
        System("CT at our estimate", RECONSTRUCTION, reconstructing.ct_at_estimate),
        System(OURS_WITHHELD, RECONSTRUCTION, reconstructing.ours_withheld),
        System(
            "RadGS-Reg, reconstruction",
            RECONSTRUCTION,
            reconstructing.ours_reconstructed,
            paper="94.51 ± 0.39 %, 28.80 ± 0.33 dB",
        ),
        _fitted("DiffVox", diffvox.fit, "diffvox", "15.48 ± 11.42 %, 10.22 ± 0.76 dB"),
        _fitted("DiffVox, box alone", diffvox.fit, "diffvox", own_body=False, variants=("artic",)),
        _fitted("SAX-NeRF", sax_nerf.fit, "sax_nerf", "57.23 ± 8.96 %, 16.17 ± 0.55 dB"),
        System(
            "3DGR-CAR",
            RECONSTRUCTION,
            reconstructing.in_box(gr_car.fit, "gr_car"),
            reconstructing.prepare_predictor,
            ("gr_car", "pairs", "phantoms", "predictor_steps"),
            "39.93 ± 12.35 %, 15.06 ± 2.35 dB",
        ),
        _fitted("3DGR-CAR from backprojection", gr_car.fit, "gr_car"),
        _fitted("R2-Gaussian", r2_gaussian.fit, "r2_gaussian", "52.36 ± 2.21 %, 15.79 ± 0.54 dB"),
        _fitted("R2-Gaussian from density 1", r2_gaussian.fit, "r2_gaussian", variants=("easy",), density=1.0),
        _fitted("R2-Gaussian, published TV", r2_gaussian.fit, "r2_gaussian", variants=("easy",), published_tv=True),
        _fitted("R2-Gaussian, box alone", r2_gaussian.fit, "r2_gaussian", own_body=False, variants=("artic",)),
        _registered("start", registering.start),
        _registered(
            "DiffPose, vertebra",
            moving("vertebra_volume"),
            *of_diffpose,
            "10.49 ± 9.90 mm, CR 10-15, SR 20 %, RT 139 s",
        ),
        _registered("DiffPose, crop", moving("crop_volume"), *of_diffpose),
        _registered("DiffPose, crop twice, then vertebra", moving(*registering.THREE), *of_diffpose),
        _registered("crop twice, then vertebra", moving(*registering.THREE, network=False), uses=("diffpose",)),
        _registered(
            "DDGS-CT, vertebra",
            ddgs_ct,
            registering.prepare_ddgs("vertebra_volume"),
            ("ddgs",),
            "13.90 ± 11.84 mm, CR 15-20, SR 17 %, RT 73 s",
        ),
        _registered("DDGS-CT, crop", ddgs_ct, registering.prepare_ddgs("crop_volume"), ("ddgs",)),
        _registered(
            "TS-SAR, reconstructed from its title",
            registering.from_box(registering.ts_sar_pose),
            registering.prepare_ts_sar,
            ("ts_sar", "pairs"),
            "4.89 ± 1.20 mm, CR 0-5, SR 7 %, RT 1.7 s",
        ),
        _registered(
            "plain 2D network",
            registering.from_box(registering.plain_pose),
            registering.prepare_plain,
            ("plain_steps", "pairs"),
        ),
        _registered("RadGS-Reg, network of the base alone", registering.network),
        _registered(
            "RadGS-Reg, network trained on the patient alone",
            registering.network,
            registering.prepare_ours,
            ("ours_minutes",),
        ),
        _registered("our refinement from the start alone", registering.start_alone),
        _registered(OURS, registering.ours, paper="1.14 ± 1.01 mm, CR 20-25, SR 93 %, RT 0.8 s"),
    )


SYSTEMS = _rows()
"""All rows of the table, in the order in which they are run.

A figure of the paper's own table 1 is SSIM and PSNR, or mTRE, capture range, success and run time.
"""

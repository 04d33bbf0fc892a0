"""What is on disk already stays valid: digests that workdirs, checkpoints and stores were named by before code moved."""

import pytest

from data_pipelines.pairs import identity
from experiments import configs
from experiments import train
from experiments.localizers import training
from radgs_jax.registration import confidence
from radgs_jax.registration import gauss_newton
from radgs_jax.registration import search


@pytest.mark.parametrize(
    "preset, run, patient",
    [
        ("base", "7940dc401c303827", "e819a603454427e3"),
        ("demo", "b7dd839584eeae55", "eda6a7d81e330ef5"),
        ("paper", "4e14e97c6b8ceef3", "0f127401c1e1dd8a"),
    ],
)
def test_presets_keep_their_digests(preset, run, patient):
    """Of a training run's configuration, and of what a prepared workdir names itself by."""
    c = configs.PRESETS[preset]
    assert train.mark(c) == run
    assert identity.config_hash(c.seed, c.p3, c.pairs, c.losses, c.model, c.batch, None) == patient


def test_localizers_keep_their_digests():
    assert identity.config_hash(training.GENERIC) == "bbf8929459c49b18"
    assert identity.config_hash(training.PATIENT) == "b73f960416942c4c"


def test_the_shipped_acceptance_rule_is_for_the_refinement_and_search_in_use():
    found = confidence.method_digest(gauss_newton.RefineConfig(), search.SearchConfig())
    assert found == "a3b341c88dee92c0", (
        "a changed refinement or search needs experiments.calibrate and a new base/calibration.json"
    )

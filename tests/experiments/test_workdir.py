"""Workdirs and models: what they are reused for, what is refused, and the shipped base."""

import dataclasses
import pathlib
import shutil

import jax
import nibabel
import numpy as np
import pytest
import tiny

from data_pipelines.io import checksums
from data_pipelines.io import files
from data_pipelines.io import locks
from data_pipelines.io import nifti
from data_pipelines.pairs.identity import scan_digest
from experiments import configs
from experiments.localizers import localizer_files
from experiments.localizers import training
from experiments.patients import models
from experiments.patients import preparing
from experiments.patients.models import load_model
from experiments.patients.models import save_model
from experiments.patients.workdir import load
from experiments.patients.workdir import load_localizer
from experiments.patients.workdir import ScanDigests
from experiments.patients.workdir import seal
from experiments.patients.workdir import Target
from radgs_jax import errors
from radgs_jax.localization import locate
from radgs_jax.localization import network
from radgs_jax.localization.chain import Chain
from radgs_jax.models import backbones
from radgs_jax.models import radgs_reg
from radgs_jax.models.trained import MEAN_SHAPE
from radgs_jax.models.trained import Model
from radgs_jax.registration import confidence
from radgs_jax.registration.gauss_newton import RefineConfig
from radgs_jax.registration.search import SearchConfig

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]


@pytest.mark.long
def test_a_localizer_and_other_label_numbers_are_part_of_a_workdir(trained, tmp_path, first_case):
    """A mask in other numbers prepares the same vertebra; a localizer is added later, once, and is then used."""
    target = first_case[3]
    values, affine = nifti.read_nifti(target.mask)
    counted_up = np.array(values)
    for number in (20, 21, 22, 23, 24):
        counted_up[values == number] = 51 - number  # as TotalSegmentator counts: L5 is 27, L1 is 31
    counted_up[values == 26] = 25
    nifti.write_nifti(tmp_path / "labels.nii.gz", counted_up, affine)
    other = dataclasses.replace(target, mask=tmp_path / "labels.nii.gz", labels="totalsegmentator")
    digests, workdir, base = ScanDigests(), tmp_path / "w", trained[0] / "p2" / "model"
    assert digests.of(target) == scan_digest(target.ct, target.mask)
    others = [digests.of(dataclasses.replace(other, labels=name)) for name in (None, "verse", "totalsegmentator")]
    assert len({*others, digests.of(target)}) == 4
    preparing.prepare(tiny.config(), workdir, [other], base)
    found = load(workdir, other, digests).vertebra
    np.testing.assert_array_equal(found.density, load(trained[0] / "p3", target, digests).vertebra.density)

    generic = tmp_path / "generic.npz"
    with pytest.raises(errors.InputError, match="wanted --init, --points, or a workdir with a detector"):
        load_localizer(workdir, other, digests, generic)
    config = network.DetectorConfig((20, 21, 22), 3.0, (4, 4, 6, 6), (0, 0, 0, 0), 4)
    params = network.init(config, jax.random.key(0))
    chain = Chain(np.full(2, 30.0), np.full(2, 8.0), 1.0, 0.0, np.ones(3, bool))
    localizer_files.write_localizer(generic, locate.Localizer(params, config, chain), "generic")
    assert load_localizer(workdir, other, digests, generic)[1] is False

    schedule = training.LocalizerTraining(bodies=2, held_out=1, count=1, steps=2, batch=2, crop_px=64)

    def adapt(**changes):
        asked = dict(localizer=generic, adapting=schedule)
        preparing.prepare(tiny.config(), workdir, [other], base, **{**asked, **changes})

    before = {p: p.stat().st_mtime_ns for p in workdir.rglob("*") if p.is_file() and p.name != "manifest.json"}
    adapt()
    made = workdir / others[2] / "detector.npz"
    model, adapted = load_localizer(workdir, other, digests, generic)
    assert adapted and model.levels == (20, 21, 22) and set(model.centres_ct) == {20, 21, 22, 23, 24}
    before[made] = made.stat().st_mtime_ns
    adapt()
    adapt(localizer=None)
    assert {p: p.stat().st_mtime_ns for p in before} == before
    with pytest.raises(errors.InputError, match="manifest.json: detector: found"):
        adapt(adapting=dataclasses.replace(schedule, steps=3))
    with pytest.raises(errors.InputError, match="label 24: found L5, wanted one from L1 to L3"):
        preparing.prepare(tiny.config(), workdir, [dataclasses.replace(other, label=24)], base, localizer=generic)
    made.unlink()
    with pytest.raises(errors.InputError, match="detector: found an unfinished preparation"):
        load_localizer(workdir, other, digests, generic)


def test_the_shipped_base_fits_the_default_configuration():
    model = load_model(REPOSITORY / "base")
    assert model.config == configs.DEMO.model
    assert set(model.mean_shapes) == {0, *configs.DEMO.labels}


def test_the_base_is_found_where_it_is_and_missed_in_one_line(tmp_path, monkeypatch):
    """In the repository, from any folder; as an installed package; and nowhere."""
    monkeypatch.chdir(tmp_path)
    assert models.base_folder() == REPOSITORY / "base"
    monkeypatch.setattr(models, "__file__", str(tmp_path / "experiments" / "patients" / "models.py"))
    with pytest.raises(errors.InputError) as caught:
        models.base_folder()
    line = str(caught.value)
    assert line.count("\n") == 0 and line.startswith(
        f"{tmp_path / 'base'}: manifest.json: found nothing, wanted the shipped model"
    )
    (tmp_path / "base").mkdir()
    with pytest.raises(errors.InputError, match="found nothing"):
        models.base_folder()  # a folder without a model is none
    for name in ("radgs_jax_base", "base"):  # the repository's own is taken before an installed one
        files.write_json(tmp_path / name / "manifest.json", {})
        assert models.base_folder() == tmp_path / name


def test_a_prepared_workdir_is_reused_only_for_the_same_inputs(trained, first_case, tmp_path):
    _, _, _, target = first_case
    base, workdir = trained[0] / "p2" / "model", tmp_path / "w"
    shutil.copytree(trained[0] / "p3", workdir, ignore=shutil.ignore_patterns("pairs", "checkpoints", "tensorboard"))
    targets = [dataclasses.replace(target, label=label) for label in (21, 22)]
    before = (workdir / "manifest.json").read_text()
    preparing.prepare(tiny.config(), workdir, targets, base)  # the same: nothing to do
    for changed, field in (
        (dict(seed=3), "config"),
        (dict(p3=dataclasses.replace(tiny.config().p3, pairs=3)), "config"),
    ):
        with pytest.raises(errors.InputError, match=f"manifest.json: {field}: found"):
            preparing.prepare(tiny.config(**changed), workdir, targets, base)
    with pytest.raises(errors.InputError, match="base: found"):
        preparing.prepare(tiny.config(), workdir, targets, trained[0] / "p1" / "model")
    with pytest.raises(errors.InputError, match="scans: found"):
        preparing.prepare(tiny.config(), workdir, targets[:1], base)
    # Training does not depend on the refinement and the rule, so both may be exchanged.
    fitted_for = confidence.method_digest(tiny.config().refine, SearchConfig())
    rule = confidence.AcceptanceRule((0.0,) * 9, (0.5,) * 2, (0.0,) * 2, 2.0, fitted_for)
    preparing.prepare(tiny.config(), workdir, targets, base, rule=rule)
    assert load(workdir, target, ScanDigests()).rule == rule
    # But a rule that was fitted for other refinements is refused.
    others = dataclasses.replace(rule, fitted_for=confidence.method_digest(RefineConfig(), SearchConfig()))
    preparing.prepare(tiny.config(), workdir, targets, base, rule=others)
    with pytest.raises(errors.InputError, match="calibration.json: fitted_for: found"):
        load(workdir, target, ScanDigests())
    # Where the base has a rule, that is the default.
    judging = shutil.copytree(base, tmp_path / "judging")
    files.write_json(judging / "calibration.json", dataclasses.asdict(rule))
    checksums.renew(judging / "calibration.json")
    preparing.prepare(tiny.config(), workdir, targets, judging)
    assert load(workdir, target, ScanDigests()).rule == rule
    preparing.prepare(tiny.config(), workdir, targets, base)
    assert load(workdir, target, ScanDigests()).rule is None
    assert (workdir / "manifest.json").read_text() == before


def test_a_damaged_workdir_is_one_clear_line(trained, tmp_path, first_case):
    target, digests = first_case[3], ScanDigests()
    digest = digests.of(target)
    shutil.copytree(
        trained[0] / "p3" / digest, tmp_path / digest, ignore=shutil.ignore_patterns("pairs", "checkpoints")
    )
    good = files.read_json(trained[0] / "p3" / "manifest.json")
    for manifest, line in (
        ([], "format: found None"),
        ({**good, "format": "x/1"}, "format: found 'x/1'"),
        ({k: v for k, v in good.items() if k != "scans"}, "scans: found None"),
        ({**good, "scans": {digest: 21}}, "scans: found"),
    ):
        files.write_json(tmp_path / "manifest.json", manifest)
        for use in (
            lambda: load(tmp_path, target, digests),
            lambda: preparing.prepare(tiny.config(), tmp_path, [target], trained[0] / "p2" / "model"),
        ):
            with pytest.raises(errors.InputError, match=f"manifest.json: {line}"):
                use()
    files.write_json(tmp_path / "manifest.json", good)
    load(tmp_path, target, digests)
    path = tmp_path / digest / f"vertebra_{target.label}.npz"
    files.write_npz(path, **{**np.load(path), "fine_format": np.asarray("radgs-gaussians/0")})
    with pytest.raises(errors.InputError, match="npz: sha256: found .* prepare the workdir again"):
        load(tmp_path, target, digests)
    seal(tmp_path, [path.relative_to(tmp_path).as_posix()])
    with pytest.raises(
        errors.InputError, match="npz: fine_format: found 'radgs-gaussians/0', wanted 'radgs-gaussians/1'"
    ):
        load(tmp_path, target, digests)


def test_a_minutes_budget_fixes_its_schedule_once(trained, tmp_path, first_case):
    target = first_case[3]
    # The tiny configuration saves at every step, which would take longer than the budget's many steps.
    config = tiny.config(checkpoint_seconds=60.0)
    preparing.prepare(config, tmp_path / "w", [target], trained[0] / "p2" / "model", minutes=0.1)
    plans = sorted((tmp_path / "w").rglob("plan.json"))
    assert len(plans) == 3 and all(files.read_json(p)["steps"] >= 1 for p in plans)


def test_model_round_trip_and_refusal_of_changed_files(tmp_path):
    params = jax.device_get(jax.jit(lambda key: radgs_reg.init(tiny.MODEL, key))(jax.random.key(3)))
    shapes = {0: np.zeros(MEAN_SHAPE, np.float16), 21: np.ones(MEAN_SHAPE, np.float16)}
    save_model(tmp_path / "m", Model(params, tiny.MODEL, shapes), "test")
    loaded = load_model(tmp_path / "m")
    assert loaded.config == tiny.MODEL and set(loaded.mean_shapes) == {0, 21}
    jax.tree.map(np.testing.assert_array_equal, loaded.params, params)
    manifest = files.read_json(tmp_path / "m" / "manifest.json")
    manifest["model"]["gaussians"] = 65
    files.write_json(tmp_path / "m" / "manifest.json", manifest)
    with pytest.raises(errors.InputError, match="do not match their hash"):
        load_model(tmp_path / "m")
    for change, line in (
        ({"model": None}, "model: found None, wanted a dict"),
        ({"model_hash": 3}, "model_hash: found 3, wanted a str"),
        ({"model": {**manifest["model"], "depth": 4}}, "model.depth: found a field that is not known, wanted some of"),
    ):
        files.write_json(tmp_path / "m" / "manifest.json", {**manifest, **change})
        with pytest.raises(errors.InputError, match=f"manifest.json: {line}"):
            load_model(tmp_path / "m")


def test_a_model_whose_backbone_has_no_name_is_not_written(tmp_path):
    config = dataclasses.replace(tiny.MODEL, backbone_2d=(backbones.ResNet18, ()))
    with pytest.raises(errors.InputError, match="m: model: found the class ResNet18, wanted a backbone with a name"):
        save_model(tmp_path / "m", Model({}, config, {}), "test")
    assert not any(tmp_path.iterdir())


def test_volumes_with_nan_are_refused_before_anything_is_written(trained, tmp_path, first_case, run_command):
    target = first_case[3]
    image = nibabel.load(target.ct)
    hu = np.asarray(image.dataobj).astype(np.float32)
    hu[0, 0, 0] = np.nan
    nifti.write_nifti(tmp_path / "nan.nii.gz", hu, image.affine)
    done = run_command(
        "prepare",
        f"--ct={tmp_path / 'nan.nii.gz'}",
        f"--mask={target.mask}",
        "--label=21",
        f"--workdir={tmp_path / 'o'}",
        f"--base={trained[0] / 'p2' / 'model'}",
    )
    assert done.returncode == 2 and "1 not finite" in done.stderr.splitlines()[-1]
    assert not (tmp_path / "o").exists()


def test_a_folder_without_images_is_refused_before_it_is_read(tmp_path):
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "x.txt").write_text("x" * 200)
    target = Target("p", tmp_path / "notes", tmp_path / "notes", 21)
    with pytest.raises(errors.InputError, match="notes: folder: found no DICOM and no NIfTI file"):
        ScanDigests().of(target)


def test_a_second_process_in_a_workdir_is_told_so(trained, tmp_path, first_case):
    workdir, base = tmp_path / "w", trained[0] / "p2" / "model"
    shutil.copytree(trained[0] / "p3", workdir, ignore=shutil.ignore_patterns("pairs", "checkpoints", "tensorboard"))
    targets = [dataclasses.replace(first_case[3], label=label) for label in (21, 22)]
    with locks.hold(workdir / locks.LOCK, workdir):
        with pytest.raises(errors.InputError, match="w: folder: found one in use by process"):
            preparing.prepare(tiny.config(), workdir, targets, base)
    preparing.prepare(tiny.config(), workdir, targets, base)
    assert not list(workdir.glob(".*"))

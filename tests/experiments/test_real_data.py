"""Training on given CTs: VerSe's published layouts as P1's data, and a patient's own CT in P3."""

import dataclasses
import shutil

import fresh_python
import numpy as np
import pytest
import tiny

from data_pipelines.ct import verse
from data_pipelines.pairs import build
from data_pipelines.pairs import identity
from data_pipelines.phantom import scan_files
from experiments import data_stages
from experiments.patients.workdir import Target
from radgs_jax import errors
from radgs_jax.models import radgs_reg

LAYOUTS = {
    "by subject": (
        "dataset-verse20{split}/rawdata/sub-{name}/sub-{name}_ct.nii.gz",
        "dataset-verse20{split}/derivatives/sub-{name}/sub-{name}_seg-vert_msk.nii.gz",
    ),
    "challenge": ("01_{split}/{name}/{name}_CT-iso.nii.gz", "01_{split}/{name}/{name}_CT-iso_seg.nii.gz"),
}


@pytest.fixture(scope="module")
def phantoms(tmp_path_factory):
    """Two phantoms: [(subject, CT, mask)]."""
    return scan_files.phantoms(tmp_path_factory.mktemp("phantoms"), [3, 4], tiny.config().phantom)


def _layout(root, layout, phantoms):
    """The phantoms in a layout of VerSe's, the first one in training and the second in validation."""
    for (_, ct, mask), (name, split) in zip(phantoms, (("verse004", "training"), ("verse505", "validation"))):
        for source, pattern in zip((ct, mask), LAYOUTS[layout]):
            path = root / pattern.format(split=split, name=name)
            path.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, path)
    return root


@pytest.mark.parametrize("layout", LAYOUTS)
def test_pairs_of_a_dataset_are_those_of_its_files(phantoms, tmp_path, layout):
    builder = verse.prepare(_layout(tmp_path / "raw", layout, phantoms), tmp_path / "datasets", "lumbar_scans")
    scans = verse.scans_of(builder)
    assert [(scan.patient, scan.split) for scan in scans] == [("verse004", "training"), ("verse505", "validation")]
    assert all(set(scan.complete) <= set(verse.LUMBAR) for scan in scans) and 22 in scans[0].complete
    assert verse.scans_of(builder) == scans and len({scan.digest() for scan in scans}) == 2
    config, sets = tiny.config(), []
    for name, source in (("dataset", scans[0]), ("files", identity.FileScan(*phantoms[0]))):
        sets.append(build.simulated_pairs(tmp_path / name, [(source, 22)], 2, 1, config.pairs, 64))
    for found, wanted in zip(sets[0].source, sets[1].source):
        # A sum over another order of voxels ends in another last digit, after which the panel's noise is drawn anew.
        for name in wanted.keys() - {"measured"}:
            np.testing.assert_allclose(found[name], wanted[name], rtol=1e-3, atol=1e-3)


def test_p1_trains_on_the_splits_of_a_folder(phantoms, tmp_path, capsys, monkeypatch):
    given = data_stages.RealData(_layout(tmp_path / "raw", "by subject", phantoms))
    trained = []
    monkeypatch.setattr(data_stages.loop, "run_phases", lambda *a: trained.append(a[3]) or a[4])
    monkeypatch.setattr(radgs_reg, "init", lambda config, key: {})
    for splits, count in ((("training",), 2), (("training", "validation"), 4)):
        data_stages.p1(tiny.config(), tmp_path, ("rec",), dataclasses.replace(given, p1_splits=splits))
        assert len(trained[-1]) == count * tiny.config().p1.pairs
    said = capsys.readouterr().out
    assert "P1 trains on 2 vertebrae of 1 patients" in said and "P1 trains on 4 vertebrae of 2 patients" in said
    with pytest.raises(errors.InputError, match=r"vertebrae: found none in 0 scan\(s\), wanted one of L2, L3 in test"):
        data_stages.p1(tiny.config(), tmp_path, ("rec",), dataclasses.replace(given, p1_splits=("test",)))


def test_a_workdir_belongs_to_its_data(phantoms, tmp_path):
    """Other CTs, cases or another patient are another configuration; a run on phantoms keeps the mark that it had."""
    folders = [_layout(tmp_path / name, "challenge", chosen) for name, chosen in (("a", phantoms), ("b", phantoms[:1]))]
    patient = Target(*phantoms[0], 21)
    given = data_stages.RealData()
    changed = (
        *(dataclasses.replace(given, p1_folder=folder) for folder in folders),
        dataclasses.replace(given, p1_folder=folders[0], p1_splits=("test",)),
        dataclasses.replace(given, p2_cases=phantoms[0][1]),
        dataclasses.replace(given, patient=(patient,)),
        dataclasses.replace(given, patient=(dataclasses.replace(patient, label=22),)),
    )
    marks = [str(one.mark()) for one in changed]
    assert given.mark() == [] and len(set(marks)) == len(changed)


def test_the_flags_name_the_data(phantoms):
    _, ct, mask = phantoms[0]
    asked = ["--preset=paper", "--p1_data=D", "--p1_split=training", "--p1_split=test", "--p2_cases=C.json"]
    asked += [f"--ct={ct}", f"--mask={mask}", "--label=L1,L3"]
    code = f"""
import dataclasses, pathlib, sys
from experiments import configs, train
from experiments.data_stages import RealData
from experiments.patients.workdir import Target
def check(config, workdir, stage, given):
    assert config == dataclasses.replace(configs.PAPER, patient_labels=(20, 22)), config
    ct, mask = map(pathlib.Path, {[str(ct), str(mask)]})
    patient = tuple(Target(ct.name, ct, mask, label) for label in (20, 22))
    paths = [pathlib.Path(name) for name in ("D", "C.json")]
    assert given == RealData(paths[0], ("training", "test"), paths[1], "real", patient), given
train.train, sys.argv = check, ["train", *{asked}]
train.command()
"""
    fresh_python.run(code)

"""Training, preparing and registering as a user runs them: the stages, restart after SIGKILL, independence, bad input."""

import contextlib
import dataclasses
import json
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import time

import jax
import nibabel
import numpy as np
import pytest
import tiny

from data_pipelines import cases
from data_pipelines.io import files
from data_pipelines.io import nifti
from data_pipelines.pairs import build
from data_pipelines.pairs.identity import scan_digest
from data_pipelines.phantom import scan_files
from experiments import configs
from experiments import data_stages
from experiments import train
from experiments.localizers import localizer_files
from experiments.localizers import training
from experiments.patients import preparing
from experiments.patients.models import load_model
from experiments.patients.models import model_hash
from experiments.patients.models import save_model
from experiments.patients.workdir import Identity
from experiments.patients.workdir import load
from experiments.patients.workdir import load_localizer
from experiments.patients.workdir import Target
from experiments.reports import statistics
from experiments.reports import tables
from experiments.runtime.kept_programs import kept
from experiments.scoring import conditions
from experiments.scoring import evaluate
from experiments.training import checkpoint
from experiments.training import loop
from radgs_jax import errors
from radgs_jax import gaussians
from radgs_jax.localization import locate
from radgs_jax.localization import network
from radgs_jax.localization.chain import Chain
from radgs_jax.models import radgs_reg
from radgs_jax.models.trained import MEAN_SHAPE
from radgs_jax.models.trained import Model
from radgs_jax.registration import confidence
from radgs_jax.registration import pipeline
from radgs_jax.registration.gauss_newton import RefineConfig
from radgs_jax.registration.search import SearchConfig
from radgs_jax.training import update

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]
RUN = (
    "import sys; sys.path[:0] = ['tests/support', '.']\n"
    "if __name__ == '__main__':\n"
    "    import jax, pathlib, os, tiny\n"
    "    root = os.environ.get('XDG_CACHE_HOME') or pathlib.Path.home() / '.cache'\n"
    "    jax.config.update('jax_compilation_cache_dir', str(pathlib.Path(root) / 'radgs_jax' / 'xla'))\n"
    "    jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.0)\n"
    "    from experiments import train\n"
    "    print(train.train(tiny.config(), sys.argv[1]))\n"
)


def _run(module, *flags, cwd=REPOSITORY):
    return subprocess.run(
        [sys.executable, "-m", f"experiments.{module}", *flags], cwd=cwd, capture_output=True, text=True
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A finished tiny run: (workdir, table)."""
    workdir = tmp_path_factory.mktemp("run")
    return workdir, train.train(tiny.config(), workdir)


@pytest.fixture(scope="module")
def script(tmp_path_factory):
    path = tmp_path_factory.mktemp("script") / "run_tiny.py"
    path.write_text(RUN)
    return path


def test_full_run_leaves_what_it_promises(trained):
    workdir, table = trained
    assert "mean shape" in table and "CT at the start" in table and "capture range" in table and "variant real" in table
    for name in (
        "p1/model/manifest.json",
        "p2/model/manifest.json",
        "eval/table.txt",
        "eval/errors_real.png",
        "eval/results_real.json",
        "tensorboard/p1_rec",
        "checkpoints/p2_joint",
    ):
        assert (workdir / name).exists(), name
    case = next((workdir / "eval" / "real").iterdir())
    assert {p.name for p in case.iterdir()} == {
        "pose.json",
        "pose.tfm",
        "ct_vertebra_in_world.nii.gz",
        "gaussians.npz",
        "reconstruction_in_world.nii.gz",
        "picture.png",
    }
    assert files.read_json(workdir / "eval" / "results_real.json")["format"] == cases.RESULTS_FORMAT


def test_running_again_only_reads(trained):
    workdir, table = trained
    start = time.process_time()  # not wall time, which other programs on the machine stretch
    assert train.train(tiny.config(), workdir) == table
    assert time.process_time() - start < 60


KILL_WHEN = (
    "pairs/p1/*/pairs/*.array_record",
    "checkpoints/p1_joint/step_1",
    "checkpoints/p2_reg/step_2",
    "p3/*/checkpoints/p3_rec/step_2",
    "eval/*.npz",
)


def test_a_run_killed_in_every_stage_goes_on_and_ends_with_the_same_table(trained, script, tmp_path):
    """SIGKILL in the data of P1, in three module stages of three data stages, and in the evaluation; then to the end."""
    workdir = tmp_path / "run"
    command = [sys.executable, str(script), str(workdir)]
    for when in KILL_WHEN:
        process = subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        limit = time.monotonic() + 300
        while not list(workdir.glob(when)) and process.poll() is None and time.monotonic() < limit:
            time.sleep(0.01)
        assert process.poll() is None and list(workdir.glob(when)), when
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert not (workdir / "eval" / "table.txt").exists()
    again = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert (workdir / "eval" / "table.txt").read_text() == trained[1] + "\n"


def test_a_module_stage_alone_starts_from_the_one_before(tmp_path):
    with pytest.raises(errors.InputError, match="stage p1_rec: found not finished"):
        train.train(tiny.config(), tmp_path, "p1_reg")
    with pytest.raises(errors.InputError, match="manifest.json: file: found nothing"):
        train.train(tiny.config(), tmp_path, "p2")


def test_patients_never_meet_between_folds():
    fold = data_stages.folds(["c", "a", "b", "a", "d"], 3)
    assert fold == {"a": 0, "b": 1, "c": 2, "d": 0}


def _case(trained):
    case_file = cases.read(trained[0] / "eval" / "cases.json")
    case = case_file.cases[0]
    scene = case_file.scenes[case.scene]
    volume = case_file.volumes[scene.volume]
    target = Target(volume.patient, volume.full_ct, volume.full_mask, volume.full_label)
    return case_file, case, scene, target


def test_every_case_gets_the_same_answer_alone_shuffled_and_with_rubbish_beside_it(trained, tmp_path):
    """The estimate depends on the X-rays, the cameras, T_init and the prepared vertebra; on nothing else in the file."""
    workdir = trained[0]
    document = files.read_json(workdir / "eval" / "cases.json")
    source = workdir / "eval"
    for volume in document["volumes"].values():
        volume["full_ct"], volume["full_mask"] = (str((source / volume[k]).resolve()) for k in ("full_ct", "full_mask"))
    for scene in document["scenes"]:
        scene["xrays"] = str((source / scene["xrays"]).resolve())
    shuffled = json.loads(json.dumps(document))
    shuffled["cases"] = shuffled["cases"][::-1][:3]
    for volume in shuffled["volumes"].values():
        volume["points"], volume["centre"] = [[1e6, 0, 0]], ["x"]
    for scene in shuffled["scenes"]:
        scene["T_gt"], scene["T_rest"] = "rubbish", [[5]]
    for case in shuffled["cases"]:
        case["bin_mm"], case["init_mtre_mm"], case["init_rot_deg"] = [-1, "y"], None, 1e9
    poses = []
    for name, value in (("all", document), ("some", shuffled)):
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps(value))
        done = _run(
            "register",
            f"--cases={path}",
            "--variant=real",
            f"--workdir={workdir / 'p3'}",
            f"--out={tmp_path / name}",
            "--passes=2",
            "--nopictures",
        )
        assert done.returncode == 0, done.stderr
        poses.append({r["id"]: r["T"] for r in files.read_json(tmp_path / name / "results.json")["results"]})
    assert len(poses[0]) == 10 and len(poses[1]) == 3
    for name, pose in poses[1].items():
        assert poses[0][name] == pose
    reported = {r["id"]: r["T"] for r in files.read_json(workdir / "eval" / "results_real.json")["results"]}
    assert reported == poses[0]


def test_a_case_after_warming_up_compiles_nothing(trained, compilations):
    _, case, scene, target = _case(trained)
    xrays = cases.read_xrays(scene, "artic")
    ready = load(trained[0] / "p3", target, Identity())
    # As it is by default: a refinement that goes on where one has ended is the same program.
    levels = tuple(dataclasses.replace(level, keep=1) for level in ready.refine.levels)
    ready = dataclasses.replace(ready, refine=dataclasses.replace(ready.refine, levels=levels))
    for refine in (True, False):
        options = pipeline.RegisterOptions(2, refine)
        pipeline.warm_up(ready, xrays, options, kept)
        before = len(compilations)
        outcome = pipeline.register(ready, xrays, case.world_from_ct, options, kept)
        assert before and len(compilations) == before and (outcome.refined is not None) == refine


def test_one_pair_of_xrays_by_flags_raw_xrays_and_points(trained, tmp_path):
    """The same case by --ct ..., beside another vertebra, from raw intensities and from clicked points."""
    case_file, case, scene, target = _case(trained)
    xrays = cases.read_xrays(scene, "artic")
    for i, image in enumerate(xray.line_integrals for xray in xrays):
        np.save(tmp_path / f"{i}.npy", image)
        np.save(tmp_path / f"raw{i}.npy", 5000.0 * np.exp(-image.astype(np.float64)))
    files.write_json(tmp_path / "cameras.json", [{"P": v["P"]} for v in case_file.raw["scenes"][0]["views"]])
    files.write_json(tmp_path / "init.json", case.world_from_ct.tolist())
    common = [
        f"--ct={target.ct}",
        f"--mask={target.mask}",
        f"--cameras={tmp_path / 'cameras.json'}",
        f"--workdir={trained[0] / 'p3'}",
        "--passes=2",
    ]
    by_lines = _run(
        "register",
        *common,
        f"--label={target.label},22",
        f"--xrays={tmp_path / '0.npy'},{tmp_path / '1.npy'}",
        f"--init={tmp_path / 'init.json'}",
        f"--out={tmp_path / 'a'}",
    )
    assert by_lines.returncode == 0, by_lines.stderr
    truth = cases.truth(case_file, scene)
    prepared = load(trained[0] / "p3", target, Identity())
    centre = truth @ prepared.vertebra.ct_from_box[:, 3]
    clicks = []
    for view in scene.cameras:
        p = view.camera_from_world @ centre
        clicks.append(
            f"{view.intrinsics[0] * p[0] / p[2] + view.intrinsics[2]},{view.intrinsics[1] * p[1] / p[2] + view.intrinsics[3]}"
        )
    by_points = _run(
        "register",
        *common,
        f"--label={target.label}",
        f"--xrays={tmp_path / 'raw0.npy'},{tmp_path / 'raw1.npy'}",
        "--raw",
        "--air=5000",
        f"--points={';'.join(clicks)}",
        f"--out={tmp_path / 'b'}",
        "--nopictures",
    )
    assert by_points.returncode == 0, by_points.stderr
    found = {n: files.read_json(tmp_path / n / "results.json")["results"] for n in "ab"}
    assert [[r["id"] for r in rows] for rows in found.values()] == [["L2", "L3"], ["case"]]
    a, b = (np.array(rows[0]["T"]) for rows in found.values())
    outcome = pipeline.register(prepared, xrays, case.world_from_ct, pipeline.RegisterOptions(2), kept)
    np.testing.assert_allclose(a, outcome.world_from_ct, atol=1e-2)
    assert np.linalg.norm((b @ prepared.vertebra.ct_from_box[:, 3] - centre)[:3]) < 30

    pose = files.read_json(tmp_path / "a" / "L2" / "pose.json")
    np.testing.assert_allclose(pose["world_from_ct"], a)
    parameters = [float(v) for v in (tmp_path / "a" / "L2" / "pose.tfm").read_text().splitlines()[3].split()[1:]]
    ct_from_world_lps = np.eye(4)
    ct_from_world_lps[:3, :3], ct_from_world_lps[:3, 3] = np.reshape(parameters[:9], (3, 3)), parameters[9:]
    lps = np.diag([-1, -1, 1, 1])
    np.testing.assert_allclose(np.linalg.inv(lps @ ct_from_world_lps @ lps), a, atol=1e-6)
    moved, affine = nifti.read_nifti(tmp_path / "a" / "L2" / "ct_vertebra_in_world.nii.gz")
    index = np.argwhere(moved > 0.01).mean(0)
    np.testing.assert_allclose(
        affine[:3, :3] @ index + affine[:3, 3], (a @ prepared.vertebra.ct_from_box[:, 3])[:3], atol=2.0
    )
    saved = gaussians.from_arrays(dict(np.load(tmp_path / "a" / "L2" / "gaussians.npz")))
    assert saved.mean.shape == (4096, 3)


def _spot(shape, uv, sigma):
    v, u = np.mgrid[: shape[0], : shape[1]]
    return 3.0 * np.exp(-0.5 * ((u - uv[0]) ** 2 + (v - uv[1]) ** 2) / sigma**2)


def _spot_detector(folder, label):
    """A detector of one level, which it takes the one bright spot in an image for; spots of 6 mm, pixels of 3 mm."""
    config = network.DetectorConfig((label,), 3.0, (4, 4, 6, 6), (0, 0, 0, 0), 4)
    rng, count, size = np.random.default_rng(0), 8, 56
    images, centroids = rng.normal(0.0, 0.05, (count, size, size)), np.zeros((count, 29, 2))
    for image, places in zip(images, centroids):
        places[label] = rng.uniform(12, size - 12, 2)
        image += _spot(image.shape, places[label], 2.0)
    known = np.tile(np.arange(29) == label, (count, 1))
    pool = {
        "clean": images,
        "measured": images,
        "valid": np.ones(images.shape, bool),
        "camera_from_world": np.tile(np.eye(4), (count, 1, 1)),
        "centroids": centroids,
        "in_sight": known,
        "known": known,
    }
    schedule = training.TrainConfig(steps=150, batch=8, crop_px=48, learning_rate=1e-2)
    params = training.train(pool, folder, config, schedule)
    chain = Chain(np.zeros(0), np.ones(2), 1.0, 0.0, np.ones(1, bool))
    return locate.Localizer(params, config, chain)


def test_a_vertebra_is_found_and_registered_without_a_start_pose(trained, tmp_path):
    """By the patient's detector, from the X-rays, cameras and the CT alone; what was found is written down."""
    case_file, _, scene, target = _case(trained)
    shutil.copytree(trained[0] / "p3", tmp_path / "w")
    manifest = files.read_json(tmp_path / "w" / "manifest.json")
    files.write_json(tmp_path / "w" / "manifest.json", {**manifest, "detector": "a test's"})
    path = tmp_path / "w" / Identity().scan(target) / "detector.npz"
    localizer_files.save(path, _spot_detector(tmp_path / "state", target.label), "spots")
    truth = cases.truth(case_file, scene)
    centre = truth @ load(tmp_path / "w", target, Identity()).vertebra.ct_from_box[:, 3]
    rng = np.random.default_rng(1)
    for i, view in enumerate(scene.cameras):
        p = view.camera_from_world @ centre
        uv = view.intrinsics[:2] * p[:2] / p[2] + view.intrinsics[2:]
        spot = _spot((view.height, view.width), uv, 6.0 * view.intrinsics[0] / p[2])
        np.save(tmp_path / f"{i}.npy", (spot + rng.normal(0.0, 0.1, spot.shape)).astype(np.float32))
    files.write_json(tmp_path / "cameras.json", [{"P": v["P"]} for v in case_file.raw["scenes"][0]["views"]])
    done = _run(
        "register",
        f"--ct={target.ct}",
        f"--mask={target.mask}",
        f"--label={target.label}",
        f"--cameras={tmp_path / 'cameras.json'}",
        f"--workdir={tmp_path / 'w'}",
        f"--xrays={tmp_path / '0.npy'},{tmp_path / '1.npy'}",
        f"--out={tmp_path / 'out'}",
        "--passes=2",
        "--nopictures",
    )
    assert done.returncode == 0, done.stderr
    assert "start from the X-rays: L2 with probability" in done.stdout and "warning" not in done.stdout
    report = files.read_json(tmp_path / "out" / "detection.json")
    assert np.linalg.norm(report["centre_mm"] - centre[:3]) < 3.0
    start = np.array(report["start_world_from_ct"])
    box = load(tmp_path / "w", target, Identity()).vertebra.ct_from_box
    np.testing.assert_allclose((start @ box[:, 3])[:3], report["centre_mm"], atol=1e-6)
    assert report["adapted"] and len(report["views"]) == 2
    assert files.read_json(tmp_path / "out" / "results.json")["results"][0]["id"] == "case"


def test_a_detector_and_other_label_numbers_are_part_of_a_workdir(trained, tmp_path):
    """A mask in other numbers prepares the same vertebra; a detector comes to it later, once, and is then the one used."""
    target = _case(trained)[3]
    values, affine = nifti.read_nifti(target.mask)
    counted_up = np.array(values)
    for number in (20, 21, 22, 23, 24):
        counted_up[values == number] = 51 - number  # as TotalSegmentator counts: L5 is 27, L1 is 31
    counted_up[values == 26] = 25
    nifti.write_nifti(tmp_path / "labels.nii.gz", counted_up, affine)
    other = dataclasses.replace(target, mask=tmp_path / "labels.nii.gz", labels="totalsegmentator")
    identity, workdir, base = Identity(), tmp_path / "w", trained[0] / "p2" / "model"
    assert identity.scan(target) == scan_digest(target.ct, target.mask)
    digests = [identity.scan(dataclasses.replace(other, labels=name)) for name in (None, "verse", "totalsegmentator")]
    assert len({*digests, identity.scan(target)}) == 4
    preparing.prepare(tiny.config(), workdir, [other], base)
    found = load(workdir, other, identity).vertebra
    np.testing.assert_array_equal(found.density, load(trained[0] / "p3", target, identity).vertebra.density)

    generic = tmp_path / "generic.npz"
    with pytest.raises(errors.InputError, match="wanted --init, --points, or a workdir with a detector"):
        load_localizer(workdir, other, identity, generic)
    config = network.DetectorConfig((20, 21, 22), 3.0, (4, 4, 6, 6), (0, 0, 0, 0), 4)
    params = network.init(config, jax.random.key(0))
    chain = Chain(np.full(2, 30.0), np.full(2, 8.0), 1.0, 0.0, np.ones(3, bool))
    localizer_files.save(generic, locate.Localizer(params, config, chain), "generic")
    assert load_localizer(workdir, other, identity, generic)[1] is False

    schedule = training.TrainConfig(bodies=2, held_out=1, count=1, steps=2, batch=2, crop_px=64)

    def adapt(**changes):
        asked = dict(detector=generic, adapting=schedule)
        preparing.prepare(tiny.config(), workdir, [other], base, **{**asked, **changes})

    before = {p: p.stat().st_mtime_ns for p in workdir.rglob("*") if p.is_file() and p.name != "manifest.json"}
    adapt()
    made = workdir / digests[2] / "detector.npz"
    model, adapted = load_localizer(workdir, other, identity, generic)
    assert adapted and model.levels == (20, 21, 22) and set(model.centres_ct) == {20, 21, 22, 23, 24}
    before[made] = made.stat().st_mtime_ns
    adapt()
    adapt(detector=None)
    assert {p: p.stat().st_mtime_ns for p in before} == before
    with pytest.raises(errors.InputError, match="manifest.json: detector: found"):
        adapt(adapting=dataclasses.replace(schedule, steps=3))
    with pytest.raises(errors.InputError, match="label 24: found L5, wanted one from L1 to L3"):
        preparing.prepare(tiny.config(), workdir, [dataclasses.replace(other, label=24)], base, detector=generic)
    made.unlink()
    with pytest.raises(errors.InputError, match="detector: found an unfinished preparation"):
        load_localizer(workdir, other, identity, generic)


def test_the_shipped_base_fits_the_default_configuration():
    model = load_model(REPOSITORY / "base")
    assert model.config == configs.DEMO.model
    assert set(model.mean_shapes) == {0, *configs.DEMO.labels}


def test_bad_input_is_one_line_status_2_and_no_output(trained, tmp_path):
    _, case, _, target = _case(trained)
    workdir = trained[0] / "p3"
    good = trained[0] / "eval" / "cases.json"
    (tmp_path / "bad.json").write_text("{")
    base = f"--base={trained[0] / 'p2' / 'model'}"
    runs = {
        "unknown flag value": ("train", ["--stage=p9", f"--workdir={tmp_path / 'o'}"], "p9"),
        "unknown flag": ("train", ["--stag=p1", f"--workdir={tmp_path / 'o'}"], "stag"),
        "not json": (
            "register",
            [f"--cases={tmp_path / 'bad.json'}", f"--workdir={workdir}", f"--out={tmp_path / 'o'}"],
            "valid JSON",
        ),
        "variant": (
            "register",
            [f"--cases={good}", "--variant=x", f"--workdir={workdir}", f"--out={tmp_path / 'o'}"],
            "wanted 'x'",
        ),
        "not prepared": (
            "register",
            [f"--cases={good}", f"--workdir={tmp_path}", f"--out={tmp_path / 'o'}"],
            "manifest.json",
        ),
        "label": (
            "prepare",
            [f"--ct={target.ct}", f"--mask={target.mask}", "--label=9", f"--workdir={tmp_path / 'o'}", base],
            "wanted 9 among them",
        ),
        "no base": (
            "prepare",
            [
                f"--ct={target.ct}",
                f"--mask={target.mask}",
                "--label=21",
                f"--workdir={tmp_path / 'o'}",
                f"--base={tmp_path}",
            ],
            "manifest.json",
        ),
        "no detector": (
            "prepare",
            [
                f"--ct={target.ct}",
                f"--mask={target.mask}",
                "--label=21",
                f"--workdir={tmp_path / 'o'}",
                base,
                "--detector",
            ],
            "detector.npz: file: found nothing",
        ),
        "labels of a case file": (
            "register",
            [f"--cases={good}", "--labels=verse", f"--workdir={workdir}", f"--out={tmp_path / 'o'}"],
            "wanted it with --ct only",
        ),
    }
    processes = {
        name: subprocess.Popen(
            [sys.executable, "-m", f"experiments.{module}", *flags],
            cwd=REPOSITORY,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for name, (module, flags, _) in runs.items()
    }
    for name, process in processes.items():
        out, error = process.communicate()
        lines = [line for line in error.splitlines() if line.startswith("error: ")]
        assert process.returncode == 2, (name, error)
        assert len(lines) == 1 and error.splitlines()[-1] == lines[0] and runs[name][2] in lines[0], (name, error)
        assert "Traceback" not in out + error
    assert not (tmp_path / "o").exists()
    assert not list(tmp_path.glob(".*partial"))


def test_a_prepared_workdir_is_reused_only_for_the_same_inputs(trained):
    _, _, _, target = _case(trained)
    base = trained[0] / "p2" / "model"
    targets = [dataclasses.replace(target, label=label) for label in (21, 22)]
    before = (trained[0] / "p3" / "manifest.json").read_text()
    preparing.prepare(tiny.config(), trained[0] / "p3", targets, base)  # the same: nothing to do
    for changed, field in (
        (dict(seed=3), "config"),
        (dict(p3=dataclasses.replace(tiny.config().p3, pairs=3)), "config"),
    ):
        with pytest.raises(errors.InputError, match=f"manifest.json: {field}: found"):
            preparing.prepare(tiny.config(**changed), trained[0] / "p3", targets, base)
    with pytest.raises(errors.InputError, match="base: found"):
        preparing.prepare(tiny.config(), trained[0] / "p3", targets, trained[0] / "p1" / "model")
    with pytest.raises(errors.InputError, match="scans: found"):
        preparing.prepare(tiny.config(), trained[0] / "p3", targets[:1], base)
    # How poses are refined and judged is no part of what was trained: it may be exchanged.
    fitted_for = confidence.method_digest(tiny.config().refine, SearchConfig())
    rule = confidence.AcceptanceRule((0.0,) * 8, (0.5,) * 3, (0.0,) * 5, 2.0, fitted_for)
    preparing.prepare(tiny.config(), trained[0] / "p3", targets, base, rule=rule)
    assert load(trained[0] / "p3", target, Identity()).rule == rule
    # But a rule that was fitted to other refinements says nothing of these.
    others = dataclasses.replace(rule, fitted_for=confidence.method_digest(RefineConfig(), SearchConfig()))
    preparing.prepare(tiny.config(), trained[0] / "p3", targets, base, rule=others)
    with pytest.raises(errors.InputError, match="calibration.json: fitted_for: found"):
        load(trained[0] / "p3", target, Identity())
    preparing.prepare(tiny.config(), trained[0] / "p3", targets, base)
    assert load(trained[0] / "p3", target, Identity()).rule is None
    assert (trained[0] / "p3" / "manifest.json").read_text() == before


def test_a_damaged_workdir_is_one_clear_line(trained, tmp_path):
    target, identity = _case(trained)[3], Identity()
    digest = identity.scan(target)
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
            lambda: load(tmp_path, target, identity),
            lambda: preparing.prepare(tiny.config(), tmp_path, [target], trained[0] / "p2" / "model"),
        ):
            with pytest.raises(errors.InputError, match=f"manifest.json: {line}"):
                use()
    files.write_json(tmp_path / "manifest.json", good)
    load(tmp_path, target, identity)
    path = tmp_path / digest / f"vertebra_{target.label}.npz"
    files.write_npz(path, **{**np.load(path), "fine_format": np.asarray("radgs-gaussians/0")})
    with pytest.raises(
        errors.InputError, match="npz: fine_format: found 'radgs-gaussians/0', wanted 'radgs-gaussians/1'"
    ):
        load(tmp_path, target, identity)


def test_a_case_file_without_points_is_refused_before_it_is_scored(trained):
    case_file = cases.read(trained[0] / "eval" / "cases.json")
    name, volume = next(iter(case_file.raw["volumes"].items()))
    del volume["points"]
    with pytest.raises(errors.InputError, match=f"cases.json: volumes.{name}.points: found None, wanted a list"):
        evaluate.evaluate(case_file, "real", trained[0] / "p3", 1)


def test_a_simulated_variant_that_is_none_is_refused(trained, tmp_path):
    shutil.copytree(trained[0] / "p1" / "model", tmp_path / "p1" / "model")
    with pytest.raises(
        errors.InputError, match="flags: --p2_variant: found 'hard', wanted one of easy, full, artic, real"
    ):
        train.train(tiny.config(), tmp_path, "p2", variant="hard")


def test_a_minutes_budget_fixes_its_schedule_once(trained, tmp_path):
    target = _case(trained)[3]
    # The tiny configuration saves at every step, which would take longer than the budget's many steps.
    config = tiny.config(checkpoint_seconds=60.0)
    preparing.prepare(config, tmp_path / "w", [target], trained[0] / "p2" / "model", minutes=0.1)
    plans = sorted((tmp_path / "w").rglob("plan.json"))
    assert len(plans) == 3 and all(files.read_json(p)["steps"] >= 1 for p in plans)


def test_a_stage_does_not_go_on_with_other_pairs(trained, tmp_path):
    """A checkpoint's place in the data is one in its own pairs only."""
    config = tiny.config()
    vertebrae = [(*scan_files.phantoms(trained[0] / "scans", [10000], config.phantom)[0], 21)]
    params = load_model(trained[0] / "p1" / "model").params
    made = [build.simulated_pairs(tmp_path / "pairs", vertebrae, 2, seed, config.pairs, 64) for seed in (1, 2)]
    loop.run(config, tmp_path, "p1", made[0], params, (2, 0, 0), 1e-3, ("rec",))
    with pytest.raises(errors.InputError, match="loader state: store: found"):
        loop.run(config, tmp_path, "p1", made[1], params, (4, 0, 0), 1e-3, ("rec",))
    longer = loop.run(config, tmp_path, "p1", made[0], params, (4, 0, 0), 1e-3, ("rec",))
    assert checkpoint.latest(tmp_path / "checkpoints" / "p1_rec") == 4
    place = checkpoint.load_state(tmp_path / "checkpoints" / "p1_rec", update.init_state(longer, "rec"))[2]
    assert place["step"] == 4


HOST = """
import contextlib, hashlib, json, sys
sys.path[:0] = ['tests/support', '.']
import jax
port, rank, folder, *scan = sys.argv[1:]
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(f"localhost:{port}", 2, int(rank))
import numpy as np, tiny
from data_pipelines.pairs import build
from experiments.patients import models
from experiments.training import loop
from radgs_jax.models import radgs_reg, trained
config = tiny.config()
made = build.simulated_pairs(folder + "/pairs", [(*scan, 21), (*scan, 22)], 3, 1, config.pairs, 64)
params = jax.device_get(jax.jit(lambda key: radgs_reg.init(config.model, key))(jax.random.key(0)))
for steps in (2, 4):
    params = loop.run(config, folder, "p1", made, params, (0, steps, 0), 1e-3, ("reg",))
with contextlib.closing(made.batches(0, 4)) as batches:
    mine = next(batches).world_from_box[:, 0, 3].tolist()
leaves = [np.asarray(x.addressable_data(0)).tobytes() for x in jax.tree.leaves(params)]
model = trained.Model(jax.device_get(params), config.model, made.mean_shapes())
for note in ("first", "in its place"):
    models.save_model(folder + "/model", model, note)
digests = [models.model_hash(m) for m in (model, models.load_model(folder + "/model"))]
print(json.dumps([made.source.identity(), hashlib.sha256(b"".join(leaves)).hexdigest(), mine, digests]))
"""


def test_a_study_goes_on_from_what_it_has_registered(trained, tmp_path):
    _, _, _, target = _case(trained)
    patient = conditions.Patient(target.ct, target.mask, [21], trained[0] / "p3")
    condition = conditions.Condition("cameras", "off", "real", shift_mm=1.0, mask="dilated 1 mm", every_start=True)
    rows = conditions.run(patient, condition, 1, 3, tmp_path, 2)
    assert [5 * i <= row["start_mm"] < 5 * (i + 1) for i, row in enumerate(rows)] == [True] * 5
    assert all(np.isfinite(row["error_mm"]) and row["accepted"] is None for row in rows)
    lines = statistics.by_start(rows, configs.STARTS_MM)
    assert len(lines) == 7 and lines[-1].startswith("1 scenes; 95 % interval of the median")
    patient.with_mask = None  # nothing is registered again
    assert conditions.run(patient, condition, 1, 3, tmp_path, 2) == rows


@pytest.mark.slow
def test_two_jax_processes_share_pairs_batches_and_a_training_stage(tmp_path):
    """One store made by both, halves of one batch, the same parameters after a stage that was stopped half-way, one model."""
    scan = scan_files.phantoms(tmp_path / "scans", [7], tiny.config().phantom)[0]
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-c", HOST, str(port)]
    hosts = [
        subprocess.Popen([*command, str(rank), str(tmp_path), *map(str, scan)], cwd=REPOSITORY, stdout=subprocess.PIPE)
        for rank in range(2)
    ]
    stores, params, rows, models = zip(
        *(json.loads(host.communicate(timeout=300)[0].splitlines()[-1]) for host in hosts)
    )
    alone = build.simulated_pairs(tmp_path / "alone", [(*scan, 21), (*scan, 22)], 3, 1, tiny.config().pairs, 64)
    assert set(stores) == {alone.source.identity()} and params[0] == params[1]
    with contextlib.closing(alone.batches(0, 4)) as batches:
        whole = next(batches).world_from_box[:, 0, 3].tolist()
    assert [rows[0], rows[1]] == [whole[0::2], whole[1::2]]
    assert {digest for pair in models for digest in pair} == {model_hash(load_model(tmp_path / "model"))}
    assert files.read_json(tmp_path / "model" / "manifest.json")["note"] == "in its place"
    assert not list(tmp_path.glob(".*partial"))


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


def test_table_bins_and_baselines():
    scores = {"start_mm": np.array([1.0, 7.0, 8.0]), "error_mm": np.array([0.5, 1.0, 3.0]), "volumes": {}}
    text = tables.table(scores, "real")
    assert "0-5" in text and "5-10" in text and "capture range: 5 mm" in text and "50.0 %" in text


def test_volumes_with_nan_are_refused_before_anything_is_written(trained, tmp_path):
    target = _case(trained)[3]
    image = nibabel.load(target.ct)
    hu = np.asarray(image.dataobj).astype(np.float32)
    hu[0, 0, 0] = np.nan
    nifti.write_nifti(tmp_path / "nan.nii.gz", hu, image.affine)
    done = _run(
        "prepare",
        f"--ct={tmp_path / 'nan.nii.gz'}",
        f"--mask={target.mask}",
        "--label=21",
        f"--workdir={tmp_path / 'o'}",
        f"--base={trained[0] / 'p2' / 'model'}",
    )
    assert done.returncode == 2 and "1 not finite" in done.stderr.splitlines()[-1]
    assert not (tmp_path / "o").exists()

"""The register command: independence of other cases, one acquisition by flags, start poses, bad input."""

import dataclasses
import json
import pathlib
import shutil
import subprocess
import sys
import time

import jax
import nominal_views
import numpy as np
import pytest

from data_pipelines import cases
from data_pipelines.io import checksums
from data_pipelines.io import files
from data_pipelines.io import nifti
from experiments.localizers import localizer_files
from experiments.localizers import training
from experiments.patients import registering
from experiments.patients.workdir import load
from experiments.patients.workdir import ScanDigests
from experiments.patients.workdir import seal
from experiments.runtime import kept_programs
from experiments.runtime.kept_programs import kept
from radgs_jax import gaussians
from radgs_jax import metrics
from radgs_jax.geometry import rigid_host
from radgs_jax.localization import locate
from radgs_jax.localization import network
from radgs_jax.localization.chain import Chain
from radgs_jax.registration import confidence
from radgs_jax.registration import pipeline
from radgs_jax.registration.programs import programs_of

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]


@pytest.mark.long
def test_every_case_gets_the_same_answer_alone_shuffled_and_with_malformed_entries_around_it(
    trained, tmp_path, run_command
):
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
        done = run_command(
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


def test_a_case_after_warming_up_compiles_nothing(trained, compilations, first_case):
    _, case, scene, target = first_case
    xrays = cases.read_xrays(scene, "artic")
    ready = load(trained[0] / "p3", target, ScanDigests())
    # As by default: a refinement that continues another is then the same program.
    levels = tuple(dataclasses.replace(level, keep=1) for level in ready.refine.levels)
    ready = dataclasses.replace(ready, refine=dataclasses.replace(ready.refine, levels=levels))
    for refine in (True, False):
        options = pipeline.RegisterOptions(2, refine)
        pipeline.warm_up(ready, xrays, options, kept)
        before = len(compilations)
        outcome = pipeline.register(ready, xrays, case.world_from_ct, options, kept)
        assert before and len(compilations) == before and (outcome.refined is not None) == refine


def test_a_refused_case_does_not_pay_for_the_programs_of_its_wider_searches(trained, first_case, tmp_path, monkeypatch):
    """Each compilation is made half a second longer; a case that no rule would accept needs one after warming up."""
    _, case, scene, target = first_case
    ready = load(trained[0] / "p3", target, ScanDigests())
    fitted_for = confidence.method_digest(ready.refine, ready.search)
    refusing = confidence.AcceptanceRule((0.0,) * 9, (2.0,) * 2, (0.0,) * 2, 2.0, fitted_for)
    ready = dataclasses.replace(ready, rule=refusing)
    compile, spent, longer, compiled = jax.stages.Lowered.compile, [], 0.5, []

    def slow(self, *args, **options):
        time.sleep(longer)
        if kept_programs._watch.get() is not None:
            compiled.append(1)
        return compile(self, *args, **options)

    def timed(*args, real=pipeline.register):
        start = time.perf_counter()
        outcome = real(*args)
        spent.append(time.perf_counter() - start)
        return outcome

    # Another test may have loaded the programs of wider searches in this process.
    programs_of.cache_clear()
    monkeypatch.setattr(jax.stages.Lowered, "compile", slow)
    monkeypatch.setattr(pipeline, "register", timed)
    row = registering.Row(case.name, target, cases.read_xrays(scene, "artic"), case.world_from_ct)
    options = pipeline.RegisterOptions(2)
    results = registering.register_rows([row], lambda target: ready, tmp_path / "out", options, pictures=False).results
    assert results[0]["accepted"] is False and compiled
    assert 0.0 < results[0]["runtime_s"] <= spent[0] - longer * len(compiled)
    assert files.read_json(tmp_path / "out" / "results.json")["results"][0]["runtime_s"] == results[0]["runtime_s"]


def test_one_pair_of_xrays_by_flags_raw_xrays_and_points(trained, tmp_path, first_case, run_command):
    """The same case by --ct ..., together with another vertebra, from raw intensities and from clicked points."""
    case_file, case, scene, target = first_case
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
    by_lines = run_command(
        "register",
        *common,
        f"--label={target.label},22",
        f"--xrays={tmp_path / '0.npy'},{tmp_path / '1.npy'}",
        f"--init={tmp_path / 'init.json'}",
        "--reconstruct",
        f"--out={tmp_path / 'a'}",
    )
    assert by_lines.returncode == 0, by_lines.stderr
    truth = cases.truth(case_file, scene)
    prepared = load(trained[0] / "p3", target, ScanDigests())
    centre = truth @ prepared.vertebra.ct_from_box[:, 3]
    clicks = []
    for view in scene.cameras:
        p = view.camera_from_world @ centre
        clicks.append(
            f"{view.intrinsics[0] * p[0] / p[2] + view.intrinsics[2]},{view.intrinsics[1] * p[1] / p[2] + view.intrinsics[3]}"
        )
    by_points = run_command(
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


def test_dicom_without_cameras_has_nominal_ones_that_are_corrected(trained, tmp_path, first_case, run_command):
    _, case, scene, target = first_case
    rng = np.random.default_rng(0)
    for index, xray in enumerate(cases.read_xrays(scene, "artic")):
        (tmp_path / f"{index}.dcm").write_bytes(nominal_views.xa(xray, rng, 0.5, 2.0))
    files.write_json(tmp_path / "init.json", case.world_from_ct.tolist())
    command = [
        *(f"--ct={target.ct}", f"--mask={target.mask}", f"--label={target.label}", f"--init={tmp_path / 'init.json'}"),
        *(f"--xrays={tmp_path / '0.dcm'},{tmp_path / '1.dcm'}", f"--air={nominal_views.AIR:g}", "--nopictures"),
        *(f"--workdir={trained[0] / 'p3'}", "--passes=1"),
    ]
    done = run_command("register", *command, f"--out={tmp_path / 'nominal'}")
    assert done.returncode == 0 and "DICOM's nominal ones, taken to be off by about 5 mm" in done.stderr, done.stderr
    (result,) = files.read_json(tmp_path / "nominal" / "results.json")["results"]
    assert np.shape(result["camera_motions"]) == (2, 4, 4)
    assert files.read_json(tmp_path / "nominal" / "run.json")["warnings"]
    done = run_command("register", *command, "--camera_sd=0,0", f"--out={tmp_path / 'trusted'}")
    assert done.returncode == 0, done.stderr
    assert "camera_motions" not in files.read_json(tmp_path / "trusted" / "results.json")["results"][0]


def test_every_vertebra_that_the_xrays_show_without_a_workdir(tmp_path, first_case, run_command):
    """With the shipped network, from the CT alone; by the network's first pass, since this is about what is registered."""
    _, case, scene, target = first_case
    for i, xray in enumerate(cases.read_xrays(scene, "artic")):
        np.save(tmp_path / f"{i}.npy", xray.line_integrals)
    # As if the images ended some levels above the vertebra.
    intrinsics = [view.intrinsics - np.array([0, 0, 0, 0.35 * view.height]) for view in scene.cameras]
    cameras = [
        {"K": [[k[0], 0, k[2]], [0, k[1], k[3]], [0, 0, 1]], "E": view.camera_from_world.tolist()}
        for k, view in zip(intrinsics, scene.cameras)
    ]
    files.write_json(tmp_path / "cameras.json", [{k: np.array(v).tolist() for k, v in c.items()} for c in cameras])
    files.write_json(tmp_path / "init.json", case.world_from_ct.tolist())
    command = [
        *(f"--ct={target.ct}", f"--mask={target.mask}", "--label=all", f"--cameras={tmp_path / 'cameras.json'}"),
        *(f"--xrays={tmp_path / '0.npy'},{tmp_path / '1.npy'}", "--norefine", "--passes=1", "--nopictures"),
    ]
    done = run_command("register", *command, f"--init={tmp_path / 'init.json'}", f"--out={tmp_path / 'out'}")
    assert done.returncode == 0, done.stderr
    found = [one["id"] for one in files.read_json(tmp_path / "out" / "results.json")["results"]]
    left_out = [line for line in done.stderr.splitlines() if "an X-ray shows less than half of it: left out" in line]
    assert "L2" in found and left_out and not any(f"{name}: an X-ray" in line for name in found for line in left_out)
    assert not (tmp_path / "out" / "detection.json").exists()


def test_a_vertebra_is_found_by_its_body_without_a_start_pose_or_a_workdir(tmp_path, first_case, run_command):
    """The cameras' world is 90 mm away from the case's, which nothing tells the command."""
    case_file, _, scene, target = first_case
    for i, xray in enumerate(cases.read_xrays(scene, "artic")):
        np.save(tmp_path / f"{i}.npy", xray.line_integrals)
    shift = rigid_host.matrix([0.0, 0.0, 0.0], (60.0, -60.0, 30.0))
    views = [(view.intrinsics, view.camera_from_world @ np.linalg.inv(shift)) for view in scene.cameras]
    cameras = [{"K": [[k[0], 0, k[2]], [0, k[1], k[3]], [0, 0, 1]], "E": E.tolist()} for k, E in views]
    files.write_json(tmp_path / "cameras.json", cameras)
    command = [
        *(f"--ct={target.ct}", f"--mask={target.mask}", f"--cameras={tmp_path / 'cameras.json'}", "--nopictures"),
        f"--xrays={tmp_path / '0.npy'},{tmp_path / '1.npy'}",
    ]
    done = run_command("register", *command, f"--label={target.label}", f"--out={tmp_path / 'out'}")
    assert done.returncode == 0 and "start from the whole body" in done.stdout, done.stderr
    (found,) = files.read_json(tmp_path / "out" / "results.json")["results"]
    truth = shift @ cases.truth(case_file, scene)
    assert metrics.mtre(cases.points(case_file, scene.volume), np.array(found["T"]), truth) < 1.0
    report = files.read_json(tmp_path / "out" / "detection.json")
    np.testing.assert_allclose(np.array(report["start_world_from_ct"])[:3, 3], truth[:3, 3], atol=40.0)
    bone = run_command("register", *command, "--bone", "--label=1", f"--out={tmp_path / 'bone'}")
    assert bone.returncode == 2 and len(bone.stderr.strip().splitlines()) == 1
    # With K in mm, no search is begun.
    in_mm = [{"K": (np.diag([0.25, 0.25, 1.0]) @ one["K"]).tolist(), "E": one["E"]} for one in cameras]
    files.write_json(tmp_path / "cameras.json", in_mm)
    wrong = run_command("register", *command, f"--label={target.label}", f"--out={tmp_path / 'wrong'}")
    (line,) = wrong.stderr.strip().splitlines()
    assert wrong.returncode == 2 and "cameras.json: view 1: K: found " in line and "experiments.cameras" in line


def _spot(shape, uv, sigma):
    v, u = np.mgrid[: shape[0], : shape[1]]
    return 3.0 * np.exp(-0.5 * ((u - uv[0]) ** 2 + (v - uv[1]) ** 2) / sigma**2)


def _spot_localizer(folder, label):
    """A localizer of one level, trained to find the one bright spot in an image; spots of 6 mm, pixels of 3 mm."""
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
    schedule = training.LocalizerTraining(steps=150, batch=8, crop_px=48, learning_rate=1e-2)
    params = training.train_localizer(pool, folder, config, schedule)
    chain = Chain(np.zeros(0), np.ones(2), 1.0, 0.0, np.ones(1, bool))
    return locate.Localizer(params, config, chain)


def test_a_vertebra_is_found_and_registered_without_a_start_pose(trained, tmp_path, first_case, run_command):
    """By the patient's localizer, from the X-rays, cameras and the CT alone; its report is written."""
    case_file, _, scene, target = first_case
    shutil.copytree(trained[0] / "p3", tmp_path / "w")
    claimed = {**files.read_json(tmp_path / "w" / "manifest.json"), "detector": "a test's"}
    files.write_json(tmp_path / "w" / "manifest.json", checksums.sealed(claimed))
    path = tmp_path / "w" / ScanDigests().of(target) / "detector.npz"
    localizer_files.write_localizer(path, _spot_localizer(tmp_path / "state", target.label), "spots")
    seal(tmp_path / "w", [path.relative_to(tmp_path / "w").as_posix()])
    truth = cases.truth(case_file, scene)
    centre = truth @ load(tmp_path / "w", target, ScanDigests()).vertebra.ct_from_box[:, 3]
    rng = np.random.default_rng(1)
    for i, view in enumerate(scene.cameras):
        p = view.camera_from_world @ centre
        uv = view.intrinsics[:2] * p[:2] / p[2] + view.intrinsics[2:]
        spot = _spot((view.height, view.width), uv, 6.0 * view.intrinsics[0] / p[2])
        np.save(tmp_path / f"{i}.npy", (spot + rng.normal(0.0, 0.1, spot.shape)).astype(np.float32))
    files.write_json(tmp_path / "cameras.json", [{"P": v["P"]} for v in case_file.raw["scenes"][0]["views"]])
    done = run_command(
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
    assert "start from the X-rays: L2 with probability" in done.stdout and "warning" not in done.stderr
    report = files.read_json(tmp_path / "out" / "detection.json")
    assert np.linalg.norm(report["centre_mm"] - centre[:3]) < 3.0
    start = np.array(report["start_world_from_ct"])
    box = load(tmp_path / "w", target, ScanDigests()).vertebra.ct_from_box
    np.testing.assert_allclose((start @ box[:, 3])[:3], report["centre_mm"], atol=1e-6)
    assert report["adapted"] and len(report["views"]) == 2
    assert files.read_json(tmp_path / "out" / "results.json")["results"][0]["id"] == "case"


def test_bad_input_is_one_line_status_2_and_no_output(trained, tmp_path, first_case):
    _, case, _, target = first_case
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
            "wanted T2 among them",
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

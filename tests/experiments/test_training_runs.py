"""Training as a user runs it: all stages, a restart after SIGKILL, one stage alone, two processes."""

import contextlib
import json
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import time

import pytest
import tiny

from data_pipelines import cases
from data_pipelines.io import files
from data_pipelines.pairs import build
from data_pipelines.pairs import identity
from data_pipelines.phantom import scan_files
from experiments import data_stages
from experiments import train
from experiments.patients.models import load_model
from experiments.patients.models import model_hash
from experiments.training import checkpoint
from experiments.training import loop
from radgs_jax import errors
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
        "report.html",
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
        "report.html",
        "network.png",
    }
    assert files.read_json(workdir / "eval" / "results_real.json")["format"] == cases.RESULTS_FORMAT
    page = (workdir / "report.html").read_text()
    assert page.count('<th scope="row">p') == 9 and page.count("3 of 3") == 9 and "9 phases are finished" in page
    assert "CT at the start" in page and page.count("data:image/webp;base64,") >= 4


def test_running_again_only_reads(trained, monkeypatch):
    workdir, table = trained
    monkeypatch.setattr(train.evaluate, "report", lambda *_, **__: pytest.fail("scored again"))

    def made():
        """When each file of pairs, checkpoints and logs was written."""
        found = [path for name in ("pairs", "checkpoints", "tensorboard") for path in workdir.glob(f"**/{name}/**/*")]
        return {path: path.stat().st_mtime_ns for path in found if path.is_file() and "lock" not in path.name}

    before = made()
    assert train.train(tiny.config(), workdir) == table
    assert len(before) > 20 and made() == before


KILL_WHEN = (
    "pairs/p1/*/pairs/*.array_record",
    "checkpoints/p1_joint/step_1",
    "checkpoints/p2_reg/step_2",
    "p3/*/checkpoints/p3_rec/step_2",
    "eval/*.npz",
)


@pytest.mark.chaos
def test_a_run_killed_in_every_stage_goes_on_and_ends_with_the_same_table(trained, script, tmp_path):
    """SIGKILL in the data of P1, in three phases of three data stages, and in the evaluation; then to the end."""
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


def test_a_phase_alone_starts_from_the_one_before(tmp_path):
    with pytest.raises(errors.InputError, match="stage p1_rec: found not finished"):
        train.train(tiny.config(), tmp_path, "p1_reg")
    with pytest.raises(errors.InputError, match="manifest.json: file: found nothing"):
        train.train(tiny.config(), tmp_path, "p2")


def test_patients_never_meet_between_folds():
    fold = data_stages.folds(["c", "a", "b", "a", "d"], 3)
    assert fold == {"a": 0, "b": 1, "c": 2, "d": 0}


def test_a_simulated_variant_that_is_none_is_refused(trained, tmp_path):
    shutil.copytree(trained[0] / "p1" / "model", tmp_path / "p1" / "model")
    with pytest.raises(
        errors.InputError, match="flags: --p2_variant: found 'hard', wanted one of easy, full, artic, real"
    ):
        train.train(tiny.config(), tmp_path, "p2", data_stages.RealData(p2_variant="hard"))


def test_a_stage_does_not_go_on_with_other_pairs(trained, tmp_path):
    """A checkpoint's place in the data is one in its own pairs only."""
    config = tiny.config()
    vertebrae = [(identity.FileScan(*scan_files.phantoms(trained[0] / "scans", [10000], config.phantom)[0]), 21)]
    params = load_model(trained[0] / "p1" / "model").params
    made = [build.simulated_pairs(tmp_path / "pairs", vertebrae, 2, seed, config.pairs, 64) for seed in (1, 2)]
    loop.run_phases(config, tmp_path, "p1", made[0], params, (2, 0, 0), 1e-3, ("rec",))
    with pytest.raises(errors.InputError, match="loader state: store: found"):
        loop.run_phases(config, tmp_path, "p1", made[1], params, (4, 0, 0), 1e-3, ("rec",))
    longer = loop.run_phases(config, tmp_path, "p1", made[0], params, (4, 0, 0), 1e-3, ("rec",))
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
from data_pipelines.pairs import build, identity
from experiments.patients import models
from experiments.training import loop
from radgs_jax.models import radgs_reg, trained
config, scan = tiny.config(), identity.FileScan(*scan)
made = build.simulated_pairs(folder + "/pairs", [(scan, 21), (scan, 22)], 3, 1, config.pairs, 64)
params = jax.device_get(jax.jit(lambda key: radgs_reg.init(config.model, key))(jax.random.key(0)))
for steps in (2, 4):
    params = loop.run_phases(config, folder, "p1", made, params, (0, steps, 0), 1e-3, ("reg",))
with contextlib.closing(made.batches(0, 4)) as batches:
    mine = next(batches).world_from_box[:, 0, 3].tolist()
leaves = [np.asarray(x.addressable_data(0)).tobytes() for x in jax.tree.leaves(params)]
model = trained.Model(jax.device_get(params), config.model, made.mean_shapes())
for note in ("first", "in its place"):
    models.save_model(folder + "/model", model, note)
digests = [models.model_hash(m) for m in (model, models.load_model(folder + "/model"))]
print(json.dumps([made.source.digest(), hashlib.sha256(b"".join(leaves)).hexdigest(), mine, digests]))
"""


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
    parts = [(identity.FileScan(*scan), label) for label in (21, 22)]
    alone = build.simulated_pairs(tmp_path / "alone", parts, 3, 1, tiny.config().pairs, 64)
    assert set(stores) == {alone.source.digest()} and params[0] == params[1]
    with contextlib.closing(alone.batches(0, 4)) as batches:
        whole = next(batches).world_from_box[:, 0, 3].tolist()
    assert [rows[0], rows[1]] == [whole[:2], whole[2:]]
    assert {digest for pair in models for digest in pair} == {model_hash(load_model(tmp_path / "model"))}
    assert files.read_json(tmp_path / "model" / "manifest.json")["note"] == "in its place"
    assert not list(tmp_path.glob(".*partial"))

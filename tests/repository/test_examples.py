"""The examples run from top to bottom and do what they say."""

import os
import pathlib
import re
import subprocess
import sys

import jax
import nbclient
import nbformat
import pytest

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]
EXAMPLES = REPOSITORY / "examples"


def _printed(name):
    """What a notebook prints when it is run, where Jupyter opens it."""
    notebook = nbformat.read(EXAMPLES / name, as_version=4)
    # Jupyter starts in the notebook's folder; the package is installed there, or on the path.
    client = nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": EXAMPLES}})
    cache = {"JAX_COMPILATION_CACHE_DIR": cache} if (cache := jax.config.jax_compilation_cache_dir) else {}
    client.execute(env={**os.environ, "PYTHONPATH": str(REPOSITORY), **cache})
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    return "".join(output.get("text", "") for output in outputs)


def _numbers(pattern, text):
    return [float(number) for number in re.search(pattern, text).groups()]


@pytest.mark.docs
def test_notebook_registers_and_refuses():
    text = _printed("first_registration.ipynb")
    before, after = _numbers(r"mTRE ([\d.]+) -> ([\d.]+) mm", text)
    assert before > 5 and after < 0.1
    assert "\naccepted: True" in text and "with a wrong camera, accepted: False" in text


@pytest.mark.docs
def test_notebook_composes_a_loss_and_registers():
    before, after = _numbers(r"pose error ([\d.]+) -> ([\d.]+) mm", _printed("compose_a_loss.ipynb"))
    assert before > 5 and after < 0.5


@pytest.mark.docs
def test_notebook_renders_gaussians_whose_gradients_are_right():
    text = _printed("render_gaussians.ipynb")
    assert _numbers(r"largest difference (\S+)", text)[0] < 1e-2
    assert abs(_numbers(r"closed form [\d.]+: ([\d.]+)", text)[0] - 1) < 0.02


@pytest.mark.docs  # a minute of compiling
def test_notebook_trains_a_backbone_of_its_own():
    text = _printed("new_backbone.ipynb")
    before, after = _numbers(r"loss ([-\d.]+) -> ([-\d.]+)", text)
    assert after < before and _numbers(r"encoder's parameters (\S+)", text)[0] > 0


@pytest.mark.docs  # a minute of compiling
def test_notebook_trains_on_two_devices_as_on_one():
    text = _printed("two_devices.ipynb")
    differences = _numbers(r"'data:2': '(\S+)', 'fsdp:2': '(\S+)'", text)
    assert max(differences) < 1e-3
    halves, whole = (re.search(rf"{name}: of \S.*hold \[(.*)\]", text)[1] for name in ("fsdp:2", "data:2"))
    assert halves != whole


@pytest.mark.docs
def test_the_script_registers_a_vertebra_from_arrays(tmp_path):
    done = subprocess.run(
        [sys.executable, EXAMPLES / "register_arrays.py"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    before, after = map(float, re.search(r"mTRE ([\d.]+) -> ([\d.]+) mm", done.stdout).groups())
    assert before > 5 and after < 0.1 and "accepted: True" in done.stdout

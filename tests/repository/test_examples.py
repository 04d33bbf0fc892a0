"""The examples run from top to bottom and do what they say."""

import os
import pathlib
import re
import subprocess
import sys

import nbclient
import nbformat

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]


def test_notebook_composes_a_loss_and_registers():
    notebook = nbformat.read(REPOSITORY / "examples" / "compose_a_loss.ipynb", as_version=4)
    client = nbclient.NotebookClient(
        notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": REPOSITORY}}
    )
    client.execute()
    outputs = [o for cell in notebook.cells if cell.cell_type == "code" for o in cell.outputs]
    text = "".join(o.get("text", "") for o in outputs)
    before, after = map(float, re.search(r"pose error ([\d.]+) -> ([\d.]+) mm", text).groups())
    assert before > 5 and after < 0.5
    assert any("image/png" in o.get("data", {}) for o in outputs)


def test_the_script_registers_a_vertebra_from_arrays(tmp_path):
    done = subprocess.run(
        [sys.executable, REPOSITORY / "examples" / "register_arrays.py"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    before, after = map(float, re.search(r"mTRE ([\d.]+) -> ([\d.]+) mm", done.stdout).groups())
    assert before > 5 and after < 0.1 and "accepted: True" in done.stdout

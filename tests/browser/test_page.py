"""The local page in a headless Chromium: `make test-browser`. Screenshots of each step go to PAGE_SHOTS, where that is a folder."""

import json
import os
import pathlib
import shutil
import subprocess
import sys
import urllib.parse

import page_files
import pytest

pytest.importorskip("uvicorn", reason="the extra `serve` is not installed")
pytestmark = pytest.mark.browser
HERE = pathlib.Path(__file__).parent
STARTED_S, WORKED_S = 120, 240


@pytest.fixture
def address(tmp_path):
    """The page's address, of a server that was started in the folder `tmp_path / "start"`."""
    command = [sys.executable, "-m", "experiments.serve", f"--workdir={tmp_path / 'work'}"]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")]),
    }
    (tmp_path / "start").mkdir()
    process = subprocess.Popen(command, cwd=tmp_path / "start", env=environment, stdout=subprocess.PIPE, text=True)
    try:
        line = process.stdout.readline()
        assert line.startswith("open http://127.0.0.1:"), line
        yield line.removeprefix("open ").strip()
    finally:
        process.terminate()
        process.wait(STARTED_S)
    assert process.returncode == 0


def _seen(arguments):
    """What page.mjs saw. Skips where there is no browser."""
    node = shutil.which("node")
    if node is None or not (HERE / "node_modules").is_dir():
        pytest.skip("no node, or no packages: make test-browser installs them")
    code = "import('@sparticuz/chromium').then(async (c) => console.log(await c.default.executablePath()))"
    found = subprocess.run([node, "-e", code], cwd=HERE, capture_output=True, text=True)
    if found.returncode or not pathlib.Path(found.stdout.strip()).exists():
        pytest.skip(f"no browser: {found.stderr.strip().splitlines()[-1:]}")
    command = [node, str(HERE / "page.mjs"), json.dumps(arguments)]
    done = subprocess.run(command, cwd=HERE, capture_output=True, text=True, timeout=WORKED_S)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_a_user_registers_a_vertebra(address, tmp_path):
    folder, centres = page_files.write(tmp_path / "start")
    shots = os.environ.get("PAGE_SHOTS")
    arguments = {"url": address, "folder": str(folder), "centres": centres, "label": page_files.LABEL, "shots": shots}
    seen = _seen(arguments)
    print({name: seen[name]["seconds"] for name in ("first", "secondByKeys", "byBody")})
    assert "bad.json" in seen["error"] and seen["error"].endswith("wanted valid JSON") and "\n" not in seen["error"]
    assert seen["errorGone"]
    for clicked, centre in zip(seen["clicked"], centres):
        assert abs(clicked[0] - centre[0]) < 0.6 and abs(clicked[1] - centre[1]) < 0.6
    for name in ("first", "secondByKeys", "byBody"):
        assert seen[name]["state"] == "accepted" and seen[name]["headline"].startswith("L3: accepted, within "), name
    assert seen["secondByKeys"]["seconds"] < 15, "a click is answered within seconds"
    assert seen["focused"] == "headline" and seen["slice"] > 500
    assert seen["links"] == ["Report", "All files (.zip)", "pose.json", "pose.tfm"]
    assert seen["report"] == seen["first"]["headline"]
    assert not seen["problems"]
    hosts = {urllib.parse.urlsplit(request).netloc for request in seen["requests"] if not request.startswith("data:")}
    assert hosts == {urllib.parse.urlsplit(address).netloc}
    assert seen["axe"] and not any(seen["axe"].values()), seen["axe"]

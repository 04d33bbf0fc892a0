"""Launch scripts for clusters: their syntax, and the flags that they use."""

import pathlib
import re
import subprocess

import fresh_python
import yaml

LAUNCH = pathlib.Path(__file__).resolve().parents[2] / "experiments" / "launch"


def test_scripts_parse():
    scripts = sorted(LAUNCH.glob("*.sh"))
    assert len(scripts) == 3
    for script in scripts:
        done = subprocess.run(["bash", "-n", str(script)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    (manifest,) = LAUNCH.glob("*.yaml")
    job = yaml.safe_load(manifest.read_text())["spec"]["replicatedJobs"][0]["template"]["spec"]
    (container,) = job["template"]["spec"]["containers"]
    assert job["parallelism"] == job["completions"] == 8 and f",{job['completions']},$(JOB" in container["args"][0]


def test_scripts_use_flags_that_there_are():
    code = (
        "import importlib\n"
        "from absl import flags\n"
        "for name in ('train', 'register'):\n"
        "    before = set(flags.FLAGS)\n"
        "    importlib.import_module('experiments.' + name).define_flags()\n"
        "    print(*(set(flags.FLAGS) - before))\n"
        "    for flag in set(flags.FLAGS) - before:\n"
        "        delattr(flags.FLAGS, flag)\n"
    )
    known = set(fresh_python.run(code).split())
    for script in LAUNCH.iterdir():
        text = "\n".join(line for line in script.read_text().splitlines() if "experiments." in line or "--p1" in line)
        assert set(re.findall(r"--(\w+)=", text)) - {"array", "nodes", "dependency", "command"} <= known, script

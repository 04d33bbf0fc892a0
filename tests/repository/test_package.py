"""What is installed, what importing costs, and the sizes that keep the house readable."""

import os
import pathlib
import re
import shutil
import subprocess
import sys
import time
import tomllib

import fresh_python
import pytest

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]
LAYERS = ("kernels", "radgs_jax", "data_pipelines", "experiments")
HELP_S, HELP_TRIES = 1.0, 5
PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())


def test_the_wheel_holds_every_package_and_the_shipped_model():
    folders = {path.parent for layer in LAYERS for path in (REPOSITORY / layer).rglob("*.py")}
    wanted = {".".join(folder.relative_to(REPOSITORY).parts) for folder in folders}
    assert set(PROJECT["tool"]["setuptools"]["packages"]) == wanted | {"radgs_jax_base"}
    assert PROJECT["tool"]["setuptools"]["package-dir"] == {"radgs_jax_base": "base"}


@pytest.mark.package
def test_sdist_and_wheel_work_in_an_empty_environment(tmp_path):
    """Made from a copy of the tree, installed where nothing is: a phantom is registered, and --help takes less than a second."""

    def run(*command, **options):
        done = subprocess.run([str(part) for part in command], cwd=tmp_path, capture_output=True, text=True, **options)
        assert done.returncode == 0, done.stderr
        return done.stdout

    tree = tmp_path / "tree"
    run("git", "clone", "--quiet", REPOSITORY, tree)
    for name in ("builder", "empty"):
        run(sys.executable, "-m", "venv", tmp_path / name)
    run(tmp_path / "builder" / "bin" / "pip", "install", "--quiet", "build")
    run(tmp_path / "builder" / "bin" / "python", "-m", "build", "--outdir", tmp_path / "dist", tree)
    (wheel,), (sdist,) = (tmp_path / "dist").glob("*.whl"), (tmp_path / "dist").glob("*.tar.gz")
    assert wheel.stat().st_size < 20e6 and sdist.stat().st_size < 20e6
    run(tmp_path / "empty" / "bin" / "pip", "install", "--quiet", wheel)
    shutil.rmtree(tree)
    scripts = tmp_path / "empty" / "bin"
    times = []
    for _ in range(HELP_TRIES):
        start = time.perf_counter()
        assert "--cameras" in run(scripts / "radgs-register", "--help")
        times.append(time.perf_counter() - start)
    print(f"radgs-register --help: {min(times):.2f} s at best, {max(times):.2f} at most")
    assert min(times) < HELP_S
    home = {**os.environ, "HOME": str(tmp_path / "home"), "XDG_CACHE_HOME": str(tmp_path / "home")}
    assert "L3: accepted, within" in run(scripts / "radgs-demo", "--out=demo", env=home)
    assert (tmp_path / "demo" / "registered" / "report.html").exists()
    assert "radgs_jax" in run(scripts / "radgs-doctor", env=home)


def test_importing_the_package_costs_nothing():
    code = (
        "import sys, time; start = time.perf_counter(); import radgs_jax; spent = time.perf_counter() - start\n"
        "assert 'jax' not in sys.modules and 'numpy' not in sys.modules\n"
        "assert radgs_jax.__version__ and set(radgs_jax.__all__) <= set(dir(radgs_jax))\n"
        "assert spent < 0.2, spent"
    )
    fresh_python.run(code)


def test_the_face_brings_no_training():
    code = (
        "import sys, radgs_jax\n"
        "for name in radgs_jax.__all__: getattr(radgs_jax, name)\n"
        "heavy = {'optax', 'orbax', 'grain', 'chex', 'nibabel', 'pydicom', 'matplotlib'}\n"
        "brought = heavy & set(sys.modules) | {m for m in sys.modules if m.startswith('radgs_jax.training')}\n"
        "assert not brought, brought\n"
        "try: radgs_jax.nothing\n"
        "except AttributeError as error: print(error)"
    )
    assert "has no attribute 'nothing'" in fresh_python.run(code)


def test_versions_agree():
    version = PROJECT["project"]["version"]
    assert fresh_python.run("import radgs_jax; print(radgs_jax.__version__)").strip() == version
    assert f"## [{version}]" in (REPOSITORY / "CHANGELOG.md").read_text()
    assert f"version: {version}" in (REPOSITORY / "CITATION.cff").read_text()


def test_no_module_is_longer_than_500_lines():
    long = {}
    for layer in (*LAYERS, "tests", "examples"):
        for path in (REPOSITORY / layer).rglob("*.py"):
            count = len(path.read_text().splitlines())
            if count > 500:
                long[str(path.relative_to(REPOSITORY))] = count
    assert not long


def test_readme_is_short():
    assert len((REPOSITORY / "README.md").read_text().splitlines()) <= 150


def test_modules_that_documents_name_are_there():
    """`layer.package.module` and `python -m module`, as far as they are dotted names of ours."""
    for page in (REPOSITORY / "README.md", REPOSITORY / "CONTRIBUTING.md", *sorted((REPOSITORY / "docs").glob("*.md"))):
        for name in re.findall(r"\b((?:kernels|radgs_jax|data_pipelines|experiments)(?:\.\w+)+)", page.read_text()):
            parts = name.split(".")
            found = [
                n
                for n in range(len(parts), 0, -1)
                if (REPOSITORY.joinpath(*parts[:n])).is_dir()
                or (REPOSITORY.joinpath(*parts[:n])).with_suffix(".py").exists()
            ]
            assert found and found[0] >= len(parts) - 2, f"{page.name}: {name}"
            if found[0] < len(parts) and found[0] > 1:
                source = REPOSITORY.joinpath(*parts[: found[0]])
                source = source / "__init__.py" if source.is_dir() else source.with_suffix(".py")
                assert re.search(rf"\b{parts[found[0]]}\b", source.read_text()), f"{page.name}: {name}"

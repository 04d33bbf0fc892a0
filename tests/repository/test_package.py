"""What is installed, what importing costs, and the sizes that keep the house readable."""

import pathlib
import re
import subprocess
import sys
import tomllib

import fresh_python
import pytest

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]
LAYERS = ("kernels", "radgs_jax", "data_pipelines", "experiments")
PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())


def test_the_wheel_holds_every_package_and_the_shipped_model():
    folders = {path.parent for layer in LAYERS for path in (REPOSITORY / layer).rglob("*.py")}
    wanted = {".".join(folder.relative_to(REPOSITORY).parts) for folder in folders}
    assert set(PROJECT["tool"]["setuptools"]["packages"]) == wanted | {"radgs_jax_base"}
    assert PROJECT["tool"]["setuptools"]["package-dir"] == {"radgs_jax_base": "base"}


@pytest.mark.slow
def test_an_installed_package_finds_the_shipped_model(tmp_path):
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(tmp_path / "site")]
    subprocess.run([*command, str(REPOSITORY)], check=True, cwd=tmp_path)
    code = "from experiments.patients import models; print(models.model_hash(models.load_model(models.base_folder())))"
    environment = {"PYTHONPATH": str(tmp_path / "site"), "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)}
    assert fresh_python.run(code, cwd=tmp_path, env=environment) == fresh_python.run(code)


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


def test_readme_is_short_and_links_lead_somewhere():
    assert len((REPOSITORY / "README.md").read_text().splitlines()) <= 150
    for page in (REPOSITORY / "README.md", REPOSITORY / "WORKSPACE.md", *sorted((REPOSITORY / "docs").glob("*.md"))):
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


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

"""The documentation: links, names that it uses, and what its API pages are made of."""

import ast
import importlib
import math
import pathlib
import re
import subprocess
import sys
import zlib

import doc_pages
import pytest

from kernels.common import support
from radgs_jax import attenuation
from radgs_jax import metrics
from radgs_jax.geometry import rigid
from radgs_jax.models import activation
from radgs_jax.models import matching
from radgs_jax.models import regm
from radgs_jax.registration import confidence
from radgs_jax.registration import edges
from radgs_jax.registration import gains
from radgs_jax.registration import gauss_newton
from radgs_jax.training import objectives

REPOSITORY = doc_pages.REPOSITORY
LAYERS = ("kernels", "radgs_jax", "data_pipelines", "experiments")


def _public():
    """Name and syntax tree of each public module, function, class and method."""
    for layer in LAYERS:
        for path in sorted((REPOSITORY / layer).rglob("*.py")):
            parts = path.relative_to(REPOSITORY).with_suffix("").parts
            module = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
            tree = ast.parse(path.read_text())
            yield module, tree
            for node in _definitions(tree):
                yield f"{module}.{node.name}", node
                if isinstance(node, ast.ClassDef):
                    yield from ((f"{module}.{node.name}.{m.name}", m) for m in _definitions(node))


def _definitions(node):
    kinds = ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef
    return [n for n in node.body if isinstance(n, kinds) and not n.name.startswith("_")]


def _untyped(function):
    every = function.args
    given = [a.arg for a in (*every.posonlyargs, *every.args, *every.kwonlyargs) if a.annotation is None]
    return set(given) - {"self", "cls"} or function.returns is None


def test_every_public_name_has_a_docstring_and_types():
    silent = [name for name, node in _public() if not ast.get_docstring(node)]
    untyped = [name for name, node in _public() if isinstance(node, ast.FunctionDef) and _untyped(node)]
    assert not silent and not untyped


def test_links_lead_somewhere():
    """Relative links and their anchors, on a repository's host as on the site."""
    known = {page: doc_pages.anchors(page) for page in doc_pages.pages()}
    for page in doc_pages.pages():
        for target, anchor in re.findall(r"\]\(([^)#:\s]*)(?:#([^)]*))?\)", doc_pages.prose(page)):
            there = (page.parent / target).resolve() if target else page
            assert there.exists(), f"{page.name}: {target}"
            if anchor:
                assert anchor in known[there], f"{page.name}: {target}#{anchor}"


def test_examples_in_python_use_names_that_there_are():
    for page in doc_pages.guides():
        for text in doc_pages.blocks(page, ("python",)):
            for node in ast.walk(ast.parse(text)):
                if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] in LAYERS:
                    for name in node.names:
                        _import(node.module, name.name)


def _import(module, name):
    if not hasattr(importlib.import_module(module), name):
        importlib.import_module(f"{module}.{name}")


def test_equations_have_the_numbers_of_the_code():
    """As far as `docs/how_it_works.md` names numbers and not where they are."""
    text, refine = (REPOSITORY / "docs" / "how_it_works.md").read_text(), gauss_newton.RefineConfig()
    bone = attenuation.BONE_PER_MM - attenuation.WATER_PER_MM
    low, high = activation.SCALE_RANGE
    loss, turn = objectives.LossConfig(), gauss_newton.COUPLING
    for shown in (
        rf"c = {attenuation.WATER_PER_MM}\ \mathrm{{for}}",
        rf"c = {bone:.4f}\ \mathrm{{for}}",
        rf"\frac{{{support.Q_MAX:g} - q}}{{{support.Q_MAX:g} - {support.Q_FADE}}}",
        rf"\rho = {activation.DENSITY_UNIT}\ ",
        rf"s = {low} + {high - low:g}\ \mathrm{{sigmoid}}(z^0_s + {activation.SCALE_STEP}\, z_s)",
        rf"+ {activation.TURN_STEP}\, z_q",
        rf"+ {loss.ssim}\,(1 - \mathrm{{SSIM}}(y, y^{{*}})) + {loss.tv}\ \mathrm{{TV}}",
        rf"+ {loss.geodesic}\ d(T, T^{{*}})",
        rf"e^{{\pm {regm.MAX_LOG_WEIGHT:g}}}",
        f"a match of {matching.FREE_MM:g} mm",
        rf"({rigid.LEVER_MM:g}\ \mathrm{{mm}} \cdot \theta)",
        rf"\frac{{{edges.T_FREEDOM:g} + 2}}{{{edges.T_FREEDOM:g} + |r|^2 / s^2}}",
        rf"\xi = {refine.relaxation}\, ",
        f"standard deviations of {turn[0]} rad and {turn[1]:g} mm",
        f"more than {gauss_newton.STEP_MM:g} mm in a step",
        f"square $B$ of {gains.BLOCK} x {gains.BLOCK} pixels",
        rf"({confidence.ERROR_PER_DISAGREEMENT:g} \delta)^2",
        f"a correlation of at least {confidence.LEAST_SUPPORT}",
        f"{math.degrees(confidence.MIN_VIEW_ANGLE_RAD):g} degrees or more apart",
        f"$R$ is at most {metrics.SUCCESS_MM:g} mm",
    ):
        assert shown in " ".join(text.split()), shown


@pytest.mark.docs
def test_the_site_shows_every_public_name(tmp_path):
    """Built with warnings as errors; `objects.inv` lists what the API pages define."""
    pytest.importorskip("mkdocs", reason="needs requirements-docs.txt")
    site = tmp_path / "site"
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(site)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    shown = zlib.decompress((site / "objects.inv").read_bytes().split(b"zlib.\n", 1)[1]).decode().splitlines()
    shown = {line.split()[0] for line in shown}
    wanted = {name for name, node in _public() if not isinstance(node, ast.Module)}
    assert len(wanted) > 1000 and not wanted - shown
    for page in site.rglob("*.html"):
        loaded = re.findall(r'<(?:script|img|link|iframe)[^>]*(?:src|href)="(https?:)?//', page.read_text())
        assert not loaded, f"{page.relative_to(site)} loads from another host"
    _has_types(site / "api" / "radgs_jax" / "losses.html")


def _has_types(page: pathlib.Path):
    text = re.sub(r"<[^>]+>", "", page.read_text())
    assert "data_range: float" in text and "Float[Array" in text

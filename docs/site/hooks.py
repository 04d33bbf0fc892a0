"""What `mkdocs.yml` cannot say: pages from the repository's front, an API page for each module, and equations as pictures.

Markdown stays as a repository's host shows it: links are relative to the files, equations are LaTeX.
"""

import ast
import html
import pathlib
import re
from collections.abc import Iterator

from matplotlib import mathtext
from matplotlib.font_manager import FontProperties
from matplotlib.path import Path
from matplotlib.textpath import TextPath
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File
from mkdocs.structure.files import Files
from mkdocs.structure.pages import Page

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]
PACKAGES = ("radgs_jax", "kernels", "data_pipelines", "experiments")
FRONT = {"README.md": "index.md"} | {name: name for name in ("WORKSPACE.md", "CONTRIBUTING.md", "CHANGELOG.md")}
"""Pages that lie above docs/: file in the repository -> page of the site."""
COPIED = ("CITATION.cff", "LICENSE")
"""Files above docs/ that pages link to."""
EQUATION = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)
"""An equation as pymdownx.arithmatex leaves it: between \\( and \\) in a line, \\[ and \\] on its own."""

SIZE = 100
"""Units of a drawn equation's coordinates that make an em."""
PAD = 2
"""Margin around a drawn equation, in these units: strokes may reach beyond their box."""
FONT = FontProperties(size=SIZE, math_fontfamily="stix")
COMMANDS = {Path.MOVETO: "M", Path.LINETO: "L", Path.CURVE3: "Q", Path.CURVE4: "C"}


def modules(folder: pathlib.Path) -> Iterator[pathlib.Path]:
    """A package's folder and the files of its modules, each package before what is in it."""
    yield folder
    for path in sorted(folder.iterdir()):
        if (path / "__init__.py").exists():
            yield from modules(path)
        elif path.suffix == ".py" and not path.stem.startswith("_"):
            yield path


def _source(module):
    return module / "__init__.py" if module.is_dir() else module


def dotted(module: pathlib.Path) -> str:
    """Name by which a module or package of the repository is imported."""
    return ".".join(module.relative_to(REPOSITORY).with_suffix("").parts)


def page_of(module: pathlib.Path) -> str:
    """The module's page, relative to docs/."""
    place = module.relative_to(REPOSITORY).as_posix()
    return f"api/{place}/index.md" if module.is_dir() else f"api/{place.removesuffix('.py')}.md"


def api_page(module: pathlib.Path) -> str:
    """Markdown of a module's page; a package's also lists what is in it."""
    lines = [f"# {dotted(module)}", "", f"::: {dotted(module)}", ""]
    if module.is_dir():
        lines += ["| | |", "|---|---|"]
        for inner in modules(module):
            if inner.parent == module:
                said = ast.get_docstring(ast.parse(_source(inner).read_text())).split("\n\n")[0]
                link = page_of(inner).removeprefix(page_of(module).removesuffix("index.md"))
                lines.append(f"| [{inner.stem}]({link}) | {' '.join(said.split()).replace('|', chr(92) + '|')} |")
    return "\n".join(lines)


def _menu(package):
    inner = [module for module in modules(package) if module.parent == package]
    return [page_of(package), *({m.stem: _menu(m) if m.is_dir() else page_of(m)} for m in inner)]


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Puts the API's pages at the end of the menu."""
    config.nav.append({"API": ["api/index.md", *({name: _menu(REPOSITORY / name)} for name in PACKAGES)]})
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages that are not files in docs/."""
    pages = {page: (REPOSITORY / file).read_text().replace("](docs/", "](") for file, page in FRONT.items()}
    pages["api/index.md"] = "\n".join(["# API", "", *(f"- [{name}]({name}/index.md)" for name in PACKAGES)])
    for name in PACKAGES:
        pages |= {page_of(module): api_page(module) for module in modules(REPOSITORY / name)}
    for name, content in pages.items():
        files.append(File.generated(config, name, content=content))
    for name in COPIED:
        files.append(File.generated(config, name, abs_src_path=str(REPOSITORY / name)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Pages that lie above docs/ in the repository lie beside the others on the site."""
    return markdown.replace("](../README.md", "](index.md").replace("](../", "](")


def equation(latex: str) -> str:
    """An inline SVG of an equation, in ems and in the colour of the text, in the part of LaTeX that matplotlib draws.

    Raises:
      ValueError: LaTeX that it does not know.
    """
    text = f"${' '.join(latex.split())}$"
    width, height, depth, *_ = mathtext.MathTextParser("path").parse(text, dpi=72, prop=FONT)
    path = " ".join(
        f"{COMMANDS[code]}{' '.join(f'{value:.1f}' for value in points)}" if code != Path.CLOSEPOLY else "Z"
        for points, code in TextPath((0, 0), text, prop=FONT).iter_segments(simplify=False)
    )
    box = f"{-PAD} {-height - PAD:.1f} {width + 2 * PAD:.1f} {height + depth + 2 * PAD:.1f}"
    size = f"width:{(width + 2 * PAD) / SIZE:.3f}em;vertical-align:{-(depth + PAD) / SIZE:.3f}em"
    label = html.escape(latex.strip())
    return (
        f'<svg class="equation" role="img" aria-label="{label}" viewBox="{box}" style="{size}">'
        f'<path transform="scale(1,-1)" d="{path}"/></svg>'
    )


def on_page_content(content: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Draws the equations, so that the site needs neither a script nor the network for them."""

    def drawn(found):
        latex = html.unescape(found[2])
        if found[1] == "div":
            latex = latex.replace(r"\frac", r"\dfrac")
        return f'<{found[1]} class="arithmatex">{equation(latex)}</{found[1]}>'

    return EQUATION.sub(drawn, content)

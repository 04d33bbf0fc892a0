"""The Markdown pages of the documentation, and the code that they show."""

import pathlib
import re
from collections.abc import Iterator

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]
FENCE = re.compile(r"^```([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SHELL = ("", "bash", "sh")
"""Languages of fenced blocks that hold commands."""


def guides() -> list[pathlib.Path]:
    """README.md and the pages of docs/."""
    return [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md"))]


def pages() -> list[pathlib.Path]:
    """The guides, and the pages for developers."""
    return [*guides(), *(REPOSITORY / name for name in ("WORKSPACE.md", "CONTRIBUTING.md", "CHANGELOG.md"))]


def blocks(page: pathlib.Path, languages: tuple[str, ...]) -> list[str]:
    """Fenced blocks of a page in one of some languages."""
    return [text for language, text in FENCE.findall(page.read_text()) if language in languages]


def code_lines(page: pathlib.Path) -> Iterator[str]:
    """Lines of fenced blocks of commands, with continued lines joined, and pieces of code inside sentences."""
    for text in blocks(page, SHELL):
        yield from re.sub(r"\\\n\s*", "", text).splitlines()
    yield from re.findall(r"`([^`\n]+)`", FENCE.sub("", page.read_text()))


def prose(page: pathlib.Path) -> str:
    """The page without fenced blocks and without code."""
    return re.sub(r"`[^`\n]*`", "`code`", FENCE.sub("", page.read_text()))


def anchors(page: pathlib.Path) -> set[str]:
    """Anchors of a page's headings, as repositories' hosts and the site name them."""
    found: set[str] = set()
    for heading in re.findall(r"^#+ +(.+?) *$", FENCE.sub("", page.read_text()), re.MULTILINE):
        text = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading)
        name = re.sub(r"[^\w\- ]", "", text).lower().replace(" ", "-")
        number = sum(name == other or re.fullmatch(rf"{re.escape(name)}-\d+", other) is not None for other in found)
        found.add(f"{name}-{number}" if number else name)
    return found

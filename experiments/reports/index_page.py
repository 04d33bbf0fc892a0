"""The page of a study, a table or a training: tables, pictures, files and how it was made, in one file for a browser."""

import html
import pathlib
from collections.abc import Iterable
from collections.abc import Mapping
from collections.abc import Sequence

from PIL import Image

from experiments.reports import document
from experiments.reports.run_record import RunRecord
from experiments.runtime import endings

NAME = "report.html"
"""The page's file."""
WIDTH_PX, QUALITY = 1600, 80
"""Most columns of a picture in a page, and its quality as WebP, in percent. Chosen by hand: half blurs small print, twice makes
pages of megabytes."""
FIRST, NUMBER = tuple("0123456789+-<"), ' class="number"'
"""First characters of cells that hold numbers, which are aligned to the right, and what aligns them."""


def write(folder: pathlib.Path | str, title: str, sections: Iterable[str], record: RunRecord) -> None:
    """Writes `folder`/report.html.

    Args:
      title: plain text; sections: of `table`, `text`, `pictures` and `links`; record: of the run.
    """
    made = document.record(record.finish({}, endings.warnings_said()))
    document.write(pathlib.Path(folder) / NAME, title, "\n".join([*sections, made]))


def table(title: str, head: Sequence[str], cells: Sequence[Sequence[str]], note: str = "") -> str:
    """A section with a table, whose first column names the rows; note: a sentence above it."""
    columns = "".join(f'<th scope="col">{html.escape(name)}</th>' for name in head)
    rows = "".join(
        f'<tr><th scope="row">{html.escape(row[0])}</th>'
        + "".join(f"<td{NUMBER if cell[:1] in FIRST else ''}>{html.escape(cell)}</td>" for cell in row[1:])
        + "</tr>"
        for row in cells
    )
    return _section(title, _note(note) + _scrolled(title, f"<table><tr>{columns}</tr>{rows}</table>"))


def text(title: str, lines: str, note: str = "") -> str:
    """A section with a table that is text, its columns aligned by blanks."""
    return _section(title, _note(note) + _scrolled(title, f"<pre>{html.escape(lines)}</pre>"))


def pictures(title: str, shown: Mapping[pathlib.Path, str], note: str = "") -> str:
    """A section with pictures, path -> what it shows; files that are not there are left out. Empty where none is."""
    images = [
        f'<p><img src="{_webp(path)}" alt="{html.escape(said)}" style="max-width: 100%"></p>'
        for path, said in shown.items()
        if path.exists()
    ]
    return _section(title, _note(note) + "\n".join(images)) if images else ""


def links(title: str, folder: pathlib.Path, names: Iterable[str]) -> str:
    """A section that links to files in the page's folder; names that are not there are left out. Empty where none is."""
    found = [name for name in names if (folder / name).exists()]
    items = "".join(f'<li><a href="{html.escape(name)}">{html.escape(name)}</a></li>' for name in found)
    return _section(title, f"<ul>{items}</ul>") if found else ""


def _section(title, body):
    return f'<section aria-label="{html.escape(title)}">\n<h2>{html.escape(title)}</h2>\n{body}\n</section>'


def _note(note):
    return f"<p>{html.escape(note)}</p>\n" if note else ""


def _scrolled(title, body):
    """Wide tables scroll, by keyboard as well."""
    label = html.escape(f"{title}, table")
    return f'<div class="scrolled" role="region" aria-label="{label}" tabindex="0">{body}</div>'


def _webp(path):
    with Image.open(path) as opened:
        image = opened.convert("RGB")
        image.thumbnail((WIDTH_PX, 10 * WIDTH_PX))
        return document.data_url(image, "webp", quality=QUALITY)

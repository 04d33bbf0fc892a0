"""HTML files that need nothing else, for a browser: one style and script, and the articles of registered cases in them."""

import base64
import html
import io
import json
import pathlib
import re
from collections.abc import Mapping
from typing import Any

from PIL import Image

from data_pipelines.io import files
from experiments.reports import pictures

TEMPLATE = pathlib.Path(__file__).with_suffix(".html")
STATES = {True: "accepted", False: "refused", None: "unjudged"}
"""Style of a verdict."""


def fill(template: pathlib.Path, values: Mapping[str, str]) -> str:
    """A template's text with the values, which are HTML, in the places of their names."""
    return re.sub(r"\{\{(\w+)\}\}", lambda found: values[found[1]], template.read_text(encoding="utf-8"))


def write(path: pathlib.Path | str, title: str, body: str) -> None:
    """Writes a page.

    Args:
      title: plain text; body: HTML, in which every `article` is as in page.html.
    """
    colours = "; ".join(f"--{pose}: {style['colors']}" for pose, style in pictures.STYLES.items())
    text = fill(TEMPLATE, {"title": html.escape(title), "colours": colours, "body": body})
    with files.replacing(pathlib.Path(path)) as temporary:
        temporary.write_text(text, encoding="utf-8")


def data_url(image: Image.Image, kind: str, **options: Any) -> str:
    """A picture as the address of an `img`; kind: 'png' or 'webp'; options: of pillow's writer."""
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return f"data:image/{kind};base64,{base64.b64encode(stream.getvalue()).decode()}"


def articles(path: pathlib.Path | str) -> str:
    """The articles of a page that `write` has made, as HTML."""
    return "\n".join(re.findall(r"<article.*?</article>", pathlib.Path(path).read_text(encoding="utf-8"), re.DOTALL))


def record(run: Mapping[str, Any]) -> str:
    """A section on how a run was made, from the content of its run.json."""
    rows = [(key, run[key]) for key in ("command", "begun", "wall_s", "cpu_s")]
    rows += [
        (f"{part}: {key}", value) for part in ("versions", "machine", "inputs") for key, value in run[part].items()
    ]
    rows += [("warning", text) for text in run["warnings"]]
    plain = lambda value: value if isinstance(value, str) else json.dumps(value)
    lines = "".join(
        f"<tr><th scope='row'>{html.escape(key)}</th><td><code>{html.escape(plain(value))}</code></td></tr>"
        for key, value in rows
    )
    return f'<section aria-label="How it was made">\n<h2>How it was made</h2>\n<table class="record">{lines}</table>\n</section>'

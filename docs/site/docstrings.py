"""Griffe extension: docstrings of this repository, of which several entries may share a line, as the Google style wants them."""

import re
from typing import Any

import griffe

SECTIONS = ("Args:", "Attributes:")
ENTRY = re.compile(r"^(?P<names>\w+(?:, \w+)*): (?P<text>.*)$", re.DOTALL)


def one_entry_a_line(docstring: str) -> str:
    """The docstring with `a, b: text` and `a: text; b: text` in its lists of names as an entry for each name."""
    result, section, entries = [], False, []

    def flush():
        for entry in entries:
            result.extend(_split(entry))
        entries.clear()

    for line in docstring.splitlines():
        if line.strip() in SECTIONS and not line.startswith(" "):
            section = True
        elif section and line and not line.startswith(" "):
            flush()
            section = False
        elif section and line.strip():
            if line.startswith("    ") and entries:
                entries[-1] += " " + line.strip()
            else:
                entries.append(line.strip())
            continue
        if not line.strip():
            flush()
        result.append(line)
    flush()
    return "\n".join(result)


def _split(entry):
    """Lines of an entry; what follows a semicolon is another one if it begins with a name and a colon."""
    parts = []
    for part in entry.split("; "):
        if ENTRY.match(part) or not parts:
            parts.append(part)
        else:
            parts[-1] += "; " + part
    for part in parts:
        found = ENTRY.match(part)
        if found is None:
            yield f"  {part}"
        else:
            yield from (f"  {name}: {found['text']}" for name in found["names"].split(", "))


class OneEntryALine(griffe.Extension):
    """Applies `one_entry_a_line` to every docstring."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Called by Griffe for each module, class, function and attribute."""
        if obj.docstring is not None:
            obj.docstring.value = one_entry_a_line(obj.docstring.value)

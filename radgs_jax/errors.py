"""Errors whose text is one line: the file or argument, what was found, and what is wanted."""

from typing import NoReturn


class InputError(ValueError):
    """Input that cannot be used. A command prints its text as one line and ends with status 2."""


class RunError(RuntimeError):
    """A run that cannot go on by itself. A command prints its text as one line and ends with status 1."""


class NotFound(InputError):
    """A vertebra that the X-rays do not show, or not surely enough."""


class BadGeometry(InputError):
    """Cameras or start poses that cannot be right together."""


def fail(source: object, field: str, found: object, wanted: object, error: type[InputError] = InputError) -> NoReturn:
    """Raises an error in the project's one form, a line of printable characters.

    Args:
      source: the file, or a word for what else was wrong; field: where in it.
      found, wanted: the value, and what it should be.
      error: its class.
    """
    text = str(found)
    text = text if len(text) <= 400 else f"{text[:400]}..."
    line = " ".join(f"{source}: {field}: found {text}, wanted {wanted}".splitlines())
    # File names and damaged text may hold what no terminal can show.
    raise error("".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line))

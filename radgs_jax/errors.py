"""Errors with a one-line message: the file or argument, what was found, and what is wanted."""

from typing import NoReturn

MAX_FOUND_CHARACTERS = 400
"""Length at which the found value is cut, characters. Chosen by hand: long enough for a list of levels, short enough for a line."""


class InputError(ValueError):
    """Input that cannot be used. A command prints the message as one line and exits with status 2."""


class RunError(RuntimeError):
    """A run that cannot continue by itself. A command prints the message as one line and exits with status 1."""


class NotFound(InputError):
    """A vertebra that the X-rays do not show, or do not show clearly enough."""


class BadGeometry(InputError):
    """Cameras or start poses that contradict each other."""


def fail(source: object, field: str, found: object, wanted: object, error: type[InputError] = InputError) -> NoReturn:
    """Raises an error in the project's one format, a single line of printable characters.

    Args:
      source: the file, or a word for what else was wrong.
      field: the place in it.
      found: the value that was found.
      wanted: what it should be.
      error: class of the error.

    Raises:
      InputError: always, of class `error`.
    """
    text = str(found)
    text = text if len(text) <= MAX_FOUND_CHARACTERS else f"{text[:MAX_FOUND_CHARACTERS]}..."
    line = " ".join(f"{source}: {field}: found {text}, wanted {wanted}".splitlines())
    # File names and damaged text may contain characters that no terminal can show.
    raise error("".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line))

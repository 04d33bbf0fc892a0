"""Files that are damaged at random: each is read right, or is one line that names it, and nothing is left behind.

300 files are damaged in the quick tests and over 10,000 in the slow ones: every kind of file that the program reads, in its bytes
or in its own terms (`damageable_files.py` and `mutations.py` in `tests/support`). What is sealed may never be read as anything
else than what was written. A failure names its case; `attack` repeats it.
"""

import contextlib
import logging
import pathlib
import random
import resource
import signal
import time
import traceback
import warnings
from typing import Any

import mutations
import pytest
import xray_files
from damageable_files import Kind
from damageable_files import KINDS

from radgs_jax import errors

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]
OWN = tuple(str(REPOSITORY / name) for name in ("radgs_jax", "data_pipelines", "experiments", "kernels"))
SECONDS = 20
"""Time that reading a file may take."""
MEMORY_KB = 2_000_000
"""Memory in KB by which it may raise the peak."""
LONGEST = 2000
"""Characters of a line, most of which may be a file's path."""
MORE = 34
"""How many times as many files the slow tests damage."""
MISSING = 0.03
"""Share of the files that are removed instead."""
SHOWN = 5
"""Failures that are shown in full."""
IGNORED = (DeprecationWarning, PendingDeprecationWarning, ImportWarning, ResourceWarning)
"""Warnings that Python never shows users."""


class TooSlow(BaseException):
    """The time is up. No `except Exception` may take it for a damaged file."""


@contextlib.contextmanager
def _within(seconds):
    """Raises TooSlow inside, once the time is up."""

    def stop(number, frame):
        raise TooSlow(f"more than {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds, 1.0)  # again, where what runs swallows exceptions
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _listing(folder):
    return sorted((str(path), path.is_file() and path.stat().st_size) for path in folder.rglob("*"))


def _is_line(text):
    return text.isprintable() and len(text) <= LONGEST


def _place(error):
    """The last line of this program in a traceback."""
    own = [f for f in traceback.extract_tb(error.__traceback__) if f.filename.startswith(OWN)]
    return f"{pathlib.Path(own[-1].filename).relative_to(REPOSITORY)}:{own[-1].lineno}" if own else "the test"


def _outcome(kind, path, folder):
    """What is wrong about reading a damaged file, or None."""
    try:
        found = kind.read(path)
    except errors.InputError as error:
        text = str(error)
        clear = ": found " in text and ", wanted " in text and _is_line(text)
        named = str(folder) in text or "/dev/zero" in text  # where a case file names it
        return None if clear and named else f"no clear line: {text[:300]!r}"
    except (Exception, TooSlow) as error:
        return f"{type(error).__name__} at {_place(error)}: {str(error)[:200]!r}"
    return None if kind.right is None or found in kind.right else "sealed, and read as something else"


def attack(name: str, number: int, kind: Kind, folder: pathlib.Path, caplog: Any, capfd: Any) -> str | None:
    """Damages one file, reads it, and mends it again; what went wrong, or None."""
    rng = random.Random(f"{name} {number}")
    path = rng.choice(kind.paths)
    content = path.read_bytes()
    damaged, what = mutations.damage(path.name, content, rng)
    if rng.random() < MISSING:
        path.unlink()
        what = "missing"
    else:
        path.write_bytes(damaged)
    before, start, peak = _listing(folder), time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    caplog.clear()
    try:
        with warnings.catch_warnings(record=True) as said, _within(SECONDS):
            warnings.simplefilter("always")
            wrong = [_outcome(kind, path, folder)]
        wrong += [f"{time.monotonic() - start:.0f} s"] * (time.monotonic() - start > SECONDS)
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak
        wrong += [f"{grown} KB"] * (grown > MEMORY_KB)
        wrong += [f"left behind: {sorted(set(_listing(folder)) ^ set(before))}"] * (_listing(folder) != before)
        wrong += [
            f"warning: {w.message} ({w.filename}:{w.lineno})" for w in said if not issubclass(w.category, IGNORED)
        ]
        loud = [record for record in caplog.records if record.levelno >= logging.WARNING]
        wrong += [
            f"log: {r.getMessage()[:300]!r}"
            for r in loud
            if not (r.pathname.startswith(OWN) and _is_line(r.getMessage()))
        ]
        printed = "".join(capfd.readouterr())
        wrong += [f"printed: {printed[:300]!r}"] * bool(printed)
    finally:
        path.write_bytes(content)
    return "; ".join([f"{name} {number}: {path.name}: {what}", *filter(None, wrong)]) if any(wrong) else None


@pytest.mark.parametrize(
    "name, first, count",
    [
        *(pytest.param(name, 0, count, id=name) for name, (count, _) in KINDS.items()),
        *(
            pytest.param(name, count, MORE * count, id=f"{name}, all", marks=pytest.mark.slow)
            for name, (count, _) in KINDS.items()
        ),
    ],
)
def test_a_damaged_file_is_read_right_or_is_one_line(name, first, count, tmp_path, caplog, capfd):
    kind = KINDS[name][1](tmp_path)
    for path in kind.paths[: 1 if kind.right else None]:
        found = kind.read(path)  # undamaged
        assert kind.right is None or found in kind.right
    capfd.readouterr()
    numbers = range(first, first + count)
    wrong = list(filter(None, (attack(name, number, kind, tmp_path, caplog, capfd) for number in numbers)))
    assert not wrong, f"{len(wrong)} of {count}:\n" + "\n".join(wrong if count > 100 else wrong[:SHOWN])


def test_there_are_enough_cases():
    counts = [count for count, _ in KINDS.values()]
    assert sum(counts) == 300 and MORE * sum(counts) >= 10_000


@pytest.mark.parametrize("name", ["a.bin", "a.json", "a.tfm", "a.dcm"])
def test_damage_is_the_same_for_the_same_seed(name):
    data = bytes(132) if name != "a.dcm" else xray_files.dicom()
    data = data if name != "a.json" else b'{"a": [1, 2.5, {"b": "c"}]}'
    made = [[mutations.damage(name, data, random.Random(seed)) for seed in range(50)] for _ in range(2)]
    assert made[0] == made[1] and len({damaged for damaged, _ in made[0]}) > 20

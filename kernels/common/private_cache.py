"""The user's own folder for what is built and loaded again: compiled kernels and programs. What lies there is run.

So nobody else may write there: the folder is made with mode 0700, belongs to the user, and is no link. Where that does not hold,
nothing is kept and nothing is taken from it, which is said in one line; there is no other place, such as a shared temporary folder.
"""

import functools
import os
import pathlib
import stat

from absl import logging

PRIVATE = 0o700
"""Mode of the folders: nobody else reads, writes or enters them."""


def root() -> pathlib.Path:
    """The cache's folder, which need not exist: `radgs_jax` in XDG_CACHE_HOME or ~/.cache.

    Raises:
      RuntimeError: there is neither.
    """
    return pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache") / "radgs_jax"


def folder(name: str) -> pathlib.Path | None:
    """The folder `name` of the cache, made if missing; None, after a warning, where it is not the user's alone."""
    place, reason = find(name)
    if place is None:
        warn_once(f"nothing is kept for the next start, which is as slow: {reason}")
    return place


def find(name: str) -> tuple[pathlib.Path | None, str]:
    """(the folder `name` of the cache, made if missing, "") or (None, why it cannot be used and what helps)."""
    remedy = "set XDG_CACHE_HOME to a folder of your own"
    try:
        place = root()
    # pathlib raises a RuntimeError where the home folder is unknown.
    except RuntimeError as error:
        return None, f"{error}; {remedy}"
    reason = _why_not(place, name)
    return (None, f"{reason}; {remedy}") if reason else (place / name, "")


@functools.cache
def private(path: pathlib.Path) -> pathlib.Path | None:
    """A folder that is the user's alone, made if missing; None, after a warning, where it is not. Its parents are not looked at."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        reason = _made(path)
    except OSError as error:
        reason = f"{path}: {error.strerror}"
    if reason:
        warn_once(f"nothing is kept for the next start, which is as slow: {reason}")
    return None if reason else path


@functools.cache
def warn_once(line: str) -> None:
    """Logs a warning, once per process."""
    logging.warning("%s", line)


@functools.cache
def _why_not(place, name):
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        above = os.stat(place.parent)
        if above.st_mode & stat.S_IWOTH and not above.st_mode & stat.S_ISVTX:
            return f"{place.parent}: everyone may write there"
        return _made(place) or _made(place / name)
    except OSError as error:
        return f"{place / name}: {error.strerror}"


def _made(path):
    """Makes a private folder; returns why it is none, or ""."""
    try:
        os.mkdir(path, PRIVATE)
    except FileExistsError:
        pass
    status = os.lstat(path)
    if not stat.S_ISDIR(status.st_mode):
        return f"{path}: a link or a file"
    if hasattr(os, "geteuid") and status.st_uid != os.geteuid():
        return f"{path}: it belongs to another user (uid {status.st_uid})"
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return f"{path}: others may write there (mode {stat.S_IMODE(status.st_mode):o}), so delete it"
    if stat.S_IMODE(status.st_mode) != PRIVATE:
        os.chmod(path, PRIVATE)
    return ""

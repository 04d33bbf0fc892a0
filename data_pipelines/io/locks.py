"""One process at a time in a folder: locks that the kernel releases when their holder ends, however it ends.

A lock is `flock` on a small file, which its holder removes. On NFS, Linux passes such locks to the server. Where a file system has
no locks, that is said in one line, and the work goes on without.
"""

import contextlib
import hashlib
import os
import pathlib
import platform
from collections.abc import Iterator

from absl import logging

from radgs_jax import errors

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None

LOCK = ".lock"
"""Name of the lock file inside a folder."""
LONGEST_NAME = 180
"""Bytes of a name that hidden names beside it repeat. File systems allow 255; half would shorten ordinary names, and twice leaves
no room for what is added."""


def beside(path: pathlib.Path | str, suffix: str) -> pathlib.Path:
    """A hidden path in the same folder, named by `path` and `suffix`; a long name is shortened by a digest."""
    path = pathlib.Path(path)
    name = os.fsencode(path.name)
    short = path.name if len(name) <= LONGEST_NAME else hashlib.sha256(name).hexdigest()[:32]
    return path.with_name(f".{short}.{suffix}")


@contextlib.contextmanager
def hold(lock: pathlib.Path | str, what: object, shared: bool = False, wait: bool = False) -> Iterator[bool]:
    """Holds a lock while the block runs; the lock file of one that is not shared is removed afterwards.

    Args:
      lock: the lock file, whose folder exists: `folder / LOCK`, or `beside(folder, "lock")` for a folder that is renamed.
      what: the folder that is locked, for messages.
      shared: whether others may hold it as well, who share it, too.
      wait: whether to wait for another holder's end.
    Yields:
      whether the lock is held; False where the file system has none.
    Raises:
      InputError: another process holds it, or the file cannot be written.
    """
    handle, held = _opened(lock, what, shared, wait)
    try:
        if held and not shared:
            os.ftruncate(handle, 0)
            os.write(handle, f"process {os.getpid()} on {platform.node()}".encode())
        yield held
    finally:
        # Those who share it would not be seen by the next one who opens another file of this name.
        if held and not shared:
            with contextlib.suppress(OSError):
                os.unlink(lock)
        os.close(handle)


def _opened(lock, what, shared, wait):
    """(file descriptor, whether the lock is held)."""
    while True:
        try:
            handle = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | getattr(os, "O_NOFOLLOW", 0), 0o666)
        except OSError as error:
            errors.fail(what, "lock", error.strerror, f"a folder in which {os.path.basename(lock)} can be written")
        try:
            if fcntl is None:
                raise OSError("no locks on this system")
            kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
            fcntl.flock(handle, kind if wait else kind | fcntl.LOCK_NB)
            # The holder before may have removed the file between the two calls; then this lock is on a file without a name.
            if os.path.samestat(os.fstat(handle), os.stat(lock)):
                return handle, True
        except BlockingIOError:
            holder = os.pread(handle, 200, 0).decode(errors="replace") or "another process"
            os.close(handle)
            errors.fail(what, "folder", f"one in use by {holder}", "one that no other run writes: wait for it to end")
        except FileNotFoundError:
            pass
        except OSError as error:
            logging.warning("%s: no lock (%s), so nothing stops a second run in it", what, error.strerror or error)
            return handle, False
        os.close(handle)


def abandoned(path: pathlib.Path | str) -> bool:
    """Whether a file that its writer keeps locked has lost its writer. False where that cannot be told."""
    if fcntl is None:
        return False
    try:
        handle = os.open(path, os.O_RDWR | os.O_CLOEXEC | getattr(os, "O_NOFOLLOW", 0))
    except OSError:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except OSError:
        return False
    finally:
        os.close(handle)


def mark(handle: int, path: pathlib.Path) -> bool:
    """Locks a new file as long as `handle` is open, for `abandoned`. Returns whether the file still has its name."""
    if fcntl is not None:
        with contextlib.suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)  # waits for an `abandoned` that looks at it
    try:
        return os.path.samestat(os.fstat(handle), os.stat(path))
    except FileNotFoundError:
        return False

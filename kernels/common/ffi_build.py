"""Builds the C++ backends at first use, into the user's private cache, and registers them with jax.

A library is loaded only if its SHA-256 is the one that was noted when it was built. Where there is no private cache, it is built
into a temporary folder of this process.
"""

import atexit
import ctypes
import functools
import hashlib
import os
import pathlib
import platform
import re
import shutil
import subprocess
import tempfile

import jax
from absl import logging

from kernels.common import dispatch
from kernels.common import private_cache

# The last two let sqrt and rounding become vector code; no result changes.
FLAGS = [
    "-O3",
    "-std=c++17",
    "-shared",
    "-fPIC",
    "-pthread",
    "-ffp-contract=fast",
    "-fno-math-errno",
    "-fno-trapping-math",
]
HEADERS = pathlib.Path(__file__).parent
"""Folder of the headers that all kernels share; a kernel's own headers are in its own folder."""
DIGEST_CHARACTERS = 64
"""Length of a SHA-256 in hexadecimal."""
NAMED_CHARACTERS = 16
"""Characters of it in a library's name, 64 bits; not sensitive: the whole digest is compared."""
X86_64_V3 = {
    *("cx16", "lahf_lm", "popcnt", "pni", "ssse3", "sse4_1", "sse4_2"),
    *("avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "abm", "movbe", "xsave"),
}
"""Features that the compiler may use for -march=x86-64-v3, in Linux's names. A virtual machine may hide any of them."""


def register_targets(source: pathlib.Path | str, targets: tuple[tuple[str, str], ...]) -> None:
    """Compiles `source` once per content, headers, flags, kind of CPU and jax version, and registers its functions for CPUs.

    Args:
      source: the C++ file.
      targets: (name in jax, symbol of the library) each.
    Raises:
      NotImplementedError: RADGS_NO_FFI=1.
      dispatch.NotBuilt: there is no C++ compiler, or the build failed; the process does not try again.
    """
    if os.environ.get("RADGS_NO_FFI") == "1":
        raise NotImplementedError("RADGS_NO_FFI=1")
    if reason := _why_not(pathlib.Path(source), targets):
        raise dispatch.NotBuilt(reason)


@functools.cache
def _why_not(source, targets):
    """Builds and registers; returns the reason for a failure, or None."""
    compiler = shutil.which(os.environ.get("CXX", "g++")) or shutil.which("clang++")
    if compiler is None:
        return "no C++ compiler found; install g++ or clang++, or set CXX to one"
    march = ["-march=x86-64-v3"] if _has_x86_64_v3() else []
    command = [compiler, *FLAGS, *march, f"-I{HEADERS}", f"-I{jax.ffi.include_dir()}"]
    headers = [file for folder in (HEADERS, source.parent) for file in sorted(folder.glob("*.h"))]
    content = b"".join(file.read_bytes() for file in [source, *headers])
    made_with = [*FLAGS, *march, jax.__version__, compiler, platform.system(), platform.machine()]
    key = hashlib.sha256(content + " ".join(made_with).encode()).hexdigest()[:16]
    folder, no_cache = private_cache.find("ffi")
    try:
        if folder is None:
            library = _build(command, source, key, tempfile.mkdtemp(prefix="radgs_jax-"))
            atexit.register(shutil.rmtree, library.parent, ignore_errors=True)
        else:
            library = _kept(command, source, key, folder)
        handle = ctypes.CDLL(str(library))
    except subprocess.CalledProcessError as error:
        lines = [line for line in error.stderr.splitlines() if "error" in line] or [str(error)]
        return f"{source.name} did not compile: {lines[0].strip()}; install another g++ or clang++, or set CXX to one"
    except OSError as error:
        remedy = no_cache or "set XDG_CACHE_HOME to a folder for libraries"
        return f"{source.name} could not be built or loaded: {error}; {remedy}"
    if no_cache:
        private_cache.warn_once(f"the C++ kernels are built for this process only, which takes a while: {no_cache}")
    for target, symbol in targets:
        jax.ffi.register_ffi_target(target, jax.ffi.pycapsule(getattr(handle, symbol)), platform="cpu")
    return None


def _build(command, source, key, folder):
    """Compiles a library into a folder; returns its path."""
    built = pathlib.Path(folder) / f"{source.stem}-{key}.so"
    subprocess.run([*command, str(source), "-o", str(built)], check=True, capture_output=True, text=True)
    return built


def _kept(command, source, key, folder):
    """Path of the library in the cache, built where it is not there as it was built.

    A library is named by its content, and a note of its SHA-256 by its key. So the two fit at any time, also while another process
    builds the same.
    """
    note = folder / f"{source.stem}-{key}.sha256"
    if note.exists():
        text = note.read_bytes()[:DIGEST_CHARACTERS].decode(errors="replace")
        library = folder / _name(source, key, text)
        if re.fullmatch("[0-9a-f]+", text) and library.exists() and _sha256(library) == text:
            return library
        logging.warning("%s: not as it was built, so it is built again", library)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        built = _build(command, source, key, scratch)
        text = _sha256(built)
        library, written = folder / _name(source, key, text), built.with_suffix(".sha256")
        written.write_text(text)
        os.replace(built, library)
        os.replace(written, note)
    return library


def _name(source, key, digest):
    return f"{source.stem}-{key}-{digest[:NAMED_CHARACTERS]}.so"


def _sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _has_x86_64_v3():
    """Whether this is an x86-64 with all features in X86_64_V3."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return False
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return False
    flags = next((line.partition(":")[2] for line in lines if line.startswith("flags")), "")
    return X86_64_V3 <= set(flags.split())

"""Builds the C++ backends at first use, into a cache folder, and registers them with jax."""

import ctypes
import functools
import hashlib
import os
import pathlib
import platform
import shutil
import subprocess
import tempfile

import jax

from kernels.common import dispatch

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
X86_64_V3 = {
    *("cx16", "lahf_lm", "popcnt", "pni", "ssse3", "sse4_1", "sse4_2"),
    *("avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "abm", "movbe", "xsave"),
}
"""Features that the compiler may use for -march=x86-64-v3, in Linux's names. A virtual machine may hide any of them."""


def _cache_folder():
    root = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    return pathlib.Path(root) / "radgs_jax" / "ffi"


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
    try:
        library = _cache_folder() / f"{source.stem}-{key}.so"
        if not library.exists():
            library.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=library.parent) as scratch:
                built = pathlib.Path(scratch) / library.name
                subprocess.run([*command, str(source), "-o", str(built)], check=True, capture_output=True, text=True)
                os.replace(built, library)
        handle = ctypes.CDLL(str(library))
    except subprocess.CalledProcessError as error:
        lines = [line for line in error.stderr.splitlines() if "error" in line] or [str(error)]
        return f"{source.name} did not compile: {lines[0].strip()}; install another g++ or clang++, or set CXX to one"
    # pathlib raises a RuntimeError where the home folder is unknown.
    except (OSError, RuntimeError) as error:
        return f"{source.name} could not be built or loaded: {error}; set XDG_CACHE_HOME to a folder for libraries"
    for target, symbol in targets:
        jax.ffi.register_ffi_target(target, jax.ffi.pycapsule(getattr(handle, symbol)), platform="cpu")
    return None


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

"""Builds and registers the C++ backends lazily, into a cache folder, when a compiler is present."""

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

# Without errno and trapping arithmetic, sqrt and rounding become vector code; no result changes.
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


def _cache_folder():
    root = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    return pathlib.Path(root) / "radgs_jax" / "ffi"


@functools.cache
def register(source, targets):
    """Compiles `source` (once per content, headers, flags and jax version); registers its functions as CPU targets.

    Args:
      targets: ((target, symbol of the library), ...).
    Raises:
      NotImplementedError: RADGS_NO_FFI=1, no C++ compiler, or a failed build, with the reason.
    """
    if os.environ.get("RADGS_NO_FFI") == "1":
        raise NotImplementedError("RADGS_NO_FFI=1")
    compiler = shutil.which(os.environ.get("CXX", "g++")) or shutil.which("clang++")
    if compiler is None:
        raise NotImplementedError("no C++ compiler found")
    source = pathlib.Path(source)
    march = ["-march=x86-64-v3"] if platform.machine() in ("x86_64", "AMD64") and _has_avx2() else []
    command = [compiler, *FLAGS, *march, f"-I{HEADERS}", f"-I{jax.ffi.include_dir()}"]
    content = b"".join(file.read_bytes() for file in [source, *sorted(HEADERS.glob("*.h"))])
    key = hashlib.sha256(content + " ".join([*FLAGS, *march, jax.__version__, compiler]).encode()).hexdigest()[:16]
    library = _cache_folder() / f"{source.stem}-{key}.so"
    if not library.exists():
        try:
            library.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=library.parent) as scratch:
                built = pathlib.Path(scratch) / library.name
                subprocess.run([*command, str(source), "-o", str(built)], check=True, capture_output=True, text=True)
                os.replace(built, library)
        except subprocess.CalledProcessError as error:
            lines = [line for line in error.stderr.splitlines() if "error" in line] or [str(error)]
            raise NotImplementedError(f"{source.name} did not compile: {lines[0].strip()}") from error
        except OSError as error:
            raise NotImplementedError(f"{source.name} could not be built: {error}") from error
    handle = ctypes.CDLL(str(library))
    for target, symbol in targets:
        jax.ffi.register_ffi_target(target, jax.ffi.pycapsule(getattr(handle, symbol)), platform="cpu")


def _has_avx2():
    try:
        return " avx2 " in pathlib.Path("/proc/cpuinfo").read_text()
    except OSError:
        return False

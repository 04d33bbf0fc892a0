"""Which compilers for GPUs and TPUs are installed, where, and what installs those that are not."""

import importlib.metadata
import os
import pathlib
import re
import shutil
import subprocess
import sys
from collections.abc import Collection
from collections.abc import Sequence
from typing import Any

import jax

WHEEL_NAMES = ("jax-cuda12-pjrt", "jax-cuda12-plugin")
"""Packages with XLA's GPU compiler."""


def versions(folder: pathlib.Path | str | None, names: Collection[str]) -> dict[str, str]:
    """Versions, by package, of those of `names` that are in a folder; None means installed."""
    where: dict[str, Any] = {} if folder is None else {"path": [str(folder)]}
    found = ((d.metadata["Name"], d.version) for d in importlib.metadata.distributions(**where))
    return {name: version for name, version in found if name in names}


def missing_wheels(folder: pathlib.Path | str | None) -> str | None:
    """Why XLA's GPU compiler is not usable, with the command that installs it, or None.

    Args:
      folder: where its wheels are; None where they are installed.
    """
    found = versions(folder, WHEEL_NAMES)
    cuda = find_cuda([] if folder is None else [folder])
    packages = [f"{name}=={jax.__version__}" for name in WHEEL_NAMES] + ["nvidia-cuda-nvcc-cu12"] * (cuda is None)
    command = f"pip install --no-deps --target DIR {' '.join(packages)}, then --wheels=DIR"
    for name in WHEEL_NAMES:
        if name not in found:
            return f"no {name}; {command}"
        if found[name] != jax.__version__:
            return f"{name} is {found[name]}, wanted {jax.__version__}; {command}"
    return None if cuda else f"no ptxas with its libdevice; {command}"


def missing_libtpu(folder: pathlib.Path | str | None) -> str | None:
    """Why libtpu is not usable, with the command that installs it, or None; `folder` as in `missing_wheels`."""
    if "libtpu" in versions(folder, ("libtpu",)):
        return None
    pins = [r.split(";")[0].strip() for r in importlib.metadata.requires("jax") or () if r.startswith("libtpu")]
    return f"no libtpu; pip install --no-deps --target DIR '{' '.join(pins) or 'libtpu'}', then --libtpu=DIR"


def find_cuda(paths: Sequence[pathlib.Path | str]) -> str | None:
    """The folder of the parts of CUDA that XLA compiles with, bin/ptxas and nvvm/libdevice; None where there is none.

    The search goes through the folders `paths`, as pip fills them; the folder of the ptxas on PATH and CUDA's usual place; and
    the installed packages.
    """
    packages = lambda folders: [os.path.join(f, "nvidia", name) for f in folders for name in ("cuda_nvcc", "cu13")]
    on_path = shutil.which("ptxas")
    installed = [os.path.dirname(os.path.dirname(os.path.realpath(on_path)))] if on_path else []
    for folder in (*packages(paths), *installed, "/usr/local/cuda", *packages(filter(None, sys.path))):
        parts = os.path.join(folder, "bin", "ptxas"), os.path.join(folder, "nvvm", "libdevice", "libdevice.10.bc")
        if all(map(os.path.isfile, parts)) and os.access(parts[0], os.X_OK):
            return folder
    return None


def ptxas_release(ptxas: pathlib.Path | str) -> str | None:
    """The release of a ptxas, such as `13.0`; None where it does not report one."""
    found = re.search(r"release ([\d.]+)", subprocess.run([ptxas, "--version"], capture_output=True, text=True).stdout)
    return found[1] if found else None

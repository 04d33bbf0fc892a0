"""The network that finds metal as one npz file."""

import dataclasses
import functools
import json
import pathlib

import flax.traverse_util
import jax

from data_pipelines.io import checksums
from data_pipelines.io import files
from data_pipelines.io import parameter_files
from experiments.patients import models
from radgs_jax import errors
from radgs_jax.models import metal

FORMAT = "radgs-metal/1"
NAME = "metal.npz"
"""Its name in the base model's folder."""
REMEDY = "copy the file again, or make it again by experiments.metal"
"""What helps where the checksum does not hold."""
WIDTHS, MAX_WIDTH = 8, 4096
"""Most resolutions of a network, and most channels of one, far beyond any that is used: what a damaged file can ask for."""


def write_finder(path: pathlib.Path | str, finder: metal.MetalFinder, note: str) -> None:
    """Writes a finder atomically, with checksums in it and, where its folder has them, there.

    Args:
      note: one line for people about its origin.
    Raises:
      InputError: it cannot be written.
    """
    header = {"format": FORMAT, "note": note, "config": dataclasses.asdict(finder.config)}
    parameter_files.write(path, header, parameter_files.flat(finder.params))


def read_base() -> metal.MetalFinder | None:
    """The finder of the base model; None where it has none. Raises as `read_finder`."""
    path = models.base_folder() / NAME
    return _read_once(path, path.stat().st_mtime_ns) if path.exists() else None


@functools.lru_cache(1)
def _read_once(path, _changed):
    """`read_finder`, which takes as long as a vertebra's extraction, once for all vertebrae of a patient."""
    return read_finder(path)


def read_finder(path: pathlib.Path | str) -> metal.MetalFinder:
    """Reads a finder.

    Raises:
      InputError: a file of another format, one that was damaged or changed, or parameters that do not fit the configuration or
        are not finite.
    """
    checksums.check_file(path, REMEDY)
    text = str(files.read_npz(path, "header")["header"])
    try:
        header = json.loads(text)
        checksums.check_sealed(path, header, REMEDY)
        config = metal.MetalConfig(float(header["config"]["pixel_mm"]), tuple(header["config"]["widths"]))
        form, digest = header["format"], header["arrays"]
        possible = 1 <= len(config.widths) <= WIDTHS and all(
            type(n) is int and 1 <= n <= MAX_WIDTH for n in config.widths
        )
    except errors.InputError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        errors.fail(path, "header", repr(error)[:80], "the header of a metal network")
    if form != FORMAT or not possible or not 0.1 <= config.pixel_mm <= 100:
        errors.fail(path, "header", text[:80], f"{FORMAT!r} and sizes of a network")
    arrays = parameter_files.read(path, lambda: metal.init(config, jax.random.key(0)))
    if digest != checksums.of_arrays(arrays):
        errors.fail(path, checksums.FIELD, "other arrays", f"those that were written: {REMEDY}")
    return metal.MetalFinder(flax.traverse_util.unflatten_dict(arrays, sep="."), config)

"""A localizer as one npz file."""

import dataclasses
import json
import pathlib

import flax.traverse_util
import jax
import numpy as np

from data_pipelines.io import checksums
from data_pipelines.io import files
from data_pipelines.io import parameter_files
from radgs_jax import errors
from radgs_jax.localization import locate
from radgs_jax.localization import network
from radgs_jax.localization.chain import Chain

LOCALIZER_FORMAT = "radgs-detector/1"
REMEDY = "copy or make the localizer again, or, if it is right, call data_pipelines.io.checksums.renew on it"
"""What helps where a localizer's checksum does not hold."""

LIMITS = {"levels": (1, 28), "widths": (1, 4096), "blocks": (0, 64), "features": (1, 4096)}
"""Smallest and largest values of a network's settings, far beyond any that is used: a bound on what a damaged file can ask for."""


def write_localizer(path: pathlib.Path | str, model: locate.Localizer, note: str) -> None:
    """Writes a localizer atomically, with checksums in it and, where its folder has them, there.

    Args:
      note: one line for people about its origin.
    Raises:
      InputError: it cannot be written.
    """
    chain = {f"chain.{k}": np.asarray(v) for k, v in dataclasses.asdict(model.chain).items()}
    centres = {str(label): np.asarray(centre).tolist() for label, centre in model.centres_ct.items()}
    config = dataclasses.asdict(model.config)
    header = {"format": LOCALIZER_FORMAT, "note": note, "config": config, "centres_ct": centres}
    parameter_files.write(path, header, {**chain, **parameter_files.flat(model.params)})


def _check_config(path, config):
    """Refuses settings that no network has, before one is built of them."""
    lists = {name: getattr(config, name) for name in ("levels", "widths", "blocks")}
    for name, value in lists.items():
        low, high = LIMITS[name]
        whole = isinstance(value, tuple) and all(type(n) is int and low <= n <= high for n in value)
        if not whole or not value or name == "levels" and len(set(value)) < len(value):
            errors.fail(path, f"header: {name}", repr(value)[:80], f"whole numbers from {low} to {high}")
    if len(config.widths) != len(config.blocks):
        errors.fail(path, "header: blocks", len(config.blocks), f"{len(config.widths)}, one per width")
    low, high = LIMITS["features"]
    if type(config.features) is not int or not low <= config.features <= high:
        errors.fail(path, "header: features", repr(config.features)[:80], f"a whole number from {low} to {high}")
    if type(config.pixel_mm) not in (int, float) or not 0.1 <= config.pixel_mm <= 100:
        errors.fail(path, "header: pixel_mm", repr(config.pixel_mm)[:80], "a pixel from 0.1 to 100 mm")


def read_localizer(path: pathlib.Path | str) -> locate.Localizer:
    """Reads a localizer.

    Raises:
      InputError: a file that is not a localizer, another format, a file that was damaged or changed, or parameters that do not fit
        the configuration or are not finite.
    """
    checksums.check_file(path, REMEDY)
    text = str(files.read_npz(path, "header")["header"])
    try:
        header = json.loads(text)
        if isinstance(header, dict) and checksums.FIELD in header:
            checksums.check_sealed(path, header, REMEDY)
        fields = {k: tuple(v) if isinstance(v, list) else v for k, v in header["config"].items()}
        config, form = network.DetectorConfig(**fields), header["format"]
        centres = {int(k): np.array(v, np.float64).reshape(3) for k, v in header["centres_ct"].items()}
        _check_config(path, config)
    except errors.InputError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        errors.fail(path, "header", repr(error)[:80], "a localizer's header")
    if form != LOCALIZER_FORMAT:
        errors.fail(path, "format", repr(form), repr(LOCALIZER_FORMAT))
    arrays = parameter_files.read(path, lambda: network.init(config, jax.random.key(0)))
    names = [field.name for field in dataclasses.fields(Chain)]
    chain = files.read_npz(path, *(f"chain.{name}" for name in names))
    if checksums.FIELD in header:  # localizers of older versions have none, and rely on the CRCs of npz
        if header.get("arrays") != checksums.of_arrays({**arrays, **chain}):
            errors.fail(path, checksums.FIELD, "other arrays", f"those that were written: {REMEDY}")
    values = {name: chain[f"chain.{name}"] for name in names}
    values |= {name: float(values[name]) for name in ("weight", "link")}
    return locate.Localizer(flax.traverse_util.unflatten_dict(arrays, sep="."), config, Chain(**values), centres)

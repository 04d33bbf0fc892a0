"""Parameters of a small network in one npz file: a sealed header, and arrays that are checked when they are read."""

import json
import pathlib
from collections.abc import Callable
from collections.abc import Mapping
from typing import Any

import flax.traverse_util
import jax
import numpy as np

from data_pipelines.io import checksums
from data_pipelines.io import files
from radgs_jax import errors


def write(path: pathlib.Path | str, header: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> None:
    """Writes a header and arrays atomically, with checksums in it and, where its folder has them, there.

    Args:
      header: plain JSON values; arrays: by name, parameters under their paths joined by dots.
    Raises:
      InputError: it cannot be written.
    """
    sealed = checksums.sealed({**header, "arrays": checksums.of_arrays(arrays)})
    files.write_npz(path, header=np.array(json.dumps(sealed)), **arrays)
    checksums.renew(path)


def flat(params: Any) -> dict[str, np.ndarray]:
    """A tree of parameters by their paths, joined by dots."""
    return flax.traverse_util.flatten_dict(jax.device_get(params), sep=".")


def read(path: pathlib.Path | str, init: Callable[[], Any]) -> dict[str, np.ndarray]:
    """The parameters in a file, by their paths.

    Args:
      init: makes parameters of the right names and shapes; it is traced, not run.
    Raises:
      InputError: a missing array, another shape, or values that are not finite.
    """
    like = flax.traverse_util.flatten_dict(jax.eval_shape(init), sep=".")
    arrays = files.read_npz(path, *like)
    for name, leaf in like.items():
        if arrays[name].shape != leaf.shape or not np.isfinite(arrays[name]).all():
            errors.fail(path, name, f"shape {arrays[name].shape} or values not finite", f"finite {leaf.shape}")
    return arrays

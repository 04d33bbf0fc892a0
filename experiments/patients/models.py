"""Models on disk: parameters by Orbax, a JSON manifest and mean shapes."""

import dataclasses
import hashlib
import pathlib
import shutil

import jax
import numpy as np
from jax.experimental import multihost_utils
from orbax.checkpoint import v1 as ocp

from data_pipelines.io import files
from data_pipelines.pairs import identity
from experiments.runtime import kept_programs
from radgs_jax import errors
from radgs_jax.models import radgs_reg
from radgs_jax.models import trained
from radgs_jax.models.config import ModelConfig

MODEL_FORMAT = "radgs-model/1"


def base_folder() -> pathlib.Path:
    """The shipped model: `base/` of the repository, or what was installed with the package.

    Raises:
      InputError: neither is there.
    """
    root = pathlib.Path(__file__).resolve().parents[2]
    for folder in (root / "base", root / "radgs_jax_base"):
        if (folder / "manifest.json").exists():
            return folder
    return errors.fail(root / "base", "manifest.json", "nothing", "the shipped model: install the package again")


def abstract(x):
    """Shape, type and sharding of an array, as Orbax takes them."""
    # A sharding in the abstract tree keeps Orbax from trusting the one in the file, which may be another machine's.
    sharding = x.sharding if isinstance(x, jax.Array) else jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)


def save_model(folder, model, note):
    """Writes a `Model` to `folder`, whole or not at all, in place of what is there; `note` says what it is.

    Wherever this is stopped, `load_model` finds the old model or the new one, if need be under the name of `_aside`, and the
    next call clears up. Every one of jax's processes calls this, with one file system; the model is there when it returns.
    """
    folder = pathlib.Path(folder).resolve()
    temporary = folder.with_name(f".{folder.name}.partial")
    if jax.process_index() == 0:
        _clear(folder, temporary)
        temporary.mkdir(parents=True)
    _wait_for_all(f"{folder} begun")
    ocp.save_pytree(temporary / "params", model.params)
    if jax.process_index() == 0:
        _finish_model(temporary, model, note)
        # No system swaps two folders in one step by a call that all systems have.
        if folder.exists():
            folder.rename(_aside(folder))
        temporary.rename(folder)
        _clear(folder, temporary)
    _wait_for_all(f"{folder} written")


def _aside(folder):
    """Where a model waits, whole, while another takes its place."""
    return folder.with_name(f".{folder.name}.replaced")


def _clear(folder, temporary):
    """Deletes half a model in `temporary`, and the model set aside where `folder` has taken its place."""
    shutil.rmtree(temporary, ignore_errors=True)
    if folder.exists() and _aside(folder).exists():
        # Under this name, so that half a model never bears a name that is read.
        _aside(folder).rename(temporary)
        shutil.rmtree(temporary, ignore_errors=True)


def _found(folder):
    """The folder that a model is to be read from: its own, or where it was set aside when its replacement was stopped."""
    folder = pathlib.Path(folder).resolve()
    return _aside(folder) if not folder.exists() and _aside(folder).exists() else folder


def model_exists(folder):
    """True where `load_model` finds a model."""
    return (_found(folder) / "manifest.json").exists()


def _wait_for_all(place):
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(place)


def _finish_model(temporary, model, note):
    """All of a model that is beside its parameters."""
    # A note to people that names a path of the machine it was written on; models travel.
    (temporary / "params" / "commit_success.txt").unlink(missing_ok=True)
    files.write_npz(
        temporary / "mean_shapes.npz",
        labels=np.array(sorted(model.mean_shapes)),
        shapes=np.stack([model.mean_shapes[k] for k in sorted(model.mean_shapes)]),
    )
    files.write_json(
        temporary / "manifest.json",
        {
            "format": MODEL_FORMAT,
            "note": note,
            "model": dataclasses.asdict(model.config),
            "model_hash": identity.config_hash(model.config),
        },
    )


def load_model(folder):
    """Reads a model.

    Returns:
      `Model`.
    Raises:
      InputError: a folder that is not a model, one of another format, or parameters that are not those of its configuration.
    """
    folder = _found(folder)
    path = folder / "manifest.json"
    manifest = files.read_json(path)
    found = manifest.get("format") if isinstance(manifest, dict) else None
    if found != MODEL_FORMAT:
        errors.fail(path, "format", repr(found), repr(MODEL_FORMAT))
    for field, kind in (("model", dict), ("model_hash", str)):
        if not isinstance(manifest.get(field), kind):
            errors.fail(path, field, repr(manifest.get(field))[:60], f"a {kind.__name__}")
    config = _config(path, manifest["model"])
    if identity.config_hash(config) != manifest["model_hash"]:
        errors.fail(path, "model", "fields that do not match their hash", "an unchanged model configuration")
    shapes = files.read_npz(folder / "mean_shapes.npz", "labels", "shapes")
    like = kept_programs.kept_shapes(_fresh_params, config)
    try:
        params = ocp.load_pytree(folder / "params", jax.tree.map(abstract, like))
    except (ValueError, OSError, KeyError) as error:
        errors.fail(
            folder / "params", "content", str(error).splitlines()[0][:120], "parameters of the manifest's model"
        )
    return trained.Model(params, config, {int(k): v for k, v in zip(shapes["labels"], shapes["shapes"])})


def _fresh_params(config):
    return radgs_reg.init(config, jax.random.key(0))


def _config(path, value):
    known = [field.name for field in dataclasses.fields(ModelConfig)]
    if unknown := sorted(set(value) - set(known)):
        errors.fail(path, f"model.{unknown[0]}", "a field that is not known", f"some of {', '.join(known)}")

    def frozen(item):
        return tuple(frozen(i) for i in item) if isinstance(item, list) else item

    return ModelConfig(**{k: frozen(v) for k, v in value.items()})


def model_hash(model):
    """Digest of a `Model`'s values and configuration, the same wherever and whenever it was saved."""
    digest = hashlib.sha256(identity.config_hash(model.config).encode())
    leaves = [*jax.tree.leaves(model.params), *(model.mean_shapes[k] for k in sorted(model.mean_shapes))]
    for leaf in leaves:
        array = np.ascontiguousarray(leaf)
        digest.update(f"{array.shape} {array.dtype}".encode() + array.tobytes())
    return digest.hexdigest()[:16]

"""Models on disk: a folder with parameters (Orbax), a JSON manifest, mean shapes and checksums."""

import contextlib
import dataclasses
import hashlib
import os
import pathlib
import secrets
import shutil
from collections.abc import Iterator

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp

from data_pipelines.io import checksums
from data_pipelines.io import files
from data_pipelines.io import locks
from data_pipelines.io import processes
from data_pipelines.pairs import identity
from experiments.runtime import kept_programs
from radgs_jax import errors
from radgs_jax.models import radgs_reg
from radgs_jax.models import trained
from radgs_jax.models.config import ModelConfig

MODEL_FORMAT = "radgs-model/1"
MEMBERS = ("manifest.json", "mean_shapes.npz", "params/")
"""What `load_model` reads, as beginnings of paths in a model's folder."""
REMEDY = "copy or make the model again, or, if its files are right, call data_pipelines.io.checksums.seal on the folder"
"""What helps where a checksum does not hold; models of older versions have none."""
SHOWN_CHARACTERS = 120
"""Maximum length of another library's message in an error message, so that it stays one line."""


def base_folder() -> pathlib.Path:
    """Folder of the shipped model: `base/` of the repository, or the one installed with the package.

    Raises:
      InputError: neither exists.
    """
    root = pathlib.Path(__file__).resolve().parents[2]
    for folder in (root / "base", root / "radgs_jax_base"):
        if (folder / "manifest.json").exists():
            return folder
    return errors.fail(root / "base", "manifest.json", "nothing", "the shipped model: install the package again")


def abstract(x: np.ndarray | jax.Array | jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    """Shape, type and sharding of an array, as Orbax takes them."""
    # Without a sharding here, Orbax would use the one in the file, which may name another machine's devices.
    sharding = x.sharding if isinstance(x, jax.Array) else jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)


@contextlib.contextmanager
def writing(path: pathlib.Path, field: str) -> Iterator[None]:
    """`files.writing` for a block in which Orbax writes: its library reports a full disk as a ValueError.

    Raises:
      InputError: the system's error in the block.
    """
    try:
        with files.writing(path, field):
            yield
    except errors.InputError:
        raise
    except (ValueError, RuntimeError) as error:
        if "os_error_code" not in str(error):
            raise
        reason = str(error).partition(" [os_error_code")[0].rpartition(": ")[2]
        errors.fail(path, field, reason, "a place that can be written")


def save_model(folder: pathlib.Path | str, model: trained.Model, note: str) -> None:
    """Writes a model to `folder` and replaces the one that is there.

    Wherever this is stopped, `load_model` finds either the old or the new model, complete; the next call removes leftovers. Only
    one process at a time can replace a model.
    All of jax's processes must call this, on a shared file system; it returns when the model is complete.

    Args:
      note: one line for people about the model's origin.
    Raises:
      InputError: another process replaces this model, it cannot be written, or it has `own_backbones`.
    """
    for own in model.config.own_backbones:
        wanted = "a backbone with a name in radgs_jax/models/backbones.py, by which a file can be read again"
        errors.fail(folder, "model", f"the class {own.__name__}", wanted)
    folder = pathlib.Path(os.path.realpath(folder))
    first = processes.is_first()
    temporary = locks.beside(folder, f"{_token()}.partial")
    with contextlib.ExitStack() as stack:
        if first:
            files.make_folder(folder.parent)
            held = stack.enter_context(locks.hold(locks.beside(folder, "lock"), folder))
            with files.writing(folder, "folder"):
                _clear(folder, temporary)
                for old in files.unfinished(folder) if held else []:
                    shutil.rmtree(old)
                temporary.mkdir(parents=True)
        processes.wait_for_all(f"{folder} begun")
        try:
            with writing(folder, "parameters"):
                ocp.save_pytree(temporary / "params", model.params)
            if first:
                _finish_model(temporary, model, note)
                with files.writing(folder, "folder"):
                    # There is no portable call that swaps two folders atomically, so the old one is set aside first.
                    if folder.exists():
                        folder.rename(_aside(folder))
                    temporary.rename(folder)
                    files.synchronise(folder.parent)
                    _clear(folder, temporary)
        except Exception:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        processes.wait_for_all(f"{folder} written")


def _alone():
    """Inside, Orbax waits for none of jax's other processes, which may not read at all."""
    if not processes.several():
        return contextlib.nullcontext()
    own = jax.process_index()
    options = ocp.options.MultiprocessingOptions(
        primary_host=own, active_processes={own}, barrier_sync_key_prefix=f"process_{own}"
    )
    return ocp.Context(multiprocessing_options=options)


def _token():
    """Random characters of a name, the same in all of jax's processes."""
    return f"{processes.agreed(secrets.randbits(31)):08x}"


def _aside(folder):
    """Path of the old model, complete, while the new one takes its place."""
    return folder.with_name(f".{folder.name}.replaced")


def _clear(folder, temporary):
    """Deletes an incomplete model in `temporary` and, where `folder` exists, the model that was set aside."""
    shutil.rmtree(temporary, ignore_errors=True)
    if folder.exists() and _aside(folder).exists():
        # Renamed first, so that a half-deleted model never has a name that `load_model` reads.
        _aside(folder).rename(temporary)
        shutil.rmtree(temporary, ignore_errors=True)


def _found(folder):
    """The folder to read a model from: its own, or the one set aside by a replacement that was stopped."""
    folder = pathlib.Path(os.path.realpath(folder))
    return _aside(folder) if not folder.exists() and _aside(folder).exists() else folder


def model_exists(folder: pathlib.Path | str) -> bool:
    """Whether `load_model` finds a model."""
    return (_found(folder) / "manifest.json").exists()


def _finish_model(temporary, model, note):
    """Writes all of a model except its parameters."""
    # Orbax's note contains a path of this machine; a model is copied to others.
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
    for path in files.listed(temporary / "params"):
        files.synchronise(path)
    checksums.seal(temporary)


def load_model(folder: pathlib.Path | str) -> trained.Model:
    """Reads a model.

    Raises:
      InputError: a folder that is not a model, another format, files that were damaged or changed, or parameters that do not fit
        the configuration or are not finite.
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
    checksums.verify(folder, REMEDY, MEMBERS)
    shapes = files.read_npz(folder / "mean_shapes.npz", "labels", "shapes")
    like = kept_programs.kept_shapes(_fresh_params, config)
    try:
        with _alone():
            params = ocp.load_pytree(folder / "params", jax.tree.map(abstract, like))
    except Exception as error:  # the type depends on what is wrong
        line = f"{type(error).__name__}: {error}"[:SHOWN_CHARACTERS]
        errors.fail(folder / "params", "content", line, "parameters of the manifest's model")
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        if not np.isfinite(np.asarray(leaf)).all():
            name = jax.tree_util.keystr(path, simple=True, separator=".")
            errors.fail(folder / "params", name, "values that are not finite", "finite ones: train the model again")
    if not np.isfinite(shapes["shapes"].astype(np.float32)).all():
        errors.fail(folder / "mean_shapes.npz", "'shapes'", "values that are not finite", "finite ones")
    return trained.Model(params, config, {int(k): v for k, v in zip(shapes["labels"], shapes["shapes"])})


def _fresh_params(config):
    return radgs_reg.init(config, jax.random.key(0))


def _config(path, value):
    known = [field.name for field in dataclasses.fields(ModelConfig)]
    if unknown := sorted(set(value) - set(known)):
        errors.fail(path, f"model.{unknown[0]}", "a field that is not known", f"some of {', '.join(known)}")

    def frozen(item):
        return tuple(frozen(i) for i in item) if isinstance(item, list) else item

    try:
        return ModelConfig(**{k: frozen(v) for k, v in value.items()})
    except TypeError as error:
        return errors.fail(path, "model", str(error).splitlines()[0][:120], "fields of the types that were written")


def model_hash(model: trained.Model) -> str:
    """Digest of a model's values and configuration, independent of where and when it was saved."""
    digest = hashlib.sha256(identity.config_hash(model.config).encode())
    leaves = [*jax.tree.leaves(model.params), *(model.mean_shapes[k] for k in sorted(model.mean_shapes))]
    for leaf in leaves:
        array = np.ascontiguousarray(leaf)
        digest.update(f"{array.shape} {array.dtype}".encode() + array.tobytes())
    return digest.hexdigest()[:16]

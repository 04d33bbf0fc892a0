"""Reading with one clear line on bad input, and writing that never leaves a half-written file."""

import contextlib
import gzip
import hashlib
import json
import os
import pathlib
import tempfile
import zlib

import nibabel
import numpy as np


class InputError(ValueError):
    """Input that a user can mend. Its text is one line: file, field, value found, value wanted."""


def fail(path, field, found, wanted):
    """Raises InputError in the project's one form."""
    raise InputError(f"{path}: {field}: found {found}, wanted {wanted}".replace("\n", " "))


@contextlib.contextmanager
def replacing(path):
    """Yields a temporary path in the same folder that becomes `path` when the block ends without an error."""
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".", suffix="".join(path.suffixes[-2:]))
    os.close(handle)
    try:
        yield pathlib.Path(temporary)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)


def write_json(path, value):
    """Writes `value` as JSON, atomically."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1, allow_nan=False) + "\n")


def write_npz(path, **arrays):
    """Writes a compressed npz of plain arrays, atomically."""
    with replacing(path) as temporary:
        with open(temporary, "wb") as stream:
            np.savez_compressed(stream, **arrays)


def write_nifti(path, array, affine):
    """Writes a NIfTI volume (RAS+ mm affine), gzip level 1, atomically; the same bytes for the same volume."""
    image = nibabel.Nifti1Image(np.asarray(array), np.asarray(affine, np.float64))
    image.header.set_xyzt_units("mm")
    with replacing(path) as temporary:
        temporary.write_bytes(gzip.compress(image.to_bytes(), 1, mtime=0))


def read_json(path):
    """The JSON value of a file.

    Raises:
      InputError: missing, unreadable or not JSON.
    """
    try:
        return json.loads(pathlib.Path(path).read_text())
    except FileNotFoundError:
        fail(path, "file", "nothing", "a JSON file")
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        fail(path, "content", f"{error}", "valid JSON")


def read_npz(path, *names):
    """The named arrays of an npz file, as a dict.

    Raises:
      InputError: missing or truncated file, a missing array, or one that holds Python objects.
    """
    try:
        with np.load(path, allow_pickle=False) as archive:
            absent = [name for name in names if name not in archive.files]
            if absent:
                fail(path, "array", f"only {archive.files}", f"'{absent[0]}'")
            return {name: archive[name] for name in names}
    except FileNotFoundError:
        fail(path, "file", "nothing", "an npz file")
    except InputError:
        raise
    except Exception as error:  # zipfile, zlib and numpy each raise their own kinds on damaged files
        fail(path, "content", f"{type(error).__name__}: {error}", "a complete npz file of plain arrays")


def read_npy(path):
    """The array of an npy file.

    Raises:
      InputError: missing, truncated, or an array of Python objects.
    """
    try:
        return np.load(path, allow_pickle=False)
    except FileNotFoundError:
        fail(path, "file", "nothing", "an npy file")
    except Exception as error:
        fail(path, "content", f"{type(error).__name__}: {error}", "a complete npy file of numbers")


def read_nifti(path):
    """A NIfTI volume in RAS+ order: array (X, Y, Z) as stored or scaled, and its 4x4 affine.

    Raises:
      InputError: missing or truncated file, not 3D, or an affine that is not finite and invertible.
    """
    try:
        image = nibabel.as_closest_canonical(nibabel.load(path))
        array = np.asarray(image.dataobj)
    except FileNotFoundError:
        fail(path, "file", "nothing", "a NIfTI file")
    except (
        OSError,
        EOFError,
        zlib.error,
        ValueError,
        nibabel.filebasedimages.ImageFileError,
        nibabel.spatialimages.HeaderDataError,
        np.linalg.LinAlgError,
    ) as error:
        fail(path, "content", f"{type(error).__name__}: {error}", "a complete NIfTI volume")
    if array.ndim == 4 and array.shape[3] == 1:
        array = array[..., 0]
    if array.ndim != 3:
        fail(path, "shape", array.shape, "three axes")
    affine = np.asarray(image.affine, np.float64)
    if not np.isfinite(affine).all() or abs(np.linalg.det(affine[:3, :3])) < 1e-6:
        fail(path, "affine", affine.tolist(), "a finite, invertible 4x4 matrix")
    return array, affine


def sha256(path):
    """Hex digest of a file.

    Raises:
      InputError: a missing file.
    """
    try:
        with open(path, "rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        fail(path, "file", error.strerror, "a readable file")

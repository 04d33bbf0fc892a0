"""Vertebrae for a model that is not trained any further: extracted from a scan, and kept in the user's cache."""

import contextlib
import functools
import hashlib
import io
import pathlib
from collections.abc import Callable

import numpy as np

from data_pipelines.ct import extraction
from data_pipelines.ct import hounsfield
from data_pipelines.ct import scans
from data_pipelines.ct import whole_body
from experiments.patients import metal_files
from experiments.patients import models
from experiments.patients.workdir import base_rule
from experiments.patients.workdir import ScanDigests
from experiments.patients.workdir import Target
from experiments.patients.workdir import VERTEBRA_ARRAYS
from experiments.patients.workdir import vertebra_arrays
from experiments.patients.workdir import vertebra_of
from experiments.runtime import sealed_files
from kernels.common import private_cache
from radgs_jax.models.trained import Model
from radgs_jax.registration import confidence
from radgs_jax.registration.gauss_newton import RefineConfig
from radgs_jax.registration.parts import on_device_parts
from radgs_jax.registration.prepared import fine_cloud
from radgs_jax.registration.prepared import Prepared
from radgs_jax.registration.search import SearchConfig

KEPT = "vertebrae"
"""Folder of the user's cache with a file for each vertebra, named by everything that it was made from. It may be deleted."""
KEPT_BYTES = 2 * 2**30
"""Size of all of them, bytes: about 100. Half holds the vertebrae of three patients; twice is much for a cache."""
KEPT_CHARACTERS = 16
"""Length of the digest of the code in their names: 64 bits, since a few are compared and nobody makes them up."""
PACKAGES = ("data_pipelines", "radgs_jax")
"""Packages whose code vertebrae are extracted by."""

BodyReader = Callable[[Target], tuple[scans.Scan, whole_body.WholeBody]]
"""A function that reads a target's scan, and the scan at `whole_body.BODY_MM`."""


def prepare_untrained(
    model: Model,
    scan: scans.Scan,
    label: int,
    rule: confidence.AcceptanceRule | None = None,
    refine: RefineConfig = RefineConfig(),
    search: SearchConfig = SearchConfig(),
    whole: whole_body.WholeBody | None = None,
    mask_path: pathlib.Path | str = "mask",
) -> Prepared:
    """A vertebra of a scan in memory, ready to register with a model that is not trained any further.

    Args:
      label: VerSe number.
      rule, refine, search: as in `Prepared`.
      whole: the scan at `whole_body.BODY_MM`, where several vertebrae share it; None makes it.
      mask_path: the name of the mask in error messages.
    Raises:
      InputError: an absent or cut vertebra, or numbers that are no HU.
    """
    hounsfield.check("CT", scan.hu, scan.labels, scan.ct_from_index, scan.boxes)
    whole = whole_body.WholeBody(scan, whole_body.BODY_MM) if whole is None else whole
    vertebra, parts = _extracted(scan, whole, label, model.config.gaussians, mask_path)
    cloud = fine_cloud(vertebra)
    return Prepared(model, vertebra, cloud, on_device_parts(parts), refine, search, metal_files.read_base(), rule)


def _extracted(scan, whole, label, count, mask_path):
    """A vertebra of `count` Gaussians and its parts."""
    vertebra = extraction.extract(scan, label, count, mask_path)
    return vertebra, whole_body.moving_parts(whole, vertebra)


def body_reader() -> BodyReader:
    """A function that reads a target's scan; it caches the latest scan and raises as `scans.read_scan`."""

    @functools.lru_cache(1)
    def read(ct, mask, patient, labels):
        scan = scans.read_scan(ct, mask, patient, labels)
        return scan, whole_body.WholeBody(scan, whole_body.BODY_MM)

    return lambda target: read(target.ct, target.mask, target.patient, target.labels)


def untrained_loader(
    model: Model,
    refine: RefineConfig,
    rule: confidence.AcceptanceRule | None = None,
    digests: ScanDigests | None = None,
    body: BodyReader | None = None,
) -> Callable[[Target], Prepared]:
    """A function from a target to the result of `prepare_untrained`; it raises as that and `scans.read_scan`.

    Args:
      digests: of scans, by which what is extracted is kept in the user's cache; None keeps nothing.
      body: reads scans, where the caller also needs them; None makes one.
    """
    body = body_reader() if body is None else body
    count, finder = model.config.gaussians, functools.cache(metal_files.read_base)

    def arrays(target: Target) -> dict[str, np.ndarray]:
        scan, whole = body(target)
        return vertebra_arrays(*_extracted(scan, whole, target.label, count, target.mask))

    def kept(target: Target, place: pathlib.Path) -> dict[str, np.ndarray]:
        assert digests is not None
        path = place / f"{digests.of(target)}-{target.label}-{_made_by(count)}.npz"

        def make():
            stream = io.BytesIO()
            np.savez(stream, **arrays(target))
            _drop_oldest(place)
            return stream.getvalue()

        return sealed_files.from_file(path, _read, make)

    def of_target(target: Target) -> Prepared:
        place = None if digests is None else private_cache.folder(KEPT)
        found = arrays(target) if place is None else kept(target, place)
        vertebra, fine, parts = vertebra_of(target.label, found, target.ct)
        parts = on_device_parts(parts)
        return Prepared(model, vertebra, fine, parts, refine, SearchConfig(), finder(), rule)

    return of_target


def shipped_loader(digests: ScanDigests | None, body: BodyReader | None = None) -> Callable[[Target], Prepared]:
    """`untrained_loader` with the shipped network and its acceptance rule.

    Raises:
      InputError: as `models.load_model` and `workdir.base_rule`.
    """
    base, refine = models.base_folder(), RefineConfig()
    return untrained_loader(models.load_model(base), refine, base_rule(base, refine), digests, body)


def _read(data):
    with np.load(io.BytesIO(data), allow_pickle=False) as found:
        return {name: found[name] for name in VERTEBRA_ARRAYS}


def _made_by(count):
    """Digest of what a vertebra depends on beside its scan: the code, and its number of Gaussians."""
    made_by = sealed_files.sources(PACKAGES), count
    return hashlib.sha256(repr(made_by).encode()).hexdigest()[:KEPT_CHARACTERS]


def _drop_oldest(place):
    """Deletes the vertebrae that were used longest ago, beyond KEPT_BYTES."""
    with contextlib.suppress(OSError):  # another process may delete them, too
        oldest_first = sorted((path.stat().st_atime, path.stat().st_size, path) for path in place.glob("*.npz"))
        spare = sum(size for _, size, _ in oldest_first) - KEPT_BYTES
        for _, size, path in oldest_first:
            if spare <= 0:
                break
            path.unlink()
            spare -= size

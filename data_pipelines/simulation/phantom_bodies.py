"""Phantoms as bodies that can be simulated, and how their X-rays are stored."""

import numpy as np

from data_pipelines.ct import scans
from data_pipelines.pairs import identity
from data_pipelines.phantom import generate
from data_pipelines.simulation.articulated_body import ArticulatedBody

STORED_RANGE = (-30.0, 60.0)
"""Range that line integrals are clipped to before they are stored as float16. Chosen by hand: half of it would cut off
metal; float16 would hold twice of it as well."""


def phantom_body(archive: identity.Archive, seed: int, config: generate.PhantomConfig) -> ArticulatedBody:
    """The body of a phantom, as `Archive.keep` calls it; `archive` is unused."""
    made = generate.make_phantom(seed, config)
    return ArticulatedBody(scans.Scan(f"phantom{seed}", made.hu.astype(np.float32), made.mask, made.affine))


def stored(line_integrals: np.ndarray) -> np.ndarray:
    """Line integrals as they are stored: clipped to `STORED_RANGE`, float16."""
    return np.clip(line_integrals, *STORED_RANGE).astype(np.float16)

"""Types for annotations: arrays, as in `Float[Array, "views height width"]` (jaxtyping), and names of implementations.

Array types are checked in the tests only.
"""

from collections.abc import Sequence
from typing import Any
from typing import Literal
from typing import TYPE_CHECKING

import jax
import numpy as np

Array = jax.Array | np.ndarray
"""What public functions take: device arrays, tracers or numpy arrays."""

ImplementationName = Literal["ffi_cpu", "pallas_tpu", "pallas_triton", "xla"]
"""Every backend that an operator may have; `BACKENDS` of its `api` holds those that it has."""

if TYPE_CHECKING:
    Leaf = jax.Array
    Implementation = ImplementationName | Sequence[ImplementationName] | None
else:
    Leaf = Any
    # At run time an operator reports an unknown name itself, as a ValueError that lists the known ones.
    Implementation = str | Sequence[str] | None
"""`Leaf` is a field of a pytree, where jax also puts shapes, axes and placeholders. `Implementation` is the argument
`implementation=` of every operator: one name, several in the order in which to try them, or None for the best available."""

"""Types of arrays, for annotations such as `Float[Array, "views height width"]` (jaxtyping). Checked in the tests only."""

from typing import Any
from typing import TYPE_CHECKING

import jax
import numpy as np

Array = jax.Array | np.ndarray
"""What public functions take: arrays on a device, traced ones, or numpy's."""

if TYPE_CHECKING:
    Leaf = jax.Array
else:
    Leaf = Any
"""A field of a pytree. At run time jax puts other things there, too: shapes, axes, placeholders."""

"""Names for the types that appear in public signatures."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from jaxtyping import Array, Float, Key, UInt32

type PRNGKey = Key[Array, ""] | UInt32[Array, "2"]
"""A JAX random key, new style (`jax.random.key`) or old."""

type PRNGKeys = Key[Array, "_"] | UInt32[Array, "_ 2"]
"""Several keys, one per lane."""

type Numbers = Array | np.ndarray
"""An array of JAX's, or one of NumPy's that lies on the host."""

type Program = Callable[..., Any]
"""A NumPyro program: a callable that draws sites and collects rewards."""

type Sites = Mapping[str, Numbers]
"""Values of sample sites, by name."""

type Params = dict[str, Any]
"""Unconstrained values of `numpyro.param` sites, by name; each may be a pytree."""

type Beta = float | Float[Array | np.ndarray, "*beta"]
"""Temperature, in reward units per nat."""

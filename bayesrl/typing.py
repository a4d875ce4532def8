"""Names for the types that appear in public signatures."""

from collections.abc import Callable, Mapping
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key, UInt32

from bayesrl.annotations import LARGEST, LEAST, Must
from bayesrl.errors import PolicyError


def _is_key(value: Any) -> bool:
    if not isinstance(value, jax.Array):
        return False
    return value.shape == () if jnp.issubdtype(value.dtype, jax.dtypes.prng_key) else _is_old_key(value)


def _is_old_key(value: jax.Array) -> bool:
    return value.dtype == jnp.uint32 and value.shape == (2,)


def are_temperatures(value: Any) -> bool:
    """Whether a value is a number above 0, or an array that holds such; traced ones pass."""
    if isinstance(value, jax.core.Tracer):
        return True
    if isinstance(value, bool | np.bool_) or not isinstance(value, int | float | np.number | np.ndarray | jax.Array):
        return False
    try:
        held = np.asarray(value, float) if np.asarray(value).dtype.kind not in "bcOmMUS" else np.zeros(1)
    except (TypeError, ValueError, OverflowError):
        return False
    return held.size > 0 and bool(np.all((held > LEAST) & (held < LARGEST)))


type PRNGKey = Annotated[
    Key[Array, ""] | UInt32[Array, "2"], Must("a JAX random key: jax.random.key(seed)", _is_key, alone=True)
]
"""A JAX random key, new style (`jax.random.key`) or old."""

type PRNGKeys = Key[Array, "_"] | UInt32[Array, "_ 2"]
"""Several keys, one per lane."""

type Numbers = Array | np.ndarray
"""An array of JAX's, or one of NumPy's that lies on the host."""

type Program = Annotated[
    Callable[..., Any],
    Must(
        "a NumPyro program: a function that calls numpyro.sample and bayesrl.reward",
        lambda program: not isinstance(program, type) and not hasattr(program, "log_prob"),
        error=PolicyError,
    ),
]
"""A NumPyro program: a callable that draws sites and collects rewards."""

type Sites = Mapping[str, Numbers]
"""Values of sample sites, by name."""

type Params = dict[str, Any]
"""Unconstrained values of `numpyro.param` sites, by name; each may be a pytree."""

type Beta = Annotated[
    float | Float[Array | np.ndarray, "*beta"],
    Must(
        "a temperature in reward units per nat: a number above 0, or an array of them",
        are_temperatures,
        alone=True,
        error=PolicyError,
    ),
]
"""Temperature, in reward units per nat."""

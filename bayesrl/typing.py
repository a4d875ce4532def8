"""Names for the types that appear in public signatures."""

from collections.abc import Callable, Mapping
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key, UInt32

from bayesrl.argument_types import Requirement
from bayesrl.errors import PolicyError
from bayesrl.value_checks import LEAST, are_finite, array_of, is_traced


def _is_key(value: Any) -> bool:
    if not isinstance(value, jax.Array):
        return False
    typed = jnp.issubdtype(value.dtype, jax.dtypes.prng_key)
    return value.shape == () if typed else value.dtype == jnp.uint32 and value.shape == (2,)


def _are_at_least(value: Any, least: float) -> bool:
    """Whether all numbers in a value equal `least` or are large enough for single precision."""
    array = array_of(value)
    # An old-style key consists of numbers too, and is easily passed instead of a temperature.
    if not array.size or (array.dtype == np.uint32 and array.shape == (2,)):
        return False
    return are_finite(value) and (is_traced(value) or bool(((array >= LEAST) | (array == least)).all()))


type PRNGKey = Annotated[
    Key[Array, ""] | UInt32[Array, "2"], Requirement("a JAX random key: jax.random.key(seed)", _is_key, any_type=True)
]
"""A JAX random key, new style (`jax.random.key`) or old."""

type PRNGKeys = Key[Array, "_"] | UInt32[Array, "_ 2"]
"""Several keys, one per lane."""

type Numbers = Array | np.ndarray
"""A JAX array, or a NumPy array on the host."""

type Program = Annotated[
    Callable[..., Any],
    Requirement(
        "a NumPyro program: a function that calls numpyro.sample and bayesrl.reward",
        lambda program: not isinstance(program, type) and not hasattr(program, "log_prob"),
        error=PolicyError,
    ),
]
"""A NumPyro program: a callable that draws sites and collects rewards."""

type SiteArrays = Mapping[str, Numbers]
"""Values of sample sites, by name."""

type Params = dict[str, Any]
"""Unconstrained values of `numpyro.param` sites, by name; each may be a pytree."""

type Beta = Annotated[
    float | Float[Array | np.ndarray, "*beta"],
    Requirement(
        "a temperature in reward units per nat: a number above 0, or an array of them",
        lambda value: not isinstance(value, list | tuple) and _are_at_least(value, LEAST),
        any_type=True,
        error=PolicyError,
    ),
]
"""Temperature, in reward units per nat."""

type BetaOrZero = Annotated[
    Any,
    Requirement(
        "a temperature in reward units per nat: a number above 0 or 0, or an array of them",
        lambda value: _are_at_least(value, 0.0),
        any_type=True,
    ),
]
"""Temperature, in reward units per nat; 0 counts only the reward."""

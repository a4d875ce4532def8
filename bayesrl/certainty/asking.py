"""What is asked of certainty and of the report, looked at before anything is computed: types and numbers."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bayesrl.core.draws import is_count
from bayesrl.errors import EngineError, PolicyError
from bayesrl.posterior import Posterior


def check_key(key: Any) -> None:
    """Refuse what is no single JAX key, new style or old.

    Raises:
        EngineError: it is something else, such as a seed.
    """
    new = isinstance(key, jax.Array) and jnp.issubdtype(key.dtype, jax.dtypes.prng_key) and key.shape == ()
    old = isinstance(key, jax.Array) and key.dtype == jnp.uint32 and key.shape == (2,)
    if not (new or old):
        raise EngineError(f"key={key!r} is not a JAX random key; pass jax.random.key(seed)")


def check_posterior(posterior: Any, what: str) -> None:
    """Refuse what is no fit.

    Args:
        posterior: perhaps one.
        what: the caller.

    Raises:
        PolicyError: it is something else, such as draws of an engine.
    """
    if not isinstance(posterior, Posterior):
        raise PolicyError(f"{what} got {told(posterior)} for a posterior; pass what bayesrl.fit or bayesrl.load gave")


def check_named(posteriors: Any, what: str) -> None:
    """Refuse what are no fits by name.

    Args:
        posteriors: perhaps such.
        what: the caller.

    Raises:
        PolicyError: it is no mapping, or a name is no text, or a value no posterior.
    """
    if not isinstance(posteriors, Mapping):
        raise PolicyError(f"{what} got {told(posteriors)}; pass fits by name, such as {{'a': a, 'b': b}}")
    for name, posterior in posteriors.items():
        if not isinstance(name, str):
            raise PolicyError(f"{what} got the name {name!r} of a fit, which is no text; use {str(name)!r}")
        check_posterior(posterior, f"{what}, under {name!r},")


def check_count(name: str, value: Any, *, least: int = 1) -> None:
    """Refuse what is no whole number of at least so many.

    Raises:
        EngineError: it is none.
    """
    if not is_count(value, least=least):
        raise EngineError(f"{name}={value!r}; use a whole number of at least {least}")


def check_bound(reward_bound: Any) -> None:
    """Refuse a bound of rewards that bounds nothing.

    Raises:
        EngineError: it is no finite number.
    """
    if reward_bound is None:
        return
    number = isinstance(reward_bound, int | float | np.number | np.ndarray | jax.Array) and np.ndim(reward_bound) == 0
    if not number or not np.isfinite(np.asarray(reward_bound, float)):
        raise EngineError(
            f"reward_bound={reward_bound!r} is no finite number; "
            "pass the greatest total reward that a draw can earn in a context, or None"
        )


def check_arguments(held_out: Any) -> None:
    """Refuse other arguments of a program that are no tuple: an array would be taken apart by its rows.

    Raises:
        PolicyError: they are none.
    """
    if held_out is not None and not isinstance(held_out, tuple):
        raise PolicyError(f"held_out is {told(held_out)}; pass a tuple of all arguments, such as held_out=(data,)")


def told(value: Any) -> str:
    """Say what a value is, in a few words."""
    if value is None:
        return "None"
    kind = "array" if isinstance(value, jax.Array | np.ndarray) else type(value).__name__
    return f"{'an' if kind[0] in 'AEIOUaeiou' else 'a'} {kind}"

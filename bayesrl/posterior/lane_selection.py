"""Select single fits from arrays that hold several."""

from typing import Any

import jax.numpy as jnp
import numpy as np


def take(x: Any, index: int, axis: int) -> Any:
    """Take one temperature, without its axis."""
    return np.take(x, index, axis=axis) if isinstance(x, np.ndarray) else jnp.take(x, index, axis=axis)


def take_restart(x: Any, index: np.ndarray, axis: int) -> Any:
    """Take one restart per β, keeping the axis; `axis` is where (*beta, restart) starts."""
    where = axis + index.ndim
    lead = index.reshape((1,) * axis + index.shape + (1,) * (np.ndim(x) - axis - index.ndim))
    if isinstance(x, np.ndarray):
        return np.take_along_axis(x, lead, axis=where)
    return jnp.take_along_axis(jnp.asarray(x), lead, axis=where)

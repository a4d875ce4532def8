"""Mini-batches of rows at a cost that does not grow with the number of rows."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from bayesrl.compilation.random_keys import split
from bayesrl.preferences.score_models import as_whole
from bayesrl.typing import PRNGKey

_STRIDES = 64


def choose_rows(key: PRNGKey, count: int, size: int) -> Array:
    """Choose `size` of `count` rows, each as likely as any other, and none twice.

    They are evenly spaced on a circle on which all rows lie in a fixed random order: by one of several strides that
    share no factor with `count`, from a random start. A permutation of all rows can take longer than a step.
    """
    rng = np.random.default_rng(0)
    order = rng.permutation(count)
    # A multiple of the stride must fit into 32 bits.
    most = max(min(count, 2**31 // size), 2)
    strides = [int(one) for one in rng.integers(1, most, 8 * _STRIDES) if math.gcd(int(one), count) == 1]
    stride_key, start_key = split(key, 2)
    stride = jax.random.choice(stride_key, as_whole((strides or [1])[:_STRIDES]))
    start = jax.random.randint(start_key, (), 0, count)
    # Two remainders, so that no sum exceeds 32 bits.
    return as_whole(order)[((jnp.arange(size) * stride) % count + start) % count]

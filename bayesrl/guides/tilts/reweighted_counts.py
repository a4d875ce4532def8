"""Reweight counts one by one in the range of the prior, and by their natural tilt beyond it."""

from typing import Any

import jax
import jax.numpy as jnp
import numpyro.distributions as dist
from jax import Array
from jax.scipy.special import logsumexp
from numpyro.distributions.batch_util import promote_batch_shape

from bayesrl.guides.tilts.distributions import promote_with_base

MAX_KNOTS = 64
"""With more counts than this, the weights are linear interpolations between this many knots."""


def num_knots(size: int) -> int:
    """Count the free weights of a window of `size` counts."""
    return min(size, MAX_KNOTS)


class ReweightedCounts(dist.Distribution):
    """A distribution over counts that redraws the draws inside a window, with free weights.

    q(x) = P(window) · base(x)·exp(φ(x)) / Σ_window base·exp(φ) inside the window, base(x) outside, where P(window) is
    that of the base. Zero weights leave the base as it is; the base's own tilt moves mass into and out of the window.

    Args:
        base: univariate, over integers, [*batch].
        weights: φ at knots that divide the window evenly, nats, [*batch, knots].
        low: first count of the window.
        size: number of counts in the window.
    """

    arg_constraints: dict[str, Any] = {}  # noqa: RUF012  (NumPyro's protocol)
    pytree_data_fields = ("base", "weights")
    pytree_aux_fields = ("low", "size")

    def __init__(self, base: Any, weights: Array, low: int, size: int, *, validate_args: bool | None = None) -> None:
        self.base, self.weights, self.low, self.size = base, weights, low, size
        super().__init__(base.batch_shape, validate_args=validate_args)

    @property
    def support(self) -> Any:
        """The base's support."""
        return self.base.support

    @property
    def stands_for(self) -> Any:
        """The base, whose terms the density has."""
        return self.base

    def sample(self, key: Any, sample_shape: tuple[int, ...] = ()) -> Array:
        """Draw [*sample_shape, *batch]."""
        outer, inner = jax.random.split(key)
        drawn = jnp.asarray(self.base.sample(outer, sample_shape))
        again = jax.random.categorical(inner, self._inside(), shape=sample_shape + self.batch_shape) + self.low
        return jnp.where(self._holds(drawn), again.astype(drawn.dtype), drawn)

    def log_prob(self, value: Array, intermediates: Any = None) -> Array:
        """Log-probability, nats."""
        plain = self._log_base()
        inside = plain + self._spread()
        shift = logsumexp(plain, -1) - logsumexp(inside, -1)
        index = jnp.clip(jnp.asarray(value) - self.low, 0, self.size - 1).astype(jnp.int32)
        shape = jnp.broadcast_shapes(index.shape, self.batch_shape)
        weights = jnp.broadcast_to(self._spread(), (*shape, self.size))
        own = jnp.take_along_axis(weights, jnp.broadcast_to(index, shape)[..., None], -1)[..., 0]
        result: Array = self.base.log_prob(value) + jnp.where(self._holds(value), own + shift, 0.0)
        return result

    def _holds(self, value: Any) -> Array:
        return (value >= self.low) & (value < self.low + self.size)

    def _inside(self) -> Array:
        return self._log_base() + self._spread()

    def _log_base(self) -> Array:
        """Log-probabilities of the base in the window, [*batch, size]."""
        counts = jnp.arange(self.low, self.low + self.size).reshape((-1,) + (1,) * len(self.batch_shape))
        scores = self.base.log_prob(jnp.broadcast_to(counts, (self.size, *self.batch_shape)))
        # Finite even where the base has no mass in the window, or `log_prob` would subtract −inf from −inf.
        return jnp.maximum(jnp.moveaxis(scores, 0, -1), -1e30)

    def _spread(self) -> Array:
        """φ of every count of the window, [*batch, size]."""
        knots = self.weights.shape[-1]
        if knots == self.size:
            return self.weights
        place = jnp.linspace(0.0, knots - 1.0, self.size)
        below = jnp.clip(jnp.floor(place), 0, knots - 2).astype(jnp.int32)
        part = place - below
        return (1 - part) * self.weights[..., below] + part * self.weights[..., below + 1]


promote_batch_shape.register(ReweightedCounts, promote_with_base)

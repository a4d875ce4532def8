"""Split Gamma, Beta and Dirichlet distributions of small concentrations into parts, and tilt each part.

Nearly all mass of a Dirichlet(.1, .1, .1) lies at its corners. A reward moves mass between the corners, or into the
middle, without changing the shape at each corner; a change of concentration would change that too. Since Σ x_i = 1,

    Dir(a) = Σ_|m|=k  (k over m) · Π_i (a_i)_(m_i) / (Σ a)_(k) · Dir(a + m),

with (a)_(k) = a·(a + 1)⋯(a + k − 1): a mixture with a part at each corner and, for k = 2, also parts in between. A Beta
is the first component of a Dirichlet of two. A Gamma splits by e⁻ʳˣ = e⁻²ʳˣ + (e⁻ʳˣ − e⁻²ʳˣ) into a part at 0 and one
away from it.
"""

import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jax import Array
from jax.scipy.special import gammaln

from bayesrl.core.censoring import LEAST, CensoredBeta, CensoredDirichlet, CensoredGamma, GammaParameters

_MOST_PAIRED, _MOST_FREE = 4, 16
"""Up to the first number of components, each pair has its own part; up to the second, each part its concentrations."""


class AwayGamma(GammaParameters):
    """The part of a gamma distribution away from 0: p(x) ∝ xᶜ⁻¹·(e⁻ʳˣ − e⁻²ʳˣ).

    It is a mixture of Gamma(c + 1, λ) with r < λ < 2r.
    """

    def sample(self, key: Any, sample_shape: tuple[int, ...] = ()) -> Array:
        """Draw [*sample_shape, *batch]: first λ by inverting its distribution function, then x."""
        shape = sample_shape + self.batch_shape
        outer, inner = jax.random.split(key)
        # λ has the density λ⁻ᶜ⁻¹ between r and 2r, up to a factor, so λ⁻ᶜ is uniform there.
        share = jax.random.uniform(outer, shape)
        log_rate = (
            jnp.log(self.rate) - jnp.log1p(share * jnp.expm1(-self.concentration * math.log(2))) / self.concentration
        )
        return jnp.exp(jax.random.loggamma(inner, self.concentration + 1, shape) - log_rate)

    def log_prob(self, value: Array, intermediates: Any = None) -> Array:
        """Log-density, nats; below `LEAST`, where there is almost no mass, roughly the log-probability."""
        low = jnp.asarray(value) < LEAST
        value = jnp.where(low, LEAST, value)
        c, far = self.concentration, self.rate * value
        # log(1 − e⁻ʳˣ); below `LEAST`, the density there times the width of the atom.
        apart = jnp.log(-jnp.expm1(-jnp.maximum(far, LEAST))) + jnp.where(low, math.log(LEAST), 0.0)
        size = gammaln(c) - c * jnp.log(self.rate) + jnp.log(-jnp.expm1(-c * math.log(2)))
        return (c - 1) * jnp.log(value) - far + apart - size


def num_corner_parameters(fn: Any) -> int:
    """Count the numbers in the tilt of one element's parts, of a Gamma, Beta or Dirichlet, censored or not."""
    # Two weights, and the concentration and rate of two parts.
    if isinstance(fn, (dist.Gamma, CensoredGamma)):
        return 6
    size = 2 if isinstance(fn, (dist.Beta, CensoredBeta)) else int(jnp.shape(fn.concentration)[-1])
    parts = len(_powers(size))
    return parts + (parts * size if size <= _MOST_FREE else size)


def split_at_corners(fn: Any, theta: Array) -> Any:
    """Split a censored Gamma, Beta or Dirichlet, and tilt its parts: their weights, concentrations and rates.

    `theta` is [*batch, num_corner_parameters]; zero leaves the whole as it is.
    """
    if isinstance(fn, CensoredGamma):
        c, r = fn.concentration, fn.rate
        # The integral of xᶜ⁻¹e⁻²ʳˣ is 2⁻ᶜ of that of xᶜ⁻¹e⁻ʳˣ: the weight of the part at 0.
        logits = jnp.stack(jnp.broadcast_arrays(-c * math.log(2), jnp.log(-jnp.expm1(-c * math.log(2)))), -1)
        grown = jnp.exp(theta[..., 2:])
        parts = (
            CensoredGamma(c * grown[..., 0], 2 * r * grown[..., 1]),
            AwayGamma(c * grown[..., 2], r * grown[..., 3]),
        )
        return dist.MixtureGeneral(dist.CategoricalLogits(logits + theta[..., :2]), parts)
    if isinstance(fn, CensoredBeta):
        mixed = _corners(jnp.stack([fn.concentration1, fn.concentration0], -1), theta)
        own = mixed.component_distribution.concentration
        return dist.MixtureSameFamily(mixed.mixing_distribution, CensoredBeta(own[..., 0], own[..., 1]))
    return _corners(fn.concentration, theta)


def _corners(a: Array, theta: Array) -> Any:
    size = a.shape[-1]
    powers = _powers(size)
    num = len(powers)
    order = int(powers[0].sum())
    rising = gammaln(a[..., None, :] + powers) - gammaln(a)[..., None, :]
    total = gammaln(a.sum(-1) + order) - gammaln(a.sum(-1))
    ways = np.log([math.factorial(order) / math.prod(math.factorial(int(m)) for m in row) for row in powers])
    logits = ways + rising.sum(-1) - total[..., None] + theta[..., :num]
    rest = theta[..., num:]
    grown = jnp.exp(rest.reshape((*rest.shape[:-1], -1, size)))
    return dist.MixtureSameFamily(dist.CategoricalLogits(logits), CensoredDirichlet((a[..., None, :] + powers) * grown))


def _powers(size: int) -> np.ndarray:
    """Return all m with |m| = k, [parts, size]; k is 2 for few components, else 1."""
    order = 2 if size <= _MOST_PAIRED else 1
    chosen = itertools.combinations_with_replacement(range(size), order)
    return np.asarray([np.bincount(one, minlength=size) for one in chosen], float)

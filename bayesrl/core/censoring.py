"""Gamma, Beta and Dirichlet distributions of small concentrations, whose draws pile up where single precision ends.

Two in five draws of a Gamma(.01, 1) are below the least number of single precision. They become 0, and the density at
0 says nothing about them. But their total probability is known: near 0 the density is a power, so that

    P(x < ε) = (rε)ᶜ / Γ(c + 1)                 of a Gamma(c, r),
    P(x < ε) = εᵃ / (a B(a, b))                 of a Beta(a, b), and likewise near 1,

to a relative error of the size of ε. In a Dirichlet distribution, each factor x_iᵃ⁻¹ becomes εᵃ/a in the same way.
Draws beyond the edge are scored by that probability: the distribution is a density with atoms. The probability depends
on the concentration, so a guide can move mass to the edge and away from it. A draw that crosses the edge jumps, so
gradients must be score-function gradients.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpyro.distributions as dist
from jax import Array
from jax.scipy.special import betaln, gammaln
from numpyro.distributions import constraints
from numpyro.distributions.batch_util import promote_batch_shape

from bayesrl.core.primitives import unwrapped

LEAST = 1e-36
"""Draws below this are scored as one atom; single precision keeps all of its digits down to 1e-38."""

NEAREST_ONE = 1e-5
"""Draws closer to 1 than this are scored as one atom: between 1 − 1e-5 and 1, single precision has 168 numbers."""

_LOG_LEAST, _LOG_NEAREST = math.log(LEAST), math.log(NEAREST_ONE)


class Censored(dist.Distribution):
    """Base of the censored distributions: parameters with batch axes, and no reparameterised sampler."""

    @property
    def stands_for(self) -> Any:
        """The uncensored distribution with the same parameters, whose terms the density has."""
        raise NotImplementedError


class GammaParameters(Censored):
    """Base of the distributions with the parameters of a gamma distribution.

    Args:
        concentration: c, [*batch].
        rate: r, [*batch].
    """

    arg_constraints = {"concentration": constraints.positive, "rate": constraints.positive}  # noqa: RUF012
    support = constraints.nonnegative

    def __init__(self, concentration: Any, rate: Any, *, validate_args: bool | None = None) -> None:
        self.concentration, self.rate = jnp.broadcast_arrays(concentration, rate)
        super().__init__(jnp.shape(self.rate), validate_args=validate_args)

    @property
    def stands_for(self) -> Any:
        """The gamma distribution."""
        return dist.Gamma(self.concentration, self.rate)


class CensoredGamma(GammaParameters):
    """Gamma(c, r) with its draws below `LEAST` scored as one atom."""

    def sample(self, key: Any, sample_shape: tuple[int, ...] = ()) -> Array:
        """Draw [*sample_shape, *batch], through logarithms."""
        logs = jax.random.loggamma(key, self.concentration, sample_shape + self.batch_shape)
        return jnp.exp(logs - jnp.log(self.rate))

    def log_prob(self, value: Array, intermediates: Any = None) -> Array:
        """Log-density, or the log-probability of the atom below `LEAST`, nats."""
        low = jnp.asarray(value) < LEAST
        # The inner `where` keeps log 0 out of the branch that the outer one discards: its gradient would be nan.
        plain = dist.Gamma(self.concentration, self.rate).log_prob(jnp.where(low, 1.0, value))
        lost = self.concentration * (jnp.log(self.rate) + _LOG_LEAST) - gammaln(self.concentration + 1)
        return jnp.where(low, lost, plain)


class CensoredBeta(Censored):
    """Beta(a, b) with its draws below `LEAST`, and those closer to 1 than `NEAREST_ONE`, each scored as one atom.

    Args:
        concentration1: a, [*batch].
        concentration0: b, [*batch].
    """

    arg_constraints = {"concentration1": constraints.positive, "concentration0": constraints.positive}  # noqa: RUF012
    support = constraints.unit_interval

    def __init__(self, concentration1: Any, concentration0: Any, *, validate_args: bool | None = None) -> None:
        self.concentration1, self.concentration0 = jnp.broadcast_arrays(concentration1, concentration0)
        super().__init__(jnp.shape(self.concentration1), validate_args=validate_args)

    @property
    def stands_for(self) -> Any:
        """The beta distribution."""
        return dist.Beta(self.concentration1, self.concentration0)

    def sample(self, key: Any, sample_shape: tuple[int, ...] = ()) -> Array:
        """Draw [*sample_shape, *batch]."""
        drawn: Array = self.stands_for.sample(key, sample_shape)
        return drawn

    def log_prob(self, value: Array, intermediates: Any = None) -> Array:
        """Log-density, or the log-probability of an atom at either end, nats."""
        value = jnp.asarray(value)
        a, b = self.concentration1, self.concentration0
        low, high = value < LEAST, value > 1 - NEAREST_ONE
        inside = jnp.where(low | high, 0.5, value)
        # At either end the factor of the other end is 1 up to rounding, and is left out.
        parts = jnp.where(low, a * _LOG_LEAST - jnp.log(a), (a - 1) * jnp.log(inside))
        parts = jnp.where(
            high, b * _LOG_NEAREST - jnp.log(b), parts + jnp.where(low, 0.0, (b - 1) * jnp.log1p(-inside))
        )
        return parts - betaln(a, b)


class CensoredDirichlet(Censored):
    """Dirichlet(a) with its components below `LEAST` scored as atoms.

    Args:
        concentration: a, [*batch, n].
    """

    arg_constraints = {"concentration": constraints.independent(constraints.positive, 1)}  # noqa: RUF012
    support = constraints.simplex

    def __init__(self, concentration: Any, *, validate_args: bool | None = None) -> None:
        self.concentration = jnp.asarray(concentration)
        shape = self.concentration.shape
        super().__init__(shape[:-1], shape[-1:], validate_args=validate_args)

    @property
    def stands_for(self) -> Any:
        """The Dirichlet distribution."""
        return dist.Dirichlet(self.concentration)

    def sample(self, key: Any, sample_shape: tuple[int, ...] = ()) -> Array:
        """Draw [*sample_shape, *batch, n]."""
        drawn: Array = self.stands_for.sample(key, sample_shape)
        return drawn

    def log_prob(self, value: Array, intermediates: Any = None) -> Array:
        """Log-density, in which each component below `LEAST` counts as an atom, nats."""
        value, a = jnp.asarray(value), self.concentration
        low = value < LEAST
        parts = jnp.where(low, a * _LOG_LEAST - jnp.log(a), (a - 1) * jnp.log(jnp.where(low, 1.0, value)))
        return (parts - gammaln(a)).sum(-1) + gammaln(a.sum(-1))


def censored(fn: Any) -> Any | None:
    """Return the censored form of a distribution, with its wrappers; None if its family has no such form."""
    if isinstance(fn, dist.MaskedDistribution):
        inner = censored(fn.base_dist)
        return None if inner is None else inner.mask(fn._mask)
    if isinstance(fn, dist.Independent):
        inner = censored(fn.base_dist)
        return None if inner is None else inner.to_event(fn.reinterpreted_batch_ndims)
    if isinstance(fn, dist.ExpandedDistribution):
        inner = censored(fn.base_dist)
        return None if inner is None else inner.expand(fn.batch_shape)
    if isinstance(fn, dist.Gamma):
        return CensoredGamma(fn.concentration, fn.rate)
    if isinstance(fn, dist.Beta):
        return CensoredBeta(fn.concentration1, fn.concentration0)
    if isinstance(fn, dist.Dirichlet):
        return CensoredDirichlet(fn.concentration)
    return None


def is_censored(fn: Any) -> bool:
    """Whether a distribution, inside its wrappers, is censored or a mixture of censored ones."""
    fn = unwrapped(fn)
    if isinstance(fn, dist.MixtureSameFamily):
        return isinstance(fn.component_distribution, Censored)
    if isinstance(fn, dist.MixtureGeneral):
        return isinstance(fn.component_distributions[0], Censored)
    return isinstance(fn, Censored)


@promote_batch_shape.register(Censored)  # type: ignore[untyped-decorator]
def _promote(d: Any) -> Any:
    """Rebuild a distribution that a scan has stacked, so that its batch shape has the leading time axis."""
    return type(d)(*(getattr(d, name) for name in d.arg_constraints))

"""Posteriors of action values, from which exploration rules choose; leading axes are independent runs."""

import abc
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpyro.distributions as dist
from jax import Array
from jax.scipy.special import betainc

from bayesrl.typing import PRNGKey

_NEWTON_STEPS = 14


class Belief(abc.ABC):
    """A posterior of the values of some actions, [..., actions], reward units.

    Attributes:
        allowed: which actions are allowed, [..., actions]; None if all are. The others are worth −inf for sure.
    """

    allowed: Array | None = None

    @property
    @abc.abstractmethod
    def mean(self) -> Array:
        """E[value], [..., actions]."""

    @property
    @abc.abstractmethod
    def variance(self) -> Array:
        """A v with E exp(t·(value − mean)) ≤ exp(v·t²/2) for all t: the variance or a bound, [..., actions]."""

    @abc.abstractmethod
    def sample(self, key: PRNGKey) -> Array:
        """Draw the values of all actions together, [..., actions]."""

    def quantile(self, level: Array | float) -> Array:
        """Compute the quantile of this order, [..., actions]; by default, that of a Normal."""
        return jnp.asarray(dist.Normal(self.mean, jnp.sqrt(self.variance)).icdf(level))


class _Beta(NamedTuple):
    a: Array
    b: Array


class BetaBelief(_Beta, Belief):
    """Values are probabilities with independent posteriors Beta(a, b).

    Attributes:
        a: [..., actions], at least 1 for `sample`.
        b: [..., actions], at least 1 for `sample`.

    Example:
        >>> import jax.numpy as jnp
        >>> from bayesrl.control.exploration.beliefs import BetaBelief
        >>> BetaBelief(jnp.array([1.0, 3.0]), jnp.array([1.0, 1.0])).mean.tolist()
        [0.5, 0.75]

    References:
        The bound on the variance, 1 / (4·(a + b + 1)): Marchal & Arbel (2017), "On the sub-Gaussianity of the Beta
        and Dirichlet distributions", theorem 1.
    """

    @property
    def mean(self) -> Array:
        """The posterior mean, a / (a + b)."""
        return self.a / (self.a + self.b)

    @property
    def variance(self) -> Array:
        """The bound 1 / (4·(a + b + 1))."""
        return 0.25 / (self.a + self.b + 1.0)

    def sample(self, key: PRNGKey) -> Array:
        """Draw by the ratio of two Gamma variables; nan if a or b is below 1."""
        gammas = sample_gamma(key, jnp.stack([self.a, self.b]))
        return gammas[0] / gammas.sum(0)

    def quantile(self, level: Array | float) -> Array:
        """Invert the incomplete beta function by Newton steps; a step that would leave the bracket halves it."""
        # NumPyro's Beta.icdf needs TensorFlow Probability.
        beta = dist.Beta(self.a, self.b)

        def narrow(_: Any, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            low, high, x = carry
            over = betainc(self.a, self.b, x) - level
            low, high = jnp.where(over > 0, low, x), jnp.where(over > 0, x, high)
            # Far out in a tail the density underflows; so long a step leaves the bracket, which is then halved.
            moved = x - over / jnp.maximum(jnp.exp(beta.log_prob(x)), 1e-30)
            return low, high, jnp.where((moved >= low) & (moved <= high), moved, (low + high) / 2)

        first = (jnp.zeros_like(self.a), jnp.ones_like(self.a), self.mean)
        return jax.lax.fori_loop(0, _NEWTON_STEPS, narrow, first)[2]


class _Normal(NamedTuple):
    mean: Array
    variance: Array


class NormalBelief(_Normal, Belief):
    """Values have independent Normal posteriors.

    Attributes:
        mean: [..., actions], reward units.
        variance: [..., actions], reward units squared.

    Example:
        >>> import jax.numpy as jnp
        >>> from bayesrl.control.exploration.beliefs import NormalBelief
        >>> NormalBelief(jnp.array([0.0, 2.0]), jnp.ones(2)).quantile(0.5).tolist()
        [0.0, 2.0]
    """

    def sample(self, key: PRNGKey) -> Array:
        """Draw each value independently."""
        return jnp.asarray(dist.Normal(self.mean, jnp.sqrt(self.variance)).sample(key))


class _Linear(NamedTuple):
    features: Array
    loc: Array
    factor: Array


class LinearBelief(_Linear, Belief):
    """Values are x·θ with a Normal posterior of θ, so actions with similar features have similar values.

    Attributes:
        features: x, [..., actions, features].
        loc: E[θ], [..., features].
        factor: lower Cholesky factor of the precision of θ, [..., features, features].

    Example:
        >>> import jax.numpy as jnp
        >>> from bayesrl.control.exploration.beliefs import LinearBelief
        >>> LinearBelief(jnp.eye(2), jnp.array([1.0, -1.0]), 2 * jnp.eye(2)).variance.tolist()
        [0.25, 0.25]
    """

    @property
    def mean(self) -> Array:
        """x·E[θ]."""
        return jnp.einsum("...ad,...d->...a", self.features, self.loc)

    @property
    def variance(self) -> Array:
        """xᵀ·Λ⁻¹·x."""
        # With Λ = L·Lᵀ, xᵀ·Λ⁻¹·x = |L⁻¹·x|²: one triangular solve, and no inverse.
        halves = jax.scipy.linalg.solve_triangular(self.factor, jnp.swapaxes(self.features, -1, -2), lower=True)
        return (halves**2).sum(-2)

    def sample(self, key: PRNGKey) -> Array:
        """Draw θ, and return x·θ."""
        return jnp.einsum("...ad,...d->...a", self.features, sample_by_precision(key, self.loc, self.factor))


class LogisticBelief(LinearBelief):
    """Values are σ(x·θ) with a Normal posterior of θ; the attributes are those of `LinearBelief`.

    Example:
        >>> import jax.numpy as jnp
        >>> from bayesrl.control.exploration.beliefs import LogisticBelief
        >>> LogisticBelief(jnp.eye(2), jnp.zeros(2), jnp.eye(2)).mean.tolist()
        [0.5, 0.5]

    References:
        The mean: MacKay (1992), "The evidence framework applied to classification networks", equation 10.
    """

    @property
    def mean(self) -> Array:
        """σ(m / √(1 + π·v/8)), which approximates E σ(x·θ) to about .02."""
        return jax.nn.sigmoid(super().mean / jnp.sqrt(1 + jnp.pi / 8 * super().variance))

    @property
    def variance(self) -> Array:
        """A sixteenth of the variance of x·θ: a bound, because the slope of σ is at most 1/4."""
        return super().variance / 16

    def sample(self, key: PRNGKey) -> Array:
        """Draw θ, and return σ(x·θ)."""
        return jax.nn.sigmoid(super().sample(key))

    def quantile(self, level: Array | float) -> Array:
        """σ of the quantile of x·θ."""
        # The mean and variance of this class are those after σ, and the quantile needs those of x·θ.
        return jax.nn.sigmoid(LinearBelief(*self).quantile(level))


class _Samples(NamedTuple):
    samples: Array
    expected: Array | None = None
    allowed: Array | None = None


class SampleBelief(_Samples, Belief):
    """A posterior represented by draws.

    Attributes:
        samples: [samples, ..., actions], reward units.
        expected: the values to use as expected values, [..., actions]; by default, the mean of the samples. Models of
            dynamics pass the values of the expected model, since the mean of optimal values is optimistic.
        allowed: see `Belief`.

    Example:
        >>> import jax.numpy as jnp
        >>> from bayesrl.control.exploration.beliefs import SampleBelief
        >>> SampleBelief(jnp.array([[1.0, 2.0], [3.0, 2.0]])).mean.tolist()
        [2.0, 2.0]
    """

    @property
    def mean(self) -> Array:
        """The expected values."""
        return self._masked(self.samples.mean(0) if self.expected is None else self.expected)

    @property
    def variance(self) -> Array:
        """The variance of the samples."""
        return self._masked(self.samples.var(0), 0.0)

    def sample(self, key: PRNGKey) -> Array:
        """Pick one of the samples, the same for all values."""
        return self._masked(self.samples[jax.random.randint(key, (), 0, self.samples.shape[0])])

    def quantile(self, level: Array | float) -> Array:
        """Interpolate the quantile of the samples."""
        return self._masked(jnp.quantile(self.samples, level, axis=0))

    def _masked(self, values: Array, otherwise: float = -jnp.inf) -> Array:
        return values if self.allowed is None else jnp.where(self.allowed, values, otherwise)


def sample_by_precision(key: PRNGKey, loc: Array, factor: Array, num_samples: tuple[int, ...] = ()) -> Array:
    """Draw Normal vectors, [*num_samples, ..., features], from their mean and the Cholesky factor of their precision.

    The factor is lower triangular. NumPyro's MultivariateNormal would first invert the precision.
    """
    noise = jax.random.normal(key, (*num_samples, *loc.shape))[..., None]
    factor = jnp.broadcast_to(factor, (*num_samples, *factor.shape))
    # Lᵀ·z = noise gives z the covariance L⁻ᵀ·L⁻¹ = Λ⁻¹.
    return loc + jax.scipy.linalg.solve_triangular(factor, noise, lower=True, trans=1)[..., 0]


def sample_dirichlet(key: PRNGKey, concentration: Array) -> Array:
    """Draw from Dirichlet distributions with any concentrations above 0, [..., K].

    A Gamma variable of shape a is one of shape a + 1 times U^(1/a). Logarithms keep small concentrations from
    underflowing.
    """
    gamma_key, power_key = jax.random.split(key)
    # A uniform number of 0 would have the logarithm −inf.
    uniform = jax.random.uniform(power_key, concentration.shape, minval=1e-37)
    logs = jnp.log(sample_gamma(gamma_key, concentration + 1.0)) + jnp.log(uniform) / concentration
    return jax.nn.softmax(logs, -1)


def sample_gamma(key: PRNGKey, shape: Array) -> Array:
    """Draw Gamma variables of rate 1 and these shapes, all at least 1; nan for a shape below 1.

    `jax.random.gamma` takes one element after another on a CPU, and is 13 to 43 times slower. Here all elements are
    tried at once; only the rejected ones, about 2%, are gathered and tried again.

    References:
        Marsaglia & Tsang (2000), "A simple method for generating gamma variables".
    """
    # Without nan, the loop would retry a bad shape for ever.
    center = jnp.where((shape >= 1) & (shape < jnp.inf), shape - 1 / 3, jnp.nan).ravel()
    number = center.size
    # Room for three times the rejections expected; what does not fit waits for the next round.
    room = max(number // 16, 16)

    def attempt(key: PRNGKey, center: Array) -> tuple[Array, Array]:
        normal_key, uniform_key = jax.random.split(key)
        x = jax.random.normal(normal_key, center.shape)
        v = (1 + x / jnp.sqrt(9 * center)) ** 3
        bound = 0.5 * x**2 + center * (1 - v + jnp.log(jnp.maximum(v, 1e-30)))
        accepted = (v > 0) & (jnp.log(jax.random.uniform(uniform_key, center.shape)) < bound)
        return center * v, accepted | jnp.isnan(center)

    def retry(carry: tuple[PRNGKey, Array, Array]) -> tuple[PRNGKey, Array, Array]:
        key, values, accepted = carry
        key, own = jax.random.split(key)
        # Under jit, sizes are fixed: index `number` is out of range and fills the unused slots.
        at = jnp.nonzero(~accepted, size=room, fill_value=number)[0]
        new, good = attempt(own, center.at[at].get(mode="fill", fill_value=1.0))
        where = jnp.where(good, at, number)
        return key, values.at[where].set(new, mode="drop"), accepted.at[where].set(True, mode="drop")

    key, own = jax.random.split(key)
    values, accepted = attempt(own, center)
    return jax.lax.while_loop(lambda c: ~c[2].all(), retry, (key, values, accepted))[1].reshape(shape.shape)

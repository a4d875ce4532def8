"""Posteriors of action values, from which exploration rules choose; leading axes are independent runs."""

import abc
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.scipy.special import betainc, betaln, ndtri, xlog1py, xlogy

from bayesrl.typing import PRNGKey

_NARROWINGS = 14


class Belief(abc.ABC):
    """What is believed of the values of some actions, [..., actions], reward units.

    Attributes:
        allowed: which of them may be taken, [..., actions]; None where all may. The others are worth −inf for sure.
    """

    allowed: Array | None = None

    @property
    @abc.abstractmethod
    def mean(self) -> Array:
        """E[value], [..., actions]."""

    @property
    @abc.abstractmethod
    def variance(self) -> Array:
        """Give v with E exp(t·(value − mean)) ≤ exp(v·t²/2) for all t: the variance or a bound, [..., actions]."""

    @abc.abstractmethod
    def sample(self, key: PRNGKey) -> Array:
        """Draw the values of all actions together, [..., actions]."""

    @abc.abstractmethod
    def quantile(self, level: Array) -> Array:
        """Give the value that is not exceeded with this probability, [..., actions]."""


class _Betas(NamedTuple):
    a: Array
    b: Array


class BetaBelief(_Betas, Belief):
    """Values are probabilities, believed Beta(a, b), independent of each other.

    Attributes:
        a: [..., actions], at least 1 for `sample`.
        b: [..., actions], at least 1 for `sample`.

    References:
        Marchal & Arbel (2017), "On the sub-Gaussianity of the Beta and Dirichlet distributions", theorem 1, for
        the bound on the variance, 1 / (4·(a + b + 1)).
    """

    @property
    def mean(self) -> Array:
        """Give a / (a + b)."""
        return self.a / (self.a + self.b)

    @property
    def variance(self) -> Array:
        """1 / (4·(a + b + 1)), which bounds it."""
        return 0.25 / (self.a + self.b + 1.0)

    def sample(self, key: PRNGKey) -> Array:
        """Draw by the ratio of two Gamma variables; nan where a or b is below 1."""
        gammas = sample_gamma(key, jnp.stack([self.a, self.b]))
        return gammas[0] / gammas.sum(0)

    def quantile(self, level: Array) -> Array:
        """Invert the incomplete beta function by Newton steps, halving the bracket where one would leave it."""
        log_norm = betaln(self.a, self.b)

        def narrow(_: Any, carried: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            low, high, x = carried
            over = betainc(self.a, self.b, x) - level
            low, high = jnp.where(over > 0, low, x), jnp.where(over > 0, x, high)
            density = jnp.exp(xlogy(self.a - 1, x) + xlog1py(self.b - 1, -x) - log_norm)
            moved = x - over / jnp.maximum(density, 1e-30)
            return low, high, jnp.where((moved >= low) & (moved <= high), moved, (low + high) / 2)

        first = (jnp.zeros_like(self.a), jnp.ones_like(self.a), self.mean)
        return jax.lax.fori_loop(0, _NARROWINGS, narrow, first)[2]


class _Normals(NamedTuple):
    mean: Array
    variance: Array


class NormalBelief(_Normals, Belief):
    """Values are believed Normal, independent of each other.

    Attributes:
        mean: [..., actions], reward units.
        variance: [..., actions], reward units squared.
    """

    def sample(self, key: PRNGKey) -> Array:
        """Draw each."""
        return self.mean + jnp.sqrt(self.variance) * jax.random.normal(key, self.mean.shape)

    def quantile(self, level: Array) -> Array:
        """Give mean + z·deviation."""
        return self.mean + jnp.sqrt(self.variance) * ndtri(level)


class _Linear(NamedTuple):
    features: Array
    center: Array
    factor: Array


class LinearBelief(_Linear, Belief):
    """Values are x·θ with θ believed Normal, so that actions with like features have like values.

    Attributes:
        features: x, [..., actions, features].
        center: E[θ], [..., features].
        factor: lower Cholesky factor of the precision of θ, [..., features, features].
    """

    @property
    def mean(self) -> Array:
        """x·E[θ]."""
        return jnp.einsum("...ad,...d->...a", self.features, self.center)

    @property
    def variance(self) -> Array:
        """xᵀ·Λ⁻¹·x."""
        halves = jax.scipy.linalg.solve_triangular(self.factor, jnp.swapaxes(self.features, -1, -2), lower=True)
        return (halves**2).sum(-2)

    def sample(self, key: PRNGKey) -> Array:
        """Draw θ, and give x·θ."""
        noise = jax.random.normal(key, self.center.shape)
        turned = jax.scipy.linalg.solve_triangular(self.factor, noise[..., None], lower=True, trans=1)[..., 0]
        return jnp.einsum("...ad,...d->...a", self.features, self.center + turned)

    def quantile(self, level: Array) -> Array:
        """Give mean + z·deviation."""
        return self.mean + jnp.sqrt(self.variance) * ndtri(level)


class LogisticBelief(LinearBelief):
    """Values are σ(x·θ) with θ believed Normal; attributes as of `LinearBelief`.

    References:
        MacKay (1992), "The evidence framework applied to classification networks", equation 10, for the mean.
    """

    @property
    def mean(self) -> Array:
        """σ(m / √(1 + π·v/8)), which approximates E σ(x·θ) to about .02."""
        return jax.nn.sigmoid(super().mean / jnp.sqrt(1 + jnp.pi / 8 * super().variance))

    @property
    def variance(self) -> Array:
        """The slope of σ is at most 1/4, so that a sixteenth of the variance of x·θ bounds it."""
        return super().variance / 16

    def sample(self, key: PRNGKey) -> Array:
        """Draw θ, and give σ(x·θ)."""
        return jax.nn.sigmoid(super().sample(key))

    def quantile(self, level: Array) -> Array:
        """σ of the quantile of x·θ."""
        return jax.nn.sigmoid(super().mean + jnp.sqrt(super().variance) * ndtri(level))


class _Samples(NamedTuple):
    draws: Array
    center: Array | None = None
    allowed: Array | None = None


class SampleBelief(_Samples, Belief):
    """Values are known by draws from their posterior.

    Attributes:
        draws: [draws, ..., actions], reward units.
        center: what stands for the expected values, [..., actions]; by default the mean of the draws. Models of
            dynamics give the values of the expected model, since the mean of optimal values is optimistic.
        allowed: see `Belief`.
    """

    @property
    def mean(self) -> Array:
        """The center."""
        return self._within(self.draws.mean(0) if self.center is None else self.center)

    @property
    def variance(self) -> Array:
        """Of the draws."""
        return self._within(self.draws.var(0), 0.0)

    def sample(self, key: PRNGKey) -> Array:
        """Pick one of the draws, the same for all values."""
        return self._within(self.draws[jax.random.randint(key, (), 0, self.draws.shape[0])])

    def quantile(self, level: Array) -> Array:
        """Of the draws, interpolated."""
        return self._within(jnp.quantile(self.draws, level, axis=0))

    def _within(self, values: Array, otherwise: float = -jnp.inf) -> Array:
        return values if self.allowed is None else jnp.where(self.allowed, values, otherwise)


def sample_dirichlet(key: PRNGKey, concentration: Array) -> Array:
    """Draw from Dirichlet distributions of any concentrations above 0, [..., K].

    Gamma variables of shape a are those of shape a + 1 times U^(1/a), taken in logarithms, so that small
    concentrations do not underflow.
    """
    gamma_key, power_key = jax.random.split(key)
    uniform = jax.random.uniform(power_key, concentration.shape, minval=1e-37)
    logs = jnp.log(sample_gamma(gamma_key, concentration + 1.0)) + jnp.log(uniform) / concentration
    return jax.nn.softmax(logs, -1)


def sample_gamma(key: PRNGKey, shape: Array) -> Array:
    """Draw Gamma variables of these shapes, all at least 1, and of rate 1; nan where a shape is below 1 or no number.

    `jax.random.gamma` takes one element after the other on a CPU; here all are tried at once, and only those that
    were refused, some 2%, are gathered and tried again.

    References:
        Marsaglia & Tsang (2000), "A simple method for generating gamma variables".
    """
    # What no draw fits would be tried for ever.
    center = jnp.where((shape >= 1) & (shape < jnp.inf), shape - 1 / 3, jnp.nan).ravel()
    number = center.size
    room = max(number // 16, 16)

    def attempt(key: PRNGKey, center: Array) -> tuple[Array, Array]:
        normal_key, uniform_key = jax.random.split(key)
        x = jax.random.normal(normal_key, center.shape)
        v = (1 + x / jnp.sqrt(9 * center)) ** 3
        bound = 0.5 * x**2 + center * (1 - v + jnp.log(jnp.maximum(v, 1e-30)))
        fine = (v > 0) & (jnp.log(jax.random.uniform(uniform_key, center.shape)) < bound)
        return center * v, fine | jnp.isnan(center)

    def again(carried: tuple[PRNGKey, Array, Array]) -> tuple[PRNGKey, Array, Array]:
        key, found, fine = carried
        key, own = jax.random.split(key)
        at = jnp.nonzero(~fine, size=room, fill_value=number)[0]
        new, good = attempt(own, center.at[at].get(mode="fill", fill_value=1.0))
        where = jnp.where(good, at, number)
        return key, found.at[where].set(new, mode="drop"), fine.at[where].set(True, mode="drop")

    key, own = jax.random.split(key)
    found, fine = attempt(own, center)
    return jax.lax.while_loop(lambda c: ~c[2].all(), again, (key, found, fine))[1].reshape(shape.shape)

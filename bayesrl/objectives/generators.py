"""Generators of f-divergences D_f = E_p[f(q/p)], in forms that neither overflow nor cancel."""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from bayesrl.statistics.definitions import RegularizerName

type GeneratorName = Literal[
    "reverse_kl",
    "forward_kl",
    "jensen_shannon",
    "total_variation",
    "reverse_chi_squared",
    "forward_chi_squared",
    "squared_hellinger",
    "alpha",
]
"""Names of f, where t = q/p: see `FDivergence`."""

type OfLogRatio = Callable[[Array], Array]


class Generator(NamedTuple):
    """A convex f with f(1) = f′(1) = 0, in terms of log t: parts for t < 1 weigh p, parts for t ≥ 1 weigh q.

    Attributes:
        value_below: f(t).
        value_above: f(t)/t.
        slope_below: t·f′(t).
        slope_above: f′(t).
        finite_at_zero: whether f(0) is finite, so that q may be 0 where p is not.
        finite_at_infinity: whether f(t)/t has a limit, so that p may be 0 where q is not.
    """

    value_below: OfLogRatio
    value_above: OfLogRatio
    slope_below: OfLogRatio
    slope_above: OfLogRatio
    finite_at_zero: bool
    finite_at_infinity: bool

    def value(self, x: Array, p: Any, q: Any) -> Array:
        """Return p·f(q/p), where x = log q/p."""
        return self._joined(self.value_below, self.value_above, x, p, q)

    def slope(self, x: Array, p: Any, q: Any) -> Array:
        """Return q·f′(q/p), where x = log q/p."""
        return self._joined(self.slope_below, self.slope_above, x, p, q)

    @staticmethod
    def _joined(below: OfLogRatio, above: OfLogRatio, x: Array, p: Any, q: Any) -> Array:
        # Beyond ±100, exp is 0 in single precision; only an infinite x would give 0 · inf.
        x = jnp.nan_to_num(x, posinf=100.0, neginf=-100.0)
        # Where both are 0, so is their share, whatever the ratio.
        # Each side sees its own half-line only, where no exp can overflow.
        left = jnp.where(p > 0, p * below(jnp.minimum(x, 0.0)), 0.0)
        right = jnp.where(q > 0, q * above(jnp.maximum(x, 0.0)), 0.0)
        return jnp.where(x < 0, left, right)


def combine(*terms: tuple[float, Generator]) -> Generator:
    """Return a sum of generators with positive factors."""

    def summed(part: str) -> OfLogRatio:
        return lambda x: jnp.asarray(sum(factor * getattr(f, part)(x) for factor, f in terms))

    return Generator(
        value_below=summed("value_below"),
        value_above=summed("value_above"),
        slope_below=summed("slope_below"),
        slope_above=summed("slope_above"),
        finite_at_zero=all(f.finite_at_zero for _, f in terms),
        finite_at_infinity=all(f.finite_at_infinity for _, f in terms),
    )


def _half_js(x: Array) -> Array:
    t = jnp.exp(x)
    return 0.5 * (t * x - (1 + t) * (jnp.log1p(t) - jnp.log(2.0)))


def _half_js_slope(x: Array) -> Array:
    return 0.5 * (jnp.log(2.0) + jax.nn.log_sigmoid(x))


_GENERATORS = {
    "reverse_kl": Generator(
        lambda x: x * jnp.exp(x) - jnp.expm1(x),
        lambda x: x + jnp.expm1(-x),
        lambda x: x * jnp.exp(x),
        lambda x: x,
        finite_at_zero=True,
        finite_at_infinity=False,
    ),
    "forward_kl": Generator(
        lambda x: jnp.expm1(x) - x,
        lambda x: -jnp.expm1(-x) - x * jnp.exp(-x),
        jnp.expm1,
        lambda x: -jnp.expm1(-x),
        finite_at_zero=False,
        finite_at_infinity=True,
    ),
    "jensen_shannon": Generator(
        _half_js,
        lambda x: _half_js(-x),
        lambda x: jnp.exp(x) * _half_js_slope(x),
        _half_js_slope,
        finite_at_zero=True,
        finite_at_infinity=True,
    ),
    "total_variation": Generator(
        lambda x: -0.5 * jnp.expm1(x),
        lambda x: -0.5 * jnp.expm1(-x),
        lambda x: -0.5 * jnp.exp(x),
        lambda x: 0.5 * jnp.sign(x),
        finite_at_zero=True,
        finite_at_infinity=True,
    ),
    "reverse_chi_squared": Generator(
        lambda x: jnp.expm1(x) ** 2,
        lambda x: jnp.expm1(x) + jnp.expm1(-x),
        lambda x: 2 * jnp.exp(x) * jnp.expm1(x),
        lambda x: 2 * jnp.expm1(x),
        finite_at_zero=True,
        finite_at_infinity=False,
    ),
    "forward_chi_squared": Generator(
        lambda x: jnp.expm1(x) + jnp.expm1(-x),
        lambda x: jnp.expm1(-x) ** 2,
        lambda x: jnp.exp(x) - jnp.exp(-x),
        lambda x: -jnp.expm1(-2 * x),
        finite_at_zero=False,
        finite_at_infinity=True,
    ),
    "squared_hellinger": Generator(
        lambda x: 0.5 * jnp.expm1(x / 2) ** 2,
        lambda x: 0.5 * jnp.expm1(-x / 2) ** 2,
        lambda x: 0.5 * (jnp.exp(x) - jnp.exp(x / 2)),
        lambda x: -0.5 * jnp.expm1(-x / 2),
        finite_at_zero=True,
        finite_at_infinity=True,
    ),
}


def make_generator(name: GeneratorName, alpha: float | None) -> Generator:
    """Return a generator by its name; α is known to be neither 0 nor 1."""
    if name != "alpha" or alpha is None:
        return _GENERATORS[name]
    a = alpha
    return Generator(
        lambda x: (jnp.expm1(a * x) - a * jnp.expm1(x)) / (a * (a - 1)),
        lambda x: (jnp.expm1((a - 1) * x) - (1 - a) * jnp.expm1(-x)) / (a * (a - 1)),
        lambda x: (jnp.exp(a * x) - jnp.exp(x)) / (a - 1),
        lambda x: jnp.expm1((a - 1) * x) / (a - 1),
        finite_at_zero=a > 0,
        finite_at_infinity=a < 1,
    )


def regularizer_generator(name: RegularizerName, alpha: float | None) -> Generator | None:
    """Return the generator of a regulariser, with t = q/π₀; None for KL itself."""
    named = {
        "chi_squared": ((0.5, "reverse_chi_squared"),),
        "chi_squared_kl": ((0.5, "reverse_chi_squared"), (1.0, "reverse_kl")),
        "jensen_shannon": ((1.0, "jensen_shannon"),),
        "jensen_shannon_sum": ((2.0, "jensen_shannon"),),
        "forward_kl": ((1.0, "forward_kl"),),
    }
    if name == "alpha":
        return make_generator("alpha", alpha)
    return combine(*((factor, _GENERATORS[f]) for factor, f in named[name])) if name in named else None


def estimand_of(name: RegularizerName, alpha: float | None) -> OfLogRatio | None:
    """Return the function of log t, t = q/π₀, whose mean under q is D_f(q‖π₀); None for KL itself.

    It is (f(t) − f(0))/t + f(0): draws of q hardly see where t is near 0, and what they miss there is the f(0). Where
    f(0) is infinite, it is f(t)/t, of which draws say little if q leaves out much of π₀.
    """
    chi_squared: OfLogRatio = lambda x: jnp.expm1(x) / 2  # noqa: E731  (beside the others)
    named: dict[str, OfLogRatio] = {
        "chi_squared": chi_squared,
        "chi_squared_kl": lambda x: chi_squared(x) + x,
        "jensen_shannon": _js_estimand,
        "jensen_shannon_sum": lambda x: 2 * _js_estimand(x),
    }
    if alpha is not None and alpha > 0:
        return lambda x: jnp.expm1((alpha - 1) * x) / (alpha * (alpha - 1))
    f = regularizer_generator(name, alpha)
    if f is None or name in named:
        return named.get(name)
    return lambda x: f.value(x, jnp.exp(-x), 1.0)


def _js_estimand(x: Array) -> Array:
    # log(1 + t)/t, which is 1 at t = 0.
    # At t = e⁻¹⁵ it is 1 to single precision; far below, the exp would overflow.
    decay = jnp.where(x > -15, jnp.exp(-jnp.maximum(x, -15.0)) * jax.nn.softplus(x), 1.0)
    return 0.5 * (jax.nn.log_sigmoid(x) - decay) + jnp.log(2.0)

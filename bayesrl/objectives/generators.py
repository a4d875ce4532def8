"""Generators of f-divergences D_f = E_p[f(q/p)], in forms that neither overflow nor cancel."""

from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

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

    def value(self, x: Array, p: Array, q: Array) -> Array:
        """Return p·f(q/p), where x = log q/p."""
        return self._joined(self.value_below, self.value_above, x, p, q)

    def slope(self, x: Array, p: Array, q: Array) -> Array:
        """Return q·f′(q/p), where x = log q/p."""
        return self._joined(self.slope_below, self.slope_above, x, p, q)

    @staticmethod
    def _joined(below: OfLogRatio, above: OfLogRatio, x: Array, p: Array, q: Array) -> Array:
        # Beyond ±100, exp is 0 in single precision; only an infinite x would give 0 · inf.
        x = jnp.nan_to_num(x, posinf=100.0, neginf=-100.0)
        # Where both are 0, so is their share, whatever the ratio.
        left = jnp.where(p > 0, p * below(jnp.minimum(x, 0.0)), 0.0)
        right = jnp.where(q > 0, q * above(jnp.maximum(x, 0.0)), 0.0)
        return jnp.where(x < 0, left, right)


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

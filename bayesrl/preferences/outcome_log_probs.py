"""Log-probabilities of outcomes given the difference of two scores, and the distribution of rankings."""

from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpyro.distributions as dist
from jax import Array
from jax.scipy.special import log_ndtr
from numpyro.distributions import constraints
from numpyro.distributions.util import validate_sample

from bayesrl.typing import PRNGKey

type Ties = Literal["davidson", "rao_kupper", "glenn_david"]

FIRST, SECOND, TIE = 0, 1, 2
"""Outcomes of a pair."""


def log_probs_of_pairs(difference: Array, link: str, tie: Array | None, ties: Ties | None) -> Array:
    """Return log P of each outcome, [..., 2], or [..., 3] with ties.

    Args:
        difference: of the scores, first minus second, [...].
        link: "logit" or "probit".
        tie: the site that says how frequent ties are, [].
        ties: the model of ties.
    """
    if ties is None or tie is None:
        sides = [_log_cdf(difference, link), _log_cdf(-difference, link)]
    elif ties == "davidson":
        # ∝ π₁, π₂ and ν·√(π₁π₂), with log ν = tie.
        sides = [difference / 2, -difference / 2, jnp.broadcast_to(tie, difference.shape)]
        return jax.nn.log_softmax(jnp.stack(sides, -1), -1)
    elif ties == "rao_kupper":
        # π₁/(π₁ + θπ₂), with θ = 1 + e^tie; a tie has (θ² − 1) times the product of both.
        log_theta = jax.nn.softplus(tie)
        sides = [jax.nn.log_sigmoid(difference - log_theta), jax.nn.log_sigmoid(-difference - log_theta)]
        sides.append(tie + jnp.log(2 + jnp.exp(tie)) + sides[0] + sides[1])
    else:
        threshold = jnp.exp(tie)
        sides = [log_ndtr((difference - threshold) / _NOISE), log_ndtr((-difference - threshold) / _NOISE)]
        sides.append(_log_between((-threshold - difference) / _NOISE, (threshold - difference) / _NOISE))
    return jnp.stack(sides, -1)


_NOISE = 2.0**0.5
"""Standard deviation of the difference of two impressions, each with a variance of 1: Thurstone's case V."""


def _log_cdf(difference: Array, link: str) -> Array:
    return jax.nn.log_sigmoid(difference) if link == "logit" else log_ndtr(difference / _NOISE)


def _log_between(low: Array, high: Array) -> Array:
    """Return log(Φ(high) − Φ(low)), computed in the tail where both are small."""
    flip = low > 0
    a, b = jnp.where(flip, -high, low), jnp.where(flip, -low, high)
    upper = log_ndtr(b)
    # The least difference that floats can tell keeps the gradient finite.
    ratio = jnp.minimum(log_ndtr(a) - upper, -jnp.finfo(upper.dtype).tiny)
    return upper + jnp.log(-jnp.expm1(ratio))


class PlackettLuceRanks(dist.Distribution):
    """Ranks of items under Plackett and Luce: the best is drawn ∝ exp(score), then the next among the others.

    Args:
        scores: [*batch, places].
        present: which places hold an item, [*batch, places].
    """

    arg_constraints = {"scores": constraints.real_vector}  # noqa: RUF012  (NumPyro's own form)
    support = constraints.independent(constraints.integer_greater_than(-2), 1)
    pytree_data_fields = ("present",)

    def __init__(self, scores: Array, present: Array, *, validate_args: bool | None = None) -> None:
        self.scores, self.present = scores, present
        super().__init__(jnp.shape(scores)[:-1], jnp.shape(scores)[-1:], validate_args=validate_args)

    def sample(self, key: PRNGKey, sample_shape: tuple[int, ...] = ()) -> Array:
        """Draw ranks, 0 for the best, −1 where there is no item."""
        shape = (*sample_shape, *self.batch_shape, *self.event_shape)
        noisy = self.scores + jax.random.gumbel(key, shape)
        order = jnp.argsort(jnp.where(self.present, -noisy, jnp.inf), -1)
        return jnp.where(self.present, jnp.argsort(order, -1), -1)

    @validate_sample  # type: ignore[untyped-decorator]
    def log_prob(self, value: Any) -> Array:
        """Return Σ_k s_k − log Σ_{j ≥ k} exp(s_j) over places in the order of their ranks."""
        order = jnp.argsort(jnp.where(self.present, value, value.shape[-1]), -1)
        present = jnp.take_along_axis(jnp.broadcast_to(self.present, order.shape), order, -1)
        scores = jnp.take_along_axis(jnp.broadcast_to(self.scores, order.shape), order, -1)
        rest = jax.lax.cumlogsumexp(jnp.where(present, scores, -jnp.inf), axis=scores.ndim - 1, reverse=True)
        return jnp.where(present, scores - jnp.where(present, rest, 0.0), 0.0).sum(-1)

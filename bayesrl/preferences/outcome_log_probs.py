"""Log-probabilities of outcomes given the difference of two scores, and the distribution of rankings."""

from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpyro.distributions as dist
from jax import Array
from jax.scipy.special import log_ndtr
from numpyro.distributions import constraints
from numpyro.distributions.util import validate_sample

from bayesrl.typing import PRNGKey

type Ties = Literal["davidson", "rao_kupper", "glenn_david", "davidson_luce"]

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


class DavidsonLuceRanks(dist.Distribution):
    """Ranks with ties under Davidson and Luce: of the items left, a set T is best ∝ δ_|T|·exp(mean score of T).

    δ₁ = 1; without larger sets it is Plackett and Luce's law, and for two items Davidson's.

    Args:
        scores: [*batch, places].
        present: which places hold an item, [*batch, places].
        log_delta: of sets of 2, …, D items, [D − 1]; larger ones never tie.

    References:
        Firth, Kosmidis & Turner (2019), "Davidson–Luce model for multi-item choice with ties", equation 3.
    """

    arg_constraints = {"scores": constraints.real_vector}  # noqa: RUF012  (NumPyro's own form)
    support = constraints.independent(constraints.integer_greater_than(-2), 1)
    pytree_data_fields = ("present", "log_delta")

    def __init__(self, scores: Array, present: Array, log_delta: Array, *, validate_args: bool | None = None) -> None:
        self.scores, self.present, self.log_delta = scores, present, log_delta
        super().__init__(jnp.shape(scores)[:-1], jnp.shape(scores)[-1:], validate_args=validate_args)

    def sample(self, key: PRNGKey, sample_shape: tuple[int, ...] = ()) -> Array:
        """Draw ranks, 0 for the best, equal for ties, −1 where there is no item."""
        shape = (*sample_shape, *self.batch_shape, *self.event_shape)
        scores, present = (jnp.broadcast_to(x, shape).reshape(-1, shape[-1]) for x in (self.scores, self.present))
        drawn = jax.vmap(partial(_draw_with_ties, self.log_delta))(jax.random.split(key, len(scores)), scores, present)
        return drawn.reshape(shape)

    @validate_sample  # type: ignore[untyped-decorator]
    def log_prob(self, value: Any) -> Array:
        """Return Σ over places of log P(the set that shares it | the items left)."""
        places = jnp.arange(value.shape[-1])[:, None]
        left = self.present[..., None, :] & (value[..., None, :] >= places)  # [..., place, item]
        tied = left & (value[..., None, :] == places)
        scores = self.scores[..., None, :]
        size = tied.sum(-1)
        mean = jnp.where(tied, scores, 0.0).sum(-1) / jnp.maximum(size, 1)
        log_delta = jnp.concatenate([jnp.zeros(2), self.log_delta])
        own = mean + log_delta[jnp.minimum(size, len(log_delta) - 1)]
        highest, weights = _weights_of_sets(scores, left, self.log_delta)
        total = jnp.where(left.any(-1), weights.sum(-1), 1.0)
        chances = jnp.where(size >= len(log_delta), -jnp.inf, own - highest - jnp.log(total))
        return jnp.where(size > 0, chances, 0.0).sum(-1)


def _weights_of_sets(scores: Array, left: Array, log_delta: Array) -> tuple[Array, Array]:
    """Return the highest score left, [...], and Σ δ_k·exp(mean score) over sets of k, relative to it, [..., D]."""
    highest = jnp.where(left, scores, -jnp.inf).max(-1)
    highest = jnp.where(jnp.isfinite(highest), highest, 0.0)
    sizes = jnp.arange(1, len(log_delta) + 2)
    # Below 0, so that nothing overflows: the highest one alone has a weight of 1.
    below = jnp.where(left, scores - highest[..., None], 0.0)[..., None, :]
    single = jnp.where(left[..., None, :], jnp.exp(below / sizes[:, None]), 0.0)  # [..., D, items]
    sums = _symmetric_sums(single, len(sizes))[0]
    chosen = jnp.stack([sums[..., at, at + 1] for at in range(len(sizes))], -1)
    return highest, chosen * jnp.exp(jnp.concatenate([jnp.zeros(1), log_delta]))


def _symmetric_sums(weights: Array, most: int) -> tuple[Array, Array]:
    """Return Σ Π w over sets of 0, …, `most` items, [..., most + 1], and over those behind each item, [items, ...]."""

    def add(sums: Array, weight: Array) -> tuple[Array, Array]:
        longer = jnp.concatenate([jnp.zeros_like(sums[..., :1]), sums[..., :-1]], -1)
        return sums + weight[..., None] * longer, sums

    none = jnp.zeros((*weights.shape[:-1], most + 1)).at[..., 0].set(1.0)
    return jax.lax.scan(add, none, jnp.moveaxis(weights, -1, 0), reverse=True)


def _draw_with_ties(log_delta: Array, key: PRNGKey, scores: Array, present: Array) -> Array:
    """Draw the ranks of one ranking, set by set, [places]."""
    count, most = len(scores), len(log_delta) + 1

    def place(carry: tuple[Array, Array], at: Array) -> tuple[tuple[Array, Array], None]:
        left, ranks = carry
        size_key, set_key = jax.random.split(jax.random.fold_in(key, at))
        highest, weights = _weights_of_sets(scores, left, log_delta)
        size = 1 + jax.random.categorical(size_key, jnp.log(weights))
        single = jnp.where(left, jnp.exp(jnp.where(left, scores - highest, 0.0) / size), 0.0)
        _, behind = _symmetric_sums(single, most)

        def take(needed: Array, item: tuple[Array, ...]) -> tuple[Array, Array]:
            uniform, weight, sums = item
            with_it = weight * jnp.where(needed > 0, sums[needed - 1], 0.0)
            taken = uniform * (with_it + sums[needed]) < with_it
            return needed - taken, taken

        _, best = jax.lax.scan(take, size, (jax.random.uniform(set_key, (count,)), single, behind))
        return (left & ~best, jnp.where(best, at, ranks)), None

    nobody = jnp.full(count, -1)
    return jax.lax.scan(place, (present, nobody), jnp.arange(count))[0][1]


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

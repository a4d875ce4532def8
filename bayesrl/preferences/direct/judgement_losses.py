"""Losses of judgements under implicit rewards, each row on its own: likelihoods, IPO and KTO."""

from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpyro.distributions as dist
from jax import Array

from bayesrl.objectives.generators import regularizer_generator
from bayesrl.preferences.outcome_log_probs import TIE
from bayesrl.statistics.definitions import RegularizerName

type DirectLoss = Literal["likelihood", "robust", "ipo", "kto"]


def implicit_reward(log_ratio: Array, name: RegularizerName, alpha: float | None) -> Array:
    """Return f′(q/π₀), nats: R/β up to a constant, if q maximises E[R] − β·D_f(q‖π₀)."""
    f = regularizer_generator(name, alpha)
    return log_ratio if f is None else f.slope(log_ratio, jnp.exp(-log_ratio), 1.0)


def likelihood_losses(outcome: dist.Distribution, seen: Array, smoothing: float, *, robust: bool) -> Array:
    """Return −log P(outcome) of each row, smoothed or unbiased for labels that are wrong with this probability.

    Smoothed: −(1 − ε)·log P(y) − ε·log P(ȳ) with ȳ the opposite of y. Unbiased, over 1 − 2ε: the same with −ε.
    """
    log_prob: Array = outcome.log_prob(seen)
    if smoothing == 0:
        return -log_prob
    opposite = outcome.log_prob(jnp.where(seen == TIE, TIE, 1 - seen))
    if robust:
        return -((1 - smoothing) * log_prob - smoothing * opposite) / (1 - 2 * smoothing)
    return -(1 - smoothing) * log_prob - smoothing * opposite


def ipo_losses(difference: Array, outcome: Array, beta: Any) -> Array:
    """Return (h − (outcome − ½)/β)², where h is the difference of f′(q/π₀), nats: the first item's minus the second's.

    For a winner, ½/β is what h aims at, however often it wins; for a tie, 0.
    """
    return (difference - (outcome - 0.5) / beta) ** 2


def kto_losses(reward: Array, good: Array, reference: Array, desirable: float, undesirable: float) -> Array:
    """Return λ·σ(z₀ − R) of good items, and λ·σ(R − z₀) of bad ones, in reward units.

    Args:
        reward: implicit reward of each item, [rows].
        good: whether it is, [rows].
        reference: z₀ = β·KL(q‖π₀), at least 0, [].
        desirable: λ of good items.
        undesirable: λ of bad ones.
    """
    sign, weight = jnp.where(good, 1.0, -1.0), jnp.where(good, desirable, undesirable)
    return weight * jax.nn.sigmoid(-sign * (reward - reference))

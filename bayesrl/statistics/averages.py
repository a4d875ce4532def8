"""Averages over draws: J, E[R] and KL with their errors, for fresh draws, stored draws, and mixtures of policies."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from scipy.special import logsumexp

from bayesrl.core.draws import Totals
from bayesrl.statistics.definitions import divergence, rounding
from bayesrl.statistics.estimates import Estimate, Estimates

type DivergenceFn = Callable[[Any], Any]
"""Maps log t of draws, t = q/π₀, to what has the mean D_f(q‖π₀)."""


def library_of(tree: Any) -> Any:
    """Return NumPy, or JAX if the caller compiles the computation."""
    return jnp if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(tree)) else np


def summarise(
    totals: Totals,
    metrics: Mapping[str, Any],
    beta: Any,
    lead: int,
    marginal: Estimate | None = None,
    divergence_fn: DivergenceFn | None = None,
) -> Estimates:
    """Average draws [*lead, sample, *contexts]; standard errors are over samples, with contexts fixed.

    Args:
        totals: totals of the draws.
        metrics: metrics of the draws, by name.
        beta: temperatures, [*beta], reward units per nat; None without rewards.
        lead: number of axes before that of the draws.
        marginal: log p(y), if there are data beside rewards; see `bayesrl.statistics.definitions`.
        divergence_fn: the function of log t, t = q/π₀, whose mean is D_f, if that takes the place of KL.
    """
    xp = library_of(totals)
    scale = np.asarray(1.0 if beta is None else beta, float)
    by_lane = scale.reshape(scale.shape + (1,) * (lead - scale.ndim))
    by_draw = by_lane.reshape(by_lane.shape + (1,) * (totals.reward.ndim - lead))

    exact = jax.tree.map(lambda x: xp.asarray(x, float), totals)
    objective = _average(exact.log_weight(by_draw), lead)
    doubt = rounding(exact, by_draw)
    # Rounding may err the same way in all draws, so it is averaged and does not shrink with their number.
    doubt = xp.where(xp.isfinite(doubt), doubt, 0.0).mean(tuple(range(lead, doubt.ndim)))
    kl = _average(divergence(exact, conditioned=marginal is not None), lead)
    estimates = Estimates(
        objective=Estimate(by_lane * objective.mean, by_lane * xp.hypot(objective.se, doubt)),
        reward=_average(exact.reward, lead),
        kl=Estimate(kl.mean, xp.hypot(kl.se, doubt)),
        metrics={name: _average(xp.asarray(value, float), lead) for name, value in metrics.items()},
    )
    if divergence_fn is not None:
        return _regularized(estimates, exact.reward, xp.asarray(divergence_fn(-exact.ratio), float), by_draw, lead)
    return estimates if marginal is None else given_data(estimates, marginal, by_lane)


def _regularized(estimates: Estimates, reward: Any, found: Any, by_draw: Any, lead: int) -> Estimates:
    """Put D_f, the mean of `found`, in the place of KL; draws [*lead, sample, *contexts]."""
    objective = _average(reward - by_draw * found, lead)
    return estimates._replace(objective=objective, divergence=_average(found, lead))


def _average(values: Any, lead: int) -> Estimate:
    """Average draws [*lead, sample, *contexts], in double precision."""
    per_draw = values.mean(tuple(range(lead + 1, values.ndim)))
    with np.errstate(invalid="ignore"):  # a reward of -inf has a mean and no standard error
        return Estimate(per_draw.mean(lead), per_draw.std(lead, ddof=1) / np.sqrt(per_draw.shape[lead]))


def mixed(scores: Totals, weights: np.ndarray, axis: int = 0) -> Totals:
    """Return the scores under a mixture of policies, log q = log Σₖ αₖ·qₖ, from those under each policy.

    Args:
        scores: scores under each policy along one axis, which is reduced.
        weights: αₖ, of a shape that broadcasts against that axis and those before it.
        axis: axis of the policies.
    """
    library = library_of(scores)
    log_sum = logsumexp if library is np else jax.nn.logsumexp
    with np.errstate(divide="ignore"):
        logs = np.log(weights).reshape(weights.shape + (1,) * (np.ndim(scores.log_q) - axis - 1))
    ratio = -log_sum(logs - library.asarray(scores.ratio, float), axis=axis)
    # log q and the ratio are mixed separately: each keeps its own precision where their terms are huge.
    one: Totals = jax.tree.map(lambda x: library.take(x, 0, axis=axis), scores)
    return one.under(log_sum(logs + library.asarray(scores.log_q, float), axis=axis), ratio)


def given_data(estimates: Estimates, marginal: Estimate, beta: Any) -> Estimates:
    """Subtract log p(y), nats, from J and KL, [*lead], which draws give only up to that constant."""
    objective, kl, (mean, se) = estimates.objective, estimates.kl, marginal
    return estimates._replace(
        objective=Estimate(objective.mean - beta * mean, np.hypot(objective.se, beta * se)),
        kl=Estimate(kl.mean + mean, np.hypot(kl.se, se)),
        log_marginal=Estimate(np.full(np.shape(kl.mean), mean), np.full(np.shape(kl.mean), se)),
    )


def kept_marginal(statistics: Mapping[str, Any], settings: Mapping[str, Any]) -> Estimate | None:
    """Return log p(y) as stored with the draws; nan if it was unknown, None if it has no meaning here."""
    if "log_likelihood" not in statistics:
        return None
    return Estimate(*(np.asarray(settings.get(name, np.nan), float) for name in ("log_marginal", "log_marginal_se")))


def kept_estimates(
    statistics: Mapping[str, Any],
    beta: Any,
    lead: int,
    marginal: Estimate | None,
    divergence_fn: DivergenceFn | None = None,
) -> Estimates:
    """Average the statistics of draws that a posterior stores, [*beta, restart, draw, *contexts], for each fit."""
    scale = np.asarray(1.0 if beta is None else beta, float)[..., None]
    kept = {name: np.asarray(value, float) for name, value in statistics.items()}
    objective = _average(kept["log_weight"], lead)
    estimates = Estimates(
        objective=Estimate(scale * objective.mean, scale * objective.se),
        reward=_average(kept["total_reward"], lead),
        kl=_average(kept["log_q"] - kept["log_prior"] - kept.get("log_likelihood", 0.0), lead),
        metrics={},
    )
    if divergence_fn is not None:
        found = np.asarray(divergence_fn(kept["log_q"] - kept["log_prior"]), float)
        by_draw = scale.reshape(scale.shape + (1,) * (found.ndim - scale.ndim))
        return _regularized(estimates, kept["total_reward"], found, by_draw, lead)
    return estimates if marginal is None else given_data(estimates, marginal, scale)

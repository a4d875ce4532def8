"""The bracket of one fit where the optimum is known, or nothing but its own draws is."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from bayesrl.arguments import user_code
from bayesrl.compilation.keys import fold_in, split_keys
from bayesrl.core.draws import Totals
from bayesrl.core.programs import Programs
from bayesrl.diagnostics.evidence.by_sampling import at_most
from bayesrl.diagnostics.evidence.confidence_limits import weighted_start
from bayesrl.diagnostics.results import Evidence, Side
from bayesrl.errors import EngineError
from bayesrl.posterior.posterior import Posterior
from bayesrl.posterior.sampling import draw_prior
from bayesrl.statistics.estimates import Estimate, Interval
from bayesrl.statistics.quantities import divergence
from bayesrl.typing import Numbers, PRNGKey

_MOST_AT_ONCE = 2**12
_NUM_PLAYED = 100
"""So many episodes are played where the environment is no program; others draw as many as were asked for."""


type KnownOptimum = Callable[[float], float]
"""Gives the known optimum J* per context, reward units, at a temperature.

It may have two methods more: `evaluate(posterior)` gives (J, E[R], KL(q‖π₀)) of one fit exactly, or None where that
is not possible; `prior_objective(beta)` gives J(π₀).
"""


def evaluated(optimum: KnownOptimum | None, one: Posterior) -> tuple[float, float, float] | None:
    """Evaluate one fit exactly where that is known how: J, E[R], KL(q‖π₀)."""
    evaluate = getattr(optimum, "evaluate", None)
    with user_code("optimum.evaluate", EngineError, "let it give (J, E[R], KL) of a fit, or None"):
        return None if evaluate is None else evaluate(one)


def started(optimum: KnownOptimum | None, beta: float | None) -> float | None:
    """J(π₀) where it is known exactly."""
    start = getattr(optimum, "prior_objective", None)
    with user_code(
        "optimum.prior_objective", EngineError, "let it give J of the prior at a temperature, a finite number"
    ):
        return None if start is None else float(start(1.0 if beta is None else beta))


def with_known(
    key: PRNGKey, one: Posterior, beta: float | None, optimum: KnownOptimum | None, num_samples: int, reason: str = ""
) -> Evidence:
    """Bracket one fit whose optimum is known: J, E[R] and KL(q‖π₀) by its own draws, J(π₀) by those of the prior.

    It asks for no density ratio, so that discounted rollouts and environments that are no program will do.

    Args:
        key: consumed whole.
        one: fit at one temperature.
        beta: reward units per nat.
        optimum: gives J* per context, reward units; None where nobody knows it.
        num_samples: number of draws of each.
        reason: why J* is not known.

    Raises:
        EngineError: the optimum is no finite number.
    """
    programs = one.programs
    assert programs is not None
    scale = 1.0 if beta is None else beta
    num = _number(programs, num_samples if optimum is not None else min(num_samples, _MOST_AT_ONCE))
    own_key, prior_key = split_keys(key)
    found = evaluated(optimum, one)
    marginal = one.log_marginal(fold_in(key, 2))
    if found is None:
        totals = _drawn(one.totals, own_key, num)
        objective, reward = _mean(_objective(totals, scale)), _mean(totals.reward)
        kl = _mean(divergence(totals, conditioned=marginal is not None))
        if marginal is not None:
            objective, kl = _moved(objective, -scale, marginal), _moved(kl, 1.0, marginal)
    else:
        objective, reward, kl = (Interval.exact(value) for value in found)
    begun = started(optimum, beta)
    first = jax.tree.map(lambda x: x[0], one._lanes()[0])
    if begun is not None:
        start = Interval.exact(begun)
    else:
        prior = _drawn(lambda k, n: draw_prior(k, programs, first, n)[1], prior_key, num)
        start = _of_prior(prior, conditioned=marginal is not None, rewarded=beta is not None)
    known = None if optimum is None else _known(optimum, beta)
    objective = objective if known is None else at_most(objective, known.mean)
    nothing = np.asarray(np.nan)
    below = Side(objective.mean / scale, objective.se / scale, objective.conservative_lower / scale)
    unknown = Interval(nothing, nothing, nothing, nothing, objective.conservative_lower, np.asarray(np.inf))
    side = below if known is None else Side(known.mean / scale, known.se, known.mean / scale)
    gap = None if known is None else _apart(known, objective)
    odd = any(site.kind == "environment" or site.discounted for site in programs.structure.sites)
    return Evidence(
        beta=None if beta is None else np.asarray(beta),
        method="draws" if known is None else "known",
        lower=side,
        upper=None if known is None else side,
        caveat=reason,
        log_evidence=None if odd or known is None else known * (1 / scale),
        by_context=None,
        log_marginal=None if marginal is None else _moved(Interval.exact(0.0), 1.0, marginal),
        optimum=known or unknown,
        prior_objective=start,
        objective=objective,
        reward=reward,
        kl=kl,
        gap=gap,
        kl_reverse=None if odd or gap is None else gap * (1 / scale),
        kl_forward=None,
        ess=nothing,
        khat=nothing,
        missed_mass=nothing,
        num_samples=0 if found is not None else num,
    )


def _known(optimum: KnownOptimum, beta: float | None) -> Interval:
    with user_code("optimum", EngineError, "let it give J* per context at a temperature, a finite number"):
        told: Any = optimum(1.0 if beta is None else beta)
    try:
        value = float(told)
    except (TypeError, ValueError):
        value = np.nan
    if not np.isfinite(value):
        raise EngineError(f"optimum gave {told!r} for beta={beta}; give J* per context, a finite number")
    return Interval.exact(value)


def _number(programs: Programs, num_samples: int) -> int:
    return num_samples if programs.episodes is None else _NUM_PLAYED


def _drawn(draw: Callable[[PRNGKey, int], Totals], key: PRNGKey, num: int) -> Any:
    """Draw in parts, so that long rollouts fit into memory; totals are [draws, contexts], in double precision."""
    parts = [
        _flat(draw(fold_in(key, i), min(_MOST_AT_ONCE, num - done)))
        for i, done in enumerate(range(0, num, _MOST_AT_ONCE))
    ]
    return jax.tree.map(lambda *arrays: np.concatenate(arrays), *parts)


def _apart(known: Interval, objective: Interval) -> Interval:
    """J* − J(q), which is not negative."""
    ends = (
        known.mean - end
        for end in (objective.upper, objective.lower, objective.conservative_upper, objective.conservative_lower)
    )
    return Interval(known.mean - objective.mean, objective.se, *(np.maximum(end, 0.0) for end in ends))


def _flat(totals: Totals) -> Any:
    """Lay totals out as [draws, contexts] in double precision, the axes of one fit dropped."""

    def lay(values: Numbers) -> np.ndarray:
        array = np.asarray(values, float)
        return array.reshape(array.shape[1] if array.ndim > 1 and array.shape[0] == 1 else array.shape[0], -1)

    return jax.tree.map(lay, totals)


def _objective(totals: Any, scale: float) -> np.ndarray:
    """J of each draw and context, reward units."""
    nats: np.ndarray = totals.log_likelihood + totals.ratio
    return totals.reward + scale * nats


def _of_prior(prior: Any, *, conditioned: bool, rewarded: bool) -> Interval:
    """J(π₀): the reward of draws of the prior, weighted by p(y|x) where π₀ means p(x|y); log p(y|x) without rewards."""
    if not rewarded:
        return _mean(prior.log_likelihood)
    return weighted_start(prior.reward, prior.log_likelihood) if conditioned else _mean(prior.reward)


def _moved(interval: Interval, factor: float, marginal: Estimate) -> Interval:
    """Add a multiple of log p(y), whose error widens both intervals."""
    shift, se = factor * np.asarray(marginal.mean, float), abs(factor) * np.asarray(marginal.se, float)
    wide = (1.96 * se, 5 * se)
    return Interval(
        interval.mean + shift,
        np.hypot(interval.se, se),
        interval.lower + shift - wide[0],
        interval.upper + shift + wide[0],
        interval.conservative_lower + shift - wide[1],
        interval.conservative_upper + shift + wide[1],
    )


def _mean(values: np.ndarray) -> Interval:
    """Give the mean over draws and contexts with its normal interval, and a wide one of five standard errors."""
    by_draw = values.mean(1)
    mean, se = by_draw.mean(), by_draw.std(ddof=1) / np.sqrt(len(by_draw))
    ends = (mean - 1.96 * se, mean + 1.96 * se, mean - 5 * se, mean + 5 * se)
    return Interval(*(np.asarray(x) for x in (mean, se, *ends)))

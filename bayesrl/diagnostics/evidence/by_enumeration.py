"""The evidence of one fit whose p* can be enumerated: the two sides of log Z meet."""

from dataclasses import replace
from typing import Any

import jax.numpy as jnp
import numpy as np

from bayesrl.compilation.random_keys import split_keys
from bayesrl.core.programs import Programs
from bayesrl.diagnostics.evidence.confidence_limits import mean_interval
from bayesrl.diagnostics.evidence.mixture_sample import draw_mixture_sample, target_log_weights
from bayesrl.diagnostics.evidence.result import Evidence
from bayesrl.diagnostics.evidence.tempered_sample import TemperedSample
from bayesrl.errors import EngineError
from bayesrl.exact.evaluation import Evaluation, evaluate_exactly
from bayesrl.exact.weighted_draws import WeightedDraws
from bayesrl.statistics.estimates import Estimate, Interval
from bayesrl.typing import Params, PRNGKey

MAX_COUNT = 2**17
"""Assignments, or states × assignments, that can be enumerated in seconds."""

_TARGET_DRAWS = 2000


def bracket_by_enumeration(
    key: PRNGKey,
    programs: Programs,
    params: Params,
    beta: float | None,
    target: WeightedDraws,
    max_count: int,
    num_samples: int,
) -> Evidence:
    """Bracket one fit whose p* at this temperature is `target`: exactly, or from draws if it is too large for that."""
    try:
        evaluation = evaluate_exactly(programs, params, beta, max_count)
    except EngineError:
        return _from_draws(key, programs, params, beta, target, num_samples)
    return _exact(programs, beta, target, evaluation)


def _exact(programs: Programs, beta: float | None, target: WeightedDraws, evaluation: Evaluation) -> Evidence:
    nature = bool(programs.structure.names("environment"))
    scale = 1.0 if beta is None else beta
    assert target.optimum is not None
    optimum = float(target.optimum.mean())
    objective = min(float(evaluation.objective.mean()), optimum)
    # J ≤ J* holds exactly; `min` removes rounding that would make the gap negative.
    gap = optimum - objective
    kl_forward = None if nature else Interval.exact(max(float(evaluation.kl_forward.mean()), 0.0))
    return Evidence(
        beta=None if beta is None else np.asarray(beta),
        method="enumeration",
        **_sides(target, beta),
        caveat="",
        prior_objective=Interval.exact(evaluation.prior_objective.mean()),
        objective=Interval.exact(objective),
        reward=Interval.exact(evaluation.reward.mean()),
        kl=Interval.exact(evaluation.kl.mean()),
        gap=Interval.exact(gap),
        kl_reverse=None if nature else Interval.exact(gap / scale),
        kl_forward=kl_forward,
        ess=np.asarray(np.nan),
        khat=np.asarray(np.nan),
        missed_mass=np.asarray(evaluation.missed_mass.mean()),
        num_samples=0,
    )


def bracket_best_of_n(programs: Programs, params: Params, beta: float, max_count: int, n: int) -> Evidence:
    """Compute the distance of one fit to the law of the best of n draws; see `Evidence.best_of`."""
    found = evaluate_exactly(programs, params, beta, max_count, best_of=n)
    assert found.best_of is not None
    assert found.kl_reverse is not None
    apart, nothing = max(float(found.kl_reverse.mean()), 0.0), np.asarray(np.nan)
    side = Estimate(np.zeros(()), np.zeros(()))
    return Evidence(
        beta=np.asarray(beta),
        method="enumeration",
        lower=side,
        upper=side,
        caveat="",
        log_evidence=None,
        log_marginal=None,
        optimum=Interval.exact(0.0),
        prior_objective=Interval.exact(-beta * float(found.best_of.kl.mean())),
        objective=Interval.exact(-beta * apart),
        reward=Interval.exact(found.reward.mean()),
        kl=Interval.exact(found.kl.mean()),
        gap=Interval.exact(beta * apart),
        kl_reverse=Interval.exact(apart),
        kl_forward=Interval.exact(max(float(found.kl_forward.mean()), 0.0)),
        ess=nothing,
        khat=nothing,
        missed_mass=np.asarray(found.missed_mass.mean()),
        num_samples=0,
        best_of=n,
    )


def _sides(target: WeightedDraws, beta: float | None) -> dict[str, Any]:
    """What the target says about the optimum: both sides of log Z are the same number."""
    assert target.optimum is not None
    optimum = float(target.optimum.mean())
    both = Estimate(np.asarray(optimum / (1.0 if beta is None else beta)), np.zeros(()))
    evidence, marginal = target.log_evidence, None if beta is None else target.log_marginal
    return {
        "lower": both,
        "upper": both,
        "optimum": Interval.exact(optimum),
        "log_evidence": None if evidence is None else Interval.exact(evidence.mean.mean()),
        "by_context": None if evidence is None else Interval.exact(evidence.mean),
        "log_marginal": None if marginal is None else Interval.exact(marginal.mean.mean()),
    }


def _from_draws(
    key: PRNGKey, programs: Programs, params: Params, beta: float | None, target: WeightedDraws, num_samples: int
) -> Evidence:
    """Take log Z as exact; estimate J, E[R] and KL(q‖π₀) from draws."""
    structure = programs.structure
    assert target.optimum is not None
    optimum = target.optimum.reshape(-1)
    known = None if beta is None else target.log_marginal
    marginal = np.zeros(1) if known is None else np.reshape(known.mean, -1)
    draw_key, target_key = split_keys(key)
    sample = draw_mixture_sample(draw_key, programs, params, min(num_samples, 2**14))
    log_z = optimum / (1.0 if beta is None else beta) + marginal
    sampled = TemperedSample(sample, beta, observed=bool(structure.names("observed")), known=log_z)
    found = sampled.evidence(structure.context_shape, "enumeration", marginal)
    found = replace(found, **_sides(target, beta))
    if structure.names("environment"):
        return found.without_divergences()
    kl_forward, missed = _forward(target_key, programs, params, beta, target, log_z)
    return replace(found, kl_forward=kl_forward, missed_mass=np.asarray(missed))


def _forward(
    key: PRNGKey, programs: Programs, params: Params, beta: float | None, target: WeightedDraws, known: np.ndarray
) -> tuple[Interval, float]:
    """Estimate KL(p*‖q) and the missed mass from exact draws of p*."""
    sites = {name: jnp.asarray(value) for name, value in target.resample(key, _TARGET_DRAWS).items()}
    log_ratio = target_log_weights(programs, params, sites, beta) - known
    forward = mean_interval(log_ratio, 4.0)
    # A divergence is never negative, though its estimate may be.
    forward = forward._replace(conservative_lower=np.maximum(forward.conservative_lower, 0.0))
    return forward, float((log_ratio > np.log(10)).mean())

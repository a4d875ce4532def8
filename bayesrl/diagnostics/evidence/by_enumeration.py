"""The bracket of one fit where p* can be enumerated: its two sides meet."""

from dataclasses import replace

import jax.numpy as jnp
import numpy as np

from bayesrl.compilation.keys import split_keys
from bayesrl.core.programs import Programs
from bayesrl.diagnostics.evidence.by_sampling import Bounds, SampledEvidence, evidence_of
from bayesrl.diagnostics.evidence.mixture_sample import draw_mixture_sample, score_sites
from bayesrl.diagnostics.results import Evidence, Side
from bayesrl.errors import EngineError
from bayesrl.exact.enumeration import Evaluation, enumerate_target, evaluate_exactly
from bayesrl.exact.weighted_draws import WeightedDraws
from bayesrl.statistics.estimates import Interval
from bayesrl.typing import Params, PRNGKey

_EXACT_DRAWS = 2000


def enumerated(
    key: PRNGKey, programs: Programs, params: Params, beta: float | None, max_count: int, num_samples: int
) -> tuple[Evidence | None, str]:
    """Bracket one fit by enumeration, or say why it cannot be enumerated.

    Args:
        key: consumed whole, where the fit is too large to be evaluated and is drawn from.
        programs: over all data, nothing in the policy to be trained.
        params: of the one fit.
        beta: reward units per nat; None without rewards.
        max_count: largest number of assignments to visit.
        num_samples: most draws.
    """
    try:
        target = enumerate_target(programs, params, beta, max_count)
    except EngineError as error:
        return None, str(error)
    try:
        ours = evaluate_exactly(programs, params, beta, max_count)
    except EngineError:
        return _drawn(key, programs, params, beta, target, num_samples), ""
    return _exactly(programs, beta, target, ours), ""


def _exactly(programs: Programs, beta: float | None, target: WeightedDraws, ours: Evaluation) -> Evidence:
    nature = bool(programs.structure.names("environment"))
    scale = 1.0 if beta is None else beta
    assert target.optimum is not None
    optimum = float(target.optimum.mean())
    objective = min(float(ours.objective.mean()), optimum)
    gap = optimum - objective
    side = Side(*(np.asarray(x) for x in (optimum / scale, 0.0, optimum / scale)))
    evidence = None if target.log_evidence is None else Interval.exact(target.log_evidence.mean())
    return Evidence(
        beta=None if beta is None else np.asarray(beta),
        method="enumeration",
        lower=side,
        upper=side,
        caveat="",
        log_evidence=evidence,
        by_context=None if target.log_evidence is None else Interval.exact(target.log_evidence),
        log_marginal=_marginal(target, beta),
        optimum=Interval.exact(optimum),
        prior_objective=Interval.exact(ours.prior_objective.mean()),
        objective=Interval.exact(objective),
        reward=Interval.exact(ours.reward.mean()),
        kl=Interval.exact(ours.kl.mean()),
        gap=Interval.exact(gap),
        kl_reverse=None if nature else Interval.exact(gap / scale),
        kl_forward=None if nature else Interval.exact(max(float(ours.kl_forward.mean()), 0.0)),
        ess=np.asarray(np.nan),
        khat=np.asarray(np.nan),
        missed_mass=np.asarray(ours.missed_mass.mean()),
        num_samples=0,
    )


def _marginal(target: WeightedDraws, beta: float | None) -> Interval | None:
    if beta is None or target.log_marginal is None:
        return None
    return Interval.exact(target.log_marginal.mean())


def _drawn(
    key: PRNGKey, programs: Programs, params: Params, beta: float | None, target: WeightedDraws, num_samples: int
) -> Evidence:
    """Let log Z be exact, and J, E[R] and KL(q‖π₀) be estimated."""
    structure = programs.structure
    nature = bool(structure.names("environment"))
    scale = 1.0 if beta is None else beta
    assert target.optimum is not None
    optimum = target.optimum.reshape(-1)
    marginal = np.zeros(1) if target.log_marginal is None or beta is None else target.log_marginal.reshape(-1)
    draw_key, exact_key = split_keys(key)
    pool = draw_mixture_sample(draw_key, programs, params, min(num_samples, 2**14))
    known = optimum / scale + marginal
    unbounded = Bounds(np.full(len(optimum), np.inf), np.inf)
    sampled = SampledEvidence(pool, beta, unbounded, observed=bool(structure.names("observed")), known=known)
    found = evidence_of(sampled, beta, structure.context_shape, "enumeration", marginal=marginal)
    side = Side(*(np.asarray(x) for x in (optimum.mean() / scale, 0.0, optimum.mean() / scale)))
    forward, missed = (None, np.nan) if nature else _forward(exact_key, programs, params, beta, target, known)
    exactly = Interval.exact(optimum.mean() / scale)
    return replace(
        found,
        lower=side,
        upper=side,
        log_evidence=None if nature else exactly,
        by_context=None if nature or target.log_evidence is None else Interval.exact(target.log_evidence),
        log_marginal=_marginal(target, beta),
        optimum=exactly * scale,
        kl_reverse=None if nature else found.kl_reverse,
        kl_forward=forward,
        ess=np.asarray(np.nan if nature else found.ess),
        khat=np.asarray(np.nan if nature else found.khat),
        num_weighed=0 if nature else found.num_weighed,
        missed_mass=np.asarray(missed),
    )


def _forward(
    key: PRNGKey, programs: Programs, params: Params, beta: float | None, target: WeightedDraws, known: np.ndarray
) -> tuple[Interval, float]:
    """KL(p*‖q) and missed mass, from exact draws of p*."""
    sites = {name: jnp.asarray(value) for name, value in target.resample(key, _EXACT_DRAWS).items()}
    apart = score_sites(programs, params, sites, beta) - known
    per_draw = apart.mean(1)
    mean, se = per_draw.mean(), per_draw.std(ddof=1) / np.sqrt(len(per_draw))
    numbers = (mean, se, mean - 1.96 * se, mean + 1.96 * se, max(mean - 4 * se, 0.0), mean + 4 * se)
    return Interval(*(np.asarray(x) for x in numbers)), float((apart > np.log(10)).mean())

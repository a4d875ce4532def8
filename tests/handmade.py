"""Verdicts made by hand, so that what is shown can be tested without what finds it."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from bayesrl.diagnostics.checks import Check, Outcome
from bayesrl.diagnostics.diagnosis import Diagnosis, Verdict
from bayesrl.diagnostics.engines.engine_table import EngineComparison, EngineRow
from bayesrl.diagnostics.evidence.result import Evidence
from bayesrl.diagnostics.reward_kl_frontier import Frontier
from bayesrl.statistics.estimates import Estimate, Interval
from bayesrl.statistics.evaluations import Evaluations

HOSTILE = "</td><script>document.title='taken'</script><img src=x onerror=alert(1)> & $\\frac{ \x1b[31m"


def interval(mean: object, se: float = 0.01) -> Interval:
    """An estimate with a 95% interval."""
    m = np.asarray(mean, float)
    return Interval(m, np.full(m.shape, se), m - 2 * se, m + 2 * se, m - 3 * se, m + 3 * se)


def evidence(beta: float | Sequence[float] | None = 0.5, *, bounded: bool = True) -> Evidence:
    """Evidence of a fit a little short of its optimum; unbounded, it has no upper side."""
    b = None if beta is None else np.asarray(beta, float)
    scale = np.asarray(1.0) if b is None else b
    log_z = 1.0 / scale
    side = Estimate(log_z - 0.02, np.full(log_z.shape, 0.01))
    upper = Estimate(log_z + 0.02, np.full(log_z.shape, 0.01))
    kl = 0.4 / scale
    return Evidence(
        beta=b,
        method="importance",
        lower=side,
        upper=upper if bounded else None,
        caveat="" if bounded else "the weights have no bound.",
        log_evidence=interval(log_z)._replace(conservative_lower=log_z - 0.05, conservative_upper=log_z + 0.05),
        by_context=interval(log_z),
        log_marginal=None,
        optimum=interval(scale * log_z),
        prior_objective=interval(0.2 * np.ones_like(scale)),
        objective=interval(scale * (log_z - 0.02)),
        reward=interval(scale * (log_z - 0.02) + scale * kl),
        kl=interval(kl),
        gap=interval(scale * 0.02, 0.004) if bounded else None,
        kl_reverse=interval(np.full(log_z.shape, 0.02), 0.004) if bounded else None,
        kl_forward=interval(np.full(log_z.shape, 0.03), 0.004) if bounded else None,
        ess=np.full(log_z.shape, 812.0),
        khat=np.full(log_z.shape, 0.31),
        missed_mass=np.full(log_z.shape, 0.002),
        num_samples=1000,
    )


def check(name: str, outcome: Outcome, explanation: str = "Nothing to do.") -> Check:
    return Check(name, 0.012, 0.05, outcome, explanation, "Vehtari et al. 2024")


def diagnosis(
    verdict: Verdict = "pass", beta: float | Sequence[float] | None = 0.5, explanation: str = "Fine."
) -> Diagnosis:
    """A diagnosis with a check of every outcome."""
    checks = (
        check("gap", "pass" if verdict == "pass" else "fail", explanation),
        check("R-hat", "warn", "Restarts differ; run longer."),
        check("Pareto k̂", "unknown", "Too few draws."),
        check("finite steps", "pass"),
    )
    return Diagnosis(verdict, "the gap is 2% of what there was to gain.", checks, evidence(beta))


def frontier(beta: Sequence[float] = (0.1, 0.3, 1.0), *, gold: bool = True) -> Frontier:
    """A frontier whose gold metric turns down at the middle β."""
    peak = interval([0.3, 0.6, 0.4]) if gold else None
    checks = (check("J* convex", "pass"), check("KL non-increasing", "fail", "Train longer."))
    return Frontier(np.asarray(beta), evidence(beta), checks, peak, beta[1] if gold else None)


def engine_row(engine: Any, log_z: Interval, betas: Any, **others: Any) -> EngineRow:
    given: dict[str, Any] = {"gap": None, "by_context": None, "ess": np.full(np.shape(betas), 120.0), "num_draws": 64}
    given |= {"evaluations": Evaluations(4096, 8192), "seconds": 0.5, "compile_seconds": 1.25, **others}
    as_arrays = Interval(*map(np.asarray, log_z * betas))
    return EngineRow(engine, log_z, as_arrays, **given)


def engine_comparison(betas: Any) -> EngineComparison:
    """Four engines that agree, two of them with one side, and two that do not apply."""
    one = np.ones(np.shape(betas))
    blind = Interval.normal(7.5 * one, 0.01 * one)._replace(
        lower=np.full(np.shape(betas), math.nan),
        upper=np.full(np.shape(betas), math.nan),
        conservative_lower=7.2 * one,
        conservative_upper=math.inf * one,
    )
    rows = (
        engine_row(
            "enumeration", Interval.exact(7.536 * one), betas, ess=np.full(np.shape(betas), math.nan), num_draws=0
        ),
        engine_row("importance", blind, betas, note="modes that no draw has seen may exist"),
        engine_row(
            "smc_exact_twist", Interval.normal(7.53 * one, 0.02 * one, 5.0), betas, gap=Interval.exact(0.2 * one)
        ),
        engine_row("fit", Interval.between(7.4 * one, math.inf * one), betas),
    )
    refusals = {"nuts": "NUTS cannot draw discrete site 'arm'", "smc_tempered": "NUTS cannot draw discrete site 'arm'"}
    return EngineComparison(np.asarray(betas), rows, refusals, 4096, Interval.exact(0.7 * one), 3)

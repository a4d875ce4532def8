"""`diagnose`: whether a fit can be trusted."""

import math
from typing import Annotated, Any

import numpy as np

from bayesrl.arguments import CountOrZero, checked, integer_range
from bayesrl.compilation.jit import trace_cache
from bayesrl.compilation.keys import split_keys
from bayesrl.diagnostics.checks import (
    convergence_check,
    coverage_check,
    entropy_check,
    gap_check,
    held_out_check,
    not_finite_check,
    restarts_check,
    skipped_check,
    weights_check,
    worth_check,
)
from bayesrl.diagnostics.convergence import TrainingTrend, estimate_trend, suggest_remedy
from bayesrl.diagnostics.evidence.bounds import KNOWN, RequestedMethod, evaluate_fit, evidence
from bayesrl.diagnostics.evidence.by_enumeration import MAX_COUNT
from bayesrl.diagnostics.evidence.by_known_optimum import KnownOptimum
from bayesrl.diagnostics.evidence.result import Evidence
from bayesrl.diagnostics.results import Check, Diagnosis, Verdict
from bayesrl.errors import EngineError
from bayesrl.posterior.posterior import Posterior
from bayesrl.typing import PRNGKey


@checked(EngineError, *KNOWN)
@trace_cache()
def diagnose(
    key: PRNGKey,
    posterior: Posterior,
    *,
    held_out: tuple[Any, ...] | None = None,
    method: RequestedMethod = "auto",
    optimum: KnownOptimum | None = None,
    reward_bound: float | None = None,
    num_samples: Annotated[int, integer_range(256)] = 2**17,
    max_count: CountOrZero = MAX_COUNT,
    held_out_evidence: Evidence | None = None,
) -> Diagnosis:
    """Ask a fit every question that tells whether it can be trusted, and give one verdict.

    The verdict is `fail` where more than about 2% of J* − J(π₀) is left or a mode of p* is dropped,
    `pass` where less is left and no mode is dropped, and `unknown` where p* cannot be reached.

    Args:
        key: consumed whole.
        posterior: with its programs.
        held_out: other arguments of the program, on which J is compared.
        method: as in `evidence`.
        optimum: as in `evidence`.
        reward_bound: as in `evidence`.
        num_samples: as in `evidence`.
        max_count: as in `evidence`.
        held_out_evidence: of the fit on `held_out`, where it was found before.

    Returns:
        `Diagnosis`; its checks are of the worst β.

    Raises:
        PolicyError: it is no posterior, or was loaded without its policy; `held_out` is no tuple.
        EngineError: as in `evidence`.

    Example:
        >>> import jax, jax.numpy as jnp, numpyro, numpyro.distributions as dist, bayesrl
        >>> from bayesrl.diagnostics.diagnosis import diagnose
        >>> def bandit():
        ...     arm = numpyro.sample("arm", dist.Categorical(logits=jnp.zeros(3)))
        ...     bayesrl.reward("payoff", jnp.array([0.0, 1.0, 2.0])[arm])
        >>> good = bayesrl.fit(jax.random.key(0), bandit, beta=1.0, num_steps=500, progress=False)
        >>> bad = bayesrl.fit(jax.random.key(0), bandit, beta=1.0, num_steps=5, progress=False)
        >>> diagnose(jax.random.key(1), good).verdict, diagnose(jax.random.key(1), bad).verdict
        ('pass', 'fail')
    """
    options: dict[str, Any] = {"method": method, "reward_bound": reward_bound, "num_samples": num_samples}
    options["max_count"] = max_count
    own_key, other_key = split_keys(key)
    found, reason = _evidence(own_key, posterior, options | {"optimum": optimum})
    objective, course = _course(posterior)
    checks = []
    if found is not None:
        coverage = coverage_check(found)
        dropped = coverage.explanation if coverage.outcome == "fail" else ""
        collapsed = bool(posterior.statistics) and _entropy(posterior, found, reached=False).outcome == "warn"
        gain = _gain(found, objective)
        remedy = suggest_remedy(course, gain, restarts=posterior.num_restarts, collapsed=collapsed, coverage=dropped)
        checks = [gap_check(found, remedy), coverage]
    reached = bool(checks) and checks[0].outcome == "pass"
    checks += _of_run(posterior, found, reached=reached)
    if course is not None:
        checks += _of_history(posterior, course, _gain(found, objective))
    if held_out is not None and found is not None:
        checks.append(_held_out(other_key, posterior, held_out, found, max_count, held_out_evidence))
    verdict, sentence = _verdict(checks, reason)
    return Diagnosis(verdict, sentence, tuple(checks), found)


def _evidence(key: PRNGKey, posterior: Posterior, options: dict[str, Any]) -> tuple[Evidence | None, str]:
    try:
        return evidence(key, posterior, **options), ""
    except EngineError as error:
        if not posterior.programs or not posterior.programs.structure.actions:
            return None, str(error)
        raise


def _held_out(
    key: PRNGKey,
    posterior: Posterior,
    held_out: tuple[Any, ...],
    found: Evidence,
    max_count: int,
    held_out_evidence: Evidence | None,
) -> Check:
    """Compare J on what was held out, whose optimum does not matter."""
    try:
        other = held_out_evidence or evaluate_fit(key, posterior, *held_out, max_count=max_count)
    except EngineError as error:
        return Check("held out", math.nan, 0.1, "unknown", f"not scored: {error}.", "J on held-out arguments")
    return held_out_check(found, other.objective.mean)


def _of_run(posterior: Posterior, found: Evidence | None, *, reached: bool) -> list[Check]:
    """Ask what restarts and draws tell."""
    lead = len(posterior.batch_shape)
    checks = []
    statistics = {name: np.asarray(value, float) for name, value in posterior.statistics.items()}
    best = posterior if posterior.num_restarts == 1 else posterior.select(restart="best")
    if statistics:
        weights = np.asarray(best.statistics["log_weight"], float)
        num, contexts = weights.shape[lead], max(math.prod(weights.shape[lead + 1 :]), 1)
        if found is not None:
            checks.append(_worth(found))
        else:
            checks.append(weights_check(weights.reshape(-1, num, contexts), nature=_has_nature(posterior)))
        per_draw = tuple(range(lead + 1, weights.ndim))
        ratio = statistics["log_q"] - statistics["log_prior"]
        by_restart = {"total_reward": statistics["total_reward"].mean(per_draw), "log_ratio": ratio.mean(per_draw)}
        restarts = posterior.num_restarts
        laid = {name: value.reshape(-1, restarts, num) for name, value in by_restart.items()}
        by_lane = np.asarray(posterior.objective_by_restart(), float).reshape(-1, restarts)
        checks.append(restarts_check(laid, by_lane, _gain(found, by_lane)))
        checks.append(_entropy(posterior, found, reached=reached))
    return checks


def _course(posterior: Posterior) -> tuple[np.ndarray, TrainingTrend | None]:
    """Give J along the training of the best restarts, [chunk, lane], and how far the run had still to go."""
    best = posterior if posterior.num_restarts == 1 else posterior.select(restart="best")
    steps = np.asarray(best.history.get("step", ()))
    if not len(steps):
        return np.zeros((1, 1)), None
    objective = np.asarray(best.history["objective"], float).reshape(len(steps), -1)
    return objective, estimate_trend(objective, steps, dict(posterior.settings))


def _of_history(posterior: Posterior, course: TrainingTrend, gain: float) -> list[Check]:
    finite = np.isfinite(np.asarray(posterior.history["objective"], float)[-1]).all()
    steps, skipped = int(posterior.history["step"][-1]), int(np.max(posterior.history["skipped"][-1]))
    converged = convergence_check(course, gain) if finite else not_finite_check()
    return [converged, skipped_check(skipped, steps)]


def _worth(found: Evidence) -> Check:
    """Ask what the draws are worth that the evidence has weighed."""
    told = [[x for x in np.reshape(part, -1) if not math.isnan(x)] for part in (found.ess, found.khat)]
    return worth_check(min(told[0], default=math.nan), max(told[1], default=math.nan), found.num_weighed)


def _has_nature(posterior: Posterior) -> bool:
    return posterior.programs is not None and bool(posterior.programs.structure.names("environment"))


def _entropy(posterior: Posterior, found: Evidence | None, *, reached: bool) -> Check:
    """Entropies of discrete policies, from the draws that the fit carries."""
    best = posterior if posterior.num_restarts == 1 else posterior.select(restart="best")
    assert best.programs is not None
    structure = best.programs.structure
    if not structure.actions or not all(structure[name].discrete for name in structure.actions):
        return entropy_check(math.nan, math.nan, reached=reached)
    log_q, log_prior = (np.asarray(best.statistics[name], float) for name in ("log_q", "log_prior"))
    lead = len(best.batch_shape)
    axes = tuple(range(lead, log_q.ndim))
    # −E_q[log π₀] bounds the prior's entropy scale from the fit's own draws.
    entropy, cross = -log_q.mean(axes).reshape(-1), -log_prior.mean(axes).reshape(-1)
    worst = int(np.argmin(entropy / np.maximum(cross, 1e-12)))
    return entropy_check(float(entropy[worst]), float(cross[worst]), reached=reached)


def _gain(found: Evidence | None, objective: np.ndarray) -> float:
    """What there was to gain, or failing that what was gained."""
    if found is not None and found.prior_objective is not None:
        gain = np.min(found.optimum.mean - found.prior_objective.mean)
        if np.isfinite(gain) and gain > 0:
            return float(gain)
    with np.errstate(invalid="ignore"):  # J may be −∞ throughout
        gained = np.abs(objective - objective[0])
    return float(np.max(gained, where=np.isfinite(gained), initial=0.0))


def _verdict(checks: list[Check], reason: str) -> tuple[Verdict, str]:
    """One word and one sentence."""
    by_name = {check.name: check for check in checks}
    for name in ("gap", "mode coverage", "skipped steps", "convergence"):
        if name in by_name and by_name[name].outcome == "fail":
            return "fail", f"The fit is not good: {by_name[name].explanation}"
    gap = by_name.get("gap")
    if gap is None:
        return "unknown", f"Whether the fit is good cannot be told: {reason}."
    if gap.outcome == "unknown":
        return "unknown", f"Whether the fit is good cannot be told: {gap.explanation} {_remedy(gap)}"
    warned = [check.name for check in checks if check.outcome == "warn"]
    caution = f" Look at: {', '.join(warned)}." if warned else ""
    return "pass", f"The fit is good: {gap.explanation}{caution}"


def _remedy(gap: Check) -> str:
    """What would settle it."""
    if "discounted" in gap.explanation or "recorded" in gap.explanation:
        return "Pass optimum=, the optimum, where it is known; compare() tells which of several fits is better."
    if "bound" in gap.explanation:
        return "Pass reward_bound=, the greatest reward a draw can earn, or make the problem small enough to enumerate."
    return "More draws (num_samples=), a longer fit, or a problem small enough to be enumerated would settle it."

"""`diagnose`: whether you can trust a fit."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, Literal

import numpy as np

from bayesrl.arguments import CountOrZero, Untraced, checked, integer_range
from bayesrl.compilation.jit import trace_cache
from bayesrl.compilation.random_keys import fold_in, split_keys
from bayesrl.diagnostics.checks import (
    Check,
    checks_listing,
    convergence_check,
    coverage_check,
    entropy_check,
    gap_check,
    held_out_check,
    restarts_check,
    skipped_check,
    weights_check,
)
from bayesrl.diagnostics.convergence import TrainingTrend, estimate_trend, suggest_remedy
from bayesrl.diagnostics.evidence.bounds import KNOWN, RequestedMethod, evaluate_fit, evidence
from bayesrl.diagnostics.evidence.by_enumeration import MAX_COUNT
from bayesrl.diagnostics.evidence.by_known_optimum import KnownOptimum
from bayesrl.diagnostics.evidence.result import NO_WEIGHTS, Evidence
from bayesrl.diagnostics.evidence.tempered_sample import worth_of
from bayesrl.diagnostics.proxy_gains import Overoptimisation, trust_check
from bayesrl.diagnostics.proxy_trust import trust_of
from bayesrl.display.tables import Displayable, DisplayBlock, Line
from bayesrl.errors import BayesRLError, EngineError
from bayesrl.posterior.posterior import Posterior
from bayesrl.posterior.regularized import minimised_loss
from bayesrl.statistics.regularizer_names import distils, learns_directly
from bayesrl.typing import PRNGKey

_OF_TRUST = 3  # the number to fold a key with for draws of the reward

type Verdict = Literal["pass", "fail", "unknown"]


@checked(EngineError)
@dataclass(frozen=True, repr=False)
class Diagnosis(Displayable):
    """Whether you can trust a fit.

    Attributes:
        verdict: pass, fail, or unknown if p* is out of reach.
        explanation: why, and what would settle it.
        checks: every question and its answer.
        evidence: what the first checks rest on; None if p* cannot be approached at all.
        trust: how far the fit may be followed, if its reward is not known; the check "trust" rests on it.
    """

    verdict: Verdict
    explanation: str
    checks: tuple[Check, ...]
    evidence: Evidence | None
    trust: Overoptimisation | None = None

    def __getitem__(self, name: str) -> Check:
        return next(check for check in self.checks if check.name == name)

    def _blocks(self) -> Sequence[DisplayBlock]:
        numbers = () if self.evidence is None else self.evidence._blocks()
        gains = () if self.trust is None else self.trust._blocks()
        return (Line(self.explanation, self.verdict), checks_listing(self.checks), *numbers, *gains)


@checked(EngineError, *KNOWN, Untraced("call it outside: it compiles its own programs"))
@trace_cache()
def diagnose(
    key: PRNGKey,
    posterior: Posterior,
    *,
    held_out: tuple[Any, ...] | None = None,
    method: RequestedMethod = "auto",
    optimum: KnownOptimum | None = None,
    reward_bound: float | None = None,
    num_samples: Annotated[int, integer_range(256)] | None = None,
    max_count: CountOrZero = MAX_COUNT,
    held_out_evidence: Evidence | None = None,
    overoptimisation: Overoptimisation | None = None,
) -> Diagnosis:
    """Check a fit in every way that shows whether you can trust it, and give one verdict.

    The verdict is `fail` if more than about 2% of J* − J(π₀) is missing or the fit dropped a mode of p*,
    `pass` if less is missing and no mode was dropped, and `unknown` if p* is out of reach.

    Args:
        key: consumed whole.
        posterior: posterior with its programs.
        held_out: other arguments of the program, on which to compare J.
        method: as in `evidence`.
        optimum: as in `evidence`.
        reward_bound: as in `evidence`.
        num_samples: as in `evidence`.
        max_count: as in `evidence`.
        held_out_evidence: evidence about the fit on `held_out`, if you already have it.
        overoptimisation: what `overoptimisation` found of it, if you already have it; otherwise it is found from a few
            draws where the total reward is a `rewards.uncertain`.

    Returns:
        `Diagnosis`; its checks describe the worst β.

    Raises:
        PolicyError: `posterior` is not a posterior, or was loaded without its policy; or `held_out` is not a tuple.
        EngineError: as in `evidence`.

    Example:
        >>> import jax, jax.numpy as jnp, numpyro, numpyro.distributions as dist, bayesrl
        >>> def bandit():
        ...     arm = numpyro.sample("arm", dist.Categorical(logits=jnp.zeros(3)))
        ...     bayesrl.reward("payoff", jnp.array([0.0, 1.0, 2.0])[arm])
        >>> good = bayesrl.fit(jax.random.key(0), bandit, beta=1.0, num_steps=500, progress=False)
        >>> bad = bayesrl.fit(jax.random.key(0), bandit, beta=1.0, num_steps=5, progress=False)
        >>> bayesrl.diagnose(jax.random.key(1), good).verdict, bayesrl.diagnose(jax.random.key(1), bad).verdict
        ('pass', 'fail')
    """
    own_key, other_key = split_keys(key)
    best = posterior if posterior.num_restarts == 1 else posterior.select(restart="best")
    found, reason = None, ""
    try:
        options: dict[str, Any] = {"method": method, "optimum": optimum, "reward_bound": reward_bound}
        found = evidence(own_key, posterior, **options, num_samples=num_samples, max_count=max_count)
    except EngineError as error:
        # A policy without actions has no p*; the checks of the training still apply.
        if posterior.programs is None or posterior.programs.structure.actions:
            raise
        reason = str(error)
    objective, trend = _training(best)
    direct = best.settings.get("direct")
    gain, entropy, checks = _gain(found, objective, direct), _entropies(best), list[Check]()
    if found is not None:
        coverage = coverage_check(found)
        remedy = suggest_remedy(
            trend,
            gain,
            restarts=posterior.num_restarts,
            collapsed=bool(posterior.statistics) and entropy_check(*entropy, reached=False).outcome == "warn",
            coverage=coverage.explanation if coverage.outcome == "fail" else "",
        )
        checks = [gap_check(found, remedy if direct is None else _LEADS_ELSEWHERE), coverage]
    if posterior.statistics:
        checks += [_weights(best, found), _restarts(posterior, found)]
        checks.append(entropy_check(*entropy, reached=bool(checks) and checks[0].outcome == "pass"))
    if trend is not None:
        finite = np.isfinite(objective[-1]).all()
        steps, skipped = int(posterior.history["step"][-1]), int(np.max(posterior.history["skipped"][-1]))
        checks += [convergence_check(trend if finite else None, gain), skipped_check(skipped, steps)]
    if held_out is not None and found is not None:
        score = partial(evaluate_fit, other_key, posterior, *held_out, max_count=max_count)
        checks.append(_held_out(found, held_out_evidence, score))
    trust, more = _trust(key, posterior, overoptimisation)
    checks += more
    return Diagnosis(
        *_verdict(checks := _advise(posterior, checks), reason, found, direct), tuple(checks), found, trust
    )


_LOWER_RATE = "lower the rate (learning_rate=), or choose a guide that holds the policy it begins with."
_LEADS_ELSEWHERE = (
    "the judgements lead elsewhere than this reward, or are too few: give more of them, or fit the reward itself "
    "(objective=ReverseKL())."
)


def _trust(
    key: PRNGKey, posterior: Posterior, known: Overoptimisation | None
) -> tuple[Overoptimisation | None, list[Check]]:
    """Ask how far the reward can be followed, if it is not known."""
    try:
        found = known or trust_of(fold_in(key, _OF_TRUST), posterior)
    except BayesRLError as error:
        return None, [Check("trust", math.nan, 0.05, "unknown", f"not told: {str(error).rstrip('.')}.", "")]
    return found, [] if found is None else [trust_check(found)]


def _held_out(found: Evidence, known: Evidence | None, score: Callable[[], Evidence]) -> Check:
    """Compare J on other arguments, scored unless that is known."""
    try:
        return held_out_check(found, (known or score()).objective.mean)
    except EngineError as error:
        explanation = f"not scored: {error}."
        return Check("held out", math.nan, 0.1, "unknown", explanation, "J on held-out arguments")


def _advise(posterior: Posterior, checks: list[Check]) -> list[Check]:
    """Put advice in other words where `fit` did not make the posterior, or judgements did."""
    words = _ELSEWHERE if posterior.trained_elsewhere else {}
    if "direct" in posterior.settings:
        words = words | {_LOWER_RATE: _LEADS_ELSEWHERE}
    for option, instead in words.items():
        checks = [check._replace(explanation=check.explanation.replace(option, instead)) for check in checks]
    return checks


_ELSEWHERE = {
    " (num_steps=)": "",
    " (learning_rate=)": "",
    "one restart; num_restarts=4 would": "one set of parameters; others, trained from other starts, would",
    "Use more restarts and select('mixture')": "Train from several starts",
    "more restarts and select('mixture') may": "training from several starts may",
}


def _training(best: Posterior) -> tuple[np.ndarray, TrainingTrend | None]:
    """Return J along the training, [chunk, lane], and its trend; None without a history."""
    steps = np.asarray(best.history.get("step", ()))
    if not len(steps):
        return np.zeros((1, 1)), None
    objective = np.asarray(best.history["objective"], float).reshape(len(steps), -1)
    if (loss := minimised_loss(best.settings, best.beta, best.history)) is not None:
        objective = -loss.reshape(len(steps), -1)
    return objective, estimate_trend(objective, steps, dict(best.settings))


def _weights(best: Posterior, found: Evidence | None) -> Check:
    """Ask what the evidence's weighted draws are worth; without evidence, ask of the draws that the fit carries."""
    if found is not None:
        ess, khat = (part[~np.isnan(part)] for part in (np.reshape(found.ess, -1), np.reshape(found.khat, -1)))
        unknown = found.rows[0].no_khat or NO_WEIGHTS
        return weights_check(min(ess, default=math.nan), max(khat, default=math.nan), found.num_weighed, unknown)
    weights = np.asarray(best.statistics["log_weight"], float)
    num = weights.shape[len(best.batch_shape)]
    if best.programs is not None and best.programs.structure.names("environment"):
        return weights_check(math.nan, math.nan, num)
    # Every β and restart counts as one more context, of which the worst is shown.
    by_draw = np.moveaxis(weights.reshape(-1, num, math.prod(weights.shape[len(best.batch_shape) + 1 :])), 1, 0)
    return weights_check(*worth_of(by_draw.reshape(num, -1)), num)


def _restarts(posterior: Posterior, found: Evidence | None) -> Check:
    """Compare the draws of the restarts, [beta, restart, draw]."""
    lead, restarts = len(posterior.batch_shape), posterior.num_restarts
    statistics = {name: np.asarray(value, float) for name, value in posterior.statistics.items()}
    ratio = statistics["log_q"] - statistics["log_prior"]
    by_draw = {
        name: value.mean(tuple(range(lead + 1, value.ndim))).reshape(-1, restarts, value.shape[lead])
        for name, value in (("total_reward", statistics["total_reward"]), ("log_ratio", ratio))
    }
    objective = np.asarray(posterior.objective_by_restart(), float).reshape(-1, restarts)
    return restarts_check(by_draw, objective, _gain(found, objective, posterior.settings.get("direct")))


def _entropies(best: Posterior) -> tuple[float, float]:
    """Return the entropies of fit and prior at the worst β, from the fit's draws; nan unless all is discrete."""
    structure = best._programs_for().structure
    if not best.statistics or not structure.actions or not all(structure[name].discrete for name in structure.actions):
        return math.nan, math.nan
    log_q, log_prior = (np.asarray(best.statistics[name], float) for name in ("log_q", "log_prior"))
    axes = tuple(range(len(best.batch_shape), log_q.ndim))
    # −E_q[log π₀] bounds the prior's entropy scale from the fit's own draws.
    entropy, cross = -log_q.mean(axes).reshape(-1), -log_prior.mean(axes).reshape(-1)
    worst = int(np.argmin(entropy / np.maximum(cross, 1e-12)))
    return float(entropy[worst]), float(cross[worst])


def _gain(found: Evidence | None, objective: np.ndarray, direct: str | None) -> float:
    """The possible gain, or if unknown, the gain so far."""
    # What judgements gain is on the scale of their own loss, whatever the policy's reward had to give.
    if direct is None and found is not None and found.prior_objective is not None:
        gain = np.min(found.optimum.mean - found.prior_objective.mean)
        if np.isfinite(gain) and gain > 0:
            return float(gain)
    with np.errstate(invalid="ignore"):  # J may be −∞ throughout
        gained = np.abs(objective - objective[0])
    return float(np.max(gained, where=np.isfinite(gained), initial=0.0))


def _verdict(checks: list[Check], reason: str, found: Evidence | None, direct: str | None) -> tuple[Verdict, str]:
    """One word and one sentence that explains it, and says of which J it is, if not that with KL."""
    word, explanation = _judged(checks, reason)
    if direct is not None:
        explanation = f"{explanation} {learns_directly(direct)}"
    if found is not None and found.best_of is not None:
        return word, f"{explanation} {distils(found.best_of)}"
    if found is None or found.regularizer == "kl":
        return word, explanation
    return word, f"{explanation} J and its optimum are those with {found.symbol} in the place of KL."


def _judged(checks: list[Check], reason: str) -> tuple[Verdict, str]:
    by_name = {check.name: check for check in checks}
    for name in ("gap", "mode coverage", "skipped steps", "convergence"):
        if name in by_name and by_name[name].outcome == "fail":
            return "fail", f"The fit is not good: {by_name[name].explanation}"
    if "trust" in by_name and by_name["trust"].outcome == "fail":
        return "fail", f"The reward is not to be trusted so far: {by_name['trust'].explanation}"
    gap = by_name.get("gap")
    if gap is None:
        return "unknown", f"Whether the fit is good cannot be told: {reason}."
    if gap.outcome == "unknown":
        return "unknown", f"Whether the fit is good cannot be told: {gap.explanation} {_remedy(gap)}"
    warned = [check.name for check in checks if check.outcome == "warn"]
    caution = f" Look at: {', '.join(warned)}." if warned else ""
    return "pass", f"The fit is good: {gap.explanation}{caution}"


def _remedy(gap: Check) -> str:
    """Say what would settle the question."""
    if "discounted" in gap.explanation or "recorded" in gap.explanation:
        return "Pass optimum=, the optimum, where it is known; compare() tells which of several fits is better."
    if "bound" in gap.explanation:
        return "Pass reward_bound=, the greatest reward a draw can earn, or make the problem small enough to enumerate."
    return "More draws (num_samples=), a longer fit, or a problem small enough to be enumerated would settle it."

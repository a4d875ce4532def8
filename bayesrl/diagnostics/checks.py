"""The questions that `diagnose` asks of a fit; each is a pure function of measurements."""

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np

from bayesrl.diagnostics.convergence import TrainingTrend
from bayesrl.diagnostics.evidence.result import NO_WEIGHTS, TIED, Evidence
from bayesrl.diagnostics.tail_behaviour import rank_rhat
from bayesrl.display.formatting import format_draws, format_number, format_share, format_with_limit
from bayesrl.display.tables import MARKS, Table

GOOD_SHARE = 0.0224
"""A verdict changes when the gap is √(1% · 5%) of J* − J(π₀), half way from good to bad on the log scale."""

LEFT = 0.01
"""A run has converged when at most this share of the possible gain is still ahead of it."""

MISSED_WARN, MISSED_FAIL = 0.02, 0.1
_BARRED = 80.0
"""Nats by which p* exceeds the fit in places the fit never visits: single precision has no such probability."""

LEAST_WORTH = 0.1
"""To be weighted, the fit's own draws must be worth at least this share of their number as draws of p*."""

RHAT = 1.05
SMALL_KL = 3e-6
"""A fit this close to p*, in nats, is good however small the possible gain: single precision resolves no more."""

type Outcome = Literal["pass", "warn", "fail", "unknown"]


class Check(NamedTuple):
    """One question about a fit, and its answer.

    Attributes:
        name: the question, in two or three words.
        value: the measured value, the worst over β; nan if it could not be measured.
        threshold: where warning or failure begins.
        least: whether the threshold is the least good value; by default it is the greatest.
        outcome: pass, warn, fail, or unknown if it could not be measured.
        explanation: one sentence: what the value means, and what to do.
        reference: where the check comes from.
    """

    name: str
    value: float
    threshold: float
    outcome: Outcome
    explanation: str
    reference: str = ""
    least: bool = False

    @property
    def value_text(self) -> str:
        """The value, with enough digits to show on which side of the threshold it is."""
        return format_with_limit(self.value, self.threshold)[0]

    @property
    def limit(self) -> str:
        """The threshold, with the sign of its good side."""
        return f"{'≥' if self.least else '≤'} {format_with_limit(self.value, self.threshold)[1]}"


def checks_listing(checks: Sequence[Check]) -> Table:
    """One row per check, with its advice as a note."""
    rows = [(f"{MARKS[c.outcome]} {c.outcome}", c.name, c.value_text, c.limit) for c in checks]
    return Table(("outcome", "check", "value", "limit"), rows, "llrr", [c.explanation for c in checks])


def gap_check(evidence: Evidence, remedy: str = "fit longer (num_steps=), or choose a richer guide.") -> Check:
    """Ask how much of the possible gain is still missing, at the worst β, and give a remedy if it is too much."""
    if evidence.best_of is not None:
        return _distance_check(evidence, remedy)
    of_kl = evidence.regularizer == "kl"
    reference = "J* − J(q) = β·KL(q‖p*)" if of_kl else f"J* − J(q), where J = E[R] − β·{evidence.symbol}"
    if evidence.relative_gap is None or evidence.gap is None:
        return _unknown("gap", GOOD_SHARE, f"the optimum is not known: {evidence.caveat}.", reference)
    rows = evidence.rows
    outcomes, values = zip(*(_judge_gap(row) for row in rows), strict=True)
    worst = _worst(outcomes, values)
    outcome, value = outcomes[worst], values[worst]
    explanation = _gap_explanation(outcome, value, rows[worst], evidence.caveat, remedy)
    # The share appears beside its limit, and bounds may lie twice as far from the limit as an estimate.
    limit = GOOD_SHARE
    if outcome == "pass" and value > GOOD_SHARE:
        limit = 2 * GOOD_SHARE
    elif outcome == "fail" and value < GOOD_SHARE:
        limit = GOOD_SHARE / 2
    return Check("gap", value, limit, outcome, explanation, reference)


def _distance_check(evidence: Evidence, remedy: str) -> Check:
    """Ask how far a fit to the best of n draws is from their law, at the worst β."""
    reference = "KL(q‖pₙ) beside KL(pₙ‖π₀), pₙ the law of the best of n"
    outcomes, values = zip(*(_judge_gap(row) for row in evidence.rows), strict=True)
    worst = _worst(outcomes, values)
    row, outcome = evidence.rows[worst], outcomes[worst]
    assert row.kl_reverse is not None
    explanation = (
        f"KL(q‖pₙ) is {format_share(values[worst])} of KL(pₙ‖π₀), the way from the prior to the best of "
        f"n = {evidence.best_of}{'.' if outcome == 'pass' else f': {remedy}'}"
    )
    if outcome == "unknown":
        explanation = f"how far it is from the best of n = {evidence.best_of} cannot be told: {evidence.caveat}."
    limit = GOOD_SHARE * (2 if outcome == "pass" and values[worst] > GOOD_SHARE else 1)
    return Check("gap", values[worst], limit, outcome, explanation, reference)


def _judge_gap(row: Evidence) -> tuple[Outcome, float]:
    """Judge the gap at one temperature; also return the missing share of the possible gain."""
    gap, share = row.gap, row.relative_gap
    assert gap is not None
    assert share is not None
    scale = 1.0 if row.beta is None else float(row.beta)
    outcome, value = _judge_share(*(float(part) for part in share))
    if gap.conservative_lower == math.inf:
        outcome, value = "fail", math.inf
    error = 1.96 * gap.se if math.isnan(gap.mean) else 0.0  # a one-sided bound is as uncertain as its J
    if (gap.conservative_upper + error) / scale < SMALL_KL:
        return "pass", value
    if math.isnan(share.mean) and gap.conservative_lower / scale > SMALL_KL:  # there was nothing to gain
        return "fail", value
    return outcome, value


def _gap_explanation(outcome: Outcome, value: float, row: Evidence, caveat: str, remedy: str) -> str:
    """Say how much is missing, exactly if that is known, and what to do."""
    assert row.relative_gap is not None
    mean, se, _, _, least, most = (float(part) for part in row.relative_gap)
    at = "" if row.beta is None else f" at β = {float(row.beta):.3g}"
    error = se if math.isnan(mean) else 0.0
    if value == math.inf:
        return (
            f"the fit draws what earns −∞{at}, so its J is −∞: choose a guide that can rule it out, or fit with a "
            "large negative reward in its place."
        )
    if outcome == "unknown":
        known = (least > 0 and math.isfinite(least)) or math.isfinite(most)
        left = f"{_between(least, most, error)} of what there was to gain is left" if known else _UNTOLD
        return f"{left}{at}: {caveat or 'more draws would tell'}."
    if math.isnan(value):  # the prior policy is optimal, or single precision cannot tell it from the optimum
        kept = "and nothing was lost" if outcome == "pass" else "but the fit left it: lower the learning rate"
        return f"there was nothing to gain{at}, {kept}."
    if outcome == "pass":
        bound = "" if least == most else "at most "
        left = "less than 0.1%" if value < 1e-3 else f"{bound}{value:.1%}{_error(error)}"
        return f"{left} of what there was to gain is left{at}."
    if value > 1.01:
        return (
            f"the fit is worse than the policy that it began with, by {value - 1:.1%} of what there was to "
            f"gain{at}: lower the rate (learning_rate=), or choose a guide that holds the policy it begins with."
        )
    bound = "at least " if value == least != most else ""
    return f"{bound}{value:.1%}{_error(error)} of what there was to gain is left{at}: {remedy}"


_UNTOLD = "how much is left cannot be told"


def _error(error: float) -> str:
    return f" ± {max(error, 1e-3):.1%}" if error > 0 else ""


def _between(least: float, most: float, error: float) -> str:
    if error > 0 and math.isfinite(most):
        return f"at most {format_share(most)}{_error(error)}"
    if math.isfinite(most):
        return f"between {format_share(least)} and {format_share(most)}"
    return f"at least {format_share(least)}{_error(error)}, and nobody knows how much at most,"


def _judge_share(
    mean: float, se: float, lower: float, upper: float, least: float, most: float
) -> tuple[Outcome, float]:
    """Judge the gap, as a share of the possible gain, by its calibrated interval or else by the conservative one.

    If only one end of the gap is known, that end inherits the standard error of J.
    """
    error = 1.96 * se if math.isnan(mean) else 0.0
    if math.isfinite(upper):
        middle = mean < GOOD_SHARE
        # Within a factor of 2 of the limit the estimate decides, so that a near tie still gets a verdict.
        if upper < GOOD_SHARE or (middle and upper < 2 * GOOD_SHARE):
            return "pass", upper
        if lower > GOOD_SHARE or (not middle and lower > GOOD_SHARE / 2):
            return "fail", mean
    if most + error < 2 * GOOD_SHARE:
        return "pass", most
    if least - error > GOOD_SHARE / 2:
        return "fail", least
    return "unknown", math.nan


def coverage_check(evidence: Evidence) -> Check:
    """Ask how much of p* lies where the fit hardly goes: k̂ cannot see a dropped mode."""
    other = evidence.regularizer != "kl" or evidence.best_of is not None
    reference = "mass of p* where q < p*/10, from exact or weighted draws of p*"
    if evidence.best_of is not None:
        reference += f", the law of the best of n = {evidence.best_of}"
    elif other:
        reference += f", the optimum with {evidence.symbol} in the place of KL"
    missed = np.reshape(evidence.missed_mass, -1)
    if not np.isfinite(missed).any():
        known = "the optimum is known, and nothing was drawn to find it"
        nature = "nature is random, and p* is not what is aimed at"
        why = evidence.caveat or (known if evidence.log_evidence is not None or other else nature)
        return _unknown("mode coverage", MISSED_FAIL, f"there are no draws of p* to trust: {why}.", reference)
    value = float(np.nanmax(missed))
    outcome: Outcome = "fail" if value > MISSED_FAIL else "warn" if value > MISSED_WARN else "pass"
    part = f"{format_share(value)} of p* lies where the fit hardly goes"
    barred = evidence.kl_forward is not None and bool(np.nanmax(evidence.kl_forward.mean) > _BARRED * value)
    if barred and outcome != "pass":
        help_ = (
            f"{part}, and as good as never draws there: choose a guide that reaches all of the policy's support, or, "
            "where it does, lower the rate (learning_rate=)."
        )
    elif outcome == "fail":
        or_else = "" if other else ", or ForwardKL()"
        help_ = f"{part}: a mode is dropped. Use more restarts and select('mixture'){or_else}."
    else:
        help_ = f"{part}: more restarts and select('mixture') may reach it."
    reached = f"the fit goes wherever p* does{f', but for {format_share(value)} of it' if value >= 5e-4 else ''}."
    explanation = reached if outcome == "pass" else help_
    return Check(
        "mode coverage", value, MISSED_FAIL if outcome == "fail" else MISSED_WARN, outcome, explanation, reference
    )


def weights_check(ess: float, khat: float, num: int, unknown: str = NO_WEIGHTS) -> Check:
    """Ask whether the fit could be a proposal for p*: what its own draws are worth at the worst β and context.

    Args:
        ess: effective number of draws; nan if the weights say nothing.
        khat: Pareto k̂ of the weights; nan if they have no tail.
        num: number of draws.
        unknown: why the weights say nothing, if they do not.
    """
    reference = "Vehtari et al. (2024), Pareto smoothed importance sampling; threshold min(1 − 1/log₁₀ S, 0.7)"
    threshold = min(1 - 1 / math.log10(max(num, 20)), 0.7) if num else 0.7
    if math.isnan(ess):
        return _unknown("weights", threshold, f"{unknown}.", reference)
    worth = f"{num:,} draws of the fit are worth {format_draws(ess)} of p*"
    enough = ess > LEAST_WORTH * num
    remedy = ": choose a richer guide, or fit longer (num_steps=)"
    blind = "k̂ does not see dropped modes."
    if math.isnan(khat):
        explanation = f"{worth}; {TIED}{'' if enough else remedy}."
        return Check("weights", khat, threshold, "pass" if enough else "warn", explanation, reference)
    unreliable = f"weighting them is not reliable{remedy}."
    if khat > threshold:
        return Check("weights", khat, threshold, "warn", f"value is k̂; {worth}, and {unreliable} {blind}", reference)
    if enough:
        return Check("weights", khat, threshold, "pass", f"value is k̂; {worth}. {blind}", reference)
    explanation = f"value is their share. k̂ is {format_number(khat, 3)}, but {worth}, so that {unreliable}"
    return Check("weights", ess / num, LEAST_WORTH, "warn", explanation, reference, least=True)


def restarts_check(statistics: dict[str, np.ndarray], objective: np.ndarray, gain: float) -> Check:
    """Ask whether dispersed restarts found the same policy: R-hat of total reward and of the log-ratio.

    Args:
        statistics: total_reward and log_ratio of the fits' draws, [beta, restart, draw].
        objective: J of each restart, [beta, restart], reward units.
        gain: J* − J(π₀), or what we know of it, reward units.
    """
    reference = "Vehtari et al. (2021), rank-normalised R-hat"
    if statistics["total_reward"].shape[1] < 2:
        return _unknown("restarts", RHAT, "there is one restart; num_restarts=4 would show other modes.", reference)
    values = []
    for name in ("total_reward", "log_ratio"):
        for lane in statistics[name]:
            # R-hat divides by the spread within chains: rounding noise alone would look like disagreement.
            if np.ptp(lane) > 1e-6 * max(1.0, float(np.abs(lane).max())):
                values.append(rank_rhat(np.asarray(lane)))
    # Where no lane has any spread, the restarts draw the same.
    value = max((v for v in values if math.isfinite(v)), default=1.0)
    if value < RHAT:
        return Check("restarts", value, RHAT, "pass", "restarts agree on reward and log-ratio.", reference)
    apart = float(np.ptp(objective, axis=1).max()) / max(abs(gain), 1e-12)
    # Policies that differ but earn the same are equally good.
    if apart < 0.01:
        told = f"{max(apart, 1e-3):.1%} of what there was to gain"
        explanation = f"restarts draw differently (R-hat {value:.3g}), but their J are within {told}."
        return Check("restarts", apart, 0.01, "pass", explanation, reference)
    explanation = (
        f"restarts ended in different policies, J up to {apart:.0%} of the gain apart: the best is shown; "
        "select('mixture') weighs them."
    )
    return Check("restarts", value, RHAT, "warn", explanation, reference)


def convergence_check(trend: TrainingTrend | None, gain: float) -> Check:
    """Ask how much J would still have risen, or whether it fell; without a trend J was not finite at the end."""
    reference = "J along the way, counted in learning rate, extrapolated by Aitken's Δ² process"
    if trend is None:
        return Check("convergence", math.nan, LEFT, "fail", "J was not finite at the end of the run.", "")
    scale = max(abs(gain), 1e-12)
    if math.isnan(trend.left):
        return _unknown("convergence", LEFT, "the history is too short to judge.", reference)
    if trend.fell > LEFT * scale:
        value = trend.fell / scale
        explanation = (
            f"J fell by {value:.1%} of what there was to gain at the end: lower the learning rate (learning_rate=)."
        )
        return Check("convergence", value, LEFT, "warn", explanation, reference)
    value = trend.left / scale
    if value > LEFT:
        explanation = (
            f"J still rose when the run ended, as if {min(value, 1.0):.1%} of what there was to gain were left: "
            "fit longer (num_steps=), or raise the learning rate (learning_rate=)."
        )
        return Check("convergence", value, LEFT, "warn", explanation, reference)
    explanation = "J has levelled off, beyond what the falling rate does by itself."
    return Check("convergence", value, LEFT, "pass", explanation, reference)


def skipped_check(skipped: int, steps: int) -> Check:
    """Ask how many steps the run skipped because their loss or gradient was not finite."""
    share = skipped / max(steps, 1)
    reference = "steps with a non-finite loss are counted and not taken"
    outcome: Outcome = "pass" if skipped == 0 else "fail" if share > 0.05 else "warn"
    some = f"{skipped:,} of {steps:,} steps were not finite: look at the rewards."
    explanation = "every step was finite." if skipped == 0 else some
    return Check("skipped steps", share, 0.05 if outcome == "fail" else 0.0, outcome, explanation, reference)


def entropy_check(entropy: float, prior_entropy: float, *, reached: bool) -> Check:
    """Ask whether the fit collapsed to single actions before it reached p*.

    Args:
        entropy: E_q[−log q], nats.
        prior_entropy: E_π₀[−log π₀], nats.
        reached: whether the gap check passes; if it does, p* itself is that sharp.
    """
    reference = "share of the prior's entropy that is left"
    if not (math.isfinite(entropy) and math.isfinite(prior_entropy)) or prior_entropy <= 0:
        return _unknown("entropy", 0.01, "entropy has no scale here.", reference)
    value = entropy / prior_entropy
    if value > 0.01 or reached:
        why = "the policy is still random." if value > 0.01 else "the policy is nearly deterministic, as p* is."
        return Check("entropy", value, 0.0 if value <= 0.01 else 0.01, "pass", why, reference, least=True)
    explanation = "the policy has collapsed to single actions before it was good: lower the learning rate or raise β."
    return Check("entropy", value, 0.01, "warn", explanation, reference, least=True)


def held_out_check(trained: Evidence, held_out: np.ndarray) -> Check:
    """Ask whether J on held-out arguments, [*beta], reward units, falls behind J on the training arguments."""
    reference = "J on held-out arguments beside J on those fitted"
    gain = None if trained.prior_objective is None else trained.optimum.mean - trained.prior_objective.mean
    if gain is None or not (np.isfinite(gain) & (gain > 0)).all():
        return _unknown("held out", 0.1, "there is no scale to compare J by.", reference)
    value = float(np.max((trained.objective.mean - held_out) / gain))
    if value <= 0.1:
        return Check("held out", value, 0.1, "pass", "J holds on what was not trained on.", reference)
    explanation = f"J is {value:.0%} of the gain lower on what was held out: use more data, or a smaller guide."
    return Check("held out", value, 0.1, "warn", explanation, reference)


def _worst(outcomes: Sequence[str], values: Sequence[float]) -> int:
    order = ("pass", "warn", "unknown", "fail")
    return max(range(len(outcomes)), key=lambda i: (order.index(outcomes[i]), np.nan_to_num(values[i], nan=0.0)))


def _unknown(name: str, threshold: float, explanation: str, reference: str) -> Check:
    return Check(name, math.nan, threshold, "unknown", explanation, reference)

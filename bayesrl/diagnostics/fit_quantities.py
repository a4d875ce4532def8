"""What is known of one fit at one temperature: each quantity once, as it is told wherever it is told."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from bayesrl.display.formatting import (
    UNKNOWN,
    format_beta,
    format_bound,
    format_estimate,
    format_interval,
    format_number,
    format_share,
)
from bayesrl.statistics.estimates import Estimate, Interval

HEADINGS = ("β", "J", "J*", "gap", "share", "E[R]", "KL", "log Z", "log p(y)")

NO_WEIGHTS = "nature's luck or a discount moves the weights of draws, whatever the fit"
TIED = "the weights are tied or all alike, and have no tail for k̂ to judge"
INTERVALS = (
    "objective",
    "reward",
    "kl",
    "optimum",
    "gap",
    "relative_gap",
    "prior_objective",
    "log_evidence",
    "log_marginal",
)


class Measured(NamedTuple):
    """Quantities of one fit at one β, per context; `bayesrl.statistics.quantities` says what each is.

    J + gap = J*, and share = gap / (J* − J(π₀)): of three that are told, each is of the same J and J*.

    Attributes:
        beta: temperature, reward units per nat; None without rewards.
        objective: J, reward units (nats without rewards).
        reward: E[R], reward units.
        kl: KL(q‖π₀), nats.
        optimum: J*; None or without a mean where it is not known.
        gap: J* − J.
        relative_gap: the gap as a share of what there was to gain.
        prior_objective: J(π₀).
        log_evidence: log Z, nats.
        log_marginal: log p(y), nats, where data stand beside rewards.
        ess: effective number of the fit's own draws, as draws of p*; nan where their weights mean nothing.
        khat: Pareto k̂ of these weights.
        num_weighed: how many draws these are.
    """

    beta: float | None
    objective: Interval
    reward: Interval
    kl: Interval
    optimum: Interval | None = None
    gap: Interval | None = None
    relative_gap: Interval | None = None
    prior_objective: Interval | None = None
    log_evidence: Interval | None = None
    log_marginal: Interval | None = None
    ess: float = math.nan
    khat: float = math.nan
    num_weighed: int = 0

    @property
    def error(self) -> float:
        """Standard error of J, to whose digits its bounds are told."""
        return float(self.objective.se)

    def cells(self) -> dict[str, str]:
        """Give every quantity as text, by heading."""
        # A lower end of J* tells something where it is above J, which is one too.
        known = has_mean(self.optimum) or _above(self.optimum, self.objective)
        log_z = self.log_evidence if known or has_mean(self.log_evidence) else None
        told = {
            "β": format_beta(self.beta),
            "J": format_estimate(self.objective),
            "J*": bracket_text(self.optimum if known else None, self.error),
            "gap": self._gap_text(),
            "share": share_text(self.relative_gap),
            "E[R]": UNKNOWN if self.beta is None else format_estimate(self.reward),
            "KL": format_estimate(self.kl),
            "log Z": bracket_text(log_z, self.error / (self.beta or 1.0)),
            "log p(y)": format_estimate(self.log_marginal),
        }
        return {name: told[name] for name in HEADINGS}

    def weight_cells(self) -> dict[str, str]:
        """Give what the weights of the fit's own draws tell, as text, by heading."""
        return {"ESS": amount(self.ess), "of": f"{self.num_weighed:,}", "k̂": format_number(self.khat, 3)}

    @property
    def no_khat(self) -> str:
        """Why k̂ is not told; empty where it is."""
        if not math.isnan(self.khat):
            return ""
        return TIED if not math.isnan(self.ess) else NO_WEIGHTS if self.num_weighed == 0 else "no weight is finite"

    def _gap_text(self) -> str:
        """Write the gap; single precision cannot tell less than a millionth of J* from nothing."""
        if self.gap is None or self.optimum is None:
            return bracket_text(self.gap, self.error, own=True)
        finest = 1e-6 * max(abs(float(self.optimum.mean)), abs(float(self.objective.mean)))
        ends = (float(self.gap.mean), float(self.gap.conservative_lower), float(self.gap.conservative_upper))
        if finest > max(abs(end) for end in ends):
            return f"<{finest:.0e}"
        return bracket_text(self.gap, self.error, own=True)


def estimate_of(interval: Interval) -> Estimate:
    """Give mean and standard error alone."""
    return Estimate(np.asarray(interval.mean, float), np.asarray(interval.se, float))


def plain(estimate: Estimate | None) -> Interval | None:
    """Give the interval of a mean with a standard error, 95% either way."""
    if estimate is None:
        return None
    mean, se = (np.asarray(part, float) for part in estimate)
    low, high = mean - 1.96 * se, mean + 1.96 * se
    return Interval(mean, se, low, high, low, high)


def amount(value: float) -> str:
    """Write a number of draws."""
    return f"{value:,.0f}" if math.isfinite(value) and abs(value) >= 100 else format_number(value, 3)


def has_mean(interval: Interval | None) -> bool:
    """Whether a quantity is known on both sides, so that its mean is an estimate of it."""
    if interval is None or math.isnan(float(interval.mean)):
        return False
    return not (math.isnan(float(interval.upper)) and math.isinf(float(interval.conservative_upper)))


def bracket_text(interval: Interval | None, error: float = 0.0, *, own: bool = False) -> str:
    """Write mean and ends of a quantity, or the one end that is known of it.

    Args:
        interval: of single numbers; or None.
        error: of J, to whose digits an end is told.
        own: whether this error is the end's own.
    """
    if interval is None:
        return UNKNOWN
    if has_mean(interval):
        return format_interval(interval)
    if math.isfinite(float(interval.conservative_upper)):
        return format_bound("≤", float(interval.conservative_upper), error, told=own)
    if math.isfinite(float(interval.conservative_lower)) and not (own and float(interval.conservative_lower) <= 0):
        return format_bound("≥", float(interval.conservative_lower), error, told=own)
    return UNKNOWN


def share_text(interval: Interval | None) -> str:
    """Write a share in percent with its ends, or the one end that is known."""
    if interval is None:
        return UNKNOWN
    mean, _, lower, upper, floor, ceiling = (float(part) for part in interval)
    if math.isnan(mean):
        if math.isfinite(ceiling):
            return f"≤ {format_share(ceiling)}"
        return f"≥ {format_share(floor)}" if floor > 0 else UNKNOWN
    low, high = (floor, ceiling) if math.isnan(lower) or math.isnan(upper) else (lower, upper)
    if low == high or not (math.isfinite(low) and math.isfinite(high)):
        return format_share(mean)
    return f"{format_share(mean)} [{format_share(low)}, {format_share(high)}]"


def _above(optimum: Interval | None, objective: Interval) -> bool:
    """Whether an end of J* tells more than J does."""
    if optimum is None:
        return False
    return float(optimum.conservative_lower) > float(objective.mean) or math.isfinite(float(optimum.conservative_upper))


# ---- as JSON ---------------------------------------------------------------------------------


_KEYS = {"relative_gap": "share", "prior_objective": "start"}
"""Fields that have another key in a file."""


def to_json(row: Measured) -> dict[str, Any]:
    """Describe what is known by what JSON can hold; numbers that are none as null."""
    fields = {_KEYS.get(name, name): _numbers(getattr(row, name)) for name in INTERVALS}
    weights = {name: _number(getattr(row, name)) for name in ("ess", "khat")}
    return {"beta": row.beta, **fields, **weights, "num_weighed": row.num_weighed}


def from_json(told: Mapping[str, Any]) -> Measured:
    """Make what `to_json` described."""
    fields: dict[str, Any] = {name: _interval(told[_KEYS.get(name, name)]) for name in INTERVALS}
    weights: dict[str, Any] = {name: math.nan if told[name] is None else told[name] for name in ("ess", "khat")}
    return Measured(beta=told["beta"], num_weighed=told["num_weighed"], **fields, **weights)


def _number(value: Any) -> float | None:
    return float(value) if math.isfinite(float(value)) else None


def _numbers(interval: Interval | None) -> list[float | None] | None:
    return None if interval is None else [_number(part) for part in interval]


def _interval(told: list[float | None] | None) -> Interval | None:
    if told is None:
        return None
    absent = (math.nan, math.nan, math.nan, math.nan, -math.inf, math.inf)
    return Interval(
        *(np.asarray(other if part is None else part, float) for part, other in zip(told, absent, strict=True))
    )

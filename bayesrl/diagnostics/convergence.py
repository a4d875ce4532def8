"""How far a run still had to go when it ended, extrapolated from the J it recorded."""

from typing import Any, NamedTuple

import numpy as np

_QUARTERS = (0.25, 0.5, 0.75, 1.0)
_SURE = 3.0
"""A change of J counts only if it exceeds this many standard errors."""

_LEAST_SHRINKING = 0.9
"""A rise that does not slow down is assumed to shrink by this factor per quarter: 9 times itself is still to come."""

_HARDLY = 0.05
"""A run has hardly moved if J changed by less than this share of the possible gain."""

_ANNEALED = 0.5
"""The temperature may fall up to this share of the run; until then J belongs to a different problem at every step."""


class TrainingTrend(NamedTuple):
    """What a run did with its steps; J in reward units, for the worst lane.

    Attributes:
        left: how much J would still have risen, beyond its error; nan if the run is too short to tell.
        fell: how much J fell over the last quarter of the way, beyond its error.
        plunged: how much J fell below its first value, early in the run.
        moved: how far the mean of the last quarter is from the first J; nan if unknown.
    """

    left: float
    fell: float
    plunged: float
    moved: float = np.nan


def estimate_trend(objective: np.ndarray, steps: np.ndarray, settings: dict[str, Any]) -> TrainingTrend:
    """Extrapolate J along the way a run has gone.

    The way is measured in learning rate, not in steps: as the rate falls to 0, J levels off wherever it stands.
    Let J₁, J₂ and J₃ be the means of J over the last three quarters of the way. A rise that shrinks by
    ρ = (J₃ − J₂)/(J₂ − J₁) from quarter to quarter has (J₃ − J₂)·ρ/(1 − ρ) still to come (Aitken's Δ² process).
    Only the part of J₃ − J₂ beyond 3 standard errors counts.

    Args:
        objective: J along the training, [chunk, lane], reward units.
        steps: number of steps at the end of each chunk, [chunk].
        settings: settings of the fit; the default optimiser's rate falls as a cosine, others count as constant.
    """
    with np.errstate(invalid="ignore"):
        plunged = float(np.max(objective[0] - objective.min(0), initial=0.0))
    share = steps / max(float(settings.get("num_steps", steps[-1])), float(steps[-1]), 1.0)
    if "start_beta" in settings:
        objective, share = objective[share > _ANNEALED], share[share > _ANNEALED]
    falls = settings.get("optimizer") == "default"
    # The integral of the cosine decay (1 + cos(π·share)) up to each share.
    way = share + np.sin(np.pi * share) / np.pi if falls else share
    if not len(way):
        return TrainingTrend(np.nan, np.nan, plunged)
    # Each J is a mean over its chunk, so it belongs to the middle of the chunk.
    # No chunk ends before the first one: take it to be as long as the second.
    begin = way[0] - (way[1] - way[0] if len(way) > 1 else way[0])
    middle = (np.concatenate([[begin], way[:-1]]) + way) / 2
    part = (middle - begin) / (way[-1] - begin)
    blocks = [objective[(part > low) & (part <= low + 0.25)] for low in _QUARTERS[:3]]
    if any(len(block) < 3 for block in blocks):
        return TrainingTrend(np.nan, np.nan, plunged)
    means = [block.mean(0) for block in blocks]
    before, last = means[1] - means[0], means[2] - means[1]
    error = np.sqrt(sum(block.var(0, ddof=1) / len(block) for block in blocks[1:]))
    with np.errstate(divide="ignore", invalid="ignore"):
        # Without an earlier rise there is no ratio to estimate: assume the slowest shrinking.
        ratio = np.where(before > 0, np.clip(last / before, 0.0, _LEAST_SHRINKING), _LEAST_SHRINKING)
    left = np.maximum(last - _SURE * error, 0.0) * ratio / (1 - ratio)
    fell, moved = np.maximum(-last - _SURE * error, 0.0), np.abs(means[2] - objective[0])
    return TrainingTrend(float(np.max(left)), float(np.max(fell)), max(plunged, 0.0), float(np.max(moved)))


def suggest_remedy(
    trend: TrainingTrend | None, gain: float, *, restarts: int, collapsed: bool = False, coverage: str = ""
) -> str:
    """Suggest a remedy for a fit that missed part of the gain, from what its run did.

    Args:
        trend: trend of the run; None without a history.
        gain: J* − J(π₀), or what we know of it, reward units.
        restarts: number of restarts.
        collapsed: whether the fit draws single actions but p* does not.
        coverage: the explanation for dropped modes of p*; empty if the fit dropped none.
    """
    scale = max(abs(gain), 1e-12)
    known = trend is not None and np.isfinite(trend.left)
    if trend is not None and known and (trend.plunged > 0.5 * scale or trend.fell > 0.01 * scale):
        return "J fell on the way, so lower the rate (learning_rate=)."
    if trend is not None and known and trend.moved < _HARDLY * scale:
        return (
            "J has hardly moved from where it began, so raise the rate (learning_rate=), fit longer (num_steps=), or "
            "choose a richer guide."
        )
    if trend is not None and known and trend.left > 0.01 * scale:
        return "J still rose when the run ended, so fit longer (num_steps=), or raise the rate (learning_rate=)."
    if collapsed:
        return (
            "the policy collapsed to single actions on the way, so lower the rate (learning_rate=), choose a guide "
            "that holds p*, or take several restarts (num_restarts=) with select('mixture')."
        )
    if coverage:
        return coverage
    if not known:
        return "fit longer (num_steps=), or choose a richer guide."
    other = "" if restarts > 1 else ", or num_restarts=4 to see other modes"
    return f"J had levelled off, so choose a richer guide, a lower learning rate (learning_rate=){other}."

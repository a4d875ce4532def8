"""Text for quantities of which only one end may be known."""

import math

from bayesrl.display.formatting import UNKNOWN, format_bound, format_interval, format_number, format_share
from bayesrl.statistics.estimates import Interval


def has_mean(interval: Interval | None) -> bool:
    """Whether both sides of a quantity are known, so that its mean is an estimate."""
    if interval is None or math.isnan(float(interval.mean)):
        return False
    return not (math.isnan(float(interval.upper)) and math.isinf(float(interval.conservative_upper)))


def bracket_text(interval: Interval | None, error: float = 0.0, *, own: bool = False) -> str:
    """Write a quantity's mean and ends, or the one end that is known.

    Args:
        interval: an interval of single numbers, or None.
        error: error of J; an end gets as many digits as this supports.
        own: whether this error belongs to the end itself.
    """
    if interval is None:
        return UNKNOWN
    if has_mean(interval):
        return format_interval(interval)
    low, high = float(interval.conservative_lower), float(interval.conservative_upper)
    if math.isfinite(high):
        return format_bound("≤", high, error, own_error=own)
    if math.isfinite(low) and not (own and low <= 0):
        return format_bound("≥", low, error, own_error=own)
    return UNKNOWN


def gap_text(gap: Interval | None, optimum: Interval, objective: Interval) -> str:
    """Write J* − J; single precision cannot tell less than a millionth of J* from 0."""
    finest = 1e-6 * max(abs(float(optimum.mean)), abs(float(objective.mean)))
    ends = () if gap is None else (gap.mean, gap.conservative_lower, gap.conservative_upper)
    if ends and finest > max(abs(float(end)) for end in ends):
        return f"<{finest:.0e}"
    return bracket_text(gap, float(objective.se), own=True)


def relative_gap_text(interval: Interval | None) -> str:
    """Write a share in percent with its ends, or the one end that is known."""
    if interval is None:
        return UNKNOWN
    mean, _, low, high, least, most = (float(part) for part in interval)
    if math.isnan(mean):
        return (
            f"≤ {format_share(most)}" if math.isfinite(most) else f"≥ {format_share(least)}" if least > 0 else UNKNOWN
        )
    if math.isnan(low) or math.isnan(high):
        low, high = least, most
    if low == high or not (math.isfinite(low) and math.isfinite(high)):
        return format_share(mean)
    return f"{format_share(mean)} [{format_share(low)}, {format_share(high)}]"


def draws_text(value: float) -> str:
    """Write a number of draws."""
    return f"{value:,.0f}" if math.isfinite(value) and abs(value) >= 100 else format_number(value, 3)

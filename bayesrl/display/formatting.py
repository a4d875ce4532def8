"""Numbers as text, with as many digits as their errors allow."""

import math
import unicodedata
from collections.abc import Sequence
from typing import Any

import numpy as np

from bayesrl.statistics.estimates import Estimate, Interval

UNKNOWN = "—"
# Unicode's classes of characters that change the direction of text.
_TURNING = ("LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI")


def format_number(value: float | None, digits: int = 4) -> str:
    """Write a number with `digits` significant digits, without an exponent if that is short."""
    if value is None or math.isnan(value):
        return UNKNOWN
    if math.isinf(value):
        return "∞" if value > 0 else "-∞"
    if value == 0:
        return "0"
    if abs(value) < 1e-3 or abs(value) >= 10**6:
        return f"{value:.{max(digits - 3, 0)}e}"
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    return f"{value:.{decimals}f}"


def format_estimate(estimate: Any) -> str:
    """Write mean ± standard error, to the error's second digit; the mean alone if it is exact, ± — if that is unknown.

    Args:
        estimate: an object with fields `mean` and `se`, both single numbers; or None.
    """
    if estimate is None:
        return UNKNOWN
    mean, error = float(estimate.mean), float(estimate.se)
    if math.isnan(mean):
        return UNKNOWN
    if math.isinf(mean) or error == 0:
        return format_number(mean)
    if not math.isfinite(error):
        return f"{format_number(mean)} ± {UNKNOWN}"
    decimals = _decimals(error)
    if abs(mean) >= 10**6:
        return f"{format_number(mean)} ± {error:.1e}"
    if decimals > 7:
        shown = f"{mean:.{decimals}f}" if abs(mean) >= 1e-2 else _tiny(mean, decimals)
        return f"{shown} ± {error:.1e}"
    return f"{mean:.{decimals}f} ± {error:.{decimals}f}"


def format_mean(values: Sequence[float]) -> str:
    """Write the mean of independent numbers, such as those of several runs, ± its standard error if there are two."""
    spread = float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
    error = spread / len(values) ** 0.5 if spread >= 1e-9 else 0.0  # less is rounding
    return format_estimate(Estimate(np.asarray(np.mean(values)), np.asarray(error)))


def _decimals(error: float) -> int:
    """Return how many decimals show two significant digits of an error."""
    return max(1 - math.floor(math.log10(error)), 0)


def _tiny(value: float, decimals: int) -> str:
    """Write a small number to the given decimal place, with an exponent."""
    if value == 0 or not math.isfinite(value):
        return format_number(value)
    return f"{value:.{max(decimals + math.floor(math.log10(abs(value))), 1)}e}"


def format_share(part: float) -> str:
    """Write a share of the possible gain in percent to one decimal, small shares to two."""
    if not math.isfinite(part):
        return UNKNOWN if math.isnan(part) else format_number(part)
    return f"{part:.1%}" if abs(part) >= 1e-3 else format_percent(part) if part else "0%"


def format_with_limit(value: float, limit: float, digits: int = 3) -> tuple[str, str]:
    """Write a number and its limit, with enough digits to show on which side of the limit it lies.

    Example:
        >>> format_with_limit(0.02243, 0.0224)
        ('0.02243', '0.02240')
    """
    if math.isnan(value) or math.isnan(limit) or value == limit:
        return format_number(value, digits), format_number(limit, digits)
    for more in range(digits, 18):
        # 17 digits tell any two doubles apart.
        texts = (format_number(value, more), format_number(limit, more))
        if texts[0] != texts[1]:
            break
    return texts


def format_interval(interval: Interval | None) -> str:
    """Write mean [left, right], the 95% interval; the mean alone if it is exact.

    The interval is the calibrated one, or the conservative one if there is none.
    """
    if interval is None:
        return UNKNOWN
    mean, _, lower, upper, floor, ceiling = (float(part) for part in interval)
    if math.isnan(lower) or math.isnan(upper):
        lower, upper = floor, ceiling
    if lower == upper or (math.isinf(lower) and math.isinf(upper)):
        return format_number(mean)
    if math.isinf(lower) or math.isinf(upper):
        limit = f"≤ {format_number(upper)}" if math.isinf(lower) else f"≥ {format_number(lower)}"
        return f"{format_number(mean)} ({limit})"
    decimals = 1 - math.floor(math.log10(upper - lower)) if upper > lower else 7
    if decimals > 6 and max(abs(mean), abs(lower), abs(upper)) < 1e-2:
        return f"{_tiny(mean, decimals)} [{_tiny(lower, decimals)}, {_tiny(upper, decimals)}]"
    if decimals > 10 or max(abs(mean), abs(lower), abs(upper)) >= 10**6:
        return f"{format_number(mean)} [{format_number(lower)}, {format_number(upper)}]"
    shown = max(decimals, 0)
    return f"{mean:.{shown}f} [{lower:.{shown}f}, {upper:.{shown}f}]"


def has_mean(interval: Interval | None) -> bool:
    """Whether both sides of a quantity are known, so that its mean is an estimate."""
    if interval is None or math.isnan(float(interval.mean)):
        return False
    return not (math.isnan(float(interval.upper)) and math.isinf(float(interval.conservative_upper)))


def format_bracket(interval: Interval | None, error: float = 0.0, *, own: bool = False) -> str:
    """Write a quantity's mean and ends, or the one end that is known, `≥ 0.044`, to the second digit of an error.

    Args:
        interval: an interval of single numbers, or None.
        error: standard error of the quantity beside it, or 0.
        own: whether this error belongs to the end itself, and is written too.
    """
    if interval is None:
        return UNKNOWN
    if has_mean(interval):
        return format_interval(interval)
    low, high = float(interval.conservative_lower), float(interval.conservative_upper)
    if math.isfinite(high):
        sign, end = "≤", high
    elif math.isfinite(low) and not (own and low <= 0):
        sign, end = "≥", low
    else:
        return UNKNOWN
    if not (error > 0 and math.isfinite(error)) or abs(end) >= 10**6 or _decimals(error) > 7:
        return f"{sign} {format_number(end)}"
    decimals = _decimals(error)
    return f"{sign} {end:.{decimals}f}" + (f" ± {error:.{decimals}f}" if own else "")


def format_gap(gap: Interval | None, optimum: Interval, objective: Interval) -> str:
    """Write J* − J; single precision cannot tell less than a millionth of J* from 0."""
    finest = 1e-6 * max(abs(float(optimum.mean)), abs(float(objective.mean)))
    ends = () if gap is None else (gap.mean, gap.conservative_lower, gap.conservative_upper)
    if ends and finest > max(abs(float(end)) for end in ends):
        return f"<{finest:.0e}"
    return format_bracket(gap, float(objective.se), own=True)


def format_distance(interval: Interval | None) -> str:
    """Write a distance between fit and p*, or its known end; write nothing that rests on worthless weights."""
    if interval is None or math.isfinite(float(interval.upper)):
        return format_estimate(interval)
    return format_bracket(interval, float(interval.se), own=True)  # without a calibrated end, se cannot be trusted


def format_relative_gap(interval: Interval | None) -> str:
    """Write a share in percent with its ends, or the one end that is known."""
    if interval is None:
        return UNKNOWN
    mean, _, low, high, least, most = (float(part) for part in interval)
    if math.isnan(mean):
        if math.isfinite(most):
            return f"≤ {format_share(most)}"
        return f"≥ {format_share(least)}" if least > 0 else UNKNOWN
    if math.isnan(low) or math.isnan(high):
        low, high = least, most
    if low == high or not (math.isfinite(low) and math.isfinite(high)):
        return format_share(mean)
    return f"{format_share(mean)} [{format_share(low)}, {format_share(high)}]"


def format_draws(number_of: float) -> str:
    """Write an effective number of draws."""
    return f"{number_of:,.0f}" if math.isfinite(number_of) and abs(number_of) >= 100 else format_number(number_of, 3)


def format_percent(share: float | None) -> str:
    """Write a share in percent."""
    if share is None or not math.isfinite(share):
        return UNKNOWN
    if abs(share) < 5e-5:
        return "<0.01%"
    return f"{share:.2%}" if abs(share) < 0.1 else f"{share:.0%}"


def estimate_at[T: (Interval, Estimate)](estimate: T | None, index: int) -> T | None:
    """Select one β of an estimate or interval [*beta]; the index is into the flat axis."""
    if estimate is None:
        return None
    chosen: T = type(estimate)(*(np.reshape(part, -1)[index] for part in estimate))
    return chosen


def pluralize(number_of: int, what: str) -> str:
    """Write a count with its noun: `1 restart`, `4 restarts`."""
    return f"{number_of:,} {what}{'' if number_of == 1 else 's'}"


def last_tenth(number_of: int, what: str) -> tuple[int, str]:
    """Return the size of the last tenth of a run, and its name: `last 20 episodes`, `last episode`."""
    last = max(number_of // 10, 1)
    return last, f"last {pluralize(last, what).removeprefix('1 ')}"


def format_beta(beta: float | None) -> str:
    """Write a temperature, or a dash without one."""
    return UNKNOWN if beta is None else f"{beta:.3g}"


def sanitize(text: str) -> str:
    """Replace characters that would control a terminal, reverse the direction of text or break a file."""

    def steers(c: str) -> bool:
        return unicodedata.category(c) in ("Cc", "Cs") or unicodedata.bidirectional(c) in _TURNING

    return "".join("\N{REPLACEMENT CHARACTER}" if steers(c) and c != "\n" else c for c in text)


def truncate(value: Any, longest: int = 160) -> str:
    """Write a value on one line, and cut its end if it is long.

    Whole numbers keep their digits, reals get three; arrays become their numbers, separated by spaces.
    """
    array = np.asarray(value)
    if array.dtype.kind in "OUS":
        text = " ".join(str(value).split())
        return text if len(text) <= longest else f"{text[: longest - 2].rstrip()} …"
    spell = "{:.3g}".format if array.dtype.kind == "f" else (lambda x: str(int(x)))
    words = [spell(x) for x in array.reshape(-1)[:longest]]  # each takes at least one character
    text = " ".join(words)
    if len(words) == array.size and len(text) <= longest:
        return text
    return f"{text[: longest - 1].rpartition(' ')[0]} …"

"""Values of options: parsed from what was typed, checked, and written as a user would type them."""

import math
from typing import Any

from bayesrl.errors import FitError, PolicyError
from bayesrl.ready_models import ProblemError


def parse_beta(text: str) -> list[float]:
    """Parse one temperature, or several separated by commas.

    Raises:
        PolicyError: the text is neither, or a temperature is not positive and finite.
    """
    try:
        values = [float(part) for part in text.split(",")]
    except ValueError as error:
        raise PolicyError(f"--beta {text!r} is not a number or a list like 0.1,0.3,1") from error
    bad = [value for value in values if not 0 < value < math.inf]
    if bad:
        raise PolicyError(f"beta must be positive and finite, got {bad[0]:g}; use --beta 0.1, say")
    return values


def parse_options(assignments: list[str]) -> dict[str, Any]:
    """Parse options of the form name=value.

    Raises:
        ProblemError: an option does not have this form.
    """
    options: dict[str, Any] = {}
    for assignment in assignments:
        name, equals, value = assignment.partition("=")
        if not equals or not name.isidentifier():
            raise ProblemError(f"--set {assignment!r} is not of the form name=value")
        options[name] = _parse_value(value)
    return options


def _parse_value(text: str) -> int | float | bool | str:
    """Parse an int, a float, true or false; everything else is a string."""
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def check_positive(name: str, value: int | None) -> None:
    """Refuse a count below 1.

    Raises:
        FitError: the count is below 1.
    """
    if value is not None and value < 1:
        raise FitError(f"{name}={value}; use an integer of at least 1")


def format_option(value: Any) -> str:
    """Write the value of an option as a user would type it."""
    return str(value).lower() if isinstance(value, bool) else repr(value) if value == "" else str(value)

"""Estimates and intervals as JSON types, and back; readable without JAX."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from bayesrl.statistics.estimates import Estimate, Interval


def describe_estimates(value: Any) -> Any:
    """Describe numbers, estimates and intervals, and mappings of them, in JSON types; nan and inf become strings."""
    if isinstance(value, Estimate | Interval):
        value = value._asdict()
    if isinstance(value, Mapping):
        return {name: describe_estimates(part) for name, part in value.items()}
    if isinstance(value, np.ndarray | np.generic | float):
        value = np.asarray(value, float).tolist()
    if isinstance(value, list):
        return [describe_estimates(each) for each in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def read_estimates(value: Any) -> Any:
    """Restore an estimate, an interval or an array that `describe_estimates` described; None stays None."""
    if isinstance(value, Mapping):
        kind = Interval if "lower" in value else Estimate
        return kind(**{name: np.asarray(part, float) for name, part in value.items()})
    return None if value is None else np.asarray(value, float)

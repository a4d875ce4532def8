"""Translate the run folders of earlier versions to the names and numbers of this one.

Format 1 has no stamps, and the default optimiser's rate is not part of its state. Format 3 has stamps. Both use some
class names that have changed since. The identity of a problem stays on disk as it was written, so that the digests of
the folder's files remain valid; we translate it when we read it.
"""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

UNSTAMPED = 1
EARLIER = (UNSTAMPED, 3)

RENAMED = {
    "Stock": "NumPyroELBO",
    "Bayesian": "BayesianAgent",
    "KLControl": "KLControlAgent",
}
"""Earlier names of guides, objectives and agents → their names today."""

RENAMED_OPTIONS = {"num_draws": "num_samples"}
"""Options of those classes."""

NOT_COMPARED = {UNSTAMPED: ("first draws",)}
"""Parts of an identity that today's code cannot compute as a format did, because the split of keys has changed."""

NEW_STATE = {UNSTAMPED: ("state.opt_state.rate",)}
"""Arrays that a format did not store; they have their values from the start of a run."""

_ENDS = ("mean", "se", "lower", "upper", "conservative_lower", "conservative_upper")
_UNKNOWN = (math.nan, math.nan, math.nan, math.nan, -math.inf, math.inf)
_DEFAULT_OPTIMIZER = re.compile(r"^state\.opt_state\[(\d+)\]")
_LEARNING = {"following": "next_observation", "held": "mask", "told": "update_info", "stages": "snapshots"}


def upgrade_problem(problem: Mapping[str, Any]) -> dict[str, Any]:
    """Translate a problem's description from an earlier format; one of this format stays as it is."""
    if problem["format"] not in EARLIER:
        return dict(problem)
    skipped = NOT_COMPARED.get(problem["format"], ())
    identity = {key: value for key, value in problem["identity"].items() if key not in skipped}
    for part in ("guide", "objective", "agent"):
        if isinstance(identity.get(part), dict):
            identity[part] = {
                RENAMED_OPTIONS.get(key, key): RENAMED.get(value, value) if key == "type" else value
                for key, value in identity[part].items()
            }
    return {**problem, "identity": identity}


def upgrade_arrays(arrays: Mapping[str, np.ndarray], problem: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Translate the names of a checkpoint's arrays from an earlier format."""
    if problem["format"] not in EARLIER:
        return dict(arrays)
    if problem["identity"].get("kind") == "learn":
        return {"/".join(_LEARNING.get(part, part) for part in name.split("/")): x for name, x in arrays.items()}
    if problem["format"] == UNSTAMPED and problem["settings"].get("optimizer") == "default":
        return {_DEFAULT_OPTIMIZER.sub(r"state.opt_state.adam[\1]", name): x for name, x in arrays.items()}
    return dict(arrays)


def upgrade_scores(scores: Any) -> Any:
    """Translate the scores of a fit that were rows of numbers to evidence; others, and damaged ones, stay as they are.

    Some of these folders hold intervals in `measured`; the others only means and errors. Names of figures were
    `pictures`.
    """
    try:
        upgraded = {**scores, "figures": scores.get("figures", scores.get("pictures", {}))}
        for part, measured in (("fit", scores.get("measured")), ("held_out", None)):
            if isinstance(scores[part], dict) and "rows" in scores[part]:
                upgraded[part] = _evidence(scores[part], measured)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError):
        return scores
    return upgraded


def _evidence(board: Mapping[str, Any], measured: Sequence[Mapping[str, Any]] | None) -> dict[str, Any]:
    own: Sequence[Any] = [None] * len(board["rows"]) if measured is None else measured
    rows = [_evidence_row(*both) for both in zip(board["rows"], own, strict=True)]
    nothing = dict.fromkeys(("upper", "kl_reverse", "kl_forward"))
    plain = {"method": "draws", "caveat": board["note"], "num_contexts": board["contexts"]}
    return _stacked(rows) | nothing | plain | {"num_samples": 0, "num_weighed": 0}


def _stacked(rows: list[Any]) -> Any:
    """Join what the rows of several temperatures say; a single row has numbers instead of lists."""
    if None in rows:
        return None
    if isinstance(rows[0], dict):
        return {name: _stacked([row[name] for row in rows]) for name in rows[0]}
    return rows[0] if len(rows) == 1 else rows


def _evidence_row(row: Mapping[str, Any], measured: Mapping[str, Any] | None) -> dict[str, Any]:
    """Translate one temperature, which lacks the method and the sides of an evidence."""

    def interval(name: str, pair: Sequence[float] | None) -> Any:
        if measured is not None:
            numbers = measured[name]  # null stands for what JSON cannot hold
            ends = numbers and [unknown if x is None else x for x, unknown in zip(numbers, _UNKNOWN, strict=True)]
        else:
            ends = pair and [*pair, *2 * (pair[0] - 1.96 * pair[1], pair[0] + 1.96 * pair[1])]
        return ends and dict(zip(_ENDS, ends, strict=True))

    def exact(value: float | None) -> list[float] | None:
        return None if value is None else [value, 0.0]

    drawn, scale = row["estimates"], 1.0 if row["beta"] is None else row["beta"]
    (mean, se), optimum = drawn["objective"], row["optimum"]
    objective = interval("objective", [mean, se])
    at_least_j = dict(zip(_ENDS, (*_UNKNOWN[:4], objective["conservative_lower"], math.inf), strict=True))
    return {
        "beta": row["beta"],
        "lower": {"mean": objective["mean"] / scale, "se": objective["se"] / scale},
        "log_evidence": interval("log_evidence", exact(row["log_evidence"])),
        "log_marginal": interval("log_marginal", drawn.get("log_marginal")),
        "optimum": interval("optimum", exact(optimum)) or at_least_j,
        "prior_objective": interval("start", row["start"]),
        "objective": objective,
        "reward": interval("reward", drawn["reward"]),
        "kl": interval("kl", drawn["kl"]),
        "gap": interval("gap", None if optimum is None else [optimum - mean, se]),
        **dict.fromkeys(("ess", "khat", "missed_mass"), math.nan),
        "metrics": {name: dict(zip(_ENDS[:2], pair, strict=True)) for name, pair in drawn["metrics"].items()},
    }

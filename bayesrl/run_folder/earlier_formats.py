"""Translate the run folders of earlier versions to the names of this one.

Format 1 has no stamps, and the default optimiser's rate is not part of its state. Format 3 has stamps. Both use some
class names that have changed since. The identity of a problem stays on disk as it was written, so that the digests of
the folder's files remain valid; we translate it when we read it.
"""

import re
from collections.abc import Mapping
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

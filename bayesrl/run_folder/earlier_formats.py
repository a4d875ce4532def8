"""Run folders of earlier versions, in the names of this one.

Format 1 has no stamps, and the default optimiser's rate is not part of its state. Format 3 has stamps. Both call some
classes by names that have changed since. What identifies a problem stays on disk as it was written, so that the digests
of the folder's files go on to agree; it is translated when it is read.
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
"""Classes that guides, objectives and agents were described by → their names today."""

RENAMED_OPTIONS = {"num_draws": "num_samples"}
"""Options of those classes."""

NOT_COMPARED = {UNSTAMPED: ("first draws", "agent's numbers"), 3: ("agent's numbers",)}
"""Parts of an identity that cannot be computed today as a format did: from keys that another generator split, or under
names that have changed."""

NEW_STATE = {UNSTAMPED: ("state.opt_state.rate",)}
"""Arrays that a format did not keep, and that are as at the start of a run."""

_DEFAULT_OPTIMIZER = re.compile(r"^state\.opt_state\[(\d+)\]")
_LEARNING = {"following": "next_observation", "held": "mask", "told": "update_info", "stages": "snapshots"}


def upgrade_problem(problem: Mapping[str, Any]) -> dict[str, Any]:
    """Translate the description of a problem of an earlier format; one of this format stays as it is."""
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
    """Translate the names of the arrays of a checkpoint of an earlier format."""
    if problem["format"] not in EARLIER:
        return dict(arrays)
    if problem["identity"].get("kind") == "learn":
        return {"/".join(_LEARNING.get(part, part) for part in name.split("/")): x for name, x in arrays.items()}
    if problem["format"] == UNSTAMPED and problem["settings"].get("optimizer") == "default":
        return {_DEFAULT_OPTIMIZER.sub(r"state.opt_state.adam[\1]", name): x for name, x in arrays.items()}
    return dict(arrays)

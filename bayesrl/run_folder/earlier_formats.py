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

NOT_COMPARED = {UNSTAMPED: ("first draws",)}
"""Parts of an identity that a format took in another way: the key was split by another generator."""

NEW_STATE = {UNSTAMPED: ("state.opt_state.rate",)}
"""Arrays that a format did not keep, and that are as at the start of a run."""

_DEFAULT_OPTIMIZER = re.compile(r"^state\.opt_state\[(\d+)\]")
_MEMORY = {"agent/memory/following": "agent/memory/next_observation", "agent/memory/held": "agent/memory/mask"}


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
    names = {name: _MEMORY.get(name, name) for name in arrays}
    if problem["format"] == UNSTAMPED and problem["settings"].get("optimizer") == "default":
        names = {name: _DEFAULT_OPTIMIZER.sub(r"state.opt_state.adam[\1]", new) for name, new in names.items()}
    return {names[name]: array for name, array in arrays.items()}

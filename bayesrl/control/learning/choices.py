"""What draws of action values say of a choice, and what a checkpoint says of a state."""

from typing import Any

import jax
import numpy as np

from bayesrl.errors import ControlError


def restored(state: Any, arrays: dict[str, np.ndarray], prefix: str) -> Any:
    """Put arrays of a checkpoint into a state of the same structure.

    Raises:
        ControlError: they are of another shape.
    """
    leaves, treedef = jax.tree.flatten(state)
    found = [arrays.get(f"{prefix}/{i}") for i in range(len(leaves))]
    for leaf, array in zip(leaves, found, strict=True):
        if array is None or array.shape != np.shape(leaf):
            raise ControlError(
                f"the run folder holds {prefix} of shape {None if array is None else array.shape}, and the agent needs "
                f"{np.shape(leaf)}; learn into another directory"
            )
    return jax.tree.unflatten(treedef, jax.device_put(found))


def shares(values: np.ndarray, allowed: np.ndarray | None = None) -> np.ndarray:
    """Give how often each action is the best of those allowed, among draws of their values [draws, actions]."""
    return np.bincount(_within(values, allowed).argmax(-1), minlength=values.shape[-1]) / len(values)


def losses(values: np.ndarray, allowed: np.ndarray | None = None) -> np.ndarray:
    """Give what each action loses to the best one, [draws, actions]; nan where it is not allowed."""
    best = _within(values, allowed).max(-1, keepdims=True)
    return best - (values if allowed is None else np.where(allowed, values, np.nan))


def _within(values: np.ndarray, allowed: np.ndarray | None) -> np.ndarray:
    return values if allowed is None else np.where(allowed, values, -np.inf)

"""Action masks of Gymnasium environments: in an observation of several parts, in `info`, or by a method."""

from collections.abc import Callable
from typing import Any

import numpy as np

from bayesrl.control.gymnasium.spaces import MASK, Actions
from bayesrl.errors import ControlError

METHOD = "action_masks"
"""The method by which some environments and wrappers say which actions are allowed."""


def mask_method(environment: Any) -> Callable[[], Any] | None:
    """Find the method of an environment, or of a wrapper around it, that gives masks; None if there is none."""
    try:
        found = environment.get_wrapper_attr(METHOD)
    except AttributeError:
        return None
    return found if callable(found) else None


def read_mask(environment: Any, seen: Any, info: Any, *, within: bool) -> Any:
    """Read the mask of a Gymnasium environment from its observation (`within`), `info` or its method; else None."""
    if within:
        return seen[MASK]
    if isinstance(info, dict) and MASK in info:
        return info[MASK]
    method = mask_method(environment)
    return None if method is None else method()


def parse_mask(mask: Any, actions: Actions, name: str) -> np.ndarray:
    """Turn a mask into one flag per action, [actions].

    If an action is several integers, the mask has a flag for each action, or for each value of each integer in turn.
    """
    assert actions.num is not None
    flags = np.asarray(mask)
    if flags.shape == (actions.num,) and flags.dtype.kind in "biuf":
        return np.asarray(flags > 0)
    if len(actions.sizes) > 1 and flags.shape == (sum(actions.sizes),) and flags.dtype.kind in "biuf":
        digits = np.stack(np.unravel_index(np.arange(actions.num), actions.sizes), -1)
        first = np.cumsum([0, *actions.sizes[:-1]])
        return np.asarray((flags > 0)[digits + first].all(-1))
    raise ControlError(
        f"{name} gives an {MASK} of {flags.dtype}{list(flags.shape)}, and has {actions.num} actions; let it give a "
        "flag for each, or pass action_masks=False"
    )

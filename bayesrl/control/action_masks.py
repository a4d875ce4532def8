"""Action masks of Gymnasium environments: in an observation of several parts, in `info`, or by a method."""

from collections.abc import Callable
from typing import Any

import numpy as np

from bayesrl.control.gymnasium.spaces import MASK, Actions
from bayesrl.errors import ControlError

METHOD = "action_masks"
"""The method by which some environments and wrappers tell which actions are allowed."""


def mask_method(environment: Any) -> Callable[[], Any] | None:
    """Find the method by which an environment, or a wrapper around it, tells its masks; None where there is none."""
    try:
        found = environment.get_wrapper_attr(METHOD)
    except AttributeError:
        return None
    return found if callable(found) else None


def read_mask(environment: Any, seen: Any, info: Any, *, within: bool) -> Any:
    """Give what an environment tells of the actions that are allowed, or None where it tells nothing.

    Args:
        environment: of Gymnasium.
        seen: what it gave to be observed.
        info: what it gave beside that.
        within: whether the mask is a part of the observation.
    """
    if within:
        return seen[MASK]
    if isinstance(info, dict) and MASK in info:
        return info[MASK]
    method = mask_method(environment)
    return None if method is None else method()


def parse_mask(mask: Any, actions: Actions, name: str) -> np.ndarray:
    """Give a mask as flags of finitely many actions, [actions].

    Of actions that are several integers it may tell of each action, or of the values of each integer one after another.

    Raises:
        ControlError: it is of another shape.
    """
    assert actions.num is not None
    told = np.asarray(mask)
    if told.shape == (actions.num,) and told.dtype.kind in "biuf":
        return np.asarray(told > 0)
    if len(actions.sizes) > 1 and told.shape == (sum(actions.sizes),) and told.dtype.kind in "biuf":
        digits = np.stack(np.unravel_index(np.arange(actions.num), actions.sizes), -1)
        first = np.cumsum([0, *actions.sizes[:-1]])
        return np.asarray((told > 0)[digits + first].all(-1))
    raise ControlError(
        f"{name} tells an {MASK} of {told.dtype}{list(told.shape)}, and has {actions.num} actions; let it tell of each "
        "whether it is allowed, or pass action_masks=False"
    )

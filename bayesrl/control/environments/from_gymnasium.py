"""Finite problems from Gymnasium environments that publish their model."""

from typing import Any

import numpy as np

from bayesrl.arguments import Count, UnitInterval, checked
from bayesrl.control.environments.model_validation import validate_model
from bayesrl.control.environments.published_models import PublishedModel, env_name, has_model, read_published_model
from bayesrl.control.environments.tabular import TabularMDP, from_outcomes
from bayesrl.control.gymnasium.vector_env import make_environment
from bayesrl.control.planning import soft_value_iteration
from bayesrl.errors import ControlError

_ACTIONS = {
    "FrozenLake": ("left", "down", "right", "up"),
    "CliffWalking": ("up", "right", "down", "left"),
    "Taxi": ("south", "north", "east", "west", "pick up", "drop off"),
}


@checked(ControlError)
def from_gymnasium(
    environment: Any, *, discount: UnitInterval = 0.99, horizon: Count | None = None, prior: np.ndarray | None = None
) -> TabularMDP:
    """Read the model of a Gymnasium environment that publishes it as `env.unwrapped.P`: FrozenLake, CliffWalking, Taxi.

    The model describes the environment as it is played. Wrappers that change one reward, action or observation at a
    time also change the model, and play in a copy of the environment checks that the table agrees with `step`. Time
    limits are left out; pass `horizon` for one. Outcomes with the same successor are merged and their rewards
    averaged. A state that is entered both with and without termination gets a terminal double.

    Args:
        environment: an environment, or the id of a registered one.
        discount: γ.
        horizon: number of steps, or None.
        prior: action probabilities from which policies start, [states, actions]; by default, uniform.

    Returns:
        `TabularMDP`, which starts as the environment does. Its states are the environment's, followed by an absorbing
        state if a double was needed. Grids have their layout, and the three environments above their action names.

    Raises:
        ControlError: the environment cannot be made, publishes no model, or publishes one that play contradicts; a
            wrapper may change more than the model says; or `TabularMDP` refuses the tables.

    Example:
        >>> from bayesrl import control
        >>> lake = control.from_gymnasium("FrozenLake-v1")
        >>> round(float(control.soft_value_iteration(lake, 0.01).objective), 6)
        0.152841
    """
    if isinstance(environment, str):
        environment = make_environment(environment)
    if not has_model(environment):
        raise ControlError(
            f"{env_name(environment)} publishes no model (it has no table P); FrozenLake-v1, CliffWalking-v1 and Taxi "
            "do; for others use GymnasiumSource"
        )
    return to_tabular(environment, read_published_model(environment), discount=discount, horizon=horizon, prior=prior)


def to_tabular(
    environment: Any,
    model: PublishedModel,
    *,
    discount: float,
    horizon: int | None,
    prior: np.ndarray | None = None,
    masked: bool = False,
) -> TabularMDP:
    """Check a model, from `read_published_model`, in play, and turn it into a finite problem; see `from_gymnasium`.

    If `masked`, the prior gives probability 0 to actions that the environment's masks exclude.
    """
    states, actions = len(model.table), len(model.columns)
    if model.core is None:
        start = np.eye(1, states)[0] if model.start is None else model.start
    else:
        start, allowed = validate_model(model, lambda: _best(environment, model), masked=masked)
        if allowed is not None:
            prior = allowed / allowed.sum(-1, keepdims=True)
    if prior is not None and np.shape(prior) != (states, actions):
        raise ControlError(f"prior has shape {np.shape(prior)}; use [states, actions], {(states, actions)}")
    return _problem(environment, model, start, prior, discount=discount, horizon=horizon)


def _best(environment: Any, model: PublishedModel) -> np.ndarray | None:
    """Compute the model's best action in each state with many steps to go; None if its value has no bound."""
    # With every state a possible start, states in which episodes also end get a best action too.
    start = np.full(len(model.table), 1 / len(model.table))
    try:
        mdp = _problem(environment, model, start, None, discount=0.99)
        best: np.ndarray = soft_value_iteration(mdp, 0.0).policy.argmax(-1)
    except ControlError:
        return None
    return best


def _problem(
    environment: Any, model: PublishedModel, start: np.ndarray, prior: np.ndarray | None, **options: Any
) -> TabularMDP:
    table = model.table
    ended, double = _ends(table, start)
    extra = [len(table)] if double else []
    lists = [
        [[(extra[0] if end and to in double else to, p, r) for p, to, r, end in outcomes] for outcomes in row]
        for row in table
    ]
    if extra:
        lists.append([[(extra[0], 1.0, 0.0)] for _ in lists[0]])
        start = np.append(start, 0.0)
        if prior is not None:
            prior = np.concatenate([prior, np.full((1, len(lists[0])), 1 / len(lists[0]))])
    terminal = np.isin(np.arange(len(lists)), [*sorted(ended - double), *extra])
    name = env_name(environment)
    known = next((names for key, names in _ACTIONS.items() if name.startswith(key)), ())
    named = max(model.columns) < len(known)
    # A layout numbers cells as the environment does inside its wrappers.
    in_place = model.inside == list(range(len(table)))
    return from_outcomes(
        lists,
        start=start,
        terminal=terminal,
        prior=prior,
        layout=_layout_of(model.bare, len(table)) if in_place else None,
        action_names=tuple(known[column] for column in model.columns) if named else (),
        name=name,
        **options,
    )


def _ends(table: list[list[list[Any]]], start: np.ndarray) -> tuple[set[int], set[int]]:
    """Find the states where episodes end, and those of them where episodes also start or pass through."""
    ended = {int(to) for row in table for outcomes in row for p, to, _, end in outcomes if end and p > 0}
    double = {s for s in ended if start[s] > 0}
    while True:
        # A state that episodes pass through leads on to others, so repeat until no more turn up.
        lively = [row for s, row in enumerate(table) if s not in ended or s in double]
        entered = {int(to) for row in lively for outcomes in row for p, to, _, end in outcomes if not end and p > 0}
        if entered & ended <= double:
            return ended, double
        double |= entered & ended


def _layout_of(bare: Any, states: int) -> tuple[int, int] | None:
    rows, columns = getattr(bare, "nrow", None), getattr(bare, "ncol", None)
    if rows is not None and columns is not None:
        return int(rows), int(columns)
    shape = getattr(bare, "shape", None)
    return (int(shape[0]), int(shape[1])) if shape is not None and np.prod(shape) == states else None

"""Models that Gymnasium environments publish, as they are played: wrappers are seen, and their word is tried."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from bayesrl.errors import ControlError

type Outcomes = list[tuple[float, int, float, bool]]
"""Of one action in one state: (probability, successor, reward, terminated)."""

_PASSIVE = (
    "OrderEnforcing",
    "PassiveEnvChecker",
    "RecordEpisodeStatistics",
    "RecordVideo",
    "RenderCollection",
    "HumanRendering",
    "Autoreset",
)
"""Wrappers of Gymnasium that leave alone what is played."""


@dataclass(frozen=True, kw_only=True)
class PublishedModel:
    """The model of an environment, as it is seen from outside of its wrappers.

    Attributes:
        table: outcomes by state and action, both counted from 0.
        start: distribution of the first state, [states]; None where none is published.
        seen: what is observed of each state, in the order of the table.
        inside: what the environment itself calls each state; −1 for one that it does not have.
        actions: what the environment takes for each action.
        columns: which action of the table P each one becomes.
        limit: steps after which an episode is cut off, or None.
        core: a copy of the environment without recorders and time limits, to be played.
        bare: what is inside of it.
    """

    table: list[list[Outcomes]]
    start: np.ndarray | None
    seen: list[Any]
    inside: list[int]
    actions: list[int]
    columns: list[int]
    limit: int | None
    core: Any
    bare: Any

    @property
    def observed(self) -> bool:
        """Whether the states, counted from 0, are what is observed."""
        return self.core is None or _is_space(self.core.observation_space, "Discrete")


def has_model(environment: Any) -> bool:
    """Tell whether an environment has a table of its own outcomes."""
    return isinstance(getattr(getattr(environment, "unwrapped", environment), "P", None), dict)


def env_name(environment: Any) -> str:
    """Tell the id of an environment, or its type."""
    spec = getattr(environment, "spec", None)
    return spec.id if spec is not None else type(environment).__name__


def wrappers_around(environment: Any) -> list[Any]:
    """Give the wrappers of an environment, from outside to inside."""
    import gymnasium

    found = []
    while isinstance(environment, gymnasium.Wrapper):
        found.append(environment)
        environment = environment.env
    return found


def time_limit(environment: Any) -> int | None:
    """Tell after how many steps Gymnasium cuts an episode off: the least of its wrappers' limits, or None."""
    limits = [int(one._max_episode_steps) for one in wrappers_around(environment) if _is(one, "TimeLimit")]
    return min(limits) if limits else None


def active_wrappers(environment: Any) -> list[Any]:
    """Give the wrappers that are neither recorders nor time limits, from outside to inside."""
    return [one for one in wrappers_around(environment) if not (_is(one, "TimeLimit", *_PASSIVE) or _is_idle(one))]


def read_published_model(environment: Any) -> PublishedModel:
    """Read the model that an environment publishes, through the wrappers around it.

    Wrappers that change one reward, action or observation at a time are put into the model, recorders are passed over.

    Raises:
        ControlError: a wrapper may change what is played otherwise, or hides states; the table P is none.
    """
    kinds = [_kind_of(wrapper) for wrapper in active_wrappers(environment)]
    core, bare = _copied(environment)
    if not callable(getattr(bare, "step", None)):  # a table and nothing to play
        _, table = _parsed(bare)
        whole, columns = list(range(len(table))), list(range(len(table[0])))
        return PublishedModel(
            table=table, start=_start_of(bare), seen=whole, inside=whole, actions=columns, columns=columns, limit=None,
            core=None, bare=bare,
        )  # fmt: skip
    first, table = _parsed(bare)
    inside_out = list(zip(reversed(wrappers_around(core)), reversed(kinds), strict=True))
    observe = [wrapper.observation for wrapper, kind in inside_out if kind == "observation"]
    act = [wrapper.action for wrapper, kind in reversed(inside_out) if kind == "action"]
    pay = [wrapper.reward for wrapper, kind in inside_out if kind == "reward"]
    spaces = (core.action_space, bare.action_space)
    if not all(_is_space(space, "Discrete") for space in spaces):
        raise ControlError(f"actions of {core} are {spaces[0]}, and the published model knows finitely many")
    actions = [int(core.action_space.start) + a for a in range(int(core.action_space.n))]
    try:
        columns = [int(_through(act, a)) - first for a in actions]
        seen = [_through(observe, s) for s in range(len(table))]
        wrong = [a for a, column in zip(actions, columns, strict=True) if not 0 <= column < len(table[0])]
        if wrong:
            raise ControlError(f"action {wrong[0]} becomes none of the {len(table[0])} that the published model knows")
        paid = [
            [[(p, to, float(_through(pay, r)), end) for p, to, r, end in row[column]] for column in columns]
            for row in table
        ]
    except ControlError:
        raise
    except Exception as error:
        raise ControlError(
            f"a wrapper of {core} cannot be asked what it does: {type(error).__name__}: {error}"
        ) from error
    model = PublishedModel(
        table=paid, start=_start_of(bare), seen=seen, inside=list(range(len(table))), actions=actions, columns=columns,
        limit=time_limit(environment), core=core, bare=bare,
    )  # fmt: skip
    return _in_order(model)


def _start_of(bare: Any) -> np.ndarray | None:
    start = getattr(bare, "initial_state_distrib", None)
    try:
        array = None if start is None else np.asarray(start, float)
    except (TypeError, ValueError) as error:
        raise ControlError(f"initial_state_distrib of {env_name(bare)} is no array of numbers: {error}") from error
    if array is None:
        return None
    if array.ndim != 1 or not (array >= 0).all() or not 0 < array.sum() < np.inf:
        raise ControlError(f"initial_state_distrib of {env_name(bare)} is no distribution: {array!r}")
    told: np.ndarray = array / array.sum()
    return told


def _parsed(bare: Any) -> tuple[int, list[list[Outcomes]]]:
    """Give the least action of the table P, and its rows in order."""
    try:
        least = min(bare.P[min(bare.P)])
        rows = [[[_outcome(*told) for told in row[a]] for a in sorted(row)] for _, row in sorted(bare.P.items())]
    except Exception as error:
        raise ControlError(
            f"the table P of {env_name(bare)} cannot be read: {error}; P[state][action] is a list of (probability, "
            "next state, reward, terminated)"
        ) from error
    start = int(getattr(getattr(bare, "action_space", None), "start", 0))
    # Actions are counted as the space counts them, or from 0 on.
    return (start if int(least) in (0, start) else int(least)), rows


def _outcome(probability: Any, to: Any, earned: Any, ended: Any) -> tuple[float, int, float, bool]:
    return float(probability), int(to), float(earned), bool(ended)


def _in_order(model: PublishedModel) -> PublishedModel:
    """Count states as they are observed, where observations are integers that tell them apart."""
    marks = [observation_key(seen) for seen in model.seen]
    if len(set(marks)) < len(marks):
        twice = next(i for i, mark in enumerate(marks) if marks.index(mark) < i)
        raise ControlError(
            f"states {marks.index(marks[twice])} and {twice} are observed as the same, {model.seen[twice]!r}, so that "
            "the optimum of the published model is not that of what is observed"
        )
    space = model.core.observation_space
    if not _is_space(space, "Discrete"):
        return model
    places = [int(seen) - int(space.start) for seen in model.seen]
    if any(not 0 <= place < int(space.n) for place in places):
        raise ControlError(f"the published model has states that {space} does not hold")
    if places == list(range(len(places))):
        return replace(model, seen=[int(space.start) + s for s in places])
    size = int(space.n)
    table: list[list[Outcomes]] = [[[(1.0, s, 0.0, True)] for _ in model.actions] for s in range(size)]
    start = None if model.start is None else np.zeros(size)
    inside = np.full(size, -1)
    inside[places] = model.inside
    for state, place in enumerate(places):
        table[place] = [[(p, places[to], r, end) for p, to, r, end in outcomes] for outcomes in model.table[state]]
        if start is not None and model.start is not None:
            start[place] = model.start[state]
    seen = [int(space.start) + s for s in range(size)]
    return replace(model, table=table, start=start, seen=seen, inside=inside.tolist())


def _kind_of(wrapper: Any) -> str:
    """Tell what a wrapper changes, one at a time: "reward", "action" or "observation".

    Raises:
        ControlError: it may change more than that.
    """
    import gymnasium

    for kind, base in {
        "reward": gymnasium.RewardWrapper,
        "action": gymnasium.ActionWrapper,
        "observation": gymnasium.ObservationWrapper,
    }.items():
        if isinstance(wrapper, base) and _leaves(wrapper, base):
            return kind
    raise ControlError(
        f"the wrapper {type(wrapper).__name__} may change what is played, and the published model does not tell how; "
        "take it off, or write the changed problem as a TabularMDP"
    )


def _leaves(wrapper: Any, base: type[Any]) -> bool:
    """Whether `step` and `reset` are those of a class of Gymnasium."""
    return all(
        getattr(type(wrapper), name) is getattr(base, name) and name not in vars(wrapper) for name in ("step", "reset")
    )


def _is(wrapper: Any, *names: str) -> bool:
    """Whether it is one of Gymnasium's own wrappers, and no class derived from it."""
    return _of_gymnasium(type(wrapper)) and type(wrapper).__name__ in names and "step" not in vars(wrapper)


def _is_idle(wrapper: Any) -> bool:
    import gymnasium

    changes = (gymnasium.RewardWrapper, gymnasium.ActionWrapper, gymnasium.ObservationWrapper)
    return not isinstance(wrapper, changes) and _leaves(wrapper, gymnasium.Wrapper)


def _is_space(space: Any, name: str) -> bool:
    return any(_of_gymnasium(base) and base.__name__ == name for base in type(space).__mro__)


def _of_gymnasium(kind: type[Any]) -> bool:
    return kind.__module__.partition(".")[0] == "gymnasium"


def _through(steps: list[Callable[[Any], Any]], value: Any) -> Any:
    for step in steps:
        value = step(value)
    return value


def observation_key(seen: Any) -> Any:
    """Give what tells observations apart."""
    if isinstance(seen, dict):
        return tuple((name, observation_key(value)) for name, value in sorted(seen.items()))
    if isinstance(seen, tuple | list):
        return tuple(observation_key(value) for value in seen)
    array = np.asarray(seen)
    return array.item() if array.ndim == 0 else (array.shape, array.tobytes())


def _copied(environment: Any) -> tuple[Any, Any]:
    """Copy an environment without its recorders and time limits, to play without leaving traces; also what is inside.

    What cannot be copied, such as a window, is shared: nothing is rendered.
    """
    memo: dict[int, Any] = {}
    bare = getattr(environment, "unwrapped", environment)
    try:
        inner = _twin(bare, memo, without=())
        whole = inner
        for wrapper in reversed(active_wrappers(environment)):
            outer = _twin(wrapper, memo, without=("env",))
            outer.env = whole
            whole = outer
    except Exception as error:
        raise ControlError(
            f"{env_name(environment)} cannot be copied, and so its model not be tried: {type(error).__name__}: {error}"
        ) from error
    if getattr(inner, "render_mode", None) is not None:
        inner.render_mode = None
    return whole, inner


def _twin(original: Any, memo: dict[int, Any], without: tuple[str, ...]) -> Any:
    twin = copy.copy(original)
    memo[id(original)] = twin
    for name, value in vars(original).items():
        if name in without:
            continue
        try:
            setattr(twin, name, copy.deepcopy(value, memo))
        except Exception:  # noqa: BLE001  (whatever cannot be copied)
            setattr(twin, name, value)
    return twin

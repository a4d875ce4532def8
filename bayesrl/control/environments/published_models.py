"""Read the model that a Gymnasium environment publishes as its table `P`, through the wrappers around it."""

import copy
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from bayesrl.arguments import user_code
from bayesrl.control.environments.tabular import as_floats
from bayesrl.errors import ControlError

type Outcomes = list[tuple[float, int, float, bool]]
"""Outcomes of one action in one state: (probability, successor, reward, terminated)."""

_PASSIVE = (
    "OrderEnforcing",
    "PassiveEnvChecker",
    "RecordEpisodeStatistics",
    "RecordVideo",
    "RenderCollection",
    "HumanRendering",
    "Autoreset",
)
"""Gymnasium wrappers that do not change the problem."""


@dataclass(frozen=True, kw_only=True)
class PublishedModel:
    """The model of an environment, as seen from outside its wrappers.

    Attributes:
        table: outcomes by state and action, both counted from 0.
        start: distribution of the first state, [states]; None if it is not published.
        seen: the observation of each state, in the order of the table.
        inside: the environment's own number of each state; −1 if it has no such state.
        actions: the argument of `step` for each action.
        columns: the action of the table P that each action becomes.
        limit: steps after which an episode is cut off, or None.
        core: a copy of the environment without recorders and time limits, to play in; None if it has no `step`.
        bare: the unwrapped environment inside `core`.
    """

    table: list[list[Outcomes]]
    start: np.ndarray | None
    seen: list[Any]
    inside: list[int]
    actions: list[int]
    columns: list[int]
    limit: int | None = None
    core: Any = None
    bare: Any

    @property
    def observed(self) -> bool:
        """Whether observations are the states themselves, counted from 0."""
        return self.core is None or _is_discrete(self.core.observation_space)


def has_model(environment: Any) -> bool:
    """Check whether an environment publishes a table of its outcomes."""
    return isinstance(getattr(getattr(environment, "unwrapped", environment), "P", None), dict)


def env_name(environment: Any) -> str:
    """Return the id of an environment, or the name of its type."""
    return getattr(getattr(environment, "spec", None), "id", type(environment).__name__)


def wrappers_around(environment: Any) -> list[Any]:
    """List the wrappers of an environment, from outside to inside."""
    import gymnasium

    wrappers = []
    while isinstance(environment, gymnasium.Wrapper):
        wrappers.append(environment)
        environment = environment.env
    return wrappers


def time_limit(environment: Any) -> int | None:
    """Find the number of steps after which Gymnasium cuts an episode off: the least limit of its wrappers, or None."""
    limits = [int(one._max_episode_steps) for one in wrappers_around(environment) if _is_own(one, "TimeLimit")]
    return min(limits, default=None)


def active_wrappers(environment: Any) -> list[Any]:
    """List the wrappers that may change the problem, from outside to inside: no recorders, no time limits."""
    import gymnasium

    def is_idle(wrapper: Any) -> bool:
        changes = (gymnasium.RewardWrapper, gymnasium.ActionWrapper, gymnasium.ObservationWrapper)
        return not isinstance(wrapper, changes) and _inherits_play(wrapper, gymnasium.Wrapper)

    return [one for one in wrappers_around(environment) if not (_is_own(one, "TimeLimit", *_PASSIVE) or is_idle(one))]


def read_published_model(environment: Any) -> PublishedModel:
    """Read the model that an environment publishes, through the wrappers around it.

    Wrappers that change one reward, action or observation at a time also change the model; recorders are skipped.
    Wrappers that may change more, or hide states, are refused.
    """
    kinds = [_kind_of_wrapper(wrapper) for wrapper in active_wrappers(environment)]
    core, bare = _copy_playable(environment)
    first, table = _read_table(bare)
    states, columns = list(range(len(table))), list(range(len(table[0])))
    model = PublishedModel(
        table=table,
        start=_read_start(bare, len(table)),
        seen=states,
        inside=states,
        actions=columns,
        columns=columns,
        bare=bare,
    )
    if not callable(getattr(bare, "step", None)):  # a table, and no environment to play
        return model
    inside_out = list(zip(reversed(wrappers_around(core)), reversed(kinds), strict=True))

    def through(kind: str, value: Any) -> Any:
        """Send a value through the wrappers of its kind: an action inwards, an observation or a reward outwards."""
        for wrapper, own in reversed(inside_out) if kind == "action" else inside_out:
            value = getattr(wrapper, kind)(value) if own == kind else value
        return value

    space = core.action_space
    if not (_is_discrete(space) and _is_discrete(bare.action_space)):
        raise ControlError(f"actions of {core} are {space}, and a published model has finitely many actions")
    actions = [int(space.start) + a for a in range(int(space.n))]
    with user_code(f"a wrapper of {core}, called alone,", ControlError, "take it off"):
        columns = [int(through("action", a)) - first for a in actions]
        seen = [through("observation", s) for s in states]
        wrong = [a for a, column in zip(actions, columns, strict=True) if not 0 <= column < len(table[0])]
        if wrong:
            raise ControlError(f"action {wrong[0]} becomes none of the {len(table[0])} actions of the published model")
        paid = [
            [[(p, to, float(through("reward", r)), end) for p, to, r, end in row[column]] for column in columns]
            for row in table
        ]
    limit = time_limit(environment)
    return _in_observed_order(
        replace(model, table=paid, seen=seen, actions=actions, columns=columns, limit=limit, core=core)
    )


def _read_start(bare: Any, num_states: int) -> np.ndarray | None:
    start = getattr(bare, "initial_state_distrib", None)
    if start is None:
        return None
    array = as_floats(f"initial_state_distrib of {env_name(bare)}", start)
    if array.ndim != 1 or not (array >= 0).all() or not 0 < array.sum() < np.inf:
        raise ControlError(f"initial_state_distrib of {env_name(bare)} is not a distribution: {array!r}")
    if len(array) != num_states:
        raise ControlError(f"initial_state_distrib has {len(array)} numbers, and the table P has {num_states} states")
    return array / array.sum()


def _read_table(bare: Any) -> tuple[int, list[list[Outcomes]]]:
    """Return the least action of the table P, and its rows in order."""
    remedy = "let P[state][action] be a list of (probability, next state, reward, terminated)"
    with user_code(f"reading the table P of {env_name(bare)}", ControlError, remedy):
        least = min(bare.P[min(bare.P)])
        rows = [
            [[(float(p), int(to), float(r), bool(end)) for p, to, r, end in row[a]] for a in sorted(row)]
            for _, row in sorted(bare.P.items())
        ]
    start = int(getattr(getattr(bare, "action_space", None), "start", 0))
    # Some tables count actions as the space does, others from 0.
    return (start if int(least) in (0, start) else int(least)), rows


def _in_observed_order(model: PublishedModel) -> PublishedModel:
    """Number states by their observations, if those are integers that tell them apart."""
    keys = [observation_key(seen) for seen in model.seen]
    if len(set(keys)) < len(keys):
        twice = next(i for i, key in enumerate(keys) if keys.index(key) < i)
        raise ControlError(
            f"states {keys.index(keys[twice])} and {twice} are observed as the same, {model.seen[twice]!r}, so the "
            "optimum of the published model is not that of what is observed"
        )
    space = model.core.observation_space
    if not _is_discrete(space):
        return model
    size, first = int(space.n), int(space.start)
    places = [int(seen) - first for seen in model.seen]
    if any(not 0 <= place < size for place in places):
        raise ControlError(f"the published model has states that {space} does not hold")
    if places == list(range(len(places))):
        return replace(model, seen=[first + s for s in places])
    # An observation that no state has gets a dead end, which nothing reaches.
    table: list[list[Outcomes]] = [[[(1.0, s, 0.0, True)] for _ in model.actions] for s in range(size)]
    for place, row in zip(places, model.table, strict=True):
        table[place] = [[(p, places[to], r, end) for p, to, r, end in outcomes] for outcomes in row]
    inside, start = np.full(size, -1), model.start
    inside[places] = model.inside
    if start is not None:
        start = np.zeros(size)
        start[places] = model.start
    seen = [first + s for s in range(size)]
    return replace(model, table=table, start=start, seen=seen, inside=inside.tolist())


def _kind_of_wrapper(wrapper: Any) -> str:
    """Say what a wrapper changes, one at a time: "reward", "action" or "observation"; refuse others."""
    import gymnasium

    for kind, base in {
        "reward": gymnasium.RewardWrapper,
        "action": gymnasium.ActionWrapper,
        "observation": gymnasium.ObservationWrapper,
    }.items():
        if isinstance(wrapper, base) and _inherits_play(wrapper, base):
            return kind
    raise ControlError(
        f"the wrapper {type(wrapper).__name__} may change what is played, and the published model does not tell how; "
        "take it off, or write the changed problem as a TabularMDP"
    )


def _inherits_play(wrapper: Any, base: type[Any]) -> bool:
    """Check whether a wrapper inherits `step` and `reset` from a Gymnasium class unchanged."""
    return all(
        getattr(type(wrapper), name) is getattr(base, name) and name not in vars(wrapper) for name in ("step", "reset")
    )


def _is_own(wrapper: Any, *names: str) -> bool:
    """Check for one of Gymnasium's own wrappers, not a class derived from it."""
    kind = type(wrapper)
    return _is_gymnasium(kind) and kind.__name__ in names and "step" not in vars(wrapper)


def _is_discrete(space: Any) -> bool:
    return any(_is_gymnasium(base) and base.__name__ == "Discrete" for base in type(space).__mro__)


def _is_gymnasium(kind: type[Any]) -> bool:
    return kind.__module__.partition(".")[0] == "gymnasium"


def observation_key(seen: Any) -> Any:
    """Make a hashable key that is equal for equal observations."""
    if isinstance(seen, dict):
        return tuple((name, observation_key(value)) for name, value in sorted(seen.items()))
    if isinstance(seen, tuple | list):
        return tuple(observation_key(value) for value in seen)
    array = np.asarray(seen)
    # Numbers are equal across types, bytes are not; but arrays of one space should have one type.
    return array.item() if array.ndim == 0 else (array.shape, array.tobytes())


def _copy_playable(environment: Any) -> tuple[Any, Any]:
    """Copy an environment without recorders and time limits, to play without traces; also return its unwrapped core.

    Parts that cannot be copied, such as a window, are shared; nothing is rendered.
    """
    memo: dict[int, Any] = {}

    def twin(original: Any, without: str = "") -> Any:
        made = copy.copy(original)
        memo[id(original)] = made  # references to the environment from inside it lead to the copy
        for name, value in vars(original).items():
            if name == without:
                continue
            try:
                setattr(made, name, copy.deepcopy(value, memo))
            except Exception:  # noqa: BLE001  (whatever cannot be copied)
                setattr(made, name, value)
        return made

    with user_code(f"copying {env_name(environment)}, to try its model,", ControlError, "let copy.copy take it"):
        core = inner = twin(getattr(environment, "unwrapped", environment))
        for wrapper in reversed(active_wrappers(environment)):
            outer = twin(wrapper, without="env")
            outer.env = core
            core = outer
    if getattr(inner, "render_mode", None) is not None:
        inner.render_mode = None
    return core, inner

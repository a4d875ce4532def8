"""Finite Markov decision processes, as tables."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import scipy.sparse as sp
from scipy.sparse.csgraph import breadth_first_order

from bayesrl.arguments import AnyNumbersOrNone, Count, FlagsOrNone, UnitInterval, checked
from bayesrl.errors import ControlError

_TOLERANCE = 1e-6


@checked(ControlError)
@dataclass(frozen=True, eq=False, kw_only=True)
class TabularMDP:
    """A finite Markov decision process with a prior policy; arrays are NumPy, in double precision.

    Each action in each state has at most K outcomes; if it has fewer, the rest have probability 0.
    Episodes draw their first state from `start`, and end in a terminal state or after `horizon` steps.

    Args:
        successors: the next state of each outcome, [states, actions, K], integers.
        probabilities: probability of each outcome, [states, actions, K].
        rewards: reward of each outcome, reward units, [states, actions, K].
        start: distribution of the first state, [states]; by default, state 0.
        terminal: which states end the episode, [states], bool; by default, none.
        prior: action probabilities from which policies start, [states, actions]; by default, uniform.
        discount: γ in [0, 1].
        horizon: number of steps; None if episodes go on until they terminate.
        layout: (rows, columns) of a grid whose cells, row by row, are the first states; None if there is no grid.
        action_names: one name per action.
        name: name of the problem.

    Raises:
        ControlError: the arrays do not fit together, something is not a distribution, a reward is not finite, the
            discount is outside [0, 1] or the horizon below 1; or, with discount 1 and no horizon, there is a state
            from which the prior may never reach a terminal one.

    Example:
        >>> import numpy as np
        >>> from bayesrl.control.environments.tabular import TabularMDP
        >>> stay_or_leave = TabularMDP.from_dense(
        ...     np.array([[[1.0, 0.0], [0.0, 1.0]], [[0.0, 1.0], [0.0, 1.0]]]),
        ...     np.array([[0.0, 1.0], [0.0, 0.0]]),
        ...     terminal=np.array([False, True]),
        ... )
        >>> stay_or_leave.num_states, stay_or_leave.num_actions
        (2, 2)

    References:
        Puterman (1994), "Markov Decision Processes", chapter 2.
    """

    GIVEN_BY: ClassVar[str] = "as control.from_gymnasium or a function such as control.river_swim gives it"

    successors: np.ndarray
    probabilities: np.ndarray
    rewards: np.ndarray
    start: AnyNumbersOrNone = None
    terminal: FlagsOrNone = None
    prior: AnyNumbersOrNone = None
    discount: UnitInterval = 1.0
    horizon: Count | None = None
    layout: tuple[Count, Count] | None = None
    action_names: tuple[str, ...] = ()
    name: str = ""

    def __post_init__(self) -> None:
        probabilities = as_floats("probabilities", self.probabilities)
        if probabilities.ndim != 3 or 0 in probabilities.shape:
            raise ControlError(
                f"probabilities has shape {probabilities.shape}; use [states, actions, outcomes], each at least 1"
            )
        states, actions, _ = probabilities.shape
        given: dict[str, Any] = {
            "successors": np.asarray(self.successors),
            "probabilities": probabilities,
            "rewards": as_floats("rewards", self.rewards),
            "start": np.eye(1, states)[0] if self.start is None else as_floats("start", self.start),
            "terminal": np.zeros(states, bool) if self.terminal is None else np.asarray(self.terminal, bool),
            "prior": np.full((states, actions), 1 / actions) if self.prior is None else as_floats("prior", self.prior),
            "action_names": tuple(self.action_names) or tuple(str(a) for a in range(actions)),
        }
        for name, value in given.items():
            object.__setattr__(self, name, value)
        self._check_shapes()
        self._check_numbers()
        if self.discount == 1 and self.horizon is None:
            self._check_ends()

    @classmethod
    def from_dense(cls, transitions: Any, rewards: Any, **options: Any) -> "TabularMDP":
        """Make a process from full tables.

        Args:
            transitions: P(s′ | s, a), [states, actions, states].
            rewards: r(s, a) [states, actions], or r(s, a, s′) [states, actions, states], reward units.
            **options: other arguments of the class.

        Raises:
            ControlError: as for the class.
        """
        table = as_floats("transitions", transitions)
        if table.ndim != 3 or table.shape[0] != table.shape[2]:
            raise ControlError(f"transitions has shape {table.shape}; use [states, actions, states]")
        earned = as_floats("rewards", rewards)
        if earned.shape not in (table.shape, table.shape[:2]):
            raise ControlError(f"rewards has shape {earned.shape}; use {table.shape[:2]} or {table.shape}")
        most = max(int((table != 0).sum(-1).max(initial=1)), 1)
        # A stable sort puts the possible outcomes first, in the order of states.
        order = np.argsort(table == 0, axis=-1, kind="stable")[..., :most]
        full = np.broadcast_to(earned[..., None], table.shape) if earned.ndim == 2 else earned
        return cls(
            successors=order,
            probabilities=np.take_along_axis(table, order, -1),
            rewards=np.take_along_axis(full, order, -1),
            **options,
        )

    @property
    def num_states(self) -> int:
        """Number of states."""
        return int(self.probabilities.shape[0])

    @property
    def num_actions(self) -> int:
        """Number of actions."""
        return int(self.probabilities.shape[1])

    def replace(self, **changes: Any) -> "TabularMDP":
        """Copy the process with some fields changed."""
        return dataclasses.replace(self, **changes)

    def transitions(self) -> sp.csr_array:
        """Return P(s′ | s, a) as a sparse matrix [states · actions, states]; rows of terminal states are empty."""
        states, actions, outcomes = self.probabilities.shape
        rows = np.repeat(np.arange(states * actions), outcomes)
        alive = np.where(self.terminal[:, None, None], 0.0, self.probabilities)
        shape = (states * actions, states)
        # The constructor adds up outcomes with the same successor.
        matrix = sp.csr_array((alive.ravel(), (rows, self.successors.ravel())), shape=shape)
        matrix.eliminate_zeros()
        return matrix

    def expected_rewards(self) -> np.ndarray:
        """Return E[r | s, a], [states, actions], reward units; 0 in terminal states."""
        return np.where(self.terminal[:, None], 0.0, (self.probabilities * self.rewards).sum(-1))

    def dense(self) -> np.ndarray:
        """Return P(s′ | s, a), [states, actions, states]; terminal states lead to themselves."""
        table = self.transitions().toarray().reshape(self.num_states, self.num_actions, self.num_states)
        ends = np.flatnonzero(self.terminal)
        table[ends, :, ends] = 1.0
        return table

    def _check_shapes(self) -> None:
        states, actions, outcomes = self.probabilities.shape
        wanted = {
            "successors": (states, actions, outcomes),
            "rewards": (states, actions, outcomes),
            "start": (states,),
            "terminal": (states,),
            "prior": (states, actions),
        }
        for name, shape in wanted.items():
            found = getattr(self, name).shape
            if found != shape:
                raise ControlError(
                    f"{name} has shape {found}; with probabilities {self.probabilities.shape} use {shape}"
                )
        if not np.issubdtype(self.successors.dtype, np.integer):
            raise ControlError(f"successors is of type {self.successors.dtype}; use integers")
        if len(self.action_names) != actions:
            raise ControlError(f"action_names={self.action_names!r} has {len(self.action_names)} names; use {actions}")
        if self.layout is not None and int(np.prod(self.layout)) > states:
            raise ControlError(f"layout={self.layout!r} has more cells than the {states} states; pass (rows, columns)")

    def _check_numbers(self) -> None:
        bad = (self.successors < 0) | (self.successors >= self.num_states)
        if bad.any():
            state, action, _ = np.argwhere(bad)[0]
            raise ControlError(
                f"state {state}, action {action} leads to state {self.successors[bad][0]}; states are 0 to "
                f"{self.num_states - 1}"
            )
        _check_distributions("transitions", self.probabilities, "state {}, action {}")
        _check_distributions("the prior", self.prior, "state {}")
        _check_distributions("start", self.start, "")
        bad = ~np.isfinite(self.rewards)
        if bad.any():
            state, action, _ = np.argwhere(bad)[0]
            raise ControlError(
                f"the reward of state {state}, action {action} is {self.rewards[bad][0]}; make it finite"
            )

    def _check_ends(self) -> None:
        """Follow the prior's steps backwards from the terminal states."""
        # In a finite process, an end that every state can reach is reached with probability 1.
        weights = sp.kron(sp.eye_array(self.num_states), np.ones((1, self.num_actions)), format="csr")
        steps = weights @ sp.diags_array((self.prior > 0).ravel().astype(float)) @ self.transitions()
        ends = can_reach(steps, self.terminal)
        if not ends.all():
            raise ControlError(
                f"discount 1 without a horizon, and from state {int(np.flatnonzero(~ends)[0])} the prior never reaches "
                "a terminal state, so that its return has no end; pass horizon=, a discount below 1, or terminal="
            )


def can_reach(steps: sp.csr_array, targets: np.ndarray) -> np.ndarray:
    """Flag the states that are targets or can reach one by steps with nonzero entries, [states]."""
    states = len(targets)
    # An extra vertex leads to all targets, so a single search along reversed steps finds every state.
    origin = sp.csr_array(np.where(targets, 1.0, 0.0)[None])
    graph = sp.block_array([[steps.T, None], [origin, sp.csr_array((1, 1))]], format="csr")
    graph.eliminate_zeros()
    order = breadth_first_order(graph, states, return_predecessors=False)
    found = np.zeros(states + 1, bool)
    found[order] = True
    return found[:-1]


def as_floats(name: str, values: Any) -> np.ndarray:
    """Convert to an array of numbers in double precision, or refuse what is not one."""
    try:
        array = np.asarray(values)
        if array.dtype.kind not in "biuf":
            raise TypeError(f"it holds {array.dtype}")
        return array.astype(float)
    except (TypeError, ValueError, OverflowError) as error:
        raise ControlError(f"{name} is not an array of numbers: {error}; pass one") from error


def _check_distributions(what: str, values: np.ndarray, where: str) -> None:
    """Refuse rows that are negative, not numbers, or do not sum to one along the last axis."""
    sums = values.sum(-1)
    bad = (np.abs(sums - 1) > _TOLERANCE) | ~np.isfinite(sums) | (values < 0).any(-1)
    if not bad.any():
        return
    place = tuple(int(i) for i in np.argwhere(np.atleast_1d(bad))[0])
    at = f" of {where.format(*place)}" if where else ""
    row = values[place] if where else values
    if (row < 0).any():
        raise ControlError(f"{what}{at} holds the negative probability {row.min():g}; use a distribution")
    raise ControlError(f"{what}{at} sums to {row.sum():.6g}, not 1; use a distribution")


def merge_outcomes(outcomes: Sequence[tuple[int, float, float]]) -> list[tuple[int, float, float]]:
    """Merge outcomes (successor, probability, reward) that lead to the same state, and average their rewards."""
    found: dict[int, tuple[float, float]] = {}
    for successor, probability, earned in outcomes:
        if probability > 0:
            mass, total = found.get(successor, (0.0, 0.0))
            found[successor] = (mass + probability, total + probability * earned)
    return [(state, mass, total / mass) for state, (mass, total) in found.items()]


def from_outcomes(table: Sequence[Sequence[Sequence[tuple[int, float, float]]]], **options: Any) -> TabularMDP:
    """Make a process from lists of (successor, probability, reward) by state and action, and the other `options`."""
    lists = [[merge_outcomes(outcomes) for outcomes in row] for row in table]
    most = max((len(outcomes) for row in lists for outcomes in row), default=1)
    padded = np.zeros((len(lists), len(lists[0]), max(most, 1), 3))
    for state, row in enumerate(lists):
        for action, outcomes in enumerate(row):
            padded[state, action, : len(outcomes)] = np.reshape(outcomes, (-1, 3))
    successors, probabilities, rewards = np.moveaxis(padded, -1, 0)
    return TabularMDP(successors=successors.astype(int), probabilities=probabilities, rewards=rewards, **options)

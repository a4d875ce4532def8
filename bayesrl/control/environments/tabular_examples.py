"""Finite problems from the literature, as tables."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from bayesrl.arguments import Count, CountAboveOne, MemoryNeed, UnitInterval, checked
from bayesrl.control.environments.tabular import TabularMDP, from_outcomes
from bayesrl.errors import ControlError

_BYTES_OF_STATE = 1000
"""Least memory of the lists of outcomes of two actions."""

_FITS = MemoryNeed(lambda given: _BYTES_OF_STATE * given["num_states"], ("num_states",), "use a smaller one")
_SQUARE_FITS = MemoryNeed(lambda given: _BYTES_OF_STATE * given["size"] ** 2, ("size",), "use a smaller one")
# Clockwise, so that the next action in turn is a step to the right.
_MOVES = {"up": (-1, 0), "right": (0, 1), "down": (1, 0), "left": (0, -1)}


@checked(ControlError, _FITS)
def river_swim(
    *, num_states: CountAboveOne = 6, horizon: Count | None = 20, discount: UnitInterval = 1.0
) -> TabularMDP:
    """Swim against the current: a small reward downstream, a large one at the far end, where chance rarely leads.

    Swimming right moves right with probability .35, stays with .6 and drifts back with .05. In the first state it
    moves with .6 and stays with .4; in the last it stays with .6 and drifts with .4. Left always moves left. The
    reward is .005 for left in the first state and 1 for right in the last.

    Args:
        num_states: at least 2.
        horizon: number of steps.
        discount: γ.

    Example:
        >>> from bayesrl import control
        >>> control.river_swim(num_states=6).num_actions
        2

    References:
        Strehl & Littman (2008), "An analysis of model-based interval estimation for MDPs", figure 1.
    """
    last = num_states - 1
    table = [[[(s - 1, 1.0, 0.0)], [(s - 1, 0.05, 0.0), (s, 0.6, 0.0), (s + 1, 0.35, 0.0)]] for s in range(num_states)]
    table[0] = [[(0, 1.0, 0.005)], [(0, 0.4, 0.0), (1, 0.6, 0.0)]]
    table[last][1] = [(last - 1, 0.4, 1.0), (last, 0.6, 1.0)]
    return from_outcomes(
        table,
        horizon=horizon,
        discount=discount,
        action_names=("left", "right"),
        layout=(1, num_states),
        name="river_swim",
    )


@checked(ControlError, _FITS)
def n_chain(
    *, num_states: CountAboveOne = 5, slip: UnitInterval = 0.2, horizon: Count | None = 20, discount: UnitInterval = 1.0
) -> TabularMDP:
    """Walk along a chain: forward pays 10, but only at the end; back to the start always pays 2; actions slip.

    Args:
        num_states: at least 2.
        slip: probability that the other action is taken.
        horizon: number of steps.
        discount: γ.

    References:
        Strens (2000), "A Bayesian framework for reinforcement learning", section 5.1.
    """
    last = num_states - 1
    table = []
    for state in range(num_states):
        to, pay = min(state + 1, last), 10.0 if state == last else 0.0
        table.append([[(to, 1 - slip, pay), (0, slip, 2.0)], [(0, 1 - slip, 2.0), (to, slip, pay)]])
    return from_outcomes(
        table,
        horizon=horizon,
        discount=discount,
        action_names=("forward", "back"),
        layout=(1, num_states),
        name="n_chain",
    )


@checked(ControlError, _SQUARE_FITS)
def deep_sea(*, size: CountAboveOne = 8, discount: UnitInterval = 1.0) -> TabularMDP:
    """Dive to the far corner of a square: each move right costs .01/size, and only going right all the way pays 1.

    Args:
        size: rows and columns; the horizon is `size`.
        discount: γ.

    Example:
        >>> from bayesrl import control
        >>> control.deep_sea(size=4).horizon
        4

    References:
        Osband, Van Roy, Russo & Wen (2019), "Deep exploration via randomized value functions", section 4.
    """
    end = size * size
    table = []
    for cell in range(end):
        below, column = size * (cell // size + 1), cell % size
        # Below the last row lies the end, whatever the column.
        left, right = (min(below + max(column - 1, 0), end), min(below + min(column + 1, size - 1), end))
        won = 1.0 if cell == end - 1 else 0.0
        table.append([[(left, 1.0, 0.0)], [(right, 1.0, won - 0.01 / size)]])
    table.append([[(end, 1.0, 0.0)], [(end, 1.0, 0.0)]])
    return from_outcomes(
        table,
        terminal=np.arange(end + 1) == end,
        horizon=size,
        discount=discount,
        action_names=("left", "right"),
        layout=(size, size),
        name="deep_sea",
    )


@checked(ControlError)
def grid_world(
    rows: Sequence[str],
    *,
    slip: UnitInterval = 0.0,
    step_reward: float = 0.0,
    goal_reward: float = 1.0,
    hole_reward: float = 0.0,
    horizon: Count | None = None,
    discount: UnitInterval = 0.99,
) -> TabularMDP:
    """Make a grid world from a map: S start, G goal, H hole, # wall, . floor; goals and holes end the episode.

    Args:
        rows: strings of equal length, one letter per cell.
        slip: probability of moving at a right angle to the action, half to either side.
        step_reward: reward of each step, reward units.
        goal_reward: reward of entering a goal, on top of that of the step.
        hole_reward: reward of entering a hole, on top of that of the step.
        horizon: number of steps, or None.
        discount: γ.

    Raises:
        ControlError: the map is a single string or ragged, has another letter, or no start; an option is out of range.

    Example:
        >>> from bayesrl.control.environments.tabular_examples import grid_world
        >>> grid_world(["S.G"], discount=0.9).num_states
        3
    """
    width = len(rows[0]) if rows else 0
    ragged = [row for row in rows if len(row) != width]
    if width == 0 or ragged:
        raise ControlError(f"the rows of a grid world have one length; got {[len(row) for row in rows]}")
    letters = "".join(rows)
    if strange := sorted(set(letters) - set("SGH#.")):
        raise ControlError(f"the map holds {strange[0]!r}; use S start, G goal, H hole, # wall, . floor")
    if "S" not in letters:
        raise ControlError("the map has no start; mark one or several cells with S")
    pay = {"G": goal_reward, "H": hole_reward}
    table = []
    for cell, letter in enumerate(letters):
        if letter in "GH#":
            table.append([[(cell, 1.0, 0.0)]] * 4)
            continue
        targets = [_neighbour(rows, cell, move) for move in _MOVES.values()]
        earned = [step_reward + pay.get(letters[to], 0.0) for to in targets]
        turns = ((0, 1 - slip), (1, slip / 2), (-1, slip / 2))  # straight on, to the right, to the left
        ways = [[((action + turn) % 4, share) for turn, share in turns] for action in range(4)]
        table.append([[(targets[way], share, earned[way]) for way, share in outcomes] for outcomes in ways])
    kinds = np.array(list(letters))
    start = (kinds == "S") / (kinds == "S").sum()
    return from_outcomes(
        table,
        start=start,
        # Nobody enters a wall; as an end, it is no state from which the prior reaches none.
        terminal=np.isin(kinds, ["G", "H", "#"]),
        horizon=horizon,
        discount=discount,
        layout=(len(rows), width),
        action_names=tuple(_MOVES),
        name="grid_world",
    )


def _neighbour(rows: Sequence[str], cell: int, move: tuple[int, int]) -> int:
    """Find the cell after a move; walls and edges block it."""
    width = len(rows[0])
    row, column = cell // width + move[0], cell % width + move[1]
    inside = 0 <= row < len(rows) and 0 <= column < width
    return row * width + column if inside and rows[row][column] != "#" else cell


TABULAR_EXAMPLES: dict[str, Callable[..., TabularMDP]] = {
    "deep_sea": deep_sea,
    "grid_world": grid_world,
    "n_chain": n_chain,
    "river_swim": river_swim,
}


@checked(ControlError)
def mdp_from_name(name: str, **options: Any) -> TabularMDP:
    """Make one of the problems of this module by its name.

    Args:
        name: `river_swim`, `n_chain`, `deep_sea` or `grid_world`.
        **options: arguments of the function of that name.

    Raises:
        ControlError: there is no such problem.
    """
    if name not in TABULAR_EXAMPLES:
        raise ControlError(f"there is no tabular example {name!r}; choose from {', '.join(TABULAR_EXAMPLES)}")
    return TABULAR_EXAMPLES[name](**options)

"""Tables of finite problems: what they refuse, and what Gymnasium's own model says."""

from typing import Any

import gymnasium
import numpy as np
import pytest

from bayesrl.control import TabularMDP, from_gymnasium, grid_world, soft_value_iteration
from bayesrl.errors import ControlError

STAY = np.stack([np.eye(2), np.eye(2)], 1)
PAY = np.zeros((2, 2))


def broken(place: tuple[int, ...], value: float, array: np.ndarray) -> np.ndarray:
    result = array.copy()
    result[place] = value
    return result


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"transitions": broken((1, 0, 1), 0.5, STAY)}, "transitions of state 1, action 0 sums to 0.5, not 1"),
    ({"transitions": broken((1, 0, 0), -0.5, broken((1, 0, 1), 1.5, STAY))}, "holds the negative probability -0.5"),
    ({"transitions": np.ones((2, 2))}, r"transitions has shape \(2, 2\)"),
    ({"rewards": broken((0, 1), np.nan, PAY)}, "the reward of state 0, action 1 is nan"),
    ({"rewards": np.zeros(3)}, r"rewards has shape \(3,\)"),
    ({"discount": 1.5}, "discount=1.5; use a number from 0 to 1"),
    ({"discount": -0.1}, "discount=-0.1; use a number from 0 to 1"),
    ({"discount": 1.0}, "discount 1 without a horizon, and from state 0 the prior never reaches"),
    ({"horizon": 0}, "horizon=0; use a whole number of at least 1"),
    ({"horizon": 2.5}, "horizon=2.5"),
    ({"prior": np.array([[0.5, 0.5], [0.5, 0.6]])}, "the prior of state 1 sums to 1.1"),
    ({"start": np.array([0.5, 0.4])}, "start sums to 0.9"),
    ({"start": np.ones(3) / 3}, r"start has shape \(3,\)"),
    ({"action_names": ("left",)}, "has 1 names; use 2"),
    ({"layout": (3, 3)}, "more cells than the 2 states"),
    ({"layout": (2,)}, r"layout=\(2,\); use a tuple of 2"),
    ({"layout": (-1, -2)}, r"layout=\(-1, -2\); use a tuple that holds a whole number of at least 1"),
    ({"layout": "ab"}, "layout='ab'; use a tuple of 2"),
    ({"transitions": [[[1.0], [1.0]], [[1.0]]]}, "transitions is not an array of numbers: .*; pass one"),
    ({"rewards": "much"}, "rewards is not an array of numbers"),
    ({"prior": "uniform"}, "prior='uniform'; use a number, or an array of numbers"),
    ({"terminal": ["no", "yes"]}, "terminal=.*; use True and False"),
    ({"terminal": [0, 2]}, r"terminal=\[0, 2\]; use True and False"),
]


@pytest.mark.parametrize(("changes", "message"), REFUSED, ids=lambda x: str(x)[:40])
def test_refused(changes: dict[str, Any], message: str, unchecked: None) -> None:
    told: dict[str, Any] = {"transitions": STAY, "rewards": PAY, "discount": 0.9} | changes
    with pytest.raises(ControlError, match=message):
        TabularMDP.from_dense(told.pop("transitions"), told.pop("rewards"), **told)


def test_successors_are_checked() -> None:
    ones = np.ones((1, 1, 1))
    with pytest.raises(ControlError, match="state 0, action 0 leads to state 7; states are 0 to 0"):
        TabularMDP(successors=np.full((1, 1, 1), 7), probabilities=ones, rewards=ones, discount=0.5)
    with pytest.raises(ControlError, match="successors is of type float64"):
        TabularMDP(successors=ones, probabilities=ones, rewards=ones, discount=0.5)


@pytest.mark.parametrize("name", ["FrozenLake-v1", "CliffWalking-v1", "Taxi-v4"])
def test_the_model_is_that_of_gymnasium(name: str) -> None:
    env = gymnasium.make(name)
    mdp, model = from_gymnasium(env, discount=0.9), env.unwrapped.P  # type: ignore[attr-defined]
    dense, rewards = mdp.dense(), mdp.expected_rewards()
    for state in model:
        if mdp.terminal[state]:
            continue
        for action, outcomes in model[state].items():
            row = np.zeros(mdp.num_states)
            for probability, to, _, _ in outcomes:
                row[int(to)] += probability
            moved = dense[state, action].copy()
            if mdp.num_states > len(model):  # what ends in a state that is also passed through has a double
                ends = [int(to) for p, to, _, end in outcomes if end and not mdp.terminal[int(to)]]
                assert moved[-1] == pytest.approx(sum(row[to] for to in set(ends)))
                for to in set(ends):
                    row[to] = 0.0
                moved[-1] = 0.0
            np.testing.assert_allclose(moved, row, atol=1e-12)
            assert rewards[state, action] == pytest.approx(sum(p * r for p, _, r, _ in outcomes))


def test_what_gymnasium_lacks_is_told() -> None:
    with pytest.raises(ControlError, match=r"CartPole-v1 publishes no model.*use GymnasiumSource"):
        from_gymnasium(gymnasium.make("CartPole-v1"))
    with pytest.raises(ControlError, match="'Nowhere-v1' cannot be made"):
        from_gymnasium("Nowhere-v1")


class Published:
    """A model in Gymnasium's form: start in 0, an end in 1 that is passed through too, and 2 after it."""

    P = {  # noqa: RUF012
        0: {0: [(0.5, 1, 1.0, True), (0.5, 1, 0.0, False)], 1: [(1.0, 2, 0.0, True)]},
        1: {0: [(1.0, 2, 4.0, False)], 1: [(1.0, 0, 0.0, False)]},
        2: {0: [(0.5, 2, 0.0, True), (0.5, 0, 2.0, True)], 1: [(1.0, 2, 0.0, True)]},
    }
    initial_state_distrib = np.array([1.0, 0.0, 0.0])


def test_what_is_passed_through_leads_on() -> None:
    """State 2 is entered without an end from 1 alone, which is itself a state that episodes also end in."""
    prior = np.tile([1.0, 0.0], (3, 1))
    mdp = from_gymnasium(Published(), discount=1.0, prior=prior)
    assert mdp.terminal.tolist() == [False, False, False, True]
    # .5·1 for the end, else 4 for going on and half of 2 after that
    assert float(soft_value_iteration(mdp, 0.0).objective) == pytest.approx(0.5 + 0.5 * (4 + 1))
    with pytest.raises(ControlError, match=r"prior has shape \(2,\)"):
        from_gymnasium(Published(), prior=np.ones(2))


def test_a_long_chain_is_checked_in_one_search(unchecked: None) -> None:
    """Step by step, looking for the end would take as many rounds as the chain is long, 50 s here."""
    states = 20_000
    row = np.arange(states)
    options = {"probabilities": np.ones((states, 1, 1)), "rewards": np.zeros((states, 1, 1))}
    onward = np.minimum(row + 1, states - 1)[:, None, None]
    assert TabularMDP(successors=onward, terminal=row == states - 1, **options).num_states == states
    with pytest.raises(ControlError, match="from state 5 the prior never reaches"):
        TabularMDP(successors=onward, terminal=row == 4, **options)


def test_dense_tables_come_back() -> None:
    rng = np.random.default_rng(0)
    table = rng.dirichlet(np.full(5, 0.3), (5, 2)) * (rng.random((5, 2, 5)) < 0.7)
    table[..., 0] += 1 - table.sum(-1)
    mdp = TabularMDP.from_dense(table, rng.normal(size=(5, 2)), discount=0.5)
    np.testing.assert_allclose(mdp.dense(), table, atol=1e-15)
    np.testing.assert_allclose(mdp.transitions().toarray().reshape(table.shape), table, atol=1e-15)
    walled = grid_world(["S#G", "..."], discount=0.9)
    np.testing.assert_allclose(walled.dense().sum(-1), 1.0)

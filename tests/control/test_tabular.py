"""Tables of finite problems: what they refuse, and what Gymnasium's own model says."""

from typing import Any

import gymnasium
import numpy as np
import pytest

from bayesrl.control import TabularMDP, classic, deep_sea, evaluate_policy, from_gymnasium, grid_world, n_chain
from bayesrl.control.planning import soft_value_iteration
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
    ({"discount": 1.5}, r"discount=1.5 is outside \[0, 1\]"),
    ({"discount": -0.1}, r"discount=-0.1 is outside \[0, 1\]"),
    ({"discount": 1.0}, "discount 1 without a horizon, and from state 0 the prior never reaches"),
    ({"horizon": 0}, "horizon=0; use an integer of at least 1"),
    ({"horizon": 2.5}, "horizon=2.5"),
    ({"prior": np.array([[0.5, 0.5], [0.5, 0.6]])}, "the prior of state 1 sums to 1.1"),
    ({"start": np.array([0.5, 0.4])}, "start sums to 0.9"),
    ({"start": np.ones(3) / 3}, r"start has shape \(3,\)"),
    ({"action_names": ("left",)}, "has 1 names; use 2"),
    ({"layout": (3, 3)}, "more cells than the 2 states"),
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
    with pytest.raises(ControlError, match="'Nowhere-v1' is unknown to Gymnasium"):
        from_gymnasium("Nowhere-v1")


def test_deep_sea_pays_on_one_path_alone() -> None:
    sea = deep_sea(size=5)
    assert float(soft_value_iteration(sea, 0.0).objective) == pytest.approx(1 - 0.01)
    assert float(evaluate_policy(sea, sea.prior).reward) == pytest.approx(0.5**5 - 0.005 / 1)


def test_the_chain_by_hand() -> None:
    """Two states, no slip, two steps from the start: back twice pays 4; forward twice pays 10."""
    chain = n_chain(num_states=2, slip=0.0, horizon=2)
    assert float(soft_value_iteration(chain, 0.0).objective) == pytest.approx(10.0)
    assert float(evaluate_policy(chain, chain.prior).reward) == pytest.approx(1 + 0.25 * 10 + 0.5 * 2 + 0.0 - 0.5 * 0)


def test_grid_world_by_hand() -> None:
    world = grid_world(["S.G", "#H."], slip=0.2, step_reward=-0.1, goal_reward=2.0, hole_reward=-1.0, discount=0.9)
    right = 1
    np.testing.assert_allclose(world.dense()[1, right], [0, 0.1, 0.8, 0, 0.1, 0])
    assert world.expected_rewards()[1, right] == pytest.approx(-0.1 + 0.8 * 2 - 0.1 * 1)
    assert world.terminal.tolist() == [False, False, True, True, True, False]
    assert world.layout == (2, 3)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: grid_world([]), "one length"),
        (lambda: grid_world(["S.", "G"]), r"one length; got \[2, 1\]"),
        (lambda: grid_world(["SxG"]), "the map holds 'x'"),
        (lambda: grid_world(["..G"]), "no start"),
        (lambda: grid_world(["SG"], slip=2), r"slip=2; use a probability"),
        (lambda: classic("maze"), "no classic 'maze'; choose from deep_sea"),
        (lambda: deep_sea(size=1), "size=1; use an integer of at least 2"),
        (lambda: classic("river_swim", num_states=0), "num_states=0"),
    ],
)
def test_classics_check_their_options(make: Any, message: str) -> None:
    with pytest.raises(ControlError, match=message):
        make()

"""Classic finite problems: what they pay, by hand, and what they refuse."""

from typing import Any

import numpy as np
import pytest

from bayesrl.control import deep_sea, evaluate_policy, grid_world, soft_value_iteration
from bayesrl.control.environments.tabular_examples import mdp_from_name, n_chain
from bayesrl.errors import ControlError


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
        (lambda: grid_world("S.G"), "rows='S.G'; use a list of texts"),
        (lambda: grid_world(["S.", "G"]), r"one length; got \[2, 1\]"),
        (lambda: grid_world(["SxG"]), "the map holds 'x'"),
        (lambda: grid_world(["..G"]), "no start"),
        (lambda: grid_world([["S", "G"]]), "rows=.*; use a list of which each is a text"),  # type: ignore[list-item]
        (lambda: grid_world(None), "rows=None; use a list of texts"),  # type: ignore[arg-type]
        (lambda: grid_world(["SG"], slip=2), "slip=2; use a number from 0 to 1"),
        (lambda: mdp_from_name("maze"), "no tabular example 'maze'; choose from deep_sea"),
        (lambda: deep_sea(size=1), "size=1; use a whole number of at least 2"),
        (lambda: mdp_from_name("river_swim", num_states=0), "num_states=0"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_classics_check_their_options(make: Any, message: str) -> None:
    with pytest.raises(ControlError, match=message):
        make()

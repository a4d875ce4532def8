"""Pictures and sections of control: they are made, say what they show, and refuse what has no map."""

import jax
import numpy as np
import pytest

import bayesrl
from bayesrl import control
from bayesrl.control.figures import episode_strip, policy_map, return_curve
from bayesrl.errors import ControlError


@pytest.fixture(scope="module")
def swim() -> bayesrl.Posterior:
    problem = bayesrl.load_problem("river_swim", steps=5)
    return bayesrl.fit(jax.random.key(0), problem.policy, beta=problem.beta, progress=False, **problem.fit_options)


def test_sections_of_a_tabular_fit(swim: bayesrl.Posterior) -> None:
    found = bayesrl.load_problem("river_swim").sections_of(jax.random.key(0), swim)
    assert [part.title for part in found] == [
        "The policy on the map, β = 0.1",
        "Where it goes, β = 0.1",
        "Beside the exact optimum",
    ]
    assert all("Good" in part.caption or "exact" in part.caption for part in found)
    rows = {row[0]: row[1:] for row in found[-1].body[1:]}
    exact = control.soft_value_iteration(control.river_swim(), 0.1)
    assert float(rows["exact optimum"][0]) == pytest.approx(float(exact.objective), rel=5e-4)
    assert float(rows["prior"][2]) == 0
    arrows = found[0].body.axes[0].texts
    assert len(arrows) >= 6, "an arrow for what is likely in every cell"


def test_maps_need_a_layout() -> None:
    taxi = control.from_gymnasium("Taxi-v4")
    plan = control.evaluate_policy(taxi, taxi.prior)
    with pytest.raises(ControlError, match="Taxi-v4 has no layout"):
        policy_map(taxi, plan, plan)


def test_returns_are_drawn_with_their_range(swim: bayesrl.Posterior) -> None:
    axis = return_curve(swim).axes[0]
    np.testing.assert_allclose(axis.lines[0].get_ydata(), np.asarray(swim.history["metrics/return"])[:, 0])
    with pytest.raises(ControlError, match="no metric 'regret'; it has"):
        return_curve(swim, "regret")


def test_an_episode_is_a_strip_of_frames() -> None:
    fitted = bayesrl.fit(
        jax.random.key(0),
        control.Rollout(control.CartPole(), 5),
        beta=1.0,
        guide=control.LinearPolicy(),
        num_steps=1,
        progress=False,
    )
    figure = episode_strip(jax.random.key(0), "CartPole-v1", fitted, frames=3)
    assert len(figure.axes) == 3
    assert figure.axes[0].get_title() == "step 0"
    picture = figure.axes[0].images[0].get_array()
    assert picture is not None
    assert picture.std() > 1, "something is drawn"

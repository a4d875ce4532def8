"""Logged data: estimates against known values, their intervals' coverage, fits, and refusals."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest

import bayesrl
from bayesrl import control
from bayesrl.control import LoggedData, LoggedEnvironment, evaluate_off_policy
from bayesrl.control.environments.tabular_rollout import action_probs
from bayesrl.control.learning.adapters import adapt_environment
from bayesrl.errors import ControlError

MEANS = np.array([[0.2, 0.8, 0.5], [0.9, 0.1, 0.4]])
BEHAVIOUR = np.array([[0.6, 0.1, 0.3], [0.2, 0.5, 0.3]])
TARGET = np.array([[0.1, 0.8, 0.1], [0.7, 0.1, 0.2]])
TRUTH = float((0.5 * TARGET * MEANS).sum())


def logs(num: int, seed: int) -> LoggedData:
    rng = np.random.default_rng(seed)
    seen = rng.integers(2, size=num)
    action = np.array([rng.choice(3, p=BEHAVIOUR[s]) for s in seen])
    reward = (rng.random(num) < MEANS[seen, action]).astype(float)
    return LoggedData(seen, action, reward, BEHAVIOUR[seen, action], 3)


@pytest.mark.parametrize("method", ["ips", "snips", "dr"])
def test_estimates_are_right_and_their_intervals_cover(method: Any) -> None:
    """300 logs of 400 rows: the mean within 4.5 standard errors; 95% intervals cover in 91–98.5% (±3.2 errors of 1.26%)."""
    found = [
        evaluate_off_policy(data, TARGET[data.observation], method=method)
        for data in (logs(400, k) for k in range(300))
    ]
    means = np.array([one.mean for one in found])
    assert abs(means.mean() - TRUTH) < 4.5 * means.std() / 300**0.5 + (1e-3 if method == "snips" else 0)
    assert 0.91 <= np.mean([one.lower <= TRUTH <= one.upper for one in found]) <= 0.985
    np.testing.assert_allclose(np.mean([one.se for one in found]), means.std(), rtol=0.15)


def test_what_is_known_narrows_the_estimate() -> None:
    data = logs(2000, 7)
    by = {m: evaluate_off_policy(data, TARGET[data.observation], method=m).se for m in ("ips", "snips", "dr")}
    exact = evaluate_off_policy(data, TARGET[data.observation], values=MEANS[data.observation]).se
    assert by["dr"] < by["ips"]
    assert exact < by["ips"]
    wrong = evaluate_off_policy(data, TARGET[data.observation], values=np.full((2000, 3), 5.0))
    assert abs(wrong.mean - TRUTH) < 4.5 * wrong.se


@pytest.mark.parametrize("method", ["ips", "snips", "dr"])
def test_episodes_of_several_steps(method: Any) -> None:
    """Against exact evaluation, within 4.5 standard errors: 6,000 episodes of a river, logged by uniform play."""
    mdp = control.river_swim(num_states=4, horizon=5)
    world = adapt_environment(mdp)
    rng = np.random.default_rng(0)
    shape = (6000, 5)
    seen, action, reward = np.zeros(shape, int), np.zeros(shape, int), np.zeros(shape)
    for k in range(shape[0]):
        world._rng, world._state = rng, 0  # type: ignore[attr-defined]
        state = 0
        for t in range(5):
            chosen = int(rng.integers(2))
            seen[k, t], action[k, t] = state, chosen
            state, reward[k, t] = (int(x) if i == 0 else x for i, x in enumerate(world.step(chosen)[:2]))
    policy = np.tile([0.2, 0.8], (4, 1))
    truth = float(control.evaluate_policy(mdp, policy).reward)
    data = LoggedData(seen, action, reward, np.full(shape, 0.5))
    found = evaluate_off_policy(data, policy[seen], method=method)
    assert abs(found.mean - truth) < 4.5 * found.se
    assert found.ess < 6000


def test_a_policy_is_fitted_to_logs() -> None:
    """At low temperature it takes the best action of each context; its estimate is near the exact optimum."""
    data = logs(4000, 3)
    program = control.Rollout(LoggedEnvironment(data), 1)
    found = bayesrl.fit(
        jax.random.key(0),
        program,
        beta=0.05,
        guide=control.TablePolicy(),
        objective=control.ActorCritic(trace=1.0),
        num_steps=600,
        progress=False,
    )
    probs = action_probs(found)
    assert probs is not None
    assert probs[0].argmax(-1).tolist() == [1, 0]
    worth = evaluate_off_policy(logs(4000, 4), probs[0][logs(4000, 4).observation])
    best = float(0.5 * MEANS.max(-1).sum())
    assert worth.lower < best < worth.upper + 0.05


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"propensity": None}, "propensity is None"),
        ({"propensity": [0.5, 0.0]}, "propensity of row 1 is 0.0"),
        ({"propensity": [0.5, np.nan]}, "propensity of row 1 is nan"),
        ({"propensity": [0.5, 1.5]}, "propensity of row 1 is 1.5"),
        ({"propensity": [0.5]}, "propensity has shape"),
        ({"action": [0.0, 1.0]}, "use integers"),
        ({"action": [0, -1]}, "action of row 1 is -1"),
        ({"reward": [0.0, np.inf]}, "reward of row 1 is inf"),
        ({"num_actions": 0}, "num_actions=0"),
        ({"discount": 2.0}, "discount=2.0"),
    ],
)
def test_bad_logs_are_refused(change: dict[str, Any], told: str) -> None:
    given: dict[str, Any] = {"observation": [0, 1], "action": [0, 1], "reward": [0.0, 1.0], "propensity": [0.5, 0.5]}
    with pytest.raises(ControlError, match=told):
        LoggedData(**{**given, **change})


DATA = LoggedData([0, 1], [0, 1], [0.0, 1.0], [0.5, 0.5])
EPISODES = LoggedData([[0, 1]], [[0, 1]], [[0.0, 1.0]], [[0.5, 0.5]])


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("call", "told"),
    [
        (lambda: evaluate_off_policy(DATA, np.ones((2, 2))), "not a distribution"),
        (lambda: evaluate_off_policy(DATA, np.ones((3, 2)) / 2), "probs has shape"),
        (lambda: evaluate_off_policy(DATA, np.ones((2, 2)) / 2, method="dm"), "method='dm'"),
        (lambda: evaluate_off_policy(DATA, np.ones((2, 2)) / 2, level=1.0), "level=1.0"),
        (
            lambda: evaluate_off_policy(DATA, np.ones((2, 2)) / 2, values=np.full((2, 2), np.nan)),
            "values=an array of shape .*; use a finite number",
        ),
        (
            lambda: evaluate_off_policy(DATA, np.array([[0.0, 1.0], [1.0, 0.0]]), method="snips"),
            "no row follows the policy up to step 0",
        ),
        (lambda: LoggedEnvironment(EPISODES), "are episodes of 2 steps"),
        (lambda: LoggedData([-1, 1], [0, 1], [0.0, 1.0], [0.5, 0.5]), "from 0 on"),
        (lambda: LoggedData([np.nan, 1.0], [0, 1], [0.0, 1.0], [0.5, 0.5]), "not finite"),
    ],
)
def test_bad_questions_are_refused(call: Callable[[], Any], told: str) -> None:
    with pytest.raises(ControlError, match=told):
        call()

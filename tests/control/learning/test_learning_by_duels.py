"""`learn` by comparisons: the posterior against `infer`, and questions that pay against random ones."""

from typing import Any

import jax
import numpy as np
import pytest

from bayesrl import control, preferences
from bayesrl.errors import ControlError


def _asked(scores: Any, rule: Any, seed: int = 0, *, num_episodes: int = 30, **options: Any) -> control.LearnResult:
    agent = control.BayesianAgent(control.DuelsModel(len(scores), scale=2.0), num_samples=128)
    return control.learn(
        jax.random.key(seed),
        control.Duels(scores),
        agent,
        exploration=rule,
        num_episodes=num_episodes,
        progress=False,
        **options,
    )


def test_the_posterior_is_that_of_infer() -> None:
    result = _asked([0.0, 1.0, 2.0], control.random())
    rows = result.bayesian_state().memory.arrays()
    answered = rows["observation"] > 0
    first, second, won = rows["observation"][answered] - 1, rows["action"][answered], rows["reward"][answered]
    assert (first != second).all()
    data = preferences.PreferenceData.of_pairs(first, second, won, num_items=3)
    exact = preferences.infer(jax.random.key(0), preferences.bradley_terry(data, scale=2.0), num_samples=2)
    mode, factor = result.bayesian_state().state
    np.testing.assert_allclose(mode, exact.mean.mean, atol=2e-4)
    np.testing.assert_allclose(np.linalg.inv(factor @ factor.T), exact.covariance, rtol=2e-3, atol=1e-4)
    assert [check.outcome for check in control.check_learning(jax.random.key(1), result)][-1] == "pass"


def test_good_questions_cost_less_than_random_ones() -> None:
    """The same people, paired; P(the best item) is noisier, and measured by `benchmarks active_preferences`."""
    people = np.random.default_rng(1).normal(0, 1.5, (4, 10))
    random = [_asked(scores, control.random(), seed) for seed, scores in enumerate(people)]
    for rule in (control.most_informative(), control.double_thompson()):
        found = [_asked(scores, rule, seed) for seed, scores in enumerate(people)]
        saved = [b.regret[-1] - a.regret[-1] for a, b in zip(found, random, strict=True)]
        assert np.mean(saved) > 3 * np.std(saved, ddof=1) / len(saved) ** 0.5, saved


def test_an_oracle_is_asked_until_sure() -> None:
    asked: list[tuple[int, int]] = []

    def person(first: int, second: int) -> bool:
        asked.append((first, second))
        return first > second

    agent = control.BayesianAgent(control.DuelsModel(3, features=[[0.0], [1.0], [3.0]], scale=3.0), num_samples=128)
    env = control.Duels(person, names=["bad", "fair", "good"])
    rule = control.most_informative()
    result = control.learn(
        jax.random.key(0), env, agent, exploration=rule, num_episodes=60, confidence=0.95, progress=False
    )
    assert len(asked) == result.num_episodes < 60
    assert result.action_name(int(result.decide(jax.random.key(1), 0).p_optimal.argmax())) == "good"
    assert np.isnan(result.history["regret"]).all()
    assert "an answer pays nothing" in str(result)


def test_what_cannot_be_asked_is_refused() -> None:
    for wrong, options in ((lambda i, j: 1, {}), ([1.0], {}), ([0.0, 1.0], {"num_items": 3}), ([[0.0, 1.0]], {})):
        with pytest.raises(ControlError, match="how many items"):
            control.Duels(wrong, **options)
    with pytest.raises(ControlError, match="one row for each"):
        control.DuelsModel(3, features=np.ones((2, 1)))
    agent = control.BayesianAgent(control.DuelsModel(3))
    for answer, what in ((0.5, "said 0.5"), ("yes", "said 'yes'"), (None, "said None")):
        with pytest.raises(ControlError, match=what):
            control.learn(
                jax.random.key(0),
                control.Duels(lambda i, j, answer=answer: answer, num_items=3),
                agent,
                num_episodes=1,
                progress=False,
            )
    with pytest.raises(ControlError, match="make both the same"):
        control.learn(jax.random.key(0), control.Duels([0.0, 1.0]), agent, num_episodes=1)

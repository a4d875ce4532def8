"""Pairs worth asking: information by enumeration of answers over a grid, and what it gains over random questions."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bayesrl import control, preferences
from bayesrl.control.exploration.beliefs import NormalBelief, SampleBelief
from bayesrl.control.exploration.duels import best_of_draws, information_of_pairs
from bayesrl.errors import ControlError
from bayesrl.preferences.outcome_information import outcome_information

PAIRS = ((0, 1), (0, 2), (1, 2))
WINS = {(0, 1): (7, 3), (1, 2): (6, 4), (0, 2): (9, 1)}


def _data() -> preferences.PreferenceData:
    rows = [(i, j, won) for (i, j), (w, lost) in WINS.items() for won in [1] * w + [0] * lost]
    first, second, outcome = zip(*rows, strict=True)
    return preferences.PreferenceData.of_pairs(first, second, outcome)


@pytest.fixture(scope="module")
def grid() -> tuple[np.ndarray, np.ndarray]:
    """Scores of three items on a grid, [n, 3], and their posterior weights after the wins."""
    axis = np.linspace(-4, 4, 61)
    theta = np.stack(np.meshgrid(axis, axis, axis, indexing="ij"), -1).reshape(-1, 3)
    log_p = -0.5 * (theta**2).sum(1)
    for (i, j), (wins, losses) in WINS.items():
        d = theta[:, i] - theta[:, j]
        log_p -= wins * np.log1p(np.exp(-d)) + losses * np.log1p(np.exp(d))
    weights = np.exp(log_p - log_p.max())
    return theta, weights / weights.sum()


def _given(model: Any, **draws: np.ndarray) -> preferences.RewardPosterior:
    """A posterior of these draws, without inference, which has tests of its own."""
    return preferences.RewardPosterior(model, "given", draws, None, None, None)


@pytest.fixture(scope="module")
def posterior(grid: tuple[np.ndarray, np.ndarray]) -> preferences.RewardPosterior:
    theta, weights = grid
    draws = np.random.default_rng(0).choice(theta, 4000, p=weights)
    return _given(preferences.bradley_terry(_data()), score=draws)


def _entropy(p: np.ndarray) -> float:
    p = p[p > 0]
    return float(-(p * np.log(p)).sum())


def _by_bayes(theta: np.ndarray, weights: np.ndarray, i: int, j: int, labels: np.ndarray) -> float:
    """H(label) − Σ_y P(y)·H(label | y), with the posterior after each answer worked out."""
    win = 1 / (1 + np.exp(theta[:, j] - theta[:, i]))
    before = _entropy(np.bincount(labels, weights))
    after = 0.0
    for p in (win, 1 - win):
        mass = float(weights @ p)
        after += mass * _entropy(np.bincount(labels, weights * p / mass))
    return before - after


@pytest.mark.parametrize(("i", "j"), PAIRS)
def test_information_is_what_the_answer_takes_off_the_entropy(
    grid: tuple[np.ndarray, np.ndarray], i: int, j: int
) -> None:
    theta, weights = grid
    win = 1 / (1 + np.exp(theta[:, j] - theta[:, i]))
    probs = np.stack([win, 1 - win], -1)
    best = outcome_information(probs, best_of_draws(theta), weights)
    assert best == pytest.approx(_by_bayes(theta, weights, i, j, theta.argmax(1)), rel=1e-9)
    scores = outcome_information(probs, weights=weights)
    assert scores == pytest.approx(_by_bayes(theta, weights, i, j, np.arange(len(theta))), rel=1e-9)
    assert 0 < best < scores


def test_pairs_to_ask_agree_with_the_grid(
    grid: tuple[np.ndarray, np.ndarray], posterior: preferences.RewardPosterior
) -> None:
    """4,000 draws; their standard error of these small numbers, by 40 batches."""
    theta, weights = grid
    asked = control.pairs_to_ask(jax.random.key(0), posterior)
    assert len(asked) == 3
    assert (np.diff(asked.about_best) <= 0).all()
    for pair, p, best, scores in zip(asked.pairs, asked.p_first, asked.about_best, asked.about_scores, strict=True):
        i, j = pair
        exact = _by_bayes(theta, weights, i, j, theta.argmax(1)), _by_bayes(theta, weights, i, j, np.arange(len(theta)))
        batches = np.stack(
            [
                [np.asarray(information_of_pairs(part, about))[i, j] for about in ("best", "scores")]
                for part in posterior.scores.reshape(40, 100, 3)
            ]
        )
        se = batches.std(0, ddof=1) / 40**0.5
        assert abs(best - exact[0]) < 4.5 * se[0]
        assert abs(scores - exact[1]) < 4.5 * se[1]
        win = 1 / (1 + np.exp(theta[:, j] - theta[:, i]))
        assert p == pytest.approx(weights @ win, abs=0.02)
    assert "tells of the best" in str(asked)


def test_ties_tell_too() -> None:
    data = preferences.PreferenceData.of_pairs([0, 1, 0, 0], [1, 2, 2, 1], [1, 0.5, 1, 0.5])
    rng = np.random.default_rng(0)
    model = preferences.bradley_terry(data, ties="davidson")
    posterior = _given(model, score=rng.normal(size=(200, 3)), tie=rng.normal(size=200))
    asked = control.pairs_to_ask(jax.random.key(1), posterior, pairs=[[0, 1]])
    assert asked.pairs.tolist() == [[0, 1]]
    assert 0 < asked.about_best[0] <= asked.about_scores[0]


def test_rules_of_bandits_name_pairs(posterior: preferences.RewardPosterior) -> None:
    for rule in (control.double_thompson(), control.random(), control.most_informative("scores")):
        asked = control.pairs_to_ask(jax.random.key(2), posterior, exploration=rule, num_pairs=2)
        assert len({tuple(sorted(pair)) for pair in asked.pairs.tolist()}) == 2
    # The greedy rule has but one pair to name.
    one = control.pairs_to_ask(jax.random.key(2), posterior, exploration=control.greedy(), num_pairs=1)
    assert one.pairs.tolist() == [[0, 1]]
    with pytest.raises(ControlError, match="1 different pairs"):
        control.pairs_to_ask(jax.random.key(2), posterior, exploration=control.greedy(), num_pairs=2)


def test_items_of_different_prompts_are_not_compared() -> None:
    rows = [
        {"prompt": prompt, "chosen": f"{prompt} good", "rejected": f"{prompt} {bad}"} for prompt in "ab" for bad in "xy"
    ]
    draws = np.random.default_rng(0).normal(size=(100, 6))
    posterior = _given(preferences.bradley_terry(preferences.read(rows)), score=draws)
    asked = control.pairs_to_ask(jax.random.key(1), posterior)
    assert len(asked) == 6  # three answers to each of two prompts
    assert all(first[0] == second[0] for first, second in asked.names)
    with pytest.raises(ControlError, match="two prompts"):
        control.pairs_to_ask(jax.random.key(1), posterior, pairs=[[0, 3]])


@pytest.mark.parametrize("pairs", [[[0, 0]], [[0, 3]], [[0.5, 1]], [0, 1], [[-1, 0]]])
def test_strange_pairs_are_refused(posterior: preferences.RewardPosterior, pairs: list[object]) -> None:
    with pytest.raises(ControlError, match="two different items"):
        control.pairs_to_ask(jax.random.key(1), posterior, pairs=pairs)


def test_the_rule_needs_draws_of_two_items() -> None:
    rule = control.most_informative()
    with pytest.raises(ControlError, match="Duels"):
        rule(jax.random.key(0), NormalBelief(jnp.zeros(3), jnp.ones(3)), 0)
    draws = jnp.asarray(np.random.default_rng(0).normal([2.0, 1.8, -2.0], 0.5, (500, 3)), jnp.float32)
    first = int(rule(jax.random.key(0), SampleBelief(draws, None, jnp.ones(3, bool)), 0))
    assert first in (0, 1)
    second = int(rule(jax.random.key(0), SampleBelief(draws, None, jnp.arange(3) != first), 0))
    assert {first, second} == {0, 1}

"""Exploration on bandits against known regrets, and optimal play against known values."""

import itertools
import re
from collections.abc import Callable
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bayesrl import control
from bayesrl.control.bandits import (
    BernoulliArms,
    GaussianArms,
    LinearArms,
    LogisticArms,
    bayes_optimal_regret,
    gittins_index,
    play_bandit,
)
from bayesrl.control.bandits.simulation import BanditRuns
from bayesrl.control.exploration.beliefs import BetaBelief, NormalBelief
from bayesrl.control.exploration.decisions import best_action_probabilities
from bayesrl.errors import ControlError

KEY = jax.random.key(0)


def regret(exploration: Any, bandit: Any = None, *, num_steps: int = 100, num_runs: int = 4000) -> tuple[float, float]:
    runs = play_bandit(KEY, bandit or BernoulliArms(2), exploration, num_steps=num_steps, num_runs=num_runs)
    return float(runs.mean[-1]), float(runs.se[-1])


def arms_of(rule: Any, belief: Any) -> np.ndarray:
    """The arms that a rule takes, by one program and not by one for each operation."""
    return np.asarray(jax.jit(lambda belief: rule(KEY, belief, jnp.asarray(0)))(belief))


@cache
def thompson() -> BanditRuns:
    """4,000 runs of Thompson's rule with two arms, of 100 steps, of which the first 50 are runs too."""
    return play_bandit(KEY, BernoulliArms(2), control.thompson(), num_steps=100, num_runs=4000)


def test_thompson_has_the_known_bayes_regret() -> None:
    """2.782 ± .005 for two arms and 100 steps: within 4 standard errors, 1 false alarm in 15,000 keys."""
    mean, se = float(thompson().mean[-1]), float(thompson().se[-1])
    assert abs(mean - 2.782) < 4 * np.hypot(se, 0.005)


def test_random_play_has_a_closed_form() -> None:
    """E[max] − E[mean] = 2/3 − 1/2 a step; epsilon-greedy with ε = 1 is the same."""
    for rule in (control.random(), control.epsilon_greedy(1.0)):
        mean, se = regret(rule)
        assert abs(mean - 100 / 6) < 4.5 * se


def test_no_rule_beats_optimal_play() -> None:
    """Two arms, 50 steps: 1.336621 is the least; a rule that were better by chance needs 4 standard errors."""
    rules = [control.bayes_ucb(), control.k_learning(), control.greedy(), control.boltzmann(0.1)]
    least = bayes_optimal_regret(50)
    found = [(float(thompson().mean[49]), float(thompson().se[49]))]
    found += [regret(rule, num_steps=50, num_runs=2000) for rule in rules]
    assert all(mean > least - 4 * se for mean, se in found)
    # And those that explore are not far from it: one step of random play loses .167.
    assert all(mean < 3 * least for mean, _ in found[:3])


@pytest.mark.parametrize("bandit", [GaussianArms(4), LinearArms(4), LogisticArms(4)], ids=lambda b: type(b).__name__)
def test_exploring_rules_learn(bandit: Any) -> None:
    """Regret of the second half is far below that of random play, and below that of the first half."""
    lazy = play_bandit(KEY, bandit, control.random(), num_steps=200, num_runs=300).mean
    for rule in (control.thompson(), control.bayes_ucb(), control.k_learning()):
        found = play_bandit(KEY, bandit, rule, num_steps=200, num_runs=300).mean
        assert found[-1] - found[99] < 0.8 * found[99]
        assert found[-1] < 0.5 * lazy[-1]


def test_thompson_takes_arms_as_often_as_they_are_optimal() -> None:
    belief = BetaBelief(*(np.tile(np.float32(x), (40_000, 1)) for x in ([3.0, 1.0, 5.0], [2.0, 1.0, 9.0])))
    taken = np.bincount(arms_of(control.thompson(), belief), minlength=3) / 40_000
    one = BetaBelief(belief.a[0], belief.b[0])
    optimal = np.asarray(best_action_probabilities(jax.random.key(1), one, num_samples=40_000).p_optimal)
    assert np.abs(taken - optimal).max() < 4.5 * np.sqrt(2 * 0.25 / 40_000)


def test_k_learning_takes_the_best_temperature() -> None:
    """The frequencies are those of the minimising τ, which is found on a grid here."""
    mean, variance = np.array([0.1, 0.4, 0.3]), np.array([0.5, 0.02, 0.1])
    grid = np.geomspace(0.01, 10, 200_001)[:, None]
    scores = mean / grid + variance / (2 * grid**2)
    top = scores.max(-1, keepdims=True)
    bound = grid[:, 0] * (top[:, 0] + np.log(np.exp(scores - top).sum(-1)))
    best = scores[bound.argmin()]
    probs = np.exp(best - best.max()) / np.exp(best - best.max()).sum()
    belief = NormalBelief(*(np.tile(np.asarray(x, np.float32), (100_000, 1)) for x in (mean, variance)))
    taken = np.bincount(arms_of(control.k_learning(), belief), minlength=3) / 100_000
    assert np.abs(taken - probs).max() < 4.5 * 0.5 / np.sqrt(100_000)


def test_greedy_breaks_ties_at_random_and_boltzmann_is_a_softmax() -> None:
    belief = NormalBelief(np.tile(np.float32([0.2, 0.2, 0.0]), (20_000, 1)), np.ones((20_000, 3), np.float32))
    taken = np.bincount(arms_of(control.greedy(), belief), minlength=3) / 20_000
    np.testing.assert_allclose(taken, [0.5, 0.5, 0.0], atol=4.5 * 0.5 / 20_000**0.5)
    taken = np.bincount(arms_of(control.boltzmann(0.1), belief), minlength=3) / 20_000
    soft = np.exp([2.0, 2.0, 0.0])
    np.testing.assert_allclose(taken, soft / soft.sum(), atol=4.5 * 0.5 / 20_000**0.5)


def test_decisions() -> None:
    belief = NormalBelief(jnp.array([1.0, 0.0]), jnp.array([1.0, 1.0]))
    found = best_action_probabilities(KEY, belief, num_samples=100_000)
    from scipy.stats import norm

    z = 1 / np.sqrt(2)
    assert abs(float(found.p_optimal[0]) - norm.cdf(z)) < 4.5 * 0.5 / 100_000**0.5
    loss = np.sqrt(2) * norm.pdf(z) - norm.cdf(-z)  # E[max(0, d)], d = Normal(−1, √2)
    assert abs(float(found.regret[0]) - loss) < 4.5 * 1.0 / 100_000**0.5
    assert float(found.interval[0, 0]) == 0.0
    assert abs(float(found.interval[0, 1]) - (np.sqrt(2) * norm.ppf(0.975) - 1)) < 0.05


@pytest.mark.parametrize(
    ("discount", "a", "b", "known"),
    [(0.9, 1, 1, 0.7029), (0.9, 2, 2, 0.6346), (0.9, 3, 3, 0.6010), (0.99, 1, 1, 0.8699)],
)
def test_gittins_indices(discount: float, a: int, b: int, known: float) -> None:
    assert abs(gittins_index(a, b, discount=discount) - known) < 5.1e-5


def test_an_arm_that_is_known_has_its_mean_as_index() -> None:
    assert gittins_index(7e6, 3e6, discount=0.9) == pytest.approx(0.7, abs=1e-4)
    assert gittins_index(2, 5, discount=0.0) == 2 / 7


@pytest.mark.parametrize(("horizon", "known"), [(10, 0.644881), (50, 1.336621), (100, 1.748246)])
def test_bayes_optimal_regret(horizon: int, known: float) -> None:
    assert abs(bayes_optimal_regret(horizon) - known) < 1e-6


def test_bayes_optimal_play_by_brute_force() -> None:
    """Three steps, Beta(2, 1): the best of all decision trees."""

    def best(counts: tuple[int, int, int, int], left: int) -> float:
        if left == 0:
            return 0.0
        options = []
        for arm in (0, 1):
            a, b = 2 + counts[2 * arm], 1 + counts[2 * arm + 1]
            won, lost = list(counts), list(counts)
            won[2 * arm] += 1
            lost[2 * arm + 1] += 1
            p = a / (a + b)
            options.append(p * (1 + best(tuple(won), left - 1)) + (1 - p) * best(tuple(lost), left - 1))  # type: ignore[arg-type]
        return max(options)

    most = 3 * (1 - 1 / 5)  # F(x) = x², so E[max] = 1 − ∫ x⁴
    assert bayes_optimal_regret(3, a=2, b=1) == pytest.approx(most - best((0, 0, 0, 0), 3), abs=1e-9)


def test_the_same_key_gives_the_same_runs_and_each_run_has_a_world() -> None:
    one, two = (play_bandit(KEY, BernoulliArms(3), control.thompson(), num_steps=20, num_runs=1500) for _ in range(2))
    np.testing.assert_array_equal(one.regret, two.regret)
    assert one.regret.shape == one.arms.shape == (1500, 20)
    assert len({tuple(row) for row in one.regret.round(6).tolist()}) > 1400
    assert (np.diff(one.regret, axis=1) >= 0).all()
    low, high = one.band(0.5)
    assert (low <= high).all()
    counted = np.asarray(one.posterior.a + one.posterior.b).sum(-1)
    np.testing.assert_allclose(counted, 6 + 20)


class Endless(GaussianArms):
    """Values that overflow."""

    def expected_rewards(self, worlds: Any, seen: Any) -> Any:
        return worlds * jnp.inf


ERRORS: list[tuple[Callable[[], Any], str]] = [
    (lambda: BernoulliArms(1), "num_arms=1"),
    (lambda: BernoulliArms(2, prior_a=0.5), "prior_a=0.5; use a number of at least 1"),
    (lambda: GaussianArms(2, noise=0.0), "noise=0.0"),
    (lambda: LinearArms(2, num_features=0), "num_features=0"),
    (lambda: control.epsilon_greedy(1.5), "epsilon_greedy got epsilon=1.5; use a number from 0 to 1"),
    (lambda: control.boltzmann(0.0), "boltzmann got temperature=0.0; use a number above 0"),
    (lambda: BernoulliArms(2, prior_a=np.inf), "prior_a=inf; use a number of at least 1"),
    (lambda: BernoulliArms(2, prior_b="1"), "prior_b='1'; use a number of at least 1"),  # type: ignore[arg-type]
    (lambda: GaussianArms(2, noise=np.ones(2)), "noise=an array of shape (2,) and type float64; use a number above 0"),  # type: ignore[arg-type]
    (lambda: GaussianArms(2, prior_scale=np.inf), "prior_scale=inf"),
    (lambda: GaussianArms(2, prior_mean=np.nan), "prior_mean=nan; use a finite number"),
    (lambda: control.epsilon_greedy(None), "epsilon=None"),  # type: ignore[arg-type]
    (lambda: control.boltzmann("1"), "temperature='1'"),  # type: ignore[arg-type]
    (lambda: best_action_probabilities(KEY, BetaBelief(jnp.array([0.2, 3.0]), jnp.ones(2))), "a and b of at least 1"),
    (lambda: best_action_probabilities(KEY, BetaBelief(jnp.array([0.5, 0.5]), jnp.ones(2))), "a and b of at least 1"),
    (lambda: best_action_probabilities(KEY, BetaBelief(jnp.array([jnp.nan, jnp.inf]), jnp.ones(2))), "are not finite"),
    (
        lambda: best_action_probabilities(KEY, NormalBelief(jnp.zeros(2), jnp.array([1.0, -1.0]))),
        "variances of at least 0",
    ),
    (lambda: best_action_probabilities(KEY, NormalBelief(jnp.zeros(3), jnp.ones(2))), "cannot be drawn from"),
    (lambda: best_action_probabilities(KEY, BetaBelief([3, 4], [5, 6])), "cannot be drawn from"),  # type: ignore[arg-type]
    (lambda: best_action_probabilities(KEY, NormalBelief(jnp.zeros(()), jnp.ones(()))), "is of a single value"),
    (lambda: best_action_probabilities(KEY, None), "belief=None; use a Belief"),  # type: ignore[arg-type]
    (
        lambda: play_bandit(KEY, BernoulliArms, control.thompson(), num_steps=1),
        "bandit=the class BernoulliArms, which is not called yet; use a Bandit",
    ),  # type: ignore[arg-type]
    (
        lambda: play_bandit(KEY, BernoulliArms(2), control.thompson, num_steps=1),
        "function thompson; use a rule: thompson()",
    ),  # type: ignore[arg-type]
    (lambda: play_bandit(KEY, BernoulliArms(2), lambda: None, num_steps=1), "the exploration rule failed: TypeError"),
    (lambda: play_bandit(KEY, BernoulliArms(2), lambda k, b, t: b.mean.argmax(0), num_steps=1), "for 1000 runs"),
    (lambda: play_bandit(KEY, Endless(2), control.thompson(), num_steps=1), "a value of Endless"),
    (lambda: play_bandit(KEY, BernoulliArms(2), control.random(), num_steps=1, num_runs=2).band(-0.5), "level=-0.5"),
    *(
        (
            lambda level=level: BanditRuns(np.zeros((2, 2)), np.zeros((2, 2)), None).band(level),
            "BanditRuns.band got level=",
        )
        for level in (True, np.nan, "0.9", None, KEY, [0.5])
    ),
    (lambda: gittins_index(0, 1, discount=0.9), "a=0"),
    (lambda: gittins_index(1, 1, discount=1.0), "discount=1.0; use a number from 0 to 0.999"),
    (lambda: bayes_optimal_regret(0), "horizon=0"),
    (lambda: best_action_probabilities(KEY, BetaBelief(jnp.ones(2), jnp.ones(2)), num_samples=0), "num_samples=0"),
    (lambda: play_bandit(KEY, BernoulliArms(2), control.thompson(), num_steps=0), "num_steps=0"),
    (lambda: play_bandit(KEY, BernoulliArms(2), control.thompson(), num_steps=1, num_runs=0), "num_runs=0"),
    (lambda: play_bandit(KEY, BernoulliArms(2), lambda k, b, t: b.mean, num_steps=1), "integers of shape"),
    (
        lambda: play_bandit(KEY, BernoulliArms(2), lambda k, b, t: jnp.full(len(b.mean), 5), num_steps=1),
        "action 5, and BernoulliArms has actions 0 to 1",
    ),
]


@pytest.mark.parametrize(("call", "message"), ERRORS, ids=[message for _, message in ERRORS])
@pytest.mark.usefixtures("unchecked")
def test_errors_name_the_value(call: Any, message: str) -> None:
    with pytest.raises(ControlError, match=re.escape(message)):
        call()


@pytest.mark.usefixtures("unchecked")
def test_a_seed_is_no_key() -> None:
    for call in (
        lambda: play_bandit(0, BernoulliArms(2), control.thompson(), num_steps=1),  # type: ignore[arg-type]
        lambda: best_action_probabilities(0, BetaBelief(jnp.ones(2), jnp.ones(2))),  # type: ignore[arg-type]
    ):
        with pytest.raises(ControlError, match="key=0; use a JAX random key"):
            call()


def test_rules_serve_one_belief_and_many() -> None:
    rules = [control.random(), control.greedy(), control.thompson(), control.bayes_ucb(), control.k_learning()]
    for rule, lead in itertools.product(rules, [(), (5,), (2, 3)]):
        belief = BetaBelief(np.full((*lead, 4), 2.0, np.float32), np.full((*lead, 4), 3.0, np.float32))
        chosen = jax.eval_shape(rule, KEY, belief, np.asarray(3))
        assert chosen.shape == lead
        assert jnp.issubdtype(chosen.dtype, jnp.integer)


def test_k_learning_is_greedy_where_nothing_is_unknown() -> None:
    """And takes all alike where they are known to be worth the same."""
    keys = jax.random.split(KEY, 200)

    @jax.jit
    def share(mean: jax.Array) -> jax.Array:
        belief = NormalBelief(mean, jnp.zeros(2))
        return jax.vmap(lambda key: control.k_learning()(key, belief, 0))(keys).mean()

    for mean, wanted in (([0.0, 1.0], 1.0), ([1000.0, 1000.0], 0.5), ([-1e-3, 0.0], 1.0)):
        assert float(share(np.float32(mean))) == pytest.approx(wanted, abs=4.5 * 0.5 / 200**0.5 if wanted == 0.5 else 0)

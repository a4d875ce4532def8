"""Rejection from the optimum under χ² against enumeration, published values and brute-force roots."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from scipy.optimize import brentq

import bayesrl
from bayesrl.errors import EngineError
from bayesrl.exact.weighted_draws import WeightedDraws
from bayesrl.monte_carlo.chi_squared_rejection import chi_squared_spans
from bayesrl.monte_carlo.rejection_sampling import rejection

KEY = jax.random.key(0)
BETAS = jnp.array([0.1, 0.3])


def bandit() -> None:
    arm = numpyro.sample("arm", dist.Categorical(logits=jnp.zeros(5)))
    bayesrl.reward("payoff", jnp.array([0.1, 0.3, 0.5, 0.7, 0.9])[arm])


@pytest.fixture(scope="module")
def found() -> WeightedDraws:
    return rejection(KEY, bandit, beta=BETAS, regularizer="chi_squared", num_samples=10_000)


def test_the_bandit(found: WeightedDraws) -> None:
    """J* .745 and .629167, and what enumeration tells, within 4.5 standard errors: 8 numbers, 6e-5 false alarms.

    The multiplier comes from 40,000 draws, which makes the temperature β·E[t] with a standard error of √(2·D/40,000)·β,
    where D = χ²/2; what that moves is counted beside the errors of the proposals.
    """
    exact = bayesrl.enumerate_posterior(bandit, beta=BETAS, regularizer="chi_squared")
    np.testing.assert_allclose(exact.optimum, [0.745, 0.629167], atol=1e-6)
    assert found.regularizer == "chi_squared"
    assert found.log_evidence is None
    assert found.optimum is not None
    error = found.estimates.objective.se
    assert (np.abs(found.optimum - [0.745, 0.629167]) < 4.5 * error).all()
    near = [
        bayesrl.enumerate_posterior(bandit, beta=BETAS * factor, regularizer="chi_squared").estimates
        for factor in (0.98, 1.02)
    ]
    assert exact.estimates.divergence is not None
    of_beta = np.sqrt(2 * exact.estimates.divergence.mean / 40_000)  # relative
    for name in ("reward", "kl", "divergence"):
        ours, truth = getattr(found.estimates, name), getattr(exact.estimates, name)
        slope = (getattr(near[1], name).mean - getattr(near[0], name).mean) / 0.04
        assert (ours.se > 0).all()
        assert (np.abs(ours.mean - truth.mean) < 4.5 * np.hypot(ours.se, slope * of_beta)).all(), name
    # A policy's own J lies below the dual, of the same proposals.
    assert (found.estimates.objective.mean <= found.optimum + 1e-9).all()


def test_draws_have_the_averages_that_are_told(found: WeightedDraws) -> None:
    """Draws and estimates are of one law: two means within 4.5 standard errors, 1e-5. Bad arms are never drawn."""
    arms = np.asarray(found.sites["arm"]).reshape(2, 10_000)
    assert arms[0].min() == 3
    assert arms[1].min() == 1
    rewards = 0.1 + 0.2 * arms
    assert found.estimates.reward.se.shape == (2,)
    error = np.hypot(rewards.std(1) / 100, found.estimates.reward.se)
    assert (np.abs(rewards.mean(1) - found.estimates.reward.mean) < 4.5 * error).all()
    assert "times the β asked for" in found.explanation


def test_the_multiplier_is_the_root() -> None:
    """Also with a reward of −∞, and where only the best draw is left."""
    rng = np.random.default_rng(0)
    excess, betas = -rng.exponential(size=(50, 3)), np.array([1e-3, 0.2, 5.0])
    excess[0, 0] = -np.inf
    spans = chi_squared_spans(excess, betas)
    for lane, beta in enumerate(betas):
        for c in range(3):
            r = excess[:, c]
            root = brentq(lambda x, r=r, beta=beta: np.maximum(0, 1 + (r - x) / beta).mean() - 1, -60 * beta - 20, 1)
            assert abs(spans[lane, c] - (beta - root)) < 1e-6 * max(1, beta)


def test_a_normal_in_contexts() -> None:
    """x ~ N(0, 1), R = −(x − m)²/2: q is known by quadrature; two means within 4.5 standard errors and 3% of β."""
    middles = np.array([0.0, 1.0])

    def target(middles: Any) -> None:
        with numpyro.plate("context", 2):
            x = numpyro.sample("x", dist.Normal(0.0, 1.0))
            bayesrl.reward("near", -0.5 * (x - middles) ** 2)

    result = rejection(KEY, target, middles, beta=0.5, regularizer="chi_squared", num_samples=8000)
    grid = np.linspace(-6, 6, 20_001)
    prior = np.exp(-(grid**2) / 2) / np.exp(-(grid**2) / 2).sum()
    drawn = np.asarray(result.sites["x"])
    assert drawn.shape == (8000, 2)
    for c, middle in enumerate(middles):
        reward = -0.5 * (grid - middle) ** 2

        def law(beta: float, reward: np.ndarray = reward) -> np.ndarray:
            root = brentq(lambda x: (prior * np.maximum(0, 1 + (reward - x) / beta)).sum() - 1, -20, 20)
            return np.asarray(prior * np.maximum(0, 1 + (reward - root) / beta))

        means = [float(law(beta) @ grid) for beta in (0.485, 0.515)]
        error = 4.5 * drawn[:, c].std() / np.sqrt(8000)
        assert min(means) - error < drawn[:, c].mean() < max(means) + error


def windy() -> None:
    wind = bayesrl.environment("wind", dist.Bernoulli(0.5), observable=True)
    bayesrl.reward("r", numpyro.sample("arm", dist.Bernoulli(0.5)) * 1.0 * wind)


def test_bad_input() -> None:
    with pytest.raises(EngineError, match="'wind'"):
        rejection(KEY, windy, beta=1.0, regularizer="chi_squared")
    for option in ({"tolerance": 0.1}, {"quasi": True, "reward_bound": 0.5}):
        with pytest.raises(EngineError, match=next(iter(option))):
            rejection(KEY, bandit, beta=1.0, regularizer="chi_squared", **option)
    with pytest.raises(EngineError, match=r"above reward_bound=0\.5"):
        rejection(KEY, bandit, beta=1.0, regularizer="chi_squared", reward_bound=0.5)


def test_a_context_without_a_possible_draw_is_told() -> None:
    def never() -> None:
        with numpyro.plate("n", 2) as n:
            bayesrl.reward("r", jnp.log(1.0 * n) * numpyro.sample("x", dist.Bernoulli(1.0)))

    with pytest.raises(EngineError, match=r"have reward -inf in 1 of 2 contexts, so no multiplier"):
        rejection(KEY, never, beta=1.0, regularizer="chi_squared", reward_bound=0.0)

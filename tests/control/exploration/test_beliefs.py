"""Beliefs: draws, quantiles and bounds against SciPy, and against the exact posterior."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
import scipy.stats

from bayesrl.control.bandits import GaussianArms, LinearArms, LogisticArms
from bayesrl.control.exploration.beliefs import (
    Belief,
    BetaBelief,
    LinearBelief,
    LogisticBelief,
    NormalBelief,
    sample_gamma,
)

NUM = 100_000
gammas = jax.jit(sample_gamma)


@pytest.mark.parametrize("shape", [1.0, 1.5, 7.0, 400.0])
def test_gammas_have_their_distribution(shape: float) -> None:
    """Kolmogorov–Smirnov at p > 1e-4: with four shapes a false alarm in 2,500 keys; the key is fixed."""
    found = np.asarray(gammas(jax.random.key(3), np.full(NUM, shape, np.float32)), float)
    assert scipy.stats.kstest(found, scipy.stats.gamma(shape).cdf).pvalue > 1e-4


def test_gammas_of_many_shapes_keep_their_places() -> None:
    shapes = np.array([[1.0, 50.0], [3.0, 900.0]], np.float32)
    found = np.asarray(gammas(jax.random.key(4), np.broadcast_to(shapes, (20_000, 2, 2))), float)
    se = np.sqrt(shapes / 20_000)
    assert np.abs((found.mean(0) - shapes) / se).max() < 4.5
    lag = np.corrcoef(found[:-1, 0, 0], found[1:, 0, 0])[0, 1]
    assert abs(lag) < 4.5 / np.sqrt(20_000)


def test_beta_quantiles_and_moments() -> None:
    a, b = jnp.array([1.0, 1.0, 3.0, 40.0, 900.0]), jnp.array([1.0, 30.0, 2.0, 60.0, 1.0])
    belief, truth = BetaBelief(a, b), scipy.stats.beta(np.asarray(a), np.asarray(b))
    quantile = jax.jit(belief.quantile)
    for level in (0.01, 0.5, 0.9, 0.999):
        np.testing.assert_allclose(quantile(np.float32(level)), truth.ppf(level), rtol=2e-3, atol=1e-5)
    np.testing.assert_allclose(belief.mean, truth.mean(), rtol=1e-5)
    assert (np.asarray(belief.variance) >= truth.var() * (1 - 1e-6)).all()
    many = BetaBelief(*(np.tile(np.asarray(x), (NUM, 1)) for x in (a, b)))
    drawn = np.asarray(jax.jit(lambda belief: belief.sample(jax.random.key(0)))(many), float)
    assert np.abs((drawn.mean(0) - truth.mean()) / (truth.std() / NUM**0.5)).max() < 4.5


@pytest.mark.parametrize("t", [-40.0, -3.0, 2.0, 25.0])
def test_the_variance_bounds_the_cumulants(t: float) -> None:
    """E exp(t·(x − mean)) ≤ exp(v·t²/2), by quadrature."""
    x = np.linspace(0, 1, 200_001)
    for a, b in ((1.0, 1.0), (2.0, 9.0), (30.0, 5.0)):
        belief = BetaBelief(jnp.asarray([a]), jnp.asarray([b]))
        density = scipy.stats.beta(a, b).pdf(x)
        moment = np.trapezoid(density * np.exp(t * (x - a / (a + b))), x)
        assert np.log(moment) <= float(belief.variance[0]) * t**2 / 2 * (1 + 1e-4)


def _many(belief: LinearBelief) -> np.ndarray:
    keys = jax.random.split(jax.random.key(5), NUM)
    return np.asarray(jax.jit(jax.vmap(belief.sample))(keys), float)[:, 0]


@pytest.mark.parametrize("kind", [LinearBelief, LogisticBelief])
def test_draws_of_linear_beliefs(kind: type[LinearBelief]) -> None:
    rng = np.random.default_rng(0)
    features, root = rng.normal(size=(1, 3, 2)), rng.normal(size=(2, 2))
    precision = root @ root.T + np.eye(2)
    center = np.array([[0.3, -0.8]])
    belief = kind(*(jnp.asarray(x, jnp.float32) for x in (features, center, np.linalg.cholesky(precision)[None])))
    mean = features[0] @ center[0]
    covariance = features[0] @ np.linalg.inv(precision) @ features[0].T
    drawn = _many(belief)
    told_mean, told_variance = (np.asarray(x)[0] for x in jax.jit(lambda: (belief.mean, belief.variance))())
    if kind is LinearBelief:
        np.testing.assert_allclose(told_mean, mean, rtol=1e-5)
        np.testing.assert_allclose(told_variance, np.diag(covariance), rtol=1e-4)
        np.testing.assert_allclose(np.cov(drawn.T), covariance, atol=6 * np.diag(covariance).max() / NUM**0.5)
    else:
        assert np.abs(told_mean - drawn.mean(0)).max() < 0.02
        assert (told_variance >= drawn.var(0)).all()
        logits = np.log(drawn) - np.log1p(-drawn)
        np.testing.assert_allclose(np.cov(logits.T), covariance, atol=6 * np.diag(covariance).max() / NUM**0.5)
    below = (drawn < np.asarray(jax.jit(belief.quantile)(np.float32(0.9)))[0]).mean(0)
    assert np.abs(below - 0.9).max() < 4.5 * 0.3 / NUM**0.5


def test_gaussian_updates_are_bayes() -> None:
    arms = GaussianArms(2, prior_mean=1.0, prior_scale=2.0, noise=0.5)
    belief: Belief = arms.init(1)
    rewards, learn = [0.2, -0.4, 1.1], jax.jit(arms.update)
    for reward in rewards:
        belief = learn(belief, np.zeros((1, 0), np.float32), np.array([1]), np.array([reward], np.float32))
    precision = 1 / 4 + 3 / 0.25
    assert isinstance(belief, NormalBelief)
    np.testing.assert_allclose(belief.variance[0], [4.0, 1 / precision], rtol=1e-5)
    np.testing.assert_allclose(belief.mean[0], [1.0, (1 / 4 + sum(rewards) / 0.25) / precision], rtol=1e-5)


def test_linear_updates_are_ridge_regression() -> None:
    arms = LinearArms(3, num_features=4, prior_scale=0.7, noise=0.3)
    rng, learn = np.random.default_rng(1), jax.jit(arms.update)
    state, rows, paid = arms.init(1), [], []
    for _ in range(20):
        seen, arm, reward = rng.normal(size=(1, 3, 4)), int(rng.integers(3)), rng.normal()
        state = learn(state, seen.astype(np.float32), np.array([arm]), np.array([reward], np.float32))
        rows.append(seen[0, arm])
        paid.append(reward)
    x, y = np.array(rows), np.array(paid)
    precision = np.eye(4) / 0.49 + x.T @ x / 0.09
    np.testing.assert_allclose(state[1][0], precision, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(state[0][0], np.linalg.solve(precision, x.T @ y / 0.09), rtol=1e-3, atol=1e-4)


def test_logistic_updates_are_modes() -> None:
    """One observation: the mode of prior × likelihood, by SciPy, and the curvature there."""
    arms = LogisticArms(2, num_features=2, prior_scale=1.5)
    seen = np.array([[[0.7, -1.2], [0.0, 2.0]]], np.float32)
    center, precision = jax.jit(arms.update)(arms.init(1), seen, np.array([0]), np.array([1.0], np.float32))
    x = np.array([0.7, -1.2])

    def loss(theta: np.ndarray) -> float:
        return float(theta @ theta / 2 / 2.25 + np.log1p(np.exp(-x @ theta)))

    mode = scipy.optimize.minimize(loss, np.zeros(2), tol=1e-12).x
    np.testing.assert_allclose(center[0], mode, atol=1e-4)
    p = 1 / (1 + np.exp(-x @ mode))
    np.testing.assert_allclose(precision[0], np.eye(2) / 2.25 + p * (1 - p) * np.outer(x, x), rtol=1e-3)

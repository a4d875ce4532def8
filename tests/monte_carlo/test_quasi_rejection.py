"""Quasi-rejection against sums over a Poisson's support and published numbers, in standard errors."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from scipy.stats import chisquare, poisson

import bayesrl
from bayesrl.errors import EngineError
from bayesrl.exact.weighted_draws import WeightedDraws
from bayesrl.monte_carlo.rejection_sampling import rejection

COUNTS = np.arange(80)
PRIOR, TARGET = poisson.pmf(COUNTS, 10), poisson.pmf(COUNTS, 11)
BOUNDS = (0.5, 1.0, 2.0)
"""Bounds of the density ratio p*/π₀ = exp(R − log Z) with log Z = 1: in reward units, 1 + log of them."""


def count() -> None:
    x = numpyro.sample("x", dist.Poisson(10.0))
    bayesrl.reward("growth", x * jnp.log(1.1))
    numpyro.deterministic("even", 1.0 * (x % 2 == 0))


def law(bound: float) -> np.ndarray:
    q = PRIOR * np.minimum(1, TARGET / (bound * PRIOR))
    return np.asarray(q / q.sum())


@pytest.fixture(scope="module")
def results() -> dict[float, WeightedDraws]:
    key = jax.random.key(1)
    return {
        bound: rejection(key, count, beta=1.0, reward_bound=1 + np.log(bound), quasi=True, num_samples=20_000)
        for bound in BOUNDS
    }


def test_published_distances() -> None:
    """Which way round: KL(p*‖q), and bounds of the ratio of normalised densities."""
    for bound, kl, tv in zip(BOUNDS, (0.04815, 0.01988, 0.00049), (0.12294, 0.07492, 0.00353), strict=True):
        q = law(bound)
        assert abs((TARGET * np.log(TARGET / q)).sum() - kl) < 6e-6
        assert abs(0.5 * np.abs(TARGET - q).sum() - tv) < 6e-6


@pytest.mark.parametrize("bound", BOUNDS)
def test_distances_and_averages(results: dict[float, WeightedDraws], bound: float) -> None:
    """Each of 9 numbers per bound within 4.5 standard errors: 2e-4 false alarms in all."""
    found, q = results[bound], law(bound)
    assert found.quasi is not None
    assert found.num_accepted is None
    acceptance = (PRIOR * np.minimum(1, TARGET / (bound * PRIOR))).sum()
    kl, reward = (q * np.log(q / PRIOR)).sum(), q @ COUNTS * np.log(1.1)
    truths = [
        (found.quasi.acceptance, acceptance),
        (found.quasi.total_variation, 0.5 * np.abs(TARGET - q).sum()),
        (found.quasi.kl_forward, (TARGET * np.log(TARGET / q)).sum()),
        (found.quasi.kl_reverse, (q * np.log(q / TARGET)).sum()),
        (found.log_evidence, 1.0),
        (found.estimates.kl, kl),
        (found.estimates.reward, reward),
        (found.estimates.objective, reward - kl),
        (found.estimates.metrics["even"], q[::2].sum()),
    ]
    for estimate, truth in truths:
        assert estimate is not None
        assert 0 < estimate.se < 0.02
        assert abs(estimate.mean - truth) < 4.5 * estimate.se
    # J* − J(q) = β·KL(q‖p*), of the same draws.
    gap = found.optimum - found.estimates.objective.mean
    assert abs(gap - found.quasi.kl_reverse.mean) < 1e-9


def test_draws_follow_q(results: dict[float, WeightedDraws]) -> None:
    """Three chi-square tests at 1e-5."""
    for bound, found in results.items():
        drawn = np.asarray(found.sites["x"])
        assert len(drawn) == 20_000
        edges = slice(3, 20)
        counts = np.append(np.bincount(drawn, minlength=80)[edges], 0)
        counts[-1] = len(drawn) - counts.sum()
        expected = np.append(law(bound)[edges], 0.0)
        expected[-1] = 1 - expected.sum()
        assert chisquare(counts, len(drawn) * expected).pvalue > 1e-5


def test_above_the_true_bound_it_is_rejection() -> None:
    def coins() -> None:
        with numpyro.plate("coin", 2):
            bayesrl.reward("heads", 1.0 * numpyro.sample("side", dist.Bernoulli(jnp.array([0.5, 0.2]))))

    found = rejection(
        jax.random.key(0), coins, beta=jnp.array([1.0, 2.0]), reward_bound=1.5, quasi=True, num_samples=500
    )
    assert found.quasi is not None
    assert found.quasi.kl_forward.mean.shape == (2, 2)
    for part in found.quasi[1:]:
        np.testing.assert_allclose(part.mean, 0, atol=1e-12)
    one = found.select(2.0)
    assert one is not None
    assert one.quasi is not None
    np.testing.assert_array_equal(one.quasi.acceptance.mean, found.quasi.acceptance.mean[1])
    exact = bayesrl.enumerate_posterior(coins, beta=jnp.array([1.0, 2.0]))
    assert exact.log_evidence is not None
    # Four numbers within 4.5 standard errors: 3e-5 false alarms.
    assert found.log_evidence is not None
    assert (np.abs(found.log_evidence.mean - exact.log_evidence.mean) < 4.5 * found.log_evidence.se).all()
    assert found.explanation.startswith("target: 500 draws")


def test_bad_input() -> None:
    key = jax.random.key(0)
    with pytest.raises(EngineError, match=r"quasi=True .*pass reward_bound=\.\.\."):
        rejection(key, count, beta=1.0, quasi=True)
    with pytest.raises(EngineError, match="tolerance"):
        rejection(key, count, beta=1.0, quasi=True, reward_bound=1.0, tolerance=0.1)
    with pytest.raises(EngineError, match="above reward_bound=1"):
        rejection(key, count, beta=1.0, reward_bound=1.0)
    quasi = rejection(key, count, beta=1.0, reward_bound=1.0, quasi=True, num_samples=100)
    fit = bayesrl.fit(key, count, beta=1.0, num_steps=2, progress=False)
    with pytest.raises(EngineError, match="not draws of p"):
        bayesrl.coverage(key, fit, quasi)

"""Ratios of densities of large counts, against double precision."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest
from scipy import stats

from bayesrl.core.log_ratios import doubt_of, log_ratio
from bayesrl.guides.tilts.families import tilt_distribution

TILT = 1e-3
Family = tuple[Any, Callable[[Any, Any], Any]]


def logistic(x: Any) -> Any:
    return 1 / (1 + np.exp(-np.asarray(x, float)))


def poisson(x: Any, fn: Any) -> Any:
    return stats.poisson.logpmf(x, float(fn.rate))


def gamma_poisson(x: Any, fn: Any) -> Any:
    return stats.nbinom.logpmf(x, float(fn.concentration), float(fn.rate) / (1 + float(fn.rate)))


CASES: dict[str, Family] = {
    "Poisson of 200,000": (dist.Poisson(2e5), poisson),
    "Poisson of 3,000,000": (dist.Poisson(3e6), poisson),
    "Poisson of .1": (dist.Poisson(jnp.float32(0.1)), poisson),
    "Binomial of a million": (
        dist.Binomial(10**6, logits=-0.5),
        lambda x, fn: stats.binom.logpmf(x, 10**6, logistic(fn.logits)),
    ),
    "Binomial of rare events": (
        dist.Binomial(10**5, logits=-6.0),
        lambda x, fn: stats.binom.logpmf(x, 10**5, logistic(fn.logits)),
    ),
    "Geometric": (dist.Geometric(logits=-11.0), lambda x, fn: stats.geom.logpmf(x + 1, logistic(fn.logits))),
    "GammaPoisson": (dist.GammaPoisson(1e4, 0.125), gamma_poisson),
}


@pytest.mark.parametrize("name", list(CASES))
def test_tilted_counts(name: str) -> None:
    """Within a few units in the last place of what is summed, which is what the ratio says of itself."""
    prior, truth = CASES[name]
    theta = [TILT, 0.0] if name == "GammaPoisson" else [TILT]  # its concentration has a number of its own
    guide = tilt_distribution(prior, jnp.array(theta, jnp.float32), None)
    counts = np.unique(np.asarray(prior.sample(jax.random.key(0), (50,))))
    found = log_ratio(prior, guide, jnp.asarray(counts))
    assert found is not None
    exact = truth(counts, prior) - truth(counts, guide)
    # SciPy's own densities are differences of huge terms too, in double precision.
    slack = 4 * np.finfo(np.float32).eps * np.asarray(found.size) + 1e-8 + 1e-13 * counts.max()
    assert (np.abs(np.asarray(found.value) - exact) < slack).all()
    plain = np.asarray(prior.log_prob(counts) - guide.log_prob(counts))
    if counts.max() > 1e5:
        assert np.abs(plain - exact).max() > 3 * np.abs(np.asarray(found.value) - exact).max()


def test_wrapped_and_many() -> None:
    """Events, expansions and zeros."""
    rates = jnp.array([2e5, 1e5, 3e4])
    prior, guide = dist.Poisson(rates).to_event(1), dist.Poisson(rates * 1.001).to_event(1)
    counts = jnp.array([200_100, 99_000, 0])
    found = log_ratio(prior, guide, counts)
    assert found is not None
    assert found.value.shape == ()
    before, after = np.asarray(rates, float), np.asarray(rates * 1.001, float)
    exact = (stats.poisson.logpmf(counts, before) - stats.poisson.logpmf(counts, after)).sum()
    assert float(found.value) == pytest.approx(exact, abs=2e-4)
    wide = dist.Poisson(2e5).expand((4,))
    found = log_ratio(wide, dist.Poisson(2e5).expand((4,)), jnp.arange(4))
    assert found is not None
    np.testing.assert_array_equal(found.value, np.zeros(4))


def test_what_has_no_form_says_how_far_it_may_be_off() -> None:
    """Counts of other families and large concentrations are in doubt, ordinary sites are not."""
    x = jnp.array(50_000)
    prior, guide = dist.Poisson(5e4), dist.NegativeBinomial2(5e4, 1e6)
    assert log_ratio(prior, guide, x) is None
    doubt = doubt_of(prior, guide, x)
    assert doubt is not None
    exact = stats.poisson.logpmf(50_000, 5e4) - stats.nbinom.logpmf(50_000, 1e6, 1e6 / (1e6 + 5e4))
    assert abs(float(prior.log_prob(x) - guide.log_prob(x)) - exact) < float(doubt) < 3
    assert doubt_of(dist.Normal(0.0, 1.0), dist.Normal(1.0, 1.0), jnp.array(0.3)) is None
    assert doubt_of(dist.Bernoulli(0.3), dist.Bernoulli(0.4), jnp.array(1)) is None
    small = doubt_of(dist.Gamma(2.0, 1.0), dist.Gamma(3.0, 1.0), jnp.array(1.0))
    assert small is not None
    assert float(small) < 1e-5
    assert log_ratio(dist.Binomial(10, 0.5), dist.Binomial(11, 0.5), jnp.array(3)) is None


def test_a_tilted_gamma() -> None:
    """log π₀ − log q of Gamma(100,000, 1) moved by a thousandth, against double precision."""
    prior = dist.Gamma(1e5, 1.0)
    theta = jnp.array([1e-3, -2e-4], jnp.float32)
    guide = tilt_distribution(prior, theta, None)
    drawn = prior.sample(jax.random.key(1), (40,))
    x = np.asarray(drawn, float)
    shift, log_scale = (float(t) for t in theta)
    before = np.exp((np.log(x) - shift) * np.exp(-log_scale))
    exact = stats.gamma.logpdf(x, 1e5) - stats.gamma.logpdf(before, 1e5) - np.log(before / x) + log_scale
    found = log_ratio(prior, guide, drawn)
    assert found is not None
    np.testing.assert_allclose(found.value, exact, atol=1e-3)
    assert np.abs(np.asarray(prior.log_prob(drawn) - guide.log_prob(drawn)) - exact).max() > 1e-2

"""Confidence limits hold as often as they say, on numbers drawn by NumPy."""

import numpy as np
import pytest
from scipy import stats

from bayesrl.diagnostics.evidence.confidence_limits import (
    bernstein_width,
    binomial_limits,
    bounded_upper,
    markov_lower,
    skewed_limits,
)

TRIALS = 2000


def too_many(count: int, level: float) -> bool:
    """Whether so many failures in TRIALS would come about with a chance of less than 1e-4."""
    return bool(stats.binom.sf(count - 1, TRIALS, level) < 1e-4)


@pytest.mark.parametrize("shape", [0.1, 1.0, 5.0])
def test_markov_holds_for_any_weights(shape: float) -> None:
    """Means of 8 lognormal weights of mean 1, in 16 groups: log Z = 0."""
    rng = np.random.default_rng(0)
    weights = np.exp(shape * rng.normal(size=(TRIALS, 16, 8)) - shape**2 / 2)
    limits = np.array([markov_lower(np.log(w.mean(-1))) for w in weights])
    assert not too_many(int((limits > 0).sum()), 0.025)
    if shape == 0.1:
        assert np.median(limits) > -0.25, "log(1/0.025)/16 = .23 below the mean"


@pytest.mark.parametrize("chance", [0.001, 0.05, 0.5])
def test_bounded_numbers_from_above(chance: float) -> None:
    rng = np.random.default_rng(1)
    values = 3.0 * rng.binomial(1, chance, size=(200, TRIALS))
    upper = bounded_upper(values, 3.0)
    assert not too_many(int((upper < 3 * chance).sum()), 0.025)
    assert (upper <= 3.0).all()
    more = bounded_upper(3.0 * rng.binomial(1, chance, size=(20_000, 8)), 3.0)
    assert (more < 3 * chance + 10 * np.sqrt(9 * chance / 20_000) + 10 * 3 / 20_000).all(), "the limit comes near"


def test_bernstein_holds() -> None:
    rng = np.random.default_rng(2)
    values = rng.beta(0.2, 2.0, size=(100, TRIALS))
    width = bernstein_width(values.var(0, ddof=1), 100, np.ones(TRIALS))
    truth = 0.2 / 2.2
    assert not too_many(int((values.mean(0) - width > truth).sum()), 0.025)
    assert not too_many(int((values.mean(0) + width < truth).sum()), 0.025)


def test_binomial_limits_are_clopper_and_pearsons() -> None:
    """Textbook values: 0 of 20 and 4 of 20 at 95%."""
    assert binomial_limits(0, 20) == pytest.approx((0.0, 0.16843), abs=1e-5)
    assert binomial_limits(4, 20) == pytest.approx((0.05733, 0.43661), abs=1e-5)
    assert binomial_limits(20, 20) == pytest.approx((0.83157, 1.0), abs=1e-5)


def test_correction_for_skewness_mends_coverage() -> None:
    """Means of 30 exponentials: the plain interval misses on one side four times as often as on the other."""
    rng = np.random.default_rng(3)
    values = rng.exponential(size=(TRIALS, 30))
    missed = np.zeros(2)
    for own in values:
        centred = own - own.mean()
        skewness = (centred**3).mean() / (centred**2).mean() ** 1.5
        low, high = skewed_limits(own.mean(), own.std(ddof=1) / np.sqrt(30), skewness, 30)
        missed += (low > 1.0, high < 1.0)
    # 7.5% is where the plain interval stands; 2,000 trials tell 5% from it by 5 standard errors.
    assert missed.sum() / TRIALS < 0.07
    assert missed[1] / TRIALS < 0.05
    plain = skewed_limits(2.0, 0.5, 0.0, 10_000)
    assert plain == pytest.approx((2 - 1.96 * 0.5, 2 + 1.96 * 0.5), abs=1e-3)

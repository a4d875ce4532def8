"""Confidence limits: some use a standard error, others hold for every number of draws."""

import math

import numpy as np
from numpy.typing import ArrayLike
from scipy import special

from bayesrl.statistics.estimates import Interval, mean_of_draws

LEVEL = 0.025
"""Error probability of each side: two sides make a 95% interval."""

NUM_GROUPS = 32
"""Groups of draws whose estimates together make a lower limit; it must be fixed beforehand for the limit to hold."""


def markov_lower(log_estimates: np.ndarray, level: float = LEVEL) -> float:
    """Bound log Z from below from independent unbiased estimates of Z, without a standard error.

    The product of K of them has the expectation Zᴷ, so by Markov's inequality P(Π Ẑ ≥ Zᴷ/level) ≤ level: with
    probability at least 1 − level, log Z ≥ mean log Ẑ − log(1/level)/K.

    Args:
        log_estimates: log Ẑ of each group, [groups], nats; for a product over contexts, the sum of their logs.
        level: probability that the limit lies above log Z.

    Returns:
        The limit, nats.

    References:
        Gogate & Dechter (2007), "Studies in lower bounding probability of evidence using the Markov
        inequality", section 3, where the least or the mean of the estimates stands for their product.
    """
    return float(np.mean(log_estimates) - math.log(1 / level) / len(log_estimates))


def bounded_upper(values: np.ndarray, greatest: ArrayLike, level: ArrayLike = LEVEL) -> np.ndarray:
    """Bound the mean of numbers in [0, greatest] from above, without a standard error.

    The lesser of the empirical Bernstein limit, m + √(2·V·log(4/δ)/n) + 7·G·log(4/δ)/(3·(n − 1)), and
    Hoeffding's, the greatest μ with n·kl(m/G ‖ μ/G) ≤ log(2/δ); each holds with probability 1 − δ/2.

    Args:
        values: independent numbers, [n, ...].
        greatest: G.
        level: δ.

    References:
        Maurer & Pontil (2009), "Empirical Bernstein bounds and sample variance penalization",
        theorem 4; Hoeffding (1963), theorem 1.
    """
    n, mean = len(values), values.mean(0)
    top, delta = np.broadcast_to(greatest, mean.shape).astype(float), np.broadcast_to(level, mean.shape)
    bernstein = mean + bernstein_width(values.var(0, ddof=1), n, top, delta / 2)
    hoeffding = top * np.vectorize(_kl_upper)(np.minimum(mean / top, 1.0), np.log(2 / delta) / n)
    result: np.ndarray = np.minimum(np.minimum(bernstein, hoeffding), top)
    return result


def bernstein_width(variance: ArrayLike, n: int, spread: ArrayLike, level: ArrayLike = LEVEL) -> np.ndarray:
    """How far the mean of n numbers in an interval of length `spread` can lie from its expectation.

    √(2·V·log(2/δ)/n) + 7·spread·log(2/δ)/(3·(n − 1)), on one side, with probability 1 − δ.
    """
    log_term = np.log(2 / np.asarray(level))
    slack = 7 * np.asarray(spread) * log_term / (3 * (n - 1))
    result: np.ndarray = np.asarray(np.sqrt(2 * np.asarray(variance) * log_term / n) + slack)
    return result


def _kl_upper(mean: float, budget: float) -> float:
    """Solve kl(mean ‖ μ) = budget for μ ≥ mean, Bernoulli divergences, nats."""

    def excess(mu: float) -> float:
        first = mean * math.log(mean / mu) if mean > 0 else 0.0
        second = (1 - mean) * math.log((1 - mean) / (1 - mu)) if mean < 1 else 0.0
        return first + second - budget

    from scipy import optimize

    high = 1 - 1e-12
    # kl grows without bound towards μ = 1, so the root is bracketed just short of it.
    if mean >= high or excess(high) <= 0:
        return 1.0
    return float(optimize.brentq(excess, max(mean, 1e-300), high, xtol=1e-14))


def binomial_limits(successes: int, trials: int, level: float = LEVEL) -> tuple[float, float]:
    """Return Clopper and Pearson's exact limits for a probability, each with error `level`."""
    lower = special.betaincinv(successes, trials - successes + 1, level) if successes > 0 else 0.0
    upper = special.betaincinv(successes + 1, trials - successes, 1 - level) if successes < trials else 1.0
    return float(lower), float(upper)


def skewed_limits(mean: float, se: float, skewness: float, n: int) -> tuple[float, float]:
    """Return the 95% limits of a mean of n numbers, corrected for their skewness.

    Hall's monotone transformation of the t-statistic, g(t) = t + k·t²/3 + k²·t³/27 + k/6 with
    k = skewness/√n, is Normal to second order; its inverse is g⁻¹(x) = 3·((1 + k·(x − k/6))^⅓ − 1)/k.

    References:
        Hall (1992), "On the removal of skewness by transformation", equation 3.2.
    """
    k, z = skewness / math.sqrt(n), float(special.stdtrit(max(n - 1, 1), 1 - LEVEL))
    if abs(k) < 1e-8:
        # The inverse divides by k; for k = 0 it is the identity.
        return mean - z * se, mean + z * se

    def inverse(x: float) -> float:
        return float(3 * (np.cbrt(1 + k * (x - k / 6)) - 1) / k)

    return mean - se * inverse(z), mean - se * inverse(-z)


def mean_interval(values: np.ndarray, conservative: float = 1.96) -> Interval:
    """Return the normal intervals of a mean over draws and contexts, [draws, contexts]; see `Interval.normal`."""
    return Interval.normal(*mean_of_draws(values.mean(1)), conservative)


def weighted_start(reward: np.ndarray, log_likelihood: np.ndarray) -> Interval:
    """Estimate E[R] under p(x|y) from prior draws [draws, contexts], weighted by p(y|x), with a normal interval."""
    weight = np.exp(log_likelihood - log_likelihood.max(0))
    weight = weight / weight.mean(0)
    mean = (weight * np.where(weight > 0, reward, 0.0)).mean(0)
    influence = weight * np.where(weight > 0, reward - mean, 0.0)
    return mean_interval(mean.mean() + influence)


def stratified_interval(mean: float, influence: np.ndarray, rounding: float, *, calibrated: bool = True) -> Interval:
    """Return both 95% intervals of a mean over strata of equal size.

    The conservative interval is empirical Bernstein's over tuples of one draw from each stratum. As the range
    it uses that of the draws (Maurer & Pontil 2009, theorem 4).

    Args:
        mean: the estimate.
        influence: how much each draw moves it, [strata, draws], with mean 0.
        rounding: possible error in single precision, in the units of the mean.
        calibrated: whether to trust its standard error.
    """
    strata, each = influence.shape
    se = math.sqrt(float(influence.var(1, ddof=1).sum()) / each) / strata
    power = max(float((influence**2).mean()), 1e-200)
    low, high = skewed_limits(mean, se, float((influence**3).mean()) / power**1.5, influence.size)
    width = float(bernstein_width(influence.mean(0).var(ddof=1), each, np.ptp(influence, axis=1).mean()))
    ends = (low - rounding, high + rounding) if calibrated else (math.nan, math.nan)
    conservative = (mean - width - rounding, mean + width + rounding)
    return Interval(*(np.asarray(x) for x in (mean, se, *ends, *conservative)))

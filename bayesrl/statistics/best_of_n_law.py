"""The law of the best of n draws by reward, from a table of all values or from a pool of draws, per context."""

import math
from typing import NamedTuple

import numpy as np
from scipy.optimize import brentq
from scipy.special import gammaln, logsumexp

from bayesrl.statistics.estimates import InfluenceEstimate

_NOTHING = 1e-12
_REACH = 1e9


class RankedRewards(NamedTuple):
    """Rewards in ascending order per context, all [rows, contexts]; rows of one reward form a level.

    Attributes:
        order: the row of each place.
        reward: rewards by place, reward units.
        first: the first place of the level at each place.
        last: its last place.
    """

    order: np.ndarray
    reward: np.ndarray
    first: np.ndarray
    last: np.ndarray


def rank_rewards(reward: np.ndarray) -> RankedRewards:
    """Sort rewards, [rows, contexts], and find their levels."""
    num = len(reward)
    order = np.argsort(reward, axis=0, kind="stable")
    ascending = np.take_along_axis(reward, order, 0)
    places = np.arange(num)[:, None]
    new = np.ones(ascending.shape, bool)
    new[1:] = ascending[1:] != ascending[:-1]
    first = np.maximum.accumulate(np.where(new, places, 0), 0)
    ends = np.concatenate([new[1:], np.ones_like(new[:1])])
    last = np.minimum.accumulate(np.where(ends, places, num)[::-1], 0)[::-1]
    return RankedRewards(order, ascending, first, last)


class BestOfLaw(NamedTuple):
    """The law of the best of n draws of a finite program.

    Attributes:
        log_ratio: log pₙ(x)/π₀(x), [rows, contexts], nats; −inf where π₀(x) = 0.
        reward: E[R], [contexts], reward units.
        kl: KL(pₙ‖π₀), [contexts], nats.
    """

    log_ratio: np.ndarray
    reward: np.ndarray
    kl: np.ndarray


def best_of_n_law(log_prior: np.ndarray, ranks: RankedRewards, n: int) -> BestOfLaw:
    """Compute pₙ(x) = π₀(x)·(F(r)ⁿ − F(r⁻)ⁿ)/(F(r) − F(r⁻)), where r is the reward of x and F its distribution.

    Ties are broken at random, so that within a level pₙ is proportional to π₀.

    Args:
        log_prior: log π₀ of each row, [rows, contexts], nats; adds up to 1.
        ranks: their rewards.
        n: number of draws.
    """
    mass = np.exp(np.take_along_axis(log_prior, ranks.order, 0))
    # From the top: what lies above a rare best value must keep its digits, and 1 − F would lose them.
    beyond = np.cumsum(mass[::-1], 0)[::-1] / mass.sum(0)
    above = np.concatenate([beyond[1:], np.zeros_like(beyond[:1])])
    here, higher = (np.take_along_axis(side, at, 0) for side, at in ((beyond, ranks.first), (above, ranks.last)))
    with np.errstate(divide="ignore", invalid="ignore"):
        # Rounding may put cumulative sums a little above 1.
        log_upto, log_below = np.log1p(-np.minimum(higher, 1)), np.log1p(-np.minimum(here, 1))
        # log(Fⁿ − F₋ⁿ) without the difference of two powers, which would lose its digits or underflow.
        log_best = n * log_upto + np.log(-np.expm1(n * (log_below - log_upto)))
        ratio = np.where(mass > 0, log_best - np.log(here - higher), -np.inf)
    best = np.where(mass > 0, mass / mass.sum(0) * np.exp(ratio), 0.0)
    counted = best > 0
    # A reward of −∞ that nothing draws has weight 0; their product would be nan.
    reward = (best * np.where(counted, ranks.reward, 0.0)).sum(0)
    kl = _without_rounding((best * np.where(counted, ratio, 0.0)).sum(0))
    log_ratio = np.empty_like(ratio)
    np.put_along_axis(log_ratio, ranks.order, ratio, 0)
    return BestOfLaw(log_ratio, reward, kl)


def _without_rounding(kl: np.ndarray) -> np.ndarray:
    """Return 0 for a KL that is nothing but rounding, as that of n = 1 or of equal rewards."""
    return np.where(kl > _NOTHING, kl, 0.0)


def subset_shares(num: int, n: int) -> np.ndarray:
    """Return the share of subsets of n among `num` that lie within the first m, C(m, n)/C(num, n), for m = 0 … num."""
    m = np.arange(n, num + 1)
    # In logs: binomial coefficients of this size overflow.
    log_share = gammaln(m + 1) - gammaln(m - n + 1) - gammaln(num + 1) + gammaln(num - n + 1)
    return np.concatenate([np.zeros(n), np.exp(log_share)])


def estimated_law(ranks: RankedRewards, n: int) -> tuple[InfluenceEstimate, InfluenceEstimate]:
    """Estimate E[R] and KL(pₙ‖π₀) of the best of n from a pool of at least n draws of π₀.

    The chance that a level holds the best of n is its share of all subsets of n, which is unbiased, and so is E[R].
    KL compares these chances with the shares of draws: its bias falls as 1/draws.

    Returns:
        E[R], reward units, and KL, nats, [contexts], with the influence of each draw.
    """
    num = len(ranks.reward)
    shares = subset_shares(num, n)
    size = ranks.last - ranks.first + 1
    best = (shares[ranks.last + 1] - shares[ranks.first]) / size  # of each draw; those of a level share its chance
    with np.errstate(invalid="ignore", divide="ignore"):
        log_ratio = np.where(best > 0, np.log(best * num), 0.0)
        reward = (best * np.where(best > 0, ranks.reward, 0.0)).sum(0)
        kl = _without_rounding((best * log_ratio).sum(0))
        slopes = _influence(ranks, n, ranks.reward), _influence(ranks, n, log_ratio + 1) - best * num
    return InfluenceEstimate(reward, _unsorted(ranks, slopes[0])), InfluenceEstimate(kl, _unsorted(ranks, slopes[1]))


def _influence(ranks: RankedRewards, n: int, value: np.ndarray) -> np.ndarray:
    """Differentiate Σₖ (Fₖⁿ − Fₖ₋₁ⁿ)·valueₖ by the mass of each level, by place."""
    num = len(ranks.reward)
    upto, below = ((side / num) ** (n - 1) for side in (ranks.last + 1, ranks.first))
    each = value * (upto - below) / (ranks.last - ranks.first + 1)
    after = np.concatenate([np.cumsum(each[::-1], 0)[::-1], np.zeros_like(each[:1])])
    return np.asarray(n * (value * upto + np.take_along_axis(after, ranks.last + 1, 0)))


def _unsorted(ranks: RankedRewards, slope: np.ndarray) -> np.ndarray:
    influence = np.empty_like(slope)
    with np.errstate(invalid="ignore"):  # a reward of −∞ has a mean and no standard error
        np.put_along_axis(influence, ranks.order, slope - slope.mean(0), 0)
    return influence


def best_of_n_kl_bound(n: np.ndarray) -> np.ndarray:
    """Return log n − (n − 1)/n, nats: KL(pₙ‖π₀) where no two draws have the same reward, and more than it elsewhere."""
    return np.asarray(np.log(n) - (n - 1) / n)


def reward_at_kl(log_mass: np.ndarray, reward: np.ndarray, kl: InfluenceEstimate) -> tuple[float, InfluenceEstimate]:
    """Return the greatest E[R] that any policy reaches at a KL to the prior, averaged over contexts, and its β.

    It is min_β β·KL + β·log Z(β), by duality, at the β whose p* has this KL. Where this KL is too small to leave out
    values of reward −∞, it is −∞.

    Args:
        log_mass: log-probabilities of the rows, [rows, contexts], nats.
        reward: [rows, contexts], reward units.
        kl: the mean KL over contexts, nats; its influence may be empty if exact.
    """
    drawn = log_mass > -np.inf
    top = np.where(drawn, reward, -np.inf).max(0)
    with np.errstate(invalid="ignore"):
        below = np.where(drawn, reward - top, 0.0)
    spread = float(-below[np.isfinite(below)].min(initial=0.0))

    def tilted(beta: float) -> tuple[np.ndarray, np.ndarray]:
        log_weight = log_mass + below / beta
        return np.asarray(logsumexp(log_weight, axis=0)), log_weight

    def excess(log_beta: float) -> float:
        beta = math.exp(log_beta)
        log_z, log_weight = tilted(beta)
        weight = np.exp(log_weight - log_z)
        own = (weight * np.where(weight > 0, below, 0.0)).sum(0) / beta - log_z
        return float(own.mean() - kl.mean)

    if kl.mean <= _NOTHING or spread == 0:
        mean = np.asarray((np.exp(log_mass) * reward).sum(0).mean())
        with np.errstate(invalid="ignore"):
            moved = (reward - mean).mean(-1) if len(kl.influence) else kl.influence
        return math.inf, InfluenceEstimate(mean, moved)
    # β spans orders of magnitude, so the root is sought in its logarithm.
    low, high = math.log(spread / _REACH), math.log(spread * _REACH)
    if not np.isfinite(top).all() or excess(high) >= 0:
        # Without the values of reward −∞ no policy is so near to the prior.
        return math.inf, InfluenceEstimate(np.asarray(-np.inf), np.full_like(kl.influence, np.nan))
    # A bounded f has its root above 0, maybe by orders of magnitude: halve its logarithm. low·high may underflow.
    beta = math.exp(low if excess(low) <= 0 else float(brentq(excess, low, high, xtol=1e-12)))
    log_z, log_weight = tilted(beta)
    value = float(top.mean() + beta * (kl.mean + log_z.mean()))
    # At the minimum, β itself does not count to first order.
    moved = (np.exp(log_weight - log_z - log_mass) - 1).mean(-1) if len(kl.influence) else np.zeros(0)
    return beta, InfluenceEstimate(np.asarray(value), beta * (kl.influence + moved))


def kl_at_reward(log_mass: np.ndarray, reward: np.ndarray, mean: InfluenceEstimate) -> tuple[float, InfluenceEstimate]:
    """Return the least KL to the prior of any policy that earns this E[R], averaged over contexts, and its β.

    It is max over η of η·E[R] − log Z(1/η), attained by the p* that earns it, at β = 1/η.

    Args:
        log_mass: log-probabilities of the rows, [rows, contexts], nats.
        reward: [rows, contexts], reward units.
        mean: the mean E[R] over contexts, reward units; its influence may be empty if exact.
    """
    drawn = log_mass > -np.inf
    top = np.where(drawn, reward, -np.inf).max(0)
    nothing, target = np.zeros_like(mean.influence), float(mean.mean)
    if not np.isfinite(top).all() or not np.isfinite(target):
        return math.nan, InfluenceEstimate(np.asarray(np.nan), nothing)
    below = np.where(drawn, reward - top, -np.inf)
    spread = float(-below[np.isfinite(below)].min(initial=0.0))

    def tilted(log_beta: float) -> tuple[np.ndarray, np.ndarray]:
        log_weight = log_mass + below / math.exp(log_beta)
        return np.asarray(logsumexp(log_weight, axis=0)), log_weight

    def excess(log_beta: float) -> float:
        log_z, log_weight = tilted(log_beta)
        weight = np.exp(log_weight - log_z)
        return float((weight * np.where(weight > 0, below, 0.0)).sum(0).mean() + top.mean() - target)

    if spread == 0:
        return math.inf, InfluenceEstimate(np.zeros(()), nothing)
    low, high = math.log(spread / _REACH), math.log(spread * _REACH)
    if excess(high) >= 0:
        return math.inf, InfluenceEstimate(np.zeros(()), nothing)
    at = low if excess(low) <= 0 else float(brentq(excess, low, high, xtol=1e-12))
    beta, (log_z, log_weight) = math.exp(at), tilted(at)
    value = max(float((target - top.mean()) / beta - log_z.mean()), 0.0)
    # At the maximum, β itself does not count to first order.
    moved = (np.exp(log_weight - log_z - log_mass) - 1).mean(-1) if len(mean.influence) else np.zeros(0)
    return beta, InfluenceEstimate(np.asarray(value), mean.influence / beta - moved)

"""Rejection from the optimum of E[R] − β·χ²/2: linear chances of acceptance, from a multiplier that a pilot finds."""

from dataclasses import replace

import numpy as np

from bayesrl.exact.weighted_draws import WeightedDraws
from bayesrl.statistics.estimates import Estimate, Estimates, InfluenceEstimate


def chi_squared_spans(excess: np.ndarray, betas: np.ndarray) -> np.ndarray:
    """Find s = B + β − λ from draws of the prior, [lanes, contexts]: a draw is accepted with max(0, 1 + (R − B)/s).

    The optimum is π₀·max(0, 1 + (R − λ)/β). With the k best draws inside its support, λ would be
    (Σᵢ≤ₖ Rᵢ + k·β − N·β)/k; the largest of these is the root.

    Args:
        excess: R − B, [draws, contexts].
        betas: [lanes].
    """
    num = len(excess)
    best = np.sort(excess, axis=0)[::-1]
    k = np.arange(1, num + 1)[:, None]
    with np.errstate(invalid="ignore"):
        means = np.cumsum(best, 0) / k
    below = [np.max(np.where(np.isnan(means), -np.inf, means) + beta * (1 - num / k), axis=0) for beta in betas]
    return np.asarray(betas[:, None] - np.stack(below))


def with_chi_squared_estimates(
    result: WeightedDraws, excess: np.ndarray, bound: np.ndarray, spans: np.ndarray
) -> WeightedDraws:
    """Let a result of rejection tell what its draws follow, from all proposals.

    Args:
        result: of accepting with max(0, 1 + (R − B)/s).
        excess: R − B of the proposals, [proposals, contexts], reward units.
        bound: B, [contexts].
        spans: s, [lanes, contexts].
    """
    assert result.beta is not None
    betas, shape = result.beta, result.structure.context_shape
    rewards, kls, divergences, objectives, optima, own = [], [], [], [], [], []
    for beta, span in zip(betas.reshape(-1).tolist(), spans, strict=True):
        weight = np.maximum(1 + excess / span, 0.0)
        share = weight.mean(0)
        ratio = weight / share  # q/π₀
        log_ratio = np.log(ratio, out=np.zeros_like(ratio), where=ratio > 0)
        below = _mean(ratio, np.where(ratio > 0, excess, 0.0))
        square = _mean(ratio, ratio)
        # q/π₀ is normalised by the draws too, so that its square has that influence twice.
        square = InfluenceEstimate(square.mean, square.influence - square.mean * (ratio - 1))
        divergence = InfluenceEstimate((square.mean - 1) / 2, square.influence / 2)
        reward = InfluenceEstimate(bound + below.mean, below.influence)
        kl = _mean(ratio, log_ratio)
        # The normaliser also stands inside the logarithm.
        kls.append(InfluenceEstimate(kl.mean, kl.influence - (ratio - 1)))
        rewards.append(reward)
        divergences.append(divergence)
        objectives.append(reward.plus(divergence, -beta))
        # The dual at this multiplier, at most second-order above its minimum.
        optima.append(bound + beta - span + beta * (((span * weight / beta) ** 2).mean(0) - 1) / 2)
        own.append(span * share)

    def averaged(values: list[InfluenceEstimate]) -> Estimate:
        parts = zip(*((x.mean, x.se) for x in (value.over_contexts() for value in values)), strict=True)
        return Estimate(*(np.stack(part).reshape(betas.shape) for part in parts))

    times = own / betas.reshape(-1, 1)
    ends = dict.fromkeys(f"{end:.3g}" for end in (times.min(), times.max()))
    return replace(
        result,
        log_evidence=None,
        optimum=np.stack(optima).reshape((*betas.shape, *shape)),
        estimates=Estimates(
            objective=averaged(objectives),
            reward=averaged(rewards),
            kl=averaged(kls),
            metrics=result.estimates.metrics,
            divergence=averaged(divergences),
        ),
        num_accepted=None,  # its probability is no longer exp(log Z − B/β)
        explanation=f"{result.explanation}; they are exact at {' to '.join(ends)} times the β asked for",
        regularizer="chi_squared",
    )


def _mean(weight: np.ndarray, values: np.ndarray) -> InfluenceEstimate:
    """Average under weights with mean 1."""
    mean = (weight * values).mean(0)
    return InfluenceEstimate(mean, weight * (values - mean))

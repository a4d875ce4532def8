"""Quasi-rejection: what draws follow that are accepted below the true bound, and how far that is from p*."""

from dataclasses import replace

import numpy as np
from scipy.special import logsumexp

from bayesrl.exact.weighted_draws import QuasiRejection, WeightedDraws
from bayesrl.statistics.estimates import Estimate, Estimates, InfluenceEstimate


def with_quasi_estimates(result: WeightedDraws, excess: np.ndarray, bound: np.ndarray) -> WeightedDraws:
    """Let a result of rejection tell what its draws follow, from all proposals.

    Args:
        result: of accepting with min(1, exp((R − B)/β)).
        excess: R − B of the proposals, [proposals, contexts], reward units.
        bound: B, [contexts].
    """
    assert result.beta is not None
    betas, shape = result.beta, result.structure.context_shape
    lanes = [_Lane(excess / float(beta)) for beta in betas.reshape(-1)]
    scales = betas.reshape(-1).tolist()
    pairs = list(zip(lanes, scales, strict=True))

    def each(values: list[InfluenceEstimate]) -> Estimate:
        parts = zip(*((value.mean, value.se) for value in values), strict=True)
        return Estimate(*(np.stack(part).reshape((*betas.shape, *shape)) for part in parts))

    def averaged(values: list[InfluenceEstimate]) -> Estimate:
        parts = zip(*((x.mean, x.se) for x in (value.over_contexts() for value in values)), strict=True)
        return Estimate(*(np.stack(part).reshape(betas.shape) for part in parts))

    below = [lane.excess.times(beta) for lane, beta in pairs]
    rewards = [InfluenceEstimate(reward.mean + bound, reward.influence) for reward in below]
    kls = [lane.kl_to_prior for lane in lanes]
    evidence = each([InfluenceEstimate(x.log_z.mean + bound / b, x.log_z.influence) for x, b in pairs])
    scale = betas.reshape(betas.shape + (1,) * len(shape))
    return replace(
        result,
        log_evidence=evidence,
        optimum=None if result.optimum is None else np.asarray(scale * evidence.mean),
        estimates=Estimates(
            objective=averaged([r.plus(kl, -b) for r, kl, b in zip(rewards, kls, scales, strict=True)]),
            reward=averaged(rewards),
            kl=averaged(kls),
            metrics=result.estimates.metrics,
        ),
        num_accepted=None,  # its probability is no longer exp(log Z − B/β)
        quasi=QuasiRejection(
            each([lane.acceptance for lane in lanes]),
            each([lane.total_variation for lane in lanes]),
            each([lane.kl_forward for lane in lanes]),
            each([lane.kl_reverse for lane in lanes]),
        ),
    )


class _Lane:
    """Averages at one temperature, [contexts], over proposals with log-weights d = (R − B)/β, [proposals, contexts].

    p* has the weights exp(d), and q has min(1, exp(d)).
    """

    def __init__(self, log_weight: np.ndarray) -> None:
        self.capped = np.minimum(log_weight, 0.0)
        self.p, self.log_z = _normalised(log_weight)
        self.q, self.log_q = _normalised(self.capped)
        self.surplus = np.maximum(log_weight, 0.0)
        self.log_weight = log_weight

    @property
    def acceptance(self) -> InfluenceEstimate:
        chance = np.exp(self.log_q.mean)
        return InfluenceEstimate(chance, chance * self.log_q.influence)

    @property
    def excess(self) -> InfluenceEstimate:
        """E_q[d]."""
        return _mean(self.q, self.log_weight)

    @property
    def kl_to_prior(self) -> InfluenceEstimate:
        """KL(q‖π₀) = E_q[min(d, 0)] − log Z_q."""
        return _mean(self.q, self.capped).plus(self.log_q, -1.0)

    @property
    def kl_forward(self) -> InfluenceEstimate:
        """KL(p*‖q) = E_p*[max(d, 0)] + log Z_q − log Z."""
        return _mean(self.p, self.surplus).plus(self.log_q).plus(self.log_z, -1.0)

    @property
    def kl_reverse(self) -> InfluenceEstimate:
        """KL(q‖p*) = log Z − log Z_q − E_q[max(d, 0)]."""
        return self.log_z.plus(self.log_q, -1.0).plus(_mean(self.q, self.surplus), -1.0)

    @property
    def total_variation(self) -> InfluenceEstimate:
        sign = np.sign(self.p - self.q)
        of_p, of_q = _mean(self.p, sign), _mean(self.q, sign)
        return of_p.plus(of_q, -1.0).times(0.5)


def _normalised(log_weight: np.ndarray) -> tuple[np.ndarray, InfluenceEstimate]:
    """Return weights with mean 1, and the log of their mean before that."""
    log_mean = np.asarray(logsumexp(log_weight, axis=0)) - np.log(len(log_weight))
    weight = np.exp(log_weight - log_mean)
    return weight, InfluenceEstimate(log_mean, weight - 1)


def _mean(weight: np.ndarray, values: np.ndarray) -> InfluenceEstimate:
    """Average under weights with mean 1; a weight of 0 drops a value of −∞."""
    finite = np.where(weight > 0, values, 0.0)
    mean = (weight * finite).mean(0)
    return InfluenceEstimate(mean, weight * (finite - mean))

"""A sample of fit and prior seen at one temperature: every quantity with a calibrated and a conservative interval."""

import math
from typing import Any, NamedTuple

import numpy as np
from scipy.special import logsumexp

from bayesrl.diagnostics.evidence.confidence_limits import (
    LEVEL,
    NUM_GROUPS,
    bernstein_width,
    bounded_upper,
    markov_lower,
    mean_interval,
    weighted_start,
)
from bayesrl.diagnostics.evidence.mixture_sample import MixtureSample
from bayesrl.diagnostics.evidence.result import Evidence, Method
from bayesrl.diagnostics.evidence.stratified_estimator import StratifiedEstimator
from bayesrl.diagnostics.tail_behaviour import pareto_shape
from bayesrl.statistics.estimates import Estimate, InfluenceEstimate, Interval, mean_of_draws

MIN_ESS = 100
MIN_EXACT = 100
"""The method is called rejection from this many exact draws in each context."""

_MAX_UNSEEN = 0.02
_EPS = float(np.finfo(np.float32).eps)
_TAIL_CONTEXTS = 200


class Bounds(NamedTuple):
    """Greatest total reward, [contexts], reward units, and log-likelihood, nats; inf if unknown."""

    reward: Any = math.inf
    log_likelihood: float = math.inf


class TemperedSample:
    """One sample, viewed at one temperature.

    Args:
        sample: draws of fit and prior.
        beta: reward units per nat; None without rewards.
        observed: whether the program conditions on data.
        bounds: bounds on what a draw can earn; none by default.
        known: log Z of each context, [contexts], nats, if an engine computed it exactly.
    """

    def __init__(
        self,
        sample: MixtureSample,
        beta: float | None,
        *,
        observed: bool,
        bounds: Bounds | None = None,
        known: np.ndarray | None = None,
    ) -> None:
        self.sample, self.beta, self.rewarded = sample, 1.0 if beta is None else beta, beta is not None
        self.bounds = Bounds() if bounds is None else bounds
        self.conditioned = observed and self.rewarded
        self.of_q, self.of_prior = sample.ratios
        self.estimator = StratifiedEstimator(self.of_q[None] - 1, 2)
        tempered = sample.reward / self.beta
        self.w = sample.ratio + sample.log_likelihood + tempered
        with np.errstate(divide="ignore"):
            self.log_ratio = np.log(self.of_prior) + sample.log_likelihood + tempered
        # Weights are relative to the greatest of their context, so that none overflows.
        self.scale = self.log_ratio.max(0)
        self.ratio = np.exp(self.log_ratio - self.scale)
        mean = self.estimator.regress(self.ratio)[0]
        plain = self.estimator.plain(self.ratio)
        # The control variate can push the mean of Z towards 0 or below, where log Z breaks down.
        safe = mean.mean > 0.2 * plain.mean
        mean = InfluenceEstimate(np.where(safe, mean.mean, plain.mean), np.where(safe, mean.influence, plain.influence))
        self.log_z = InfluenceEstimate(np.log(mean.mean) + self.scale, mean.influence / mean.mean)
        self.known = known is not None
        if known is not None:
            self.log_z = InfluenceEstimate(known, np.zeros_like(mean.influence))
        self.t = np.exp(self.log_ratio - self.log_z.mean)
        self.u = self.w - self.log_z.mean

    @property
    def rounding(self) -> float:
        """Possible error of single precision, nats: a few units in the last place of each summand."""
        summed = (self.sample.log_prior, self.sample.log_q, self.w, self.sample.reward / self.beta)
        finite = [np.abs(x[np.isfinite(x)]).mean() for x in summed]
        return 2 * _EPS * float(np.sum(finite)) + float(self.sample.doubt.mean())

    @property
    def ess(self) -> float:
        """Effective number of draws with weights p̂/m, least over contexts."""
        return float((self.t.sum(0) ** 2 / (self.t**2).sum(0)).min())

    @property
    def exact_draws(self) -> np.ndarray:
        """Expected number of prior draws that rejection would keep, in each context; 0 without a bound."""
        if not self._bounded:
            return np.zeros(self.sample.reward.shape[1])
        prior = slice(self.sample.num_fit, None)
        above = (self.sample.reward[prior] - self.bounds.reward) / self.beta
        return np.asarray(np.exp(above + self.sample.log_likelihood[prior] - self.bounds.log_likelihood).sum(0))

    @property
    def _bounded(self) -> bool:
        return bool(np.isfinite(self.bounds.reward).all() and math.isfinite(self.bounds.log_likelihood))

    @property
    def _log_top(self) -> np.ndarray:
        """Log of the greatest p̂/π₀, [contexts], nats."""
        return np.asarray(self.bounds.reward / self.beta + self.bounds.log_likelihood)

    def unseen(self) -> float:
        """Bound the share of Z in regions without draws by the prior's mass there; 1 if unknown.

        In a finite program the draws show how much of the prior they cover. The rest holds at most
        (1 − π₀(seen))·exp(max R/β) of Z.
        """
        if not self._bounded:
            return 1.0
        with np.errstate(over="ignore"):
            room = np.exp(self._log_top - self.log_z.mean)
        return float(min(np.mean(self.sample.unseen_prior() * room), 1.0))

    def can_calibrate(self) -> tuple[bool, str]:
        """Return whether log Z's standard error can be trusted, and if not, why."""
        if self.known:
            return True, ""
        if self.ess < MIN_ESS:
            return False, f"draws of the fit and of the prior together are worth only {self.ess:.0f} of p*"
        if not self._bounded:
            return False, "no upper bound of the rewards is proven or given, and modes that no draw has seen may exist"
        if self.unseen() <= _MAX_UNSEEN:
            return True, ""
        se = float(self.estimator.interval(self.log_z, 0.0).se)
        # A mode missed by all exact draws holds at most −log(level)/n of Z: here less than half a standard error.
        if -math.log(LEVEL) / max(float(self.exact_draws.min()), 1e-300) < 0.5 * se:
            return True, ""
        return False, "only conservative limits are given: too much of the prior is unseen to exclude a small mode"

    # ---- the two sides of log Z --------------------------------------------------------------

    def lower(self) -> tuple[Estimate, np.ndarray]:
        """IWAE over groups of draws, and the greater of Markov's and Bernstein's limits; means over contexts."""
        groups = self._by_group()
        contexts = self.log_ratio.shape[1]
        totals = groups.mean(1)
        # Half the level for each of the two limits, so that the greater one holds too.
        limit = markov_lower(groups.sum(1), LEVEL / 2) / contexts
        if self._bounded:
            pairs, top = self._pairs()
            # Contexts share the level, so that all of their limits hold together.
            least = pairs.mean(0) - bernstein_width(pairs.var(0, ddof=1), len(pairs), top, LEVEL / 2 / contexts)
            if (least > 0).all():
                limit = max(limit, float((np.log(least) + self.scale).mean()))
        limit -= self.rounding
        return mean_of_draws(totals), np.asarray(limit)

    def _pairs(self) -> tuple[np.ndarray, np.ndarray]:
        """Average weights over pairs of one draw of the fit and one of the prior; also return their greatest value."""
        k = self.sample.num_fit
        # π₀/m is at most 2, so no weight exceeds twice the greatest p̂/π₀.
        log_top = self._log_top - math.log(0.5) - self.scale
        with np.errstate(over="ignore"):
            top = np.minimum(np.exp(log_top), 1e300)
        return (self.ratio[:k] + self.ratio[k : 2 * k]) / 2, top

    def _by_group(self) -> np.ndarray:
        """Return log Ẑ of independent groups of draws, each with its shares of both, [groups, contexts]."""
        k = self.sample.num_fit
        size = k // NUM_GROUPS
        fit, prior = self.log_ratio[: size * NUM_GROUPS], self.log_ratio[k : k + size * NUM_GROUPS]
        together = np.concatenate([x.reshape(NUM_GROUPS, size, -1) for x in (fit, prior)], 1)
        return np.asarray(logsumexp(together, axis=1) - math.log(2 * size))

    def upper(self) -> tuple[Estimate | None, np.ndarray]:
        """EUBO over exact draws of the prior, and the limit for bounded weights."""
        if not self._bounded:
            return None, np.asarray(np.inf)
        pairs, top = self._pairs()
        limit = np.log(bounded_upper(pairs, top, LEVEL / pairs.shape[1])) + self.scale
        weighted = self.estimator.plain(self.t * np.where(self.t > 0, self.w, 0.0))
        eubo = self.estimator.interval(weighted, 0.0)
        return Estimate(eubo.mean, eubo.se), np.asarray(limit.mean() + self.rounding)

    def _over_fit(self, values: np.ndarray) -> InfluenceEstimate:
        """Average over q: E_q[f] = E_m[(q/m)·f]."""
        return self.estimator.regress(self.of_q * np.where(self.of_q > 0, values, 0.0))[0]

    # ---- divergences -------------------------------------------------------------------------

    def reverse(self) -> InfluenceEstimate:
        """KL(q‖p*) = log Z − E_q[w], both as shown elsewhere; at the optimum its noise vanishes with theirs."""
        return self.log_z.plus(self._over_fit(self.w), -1.0)

    def forward(self) -> InfluenceEstimate:
        """KL(p*‖q) = E_p*[u] = E_m[(p*/m)·(u − 1) + q/m]."""
        terms = np.where(self.t > 0, self.t * (self.u - 1), 0.0) + self.of_q
        # Each term is t·(u − 1 + exp(−u)) ≥ 0 but for rounding, so the estimate is not negative either.
        found = self.estimator.plain(np.maximum(terms, 0.0))
        return found.plus(InfluenceEstimate(np.zeros_like(found.mean), found.mean * self.log_z.influence), -1.0)

    def missed(self) -> float:
        """Mass of p* where q puts less than a tenth of it, mean over contexts."""
        return float((self.t * (self.u > math.log(10))).mean())

    # ---- together ----------------------------------------------------------------------------

    def evidence(self, shape: tuple[int, ...], method: Method, marginal: np.ndarray | None = None) -> Evidence:
        """Combine the answers; scalars are averages over contexts.

        Args:
            shape: shape of the contexts.
            method: name of the method, unless enough exact draws make it rejection.
            marginal: log p(y) of each context if it is known exactly, nats.
        """
        est, sample, scale = self.estimator, self.sample, self.beta
        good, reason = self.can_calibrate()
        nats = self.rounding
        (lower, least), (upper, most) = self.lower(), self.upper()
        given = self._marginal(marginal) if self.conditioned else None
        reward = self._over_fit(sample.reward)
        kl = self._over_fit(-sample.ratio)
        fitted = self._over_fit(self.w)
        log_z = self.log_z
        if given is not None:
            kl = kl.plus(self._over_fit(sample.log_likelihood), -1.0).plus(given)
            fitted, log_z = fitted.plus(given, -1.0), log_z.plus(given, -1.0)
            shift = est.interval(given, nats)  # its own conservative interval widens the limits
            lower, least = _subtract(lower, shift), least - shift.conservative_upper
            upper, most = None if upper is None else _subtract(upper, shift), most - shift.conservative_lower
        evidence = est.interval(log_z, nats, calibrated=good)._replace(
            conservative_lower=least, conservative_upper=most
        )
        objective = est.interval(fitted, nats)
        evidence, objective = in_order(evidence, objective, known=self.known)
        reverse = gap_interval(est.interval(self.reverse(), nats, calibrated=good), evidence, objective, good=good)
        ess, khat = worth_of(self.w[: sample.num_fit])
        forward = est.interval(self.forward(), nats, calibrated=good)
        if not good:
            forward = forward._replace(conservative_lower=np.zeros(()), conservative_upper=np.asarray(np.inf))
        prior = slice(sample.num_fit, None)
        if self.conditioned:
            start = weighted_start(sample.reward[prior], sample.log_likelihood[prior])
        else:
            start = mean_interval(sample.reward[prior] if self.rewarded else sample.log_likelihood[prior])
        return Evidence(
            beta=np.asarray(scale) if self.rewarded else None,
            method="rejection" if self.exact_draws.min() >= MIN_EXACT and method == "importance" else method,
            lower=lower,
            upper=upper,
            caveat=reason,
            log_evidence=evidence,
            by_context=_shaped(est.by_context(log_z, nats), shape),
            log_marginal=None if given is None else est.interval(given, nats, calibrated=good),
            optimum=evidence * scale,
            prior_objective=start,
            objective=objective * scale,
            reward=est.interval(reward, nats * scale),
            kl=est.interval(kl, nats),
            gap=reverse * scale,
            kl_reverse=reverse,
            kl_forward=forward,
            ess=np.asarray(ess),
            khat=np.asarray(khat),
            missed_mass=np.asarray(self.missed() if good or self.exact_draws.min() >= MIN_EXACT else math.nan),
            num_samples=len(sample.reward),
            num_weighed=sample.num_fit,
        )

    def _marginal(self, known: np.ndarray | None) -> InfluenceEstimate:
        """Estimate log p(y) from the same draws, per context."""
        if known is not None:
            return InfluenceEstimate(known, np.zeros_like(self.w))
        log_weight = np.log(np.maximum(self.of_prior, 1e-300)) + self.sample.log_likelihood
        top = log_weight.max(0)
        found = self.estimator.plain(np.exp(log_weight - top))
        return InfluenceEstimate(np.log(found.mean) + top, found.influence / found.mean)


def worth_of(log_weights: np.ndarray) -> tuple[float, float]:
    """Return what draws of a fit are worth as draws of p*: least effective number and greatest Pareto k̂ over contexts.

    k̂ is nan if the tails are tied or constant; both are nan if no context has only finite weights.

    Args:
        log_weights: w of the fit's own draws, [draws, contexts], nats.
    """
    finite = np.isfinite(log_weights).all(0)
    if not finite.any():
        return math.nan, math.nan
    weights = np.exp(log_weights[:, finite] - log_weights[:, finite].max(0))
    chosen = np.unique(np.linspace(0, weights.shape[1] - 1, _TAIL_CONTEXTS).astype(int))
    found = [k for k in (_pareto_khat(weights[:, c]) for c in chosen) if not math.isnan(k)]
    return float((weights.sum(0) ** 2 / (weights**2).sum(0)).min()), max(found, default=math.nan)


def _pareto_khat(weights: np.ndarray) -> float:
    """Return Pareto k̂ of importance weights; nan if their tail is tied or constant and so has no shape."""
    tail = np.sort(weights)[-max(int(3 * math.sqrt(len(weights))), 20) :]
    if len(np.unique(tail)) < len(tail) // 2 or tail[-1] <= 0:
        return math.nan
    return pareto_shape(np.log(np.maximum(weights, 1e-300) / tail[-1]))


def _subtract(estimate: Estimate, other: Interval) -> Estimate:
    return Estimate(estimate.mean - other.mean, np.hypot(estimate.se, other.se))


def in_order(evidence: Interval, objective: Interval, *, known: bool) -> tuple[Interval, Interval]:
    """Enforce J ≤ J*: if noise or rounding breaks it, correct the one that was estimated from draws."""
    if known:
        return evidence, at_most(objective, evidence.mean)
    mean = np.maximum(evidence.mean, objective.mean)
    return evidence._replace(mean=mean, upper=np.maximum(evidence.upper, mean)), objective


def at_most(objective: Interval, optimum: np.ndarray) -> Interval:
    """Cap J at the known J*, both in the same units."""
    mean = np.minimum(objective.mean, optimum)
    return objective._replace(
        mean=mean,
        lower=np.minimum(objective.lower, mean),
        conservative_lower=np.minimum(objective.conservative_lower, mean),
    )


def gap_interval(found: Interval, evidence: Interval, objective: Interval, *, good: bool) -> Interval:
    """Return log Z − E_q[w] of the same log Z and E_q[w]; if the draws cannot be trusted, the bracket minus it.

    Without an upper side of log Z only one end exists: the lower limit of log Z minus E_q[w], with its error.
    """
    found = found._replace(mean=evidence.mean - objective.mean)
    if good:
        return found._replace(
            lower=np.maximum(found.lower, 0.0), conservative_lower=np.maximum(found.conservative_lower, 0.0)
        )
    if not np.isfinite(evidence.conservative_upper):
        floor = np.maximum(evidence.conservative_lower - objective.mean, 0.0)
        return found._replace(
            mean=np.asarray(np.nan),
            se=objective.se,
            conservative_lower=floor,
            conservative_upper=evidence.conservative_upper,
        )
    floor = np.maximum(evidence.conservative_lower - objective.conservative_upper, 0.0)
    return found._replace(
        conservative_lower=floor, conservative_upper=evidence.conservative_upper - objective.conservative_lower
    )


def _shaped(interval: Interval, shape: tuple[int, ...]) -> Interval:
    return Interval(*(part.reshape(shape) for part in interval))

"""The evidence of one fit with another regulariser than KL: exactly, or from draws through the dual problem.

For every λ, weak duality gives J* = max E_q[R] − β·D_f(q‖π₀) ≤ λ + β·E_π₀[f*((R − λ)/β)], with equality at the λ of the
optimum q = π₀·t, t = (f*)′((R − λ)/β). And by Fenchel and Young each term of

    J* − J(q) = β·E_π₀[f*(s) + f(q/π₀) − s·q/π₀],  s = (R − λ)/β,

is at least 0, and 0 where q is the optimum: there the estimated gap has no noise.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from bayesrl.core.programs import Programs
from bayesrl.core.structure import Structure
from bayesrl.diagnostics.evidence.by_sampling import check_rewards, draw_until, is_sharp
from bayesrl.diagnostics.evidence.confidence_limits import LEVEL, bounded_upper, mean_interval
from bayesrl.diagnostics.evidence.mixture_sample import MixtureSample
from bayesrl.diagnostics.evidence.result import Evidence
from bayesrl.diagnostics.evidence.stratified_estimator import StratifiedEstimator
from bayesrl.diagnostics.evidence.tempered_sample import MIN_ESS, Bounds, at_most, gap_interval, in_order, worth_of
from bayesrl.errors import EngineError
from bayesrl.exact.evaluation import evaluate_exactly
from bayesrl.exact.regularizers import Regularizer, find_multiplier, make_regularizer, refuse_unregularized
from bayesrl.exact.weighted_draws import WeightedDraws
from bayesrl.posterior.posterior import Posterior
from bayesrl.statistics.definitions import RegularizerName, is_control
from bayesrl.statistics.estimates import Estimate, InfluenceEstimate, Interval, mean_of_draws
from bayesrl.typing import Params

_CANDIDATES = 12
"""How many λ share the error probability of the limit; a larger λ has a smaller range."""

_MAX_UNSEEN = 0.02
_EPS = float(np.finfo(np.float32).eps)
_LEAST_LOG_WEIGHT = -700.0


class Chosen(NamedTuple):
    """The regulariser of a fit, other than KL."""

    name: RegularizerName
    alpha: float | None
    f: Regularizer

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> "Chosen | None":
        """Read it from the settings of a fit; None for KL."""
        name, alpha = settings.get("regularizer", "kl"), settings.get("alpha")
        f = make_regularizer(name, alpha)
        return None if f is None else cls(name, alpha, f)

    @property
    def told(self) -> dict[str, Any]:
        """What the evidence tells of it."""
        return {"regularizer": self.name, "alpha": self.alpha}

    def refuse(self, structure: Structure, method: str) -> None:
        """Refuse programs without an optimum that we know, and methods that are of p* of KL.

        Raises:
            EngineError: naming the site or the method.
        """
        refuse_unregularized(structure, self.name)
        data = structure.names("observed")
        if data:
            raise EngineError(
                f"site {data[0]!r} is observed, and the prior given the data has an unknown factor, which cancels from "
                f"KL alone; regularizer={self.name!r} needs a policy without data"
            )
        if method not in ("auto", "enumeration", "dual"):
            raise EngineError(
                f"method={method!r} finds log Z, and the optimum with regularizer={self.name!r} has none; "
                "use method='auto', 'enumeration' or 'dual'"
            )


def weigh_regularized(
    log_ratio: np.ndarray, reward: np.ndarray, multiplier: np.ndarray, beta: float, f: Regularizer
) -> np.ndarray:
    """Return log p*/q of draws of q from log q/π₀ and R, [draws, contexts]; nearly −inf where p* is 0."""
    with np.errstate(divide="ignore", over="ignore"):
        log_target = np.log(f.ratio(f.origin - (reward - multiplier) / beta))
    return np.asarray(np.maximum(log_target - log_ratio, _LEAST_LOG_WEIGHT))


def bracket_regularized_exactly(
    programs: Programs, params: Params, beta: float, target: WeightedDraws, max_count: int, chosen: Chosen
) -> Evidence:
    """Compute J* and J of one fit whose optimum at this temperature is `target`."""
    found = evaluate_exactly(programs, params, beta, max_count, regularizer=chosen.name, alpha=chosen.alpha)
    assert target.optimum is not None
    assert found.divergence is not None
    optimum = float(target.optimum.mean())
    objective = min(float(found.objective.mean()), optimum)
    both, nothing = Estimate(np.asarray(optimum / beta), np.zeros(())), np.asarray(np.nan)
    return Evidence(
        beta=np.asarray(beta),
        method="enumeration",
        lower=both,
        upper=both,
        caveat="",
        log_evidence=None,
        log_marginal=None,
        optimum=Interval.exact(optimum),
        prior_objective=Interval.exact(found.prior_objective.mean()),
        objective=Interval.exact(objective),
        reward=Interval.exact(found.reward.mean()),
        kl=Interval.exact(found.kl.mean()),
        gap=Interval.exact(optimum - objective),
        kl_reverse=None,
        kl_forward=Interval.exact(max(float(found.kl_forward.mean()), 0.0)),
        ess=nothing,
        khat=nothing,
        missed_mass=np.asarray(found.missed_mass.mean()),
        num_samples=0,
        divergence=Interval.exact(found.divergence.mean()),
        **chosen.told,
    )


def bracket_by_dual(
    structure: Structure,
    beta: float,
    draw: Callable[[int], MixtureSample],
    num_samples: int,
    bounds: Bounds,
    chosen: Chosen,
) -> Evidence:
    """Bracket one fit from its draws and those of the prior: fewer than `num_samples` if they settle the gap."""

    def find(num: int) -> Evidence:
        sample = draw(num)
        check_rewards(structure, sample.reward, bounds)
        return DualSample(sample, beta, chosen, bounds).evidence()

    return draw_until(find, is_sharp, num_samples)


class DualSample:
    """One sample of fit and prior, in the dual problem of one temperature.

    Args:
        sample: draws of fit and prior.
        beta: reward units per nat.
        chosen: the regulariser.
        bounds: bounds on what a draw can earn.
    """

    def __init__(self, sample: MixtureSample, beta: float, chosen: Chosen, bounds: Bounds) -> None:
        self.sample, self.beta, self.chosen, self.f = sample, beta, chosen, chosen.f
        self.bound = np.asarray(bounds.reward) * np.ones(sample.reward.shape[1])
        self.of_q, self.of_prior = sample.ratios
        self.estimator = StratifiedEstimator(self.of_q[None] - 1, 2)
        # Mass 1 is that of q in these draws too, so that λ has no noise where q is the optimum.
        self.multiplier = find_multiplier(sample.reward, beta, self.of_prior / self.of_q.sum(0), self.f, chosen.name)
        with np.errstate(divide="ignore", over="ignore"):
            at = self._at(sample.reward, self.multiplier)
            self.conjugate, self.t = self.f.conjugate(at), self.f.ratio(at)
        self.never = bool((sample.reward[: sample.num_fit] == -np.inf).any())
        # J is −∞ where these are; averages are of the rest.
        self.reward = self.of_q * np.where((self.of_q > 0) & np.isfinite(sample.reward), sample.reward, 0.0)
        divergence = self.f.divergence(-sample.ratio, self.of_prior, self.of_q)
        self.infinite = not np.isfinite(divergence).all()
        self.divergence = np.where(np.isfinite(divergence), divergence, 0.0)

    def _at(self, reward: np.ndarray, multiplier: np.ndarray) -> np.ndarray:
        """The argument of `Regularizer.ratio` and `Regularizer.conjugate`."""
        return np.asarray(self.f.origin - (reward - multiplier) / self.beta)

    @property
    def rounding(self) -> float:
        """Possible error of single precision, reward units."""
        summed = (self.sample.log_prior, self.sample.log_q, self.sample.reward / self.beta)
        finite = [np.abs(x[np.isfinite(x)]).mean() for x in summed]
        return self.beta * (2 * _EPS * float(np.sum(finite)) + float(self.sample.doubt.mean()))

    @property
    def bounded(self) -> bool:
        """Whether every context has a bound on its rewards."""
        return bool(np.isfinite(self.bound).all())

    @cached_property
    def ess(self) -> float:
        """Effective number of draws as draws of the optimum, least over contexts."""
        weight = np.where(self.t > 0, self.of_prior * self.t, 0.0)
        return float((weight.sum(0) ** 2 / (weight**2).sum(0)).min())

    def can_calibrate(self, se: float) -> tuple[bool, str]:
        """Return whether the standard error of J* can be trusted, and if not, why."""
        if self.ess < MIN_ESS:
            return False, f"draws of the fit and of the prior together are worth only {self.ess:.0f} of p*"
        if not self.bounded:
            return False, "no upper bound of the rewards is proven or given, and modes that no draw has seen may exist"
        with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
            room = self.f.conjugate(self._at(self.bound, self.multiplier)) - self.conjugate.min(0)
        if np.isfinite(room).all():
            if float((self.sample.unseen_prior() * room).mean()) <= _MAX_UNSEEN:
                return True, ""
            # What no draw of the prior has seen holds at most −log(level)/n of it: here less than half an error of J*.
            if -math.log(LEVEL) / self._num_prior * self.beta * float(room.max()) < 0.5 * se:
                return True, ""
        return False, "only conservative limits are given: too much of the prior is unseen to exclude a small mode"

    @property
    def _num_prior(self) -> int:
        return len(self.sample.reward) - self.sample.num_fit

    # ---- the bound from above ----------------------------------------------------------------

    def upper(self) -> tuple[Estimate | None, float]:
        """Estimate a bound on J* at a λ from other draws, and a limit without a standard error; means over contexts."""
        if not self.bounded:
            return None, math.inf
        pilot = np.arange(len(self.sample.reward)) % self.sample.num_fit < self.sample.num_fit // 4
        weight = self.of_prior[pilot] / self.of_q[pilot].sum(0)
        root = find_multiplier(self.sample.reward[pilot], self.beta, weight, self.f, self.chosen.name)
        limits, first = [], None
        for share in np.linspace(0, 1, _CANDIDATES):
            multiplier = self._between(root, share)
            with np.errstate(divide="ignore", over="ignore"):
                value = self.f.conjugate(self._at(self.sample.reward, multiplier))
                top = self.f.conjugate(self._at(self.bound, multiplier))
            # Less than the least of the pilot counts as that much, which only raises the bound.
            floor = value[pilot].min(0) if not self.f.finite_at_zero else np.full_like(root, -self._at_zero)
            pairs = self._pairs(np.maximum(value, floor) - floor, ~pilot)
            limit = bounded_upper(pairs, 2 * (top - floor), LEVEL / _CANDIDATES / len(root))
            limits.append(multiplier + self.beta * (floor + limit))
            if first is None:
                first = mean_of_draws((multiplier + self.beta * (floor + pairs)).mean(1))
        assert first is not None
        best = np.minimum(np.min(limits, axis=0), self.bound)
        return Estimate(first.mean / self.beta, first.se / self.beta), float(best.mean()) + self.rounding

    def _between(self, root: np.ndarray, share: float) -> np.ndarray:
        """A λ that is valid for every reward up to the bound B, from the root (0) to B itself (1)."""
        if not self.f.bounded:
            return root + share * (self.bound - root)
        # f* is finite where (B − λ)/β stays below the limit of f′, and large just below it: go by the distance.
        least = np.clip(self._at(self.bound, root), 1e-4 * self.f.limit, self.f.limit)
        return np.asarray(self.bound - self.beta * (self.f.limit - least ** (1 - share) * self.f.limit**share))

    @property
    def _at_zero(self) -> float:
        return float(self.f.value(np.zeros(())))

    def _pairs(self, values: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """Average π₀/m times values over pairs of one draw of the fit and one of the prior."""
        weighed = self.of_prior * np.where(self.of_prior > 0, values, 0.0)
        k = self.sample.num_fit
        return np.asarray((weighed[:k][rows[:k]] + weighed[k : 2 * k][rows[k : 2 * k]]) / 2)

    # ---- averages ----------------------------------------------------------------------------

    def _regress(self, terms: np.ndarray) -> InfluenceEstimate:
        return self.estimator.regress(terms)[0]

    def _forward(self, doubt: float, *, good: bool) -> tuple[Interval, float]:
        """KL(p*‖q) = E_p*[u], u = log p*/q, from terms that are at least 0; and the mass of p* where u > log 10."""
        mass = np.where(self.t > 0, self.of_prior * self.t, 0.0)
        with np.errstate(divide="ignore", invalid="ignore"):
            u = np.where(mass > 0, np.log(self.t) + self.sample.ratio, 0.0)
        missed = float((mass * (u > math.log(10))).mean())
        if np.isinf(u).any():  # q never draws what p* does
            return Interval.exact(np.inf), missed
        found = self.estimator.plain(np.maximum(mass * (u - 1) + self.of_q, 0.0))
        forward = self.estimator.interval(found, doubt, calibrated=good)
        if not good:
            forward = forward._replace(conservative_lower=np.zeros(()), conservative_upper=np.asarray(np.inf))
        return forward, missed

    def evidence(self) -> Evidence:
        """Combine the answers; scalars are averages over contexts."""
        est, sample, doubt, beta = self.estimator, self.sample, self.rounding, self.beta
        dual = self._regress(beta * self.of_prior * np.where(self.of_prior > 0, self.conjugate, 0.0))
        dual = InfluenceEstimate(self.multiplier + dual.mean, dual.influence)
        good, reason = self.can_calibrate(float(est.interval(dual, 0.0).se))
        upper, most = self.upper()
        fitted = self._regress(self.reward - beta * self.divergence)
        objective = est.interval(fitted, doubt)
        divergence = (
            Interval.exact(np.inf) if self.infinite else est.interval(self._regress(self.divergence), doubt / beta)
        )
        reward = Interval.exact(-np.inf) if self.never else est.interval(self._regress(self.reward), doubt)
        with np.errstate(invalid="ignore"):
            kl = est.interval(self._regress(self.of_q * np.where(self.of_q > 0, -sample.ratio, 0.0)), doubt / beta)
        apart = est.interval(dual.plus(fitted, -1.0), doubt, calibrated=good)
        lost = self.never or self.infinite
        if lost:
            objective = Interval.exact(-np.inf)
        optimum = est.interval(dual, doubt, calibrated=good)._replace(
            conservative_lower=objective.conservative_lower, conservative_upper=np.asarray(most)
        )
        optimum, objective = in_order(optimum, objective, known=False)
        if np.isfinite(most):
            optimum = optimum._replace(mean=np.asarray(np.minimum(optimum.mean, most)))
            objective = at_most(objective, optimum.mean)
        gap = Interval.exact(np.inf) if lost else gap_interval(apart, optimum, objective, good=good)
        forward, missed = self._forward(doubt / beta, good=good)
        own = slice(0, sample.num_fit)
        ess, khat = worth_of(weigh_regularized(-sample.ratio[own], sample.reward[own], self.multiplier, beta, self.f))
        return Evidence(
            beta=np.asarray(beta),
            method="dual",
            lower=Estimate(objective.mean / beta, objective.se / beta),
            upper=upper,
            caveat=reason,
            log_evidence=None,
            log_marginal=None,
            optimum=optimum,
            prior_objective=mean_interval(sample.reward[sample.num_fit :]),
            objective=objective,
            reward=reward,
            kl=kl,
            gap=gap,
            kl_reverse=None,
            kl_forward=forward,
            ess=np.asarray(ess),
            khat=np.asarray(khat),
            missed_mass=np.asarray(missed if good else math.nan),
            num_samples=len(sample.reward),
            num_weighed=sample.num_fit,
            divergence=divergence,
            **self.chosen.told,
        )


def known_optimum(found: Evidence, target: WeightedDraws) -> Evidence:
    """Put an exact J* in the place of an estimated one, where J of the fit is from draws."""
    assert target.optimum is not None
    assert found.beta is not None
    optimum = np.asarray(target.optimum.mean())
    objective = at_most(found.objective, optimum)
    ends = (objective.upper, objective.lower, objective.conservative_upper, objective.conservative_lower)
    gap = Interval(optimum - objective.mean, objective.se, *(np.maximum(optimum - end, 0.0) for end in ends))
    side = Estimate(optimum / found.beta, np.zeros(()))
    return replace(
        found,
        method="enumeration",
        lower=side,
        upper=side,
        caveat="",
        optimum=Interval.exact(optimum),
        objective=objective,
        gap=gap,
    )


def weigh_own_draws(
    row: Evidence, posterior: Posterior, index: int, chosen: Chosen | None, target: WeightedDraws | None
) -> Evidence:
    """Weigh the draws that a fit carries, unless its evidence weighed draws already or weights mean nothing."""
    best = posterior if posterior.num_restarts == 1 else posterior.select(restart="best")
    # Nature's luck and discounts move the weights whatever the fit, so they would not judge it.
    meaningless = is_control(best._programs_for().structure) or posterior.mixture is not None
    other = row.best_of is not None or (chosen is not None and target is None)
    if row.num_weighed or meaningless or not best.statistics or other:
        return row
    draw = len(best.batch_shape)

    def of_row(name: str) -> np.ndarray:
        values = np.asarray(best.statistics[name], float)
        return values.reshape(-1, values.shape[draw], math.prod(values.shape[draw + 1 :]))[index]

    if chosen is None:
        weights = of_row("log_weight")
    else:
        one = None if target is None else target.select(float(row.beta))  # type: ignore[arg-type]
        assert one is not None
        assert one.multiplier is not None
        ratio, root = of_row("log_q") - of_row("log_prior"), one.multiplier.reshape(-1)
        weights = weigh_regularized(ratio, of_row("total_reward"), root, float(row.beta), chosen.f)  # type: ignore[arg-type]
    ess, khat = worth_of(weights)
    return replace(row, ess=np.asarray(ess), khat=np.asarray(khat), num_weighed=len(weights))

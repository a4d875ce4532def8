"""Regularisers other than KL: the optimum of E[R] − β·D_f(q‖π₀) on a table, by one root per context."""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from scipy.special import logsumexp, wrightomega, xlogy

from bayesrl.core.structure import Structure
from bayesrl.errors import EngineError
from bayesrl.exact.backward_induction import ProgramStage, Solution
from bayesrl.exact.tabulation import name_context
from bayesrl.statistics.definitions import RegularizerName

_MOST_HALVINGS = 2000


class Regularizer(NamedTuple):
    """A convex generator f with f(1) = f′(1) = 0.

    Attributes:
        value: f(t).
        descent: c − f′(t), where c is the limit of f′ at infinity, or 0 if f′ grows without bound.
        ratio: the inverse of `descent`, clipped at 0. Close to the limit of f′ only the distance from it has digits.
        conjugate: f*(c − v) = max over t ≥ 0 of t·(c − v) − f(t), as a function of v; attained at `ratio(v)`.
        limit: the limit of f′ at infinity; inf if it grows without bound.
        finite_at_zero: whether f(0) is finite, so that an action of the prior may be left out.
    """

    value: Callable[[np.ndarray], np.ndarray]
    descent: Callable[[np.ndarray], np.ndarray]
    ratio: Callable[[np.ndarray], np.ndarray]
    conjugate: Callable[[np.ndarray], np.ndarray]
    limit: float
    finite_at_zero: bool

    @property
    def bounded(self) -> bool:
        """Whether f′ has a limit at infinity."""
        return math.isfinite(self.limit)

    @property
    def origin(self) -> float:
        """c: `limit`, or 0 without one."""
        return self.limit if self.bounded else 0.0

    def divergence(self, log_ratio: np.ndarray, reference: np.ndarray, policy: np.ndarray) -> np.ndarray:
        """Return π₀·f(q/π₀), from log q/π₀, π₀ and q in any common measure; c·q where π₀ is 0."""
        with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
            inside = reference * self.value(np.exp(np.minimum(log_ratio, 700.0)))
            return np.where(reference > 0, inside, np.where(policy > 0, policy * self.limit, 0.0))


def _jensen_shannon(factor: float) -> Regularizer:
    return Regularizer(
        lambda t: factor * (xlogy(t, t) - (1 + t) * np.log((1 + t) / 2)),
        lambda t: factor * np.log1p(1 / t),
        lambda v: 1 / np.expm1(v / factor),
        lambda v: -factor * (math.log(2) + np.log(-np.expm1(-v / factor))),
        limit=factor * math.log(2),
        finite_at_zero=True,
    )


_BY_NAME = {
    "chi_squared": Regularizer(
        lambda t: (t - 1) ** 2 / 2,
        lambda t: 1 - t,
        lambda v: np.maximum(1 - v, 0.0),
        lambda v: (np.maximum(1 - v, 0.0) ** 2 - 1) / 2,
        limit=math.inf,
        finite_at_zero=True,
    ),
    "chi_squared_kl": Regularizer(
        lambda t: (t - 1) ** 2 / 2 + xlogy(t, t) - t + 1,
        lambda t: 1 - t - np.log(t),
        # wrightomega(x) solves t + log t = x.
        lambda v: wrightomega(1 - v),
        lambda v: wrightomega(1 - v) ** 2 / 2 + wrightomega(1 - v) - 1.5,
        limit=math.inf,
        finite_at_zero=True,
    ),
    "jensen_shannon": _jensen_shannon(0.5),
    "jensen_shannon_sum": _jensen_shannon(1.0),
    "forward_kl": Regularizer(
        lambda t: t - 1 - np.log(t),
        lambda t: 1 / t,
        lambda v: 1 / v,
        lambda v: -np.log(v),
        limit=1.0,
        finite_at_zero=False,
    ),
}


def _alpha_divergence(alpha: float) -> Regularizer:
    def value(t: np.ndarray) -> np.ndarray:
        return np.asarray((t**alpha - alpha * t - (1 - alpha)) / (alpha * (alpha - 1)))

    if alpha < 1:
        return Regularizer(
            value,
            lambda t: t ** (alpha - 1) / (1 - alpha),
            lambda v: ((1 - alpha) * v) ** (1 / (alpha - 1)),
            lambda v: (((1 - alpha) * v) ** (alpha / (alpha - 1)) - 1) / alpha,
            limit=1 / (1 - alpha),
            finite_at_zero=alpha > 0,
        )
    return Regularizer(
        value,
        lambda t: (1 - t ** (alpha - 1)) / (alpha - 1),
        lambda v: np.maximum(1 - (alpha - 1) * v, 0.0) ** (1 / (alpha - 1)),
        lambda v: (np.maximum(1 - (alpha - 1) * v, 0.0) ** (alpha / (alpha - 1)) - 1) / alpha,
        limit=math.inf,
        finite_at_zero=True,
    )


def make_regularizer(name: RegularizerName, alpha: float | None) -> Regularizer | None:
    """Return the generator of a regulariser; None for KL itself.

    Raises:
        EngineError: alpha is missing, or is 0 or 1, where the divergence is a KL.
    """
    if name != "alpha":
        return _BY_NAME.get(name)
    if alpha is None:
        raise EngineError("regularizer='alpha' needs its order; pass alpha=0.5, for instance")
    if alpha in (0.0, 1.0):
        kl, text = ("kl", "KL(q‖π₀)") if alpha == 1 else ("forward_kl", "KL(π₀‖q)")
        raise EngineError(f"alpha={alpha:g} is {text}, whose formula is another; use regularizer={kl!r}")
    return _alpha_divergence(alpha)


def refuse_unregularized(structure: Structure, name: str) -> None:
    """Refuse programs for which only KL has an optimum that we know.

    Raises:
        EngineError: there are environment sites, or no rewards.
    """
    nature = structure.names("environment")
    if nature:
        raise EngineError(
            f"the policy has environment site {nature[0]!r}, and against nature only KL has a soft Bellman equation; "
            f"regularizer={name!r} would need another one: use regularizer='kl', or enumerate each outcome of nature"
        )
    if not structure.names("reward"):
        raise EngineError(
            f"the policy collects no reward, so regularizer={name!r} has nothing to weigh; use regularizer='kl', "
            "whose optimum is the posterior given the data"
        )


def solve_regularized(
    stage: ProgramStage, beta: float, regularizer: Regularizer, name: str, structure: Structure
) -> Solution:
    """Maximise E[R] − β·D_f(q‖π₀) in each context of a table of whole paths.

    q = π₀·t with t = (f′)⁻¹((R − λ)/β), clipped at 0, and λ such that q adds up to 1. λ lies between max R, where no
    t exceeds 1, and max R − β·f′(1/m), where the best assignments alone, of prior mass m, add up to 1.

    Raises:
        EngineError: naming the context, if D_f is infinite for every q without reward −inf, or no λ is found.
    """
    reward = stage.reward[0]
    log_reference = stage.log_prob("action")[0] + stage.likelihood[0]
    log_reference = log_reference - logsumexp(log_reference, axis=0)
    reference = np.exp(log_reference)
    possible = reference > 0
    never = np.flatnonzero((possible & (reward == -np.inf)).any(0))
    if never.size and not regularizer.finite_at_zero:
        raise EngineError(
            f"regularizer={name!r} is infinite{name_context(structure, int(never[0]))}: some assignment has reward "
            "-inf, so the optimum leaves it out, and the divergence of a policy that leaves out an action of the prior "
            "is infinite; use regularizer='kl', 'chi_squared' or 'jensen_shannon', or a large finite penalty"
        )
    # Where f′ is bounded, even a mass too small for double precision may take all, and then there is no root to find.
    counted = log_reference > -np.inf if regularizer.bounded else possible
    best = np.where(counted, reward, -np.inf).max(0)
    some = np.isfinite(best)  # contexts without any are refused by their value, -inf
    loss = np.where(possible, (np.where(some, best, 0.0) - reward) / beta, np.inf)
    loss[:, ~some] = 0.0
    with np.errstate(all="ignore"):
        ratio, root = _ratios_of_mass_one(loss, reference, regularizer, name, structure)
        weight = reference * ratio
        divergence = np.where(possible, reference * regularizer.value(ratio), 0.0).sum(0)
        value = np.where(weight > 0, weight * reward, 0.0).sum(0) - beta * divergence
        log_q = np.where(weight > 0, log_reference + np.log(ratio), -np.inf)
    optimum = np.where(some, value, -np.inf)
    multiplier = np.where(some, best, 0.0) - beta * (regularizer.origin - root)
    return Solution(optimum, [log_q[None]], [optimum[None]], divergence, multiplier)


def find_multiplier(
    reward: np.ndarray, beta: float, weight: np.ndarray, regularizer: Regularizer, name: str
) -> np.ndarray:
    """Find the λ of each context at which weighted draws of π₀, [draws, contexts], have Σ weight·t = 1.

    Raises:
        EngineError: naming the regulariser, if there is none in double precision.
    """
    best = reward.max(0)
    with np.errstate(all="ignore"):
        low, high = _bisect((best - reward) / beta, weight, regularizer)
    if _out_of_range(low, regularizer).any():
        raise EngineError(
            f"regularizer={name!r} has no root λ in double precision at β = {beta:.3g}: f′ is out of range where all "
            "goes to the best draws; use regularizer='kl', or a greater beta"
        )
    return np.asarray(best - beta * (regularizer.origin - (low + high) / 2))


def _out_of_range(low: np.ndarray, regularizer: Regularizer) -> np.ndarray:
    """Whether f′ has no number where the best assignments alone add up to 1, so that no root can be sought."""
    return np.asarray(~np.isfinite(low) | (low == 0 if regularizer.bounded else False))


def _bisect(loss: np.ndarray, reference: np.ndarray, regularizer: Regularizer) -> tuple[np.ndarray, np.ndarray]:
    """Bisect for c − (max R − λ)/β in each context, to the last digit; return both ends, the first with more mass."""
    own = np.where(loss == 0, reference, 0.0).sum(0)
    # Weights of draws may add up to more than 1, and then all t may be below 1.
    low, high = regularizer.descent(1 / own), regularizer.descent(1 / np.maximum(reference.sum(0), 1.0))
    if _out_of_range(low, regularizer).any():
        return low, high
    for _ in range(_MOST_HALVINGS):
        # A bounded f has its root above 0, maybe by orders of magnitude: halve its logarithm. low·high may underflow.
        middle = np.sqrt(low) * np.sqrt(high) if regularizer.bounded else low + (high - low) / 2
        if ((middle <= low) | (middle >= high)).all():
            break
        too_much = (reference * _ratio(regularizer, middle, loss, reference)).sum(0) > 1
        low, high = np.where(too_much, middle, low), np.where(too_much, high, middle)
    return low, high


def _ratio(regularizer: Regularizer, at: np.ndarray, loss: np.ndarray, reference: np.ndarray) -> np.ndarray:
    return np.where(reference > 0, regularizer.ratio(at + loss), 0.0)


def _ratios_of_mass_one(
    loss: np.ndarray, reference: np.ndarray, regularizer: Regularizer, name: str, structure: Structure
) -> tuple[np.ndarray, np.ndarray]:
    """Return t, [assignments, contexts], and the root that gives it, [contexts]."""
    low, high = _bisect(loss, reference, regularizer)
    own = np.where(loss == 0, reference, 0.0).sum(0)
    bad = np.flatnonzero(_out_of_range(low, regularizer))
    if bad.size:
        raise EngineError(
            f"regularizer={name!r} has no root λ in double precision{name_context(structure, int(bad[0]))}: f′ is "
            f"out of range where all goes to the best assignments, of prior mass {own[bad[0]]:.3g}; use "
            "regularizer='kl', or a prior that gives them more"
        )
    # Where f′ is flat, t changes much within the last digit of λ: mix both ends.
    more, less = (_ratio(regularizer, end, loss, reference) for end in (low, high))
    above, below = (reference * more).sum(0) - 1, 1 - (reference * less).sum(0)
    share = np.clip(np.where(above + below > 0, below / (above + below), 1.0), 0.0, 1.0)
    mixed = np.where(share > 0, share * more, 0.0) + np.where(share < 1, (1 - share) * less, 0.0)
    # The mass is 1 by now but for the last digit of λ, which dividing removes.
    return np.asarray(mixed / (reference * mixed).sum(0)), low + (high - low) / 2

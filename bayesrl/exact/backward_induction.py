"""Soft backward induction over the stages of a finite program: the exact optimum, in program order."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.special import logsumexp

from bayesrl.core.structure import Structure
from bayesrl.errors import EngineError, PolicyError
from bayesrl.exact.grid import Axis, SiteScores, digits

# NumPyro clips log 0 to the smallest float; no genuine log-probability is this low.
LOG_ZERO = -1e30
MASS_TOLERANCE = 1e-3
"""How far a sum of single-precision probabilities may be from 1."""


@dataclass(frozen=True)
class ProgramStage:
    """One part of a program as a table: what it may draw in each state, and where that leads.

    Arrays are [states, assignments, contexts], in double precision, contexts flat.

    Attributes:
        axes: the grid of assignments.
        log_probs: log-probability of each axis, [states, *sizes, contexts] with size 1 after its own axis, nats.
        reward: reward units.
        likelihood: log-probability of the observed sites, nats.
        metrics: this part's contribution to each metric that is known per context.
        reached: whether nature and the prior can reach each state, [states, contexts].
        masked: whether a handler masks some site, so that raw scores do not add up to 1.
        following: state of the next stage that each assignment leads to, [states, assignments];
            −1 for assignments of probability zero, None in the last stage.
    """

    axes: tuple[Axis, ...]
    log_probs: tuple[np.ndarray, ...]
    reward: np.ndarray
    likelihood: np.ndarray
    metrics: dict[str, np.ndarray]
    reached: np.ndarray
    masked: bool
    following: np.ndarray | None

    @property
    def sizes(self) -> tuple[int, ...]:
        """Sizes of the axes."""
        return tuple(axis.size for axis in self.axes)

    def log_prob(self, kind: str) -> np.ndarray:
        """Sum the log-probability of the axes of one kind, [states, assignments, contexts]."""
        states, _, contexts = self.reward.shape
        result = np.zeros((states, *self.sizes, contexts))
        for axis, log_prob in zip(self.axes, self.log_probs, strict=True):
            if axis.kind == kind:
                result = result + log_prob
        return result.reshape(self.reward.shape)


def build_stage(axes: tuple[Axis, ...], scores: SiteScores, reached: np.ndarray, structure: Structure) -> ProgramStage:
    """Arrange scores of states × assignments, which run fastest, as a stage with `following` still None.

    Raises:
        PolicyError: in a state that the prior can reach, a reward is NaN or +inf, or a density is NaN.
        EngineError: the prior's probabilities of a site do not add up to 1.
    """
    states, contexts = reached.shape
    sizes = tuple(axis.size for axis in axes)
    log_probs, masked = [], False
    here = reached.reshape(states, *(1,) * len(axes), contexts)
    for k, axis in enumerate(axes):
        column = scores.latent[axis.site]
        # A distribution with a time axis of its own is one axis of the grid, whatever its steps.
        own = column[..., axis.step if column.shape[-1] > 1 else 0] if axis.scanned else column.sum(-1)
        raw = own.reshape(states, *sizes, contexts)
        # The prior cannot read axes that come later, so the first element of those stands for all.
        first = (slice(None),) * (k + 2) + (slice(0, 1),) * (len(axes) - k - 1)
        log_prob, is_masked = _conditional(axis, raw[first].astype(float), here, k + 1)
        masked |= is_masked
        log_probs.append(log_prob)
        here = here & (log_prob > -np.inf)
    shape = (states, math.prod(sizes), contexts)
    ends = np.broadcast_to(here, (states, *sizes, contexts)).reshape(shape)
    reward = sum((_reward(name, r.reshape(shape), ends) for name, r in scores.rewards.items()), np.zeros(shape))
    likelihood = np.zeros(shape)
    for name, value in scores.likelihood.items():
        likelihood += _likelihood(name, value.reshape(shape), ends)
    metrics = {name: np.where(ends, value.reshape(shape), 0.0) for name, value in scores.metrics.items()}
    return ProgramStage(axes, tuple(log_probs), reward, likelihood, metrics, reached, masked, None)


def _conditional(axis: Axis, raw: np.ndarray, here: np.ndarray, at: int) -> tuple[np.ndarray, bool]:
    """Clean the log-probabilities of one axis; check that they add up to 1 in all reachable states."""
    bad = np.isnan(raw) & here
    if bad.any():
        raise PolicyError(
            f"site {axis.site!r} has log-probability nan for {int(bad.sum())} of {bad.size} assignments; "
            "check the parameters of its distribution"
        )
    log_prob = np.where(np.isnan(raw) | (raw <= LOG_ZERO), -np.inf, raw)
    # A masked site scores 0 for every value. Nothing depends on it, so a uniform distribution serves.
    masked = (log_prob == 0).all(at, keepdims=True) & (axis.size > 1)
    log_prob = np.where(masked, -np.log(axis.size), log_prob)
    with np.errstate(divide="ignore"):
        log_mass = logsumexp(log_prob, axis=at, keepdims=True)
        mass = np.exp(log_mass)
    wrong = (np.abs(mass - 1) > MASS_TOLERANCE) & here
    if wrong.any():
        raise EngineError(
            f"the prior's probabilities of site {axis.site!r} add up to {mass[wrong].ravel()[0]:.4g} over the values "
            f"{axis.support[0]} to {axis.support[-1]}; enumeration needs a support that does not depend on earlier "
            "draws, and no handlers.scale around actions or nature"
        )
    # They add up to 1 only in single precision; a high temperature would multiply that error in J* = β·log Z.
    off = np.where(np.isfinite(log_mass) & (np.abs(mass - 1) <= MASS_TOLERANCE), log_mass, 0.0)
    return log_prob - off, bool(masked.any())


def _reward(name: str, value: np.ndarray, ends: np.ndarray) -> np.ndarray:
    bad = (np.isnan(value) | (value == np.inf)) & ends
    if bad.any():
        raise PolicyError(
            f"reward site {name!r} returned {value[bad][0]} for {int(bad.sum())} of {bad.size} assignments; "
            "rewards are finite, or -inf for what must never happen"
        )
    return np.where(ends, value, 0.0).astype(float)


def _likelihood(name: str, value: np.ndarray, ends: np.ndarray) -> np.ndarray:
    bad = np.isnan(value) & ends
    if bad.any():
        raise PolicyError(
            f"observed site {name!r} has log-probability nan for {int(bad.sum())} of {bad.size} assignments; "
            "check the parameters of its distribution"
        )
    return np.where(ends, np.where(value <= LOG_ZERO, -np.inf, value), 0.0).astype(float)


@dataclass(frozen=True)
class Solution:
    """The optimum of a list of stages at one temperature.

    Attributes:
        value: optimal objective, [contexts], reward units; β·log p(y) is part of it.
        joint: log of optimal policy × nature in each stage, [states, assignments, contexts], nats.
        by_state: optimal objective from each stage on, [states, contexts], reward units.
        divergence: D_f(q‖π₀), [contexts], if another regulariser took the place of KL; then `value` is J* itself.
        multiplier: λ, [contexts], reward units, in the same case: q/π₀ = (f′)⁻¹((R − λ)/β).
    """

    value: np.ndarray
    joint: list[np.ndarray]
    by_state: list[np.ndarray]
    divergence: np.ndarray | None = None
    multiplier: np.ndarray | None = None


def solve(stages: Sequence[ProgramStage], beta: float, *, rewarded: bool = True) -> Solution:
    """Solve the stages from last to first; without rewards value/β = log p(y).

    V = β·log Σ_a π₀(a|I)·exp(E[V′|I, a]/β) at actions, expectations at nature's draws.
    """
    joint: list[np.ndarray] = []
    by_state: list[np.ndarray] = []
    value = np.zeros((1, stages[0].reward.shape[-1]))
    for stage in reversed(stages):
        leaf = beta * stage.likelihood
        if rewarded:
            leaf = leaf + stage.reward
        if stage.following is not None:
            leaf = leaf + np.where(stage.following[..., None] < 0, 0.0, value[stage.following])
        value, log_joint = _soft_induction(stage, leaf, beta)
        joint.append(log_joint)
        by_state.append(value)
    return Solution(value[0], joint[::-1], by_state[::-1])


def _soft_induction(stage: ProgramStage, leaf: np.ndarray, beta: float) -> tuple[np.ndarray, np.ndarray]:
    """Return the value [states, contexts] and log(policy × nature) [states, assignments, contexts] of one stage.

    N is nature's probability of everything seen so far, and M is N times the value. Their ratio is the
    value that an agent expects who does not see the hidden draws.
    """
    axes, states, contexts = stage.axes, leaf.shape[0], leaf.shape[-1]
    full = (states, *stage.sizes, contexts)
    M, N = leaf.reshape(full), np.ones((1,) * len(full))
    if any(axis.kind == "environment" for axis in axes):
        N = np.exp(stage.log_prob("environment")).reshape(full)
        with np.errstate(invalid="ignore"):
            # A reward of −∞ that nature never lets happen would be 0·∞.
            M = np.where(N > 0, N * M, 0.0)
    hidden = tuple(1 + k for k, axis in enumerate(axes) if axis.hidden)
    if hidden:
        M, N = M.sum(hidden, keepdims=True), N.sum(hidden, keepdims=True)
    log_joint = np.zeros(full)
    for k in reversed(range(len(axes))):
        if axes[k].kind == "environment":
            log_joint = log_joint + stage.log_probs[k]
            if not axes[k].hidden:
                M, N = M.sum(1 + k, keepdims=True), N.sum(1 + k, keepdims=True)
            continue
        log_prior = _seen(stage, k)
        with np.errstate(divide="ignore", invalid="ignore"):
            scores = log_prior + np.where(N > 0, M / N, 0.0) / beta
            # Relative to the best: beside a score of 1e20 the log of a sum has no digits left for its terms.
            top = scores.max(1 + k, keepdims=True)
            top = np.where(np.isfinite(top), top, 0.0)
            log_sum = logsumexp(scores - top, axis=1 + k, keepdims=True)
            log_value = top + log_sum
            # Where nothing is possible the policy stays the prior's, so that it still adds up to 1.
            log_policy = np.where(np.isfinite(log_value), scores - top - log_sum, log_prior)
            # Nature's later draws are summed out, so N no longer depends on the action but for rounding.
            N = N.max(1 + k, keepdims=True)
            M = np.where(N > 0, N * beta * log_value, 0.0)
        log_joint = log_joint + log_policy
    with np.errstate(divide="ignore", invalid="ignore"):
        value = np.where(N > 0, M / N, 0.0)
    return np.broadcast_to(value.reshape(-1, value.shape[-1]), (states, contexts)), log_joint.reshape(leaf.shape)


def _seen(stage: ProgramStage, k: int) -> np.ndarray:
    """Return the prior log-probability of an action as the agent sees it: it may not depend on hidden draws."""
    log_prior = stage.log_probs[k]
    hidden = tuple(1 + j for j in range(k) if stage.axes[j].hidden)
    if not hidden:
        return log_prior
    reach = stage.reached.reshape(log_prior.shape[0], *(1,) * len(stage.axes), -1)
    for j in range(k):
        reach = reach & (stage.log_probs[j] > -np.inf)
    probability = np.exp(log_prior)
    # −1 and 2 are no probabilities, so states that are never reached do not compare.
    high = np.where(reach, probability, -1.0).max(hidden, keepdims=True)
    low = np.where(reach, probability, 2.0).min(hidden, keepdims=True)
    if (high - low > MASS_TOLERANCE).any():
        drawn = [axis.site for axis in stage.axes[:k] if axis.hidden]
        raise PolicyError(
            f"the prior of action site {stage.axes[k].site!r} reads what nature drew unseen ({drawn}); "
            "make those draws observable=True, or do not use them before the action"
        )
    return np.log(np.maximum(np.where(high < 0, probability.max(hidden, keepdims=True), high), 0.0))


def marginals(stages: Sequence[ProgramStage], solution: Solution) -> list[np.ndarray]:
    """Return the probability of every state and assignment of every stage, [states, assignments, contexts]."""
    contexts = stages[0].reward.shape[-1]
    state = np.ones((1, contexts))
    result = []
    for stage, log_joint in zip(stages, solution.joint, strict=True):
        joint = state[:, None] * np.exp(log_joint)
        result.append(joint)
        if stage.following is not None:
            state = np.zeros((int(stage.following.max()) + 1, contexts))
            goes = stage.following >= 0
            # `+=` would count only one of several assignments that lead to the same state.
            np.add.at(state, stage.following[goes], joint[goes])
    return result


def expectation(weights: Sequence[np.ndarray], values: Sequence[np.ndarray]) -> np.ndarray:
    """Average a sum over stages, [contexts]; values of probability zero do not count, even −inf."""
    return np.asarray(
        sum(
            (np.where(w > 0, v, 0.0) * w).sum((0, 1))  # where w > 0, no value is −inf
            for w, v in zip(weights, values, strict=True)
        )
    )


def sample_rows(
    stages: Sequence[ProgramStage],
    joint: Sequence[np.ndarray],
    rng: np.random.Generator,
    num_draws: int,
    *,
    alike: bool,
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Draw states and assignments of every stage, each [draws, contexts]; the draws are exact and independent.

    If `alike`, all contexts take the draw of the first.
    """
    contexts = stages[0].reward.shape[-1]
    state = np.zeros((num_draws, contexts), int)
    states, rows = [], []
    for stage, log_joint in zip(stages, joint, strict=True):
        row = np.zeros_like(state)
        uniform = rng.random(state.shape)
        for c in range(1 if alike else contexts):
            for s in np.unique(state[:, c]):
                at = np.flatnonzero(state[:, c] == s)
                row[at, c] = inverse_cdf(log_joint[s, :, c], uniform[at, c])
        if alike:
            row = np.broadcast_to(row[:, :1], row.shape)
        states.append(state)
        rows.append(row)
        if stage.following is not None:
            state = stage.following[state, row]
    return states, rows


def inverse_cdf(log_weights: np.ndarray, uniform: np.ndarray) -> np.ndarray:
    """Turn uniform numbers into indices with these log-weights, which need not be normalised."""
    weights = np.exp(log_weights - log_weights.max())
    cumulative = np.cumsum(weights)
    index = np.searchsorted(cumulative, uniform * cumulative[-1], side="right")
    # Rounding can put a number at the very end: clip to the last index of positive weight.
    return np.asarray(np.minimum(index, np.flatnonzero(weights)[-1]))


def axes_and_digits(stages: Sequence[ProgramStage], rows: Sequence[np.ndarray]) -> tuple[tuple[Axis, ...], list[Any]]:
    """Return all axes of all stages, with the joint value of each in the drawn rows."""
    axes = tuple(axis for stage in stages for axis in stage.axes)
    parts = [digits(stage.axes, row) for stage, row in zip(stages, rows, strict=True)]
    return axes, [digit for part in parts for digit in part]

"""Logged data: evaluate a policy, or fit one, from another policy's decisions."""

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jax import Array

from bayesrl.arguments import (
    AnyNumbers,
    AnyNumbersOrNone,
    Count,
    FiniteNumbers,
    FiniteNumbersOrNone,
    FlagsOrNone,
    Level,
    UnitInterval,
    UnusedOption,
    checked,
)
from bayesrl.control.environments.base import Environment, Transition
from bayesrl.control.learning.replay_memory import returns_to_go
from bayesrl.core.primitives import environment
from bayesrl.errors import ControlError

_TOLERANCE = 1e-4


@checked(ControlError)
@dataclass(frozen=True, eq=False)
class LoggedData:
    """Logged decisions, each with its probability under the policy that made it.

    Single decisions are arrays [rows, ...]. Episodes of several steps are [episodes, steps, ...]; those that ended
    early are padded, and `mask` marks the padding.

    Args:
        observation: the observation before each decision: integers, or numbers [..., features].
        action: integers from 0 on.
        reward: reward units.
        propensity: probability of the action under the policy that took it, in (0, 1].
        num_actions: number of actions; by default, one more than the greatest action.
        mask: which rows are decisions, not padding; by default, all.
        discount: γ.

    Raises:
        ControlError: a propensity is missing or not in (0, 1], so the data cannot be corrected for the other policy;
            an action or a reward is out of range; shapes do not fit together.

    Example:
        >>> import numpy as np
        >>> from bayesrl.control import LoggedData
        >>> LoggedData(np.zeros(4, int), [0, 1, 1, 0], [1.0, 0.0, 1.0, 1.0], [0.5, 0.5, 0.5, 0.5]).num_actions
        2
    """

    observation: AnyNumbers
    action: AnyNumbers
    reward: AnyNumbers
    propensity: AnyNumbersOrNone
    num_actions: Count | None = None
    mask: FlagsOrNone = None
    discount: UnitInterval = 1.0

    def __post_init__(self) -> None:
        if self.propensity is None:
            raise ControlError(
                "propensity is None: without the probabilities of the actions nothing can be corrected for; log them, "
                "or estimate them and pass them"
            )
        action = np.asarray(self.action)
        if not np.issubdtype(action.dtype, np.integer) or action.ndim not in (1, 2) or action.size == 0:
            raise ControlError(
                f"action is {action.dtype}{list(action.shape)}; use integers [rows] or [episodes, steps]"
            )
        observed = np.asarray(self.observation)
        if np.issubdtype(observed.dtype, np.integer) and observed.ndim == action.ndim and (observed < 0).any():
            raise ControlError("observation has integers below 0; number what is observed from 0 on")
        if np.issubdtype(observed.dtype, np.floating) and not np.isfinite(observed).all():
            raise ControlError("observation has numbers that are not finite; make them finite, padding too")
        held = np.ones(action.shape, bool) if self.mask is None else np.asarray(self.mask, bool)
        given = {
            "observation": observed,
            "action": action,
            "reward": np.asarray(self.reward, float),
            "propensity": np.asarray(self.propensity, float),
            "mask": held,
        }
        for name, values in given.items():
            if values.shape[: action.ndim] != action.shape or (name != "observation" and values.ndim != action.ndim):
                raise ControlError(f"{name} has shape {values.shape}, and action {action.shape}; use one row for each")
        count = int(action.max()) + 1 if self.num_actions is None else self.num_actions
        reward, propensity = given["reward"], given["propensity"]
        uncorrected = (
            "an action of probability 0 cannot be corrected for; use probabilities in (0, 1], or leave the row out"
        )
        for name, fine, remedy in (
            ("reward", np.isfinite(reward), "make it finite"),
            ("propensity", (propensity > 0) & (propensity <= 1 + _TOLERANCE), uncorrected),
            ("action", (action >= 0) & (action < count), f"use 0 to {count - 1}"),
        ):
            for bad in np.argwhere(held & ~fine)[:1]:
                place = tuple(int(i) for i in bad)
                row = place[0] if len(place) == 1 else place
                raise ControlError(f"{name} of row {row} is {given[name][place]}; {remedy}")
        for name, values in given.items():
            object.__setattr__(self, name, values)
        object.__setattr__(self, "num_actions", count)

    @property
    def num_rows(self) -> int:
        """Number of rows, or of episodes."""
        return len(self.action)


class OffPolicyEstimate(NamedTuple):
    """The value of a policy, estimated from logged data.

    Attributes:
        mean: expected return of an episode, reward units.
        se: its standard error.
        lower: left end of the interval.
        upper: right end of the interval.
        ess: effective number of rows, (Σw)²/Σw², of the last step; if it is small, do not trust the interval.
    """

    mean: float
    se: float
    lower: float
    upper: float
    ess: float


@checked(
    ControlError,
    UnusedOption("values", lambda given: given["method"] != "dr", "only method='dr' has any"),
)
def evaluate_off_policy(
    data: LoggedData,
    probs: FiniteNumbers,
    *,
    method: Literal["ips", "snips", "dr"] = "dr",
    values: FiniteNumbersOrNone = None,
    level: Level = 0.95,
) -> OffPolicyEstimate:
    """Estimate the return of a policy from the decisions of another one.

    With w_t the product of π/propensity up to step t:

        ips    Σ γᵗ·w_t·r_t: unbiased, per decision;
        snips  the same with w_t divided by its mean over rows: consistent, with less variance;
        dr     Σ γᵗ·(w_t·(r_t − q̂_t(a_t)) + w_{t−1}·Σ_a π·q̂_t(a)): unbiased for any q̂, and narrower for a better q̂.

    Intervals treat the mean over rows as Normal, by the delta method for snips; with few effective rows they are too
    narrow.

    Args:
        data: logged decisions.
        probs: action probabilities of the policy at the logged observations, [*rows, actions].
        method: `ips`, `snips` or `dr`.
        values: q̂, the return to come after each action, [*rows, actions], for `dr`; by default, ridge regressions of
            the return to come on the observation, where each fold is predicted from the others.
        level: probability that the interval aims to cover.

    Returns:
        The estimate, with `mean`, `se`, `lower`, `upper` and `ess`.

    Raises:
        ControlError: probs is not a distribution of the right shape; an option is out of range; for snips, no row
            follows actions that the policy might take.

    Example:
        >>> import numpy as np
        >>> from bayesrl.control import LoggedData, evaluate_off_policy
        >>> data = LoggedData(np.zeros(4, int), [0, 1, 1, 0], [1.0, 0.0, 0.0, 1.0], np.full(4, 0.5))
        >>> evaluate_off_policy(data, np.tile([1.0, 0.0], (4, 1)), method="snips").mean
        1.0

    References:
        Per-decision weights: Precup, Sutton & Singh (2000), "Eligibility traces for off-policy policy evaluation".
        Self-normalised weights: Swaminathan & Joachims (2015). dr: Dudík, Langford & Li (2011); Jiang & Li (2016),
        "Doubly robust off-policy value evaluation for reinforcement learning".
    """
    from scipy.special import ndtri

    table = _table("probs", probs, data)
    held, steps, rewards = _by_step(data)
    if (table < -_TOLERANCE).any() or (np.abs(table.sum(-1) - 1) > _TOLERANCE)[held].any():
        raise ControlError("probs is not a distribution in some row; make each row sum to 1")
    taken = np.take_along_axis(table, steps[..., None], -1)[..., 0]
    # Padding has ratio 1, so that an episode that ended early keeps its weight to the last step.
    ratio = np.where(held, taken / np.where(held, data.propensity.reshape(steps.shape), 1.0), 1.0)
    weights = np.cumprod(ratio, 1)
    gammas = data.discount ** np.arange(steps.shape[1])
    num = len(steps)
    if method == "snips":
        means = weights.mean(0)
        if not (means > 0).all():
            raise ControlError(
                f"no row follows the policy up to step {int(np.argmin(means > 0))}, so 'snips' would divide by weights "
                "of mean 0; use method='dr', or logs of a policy that takes such actions"
            )
        each = (weights * rewards / means * gammas).mean(0)
        mean = float(each.sum())
        # Delta method: the influence of each row on a sum of ratios of means.
        spread = (gammas * weights / means * (rewards - (weights * rewards).mean(0) / means)).sum(1)
        se = float(np.sqrt((spread**2).mean() / num))
    else:
        rows = (gammas * weights * rewards).sum(1)
        if method == "dr":
            q = _regressed(data) if values is None else _table("values", values, data)
            chosen = np.take_along_axis(q, steps[..., None], -1)[..., 0]
            before = np.concatenate([np.ones((num, 1)), weights[:, :-1]], 1)
            expected = (table * q).sum(-1)
            rows = rows + (gammas * held * (before * expected - weights * chosen)).sum(1)
        mean, se = float(rows.mean()), float(rows.std(ddof=1) / np.sqrt(num)) if num > 1 else float("nan")
    z = float(ndtri((1 + level) / 2))
    last = weights[:, -1]
    # If no row follows the policy, all weights are 0, and so is ess.
    ess = float(last.sum() ** 2 / max((last**2).sum(), 1e-300))
    return OffPolicyEstimate(mean, se, mean - z * se, mean + z * se, ess)


def _table(name: str, values: Any, data: LoggedData) -> np.ndarray:
    table = np.asarray(values, float)
    wanted = (*data.action.shape, data.num_actions)
    if table.shape != wanted:
        raise ControlError(f"{name} has shape {table.shape}; use {wanted}, one row for each decision")
    return table.reshape(data.num_rows, -1, wanted[-1])


def _by_step(data: LoggedData) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return which steps count, their actions, and their rewards, 0 where they do not, each [rows, steps]."""
    held, action, reward = (x.reshape(data.num_rows, -1) for x in (data.mask, data.action, data.reward))
    return held, action, np.where(held, reward, 0.0)


def _regressed(data: LoggedData, folds: int = 5, penalty: float = 1.0) -> np.ndarray:
    """Predict the return to come by ridge regression on the observation, each fold from the others."""
    # A row that helped to fit q̂ would correlate with its own error, and dr would lose its unbiasedness.
    held, steps, rewards = _by_step(data)
    to_go = returns_to_go(rewards, data.discount)
    features = _features(data).reshape(*held.shape, -1)
    predicted = np.zeros((*held.shape, int(data.num_actions or 1)))
    # Episodes go into a fold as a whole: their steps share rewards.
    fold = np.arange(len(rewards)) % min(folds, max(len(rewards), 2))
    for k in np.unique(fold):
        for a in range(predicted.shape[-1]):
            rows = held & (steps == a) & (fold != k)[:, None]
            x, y = features[rows], to_go[rows]
            center = y.mean() if len(y) else 0.0
            # Centred, so that the penalty pulls towards the mean return, not towards 0.
            weights = np.linalg.solve(x.T @ x + penalty * np.eye(x.shape[-1]), x.T @ (y - center))
            predicted[fold == k, :, a] = center + features[fold == k] @ weights
    return predicted


def _features(data: LoggedData) -> np.ndarray:
    """Compute the inputs of regressions: one-hot integers, or standardised numbers."""
    observed = data.observation
    if np.issubdtype(observed.dtype, np.integer) and observed.ndim == data.action.ndim:
        return np.eye(int(observed.max()) + 1)[observed]
    flat = observed.reshape((*observed.shape[: data.action.ndim], -1)).astype(float)
    scale = flat.reshape(-1, flat.shape[-1]).std(0)
    return (flat - flat.reshape(-1, flat.shape[-1]).mean(0)) / np.where(scale > 0, scale, 1.0)


@checked(ControlError)
class LoggedEnvironment(Environment):
    """Logged decisions as an environment of one step, to fit policies in: `Rollout(LoggedEnvironment(d), 1)`.

    Nature draws a row; the policy sees its observation and chooses; the reward is the doubly robust estimate
    q̂(a) + 1[a = logged]·(r − q̂(a)) / propensity, whose mean is what the policy would earn.

    Args:
        data: single decisions.
        values: q̂, [rows, actions]; by default, that of `evaluate_off_policy`. Zeros give importance weighting.

    Raises:
        ControlError: the data have several steps, or `values` another shape.

    Example:
        >>> import numpy as np
        >>> from bayesrl import control
        >>> data = control.LoggedData(np.zeros(4, int), [0, 1, 1, 0], np.ones(4), np.full(4, 0.5))
        >>> program = control.Rollout(control.LoggedEnvironment(data), horizon=1)

    References:
        Dudík, Langford & Li (2011), "Doubly robust policy evaluation and learning".
    """

    def __init__(self, data: LoggedData, values: FiniteNumbersOrNone = None) -> None:
        if data.action.ndim != 1:
            raise ControlError(
                f"the data are episodes of {data.action.shape[1]} steps; pass single decisions, arrays [rows, ...]"
            )
        q = _regressed(data) if values is None else _table("values", values, data)
        self.data, self.num_actions = data, int(data.num_actions or 1)
        integers = np.issubdtype(data.observation.dtype, np.integer) and data.observation.ndim == 1
        self.num_observations = int(data.observation.max()) + 1 if integers else None
        seen = data.observation.astype(np.int32) if integers else _features(data).astype(np.float32)
        self._seen = jax.device_put(seen)
        logged = np.eye(self.num_actions)[data.action] * (data.reward - q[np.arange(len(q)), 0, data.action])[:, None]
        rewards = q[:, 0] + logged / np.where(data.mask, data.propensity, 1.0)[:, None]
        self._rewards = jax.device_put(rewards.astype(np.float32))
        # Padding is never drawn: 1e-38 stands for 0, whose logarithm NumPyro refuses as a logit.
        self._rows = jax.device_put(np.log(np.where(data.mask, 1.0, 1e-38)).astype(np.float32))

    def reset(self) -> Array:
        """Draw a row."""
        return environment("row", dist.Categorical(logits=self._rows), observable=False)

    def observe(self, state: Array) -> Array:
        """Return the observation of the row."""
        return self._seen[state]

    def step(self, state: Array, action: Array) -> Transition:
        """Return the estimated reward of the action."""
        return Transition(state, self._rewards[state, action], jnp.asarray(True))

    def prior(self, observation: Any) -> dist.Distribution:
        """Return a uniform distribution."""
        return dist.Categorical(logits=jnp.zeros(self.num_actions))

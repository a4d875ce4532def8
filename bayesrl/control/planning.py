"""Exact planning in finite Markov decision processes: soft value iteration, and evaluation of policies."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.sparse as sp
from scipy.sparse.linalg import splu

from bayesrl.control.tabular import TabularMDP
from bayesrl.errors import ControlError

_MAX_SWEEPS = 100_000
_MAX_NEWTON = 100
_FIRST_SWEEPS = 200


@dataclass(frozen=True, eq=False)
class Planned:
    """A policy and what it is worth; in front of all axes stands that of β where it was an array.

    Attributes:
        value: V(s), reward units: [states], or [horizon, states] with a horizon.
        action_value: Q(s, a), reward units, before the KL of its own step: [(horizon,) states, actions].
        policy: π(a | s), [(horizon,) states, actions].
        objective: J = reward − β·kl from the start, reward units.
        reward: E Σ γᵗ·r_t, reward units.
        kl: E Σ γᵗ·KL(π(·|s_t) ‖ π₀(·|s_t)), nats.
        occupancy: E Σ γᵗ·1[s_t = s, a_t = a], expected discounted visits: [(horizon,) states, actions].
    """

    value: np.ndarray
    action_value: np.ndarray
    policy: np.ndarray
    objective: np.ndarray
    reward: np.ndarray
    kl: np.ndarray
    occupancy: np.ndarray


def soft_value_iteration(mdp: TabularMDP, beta: Any, *, tolerance: float = 1e-10) -> Planned:
    """Find the optimum of KL-regularised control exactly.

        V(s) = β·log Σ_a π₀(a|s)·exp(Q(s, a)/β),   Q(s, a) = E[r + γ·V(s′)],   π*(a|s) ∝ π₀(a|s)·exp(Q(s, a)/β).

    With a horizon by backward recursion; else sweeps are followed by Newton steps (soft policy
    iteration), until a step changes no value by more than `tolerance` of its size. β = 0 gives the ordinary optimum.

    Args:
        mdp: the process.
        beta: temperature, reward units per nat, a number or an array [*beta]; 0 is allowed.
        tolerance: relative to the greatest value.

    Returns:
        `Planned`.

    Raises:
        ControlError: β is negative or no number.

    Example:
        >>> from bayesrl.control.classics import river_swim
        >>> from bayesrl.control.planning import soft_value_iteration
        >>> round(float(soft_value_iteration(river_swim(), 0.1).objective), 6)
        2.105631

    References:
        Todorov (2009), "Efficient computation of optimal actions"; Levine (2018), "Reinforcement learning
        and control as probabilistic inference", section 2; Puterman (1994), section 6.4, for policy iteration.
    """
    betas = np.asarray(beta, float)
    if betas.size == 0 or not np.isfinite(betas).all() or (betas < 0).any():
        raise ControlError(f"beta={beta!r}; use numbers of at least 0, in reward units per nat")
    tables = _tables(mdp)
    plans = [tables.plan(float(b), tolerance) for b in betas.reshape(-1)]
    return _stack(plans, betas.shape)


def evaluate_policy(mdp: TabularMDP, policy: Any, beta: Any = 0.0) -> Planned:
    """Find what a policy is worth, exactly: V = Σ_a π(a|s)·(Q(s, a) − β·log(π/π₀)).

    With a horizon by backward recursion, else by one sparse linear system.

    Args:
        mdp: the process.
        policy: probabilities, [states, actions], or [horizon, states, actions] with a horizon.
        beta: temperature, reward units per nat, a number or an array [*beta]; 0 counts the reward alone.

    Returns:
        `Planned`; where the policy does what the prior never does, `kl` is inf and `objective` −inf for β > 0.

    Raises:
        ControlError: the policy is no distribution or has the wrong shape; it never ends though it must.

    Example:
        >>> from bayesrl.control.classics import river_swim
        >>> from bayesrl.control.planning import evaluate_policy
        >>> swim = river_swim()
        >>> float(evaluate_policy(swim, swim.prior, 0.1).kl)
        0.0

    References:
        Puterman (1994), "Markov Decision Processes", section 4.2 and theorem 6.1.1.
    """
    tables = _tables(mdp)
    probs = _checked(mdp, policy)
    betas = np.asarray(beta, float)
    worth = tables.evaluate(probs)
    return _stack([tables.told(probs, worth, float(b)) for b in betas.reshape(-1)], betas.shape)


def _checked(mdp: TabularMDP, policy: Any) -> np.ndarray:
    probs = np.asarray(policy, float)
    shapes: list[tuple[int, ...]] = [(mdp.num_states, mdp.num_actions)]
    if mdp.horizon is not None:
        shapes.append((mdp.horizon, *shapes[0]))
    if probs.shape not in shapes:
        raise ControlError(f"policy has shape {probs.shape}; use {' or '.join(map(str, shapes))}")
    bad = (probs < 0).any(-1) | ~(np.abs(probs.sum(-1) - 1) < 1e-6)
    if bad.any():
        place = tuple(int(i) for i in np.argwhere(bad)[0])
        raise ControlError(f"policy at {place} is {probs[place]}, which is no distribution; make it sum to 1")
    return np.broadcast_to(probs, shapes[-1]) if mdp.horizon is not None else probs


def _tables(mdp: Any) -> "_Tables":
    if not isinstance(mdp, TabularMDP):
        raise ControlError(f"{type(mdp).__name__} is no TabularMDP; make one, or read one with control.from_gymnasium")
    return _Tables(mdp)


class _Tables:
    """A process laid out for linear algebra."""

    def __init__(self, mdp: TabularMDP) -> None:
        self.mdp = mdp
        self.shape = (mdp.num_states, mdp.num_actions)
        self.steps = mdp.transitions()
        self.rewards = mdp.expected_rewards()
        with np.errstate(divide="ignore"):
            self.log_prior = np.log(mdp.prior)
        self.most = np.abs(self.rewards).max()

    def look_ahead(self, value: np.ndarray) -> np.ndarray:
        """Q = E[r + γ·V(s′)], [states, actions]."""
        return self.rewards + self.mdp.discount * (self.steps @ value).reshape(self.shape)

    def soften(self, q: np.ndarray, beta: float) -> tuple[np.ndarray, np.ndarray]:
        """Give V and π of action values."""
        if beta == 0:
            allowed = np.where(self.mdp.prior > 0, q, -np.inf)
            value = allowed.max(-1)
            best = np.isclose(allowed, value[:, None], rtol=1e-10, atol=1e-12)
            return value, best / best.sum(-1, keepdims=True)
        scores = self.log_prior + q / beta
        top = scores.max(-1, keepdims=True)
        weights = np.exp(scores - top)
        total = weights.sum(-1, keepdims=True)
        return beta * (top + np.log(total))[:, 0], weights / total

    def plan(self, beta: float, tolerance: float) -> Planned:
        """Find the optimum at one temperature."""
        if self.mdp.horizon is not None:
            value, policies = np.zeros(self.shape[0]), []
            for _ in range(self.mdp.horizon):
                value, policy = self.soften(self.look_ahead(value), beta)
                value = np.where(self.mdp.terminal, 0.0, value)
                policies.append(policy)
            probs = np.stack(policies[::-1])
        else:
            probs = self._stationary(beta, tolerance)
        return self.told(probs, self.evaluate(probs), beta)

    def _stationary(self, beta: float, tolerance: float) -> np.ndarray:
        """Newton's method on the soft Bellman equation, started by sweeps: each step solves for a policy's value."""
        value = self._sweep(np.zeros(self.shape[0]), beta, tolerance, _FIRST_SWEEPS)
        if self.mdp.discount == 1 and beta == 0:
            # A greedy policy on the way may never end.
            value = self._sweep(value, beta, tolerance, _MAX_SWEEPS)
            return self.soften(self.look_ahead(value), beta)[1]
        _, probs = self.soften(self.look_ahead(value), beta)
        for _ in range(_MAX_NEWTON):
            new = self._worth(probs, beta)
            _, better = self.soften(self.look_ahead(new), beta)
            done = np.abs(new - value).max() <= tolerance * max(np.abs(new).max(), self.most, 1e-300)
            value, probs = new, better
            if done:
                break
        return probs

    def _sweep(self, value: np.ndarray, beta: float, tolerance: float, most: int) -> np.ndarray:
        """Iterate the Bellman equation until it moves no value any more, or so many times."""
        for _ in range(most):
            new = np.where(self.mdp.terminal, 0.0, self.soften(self.look_ahead(value), beta)[0])
            done = np.abs(new - value).max() <= tolerance * max(np.abs(new).max(), self.most, 1e-300)
            value = new
            if done:
                break
        return value

    def _worth(self, probs: np.ndarray, beta: float) -> np.ndarray:
        """Solve for the value of a policy at one temperature, [states]."""
        earned = (probs * self.rewards).sum(-1) - (beta * _divergence(probs, self.mdp.prior) if beta > 0 else 0.0)
        value: np.ndarray = self._factorised(probs).solve(np.where(self.mdp.terminal, 0.0, earned))
        return value

    def _factorised(self, probs: np.ndarray) -> Any:
        """Factorise 1 − γ·P(s′ | s) under a policy."""
        system = sp.eye_array(self.shape[0]) - self.mdp.discount * self._under(probs)
        return splu(system.tocsc())

    def evaluate(self, probs: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Give return and KL to come, [(horizon,) states], and occupancy of states, [(horizon,) states]."""
        alive = ~self.mdp.terminal
        kl = np.where(alive, _divergence(probs, self.mdp.prior), 0.0)
        earned = np.where(alive, (probs * self.rewards).sum(-1), 0.0)
        if self.mdp.horizon is None:
            return self._solve(probs, earned, kl)
        horizon, gamma = self.mdp.horizon, self.mdp.discount
        reward, apart, visits = (np.zeros((horizon + 1, self.shape[0])) for _ in range(3))
        for t in reversed(range(horizon)):
            steps = self._under(probs[t])
            reward[t] = earned[t] + gamma * (steps @ reward[t + 1])
            apart[t] = kl[t] + gamma * (steps @ np.where(np.isinf(apart[t + 1]), np.inf, apart[t + 1]))
        visits[0] = self.mdp.start
        for t in range(horizon):
            visits[t + 1] = gamma * (self._under(probs[t]).T @ visits[t])
        return reward[:-1], apart[:-1], visits[:-1]

    def _solve(
        self, probs: np.ndarray, earned: np.ndarray, kl: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        endless = np.isinf(kl)
        columns = np.stack([earned, np.where(endless, 0.0, kl), endless.astype(float)], 1)
        try:
            factors = self._factorised(probs)
            found, visits = factors.solve(columns), factors.solve(self.mdp.start, trans="T")
        except RuntimeError:  # the matrix is singular
            found = visits = np.full((1, 1), np.nan)
        if not np.isfinite(found).all():
            raise ControlError(
                "the policy may go on for ever, and with discount 1 its return has no end; "
                "pass a horizon or a discount below 1, or let it reach a terminal state"
            )
        return found[:, 0], np.where(found[:, 2] > 1e-12, np.inf, found[:, 1]), visits

    def _under(self, probs: np.ndarray) -> sp.csr_array:
        """P(s′ | s) under a policy, [states, states]; nothing leaves a terminal state."""
        states, actions = self.shape
        rows = np.repeat(np.arange(states), actions)
        mix = sp.csr_array((probs.ravel(), (rows, np.arange(states * actions))), shape=(states, states * actions))
        return mix @ self.steps

    def told(self, probs: np.ndarray, worth: tuple[np.ndarray, np.ndarray, np.ndarray], beta: float) -> Planned:
        """Lay out what a policy is worth at one temperature."""
        reward, kl, visits = worth
        value = reward if beta == 0 else reward - beta * kl
        first = (lambda x: x) if self.mdp.horizon is None else (lambda x: x[0])
        began = self.mdp.start > 0
        total, apart = (float(self.mdp.start[began] @ first(x)[began]) for x in (reward, kl))
        if self.mdp.horizon is None:
            q = self.look_ahead(np.where(np.isfinite(value), value, 0.0))
        else:
            following = np.concatenate([value[1:], np.zeros((1, self.shape[0]))])
            q = np.stack([self.look_ahead(np.where(np.isfinite(v), v, 0.0)) for v in following])
        occupancy = visits[..., None] * np.where(self.mdp.terminal[:, None], 0.0, probs)
        objective = total if beta == 0 else total - beta * apart
        told = (np.asarray(objective), np.asarray(total), np.asarray(apart))
        return Planned(value, q, np.asarray(probs), told[0], told[1], told[2], occupancy)


def _divergence(probs: np.ndarray, prior: np.ndarray) -> np.ndarray:
    """KL(π ‖ π₀) of each state, nats; inf where the policy does what the prior never does."""
    with np.errstate(divide="ignore", invalid="ignore"):
        terms = np.where(probs > 0, probs * (np.log(probs) - np.log(prior)), 0.0)
    result: np.ndarray = np.maximum(terms.sum(-1), 0.0)
    return result


def _stack(plans: list[Planned], lead: tuple[int, ...]) -> Planned:
    names = ("value", "action_value", "policy", "objective", "reward", "kl", "occupancy")
    arrays = [np.stack([getattr(plan, name) for plan in plans]) for name in names]
    return Planned(*(array.reshape(lead + array.shape[1:]) for array in arrays))

"""Exact planning in finite Markov decision processes: soft value iteration, and evaluation of policies."""

from dataclasses import dataclass, fields
from typing import Any, ClassVar

import numpy as np
import scipy.sparse as sp
from scipy.sparse.linalg import splu

from bayesrl.arguments import AnyNumbers, Level, check_memory, checked
from bayesrl.control.environments.tabular import TabularMDP, as_floats, can_reach
from bayesrl.errors import ControlError
from bayesrl.typing import BetaOrZero

_MAX_NEWTON = 300
_FIRST_SWEEPS = 200
_MAX_DIRECT = 2_000
_KRYLOV_STEPS = 60
_KRYLOV_ROUNDS = 4
_RESIDUAL = 1e-14
_TIE_TOLERANCE = 1e-12
_UNBOUNDED = 1e14


@dataclass(frozen=True, eq=False)
class PlanResult:
    """A policy and its value; an array of β adds its axes in front.

    Attributes:
        value: V(s), reward units: [states], or [horizon, states] with a horizon.
        action_value: Q(s, a), reward units, before the KL of its own step: [(horizon,) states, actions].
        policy: π(a | s), [(horizon,) states, actions].
        objective: J = reward − β·kl from the start, reward units.
        reward: E Σ γᵗ·r_t, reward units.
        kl: E Σ γᵗ·KL(π(·|s_t) ‖ π₀(·|s_t)), nats.
        occupancy: E Σ γᵗ·1[s_t = s, a_t = a], expected discounted visits: [(horizon,) states, actions].
    """

    GIVEN_BY: ClassVar[str] = "as control.soft_value_iteration gives it"

    value: np.ndarray
    action_value: np.ndarray
    policy: np.ndarray
    objective: np.ndarray
    reward: np.ndarray
    kl: np.ndarray
    occupancy: np.ndarray


@checked(ControlError)
def soft_value_iteration(mdp: TabularMDP, beta: BetaOrZero, *, tolerance: Level = 1e-10) -> PlanResult:
    """Solve KL-regularised control exactly.

        V(s) = β·log Σ_a π₀(a|s)·exp(Q(s, a)/β),   Q(s, a) = E[r + γ·V(s′)],   π*(a|s) ∝ π₀(a|s)·exp(Q(s, a)/β).

    A horizon is solved by backward recursion. Without one, sweeps come first and then Newton steps (soft policy
    iteration), until a step changes no value by more than `tolerance` of the greatest. β = 0 gives the ordinary
    optimum over the prior's actions, with ties split evenly; with discount 1, over policies that surely end.

    Args:
        mdp: the process.
        beta: temperature, reward units per nat, a number or an array [*beta]; 0 is allowed.
        tolerance: relative to the greatest value; Newton steps converge quadratically, so the final error is far
            smaller.

    Raises:
        ControlError: β is negative or not a number; the tolerance is not in (0, 1); with discount 1, the optimum has
            no bound because going on for ever pays; the Newton steps do not converge.

    Example:
        >>> from bayesrl import control
        >>> round(float(control.soft_value_iteration(control.river_swim(), 0.1).objective), 6)
        2.105631

    References:
        Todorov (2009), "Efficient computation of optimal actions"; Levine (2018), "Reinforcement learning
        and control as probabilistic inference", section 2. Policy iteration: Puterman (1994), section 6.4.
    """
    betas = np.asarray(beta, float)
    tables = _Tables(mdp)
    plans = [tables.plan(float(b), tolerance) for b in betas.reshape(-1)]
    return _stack(plans, betas.shape)


@checked(ControlError)
def evaluate_policy(mdp: TabularMDP, policy: PlanResult | AnyNumbers, beta: BetaOrZero = 0.0) -> PlanResult:
    """Compute the value of a policy exactly: V = Σ_a π(a|s)·(Q(s, a) − β·log(π/π₀)).

    A horizon takes a backward recursion; without one, the value solves one sparse linear system.

    Args:
        mdp: the process.
        policy: probabilities, [states, actions], or [horizon, states, actions] with a horizon; or a `PlanResult`.
        beta: temperature, reward units per nat, a number or an array [*beta]; 0 counts the reward alone.

    Returns:
        `PlanResult`. If the policy can take an action that the prior never takes, `kl` is inf and, for β > 0,
        `objective`, `value` and `action_value` are −inf; `reward` stays right.

    Raises:
        ControlError: the policy is not a distribution or has the wrong shape; it never ends though it must; β is
            negative or not a number.

    Example:
        >>> from bayesrl import control
        >>> swim = control.river_swim()
        >>> float(control.evaluate_policy(swim, swim.prior, 0.1).kl)
        0.0

    References:
        Puterman (1994), "Markov Decision Processes", section 4.2 and theorem 6.1.1.
    """
    tables = _Tables(mdp)
    probs = _read_policy(mdp, policy)
    betas = np.asarray(beta, float)
    values = tables.evaluate(probs)
    return _stack([tables.result(probs, values, float(b)) for b in betas.reshape(-1)], betas.shape)


def _read_policy(mdp: TabularMDP, policy: Any) -> np.ndarray:
    probs = as_floats("policy", policy.policy if isinstance(policy, PlanResult) else policy)
    shapes: list[tuple[int, ...]] = [(mdp.num_states, mdp.num_actions)]
    if mdp.horizon is not None:
        shapes.append((mdp.horizon, *shapes[0]))
    if probs.shape not in shapes:
        raise ControlError(f"policy has shape {probs.shape}; use {' or '.join(map(str, shapes))}")
    # Not `>=`: nan, which no comparison holds for, has to count as bad.
    bad = (probs < 0).any(-1) | ~(np.abs(probs.sum(-1) - 1) < 1e-6)
    if bad.any():
        place = tuple(int(i) for i in np.argwhere(bad)[0])
        raise ControlError(f"policy at {place} is {probs[place]}, which is not a distribution; make it sum to 1")
    return np.broadcast_to(probs, shapes[-1]) if mdp.horizon is not None else probs


class _Tables:
    """A process as arrays for linear algebra."""

    def __init__(self, mdp: TabularMDP) -> None:
        self.mdp = mdp
        self.shape = (mdp.num_states, mdp.num_actions)
        tables = 8.0 * (mdp.horizon or 1) * mdp.num_states * mdp.num_actions
        check_memory(3 * tables, f"a plan over horizon={mdp.horizon} steps", "use a shorter horizon", ControlError)
        self.steps = mdp.transitions()
        self.rewards = mdp.expected_rewards()
        with np.errstate(divide="ignore"):
            self.log_prior = np.log(mdp.prior)
        self.most = np.abs(self.rewards).max()
        self.direct = mdp.num_states <= _MAX_DIRECT

    def look_ahead(self, value: np.ndarray) -> np.ndarray:
        """Compute Q = E[r + γ·V(s′)], [states, actions]; −inf if a successor's value is −inf."""
        # −inf spreads only over steps that count: γ·(−inf) is nan for γ = 0.
        lost = np.isneginf(value)
        q: np.ndarray = self.rewards + self.mdp.discount * (self.steps @ np.where(lost, 0.0, value)).reshape(self.shape)
        if lost.any() and self.mdp.discount > 0:
            q[(self.steps @ lost.astype(float)).reshape(self.shape) > 0] = -np.inf
        return q

    def soften(self, q: np.ndarray, beta: float) -> tuple[np.ndarray, np.ndarray]:
        """Compute V and π from action values."""
        if beta == 0:
            allowed = np.where(self.mdp.prior > 0, q, -np.inf)
            value = allowed.max(-1)
            # Rounding, which grows with the greatest value, splits ties.
            best = allowed >= value[:, None] - _TIE_TOLERANCE * max(np.abs(value).max(), self.most)
            return value, best / best.sum(-1, keepdims=True)
        scores = self.log_prior + q / beta
        top = scores.max(-1, keepdims=True)
        weights = np.exp(scores - top)
        total = weights.sum(-1, keepdims=True)
        return beta * (top + np.log(total))[:, 0], weights / total

    def plan(self, beta: float, tolerance: float) -> PlanResult:
        """Plan at one temperature."""
        if self.mdp.horizon is not None:
            value, policies = np.zeros(self.shape[0]), []
            for _ in range(self.mdp.horizon):
                value, policy = self.soften(self.look_ahead(value), beta)
                value = np.where(self.mdp.terminal, 0.0, value)
                policies.append(policy)
            probs = np.stack(policies[::-1])
        else:
            probs = self._stationary(beta, tolerance)
        return self.result(probs, self.evaluate(probs), beta)

    def _stationary(self, beta: float, tolerance: float) -> np.ndarray:
        """Solve the soft Bellman equation by sweeps, then Newton steps, each of which solves for a policy's value.

        With discount 1 it starts at the prior's value: from a policy that ends, steps lead to policies that
        end, unless going on for ever pays. From elsewhere, the iteration may meet a greedy policy that never ends.
        """
        value = np.zeros(self.shape[0]) if self.mdp.discount < 1 else self._policy_value(self.mdp.prior, beta)
        for _ in range(_FIRST_SWEEPS):
            before, value = value, np.where(self.mdp.terminal, 0.0, self.soften(self.look_ahead(value), beta)[0])
            if np.abs(value - before).max() <= tolerance * max(np.abs(value).max(), self.most, 1e-300):
                break
        _, probs = self.soften(self.look_ahead(value), beta)
        for _ in range(_MAX_NEWTON):
            new = self._policy_value(probs, beta)
            moved, size = np.abs(new - value).max(), np.abs(new).max()
            # Such values mean that a step ends the episode with a chance near rounding error, or less.
            if self.mdp.discount == 1 and size > _UNBOUNDED * max(self.most, beta):
                raise self._unbounded_error(beta)
            value, probs = new, self.soften(self.look_ahead(new), beta)[1]
            if moved <= tolerance * max(size, self.most, 1e-300):
                return probs
        raise ControlError(
            f"planning at beta={beta:g} did not converge in {_MAX_NEWTON} Newton steps: the last one moved a value by "
            f"{moved:.3g} of {size:.3g}, and tolerance={tolerance:g}; raise the tolerance, or pass a horizon"
        )

    def _policy_value(self, probs: np.ndarray, beta: float) -> np.ndarray:
        """Solve for the value of a policy at one temperature, [states]."""
        earned = (probs * self.rewards).sum(-1) - (beta * _kl_by_state(probs, self.mdp.prior) if beta > 0 else 0.0)
        steps = self._policy_transitions(probs)
        if self._endless(steps) is not None:
            raise self._unbounded_error(beta)
        return self._solve(steps, np.where(self.mdp.terminal, 0.0, earned)[:, None])[0][:, 0]

    def _unbounded_error(self, beta: float) -> ControlError:
        return ControlError(
            f"with discount 1 and no horizon the optimum at beta={beta:g} has no bound: going on for ever pays more "
            "than ending; pass a horizon or a discount below 1, or lower the rewards of going on"
        )

    def _endless(self, steps: sp.csr_array) -> int | None:
        """Find a state from which a policy may go on for ever; a discount below 1 makes that harmless."""
        ends = self.mdp.discount < 1 or can_reach(steps, self.mdp.terminal)
        return None if np.all(ends) else int(np.argmin(ends))

    def _solve(
        self, steps: sp.csr_array, columns: np.ndarray, visited: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Solve (1 − γ·P)·x = columns, and the transposed system for `visited`.

        If any state may follow any other, factors fill up and few Krylov steps are needed; on maps and chains it is
        the other way round. A Krylov solution counts if its residual is as small as that of factors: a few roundings.
        """
        system = (sp.eye_array(self.shape[0]) - self.mdp.discount * steps).tocsr()
        wanted = [(system, column) for column in columns.T]
        if visited is not None:
            wanted.append((system.T.tocsr(), visited))
        if not self.direct:
            found = [_krylov(*one) for one in wanted]
            if all(x is not None for x in found):
                return np.stack(found[: columns.shape[1]], 1), np.asarray(found[-1])  # type: ignore[arg-type]
            # Later systems are those of other policies in the same process, so Krylov steps would likely fail again.
            self.direct = True
        # Rows are diagonally dominant: no pivots are needed, and an ordering for symmetric patterns fits.
        options = {"diag_pivot_thresh": 0.0, "options": {"SymmetricMode": True}}
        factors = splu(system.tocsc(), permc_spec="MMD_AT_PLUS_A", **options)
        # Without `visited`, the second solution has no meaning, and callers drop it.
        return factors.solve(columns), factors.solve(wanted[-1][1], trans="T")

    def evaluate(self, probs: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Compute the return and KL to come, and the visits of states, each [(horizon,) states]."""
        alive, gamma = ~self.mdp.terminal, self.mdp.discount
        kl = np.where(alive, _kl_by_state(probs, self.mdp.prior), 0.0)
        earned = np.where(alive, (probs * self.rewards).sum(-1), 0.0)
        # inf spreads by reachability, apart from the linear solve, which it would turn into nan.
        lost, finite_kl = np.isinf(kl), np.where(np.isinf(kl), 0.0, kl)
        if self.mdp.horizon is None:
            steps = self._policy_transitions(probs)
            if (endless := self._endless(steps)) is not None:
                raise ControlError(
                    f"the policy may go on for ever from state {endless}, and with discount 1 its return "
                    "has no end; pass a horizon or a discount below 1, or let it reach a terminal state"
                )
            found, visits = self._solve(steps, np.stack([earned, finite_kl], 1), self.mdp.start)
            if lost.any() and gamma > 0:
                lost = can_reach(steps, lost)
            return found[:, 0], np.where(lost, np.inf, found[:, 1]), visits
        horizon = self.mdp.horizon
        visits = np.zeros((horizon + 1, self.shape[0]))
        visits[0] = self.mdp.start
        for t in range(horizon):
            visits[t + 1] = gamma * (self._policy_transitions(probs[t]).T @ visits[t])
        for t in reversed(range(horizon - 1)):
            steps = self._policy_transitions(probs[t])
            earned[t] += gamma * (steps @ earned[t + 1])
            finite_kl[t] += gamma * (steps @ finite_kl[t + 1])
            lost[t] |= gamma * (steps @ lost[t + 1].astype(float)) > 0
        return earned, np.where(lost, np.inf, finite_kl), visits[:-1]

    def _policy_transitions(self, probs: np.ndarray) -> sp.csr_array:
        """Compute P(s′ | s) under a policy, [states, states]; nothing leaves a terminal state."""
        states, actions = self.shape
        rows = np.repeat(np.arange(states), actions)
        mix = sp.csr_array((probs.ravel(), (rows, np.arange(states * actions))), shape=(states, states * actions))
        return mix @ self.steps

    def result(self, probs: np.ndarray, values: tuple[np.ndarray, np.ndarray, np.ndarray], beta: float) -> PlanResult:
        """Make the result of a policy at one temperature from what `evaluate` returned."""
        reward, kl, visits = values
        value = reward if beta == 0 else reward - beta * kl
        first = (lambda x: x) if self.mdp.horizon is None else (lambda x: x[0])
        began = self.mdp.start > 0  # elsewhere, 0·inf would be nan
        total, total_kl = (float(self.mdp.start[began] @ first(x)[began]) for x in (reward, kl))
        if self.mdp.horizon is None:
            q = self.look_ahead(value)
        else:
            following = np.concatenate([value[1:], np.zeros((1, self.shape[0]))])
            q = np.stack([self.look_ahead(v) for v in following])
        occupancy = visits[..., None] * np.where(self.mdp.terminal[:, None], 0.0, probs)
        # At β = 0 an infinite KL costs nothing.
        objective = np.asarray(total if beta == 0 else total - beta * total_kl)
        return PlanResult(value, q, probs, objective, np.asarray(total), np.asarray(total_kl), occupancy)


def _krylov(system: sp.csr_array, column: np.ndarray) -> np.ndarray | None:
    """Solve by Bi-CGSTAB, restarted from the residual; None if a few rounds do not get down to rounding error."""
    found = np.zeros_like(column)
    with np.errstate(all="ignore"):
        for _ in range(_KRYLOV_ROUNDS):
            step = _bicgstab(system, column - system @ found)
            if step is None:
                return None
            found = found + step
            if np.abs(column - system @ found).max() <= _RESIDUAL * np.abs(found).max():
                return found
    return None


def _bicgstab(system: sp.csr_array, residual: np.ndarray) -> np.ndarray | None:
    """Take Bi-CGSTAB steps (van der Vorst 1992) until the residual has fallen by 1e-10; None if it does not.

    SciPy's version takes inner products from BLAS, whose threads wait for one another on a busy machine.
    """

    def inner(a: np.ndarray, b: np.ndarray) -> Any:
        return np.einsum("i,i->", a, b)

    # The residual of one start state is soon orthogonal to later ones; a shadow that touches every state is not.
    shadow = np.random.default_rng(0).normal(size=len(residual))
    found, direction = np.zeros_like(residual), residual
    rho, first = inner(shadow, residual), inner(residual, residual)
    for step in range(_KRYLOV_STEPS):
        left = inner(residual, residual)
        if left <= 1e-20 * first:
            return found
        # What has not fallen a thousandfold in a third of the steps would not get there: leave it to factors.
        if not np.isfinite(left) or (step == _KRYLOV_STEPS // 3 and left > 1e-6 * first):
            break
        image = system @ direction
        alpha = rho / inner(shadow, image)
        half = residual - alpha * image
        half_image = system @ half
        # If the half step already solves the system, this is 0/0.
        omega = inner(half_image, half) / max(inner(half_image, half_image), 1e-300)
        found = found + alpha * direction + omega * half
        residual = half - omega * half_image
        rho, before = inner(shadow, residual), rho
        direction = residual + rho / before * alpha / omega * (direction - omega * image)
    return None


def _kl_by_state(probs: np.ndarray, prior: np.ndarray) -> np.ndarray:
    """Compute KL(π ‖ π₀) in each state, nats; inf if the policy takes an action that the prior never takes.

    Each term is π₀·(r·log r − r + 1) with r = π/π₀, which is never negative. So β·KL stays accurate at high
    temperatures, where Σ π·log r is a small difference of rounded numbers.
    """
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        log_ratio = np.log(probs) - np.log(prior)
        near = prior * (log_ratio * np.exp(log_ratio) - np.expm1(log_ratio))
        terms = np.where(np.abs(log_ratio) < 1, near, probs * (log_ratio - 1) + prior)
    # At π = 0 the term is π₀·(0 − 0 + 1).
    terms = np.where(probs > 0, terms, prior)
    return np.asarray(terms.sum(-1))


def _stack(plans: list[PlanResult], shape: tuple[int, ...]) -> PlanResult:
    arrays = [np.stack([getattr(plan, part.name) for plan in plans]) for part in fields(PlanResult)]
    return PlanResult(*(array.reshape(shape + array.shape[1:]) for array in arrays))

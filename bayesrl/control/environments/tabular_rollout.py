"""Tabular problems as programs, and their exact optimum to compare fits with."""

import hashlib
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import numpy as np
import numpyro.distributions as dist
from jax import Array
from numpyro import handlers

from bayesrl.arguments import Count, UnitInterval, checked
from bayesrl.compilation.jit import closure_jit
from bayesrl.control.environments.base import Environment, Transition
from bayesrl.control.environments.tabular import TabularMDP
from bayesrl.control.planning import PlanResult, evaluate_policy, soft_value_iteration
from bayesrl.control.policies import RolloutGuide, action_distribution
from bayesrl.control.rollout import Rollout
from bayesrl.core.primitives import environment
from bayesrl.errors import ControlError
from bayesrl.posterior.posterior import Posterior


class _Tables(NamedTuple):
    """The arrays of a problem that its program reads."""

    log_probs: Array
    rewards: Array
    terminal: Array
    log_prior: Array
    log_start: Array


@checked(ControlError)
class TabularEnvironment(Environment):
    """A `TabularMDP` as a program: the site `state`, and `start` if the first state is random.

    The program reads the tables whenever it runs, so they may be changed in place.

    Args:
        mdp: the problem; the rollout sets horizon and discount.
    """

    def __init__(self, mdp: TabularMDP) -> None:
        self.mdp = mdp
        self.num_observations = mdp.num_states
        self._cached = _digest(mdp), _to_device(mdp)

    @property
    def _tables(self) -> _Tables:
        digest = _digest(self.mdp)
        if self._cached[0] != digest:
            with jax.ensure_compile_time_eval():  # arrays that outlive a trace must not belong to it
                self._cached = digest, _to_device(self.mdp)
        return self._cached[1]

    def reset(self) -> Array:
        """Draw the start state, an integer."""
        certain = int(self.mdp.start.argmax())
        if self.mdp.start[certain] == 1:
            return jax.device_put(np.asarray(certain, np.int32))
        return environment("start", dist.Categorical(logits=self._tables.log_start), observable=True)

    def step(self, state: Array, action: Array) -> Transition:
        """Draw the next state; the reward is the mean over the outcomes that lead there."""
        tables = self._tables
        new = environment("state", dist.Categorical(logits=tables.log_probs[state, action]), observable=True)
        return Transition(new, tables.rewards[state, action, new], tables.terminal[new])

    def prior(self, observation: Array) -> dist.Distribution:
        """Return the problem's own prior policy."""
        return dist.Categorical(logits=self._tables.log_prior[observation])


def _digest(mdp: TabularMDP) -> bytes:
    """Hash the tables of a problem."""
    digest = hashlib.blake2b()
    for table in (mdp.successors, mdp.probabilities, mdp.rewards, mdp.start, mdp.terminal, mdp.prior):
        digest.update(np.ascontiguousarray(table).data)
    return digest.digest()


def _to_device(mdp: TabularMDP) -> _Tables:
    probs = mdp.dense()
    rewards = np.zeros_like(probs)
    states, actions, _ = np.indices(mdp.probabilities.shape)
    # Several outcomes may share a successor: plain indexing would keep only the last of them.
    np.add.at(rewards, (states, actions, mdp.successors), mdp.probabilities * mdp.rewards)
    expected = np.where(probs > 0, rewards / np.where(probs > 0, probs, 1.0), 0.0)
    # NumPyro refuses −inf as a logit; 1e-38 is about the least normal number in single precision.
    log_probs, log_prior, log_start = (_numbers(np.log(np.maximum(p, 1e-38))) for p in (probs, mdp.prior, mdp.start))
    return _Tables(log_probs, _numbers(expected), jax.device_put(mdp.terminal.copy()), log_prior, log_start)


def _numbers(values: np.ndarray) -> Array:
    return jax.device_put(values.astype(np.float32))


@checked(ControlError)
def tabular_rollout(mdp: TabularMDP, *, horizon: Count | None = None, discount: UnitInterval | None = None) -> Rollout:
    """Turn a tabular problem into a program for `bayesrl.fit`.

    Args:
        mdp: the problem.
        horizon: number of steps; by default, the problem's own. If the problem has none, this horizon only cuts
            episodes off, and `ActorCritic` values what would follow.
        discount: γ; by default, the problem's own.

    Raises:
        ControlError: there is no horizon, neither here nor in the problem.

    Example:
        >>> from bayesrl import control
        >>> control.tabular_rollout(control.river_swim(), horizon=10).horizon
        10
    """
    steps = mdp.horizon if horizon is None else horizon
    if steps is None:
        raise ControlError(f"{mdp.name or 'the problem'} has no horizon; pass horizon=, which cuts episodes off")
    chosen = mdp.discount if discount is None else discount
    return Rollout(TabularEnvironment(mdp), steps, chosen, unbounded=mdp.horizon is None)


@checked(ControlError)
@dataclass
class TabularOptimum:
    """The exact optimum of a tabular problem, for the option `optimum` of `evidence`, `diagnose` and `Problem`.

    Args:
        mdp: the problem.

    Example:
        >>> from bayesrl import control
        >>> round(control.TabularOptimum(control.river_swim())(0.1), 4)
        2.1056
    """

    mdp: TabularMDP
    _known: dict[tuple[float, bytes], float] = field(default_factory=dict)

    def __call__(self, beta: float) -> float:
        """Compute J* at a temperature, reward units."""
        key = float(beta), _digest(self.mdp)
        if key not in self._known:
            self._known[key] = float(soft_value_iteration(self.mdp, beta).objective)
        return self._known[key]

    def prior_objective(self, beta: float) -> float:
        """Compute J(π₀), reward units."""
        return float(evaluate_policy(self.mdp, self.mdp.prior, beta).objective)

    def evaluate(self, posterior: Posterior) -> tuple[float, float, float] | None:
        """Compute (J, E[R], KL(q‖π₀)) of one fitted policy exactly; None if its guide is not a policy over states."""
        found = evaluate_fitted_policy(self.mdp, posterior)
        return None if found is None else (float(found.objective), float(found.reward), float(found.kl))


@checked(ControlError)
def evaluate_fitted_policy(mdp: TabularMDP, posterior: Posterior) -> PlanResult | None:
    """Evaluate one fitted policy exactly in a problem; None if its guide is not a policy over states.

    Raises:
        ControlError: the policy was fitted to another horizon or discount.
    """
    probs = action_probs(posterior)
    if probs is None or posterior.beta is None:
        return None
    rollout = getattr(posterior.unbatched()[0].guide, "rollout", None)
    if not isinstance(rollout, Rollout):  # recorded steps begin anywhere, so the policy is the same at all times
        return evaluate_policy(mdp, probs[0], float(posterior.beta))
    fitted = f"horizon={rollout.horizon if rollout.ends_at_horizon else None}, discount={rollout.discount:g}"
    own = f"horizon={mdp.horizon}, discount={mdp.discount:g}"
    if fitted != own:
        # The optimum for another horizon or discount would be beaten, or never reached, by a perfect fit.
        raise ControlError(f"the policy was fitted with {fitted}, and the problem has {own}; use mdp.replace({fitted})")
    return evaluate_policy(mdp, probs[0] if mdp.horizon is None else probs, float(posterior.beta))


@checked(ControlError)
def action_probs(posterior: Posterior) -> np.ndarray | None:
    """Compute the action probabilities of a fitted policy in every state at every time, [time, states, actions].

    Args:
        posterior: one fit of a tabular rollout, by `TablePolicy` or another family of `bayesrl.control`.

    Returns:
        The probabilities, or None if the guide is of another kind.
    """
    programs, params = posterior.unbatched()
    if not isinstance(programs.guide, RolloutGuide):
        return None
    horizon, num_states = programs.guide.rollout.horizon, programs.guide.rollout.environment.num_observations
    if num_states is None:
        return None
    guide = handlers.substitute(programs.guide, data=programs.constrain(params))

    def one(time: Array, state: Array) -> Any:
        return jax.nn.softmax(action_distribution(guide, state, time).logits)

    by_state = jax.vmap(jax.vmap(one, in_axes=(None, 0)), in_axes=(0, None))
    times, states = (np.arange(num, dtype=np.int32) for num in (horizon, num_states))
    probs = np.asarray(closure_jit(by_state, name="action_probs")(times, states), float)
    # Rows of a single-precision softmax sum to 1 within 1e-7 or so; exact planning works in double.
    return probs / probs.sum(-1, keepdims=True)

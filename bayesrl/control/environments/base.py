"""Environments written as NumPyro programs: what happens between two actions."""

import abc
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpyro.distributions as dist
from jax import Array


class Transition(NamedTuple):
    """What one step of an environment gives.

    Attributes:
        state: the next state, any pytree of arrays.
        reward: of this step, reward units, scalar.
        terminated: whether the episode has come to its own end, scalar bool.
        truncated: whether it is cut off here, by a time limit, say, scalar bool.

    Example:
        >>> from bayesrl import control
        >>> control.Transition(state=1, reward=0.5, terminated=False).truncated
        False
    """

    state: Any
    reward: Array
    terminated: Array
    truncated: Array | bool = False


class Environment(abc.ABC):
    """An environment as a program: nature's draws are made by `bayesrl.environment`.

    A frozen dataclass; `reset` and `step` run inside a program, `step` inside a `scan`, so states keep their shapes
    and types.

    Example:
        >>> from dataclasses import dataclass
        >>> import jax.numpy as jnp, numpyro.distributions as dist
        >>> from bayesrl import control
        >>> @dataclass(frozen=True)
        ... class Guess(control.Environment):
        ...     def reset(self):
        ...         return jnp.array(0)
        ...     def step(self, state, action):
        ...         return control.Transition(state, 1.0 * action, jnp.array(True))
        ...     def prior(self, observation):
        ...         return dist.Bernoulli(0.5)
        >>> program = control.Rollout(Guess(), horizon=1)
    """

    @abc.abstractmethod
    def reset(self) -> Any:
        """Give the first state; what is random in it is drawn by `bayesrl.environment`."""

    @abc.abstractmethod
    def step(self, state: Any, action: Any) -> Transition:
        """Take one action in a state; what is random in it is drawn by `bayesrl.environment`."""

    @abc.abstractmethod
    def prior(self, observation: Any) -> dist.Distribution:
        """Give the distribution of actions that a policy starts from, usually a uniform one."""

    num_observations: int | None = None
    """Number of observations where they are integers from 0 on; None where they are vectors."""

    def allowed(self, observation: Any) -> Array | None:
        """Give which actions are allowed, [actions], bool; None, the default, allows all."""
        return None

    def observe(self, state: Any) -> Any:
        """Give the agent's observation of a state; by default the state."""
        return state

    def label(self, observation: Any) -> Any:
        """Give the index into a table, where observations are finitely many; by default the observation."""
        return observation

    def features(self, observation: Any) -> Array:
        """Give the input of linear maps and networks, numbers of about unit size, [features]."""
        if self.num_observations is not None:
            return jax.nn.one_hot(observation, self.num_observations)
        return jnp.concatenate([jnp.ravel(leaf).astype(float) for leaf in jax.tree.leaves(observation)])

"""Environments written as NumPyro programs: what happens between two actions."""

import abc
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpyro.distributions as dist
from jax import Array


class Transition(NamedTuple):
    """The outcome of one step of an environment.

    Attributes:
        state: the next state, any pytree of arrays.
        reward: reward of this step, reward units, scalar.
        terminated: whether the episode has come to its own end, scalar bool.
        truncated: whether something else, such as a time limit, cuts the episode off here, scalar bool.

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
    """An environment as a program: `bayesrl.environment` makes nature's draws.

    A frozen dataclass. `reset` and `step` run inside a program, `step` inside a `scan`, so states must keep their
    shapes and types.

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
        """Return the first state; `bayesrl.environment` draws its random parts."""

    @abc.abstractmethod
    def step(self, state: Any, action: Any) -> Transition:
        """Take one action in a state; `bayesrl.environment` draws the random parts of the outcome."""

    @abc.abstractmethod
    def prior(self, observation: Any) -> dist.Distribution:
        """Return the distribution of actions from which a policy starts, usually a uniform one."""

    num_observations: int | None = None
    """Number of observations if they are integers from 0 on; None if they are vectors."""

    def allowed(self, observation: Any) -> Array | None:
        """Flag the allowed actions, [actions], bool; None, the default, allows all."""
        return None

    def observe(self, state: Any) -> Any:
        """Return the agent's observation of a state; by default, the state."""
        return state

    def label(self, observation: Any) -> Any:
        """Return the index into a table, if there are finitely many observations; by default, the observation."""
        return observation

    def features(self, observation: Any) -> Array:
        """Return the input of linear maps and networks, numbers of about unit size, [features]."""
        if self.num_observations is not None:
            return jax.nn.one_hot(observation, self.num_observations)
        return jnp.concatenate([jnp.ravel(leaf).astype(float) for leaf in jax.tree.leaves(observation)])

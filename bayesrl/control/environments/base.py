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
        truncated: whether it is cut off here, by a time limit of the environment's own, say, scalar bool.
    """

    state: Any
    reward: Array
    terminated: Array
    truncated: Array | bool = False


class Environment(abc.ABC):
    """An environment as a program: it draws what nature draws by `bayesrl.environment`.

    A frozen dataclass; `reset` and `step` run inside a program, `step` inside a `scan`, so that states
    keep their shapes and types.
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
    """How many observations there are, where they are the integers from 0 on; None where they are vectors."""

    def allowed(self, observation: Any) -> Array | None:
        """Give which actions may be taken, [actions], bool; by default None: all, always."""
        return None

    def observe(self, state: Any) -> Any:
        """Give what the agent sees of a state; by default all of it."""
        return state

    def label(self, observation: Any) -> Any:
        """Give what a table is looked up by, where observations are finitely many; by default the observation."""
        return observation

    def features(self, observation: Any) -> Array:
        """Give what linear maps and networks read of an observation, numbers of about unit size, [features]."""
        if self.num_observations is not None:
            return jax.nn.one_hot(observation, self.num_observations)
        return jnp.concatenate([jnp.ravel(leaf).astype(float) for leaf in jax.tree.leaves(observation)])

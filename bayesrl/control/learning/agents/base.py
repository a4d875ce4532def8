"""Agents of `learn`: their state in one environment explores, and inference updates it."""

import abc
from typing import Any, NamedTuple

import jax
import numpy as np

from bayesrl.control.exploration.rules import Exploration
from bayesrl.control.learning.env_adapter import EnvAdapter, EpisodePolicy
from bayesrl.control.learning.replay_memory import Episode
from bayesrl.errors import ControlError
from bayesrl.typing import PRNGKey


class UpdateInfo(NamedTuple):
    """An update's report about the decision in the first state; nan for numbers that it does not report.

    Attributes:
        p_optimal: probability that the action that seems best is best.
        expected_regret: expected loss of this action against the best one, reward units.
        objective: J of the last batch, reward units, for `KLControlAgent`.
        kl: KL of the policy from its prior in the last batch, nats, for `KLControlAgent`.
    """

    p_optimal: float = np.nan
    expected_regret: float = np.nan
    objective: float = np.nan
    kl: float = np.nan


class AgentState(abc.ABC):
    """The state of an agent in one environment; checkpoints keep it."""

    @abc.abstractmethod
    def explore(self, key: PRNGKey, exploration: Any, episode: int) -> EpisodePolicy:
        """Choose how to act in the next episode."""

    @abc.abstractmethod
    def update(self, key: PRNGKey, episode: Episode, *, always_judge: bool) -> UpdateInfo:
        """Update by inference.

        Args:
            key: random key; do not use it again.
            episode: the episode just played.
            always_judge: whether to judge the decision in the first state after every episode, not only now and then.
        """

    @abc.abstractmethod
    def savepoint(self) -> Any:
        """Remember the state, for `rollback`."""

    @abc.abstractmethod
    def rollback(self, savepoint: Any) -> None:
        """Return to a savepoint after an episode that was interrupted."""

    @abc.abstractmethod
    def arrays(self) -> dict[str, np.ndarray]:
        """Return the arrays that a checkpoint must keep."""

    @abc.abstractmethod
    def restore(self, arrays: dict[str, np.ndarray]) -> None:
        """Restore the state from the arrays of a checkpoint."""


class Agent(abc.ABC):
    """One of the two algorithms of `learn`."""

    @abc.abstractmethod
    def enter(self, key: PRNGKey, env: EnvAdapter, num_episodes: int) -> AgentState:
        """Make the agent's initial state in an environment.

        Raises:
            ControlError: the agent does not fit the environment.
        """

    @abc.abstractmethod
    def describe(self) -> dict[str, Any]:
        """Describe the agent for the identity of a run, in JSON."""

    @property
    @abc.abstractmethod
    def default_exploration(self) -> Exploration:
        """The exploration rule if none is passed."""


def restore_leaves(state: Any, arrays: dict[str, np.ndarray], prefix: str) -> Any:
    """Put the arrays `PREFIX/0`, `PREFIX/1`, … of a checkpoint into a state of the same structure.

    Raises:
        ControlError: the arrays have other shapes.
    """
    leaves, treedef = jax.tree.flatten(state)
    found = [arrays.get(f"{prefix}/{i}") for i in range(len(leaves))]
    for leaf, array in zip(leaves, found, strict=True):
        if array is None or array.shape != np.shape(leaf):
            raise ControlError(
                f"the run folder holds {prefix} of shape {None if array is None else array.shape}, and the agent needs "
                f"{np.shape(leaf)}; learn into another directory"
            )
    return jax.tree.unflatten(treedef, jax.device_put(found))

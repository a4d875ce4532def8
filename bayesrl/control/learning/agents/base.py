"""Agents of `learn`: their state in one environment explores, and is updated by inference."""

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
    """What an update reports about the decision in the first state; nan where it does not.

    Attributes:
        p_optimal: probability that the action which seems best is the best.
        expected_regret: what this action is expected to lose to the best one, reward units.
        objective: J of the last batch, reward units, for `KLControlAgent`.
        kl: of the policy to its prior in the last batch, nats, for `KLControlAgent`.
    """

    p_optimal: float = np.nan
    expected_regret: float = np.nan
    objective: float = np.nan
    kl: float = np.nan


class AgentState(abc.ABC):
    """The state of an agent in one environment, which checkpoints keep."""

    @abc.abstractmethod
    def explore(self, key: PRNGKey, exploration: Any, episode: int) -> EpisodePolicy:
        """Choose how to act in the next episode."""

    @abc.abstractmethod
    def update(self, key: PRNGKey, episode: Episode, *, always_judge: bool) -> UpdateInfo:
        """Update by inference.

        Args:
            key: consumed whole.
            episode: as it was played.
            always_judge: whether the decision in the first state is judged after every episode, and not only now and
                then.
        """

    @abc.abstractmethod
    def savepoint(self) -> Any:
        """Remember the state, for `rollback`."""

    @abc.abstractmethod
    def rollback(self, savepoint: Any) -> None:
        """Return to a savepoint after an episode that was interrupted."""

    @abc.abstractmethod
    def arrays(self) -> dict[str, np.ndarray]:
        """Give what a checkpoint has to keep."""

    @abc.abstractmethod
    def restore(self, arrays: dict[str, np.ndarray]) -> None:
        """Take what a checkpoint kept."""


class Agent(abc.ABC):
    """One of the two algorithms of `learn`."""

    @abc.abstractmethod
    def enter(self, key: PRNGKey, env: EnvAdapter, num_episodes: int) -> AgentState:
        """Make the state in which the agent begins in an environment.

        Raises:
            ControlError: the agent is not made for it.
        """

    @abc.abstractmethod
    def describe(self) -> dict[str, Any]:
        """Describe the agent for the identity of a run, in JSON."""

    @property
    @abc.abstractmethod
    def default_exploration(self) -> Exploration:
        """The rule that explores where no other is passed."""


def restore_leaves(state: Any, arrays: dict[str, np.ndarray], prefix: str) -> Any:
    """Put the arrays `PREFIX/0`, `PREFIX/1`, … of a checkpoint into a state of the same structure.

    Raises:
        ControlError: they are of another shape.
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

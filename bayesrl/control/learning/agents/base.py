"""What agents are made of: a state that explores and is updated by inference, and what it tells."""

import abc
from typing import Any, NamedTuple

import numpy as np

from bayesrl.control.exploration.rules import Exploration
from bayesrl.control.learning.env_adapter import EnvAdapter, EpisodePolicy
from bayesrl.control.learning.replay_memory import Episode
from bayesrl.typing import PRNGKey


class UpdateInfo(NamedTuple):
    """What an update tells of the decision in the first state, or nan.

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
    """An agent in one environment: its state, which a checkpoint keeps."""

    @abc.abstractmethod
    def explore(self, key: PRNGKey, exploration: Any, episode: int) -> EpisodePolicy:
        """Choose how to act in the next episode."""

    @abc.abstractmethod
    def update(self, key: PRNGKey, episode: Episode, *, told: bool) -> UpdateInfo:
        """Update by inference.

        Args:
            key: consumed whole.
            episode: as it was played.
            told: whether something is to be told after every episode, and not only now and then.
        """

    @abc.abstractmethod
    def mark(self) -> Any:
        """Remember how it is, for `back`."""

    @abc.abstractmethod
    def back(self, mark: Any) -> None:
        """Be as it was at the last mark, after an update that was interrupted."""

    @abc.abstractmethod
    def arrays(self) -> dict[str, np.ndarray]:
        """Give what a checkpoint has to keep."""

    @abc.abstractmethod
    def restore(self, arrays: dict[str, np.ndarray]) -> None:
        """Take what a checkpoint kept."""


class Agent(abc.ABC):
    """One of the two algorithms, as `learn` takes it."""

    @abc.abstractmethod
    def enter(self, key: PRNGKey, env: EnvAdapter, num_episodes: int) -> AgentState:
        """Get ready for an environment.

        Raises:
            ControlError: the agent is not made for it.
        """

    @abc.abstractmethod
    def describe(self) -> dict[str, Any]:
        """Say what identifies the agent, JSON-able."""

    @property
    @abc.abstractmethod
    def default_exploration(self) -> Exploration:
        """The rule where none is asked for."""

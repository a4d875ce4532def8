"""Agents of `learn`: their state in one environment explores, and inference updates it."""

import abc
from collections.abc import Callable, Hashable
from copy import copy
from typing import Any, ClassVar, NamedTuple

import jax
import numpy as np

from bayesrl.compilation.jit import trace_once
from bayesrl.control.exploration.rules import Exploration, thompson
from bayesrl.control.learning.action_mask_table import ActionMaskTable
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
    """The state of an agent in one environment; checkpoints keep it.

    Attributes:
        env: the environment.
        masks: the actions that each of finitely many states allows, if the environment has masks.
    """

    changing: ClassVar[tuple[str, ...]]
    """The attributes that an update changes; of each, a shallow copy is enough to return to it."""

    def __init__(self, env: EnvAdapter) -> None:
        self.env, count = env, env.num_observations
        self.masks = ActionMaskTable(count, env.num_actions) if env.masked and count is not None else None
        self._programs: dict[Any, Callable[..., Any]] = {}

    @abc.abstractmethod
    def explore(self, key: PRNGKey, exploration: Any, episode: int) -> EpisodePolicy:
        """Choose how to act in the next episode."""

    @abc.abstractmethod
    def update(self, key: PRNGKey, episode: Episode, *, always_judge: bool) -> UpdateInfo:
        """Update by inference; judge the decision in the first state now and then, or after every episode."""

    def savepoint(self) -> dict[str, Any]:
        """Remember the state, for `rollback`."""
        return {name: copy(getattr(self, name)) for name in self.changing}

    def rollback(self, savepoint: dict[str, Any]) -> None:
        """Return to a savepoint after an episode that was interrupted."""
        # Updates replace values; the memory alone is written in place, after the rows that its copy counts.
        vars(self).update(savepoint)

    def arrays(self) -> dict[str, np.ndarray]:
        """Return the arrays that a checkpoint must keep."""
        return {} if self.masks is None else {"masks": self.masks.array()}

    def restore(self, arrays: dict[str, np.ndarray]) -> None:
        """Restore the state from the arrays of a checkpoint."""
        if self.masks is not None:
            self.masks.restore(arrays["masks"])

    def _program(self, name: str, make: Callable[[], Callable[..., Any]], rule: Any = None) -> Callable[..., Any]:
        """Look up a compiled function by its name and exploration rule; make it at its first use."""
        # The library's rules compare by their numbers, users' functions by identity.
        key = name, rule if isinstance(rule, Hashable) else id(rule)
        if key not in self._programs:
            self._programs[key] = trace_once(make(), name=name)
        return self._programs[key]


class Agent(abc.ABC):
    """One of the two algorithms of `learn`."""

    @abc.abstractmethod
    def enter(self, key: PRNGKey, env: EnvAdapter, num_episodes: int) -> AgentState:
        """Make the agent's initial state in an environment, or refuse an environment that it does not fit."""

    @abc.abstractmethod
    def describe(self) -> dict[str, Any]:
        """Describe the agent for the identity of a run, in JSON."""

    @property
    def default_exploration(self) -> Exploration:
        """The exploration rule if none is passed: draws from the agent's own posterior."""
        return thompson()


def restore_leaves(state: Any, arrays: dict[str, np.ndarray], prefix: str) -> Any:
    """Put the arrays `PREFIX/0`, `PREFIX/1`, … of a checkpoint into a state of the same structure and shapes."""
    leaves, treedef = jax.tree.flatten(state)
    found = [arrays.get(f"{prefix}/{i}") for i in range(len(leaves))]
    for leaf, array in zip(leaves, found, strict=True):
        if array is None or array.shape != np.shape(leaf):
            raise ControlError(
                f"the run folder holds {prefix} of shape {None if array is None else array.shape}, and the agent needs "
                f"{np.shape(leaf)}; learn into another directory"
            )
    return jax.tree.unflatten(treedef, jax.device_put(found))

"""What has been lived through: episodes, and the arrays that hold all of them."""

from typing import Any, NamedTuple

import jax
import numpy as np

from bayesrl.errors import ControlError
from bayesrl.typing import Numbers

_AT_ONCE = 200_000
"""Rows that are set aside from the start; more are added by doubling, each time with a compilation."""


def returns_to_go(rewards: np.ndarray, discount: float) -> np.ndarray:
    """Give Σ γᵏ·r_{t+k} to the end of the last axis, from every step, [..., steps], reward units."""
    to_go = np.zeros(rewards.shape)
    later = np.zeros(rewards.shape[:-1])
    for t in reversed(range(rewards.shape[-1])):
        later = to_go[..., t] = rewards[..., t] + discount * later
    return to_go


class Episode(NamedTuple):
    """One episode, as it was played.

    Attributes:
        observation: before each action, [steps, *shape].
        action: [steps], integers.
        reward: [steps], reward units.
        next_observation: what was observed after each action, [steps, *shape].
        terminated: whether the episode came to its own end, which no time limit is.
        log_behaviour: log-probability of each action under who played, nats, [steps]; nan where that is not known.
        allowed: which actions were allowed before each step and after the last one, [steps + 1, actions]; None where
            the environment allows all of them always.
    """

    observation: np.ndarray
    action: np.ndarray
    reward: np.ndarray
    next_observation: np.ndarray
    terminated: bool
    log_behaviour: np.ndarray
    allowed: np.ndarray | None = None

    def returns(self, discount: float) -> np.ndarray:
        """Give Σ γᵏ·r_{t+k} to the end of the episode, from every step, [steps], reward units."""
        return returns_to_go(self.reward, discount)


class Experience(NamedTuple):
    """All steps of all episodes, one row each; rows beyond those that were lived have `held` False.

    This is what models of the unknown are given as data: shapes stay the same while it grows.

    Attributes:
        observation: before each action, [rows, *shape].
        action: [rows], integers.
        reward: [rows], reward units.
        next_observation: what was observed afterwards, [rows, *shape].
        terminated: whether the episode ended there by itself, [rows].
        returns: the discounted rewards from here to the end of the episode, [rows], reward units.
        time: step of its episode, [rows].
        mask: whether the row holds a step, [rows].
        allowed: which actions each of finitely many states allows, as far as was seen, [states, actions]; None where
            all are allowed, or observations are vectors.
    """

    observation: Numbers
    action: Numbers
    reward: Numbers
    next_observation: Numbers
    terminated: Numbers
    returns: Numbers
    time: Numbers
    mask: Numbers
    allowed: Numbers | None = None


class Memory:
    """Experience that grows by episodes.

    Args:
        shape: of one observation.
        dtype: of one observation.
        steps: the greatest number of steps that may come.
    """

    def __init__(self, shape: tuple[int, ...], dtype: Any, steps: int) -> None:
        rows = max(min(steps, _AT_ONCE), 1)
        self.num_rows = 0
        self._held: dict[str, np.ndarray] = {
            "observation": np.zeros((rows, *shape), dtype),
            "action": np.zeros(rows, np.int32),
            "reward": np.zeros(rows, np.float32),
            "next_observation": np.zeros((rows, *shape), dtype),
            "terminated": np.zeros(rows, bool),
            "returns": np.zeros(rows, np.float32),
            "time": np.zeros(rows, np.int32),
            "mask": np.zeros(rows, bool),
        }

    def add(self, episode: Episode, discount: float) -> None:
        """Add an episode."""
        count = len(episode.reward)
        while self.num_rows + count > len(self._held["mask"]):
            self._held = {k: np.concatenate([v, np.zeros_like(v)]) for k, v in self._held.items()}
        ends = np.zeros(count, bool)
        ends[-1] = episode.terminated
        rows = slice(self.num_rows, self.num_rows + count)
        given = {
            "observation": episode.observation,
            "action": episode.action,
            "reward": episode.reward,
            "next_observation": episode.next_observation,
            "terminated": ends,
            "returns": episode.returns(discount),
            "time": np.arange(count),
            "mask": True,
        }
        for name, values in given.items():
            self._held[name][rows] = values
        self.num_rows += count

    def forget(self, count: int) -> None:
        """Keep so many rows, and no others."""
        self._held["mask"][count:] = False
        self.num_rows = count

    def experience(self) -> Experience:
        """Give all of it, on the device."""
        told: Experience = jax.device_put(self.rows())
        return told

    def rows(self) -> Experience:
        """Give all of it as NumPy's arrays, which stay as they are when more is added."""
        return Experience(**{name: values.copy() for name, values in self._held.items()})

    def arrays(self) -> dict[str, np.ndarray]:
        """Give what a checkpoint has to keep."""
        return {name: values[: self.num_rows] for name, values in self._held.items()}

    def restore(self, arrays: dict[str, np.ndarray]) -> None:
        """Take what a checkpoint kept.

        Raises:
            ControlError: it is of observations of another shape.
        """
        count = len(arrays["mask"])
        if arrays["observation"].shape[1:] != self._held["observation"].shape[1:]:
            raise ControlError(
                f"the run was of observations of shape {arrays['observation'].shape[1:]}, and those of the environment "
                f"have {self._held['observation'].shape[1:]}; learn into another directory"
            )
        while count > len(self._held["mask"]):
            self._held = {k: np.concatenate([v, np.zeros_like(v)]) for k, v in self._held.items()}
        for name, values in arrays.items():
            self._held[name][:count] = values
        self.num_rows = count


def first_rows(experience: Experience, count: Any) -> Experience:
    """Give the experience as it was when it held so many rows."""
    return experience._replace(mask=experience.mask & (np.arange(experience.mask.shape[0]) < count))


def example(shape: tuple[int, ...], dtype: Any) -> Experience:
    """Give a row of nothing, to look at programs with."""
    return Memory(shape, dtype, 1).experience()

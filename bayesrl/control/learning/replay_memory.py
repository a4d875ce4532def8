"""Played episodes, and the replay memory of all their steps."""

from typing import Any, NamedTuple

import jax
import numpy as np

from bayesrl.errors import ControlError
from bayesrl.typing import Numbers

_AT_ONCE = 200_000
"""Most rows to begin with; each doubling beyond them recompiles everything that reads experience."""


def returns_to_go(rewards: np.ndarray, discount: float) -> np.ndarray:
    """Compute Σ γᵏ·r_{t+k} to the end of the last axis, from every step, [..., steps], reward units."""
    to_go = np.zeros(rewards.shape)
    later = np.zeros(rewards.shape[:-1])
    for t in reversed(range(rewards.shape[-1])):
        later = to_go[..., t] = rewards[..., t] + discount * later
    return to_go


class Episode(NamedTuple):
    """One played episode.

    Attributes:
        observation: the observation before each action, [steps, *shape].
        action: [steps], integers.
        reward: [steps], reward units.
        next_observation: the observation after each action, [steps, *shape].
        terminated: whether the episode came to its own end, not to a time limit.
        log_behaviour: log-probability of each action under the policy that played, nats, [steps]; nan if unknown.
        allowed: which actions were allowed before each step and after the last one, [steps + 1, actions]; None if the
            environment always allows all of them.
    """

    observation: np.ndarray
    action: np.ndarray
    reward: np.ndarray
    next_observation: np.ndarray
    terminated: bool
    log_behaviour: np.ndarray
    allowed: np.ndarray | None = None

    def returns(self, discount: float) -> np.ndarray:
        """Compute Σ γᵏ·r_{t+k} to the end of the episode, from every step, [steps], reward units."""
        return returns_to_go(self.reward, discount)


class Experience(NamedTuple):
    """All steps of all episodes, one row each; rows without a step have `mask` False.

    These are the data of models of the unknown; their shapes stay the same while the experience grows.

    Attributes:
        observation: the observation before each action, [rows, *shape].
        action: [rows], integers.
        reward: [rows], reward units.
        next_observation: the observation after each action, [rows, *shape].
        terminated: whether the episode came to its own end there, [rows].
        returns: the sum of discounted rewards from here to the end of the episode, [rows], reward units.
        time: step of its episode, [rows].
        mask: whether the row holds a step, [rows].
        allowed: which actions each of finitely many states allows, as far as known, [states, actions]; None if all are
            allowed, or observations are vectors.
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


class ReplayMemory:
    """All of at most `num_steps` steps, in arrays that grow by doubling, so that few shapes are ever compiled."""

    def __init__(self, shape: tuple[int, ...], dtype: Any, num_steps: int) -> None:
        rows = max(min(num_steps, _AT_ONCE), 1)
        kinds = np.int32, np.float32, bool, np.float32, np.int32, bool
        action, reward, terminated, returns, time, mask = (np.zeros(rows, kind) for kind in kinds)
        seen, after = np.zeros((2, rows, *shape), dtype)
        self.num_rows = 0
        self._on_device: Experience | None = None
        self._data = Experience(seen, action, reward, after, terminated, returns, time, mask)

    def add(self, episode: Episode, discount: float) -> None:
        """Add an episode."""
        count = len(episode.reward)
        terminated = np.arange(count) == (count - 1 if episode.terminated else -1)
        fields = episode.observation, episode.action, episode.reward, episode.next_observation, terminated
        self._write(Experience(*fields, episode.returns(discount), np.arange(count), np.ones(count, bool)))

    def _write(self, rows: Experience) -> None:
        stop = self.num_rows + len(rows.mask)
        while stop > len(self._data.mask):
            self._data = jax.tree.map(lambda x: np.concatenate([x, np.zeros_like(x)]), self._data)
        jax.tree.map(lambda x, new: x.__setitem__(slice(self.num_rows, stop), new), self._data, rows)
        self.num_rows, self._on_device = stop, None

    def experience(self) -> Experience:
        """Return all rows, on the device."""
        if self._on_device is None:
            self._on_device = jax.device_put(self.rows())
        return self._on_device

    def rows(self) -> Experience:
        """Return a copy of all rows as NumPy arrays, which later steps do not change."""
        data = jax.tree.map(np.copy, self._data)
        # Rows of an interrupted episode may follow; the next episode overwrites them.
        return data._replace(mask=np.arange(len(data.mask)) < self.num_rows)

    def arrays(self) -> dict[str, np.ndarray]:
        """Return the rows that hold steps, for a checkpoint."""
        return {name: np.asarray(x)[: self.num_rows] for name, x in self._data._asdict().items() if x is not None}

    def restore(self, arrays: dict[str, np.ndarray]) -> None:
        """Restore the rows of a checkpoint; refuse observations of another shape."""
        found, shape = arrays["observation"].shape[1:], self._data.observation.shape[1:]
        if found != shape:
            raise ControlError(
                f"the run was of observations of shape {found}, and those of the environment have {shape}; "
                "learn into another directory"
            )
        self.num_rows = 0
        self._write(Experience(**arrays))

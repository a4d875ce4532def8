"""Vectorised Gymnasium environments that outlive the errors of single episodes."""

import logging
from dataclasses import dataclass
from typing import Any

import numpy as np

from bayesrl.errors import ControlError

_log = logging.getLogger(__name__)


@dataclass
class Failures:
    """Counts the episodes that ended with an error.

    Attributes:
        most: so many are allowed.
        count: so many there were.
    """

    most: int
    count: int = 0

    def add(self, seed: int, step: int, error: Exception) -> None:
        """Note one.

        Raises:
            ControlError: there are too many.
        """
        self.count += 1
        told = f"the episode of seed {seed} ended in step {step} with {type(error).__name__}: {error}"
        _log.warning("%s; it is dropped", told)
        if self.count > self.most:
            raise ControlError(
                f"{self.count} episodes ended with an error, and {self.most} are allowed; the last: {told}"
            )


def open_environments(source: Any, number: int, seed: int | None = None) -> Any:
    """Open environments side by side; every episode is reset with a seed of its own.

    Args:
        source: a `GymnasiumSource`.
        number: how many.
        seed: of the first episode; by default that of the source.

    Raises:
        ControlError: Gymnasium is missing, or the environment cannot be made.
    """
    try:
        import gymnasium
        from gymnasium.vector import AutoresetMode, SyncVectorEnv
    except ImportError as error:
        raise ControlError("Gymnasium is not installed; install bayesrl[control]") from error
    first = source.seed if seed is None else seed

    def make(index: int) -> Any:
        def build() -> Any:
            if callable(source.environment):
                return source.environment()
            return gymnasium.make(source.environment, **source.options)

        return lambda: _guarded()(build, first + index, number, source.failures)

    makers = [make(index) for index in range(number)]
    try:
        return SyncVectorEnv(makers, autoreset_mode=AutoresetMode.NEXT_STEP)
    except ControlError:
        raise
    except Exception as error:
        name = source.environment if isinstance(source.environment, str) else repr(source.environment)
        raise ControlError(
            f"environment {name!r} cannot be made: {error}; gymnasium.registry lists those that are known"
        ) from error


def _guarded() -> Any:
    """Make the wrapper class, which needs Gymnasium to be there."""
    import gymnasium

    class Guarded(gymnasium.Wrapper):
        """Drops an episode that ends with an error, and starts the next one in a fresh environment."""

        def __init__(self, build: Any, seed: int, stride: int, failures: Failures) -> None:
            super().__init__(build())
            self._build, self._seed, self._stride, self._failures = build, seed, stride, failures
            self._now, self._length = seed, 0

        def reset(self, **options: Any) -> Any:
            """Reset with the next seed; the one that was passed is not needed."""
            options.pop("seed", None)
            while True:
                self._now, self._length = self._seed, 0
                self._seed += self._stride
                try:
                    return self.env.reset(seed=self._now, **options)
                except Exception as error:  # noqa: BLE001  (whatever an environment raises)
                    self._renew(error)

        def step(self, action: Any) -> Any:
            """Take a step; an error ends the episode, marked `failed`."""
            try:
                self._length += 1
                return self.env.step(action)
            except Exception as error:  # noqa: BLE001
                self._renew(error)
                empty = np.zeros(self.observation_space.shape or (), self.observation_space.dtype)
                return empty if empty.shape else int(empty), 0.0, False, True, {"failed": True}

        def _renew(self, error: Exception) -> None:
            self._failures.add(self._now, self._length - 1, error)
            try:
                self.env.close()
            except Exception as second:  # noqa: BLE001
                _log.warning("closing it raised %s: %s", type(second).__name__, second)
            self.env = self._build()

    return Guarded

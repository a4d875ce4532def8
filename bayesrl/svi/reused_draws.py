"""Sources whose draws serve several updates, for `bayesrl.fit(source=...)`: `ReuseDraws` and its base class."""

import abc
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np

from bayesrl.arguments import Count, CountAboveOne, checked
from bayesrl.compilation.jit import trace_once
from bayesrl.compilation.random_keys import as_hash_key
from bayesrl.core.draws import Draws
from bayesrl.core.programs import Programs
from bayesrl.errors import FitError
from bayesrl.typing import Params, PRNGKey

_SERVED = "served"
"""The name of the number of updates that a batch has served, in a checkpoint."""


class BatchSource(abc.ABC):
    """A source that draws a batch by `draw_batch` and reuses it for `num_updates` updates; see `Source`."""

    num_updates: int
    _batch: Draws | None = None
    _served: int = 0

    @abc.abstractmethod
    def draw_batch(self, key: PRNGKey, params: Params, programs: Programs) -> Draws:
        """Draw a batch; arguments as in `Source`."""

    @property
    def remaining_updates(self) -> int:
        """How many more updates the last batch serves."""
        return self.num_updates - self._served if self._batch is not None else 0

    def count_updates(self, count: int) -> None:
        """Count `count` updates that were made in one call."""
        self._served += count

    def __call__(self, key: PRNGKey, params: Params, programs: Programs) -> Draws:
        """Return a new batch, or the last one again."""
        if self._batch is None or self._served >= self.num_updates:
            self._batch, self._served = self.draw_batch(key, params, programs), 0
        self._served += 1
        return self._batch

    def close(self) -> None:
        """Forget the batch."""
        self._batch = None


@checked(FitError)
@dataclass(eq=False)
class ReuseDraws(BatchSource):
    """Draw a batch once, and take several gradient steps on it.

    This pays off when a draw costs more than an update: long episodes, generated texts, rewards in Python. The
    policy moves between the updates of a batch, so use an objective that corrects for it: `ClippedKL`, or
    `ActorCritic` for rollouts, whose `reference="previous"` makes each batch a step of mirror descent.

    Args:
        num_particles: draws of a batch, for each context.
        num_updates: gradient steps on each batch.

    Raises:
        FitError: a number is out of range.

    Example:
        >>> import bayesrl
        >>> source = bayesrl.ReuseDraws(num_particles=16)  # fit(..., objective=objectives.ClippedKL(), source=source)
        >>> source.num_updates
        4
    """

    num_particles: CountAboveOne = 64
    num_updates: Count = 4
    _draw: Callable[..., Draws] | None = field(default=None, init=False, repr=False)

    def lane(self, index: int) -> "ReuseDraws":
        """Return a source for one of several fits made side by side."""
        return ReuseDraws(self.num_particles, self.num_updates)

    def draw_batch(self, key: PRNGKey, params: Params, programs: Programs) -> Draws:
        """Draw from the guide, [num_particles, ...]."""
        if self._draw is None:
            # Share only mini-batches: if all episodes of a batch had one start, it would say little about other starts.
            share = bool(programs.structure.subsampled)
            self._draw = trace_once(
                lambda key, params: programs.draw(key, params, self.num_particles, share=share), name="draw_batch"
            )
        return self._draw(as_hash_key(key), params)

    def save_state(self) -> dict[str, np.ndarray]:
        """Return the batch for a checkpoint, if it serves more updates; see `Source`."""
        if self._batch is None or self.remaining_updates <= 0:
            return {}
        return self._batch.as_arrays() | {_SERVED: np.asarray(self._served)}

    def restore_state(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Put back what `save_state` returned."""
        self._batch, self._served = Draws.from_arrays(arrays), int(arrays[_SERVED])

    def close(self) -> None:
        """Forget the batch, and the program that drew it."""
        super().close()
        self._draw = None

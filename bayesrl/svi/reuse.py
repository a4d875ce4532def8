"""`Replay`: simulated episodes that serve several updates, as those of real environments do."""

from dataclasses import dataclass, field
from typing import Any

from bayesrl.arguments import Count, checked
from bayesrl.compilation.jit import once_prepared
from bayesrl.compilation.keys import cheap
from bayesrl.core.draws import Draws
from bayesrl.core.programs import Pair
from bayesrl.errors import ControlError
from bayesrl.typing import Params, PRNGKey


@checked(ControlError)
@dataclass
class Replay:
    """Draws a batch of episodes of a rollout, and hands it over for several updates: `bayesrl.fit(source=Replay())`.

    With `ActorCritic(reference="previous")` the updates of one batch are a step of mirror descent.

    Args:
        num_particles: episodes in a batch.
        num_updates: gradient steps per batch.

    Raises:
        ControlError: a number is out of range.

    Example:
        >>> from bayesrl.control import Replay
        >>> Replay(num_updates=4).num_particles
        64
    """

    num_particles: Count = 64
    num_updates: Count = 8
    _batch: Draws | None = field(default=None, repr=False)
    _served: int = field(default=0, repr=False)
    _draw: Any = field(default=None, repr=False)

    def lane(self, index: int) -> "Replay":
        """Give a source for one of several fits made side by side."""
        return Replay(self.num_particles, self.num_updates)

    @property
    def further(self) -> int:
        """How many more updates the batch that was given serves."""
        return self.num_updates - self._served if self._batch is not None else 0

    def serve(self, count: int) -> None:
        """Count updates that were made with the batch at once."""
        self._served += count

    def __call__(self, key: PRNGKey, params: Params, pair: Pair) -> Draws:
        """Give a batch of draws, [num_particles, ...]: a new one, or the last one again."""
        if self._draw is None:
            self._draw = once_prepared(
                lambda key, params: pair.draw(key, params, self.num_particles, share=False), name="draw_batch"
            )
        if self._batch is None or self._served >= self.num_updates:
            self._batch, self._served = self._draw(cheap(key), params), 0
        self._served += 1
        return self._batch

    def close(self) -> None:
        """Forget the batch, and the program that it was drawn from."""
        self._batch = self._draw = None

"""`Reuse`: samples of a language model that serve several updates, for `bayesrl.fit(source=...)`."""

from dataclasses import dataclass, field
from typing import Any

import jax

from bayesrl.arguments import Count, Several, checked
from bayesrl.compilation.jit import Compiled
from bayesrl.core.draws import Draws
from bayesrl.core.programs import Pair
from bayesrl.errors import LanguageModelError
from bayesrl.typing import Params, PRNGKey


@checked(LanguageModelError)
@dataclass(eq=False)
class Reuse:
    """Draws completions and their rewards once for several gradient steps.

    Worth its while where rewards or generation cost more than an update does. Use it with
    `objective=objectives.ClippedKL()`, which corrects for the policy having moved on since:

        fit(key, policy, beta=0.1, guide=LoRA(), objective=ClippedKL(), source=Reuse(num_updates=4))

    Args:
        num_particles: completions of each prompt.
        num_updates: gradient steps that each batch serves.

    Raises:
        LanguageModelError: a number is out of range.

    Example:
        >>> from bayesrl.lm import Reuse
        >>> Reuse(num_particles=16, num_updates=4).num_updates
        4
    """

    num_particles: Several = 64
    num_updates: Count = 4
    _batch: Draws | None = field(default=None, init=False, repr=False)
    _served: int = field(default=0, init=False, repr=False)

    def lane(self, index: int) -> "Reuse":
        """Give a source for another of several fits made side by side."""
        return Reuse(self.num_particles, self.num_updates)

    @property
    def further(self) -> int:
        """How many more updates the batch that was given serves."""
        return self.num_updates - self._served if self._batch is not None else 0

    def serve(self, count: int) -> None:
        """Count updates that were made with the batch at once."""
        self._served += count

    def __call__(self, key: PRNGKey, params: Params, pair: Pair) -> Draws:
        """Give a batch of draws, [num_particles, ...]: a new one, or the last one again."""
        if self._batch is None or self._served >= self.num_updates:
            static = (pair.policy, pair.guide, pair.structure, pair.learned, self.num_particles)
            self._batch, self._served = _drawn(static, dict(pair.transforms), pair.args, key, params), 0
        self._served += 1
        return self._batch

    def close(self) -> None:
        """Forget the batch."""
        self._batch = None


@Compiled
def _drawn(static: Any, transforms: Any, args: Any, key: PRNGKey, params: Params) -> Draws:
    policy, guide, structure, learned, num = static
    pair = Pair(policy, guide, structure, args, transforms, learned)
    return jax.lax.stop_gradient(pair.draw(key, params, num, stopped=structure.actions))

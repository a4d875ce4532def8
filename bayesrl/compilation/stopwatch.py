"""How long something takes, and how much of that JAX spends on making programs."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import jax

_MAKING = "/jax/core/compile/"


@dataclass
class Stopwatch:
    """Seconds of the clock.

    Attributes:
        total: in all.
        making: that went into tracing, lowering and compiling programs.
    """

    total: float = 0.0
    making: float = 0.0
    _spans: list[tuple[float, float]] = field(default_factory=list, repr=False)

    @property
    def running(self) -> float:
        """Seconds that went into everything else."""
        return max(self.total - self.making, 0.0)

    def _heard(self, event: str, duration_secs: float, **_: Any) -> None:
        if event.startswith(_MAKING):
            now = time.monotonic()
            self._spans.append((now - duration_secs, now))


@contextmanager
def stopwatch() -> Iterator[Stopwatch]:
    """Measure the time that the context takes.

    Example:
        >>> from bayesrl.compilation.stopwatch import stopwatch
        >>> with stopwatch() as watch:
        ...     total = sum(range(1000))
        >>> 0 <= watch.making <= watch.total
        True
    """
    watch, began = Stopwatch(), time.monotonic()
    jax.monitoring.register_event_duration_secs_listener(watch._heard)
    try:
        yield watch
    finally:
        jax.monitoring.unregister_event_duration_listener(watch._heard)
        watch.total = time.monotonic() - began
        watch.making = min(_length(watch._spans), watch.total)


def _length(spans: list[tuple[float, float]]) -> float:
    """Return the length of the union of spans: tracing one program may trace another inside of it."""
    length, reached = 0.0, -float("inf")
    for start, end in sorted(spans):
        length += max(end - max(start, reached), 0.0)
        reached = max(reached, end)
    return length

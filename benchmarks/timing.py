"""Timing side by side, in one process, on a noisy machine."""

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax


def seconds(function: Callable[[], Any]) -> tuple[float, Any]:
    """Time one call, including the wait for its result; return the seconds and the result."""
    start = time.perf_counter()
    result = jax.block_until_ready(function())
    return time.perf_counter() - start, result


def interleaved(functions: Sequence[Callable[[], Any]], repeats: int) -> list[list[float]]:
    """Time several functions in turn, A B A B ...: wall-clock seconds, [function][repeat]."""
    times: list[list[float]] = [[] for _ in functions]
    for _ in range(repeats):
        for own, function in zip(times, functions, strict=True):
            own.append(seconds(function)[0])
    return times


def median_ratio(first: Sequence[float], second: Sequence[float]) -> float:
    """Compute the median over the pairs of first / second."""
    return statistics.median(a / b for a, b in zip(first, second, strict=True))


class Clock:
    """Collects the time inside its `with` blocks, so that other work can stay outside."""

    def __init__(self) -> None:
        self.total = 0.0
        self._started = 0.0

    def __enter__(self) -> "Clock":
        self._started = time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        self.total += time.perf_counter() - self._started

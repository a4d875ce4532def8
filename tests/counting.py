"""Counting what is compiled: the exact way to ask whether something was."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jax

_OF_KEYS = frozenset({"stage", "_threefry_seed"})
_EVENT = "/jax/core/compile/backend_compile_duration"


@contextmanager
def compilations() -> Iterator[list[str]]:
    """Collect the names of the programs that XLA compiles inside of the context, or finds on disk.

    Those that make a key are left out: they are the caller's, and compiled at the first key of a process.
    """
    names: list[str] = []

    def heard(event: str, _: float, **told: Any) -> None:
        if event == _EVENT:
            name = str(told.get("fun_name", "?")).removeprefix("jit(").removesuffix(")")
            if name not in _OF_KEYS:
                names.append(name)

    jax.monitoring.register_event_duration_secs_listener(heard)
    try:
        yield names
    finally:
        jax.monitoring.unregister_event_duration_listener(heard)

"""Counting what is compiled: the exact way to ask whether something was."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jax

_EVENT = "/jax/core/compile/backend_compile_duration"


@contextmanager
def compilations() -> Iterator[list[str]]:
    """Collect the names of the programs that XLA compiles inside of the context, or finds on disk."""
    names: list[str] = []

    def heard(event: str, _: float, **told: Any) -> None:
        if event == _EVENT:
            names.append(str(told.get("fun_name", "?")).removeprefix("jit(").removesuffix(")"))

    jax.monitoring.register_event_duration_secs_listener(heard)
    try:
        yield names
    finally:
        jax.monitoring.unregister_event_duration_listener(heard)

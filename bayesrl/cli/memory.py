"""Let a command reuse memory instead of returning it to the system after each step."""

import ctypes
import os
import sys

_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8
_KEPT = 2**30


def keep_memory() -> None:
    """Let this process reuse up to a gigabyte of freed memory; call it before JAX is imported.

    XLA allocates a program's memory anew at each call. From tens of megabytes on, glibc asks the system for it each
    time, and the system clears every page first: a fifth of the time of a step. Users' own glibc variables take
    precedence.
    """
    if not sys.platform.startswith("linux") or any(name.startswith("MALLOC_") for name in os.environ):
        return
    if "jax" in sys.modules:
        return  # the process existed before the command, so its memory is not ours to configure
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return  # a C library other than glibc
    # Without mmap large blocks come from the arena, which keeps them; one arena, so that all threads share it.
    for option, value in ((_ARENA_MAX, 1), (_MMAP_MAX, 0), (_TRIM_THRESHOLD, _KEPT)):
        mallopt(option, value)

"""Memory that a command keeps instead of handing it back to the system after each step."""

import ctypes
import os
import sys

_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8
_KEPT = 2**30


def keep_memory() -> None:
    """Let freed memory, up to a gigabyte, be used again by this process; call it before JAX is imported.

    XLA takes the memory of a program anew at each call. From tens of megabytes on, glibc asks the system for it each
    time, which clears every page first: a fifth of the time of a step. Who has set glibc's own variables is heard.
    """
    if not sys.platform.startswith("linux") or any(name.startswith("MALLOC_") for name in os.environ):
        return
    if "jax" in sys.modules:
        return  # a process that was there before the command is not ours
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return  # another C library than glibc
    for option, value in ((_ARENA_MAX, 1), (_MMAP_MAX, 0), (_TRIM_THRESHOLD, _KEPT)):
        mallopt(option, value)

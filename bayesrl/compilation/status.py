"""What the library is doing right now, for a display to show; without a display this costs nothing."""

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar

type Display = Callable[[str], AbstractContextManager[None]]
"""Shows words while its context lasts."""

_display: ContextVar[Display | None] = ContextVar("display", default=None)


@contextmanager
def activity(words: str) -> Iterator[None]:
    """Announce what happens inside the context; activities may be nested, and the innermost is shown.

    Args:
        words: description of the activity, such as `compiling the step`.

    Example:
        >>> from contextlib import contextmanager
        >>> from bayesrl.compilation.status import activity, show_activities
        >>> @contextmanager
        ... def display(words):
        ...     print(f"{words} ...")
        ...     yield
        ...     print("done")
        >>> with activity("resting"):  # no display, nothing shown
        ...     pass
        >>> with show_activities(display), activity("compiling the step"):
        ...     pass
        compiling the step ...
        done
    """
    display = _display.get()
    if display is None:
        yield
    else:
        with display(words):
            yield


@contextmanager
def show_activities(display: Display | None) -> Iterator[None]:
    """Show the activities inside the context on a display, or not at all.

    Args:
        display: the display; None keeps activities silent.
    """
    token = _display.set(display)
    try:
        yield
    finally:
        _display.reset(token)


def has_display() -> bool:
    """Whether a display shows activities."""
    return _display.get() is not None


def in_notebook() -> bool:
    """Whether the process is a Jupyter kernel."""
    # Look it up without importing it: a process that has not imported IPython is no notebook.
    shell = sys.modules.get("IPython")
    return (
        shell is not None and "ipykernel" in sys.modules and getattr(shell, "get_ipython", lambda: None)() is not None
    )

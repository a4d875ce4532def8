"""How a command ends: one line for each refusal and warning, and on Ctrl-C a hint how to continue."""

import shlex
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import typer

from bayesrl.cache import CacheWarning
from bayesrl.cli.terminal import print_line
from bayesrl.errors import BayesRLError

INTERRUPTED = 130


class Interrupted(KeyboardInterrupt):
    """Ctrl-C ended a fit, which saved itself."""

    def __init__(self, done: int, total: int) -> None:
        super().__init__()
        self.done, self.total = done, total


@contextmanager
def handle_interrupt(folder: Path | None) -> Iterator[Callable[..., None]]:
    """On Ctrl-C, say where a fit stopped and how to continue.

    A Ctrl-C during garbage collection is lost, because callbacks of the collector cannot raise. So this
    handler remembers it and yields a function that raises it again; a fit calls that function.
    """
    pressed = False

    def press(*_: object) -> None:
        nonlocal pressed
        pressed = True
        raise KeyboardInterrupt

    def raise_again(*_: object) -> None:
        if pressed:
            raise KeyboardInterrupt

    def report(lost: Any) -> None:
        if lost.exc_type is not KeyboardInterrupt:
            sys.__unraisablehook__(lost)

    in_main_thread = threading.current_thread() is threading.main_thread()
    # Python allows signal handlers in the main thread only.
    handler = signal.signal(signal.SIGINT, press) if in_main_thread else None
    hook, sys.unraisablehook = sys.unraisablehook, report
    try:
        yield raise_again
    except KeyboardInterrupt as stop:
        where = f"at step {stop.done:,} of {stop.total:,}" if isinstance(stop, Interrupted) else "before it was done"
        begun = folder is not None and (folder / "problem.json").exists()
        further = f"; go on with: bayesrl resume {shlex.quote(str(folder))}" if begun else ""
        print_line(f"stopped {where}{further}", "yellow", err=True)
        raise typer.Exit(INTERRUPTED) from None
    finally:
        sys.unraisablehook = hook
        if in_main_thread:
            signal.signal(signal.SIGINT, handler)


@contextmanager
def exit_on_error() -> Iterator[None]:
    """Print an error of bayesrl as one red line, and exit with code 2."""
    try:
        yield
    except BayesRLError as error:
        print_line(f"error: {' '.join(str(error).split())}", "red", err=True)
        raise typer.Exit(2) from None


@contextmanager
def one_line_warnings() -> Iterator[None]:
    """Print warnings about the cache of compiled programs as one yellow line."""
    shown = warnings.showwarning

    def show(message: Any, category: type[Warning], *where: Any) -> None:
        if issubclass(category, CacheWarning):
            if sys.stderr.isatty():
                sys.stderr.write("\r\x1b[K")  # over a progress line
            print_line(f"warning: {message}", "yellow", err=True)
        else:
            shown(message, category, *where)

    warnings.showwarning = show  # type: ignore[assignment]
    try:
        yield
    finally:
        warnings.showwarning = shown

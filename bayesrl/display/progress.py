"""One line that shows how a run is going, in terminals and notebooks only.

It shows the bar of the loop or, while no bar moves, the current activity (compiling, scoring, writing) with its
seconds. A separate thread redraws it, so that it keeps moving during a long step.
"""

import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from typing import Any

import numpy as np
from tqdm.std import tqdm
from tqdm.utils import disp_len, disp_trim

from bayesrl.compilation.status import in_notebook, show_activities

POLL_SECONDS = 0.2
MIN_SECONDS = 0.3
"""Shorter activities are not shown."""
_WIDE = 100
_BAR = "{percentage:3.0f}% |{bar}| {n_fmt}/{total_fmt} {unit}s, {elapsed}, {remaining} left{postfix}"
_WIDE_BAR = "{percentage:3.0f}% |{bar}| {n_fmt}/{total_fmt} {rate_fmt}, {elapsed}, {remaining} left{postfix}"

_line: ContextVar["ProgressLine | None"] = ContextVar("line", default=None)


def is_visible() -> bool:
    """Whether somebody can see a line: the output is a terminal or a notebook."""
    return sys.stderr.isatty() or in_notebook()


@contextmanager
def show_progress(show: bool) -> Iterator[None]:
    """Show the activities inside the context on a line, if there is a terminal or a notebook.

    Args:
        show: whether to show them; if False, nothing is shown, even if an outer context shows a line.

    Example:
        >>> from bayesrl.compilation.status import activity
        >>> from bayesrl.display.progress import show_progress
        >>> with show_progress(True), activity("compiling the step"):  # after 3 seconds: compiling the step, 3 s
        ...     pass
    """
    if not show:
        with show_activities(None):
            yield
    elif _line.get() is not None or not is_visible():
        yield
    else:
        line = ProgressLine()
        token = _line.set(line)
        try:
            with line, show_activities(line.describe):
                yield
        finally:
            _line.reset(token)


class ProgressLine:
    """The line: the innermost activity that has lasted long enough, or the bar of a loop."""

    def __init__(self) -> None:
        self._activities: list[tuple[str, float]] = []
        self._drawn = ""
        self._bar: Any = None
        self._moved = 0.0
        self._lock = threading.RLock()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._keep_drawing, name="bayesrl progress", daemon=True)

    def __enter__(self) -> "ProgressLine":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        with self._lock:
            self._write("")

    @contextmanager
    def describe(self, words: str) -> Iterator[None]:
        """Show an activity inside the context, and how long it has taken."""
        own = (words, time.monotonic())
        with self._lock:
            self._activities.append(own)
        try:
            yield
        finally:
            with self._lock:
                self._activities.remove(own)
                self._draw()

    @contextmanager
    def with_bar(self, bar: Any) -> Iterator[None]:
        """Keep the clock of a bar running inside the context."""
        with self._lock:
            self._write("")
            outer = self._bar, self._activities
            self._bar, self._activities = bar, []
        try:
            yield
        finally:
            with self._lock:
                self._write("")
                self._bar, self._activities = outer

    def advance(self, bar: Any, steps: int) -> None:
        """Advance a bar."""
        with self._lock:
            self._write("")
            bar.update(steps)
            self._moved = time.monotonic()

    def _keep_drawing(self) -> None:
        while not self._ended.wait(POLL_SECONDS):
            with self._lock:
                if not self._ended.is_set():
                    self._draw()

    def _draw(self) -> None:
        now = time.monotonic()
        for words, began in reversed(self._activities):
            if now - began >= MIN_SECONDS:
                seconds = int(now - began)
                self._write(words, f", {seconds} s" if seconds else "")
                return
        self._write("")
        # A bar draws itself when it moves; refresh its clock only while it stands still.
        if self._bar is not None and now - self._moved >= 1:
            self._bar.refresh()
            self._moved = now

    def _write(self, words: str, seconds: str = "") -> None:
        """Replace the bar, or the text shown before, by text."""
        room = shutil.get_terminal_size().columns - 1 - len(seconds)
        text = disp_trim(" ".join(words.split()), room) + seconds
        if text == self._drawn:
            return
        if self._bar is not None and not self._drawn:
            self._bar.clear()
        # The old text may be longer than the new: overwrite its end with spaces.
        blank = " " * max(0, disp_len(self._drawn) - disp_len(text))
        sys.stderr.write(f"\r{text}{blank}" if text else f"\r{blank}\r")
        sys.stderr.flush()
        self._drawn = text
        if self._bar is not None and not text:
            self._bar.refresh()
            self._moved = time.monotonic()


class Progress:
    """A progress line: how far, how long so far, how long still, and a few words.

    Args:
        total: total number of steps.
        done: number of steps done before.
        show: whether to show it, if there is a terminal or a notebook.
        unit: name of a step.
    """

    def __init__(self, total: int, done: int, *, show: bool, unit: str = "step") -> None:
        self._show = show
        self._bar = tqdm(
            total=total,
            initial=done,
            disable=not (show and is_visible()),
            unit=unit,
            dynamic_ncols=True,
            bar_format=_BAR if shutil.get_terminal_size().columns < _WIDE else _WIDE_BAR,
        )
        self._around = ExitStack()

    def __enter__(self) -> "Progress":
        self._around.enter_context(show_progress(self._show))
        if not self._bar.disable and (line := _line.get()) is not None:
            self._around.enter_context(line.with_bar(self._bar))
        return self

    def __exit__(self, *_: object) -> None:
        self._around.close()
        self._bar.close()

    def update(self, steps: int, postfix_fn: Callable[[], str]) -> None:
        """Advance by some steps; `postfix_fn` makes the words after the bar and runs only if they are shown."""
        if self._bar.disable:
            return
        self._bar.set_postfix_str(postfix_fn(), refresh=False)
        line = _line.get()
        if line is None:
            self._bar.update(steps)
        else:
            line.advance(self._bar, steps)


def format_row(row: dict[str, np.ndarray]) -> str:
    """Write J, E[R] and KL of one row of the history; means over β and restarts."""
    text = f"J={np.mean(row['objective']):.4g} E[R]={np.mean(row['reward']):.4g} KL={np.mean(row['kl']):.3g}"
    skipped = int(np.sum(row["skipped"]))
    return text + (f" skipped={skipped}" if skipped else "")

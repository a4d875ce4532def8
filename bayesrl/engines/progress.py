"""One line that tells how a run is going, in terminals and notebooks, and nothing elsewhere."""

import sys
from collections.abc import Callable
from types import TracebackType

import numpy as np
from tqdm.std import tqdm


def _in_notebook() -> bool:
    """Whether the process is a Jupyter kernel."""
    shell = sys.modules.get("IPython")
    return (
        shell is not None and "ipykernel" in sys.modules and getattr(shell, "get_ipython", lambda: None)() is not None
    )


class Progress:
    """A progress line: how far, how fast, and a few words.

    Args:
        total: of the steps.
        done: steps done before.
        show: whether to show it where there is a terminal or a notebook.
        unit: what a step is called.
    """

    def __init__(self, total: int, done: int, *, show: bool, unit: str = "step") -> None:
        visible = show and (sys.stderr.isatty() or _in_notebook())
        self._bar = tqdm(
            total=total,
            initial=done,
            disable=not visible,
            unit=unit,
            dynamic_ncols=True,
            bar_format="{percentage:3.0f}% |{bar}| {n_fmt}/{total_fmt} {rate_fmt}{postfix}",
        )

    def __enter__(self) -> "Progress":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()

    def update(self, steps: int, tell: Callable[[], str]) -> None:
        """Go on by some steps, with a few words that are only asked for where they are shown."""
        if not self._bar.disable:
            self._bar.set_postfix_str(tell(), refresh=False)
            self._bar.update(steps)


def told(row: dict[str, np.ndarray]) -> str:
    """Tell J, E[R] and KL of a row of the history; with several β and restarts, the means."""
    text = f"J={np.mean(row['objective']):.4g} E[R]={np.mean(row['reward']):.4g} KL={np.mean(row['kl']):.3g}"
    skipped = int(np.sum(row["skipped"]))
    return text + (f" skipped={skipped}" if skipped else "")

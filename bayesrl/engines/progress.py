"""One line that tells how a fit is going, in terminals and notebooks, and nothing elsewhere."""

import sys
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
    """A progress line: J, E[R], KL and steps per second."""

    def __init__(self, total: int, done: int, *, show: bool) -> None:
        visible = show and (sys.stderr.isatty() or _in_notebook())
        self._bar = tqdm(
            total=total,
            initial=done,
            disable=not visible,
            unit="step",
            dynamic_ncols=True,
            bar_format="{percentage:3.0f}% |{bar}| {n_fmt}/{total_fmt} {rate_fmt}{postfix}",
        )

    def __enter__(self) -> "Progress":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()

    def update(self, steps: int, row: dict[str, np.ndarray]) -> None:
        """Show a row of the history; with several β and restarts, the means."""
        if not self._bar.disable:
            text = f"J={np.mean(row['objective']):.4g} E[R]={np.mean(row['reward']):.4g} KL={np.mean(row['kl']):.3g}"
            skipped = int(np.sum(row["skipped"]))
            self._bar.set_postfix_str(text + (f" skipped={skipped}" if skipped else ""), refresh=False)
            self._bar.update(steps)

"""Lines, titles and tables on a terminal, with control characters made visible; imports nothing heavy."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from bayesrl.ready_models import model_names

if TYPE_CHECKING:
    from rich.console import Console


def print_line(text: str, colour: str | None = None, *, err: bool = False) -> None:
    """Print a line, in colour on a terminal; control characters are made visible, not sent."""
    # Most lines are clean, and the check spares them an import.
    if not text.replace("\n", "").isprintable():
        from bayesrl.display.formatting import sanitize

        text = sanitize(text)
    typer.secho(text, fg=None if os.environ.get("NO_COLOR") else colour, err=err)


def format_size(size: int) -> str:
    """Write a number of bytes with three significant digits."""
    amount, unit = float(size), "bytes"
    for larger in ("kB", "MB", "GB"):
        if amount < 999.5:
            break
        amount, unit = amount / 1000, larger
    return f"{amount:.3g} {unit}"


def print_title(model: str, about: str, folder: Path) -> None:
    """Print the name of a problem, what it is, and where its run goes."""
    from rich.text import Text

    about = about or model_names().get(model, "")
    title = Text.assemble((f"{model}: {about}" if about else model, "bold"), f"  →  {folder}")
    make_console().print(title, soft_wrap=True)


def make_console() -> "Console":
    """Return the console to print tables to; it makes control characters visible instead of sending them."""
    from rich.console import Console
    from rich.segment import Segment

    from bayesrl.display.formatting import sanitize

    class Terminal(Console):
        def render(self, renderable: Any, options: Any = None) -> Iterator[Segment]:
            for segment in super().render(renderable, options):
                yield segment if segment.control else segment._replace(text=sanitize(segment.text))

    return Terminal(highlight=False)

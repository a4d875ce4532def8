"""Helpers of the command line that parse options, write values and print lines; they import nothing heavy."""

import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from bayesrl.errors import FitError, PolicyError
from bayesrl.ready_models import ProblemError, model_names

if TYPE_CHECKING:
    from rich.console import Console


def parse_beta(text: str) -> list[float]:
    """Parse one temperature, or several separated by commas.

    Raises:
        PolicyError: the text is neither, or a temperature is not positive and finite.
    """
    try:
        values = [float(part) for part in text.split(",")]
    except ValueError as error:
        raise PolicyError(f"--beta {text!r} is not a number or a list like 0.1,0.3,1") from error
    bad = [value for value in values if not 0 < value < math.inf]
    if bad:
        raise PolicyError(f"beta must be positive and finite, but holds {bad[0]:g}; use --beta 0.1, say")
    return values


def parse_options(assignments: list[str]) -> dict[str, Any]:
    """Parse options of the form name=value.

    Raises:
        ProblemError: an option does not have this form.
    """
    options: dict[str, Any] = {}
    for assignment in assignments:
        name, equals, value = assignment.partition("=")
        if not equals or not name.isidentifier():
            raise ProblemError(f"--set {assignment!r} is not of the form name=value")
        options[name] = _parse_value(value)
    return options


def _parse_value(text: str) -> int | float | bool | str:
    """Parse an int, a float, true or false; everything else is a string."""
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def check_positive(name: str, value: int | None) -> None:
    """Refuse a count below 1.

    Raises:
        FitError: the count is below 1.
    """
    if value is not None and value < 1:
        raise FitError(f"{name}={value}; use an integer of at least 1")


def format_option(value: Any) -> str:
    """Write the value of an option as a user would type it."""
    return str(value).lower() if isinstance(value, bool) else repr(value) if value == "" else str(value)


def problem_title(model: str, about: str) -> str:
    """Name a problem, with a line that says what it is."""
    about = about or model_names().get(model, "")
    return f"{model}: {about}" if about else model


def describe_problem(model: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Describe how to make the problem again, from any folder."""
    return {"model": str(Path(model).resolve()) if model.endswith(".py") else model, "options": dict(options)}


def list_files(folder: Path) -> str:
    """List the names of the files in a folder."""
    return ", ".join(sorted(path.name for path in folder.iterdir() if not path.name.startswith(".")))


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

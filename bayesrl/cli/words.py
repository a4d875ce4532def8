"""Words of the command line: options read, values spelt."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from bayesrl.errors import PolicyError
from bayesrl.problem import ModelError, Problem, model_names


def parse_beta(text: str) -> float | np.ndarray:
    """Read one temperature, or several with commas.

    Raises:
        PolicyError: it is neither.
    """
    try:
        values = [float(part) for part in text.split(",")]
    except ValueError as error:
        raise PolicyError(f"--beta {text!r} is not a number or a list like 0.1,0.3,1") from error
    return values[0] if len(values) == 1 else np.asarray(values)


def parse_options(assignments: list[str]) -> dict[str, Any]:
    """Read options of the form name=value.

    Raises:
        ModelError: one is not of this form.
    """
    options: dict[str, Any] = {}
    for assignment in assignments:
        name, equals, value = assignment.partition("=")
        if not equals or not name.isidentifier():
            raise ModelError(f"--set {assignment!r} is not of the form name=value")
        options[name] = _parse_value(value)
    return options


def _parse_value(text: str) -> int | float | bool | str:
    """Read an int, a float, true or false; everything else is a string."""
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def spell(value: Any) -> str:
    """Write the value of an option as it is typed."""
    return str(value).lower() if isinstance(value, bool) else repr(value) if value == "" else str(value)


def title_of(model: str, problem: Problem) -> str:
    """Name a problem, with the line that says what it is."""
    about = problem.about or model_names().get(model, "")
    return f"{model}: {about}" if about else model


def description(model: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Say how to make the problem again, from whatever folder."""
    return {"model": str(Path(model).resolve()) if model.endswith(".py") else model, "options": dict(options)}


def dump(content: Any) -> bytes:
    """Write JSON for a run folder."""
    return json.dumps(content, indent=1, ensure_ascii=False).encode()


def names_in(folder: Path) -> str:
    """Name the files in a folder."""
    return ", ".join(sorted(path.name for path in folder.iterdir() if not path.name.startswith(".")))


def terminal() -> Console:
    """Give the terminal to print to."""
    return Console(highlight=False)

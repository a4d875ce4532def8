"""What a run folder holds, beyond the fit itself: its model, its scores, and what is missing."""

import shlex
from pathlib import Path
from typing import Any, NamedTuple

from bayesrl import run_folder
from bayesrl.certainty.scores import Scoreboard, from_json
from bayesrl.cli.words import spell
from bayesrl.core.showing import Line
from bayesrl.errors import RunFolderError

KEPT = ("training.png", "training.svg", "report.html")
"""Files that a run leaves when it ends, beside the posterior and the scores."""


class Scores(NamedTuple):
    """The scores that a run folder holds.

    Attributes:
        step: after how many steps they were made.
        fit: of the fit.
        held_out: on held-out data, or None.
        verdict: of the diagnosis, or None where there is none.
    """

    step: int
    fit: Scoreboard
    held_out: Scoreboard | None
    verdict: Line | None


def read_model(directory: Path) -> dict[str, Any] | None:
    """Read which model a run fits, with which options; None where the folder does not say.

    Raises:
        RunFolderError: the file is damaged.
    """
    made = run_folder.read_json(directory, run_folder.MODEL)
    if made is not None and not (isinstance(made.get("model"), str) and isinstance(made.get("options"), dict)):
        raise RunFolderError(f"{directory / run_folder.MODEL} does not name a model and its options; fit anew")
    return made


def made_of(directory: Path) -> list[tuple[str, str]]:
    """Tell model and options as rows of (setting, value)."""
    made = read_model(directory)
    if made is None:
        return []
    options = ", ".join(f"{name}={spell(value)}" for name, value in made["options"].items())
    return [("model", made["model"]), ("options", options or "defaults")]


def read_scores(directory: Path) -> Scores | None:
    """Read the scores of a run; None where it was not scored.

    Raises:
        RunFolderError: the file is damaged.
    """
    told = run_folder.read_json(directory, run_folder.SCORES)
    if told is None:
        return None
    try:
        held_out = None if told["held_out"] is None else from_json(told["held_out"])
        verdict = Line(*told["verdict"]) if told.get("verdict") else None
        return Scores(int(told["step"]), from_json(told["fit"]), held_out, verdict)
    except (KeyError, TypeError, ValueError) as error:
        raise RunFolderError(
            f"{directory / run_folder.SCORES} holds no scores: {error!r}; delete it and run `bayesrl resume` again"
        ) from error


def lacking(directory: Path, done: int, total: int, scores: Scores | None) -> list[str]:
    """Say what a run that has not ended lacks, and how to get it."""
    command = f"bayesrl resume {shlex.quote(str(directory))}"
    absent = [
        what
        for what, there in (
            (f"{total - done:,} of {total:,} steps", done >= total),
            ("the saved draws (posterior.nc)", (directory / run_folder.POSTERIOR).exists()),
            ("the results", scores is not None and scores.step == done),
            ("the pictures", all((directory / name).exists() for name in KEPT[:2])),
            ("the report", (directory / KEPT[2]).exists()),
        )
        if not there
    ]
    return [f"\nmissing: {', '.join(absent)}; go on with: {command}"] if absent else []

"""What a run folder holds beside the fit itself: model, scores, episodes, and what is missing; works without JAX."""

import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from bayesrl import run_folder
from bayesrl.cli.option_values import format_option
from bayesrl.diagnostics.evidence.result import Evidence
from bayesrl.display.tables import Line
from bayesrl.errors import RunFolderError
from bayesrl.files.digests import digest_of, is_intact
from bayesrl.files.regular_files import file_name, read_file
from bayesrl.files.schemas import NOTHING, TEXT, Schema, ValueKind, integer_between, misfit

REPORT = "report.html"
OUTPUT_FILES = ("training.png", "training.svg", REPORT)
"""Files that a finished run leaves, beside the posterior and the scores."""

COLOURS = {"": "", "pass": "green", "warn": "yellow", "fail": "red", "unknown": "yellow"}
"""Colours of outcomes."""


def _is_evidence(value: Any) -> bool:
    try:
        Evidence.from_json(value)
    except (KeyError, TypeError, ValueError, AttributeError):
        return False
    return True


_OUTCOME = ValueKind("a text and an outcome", lambda v: misfit(v, [TEXT]) is None and len(v) == 2 and v[1] in COLOURS)
_EVIDENCE = ValueKind("the evidence of a fit", _is_evidence)
_SCHEMA: dict[str, Schema] = {
    "step": integer_between(0, 2**31),
    "fit": _EVIDENCE,
    "held_out": (NOTHING, _EVIDENCE),
    "verdict": (NOTHING, _OUTCOME),
    "figures?": {"*": TEXT},
}


class RunScores(NamedTuple):
    """The scores in a run folder, made after some steps; figures are names, each with the digest of its content."""

    step: int
    fit: Evidence
    held_out: Evidence | None
    verdict: Line | None
    figures: Mapping[str, str]

    def to_json(self) -> dict[str, Any]:
        """Describe them as a run folder stores them."""
        held_out = None if self.held_out is None else self.held_out.to_json()
        return self._asdict() | {"fit": self.fit.to_json(), "held_out": held_out}


def read_scores(directory: Path) -> RunScores | None:
    """Read the scores of a run; None if it was not scored.

    Raises:
        RunFolderError: the file is damaged.
    """
    remedy = f"delete it, and bayesrl resume {shlex.quote(str(directory))} writes it anew"
    stored = run_folder.load_json(directory, run_folder.SCORES, _SCHEMA, remedy)
    if stored is None:
        return None
    held_out = None if stored["held_out"] is None else Evidence.from_json(stored["held_out"])
    verdict = None if stored["verdict"] is None else Line(*stored["verdict"])
    return RunScores(stored["step"], Evidence.from_json(stored["fit"]), held_out, verdict, stored.get("figures", {}))


# ---- the model ----------------------------------------------------------------------------------


def describe_model(model: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Describe how to make a model again, from any folder."""
    return {"model": str(Path(model).resolve()) if model.endswith(".py") else model, "options": dict(options)}


def read_model(directory: Path) -> dict[str, Any] | None:
    """Read which model a run fits, with which options; None if the folder does not say.

    Raises:
        RunFolderError: the file is damaged.
    """
    remedy = f"bayesrl fit or learn MODEL --out {shlex.quote(str(directory))} writes it anew"
    return run_folder.load_json(directory, run_folder.MODEL, run_folder.MODEL_SCHEMA, remedy)


def require_model(directory: Path) -> dict[str, Any]:
    """Read which model a run fits, with which options.

    Raises:
        RunFolderError: the file is damaged or missing.
    """
    run_folder.read_problem(directory)
    made = read_model(directory)
    if made is None:
        raise RunFolderError(
            f"{directory} does not say which model it fits (it has no {run_folder.MODEL}); "
            "continue it in Python with bayesrl.resume(directory, policy, *args)"
        )
    return made


def model_rows(made: Mapping[str, Any] | None) -> list[tuple[str, str]]:
    """Return model and options as rows of (setting, value); none for a run without them."""
    if made is None:
        return []
    options = ", ".join(f"{name}={format_option(value)}" for name, value in made["options"].items())
    return [("model", made["model"]), ("options", options or "defaults")]


# ---- runs of `learn` ----------------------------------------------------------------------------


def is_learning(directory: Path) -> bool:
    """Whether a folder holds runs of `learn`."""
    return run_folder.read_problem(directory)["identity"].get("kind") == "learn"


def learning_folder(directory: Path, index: int) -> Path:
    """Return the folder of one run: the first run lives in the folder itself.

    Raises:
        RunFolderError: it is a link.
    """
    place = directory if index == 0 else directory / f"run-{index + 1}"
    if index > 0 and place.is_symlink():
        raise RunFolderError(f"{place} is a link, and runs are kept in folders of their own; remove it")
    return place


def read_episodes(directory: Path) -> tuple[int, dict[str, Any]]:
    """Read how many episodes a run of `learn` has played, and its history; 0 and an empty history if none."""
    history = run_folder.history_in(directory, run_folder.read_checkpoint(directory) or {})
    return len(history.get("episode", ())), history


# ---- what is missing ----------------------------------------------------------------------------


def missing_parts(directory: Path, done: int, total: int, scores: RunScores | None) -> list[str]:
    """Say what an unfinished run lacks, and how to get it."""
    command = f"bayesrl resume {shlex.quote(str(directory))}"
    absent = [
        what
        for what, there in (
            (f"{total - done:,} of {total:,} steps", done >= total),
            ("the saved draws (posterior.nc)", (directory / run_folder.POSTERIOR).exists()),
            ("the model (model.json)", scores is None or (directory / run_folder.MODEL).exists()),
            ("the results", scores is not None and scores.step == done),
            ("the figures", all((directory / name).exists() for name in OUTPUT_FILES[:2])),
            ("the report", (directory / REPORT).exists()),
        )
        if not there
    ]
    lines = [f"\nmissing: {', '.join(absent)}; go on with: {command}"] if absent else []
    damaged = [] if scores is None else list(_damaged(directory, scores))
    return [*lines, *([f"\ndamaged: {', '.join(damaged)}; delete them and go on with: {command}"] if damaged else [])]


def _damaged(directory: Path, scores: RunScores) -> Iterator[str]:
    """Yield the names of files beside the fit that changed since they were written."""

    def content_of(name: str) -> bytes | None:
        try:
            return read_file(directory / name)
        except RunFolderError:
            return b""  # no digest agrees with it

    for name, digest in scores.figures.items():
        content = content_of(file_name(name))
        if content is not None and digest_of(content) != digest:
            yield name
    content = content_of(REPORT)
    if content is not None and not is_intact(content, "report"):
        yield REPORT
    try:
        run_folder.read_draws(directory)
    except RunFolderError:
        yield run_folder.POSTERIOR

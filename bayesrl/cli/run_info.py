"""What a run folder holds beside the fit itself: its model, its scores, and what is missing; works without JAX."""

import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from bayesrl import run_folder
from bayesrl.cli.terminal import format_option, make_console, print_line
from bayesrl.diagnostics.evidence.result import Evidence
from bayesrl.display.formatting import format_number, last_tenth, pluralize
from bayesrl.display.tables import Line, format_text
from bayesrl.errors import RunFolderError
from bayesrl.files.digests import digest_of, is_intact
from bayesrl.files.regular_files import file_name, read_file
from bayesrl.files.schemas import NOTHING, TEXT, Schema, ValueKind, integer_between, misfit
from bayesrl.statistics.estimates import Estimate, Interval

REPORT = "report.html"
OUTPUT_FILES = ("training.png", "training.svg", REPORT)
"""Files that a finished run leaves, beside the posterior and the scores."""

_COLOURS = {"": "", "pass": "green", "warn": "yellow", "fail": "red", "unknown": "yellow"}

_OUTCOME = ValueKind("a text and an outcome", lambda v: misfit(v, [TEXT]) is None and len(v) == 2 and v[1] in _COLOURS)


def _is_evidence(value: Any) -> bool:
    if not isinstance(value, dict):
        return False
    try:
        _read_evidence(value)
    except (KeyError, TypeError, ValueError, AttributeError):
        return False
    return True


_EVIDENCE = ValueKind("the evidence of a fit", _is_evidence)
_SCHEMA: dict[str, Schema] = {
    "step": integer_between(0, 2**31),
    "fit": _EVIDENCE,
    "held_out": (NOTHING, _EVIDENCE),
    "verdict": (NOTHING, _OUTCOME),
    "figures?": {"*": TEXT},
    # Older folders call the figures pictures.
    "pictures?": {"*": TEXT},
}


class RunScores(NamedTuple):
    """The scores in a run folder.

    Attributes:
        step: number of steps after which they were made.
        fit: evidence on the data of the fit.
        held_out: evidence on held-out data, or None.
        verdict: verdict of the diagnosis, or None if there is none.
        figures: names of the figures, each with the digest of its content.
    """

    step: int
    fit: Evidence
    held_out: Evidence | None
    verdict: Line | None
    figures: Mapping[str, str]

    def to_json(self) -> dict[str, Any]:
        """Describe them as a run folder stores them."""
        held_out = None if self.held_out is None else self.held_out.to_json()
        return self._asdict() | {"fit": self.fit.to_json(), "held_out": held_out}


def _read_evidence(value: Mapping[str, Any], measured: Sequence[Mapping[str, Any]] | None = None) -> Evidence:
    """Read an evidence, or the scores in an older folder, which had no evidence."""
    if "rows" not in value:
        return Evidence.from_json(value)
    rows = [_older_row(row, own) for row, own in zip(value["rows"], measured or value["rows"], strict=True)]
    lead = () if len(rows) == 1 else (len(rows),)
    return replace(Evidence.stack(rows, lead), num_contexts=int(value["contexts"]), caveat=str(value["note"]))


def _older_row(row: Mapping[str, Any], measured: Mapping[str, Any]) -> Evidence:
    """Read one temperature of older scores, which lack the methods and sides of an evidence."""

    def interval(name: str, other: Any) -> Interval | None:
        # Some older folders hold intervals beside the rows; the others only means and errors.
        if measured is not row:
            numbers = measured[name]
            # In these intervals null stands for what JSON cannot hold.
            absent = (np.nan, np.nan, np.nan, np.nan, -np.inf, np.inf)
            both = zip(absent, numbers or absent, strict=True)
            return None if numbers is None else Interval(*(np.asarray(b if a is None else a, float) for b, a in both))
        if other is None:
            return None
        return Interval.normal(*other) if isinstance(other, list) else Interval.exact(other)

    drawn = row["estimates"]
    objective, reward, kl = (interval(name, drawn[name]) for name in ("objective", "reward", "kl"))
    assert objective is not None
    assert reward is not None
    assert kl is not None
    found = Evidence.unbracketed(
        row["beta"],
        objective,
        reward,
        kl,
        "",
        prior_objective=interval("start", row["start"]),
        log_marginal=interval("log_marginal", drawn.get("log_marginal")),
    )
    optimum = interval("optimum", row["optimum"])
    gap = None if row["optimum"] is None else [row["optimum"] - drawn["objective"][0], drawn["objective"][1]]
    metrics = {name: Estimate(*(np.asarray(part, float) for part in pair)) for name, pair in drawn["metrics"].items()}
    return replace(
        found,
        optimum=optimum or found.optimum,
        gap=interval("gap", gap),
        log_evidence=interval("log_evidence", row["log_evidence"]),
        metrics=metrics,
    )


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


def is_learning(directory: Path) -> bool:
    """Whether a folder holds a run of `learn`."""
    return run_folder.read_problem(directory)["identity"].get("kind") == "learn"


def model_rows(directory: Path) -> list[tuple[str, str]]:
    """Return model and options as rows of (setting, value)."""
    made = read_model(directory)
    if made is None:
        return []
    options = ", ".join(f"{name}={format_option(value)}" for name, value in made["options"].items())
    return [("model", made["model"]), ("options", options or "defaults")]


def read_scores(directory: Path) -> RunScores | None:
    """Read the scores of a run; None if it was not scored.

    Raises:
        RunFolderError: the file is damaged.
    """
    remedy = f"delete it, and bayesrl resume {shlex.quote(str(directory))} writes it anew"
    stored = run_folder.load_json(directory, run_folder.SCORES, _SCHEMA, remedy)
    if stored is None:
        return None
    held_out = None if stored["held_out"] is None else _read_evidence(stored["held_out"])
    verdict = None if stored["verdict"] is None else Line(*stored["verdict"])
    try:
        fit = _read_evidence(stored["fit"], stored.get("measured"))
    except (KeyError, TypeError, ValueError) as error:
        path = directory / run_folder.SCORES
        raise RunFolderError(f"cannot read {path}: its measured rows are damaged ({error}); {remedy}") from error
    return RunScores(stored["step"], fit, held_out, verdict, stored.get("figures", stored.get("pictures", {})))


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
            ("the report", (directory / OUTPUT_FILES[2]).exists()),
        )
        if not there
    ]
    lines = [f"\nmissing: {', '.join(absent)}; go on with: {command}"] if absent else []
    damaged = [] if scores is None else list(_damaged(directory, scores))
    return [*lines, *([f"\ndamaged: {', '.join(damaged)}; delete them and go on with: {command}"] if damaged else [])]


def _damaged(directory: Path, scores: RunScores) -> Iterator[str]:
    """Yield the names of files beside the fit that changed since they were written."""
    for name, digest in scores.figures.items():
        if _differs(directory / file_name(name), partial(_has, digest)):
            yield name
    if _differs(directory / REPORT, partial(is_intact, name="report")):
        yield REPORT
    try:
        run_folder.read_draws(directory)
    except RunFolderError:
        yield run_folder.POSTERIOR


def _has(digest: str, content: bytes) -> bool:
    return digest_of(content) == digest


def _differs(path: Path, fine: Callable[[bytes], bool]) -> bool:
    """Whether there is a file that cannot be read or fails the check."""
    try:
        content = read_file(path)
    except RunFolderError:
        return True
    return content is not None and not fine(content)


# ---- `bayesrl show` -----------------------------------------------------------------------------


def show_fit(directory: Path) -> None:
    """Print the content of a fit's folder: settings, results, the end of the history, and what is missing."""
    from rich.text import Text

    from bayesrl.cli.show import history_table, plain_table, run_rows

    stored = run_folder.read_problem(directory)
    settings, identity = stored["settings"], stored["identity"]
    done, history = run_folder.read_history(directory)
    console = make_console()
    console.print(plain_table(("setting", "value"), [*model_rows(directory), *run_rows(settings, identity, done)]))
    betas = identity["beta"] if isinstance(identity["beta"], list) else [identity["beta"]]
    scores = read_scores(directory)
    if scores is not None:
        after = "" if scores.step == done else f" after {pluralize(scores.step, 'step')}"
        console.print(Text(f"\nresults{after}", style="bold"))
        print_results(scores)
    if history:
        console.print(Text("\nend of the history (means over the steps between the rows)", style="bold"))
        console.print(history_table(history, betas))
    for line in missing_parts(directory, done, settings["num_steps"], scores):
        print_line(line, "yellow")


def show_learning(directory: Path) -> None:
    """Print the content of a folder with runs of `learn`."""
    from bayesrl.cli.show import plain_table

    make_console().print(plain_table(("what", "value"), _learning_rows(directory)))


def print_results(scores: RunScores) -> None:
    """Print the table of scores, and the verdict below it."""
    from rich.text import Text

    from bayesrl.cli.show import evidence_table

    console = make_console()
    console.print(evidence_table(scores.fit, scores.held_out))
    if scores.verdict is not None:
        console.print(Text(f"\n{format_text([scores.verdict])}", style=_COLOURS[scores.verdict.outcome]))


def _learning_rows(directory: Path) -> list[tuple[str, str]]:
    """Describe the content of a folder of runs, as rows of (what, value)."""
    stored = run_folder.read_problem(directory)
    identity = stored["identity"]
    done, history = read_episodes(directory)
    rows = [
        ("environment", str(identity["environment"])),
        ("agent", str(identity["agent"]["type"])),
        ("exploration", str(identity["exploration"])),
        ("episodes", f"{done:,} of {stored['settings']['num_episodes']:,}"),
    ]
    made = read_model(directory)
    if made is not None:
        options = ", ".join(f"{name}={format_option(value)}" for name, value in made["options"].items())
        rows = [("model", made["model"]), ("options", options or "defaults"), *rows]
    if done:
        last, named = last_tenth(done, "episode")
        rows.append((f"mean return of the {named}", format_number(float(history["return"][-last:].mean()))))
        rows.append(("cumulated regret", format_number(float(history["regret"].sum()))))
    if done < stored["settings"]["num_episodes"] and "confidence" not in stored["settings"]:
        rows.append(("go on with", f"bayesrl resume {shlex.quote(str(directory))}"))
    return rows


def read_episodes(directory: Path) -> tuple[int, dict[str, Any]]:
    """Read how many episodes a run of `learn` has played, and its history; 0 and an empty history if none."""
    history = run_folder.history_in(directory, run_folder.read_checkpoint(directory) or {})
    return len(history.get("episode", ())), history

"""What a run folder holds, beyond the fit itself: its model, its scores, and what is missing; read without JAX."""

import shlex
from pathlib import Path
from typing import Any, NamedTuple

from bayesrl import run_folder
from bayesrl.certainty.scores import Scoreboard, from_json
from bayesrl.cli.words import say, spell, terminal
from bayesrl.core.showing import Line, as_text
from bayesrl.errors import RunFolderError

REPORT = "report.html"
KEPT = ("training.png", "training.svg", REPORT)
"""Files that a run leaves when it ends, beside the posterior and the scores."""

_COLOURS = {"": "", "pass": "green", "warn": "yellow", "fail": "red", "unknown": "yellow"}


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


def model_of(directory: Path) -> dict[str, Any]:
    """Read which model a run fits, with which options.

    Raises:
        RunFolderError: the file is damaged, or there is none.
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


# ---- `bayesrl show` -----------------------------------------------------------------------------


def show_fit(directory: Path) -> None:
    """Print what the folder of a fit holds: settings, results, the end of the history, and what is missing."""
    from rich.text import Text

    from bayesrl.cli.tables import history_table, plain_table, run_rows

    told = run_folder.read_problem(directory)
    settings, identity = told["settings"], told["identity"]
    done, history = run_folder.read_history(directory)
    console = terminal()
    console.print(plain_table(("setting", "value"), [*made_of(directory), *run_rows(settings, identity, done)]))
    betas = identity["beta"] if isinstance(identity["beta"], list) else [identity["beta"]]
    scores = read_scores(directory)
    if scores is not None:
        after = "" if scores.step == done else f" after {scores.step:,} steps"
        console.print(Text(f"\nresults{after}", style="bold"))
        print_results(scores)
    if history:
        console.print(Text("\nend of the history (means over the steps between the rows)", style="bold"))
        console.print(history_table(history, betas))
    for line in lacking(directory, done, settings["num_steps"], scores):
        say(line, "yellow")


def show_learning(directory: Path) -> None:
    """Print what a folder of runs of `learn` holds."""
    from bayesrl.cli.tables import plain_table

    terminal().print(plain_table(("what", "value"), _learning_rows(directory)))


def print_results(scores: Scores) -> None:
    """Print the table of scores, and the verdict below it."""
    from rich.text import Text

    from bayesrl.cli.tables import score_table

    console = terminal()
    console.print(score_table(scores.fit, scores.held_out))
    if scores.verdict is not None:
        console.print(Text(f"\n{as_text([scores.verdict])}", style=_COLOURS[scores.verdict.outcome]))


def _learning_rows(directory: Path) -> list[tuple[str, str]]:
    """Tell what a folder of runs holds, as rows of (what, value)."""
    told = run_folder.read_problem(directory)
    identity = told["identity"]
    done, history = episodes_of(directory)
    rows = [
        ("environment", str(identity["environment"])),
        ("agent", str(identity["agent"]["type"])),
        ("exploration", str(identity["exploration"])),
        ("episodes", f"{done:,} of {told['settings']['num_episodes']:,}"),
    ]
    made = read_model(directory)
    if made is not None:
        options = ", ".join(f"{name}={spell(value)}" for name, value in made["options"].items())
        rows = [("model", made["model"]), ("options", options or "defaults"), *rows]
    if done:
        last = max(done // 10, 1)
        rows.append((f"mean return of the last {last:,}", f"{history['return'][-last:].mean():.4g}"))
        rows.append(("cumulated regret", f"{history['regret'].sum():.4g}"))
    if done < told["settings"]["num_episodes"] and "confidence" not in told["settings"]:
        rows.append(("go on with", f"bayesrl resume {shlex.quote(str(directory))}"))
    return rows


def episodes_of(directory: Path) -> tuple[int, dict[str, Any]]:
    """Read how many episodes a run of `learn` has played, and its history; 0 and nothing where there is none."""
    path = directory / run_folder.CHECKPOINT
    arrays = run_folder.read_arrays(path) if path.exists() else {}
    history = {k.removeprefix("history/"): v for k, v in arrays.items() if k.startswith("history/")}
    return len(history.get("episode", ())), history

"""The command line: fit a ready model or a file of yours, go on with a run, look at one."""

import json
import shlex
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import jax
import numpy as np
import typer
from rich.console import Console
from rich.markup import escape
from rich.text import Text

from bayesrl import run_folder
from bayesrl.certainty.scoreboard import Scoreboard, from_json, score, to_json
from bayesrl.engines.fitting import fit as fit_policy
from bayesrl.engines.reopening import key_of
from bayesrl.engines.reopening import resume as resume_policy
from bayesrl.errors import BayesRLError, FitError, GuideError, PolicyError, RunFolderError
from bayesrl.posterior import Posterior
from bayesrl.problem import ModelError, Problem, model_names, model_options, ready_model
from bayesrl.report.figures import save_figures
from bayesrl.report.tables import history_table, plain_table, run_rows, score_table

INTERRUPTED = 130
PICTURES = ("training.png", "training.svg")

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="Fit policies as Bayesian posteriors: KL-regularised reinforcement learning by variational inference.",
)

Folder = Annotated[Path, typer.Argument(help="Run folder, as `bayesrl fit` made it.", show_default=False)]
Steps = Annotated[int | None, typer.Option(help="Gradient steps in all; more than before extends a run.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="Print nothing but errors.")]


@app.command()
def fit(
    model: Annotated[str, typer.Argument(metavar="NAME_OR_FILE", help="A ready model, or a .py file with problem().")],
    beta: Annotated[str | None, typer.Option(help="Temperatures, reward units per nat, as 0.1,0.3,1.")] = None,
    steps: Steps = None,
    restarts: Annotated[int | None, typer.Option(help="Fits made side by side; the best one is shown.")] = None,
    seed: Annotated[int | None, typer.Option(help="Fixes everything random; 0 by default.")] = None,
    out: Annotated[Path | None, typer.Option(help="Run folder; runs/NAME by default.")] = None,
    assignments: Annotated[
        list[str] | None, typer.Option("--set", metavar="NAME=VALUE", help="Option of the model; may be repeated.")
    ] = None,
    quiet: Quiet = False,
) -> None:
    """Fit a model into a run folder, or go on with the run that is there."""
    folder = out if out is not None else Path("runs") / Path(model).stem
    with _errors_on_one_line(), _stopped_by_ctrl_c(folder) as callback:
        options = _parse_options(assignments or [])
        problem = ready_model(model, **options)
        _start(model, options, problem, folder, _Wishes(beta, steps, restarts, seed), callback, quiet=quiet)


@app.command()
def resume(directory: Folder, steps: Steps = None, quiet: Quiet = False) -> None:
    """Go on with a run where it stopped."""
    with _errors_on_one_line(), _stopped_by_ctrl_c(directory) as callback:
        if steps is not None and steps < 1:
            raise FitError(f"num_steps={steps!r}; use an integer of at least 1")
        settings = run_folder.read_problem(directory)["settings"]
        made = _read_model(directory)
        if made is None:
            raise RunFolderError(
                f"{directory} does not say which model it fits (it has no {run_folder.MODEL}); "
                "continue it in Python with bayesrl.resume(directory, policy, *args)"
            )
        problem = ready_model(made["model"], **made["options"])
        total = max(settings["num_steps"], steps or 0)
        if _already_finished(directory, total, quiet=quiet):
            return
        given = {name: problem.fit_options.get(name) for name in ("guide", "objective", "optimizer")}
        began = time.monotonic()
        posterior = resume_policy(
            directory, problem.policy, *problem.args, num_steps=total, callback=callback, progress=not quiet, **given
        )
        _finish(posterior, problem, directory, time.monotonic() - began, quiet=quiet)


@app.command()
def models() -> None:
    """List the ready models and their options."""
    with _errors_on_one_line():
        rows = []
        for name, about in model_names().items():
            options = "  ".join(f"{option}={_spell(value)}" for option, value in model_options(name).items())
            rows.append((name, f"{about}\n{options}\n"))
        _console().print(plain_table(("model", "what it is, and its options for --set"), rows))


@app.command()
def show(directory: Folder) -> None:
    """Show what a run folder holds: settings, results, the end of the history."""
    with _errors_on_one_line():
        told = run_folder.read_problem(directory)
        settings, identity = told["settings"], told["identity"]
        done, history = run_folder.read_history(directory)
        console = _console()
        console.print(plain_table(("setting", "value"), [*_made_of(directory), *run_rows(settings, identity, done)]))
        betas = identity["beta"] if isinstance(identity["beta"], list) else [identity["beta"]]
        scores = _read_scores(directory)
        if scores is not None:
            console.print(Text(f"\nresults{'' if scores[0] == done else f' after {scores[0]:,} steps'}", style="bold"))
            console.print(score_table(*scores[1:]))
        if history:
            console.print(Text("\nend of the history (means over the steps between the rows)", style="bold"))
            console.print(history_table(history, betas))
        for line in _missing(directory, done, settings["num_steps"], scores):
            console.print(Text(line, style="yellow"), soft_wrap=True)


# ---- fitting ---------------------------------------------------------------------------------


class _Wishes:
    """What was asked for; None where nothing was, and then the run folder or the model decides."""

    def __init__(self, beta: str | None, steps: int | None, restarts: int | None, seed: int | None) -> None:
        self.beta = None if beta is None else _parse_beta(beta)
        self.steps, self.restarts, self.seed = steps, restarts, seed


def _start(
    model: str,
    options: dict[str, Any],
    problem: Problem,
    folder: Path,
    wishes: _Wishes,
    callback: Callable[..., None],
    *,
    quiet: bool,
) -> None:
    """Fit a problem into its folder, going on with the run that is there."""
    folder = run_folder.claim(folder)
    settings: dict[str, Any] = {**problem.fit_options}
    beta, key = problem.beta, jax.random.key(wishes.seed or 0)
    if old := (folder / run_folder.PROBLEM).exists():
        told = run_folder.read_problem(folder)
        held = told["identity"]["beta"]
        beta = np.asarray(held) if isinstance(held, list) else held
        settings |= {name: told["settings"][name] for name in ("num_steps", "num_restarts")}
        key = key if wishes.seed is not None else key_of(told)
    else:
        run_folder.write(folder / run_folder.MODEL, _dump(_description(model, options)))
    if wishes.steps is not None:
        settings["num_steps"] = max(wishes.steps, settings["num_steps"]) if old and wishes.steps > 0 else wishes.steps
    if wishes.restarts is not None:
        settings["num_restarts"] = wishes.restarts
    chosen: Any = beta if wishes.beta is None else wishes.beta
    steps_before = run_folder.read_history(folder)[0]
    if not quiet:
        _console().print(f"[bold]{escape(_title(model, problem))}[/]  →  {escape(str(folder))}", soft_wrap=True)
        if old and steps_before < settings.get("num_steps", 0):
            _console().print(f"going on after {steps_before:,} of {settings['num_steps']:,} steps")
    began = time.monotonic()
    try:
        posterior = fit_policy(
            key,
            problem.policy,
            *problem.args,
            beta=chosen,
            directory=folder,
            callback=callback,
            progress=not quiet,
            **settings,
        )
    except BayesRLError:
        run_folder.release(folder)
        raise
    if not (folder / run_folder.MODEL).exists():
        run_folder.write(folder / run_folder.MODEL, _dump(_description(model, options)))
    if old and not posterior.interrupted and _already_finished(folder, settings["num_steps"], quiet=quiet):
        return
    _finish(posterior, problem, folder, time.monotonic() - began, quiet=quiet)


def _finish(posterior: Posterior, problem: Problem, folder: Path, seconds: float, *, quiet: bool) -> None:
    """Score a fit, print the table, and leave scores and pictures in the folder."""
    done = int(posterior.history["step"][-1]) if len(posterior.history["step"]) else 0
    if posterior.interrupted:
        raise _Stopped(done, int(posterior.settings["num_steps"]))
    key = jax.random.fold_in(jax.random.key(0), 7)
    board = score(key, posterior, exact=problem.exact)
    held_out, reason = _held_out(key, posterior, problem)
    scores = {"step": done, "fit": to_json(board), "held_out": None if held_out is None else to_json(held_out)}
    run_folder.write(folder / run_folder.SCORES, _dump(scores))
    optima = [row.optimum for row in board.rows]
    known = [float(optimum) for optimum in optima if optimum is not None]
    save_figures(folder, posterior, board.target, known if len(known) == len(optima) else None)
    if not quiet:
        console = _console()
        restarts = f", the best of {posterior.num_restarts} restarts" if posterior.num_restarts > 1 else ""
        console.print(f"{done:,} steps in {seconds:.1f} s{restarts}\n")
        console.print(score_table(board, held_out))
        if reason:
            console.print(Text(f"held out: not scored: {reason}", style="yellow"), soft_wrap=True)
        console.print(Text(f"\nIn {folder}: {_held(folder)}", style="dim"))


def _held_out(key: jax.Array, posterior: Posterior, problem: Problem) -> tuple[Scoreboard | None, str]:
    """Score a fit on what was held out, or say why its guide cannot go there."""
    if problem.held_out is None:
        return None, ""
    try:
        return score(key, posterior, *problem.held_out), ""
    except GuideError as error:
        return None, str(error)


def _already_finished(folder: Path, total: int, *, quiet: bool) -> bool:
    """Print the scores of a run that has done all of its steps, and tell whether it has."""
    done, _ = run_folder.read_history(folder)
    scores = _read_scores(folder)
    complete = all((folder / name).exists() for name in (run_folder.POSTERIOR, *PICTURES))
    if done < total or scores is None or scores[0] != done or not complete:
        return False
    if not quiet:
        console = _console()
        console.print(f"{escape(str(folder))} has done all of its {done:,} steps; --steps extends it\n", soft_wrap=True)
        console.print(score_table(*scores[1:]))
    return True


# ---- words -----------------------------------------------------------------------------------


def _parse_beta(text: str) -> float | np.ndarray:
    try:
        values = [float(part) for part in text.split(",")]
    except ValueError as error:
        raise PolicyError(f"--beta {text!r} is not a number or a list like 0.1,0.3,1") from error
    return values[0] if len(values) == 1 else np.asarray(values)


def _parse_options(assignments: list[str]) -> dict[str, Any]:
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


def _spell(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else repr(value) if value == "" else str(value)


def _title(model: str, problem: Problem) -> str:
    about = problem.about or model_names().get(model, "")
    return f"{model}: {about}" if about else model


def _description(model: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Say how to make the problem again, from whatever folder."""
    return {"model": str(Path(model).resolve()) if model.endswith(".py") else model, "options": dict(options)}


def _dump(content: Any) -> bytes:
    return json.dumps(content, indent=1, ensure_ascii=False).encode()


def _read_model(directory: Path) -> dict[str, Any] | None:
    made = run_folder.read_json(directory, run_folder.MODEL)
    if made is not None and not (isinstance(made.get("model"), str) and isinstance(made.get("options"), dict)):
        raise RunFolderError(f"{directory / run_folder.MODEL} does not name a model and its options; fit anew")
    return made


def _made_of(directory: Path) -> list[tuple[str, str]]:
    made = _read_model(directory)
    if made is None:
        return []
    options = ", ".join(f"{name}={_spell(value)}" for name, value in made["options"].items())
    return [("model", made["model"]), ("options", options or "defaults")]


def _read_scores(directory: Path) -> tuple[int, Scoreboard, Scoreboard | None] | None:
    """Read after how many steps the run was scored, and the scores; None where it was not."""
    told = run_folder.read_json(directory, run_folder.SCORES)
    if told is None:
        return None
    try:
        held_out = None if told["held_out"] is None else from_json(told["held_out"])
        return int(told["step"]), from_json(told["fit"]), held_out
    except (KeyError, TypeError, ValueError) as error:
        raise RunFolderError(
            f"{directory / run_folder.SCORES} holds no scores: {error!r}; delete it and run `bayesrl resume` again"
        ) from error


def _missing(directory: Path, done: int, total: int, scores: Any) -> list[str]:
    """Say what a run that has not ended lacks, and how to get it."""
    command = f"bayesrl resume {shlex.quote(str(directory))}"
    lacking = [
        what
        for what, there in (
            (f"{total - done:,} of {total:,} steps", done >= total),
            ("the saved draws (posterior.nc)", (directory / run_folder.POSTERIOR).exists()),
            ("the results", scores is not None and scores[0] == done),
            ("the pictures", all((directory / name).exists() for name in PICTURES)),
        )
        if not there
    ]
    return [f"\nmissing: {', '.join(lacking)}; go on with: {command}"] if lacking else []


def _held(folder: Path) -> str:
    return ", ".join(sorted(path.name for path in folder.iterdir() if not path.name.startswith(".")))


def _console() -> Console:
    return Console(highlight=False)


# ---- ends ------------------------------------------------------------------------------------


class _Stopped(KeyboardInterrupt):
    """Ctrl-C ended a fit, which has saved itself."""

    def __init__(self, done: int, total: int) -> None:
        super().__init__()
        self.done, self.total = done, total


@contextmanager
def _stopped_by_ctrl_c(folder: Path) -> Iterator[Callable[..., None]]:
    """Say where a fit stopped and how to go on.

    A Ctrl-C that falls into a garbage collection is lost, since callbacks of the collector cannot
    raise; so it is remembered, and the function given here, which a fit calls, raises it again.
    """
    pressed = False

    def press(*_: object) -> None:
        nonlocal pressed
        pressed = True
        raise KeyboardInterrupt

    def raise_again(*_: object) -> None:
        if pressed:
            raise KeyboardInterrupt

    def report(lost: Any) -> None:
        if lost.exc_type is not KeyboardInterrupt:
            sys.__unraisablehook__(lost)

    in_main_thread = threading.current_thread() is threading.main_thread()
    handler = signal.signal(signal.SIGINT, press) if in_main_thread else None
    hook, sys.unraisablehook = sys.unraisablehook, report
    try:
        yield raise_again
    except KeyboardInterrupt as stop:
        where = f"at step {stop.done:,} of {stop.total:,}" if isinstance(stop, _Stopped) else "before it was done"
        text = Text(f"stopped {where}; go on with: bayesrl resume {shlex.quote(str(folder))}", style="yellow")
        Console(stderr=True, highlight=False).print(text, soft_wrap=True)
        raise typer.Exit(INTERRUPTED) from None
    finally:
        sys.unraisablehook = hook
        if in_main_thread:
            signal.signal(signal.SIGINT, handler)


@contextmanager
def _errors_on_one_line() -> Iterator[None]:
    """Print what bayesrl refuses as one red line, and exit with code 2."""
    try:
        yield
    except BayesRLError as error:
        text = Text(f"error: {' '.join(str(error).split())}", style="red")
        Console(stderr=True, highlight=False).print(text, soft_wrap=True)
        raise typer.Exit(2) from None

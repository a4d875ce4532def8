"""Fits a problem into its run folder, and leaves scores, pictures and the report there."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.markup import escape
from rich.text import Text

from bayesrl import run_folder
from bayesrl.certainty.scoreboard import score
from bayesrl.certainty.scores import Scoreboard, to_json
from bayesrl.cli.ends import Stopped
from bayesrl.cli.holdings import KEPT, Scores, read_scores
from bayesrl.cli.reporting import REPORT, gather_run
from bayesrl.cli.tables import score_table
from bayesrl.cli.words import description, dump, names_in, parse_beta, terminal, title_of
from bayesrl.core.showing import Line, as_text
from bayesrl.engines.fitting import fit as fit_policy
from bayesrl.engines.reopening import key_of
from bayesrl.errors import BayesRLError, GuideError
from bayesrl.posterior import Posterior
from bayesrl.problem import Problem
from bayesrl.report.figures import save_figures
from bayesrl.report.writing import write_page

_COLOURS = {"": "", "pass": "green", "warn": "yellow", "fail": "red", "unknown": "yellow"}


class Wishes:
    """What was asked for; None where nothing was, and then the run folder or the model decides."""

    def __init__(self, beta: str | None, steps: int | None, restarts: int | None, seed: int | None) -> None:
        self.beta = None if beta is None else parse_beta(beta)
        self.steps, self.restarts, self.seed = steps, restarts, seed


def start(
    model: str,
    options: dict[str, Any],
    problem: Problem,
    folder: Path,
    wishes: Wishes,
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
        run_folder.write(folder / run_folder.MODEL, dump(description(model, options)))
    if wishes.steps is not None:
        settings["num_steps"] = max(wishes.steps, settings["num_steps"]) if old and wishes.steps > 0 else wishes.steps
    if wishes.restarts is not None:
        settings["num_restarts"] = wishes.restarts
    chosen: Any = beta if wishes.beta is None else wishes.beta
    if settings.get("start_beta") is not None and (old or wishes.beta is not None):
        # A model's annealing has nothing to fall to where all that is asked for is warmer.
        settings["start_beta"] = max(settings["start_beta"], float(np.min(chosen)))
    steps_before = run_folder.read_history(folder)[0]
    if not quiet:
        terminal().print(f"[bold]{escape(title_of(model, problem))}[/]  →  {escape(str(folder))}", soft_wrap=True)
        if old and steps_before < settings.get("num_steps", 0):
            terminal().print(f"going on after {steps_before:,} of {settings['num_steps']:,} steps")
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
        run_folder.write(folder / run_folder.MODEL, dump(description(model, options)))
    if old and not posterior.interrupted and already_finished(folder, settings["num_steps"], quiet=quiet):
        return
    finish(posterior, problem, folder, time.monotonic() - began, quiet=quiet)


def finish(posterior: Posterior, problem: Problem, folder: Path, seconds: float, *, quiet: bool) -> None:
    """Score a fit, print the table, and leave scores and pictures in the folder."""
    done = int(posterior.history["step"][-1]) if len(posterior.history["step"]) else 0
    if posterior.interrupted:
        raise Stopped(done, int(posterior.settings["num_steps"]))
    key = jax.random.fold_in(jax.random.key(0), 7)
    board = score(key, posterior, exact=problem.exact)
    held_out, reason = _held_out(key, posterior, problem)
    optima = [row.optimum for row in board.rows]
    known = [float(optimum) for optimum in optima if optimum is not None]
    facts = gather_run(folder, posterior, problem, scores=(board, held_out))
    optimum = known if len(known) == len(optima) else None
    save_figures(folder, posterior, board.target, optimum, whole=facts.whole)
    verdict = None if facts.diagnosis is None else Line(facts.diagnosis.sentence, facts.diagnosis.verdict)
    scores = Scores(done, board, held_out, verdict)
    told = {"step": done, "fit": to_json(board), "held_out": None if held_out is None else to_json(held_out)}
    run_folder.write(folder / run_folder.SCORES, dump(told | {"verdict": verdict}))
    path = write_page(folder / REPORT, [facts], problem.sections_of(posterior))
    if not quiet:
        console = terminal()
        restarts = f", the best of {posterior.num_restarts} restarts" if posterior.num_restarts > 1 else ""
        console.print(f"{done:,} steps in {seconds:.1f} s{restarts}\n")
        print_results(scores)
        if reason:
            console.print(Text(f"held out: not scored: {reason}", style="yellow"), soft_wrap=True)
        console.print(Text(f"\nIn {folder}: {names_in(folder)}", style="dim"))
        console.print(Text(f"report: {path}"), soft_wrap=True)


def print_results(scores: Scores) -> None:
    """Print the table of scores, and the verdict below it."""
    console = terminal()
    console.print(score_table(scores.fit, scores.held_out))
    if scores.verdict is not None:
        console.print(Text(f"\n{as_text([scores.verdict])}", style=_COLOURS[scores.verdict.outcome]))


def _held_out(key: jax.Array, posterior: Posterior, problem: Problem) -> tuple[Scoreboard | None, str]:
    """Score a fit on what was held out, or say why its guide cannot go there."""
    if problem.held_out is None:
        return None, ""
    try:
        return score(key, posterior, *problem.held_out), ""
    except GuideError as error:
        return None, str(error)


def already_finished(folder: Path, total: int, *, quiet: bool) -> bool:
    """Print the scores of a run that has done all of its steps, and tell whether it has."""
    done, _ = run_folder.read_history(folder)
    scores = read_scores(folder)
    complete = all((folder / name).exists() for name in (run_folder.POSTERIOR, *KEPT))
    if done < total or scores is None or scores.step != done or not complete:
        return False
    if not quiet:
        console = terminal()
        console.print(f"{escape(str(folder))} has done all of its {done:,} steps; --steps extends it\n", soft_wrap=True)
        print_results(scores)
    return True

"""Fit a problem into its run folder, and leave scores, figures and the report there."""

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from rich.text import Text

from bayesrl import run_folder
from bayesrl.cli.exit_codes import Interrupted
from bayesrl.cli.report import collect_run
from bayesrl.cli.run_info import OUTPUT_FILES, REPORT, RunScores, describe_model, read_model, read_scores, require_model
from bayesrl.cli.show import print_results
from bayesrl.cli.terminal import make_console, print_line, print_title
from bayesrl.compilation.jit import trace_cache
from bayesrl.compilation.random_keys import fold_in, key_from_seed
from bayesrl.compilation.status import activity
from bayesrl.diagnostics.evidence.bounds import evaluate_fit
from bayesrl.diagnostics.evidence.result import Evidence
from bayesrl.display.formatting import pluralize
from bayesrl.display.tables import Line
from bayesrl.errors import BayesRLError, GuideError, RunFolderError
from bayesrl.files.digests import digest_of
from bayesrl.posterior.posterior import Posterior
from bayesrl.problem import Problem, load_problem
from bayesrl.report.fit_figures import save_figures
from bayesrl.report.write import write_fits
from bayesrl.statistics.estimates import Interval
from bayesrl.statistics.regularizer_names import regularizer_of
from bayesrl.svi.fitting import fit as fit_policy
from bayesrl.svi.saved_fits import key_of
from bayesrl.svi.saved_fits import resume as resume_policy


class Overrides(NamedTuple):
    """Command-line options that override a run folder and a model; None leaves the choice to those."""

    beta: list[float] | None
    steps: int | None
    restarts: int | None
    seed: int | None
    regularizer: str | None = None
    alpha: float | None = None


def start_fit(
    model: str,
    options: dict[str, Any],
    folder: Path,
    overrides: Overrides,
    callback: Callable[..., None],
    *,
    quiet: bool,
) -> None:
    """Fit a model into its folder, or continue the run that is there."""
    problem = _load_problem(model, options)
    folder = run_folder.claim(folder)
    settings: dict[str, Any] = {**problem.fit_options}
    chosen: Any = problem.beta
    key = key_from_seed(overrides.seed or 0)
    if old := run_folder.is_begun(folder):
        stored = run_folder.read_problem(folder)
        chosen = stored["identity"]["beta"]
        kept = ("num_steps", "num_restarts", "regularizer", "alpha")
        settings |= {name: stored["settings"][name] for name in kept if name in stored["settings"]}
        key = key if overrides.seed is not None else key_of(stored)
    else:
        run_folder.save_json(folder, run_folder.MODEL, describe_model(model, options))
    if overrides.steps is not None:
        # More steps extend a run; fewer cannot take steps back.
        further = old and overrides.steps > 0
        settings["num_steps"] = max(overrides.steps, settings["num_steps"]) if further else overrides.steps
    if overrides.restarts is not None:
        settings["num_restarts"] = overrides.restarts
    given = {"regularizer": overrides.regularizer, "alpha": overrides.alpha}
    settings |= {name: value for name, value in given.items() if value is not None}
    if overrides.beta is not None:
        chosen = overrides.beta if len(overrides.beta) > 1 else overrides.beta[0]
    beta = np.asarray(chosen) if isinstance(chosen, list) else chosen
    if settings.get("start_beta") is not None and (old or overrides.beta is not None):
        # A model's annealing must not start below the coldest requested β: it could not fall to it.
        settings["start_beta"] = max(settings["start_beta"], float(np.min(beta)))
    steps_before = run_folder.read_history(folder)[0]
    if not quiet:
        print_title(model, problem.about, folder)
        if old and steps_before < settings.get("num_steps", 0):
            make_console().print(f"going on after {steps_before:,} of {settings['num_steps']:,} steps")
    began = time.monotonic()
    try:
        posterior = fit_policy(
            key,
            problem.policy,
            *problem.args,
            beta=beta,
            directory=folder,
            callback=callback,
            progress=not quiet,
            **settings,
        )
    except BayesRLError:
        run_folder.release(folder)
        raise
    # A fit begun in Python has no model file, and a damaged one must be replaced.
    if not _tells_its_model(folder):
        run_folder.save_json(folder, run_folder.MODEL, describe_model(model, options))
    if old and not posterior.interrupted and is_finished(folder, settings["num_steps"], quiet=quiet):
        return
    finish_fit(posterior, problem, folder, time.monotonic() - began, quiet=quiet)


def _tells_its_model(folder: Path) -> bool:
    """Whether the folder says which model it fits, in a readable file."""
    try:
        return read_model(folder) is not None
    except RunFolderError:
        return False


def _load_problem(model: str, options: dict[str, Any]) -> Problem:
    with activity(f"making {Path(model).stem}"):
        return load_problem(model, **options)


def resume_fit(directory: Path, steps: int | None, callback: Callable[..., None], *, quiet: bool) -> None:
    """Continue the fit in a folder, up to a total number of steps.

    Raises:
        RunFolderError: the folder does not say which model it fits.
    """
    settings = run_folder.read_problem(directory)["settings"]
    made = require_model(directory)
    problem = _load_problem(made["model"], made["options"])
    total = max(settings["num_steps"], steps or 0)
    if is_finished(directory, total, quiet=quiet):
        return
    given = {name: problem.fit_options.get(name) for name in ("guide", "objective", "optimizer")}
    began = time.monotonic()
    posterior = resume_policy(
        directory, problem.policy, *problem.args, num_steps=total, callback=callback, progress=not quiet, **given
    )
    finish_fit(posterior, problem, directory, time.monotonic() - began, quiet=quiet)


@trace_cache()  # within one command, nothing that the policy reads changes
def finish_fit(posterior: Posterior, problem: Problem, folder: Path, seconds: float, *, quiet: bool) -> None:
    """Score a fit, print the table, and leave scores and figures in the folder."""
    done = int(posterior.history["step"][-1]) if len(posterior.history["step"]) else 0
    if posterior.interrupted:
        raise Interrupted(done, int(posterior.settings["num_steps"]))
    # A fixed key: a run that is scored again gets the same numbers.
    key = fold_in(key_from_seed(0), 7)
    with activity("scoring on what was held out"):
        held_out, reason = _held_out(key, posterior, problem)
    with activity("diagnosing"):
        contents = collect_run(folder, posterior, problem, held_out=held_out)
    with activity("drawing the figures"):
        drawn = save_figures(folder, posterior, contents.target, contents.optimum, best=contents.best)
    verdict = None if contents.diagnosis is None else Line(contents.diagnosis.explanation, contents.diagnosis.verdict)
    figures = {path.name: digest_of(path.read_bytes()) for path in drawn}
    scores = RunScores(done, contents.training or _kept(posterior), held_out, verdict, figures)
    run_folder.save_json(folder, run_folder.SCORES, scores.to_json())
    with activity("writing the report"):
        path = write_fits(folder / REPORT, [contents], problem.sections_of(fold_in(key_from_seed(0), 9), posterior))
    if not quiet:
        console = make_console()
        restarts = f", the best of {posterior.num_restarts} restarts" if posterior.num_restarts > 1 else ""
        console.print(f"{pluralize(done, 'step')} in {seconds:.1f} s{restarts}\n")
        print_results(scores)
        if reason:
            print_line(f"held out: not scored: {reason}", "yellow")
        files = sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))
        console.print(Text(f"\nIn {folder}: {', '.join(files)}", style="dim"))
        print_line(f"report: {path}")


def _kept(posterior: Posterior) -> Evidence:
    """Return the evidence of a fit that cannot be scored, from the draws that it carries."""
    kept = posterior.select(restart="best").estimates
    shape = np.shape(posterior.beta if posterior.beta is not None else 1.0)
    objective, reward, kl = (
        Interval.normal(np.reshape(one.mean, shape), np.reshape(one.se, shape))
        for one in (kept.objective, kept.reward, kept.kl)
    )
    found = Evidence.unbracketed(posterior.beta, objective, reward, kl, "the fit could not be scored anew")
    if kept.divergence is None:
        return found
    name, alpha = regularizer_of(posterior.settings)
    mean, se = (np.reshape(part, shape) for part in kept.divergence)
    other = Interval.normal(mean, se)
    return replace(found, regularizer=name, alpha=alpha, divergence=other)


def _held_out(key: jax.Array, posterior: Posterior, problem: Problem) -> tuple[Evidence | None, str]:
    """Score a fit on held-out data, or say why its guide cannot go there."""
    if problem.held_out is None:
        return None, ""
    try:
        return evaluate_fit(key, posterior, *problem.held_out), ""
    except GuideError as error:
        return None, str(error)


def is_finished(folder: Path, total: int, *, quiet: bool) -> bool:
    """Print the scores of a run that has done all of its steps; return whether it has."""
    done, _ = run_folder.read_history(folder)
    scores = read_scores(folder)
    complete = all((folder / name).exists() for name in (run_folder.POSTERIOR, *OUTPUT_FILES))
    complete = complete and run_folder.read_draws(folder) is not None
    if done < total or scores is None or scores.step != done or not complete:
        return False
    if not quiet:
        print_line(f"{folder} has done all of its {done:,} steps; --steps extends it\n")
        print_results(scores)
    return True

"""Reports of run folders: show what a folder holds, and say what it lacks."""

import platform
import shlex
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bayesrl import run_folder
from bayesrl.cli.option_values import format_option
from bayesrl.cli.run_info import read_model
from bayesrl.cli.show import fit_rows
from bayesrl.compilation.random_keys import fold_in, key_from_seed
from bayesrl.compilation.status import activity
from bayesrl.diagnostics.evidence.result import Evidence
from bayesrl.display.tables import Line, format_text
from bayesrl.errors import BayesRLError, RunFolderError
from bayesrl.posterior.posterior import Posterior
from bayesrl.problem import Problem, load_problem
from bayesrl.ready_models import model_names
from bayesrl.report.fit_results import FitResults, collect
from bayesrl.report.write import check_path, write_fits
from bayesrl.svi.saved_fits import load


def report_runs(directories: Sequence[Path], path: Path, gold: str | None) -> list[str]:
    """Write the report of run folders; return the verdicts, and sentences on what is missing, as text.

    Raises:
        RunFolderError: the file cannot be written.
    """
    check_path(path)
    fits, sections = [], []
    for directory, name in zip(directories, _names(directories), strict=True):
        with activity(f"loading {name}"):
            problem, reason = _problem_of(directory)
            posterior, lost = _posterior_of(directory, problem)
        notes = tuple(text for text in (reason, lost) if text)
        with activity(f"diagnosing {name}"):
            fits.append(collect_run(directory, posterior, problem, name=name, gold=gold, missing=notes))
            sections += problem.sections_of(fold_in(key_from_seed(0), 9), posterior) if problem is not None else []
    with activity("writing the report"):
        write_fits(path, fits, sections)
    return [format_text([line]) for fit in fits for line in _told(fit, named=len(fits) > 1)]


def _told(fit: FitResults, *, named: bool) -> Iterator[Line]:
    """Yield a fit's verdict, by name if there are several fits, and what is missing."""
    name = f"{fit.name}: " if named else ""
    if fit.diagnosis is not None:
        yield Line(f"{name}{fit.diagnosis.explanation}", fit.diagnosis.verdict)
    for sentence in fit.missing:
        yield Line(f"{name}{sentence}", "warn")


def collect_run(
    directory: Path,
    posterior: Posterior,
    problem: Problem | None,
    *,
    name: str | None = None,
    gold: str | None = None,
    held_out: Evidence | None = None,
    missing: tuple[str, ...] = (),
) -> FitResults:
    """Collect what the report shows of a run, whose problem is None if it cannot be made again.

    By default its name is that of its model. `held_out` is evidence on held-out data, if it exists already.
    """
    stored = run_folder.read_problem(directory)
    made = _or_none(lambda: read_model(directory))
    done, _ = _or_none(lambda: run_folder.read_history(directory)) or (0, {})
    rows = [("run folder", str(directory)), *fit_rows(made, stored, done), ("Python", platform.python_version())]
    model = made["model"] if made is not None else ""
    about = (problem.about if problem is not None else "") or model_names().get(model, "")
    return collect(
        fold_in(key_from_seed(0), 8),
        name if name is not None else Path(model).stem or directory.resolve().name,
        posterior,
        held_out=None if problem is None else problem.held_out,
        # A problem knows the optimum with KL.
        optimum=None if problem is None or {"regularizer", "best_of_n"} & {*posterior.settings} else problem.optimum,
        gold=gold,
        held_out_evidence=held_out,
        settings=tuple(rows),
        command=None if made is None else " ".join(_words(made, stored)),
        missing=missing,
        about=about,
        engines=None if problem is None else problem.engines,
    )


def _or_none[T](read: Callable[[], T]) -> T | None:
    """Read a file of a run; return None if it is damaged, since a report shows what there is."""
    try:
        return read()
    except RunFolderError:
        return None


def _names(directories: Sequence[Path]) -> list[str]:
    short = [directory.resolve().name for directory in directories]
    return short if len(set(short)) == len(short) else [str(directory) for directory in directories]


def _problem_of(directory: Path) -> tuple[Problem | None, str]:
    """Make the problem of a run again, or say why that fails."""
    try:
        made = read_model(directory)
        if made is None:
            return None, f"The folder does not say which model it fits: it has no {run_folder.MODEL}."
        return load_problem(made["model"], **made["options"]), ""
    except BayesRLError as error:
        return None, f"The model cannot be made again: {str(error).rstrip('.')}."


def _posterior_of(directory: Path, problem: Problem | None) -> tuple[Posterior, str]:
    """Load a run with its policy, else without it, else only its history; also say what was lost."""
    lost = ""
    if problem is not None:
        given: dict[str, Any] = {k: problem.fit_options.get(k) for k in ("guide", "objective", "optimizer", "source")}
        try:
            return load(directory, problem.policy, *problem.args, **given), ""
        except BayesRLError as error:
            lost = f"The run cannot be loaded with its policy: {str(error).rstrip('.')}."
    try:
        return load(directory), lost
    except (BayesRLError, OSError, KeyError) as error:
        lost = lost or f"The saved draws cannot be read: {str(error).rstrip('.')}."
    stored = run_folder.read_problem(directory)
    try:
        _, history = run_folder.read_history(directory)
    except RunFolderError as error:
        history, lost = {}, f"{lost} {error}"
    beta = stored["identity"]["beta"]
    betas = np.asarray(beta, float) if isinstance(beta, list) else beta
    return Posterior(betas, {}, history, {}, {}, {}, stored["settings"], interrupted=True), lost


def _words(made: dict[str, Any], stored: dict[str, Any]) -> Iterator[str]:
    """Write the command that makes a run again, with every choice explicit."""
    identity, settings = stored["identity"], stored["settings"]
    yield f"bayesrl fit {shlex.quote(made['model'])}"
    beta = identity["beta"]
    if beta is not None:
        yield f"--beta {','.join(f'{b!r}' for b in (beta if isinstance(beta, list) else [beta]))}"
    yield f"--steps {settings['num_steps']} --restarts {settings['num_restarts']} --seed {identity['seed'][-1]}"
    for name in ("regularizer", "alpha"):
        if name in settings:
            yield f"--{name} {settings[name]}"
    for name, value in made["options"].items():
        yield f"--set {shlex.quote(f'{name}={format_option(value)}')}"

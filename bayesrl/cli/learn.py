"""`bayesrl learn`: make runs in an environment, store them in a folder, and report them."""

import shlex
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.text import Text

from bayesrl import run_folder
from bayesrl.cli.exit_codes import Interrupted
from bayesrl.cli.option_values import format_option
from bayesrl.cli.run_info import REPORT, describe_model, is_learning, learning_folder, read_episodes, read_model
from bayesrl.cli.show import plain_table
from bayesrl.cli.terminal import make_console, print_line, print_title
from bayesrl.compilation.random_keys import fold_in, key_from_seed
from bayesrl.compilation.status import activity
from bayesrl.control import check_learning, learn
from bayesrl.control.exploration.rules import exploration_from_name
from bayesrl.control.learning.report import learning_parts, sentence
from bayesrl.control.learning.result import LearnResult, summary
from bayesrl.display.formatting import pluralize
from bayesrl.errors import BayesRLError, RunFolderError
from bayesrl.problem import LearningProblem, load_learning_problem
from bayesrl.ready_models import ProblemError, model_names
from bayesrl.report.write import check_path, write_parts


class LearnRequest(NamedTuple):
    """The options of the command line; None leaves the choice to the model."""

    model: str
    options: dict[str, Any]
    explore: str | None
    episodes: int | None
    runs: int | None
    seed: int | None


def start_learning(request: LearnRequest, folder: Path, callback: Callable[..., None], *, quiet: bool) -> None:
    """Learn into a folder, or continue the runs that are there."""
    problem = _load_problem(request.model, request.options)
    if request.runs is not None and request.runs < 1:
        raise ProblemError(f"--runs {request.runs}; use at least 1")
    if request.explore is not None:
        exploration_from_name(request.explore)
    folder = run_folder.claim(folder)
    spec = describe_model(request.model, request.options) | {
        "learn": {
            "explore": request.explore,
            "episodes": problem.num_episodes if request.episodes is None else request.episodes,
            "runs": request.runs or problem.num_runs,
            "seed": request.seed or 0,
        }
    }
    before = _read_spec(folder) if run_folder.is_begun(folder) else None
    if before is not None:
        _check_same(folder, before, spec)
        spec["learn"]["runs"] = max(spec["learn"]["runs"], before["learn"]["runs"])
        if request.episodes is None:
            spec["learn"]["episodes"] = before["learn"]["episodes"]
    run_folder.save_json(folder, run_folder.MODEL, spec)
    try:
        _play(folder, spec, problem, callback, quiet=quiet)
    except BayesRLError:
        run_folder.release(folder)
        raise


def resume_learning(directory: Path, episodes: int | None, callback: Callable[..., None], *, quiet: bool) -> None:
    """Continue the runs in a folder."""
    spec = _read_spec(directory)
    if episodes is not None:
        spec["learn"]["episodes"] = max(episodes, spec["learn"]["episodes"])
        run_folder.save_json(directory, run_folder.MODEL, spec)
    _play(directory, spec, _load_problem(spec["model"], spec["options"]), callback, quiet=quiet)


def _load_problem(model: str, options: dict[str, Any]) -> LearningProblem:
    with activity(f"making {Path(model).stem}"):
        return load_learning_problem(model, **options)


def _play(
    folder: Path, spec: dict[str, Any], problem: LearningProblem, callback: Callable[..., None], *, quiet: bool
) -> None:
    plan = spec["learn"]
    if not quiet:
        print_title(Path(spec["model"]).stem, problem.about, folder)
    began = time.monotonic()
    runs: list[LearnResult] = []
    for index in range(plan["runs"]):
        runs.append(_run(folder, spec, problem, index, callback, progress=not quiet))
        if runs[-1].interrupted:
            raise Interrupted(runs[-1].num_episodes, plan["episodes"])
    name = Path(spec["model"]).stem
    with activity("checking the model"):
        checks = check_learning(key_from_seed(0), runs[0])
    with activity("writing the report"):
        write_parts(folder / REPORT, name, _parts({name: runs}, spec, problem, {name: checks}))
    if not quiet:
        console = make_console()
        played = pluralize(sum(run.num_episodes for run in runs), "episode")
        console.print(f"{played} in {pluralize(len(runs), 'run')}, {time.monotonic() - began:.1f} s\n")
        console.print(plain_table(("what", "value"), summary(runs)))
        console.print(Text(f"\n{sentence(runs, checks)}"))
        print_line(f"report: {folder / REPORT}")


def _run(
    folder: Path,
    spec: dict[str, Any],
    problem: LearningProblem,
    index: int,
    callback: Callable[..., None] | None,
    *,
    progress: bool,
) -> LearnResult:
    """Play one run, or the rest of it."""
    plan = spec["learn"]
    key = key_from_seed(plan["seed"])
    return learn(
        key if index == 0 else fold_in(key, index),
        problem.environment,
        problem.agent,
        exploration=problem.exploration if plan["explore"] is None else exploration_from_name(plan["explore"]),
        num_episodes=plan["episodes"],
        directory=learning_folder(folder, index),
        callback=callback,
        progress=progress,
        **problem.learn_options,
    )


def report_learning(directories: Sequence[Path], path: Path) -> None:
    """Write the report of folders of runs, side by side if there are several.

    Raises:
        RunFolderError: a folder holds a fit, or no episode yet.
    """
    check_path(path)
    runs: dict[str, list[LearnResult]] = {}
    plans = []
    for directory in directories:
        if not is_learning(directory):
            raise RunFolderError(f"{directory} holds a fit and others hold runs of `learn`; report them apart")
        spec = _read_spec(directory)
        problem = _load_problem(spec["model"], spec["options"])
        # A report only shows episodes that were played, so the plan is cut to their number.
        done = [read_episodes(learning_folder(directory, index))[0] for index in range(spec["learn"]["runs"])]
        with activity("reading the runs"):
            played = [
                _run(directory, _up_to(spec, count), problem, index, None, progress=False)
                for index, count in enumerate(done)
                if count
            ]
        if not played:
            raise RunFolderError(
                f"{directory} holds no episode yet; bayesrl resume {shlex.quote(str(directory))} plays"
            )
        runs[directory.resolve().name] = played
        plans.append((spec if problem.learn_options else _up_to(spec, max(done)), problem))
    spec, problem = plans[0]
    title = Path(spec["model"]).stem if len(runs) == 1 else f"{len(runs)} ways to learn side by side"
    with activity("writing the report"):
        write_parts(path, title, _parts(runs, spec, problem))


def _up_to(spec: dict[str, Any], episodes: int) -> dict[str, Any]:
    return spec | {"learn": spec["learn"] | {"episodes": episodes}}


def _read_spec(directory: Path) -> dict[str, Any]:
    """Read the plan by which the runs of a folder were made.

    Raises:
        RunFolderError: the folder has no plan.
    """
    spec = read_model(directory)
    if spec is None or not isinstance(spec.get("learn"), dict):
        raise RunFolderError(
            f"{directory} does not say how it was learned (its {run_folder.MODEL} has no plan); go on in Python with "
            "bayesrl.control.learn(..., directory=...)"
        )
    return spec


def _check_same(folder: Path, before: dict[str, Any], spec: dict[str, Any]) -> None:
    for name, old, new in (
        ("model", before["model"], spec["model"]),
        ("choice of options", before["options"], spec["options"]),
        ("exploration rule", before["learn"]["explore"], spec["learn"]["explore"]),
        ("seed", before["learn"]["seed"], spec["learn"]["seed"]),
    ):
        if old != new:
            raise RunFolderError(f"{folder} holds runs with another {name}: {old}, not {new}; choose another --out")


def _parts(
    runs: dict[str, list[LearnResult]], spec: dict[str, Any], problem: LearningProblem, checks: Any = None
) -> list[Any]:
    first = next(iter(runs.values()))[0]
    plan = spec["learn"]
    command = f"bayesrl learn {shlex.quote(spec['model'])} --episodes {plan['episodes']} --runs {plan['runs']}"
    command += f" --seed {plan['seed']}" + (f" --explore {plan['explore']}" if plan["explore"] else "")
    command += "".join(f" --set {shlex.quote(f'{k}={format_option(v)}')}" for k, v in spec["options"].items())
    command_row = [("command", command)] if len(runs) == 1 else []
    sections = problem.sections_of(fold_in(key_from_seed(0), 9), first) if len(runs) == 1 else []
    about = problem.about or model_names().get(spec["model"], "")
    return learning_parts(key_from_seed(0), runs, sections, about=about, made=command_row, checks=checks)

"""The commands."""

import time
from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from bayesrl import run_folder
from bayesrl.cli.ends import errors_on_one_line, stopped_by_ctrl_c
from bayesrl.cli.fitting import Wishes, already_finished, finish, print_results, start
from bayesrl.cli.holdings import lacking, made_of, read_model, read_scores
from bayesrl.cli.learning import (
    LearningWishes,
    is_learning,
    learning_rows,
    report_learning,
    resume_learning,
    start_learning,
)
from bayesrl.cli.reporting import REPORT, report_runs
from bayesrl.cli.tables import history_table, plain_table, run_rows
from bayesrl.cli.words import parse_options, spell, terminal
from bayesrl.engines.reopening import resume as resume_policy
from bayesrl.errors import FitError, RunFolderError
from bayesrl.problem import COMMANDS, model_names, model_options, model_uses, ready_model

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="Reinforcement learning as Bayesian inference: fit policies as posteriors, or learn what is unknown.",
)

Folder = Annotated[Path, typer.Argument(help="Run folder, as `bayesrl fit` made it.", show_default=False)]
Steps = Annotated[int | None, typer.Option(help="Gradient steps in all; more than before extends a run.")]
Episodes = Annotated[int | None, typer.Option(help="Episodes of each run; more than before extends a run.")]
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
    with errors_on_one_line(), stopped_by_ctrl_c(folder) as callback:
        options = parse_options(assignments or [])
        problem = ready_model(model, **options)
        start(model, options, problem, folder, Wishes(beta, steps, restarts, seed), callback, quiet=quiet)


@app.command()
def learn(
    model: Annotated[str, typer.Argument(metavar="NAME_OR_FILE", help="A ready model, or a .py file with learning().")],
    explore: Annotated[
        str | None, typer.Option(help="Exploration rule: thompson, k_learning, bayes_ucb, epsilon_greedy:0.1, ...")
    ] = None,
    episodes: Episodes = None,
    runs: Annotated[int | None, typer.Option(help="Independent runs, for bands.")] = None,
    seed: Annotated[int | None, typer.Option(help="Fixes everything random; 0 by default.")] = None,
    out: Annotated[Path | None, typer.Option(help="Run folder; runs/learn-NAME by default.")] = None,
    assignments: Annotated[
        list[str] | None, typer.Option("--set", metavar="NAME=VALUE", help="Option of the model; may be repeated.")
    ] = None,
    quiet: Quiet = False,
) -> None:
    """Learn in an environment from experience, into a run folder, or go on with the run that is there."""
    folder = out if out is not None else Path("runs") / f"learn-{Path(model).stem}"
    with errors_on_one_line(), stopped_by_ctrl_c(folder) as callback:
        options = parse_options(assignments or [])
        start_learning(LearningWishes(model, options, explore, episodes, runs, seed), folder, callback, quiet=quiet)


@app.command()
def resume(directory: Folder, steps: Steps = None, episodes: Episodes = None, quiet: Quiet = False) -> None:
    """Go on with a run where it stopped."""
    with errors_on_one_line(), stopped_by_ctrl_c(directory) as callback:
        if is_learning(directory):
            resume_learning(directory, episodes, callback, quiet=quiet)
            return
        if steps is not None and steps < 1:
            raise FitError(f"num_steps={steps!r}; use an integer of at least 1")
        settings = run_folder.read_problem(directory)["settings"]
        made = read_model(directory)
        if made is None:
            raise RunFolderError(
                f"{directory} does not say which model it fits (it has no {run_folder.MODEL}); "
                "continue it in Python with bayesrl.resume(directory, policy, *args)"
            )
        problem = ready_model(made["model"], **made["options"])
        total = max(settings["num_steps"], steps or 0)
        if already_finished(directory, total, quiet=quiet):
            return
        given = {name: problem.fit_options.get(name) for name in ("guide", "objective", "optimizer")}
        began = time.monotonic()
        posterior = resume_policy(
            directory, problem.policy, *problem.args, num_steps=total, callback=callback, progress=not quiet, **given
        )
        finish(posterior, problem, directory, time.monotonic() - began, quiet=quiet)


@app.command()
def models() -> None:
    """List the ready models and their options."""
    with errors_on_one_line():
        rows = []
        for name, about in model_names().items():
            uses = model_uses(name)
            told = [
                f"{COMMANDS[use]}: "
                + "  ".join(f"{option}={spell(value)}" for option, value in model_options(name, use).items())
                for use in uses
            ]
            rows.append((name, "\n".join([about, *told, ""])))
        terminal().print(plain_table(("model", "what it is, and the options of each command for --set"), rows))


@app.command()
def show(directory: Folder) -> None:
    """Show what a run folder holds: settings, results, the end of the history."""
    with errors_on_one_line():
        if is_learning(directory):
            terminal().print(plain_table(("what", "value"), learning_rows(directory)))
            return
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
            console.print(Text(line, style="yellow"), soft_wrap=True)


@app.command()
def report(
    directories: Annotated[list[Path], typer.Argument(metavar="DIR...", help="Run folders.", show_default=False)],
    out: Annotated[
        Path | None, typer.Option(help="File to write; DIR/report.html for one folder, report.html for several.")
    ] = None,
    gold: Annotated[str | None, typer.Option(help="Metric that the reward stands for, drawn against KL.")] = None,
    quiet: Quiet = False,
) -> None:
    """Write what is known of one run, or of several side by side, as one HTML file."""
    with errors_on_one_line():
        if any(is_learning(directory) for directory in directories):
            path = out if out is not None else (directories[0] if len(directories) == 1 else Path()) / REPORT
            report_learning(directories, path)
            if not quiet:
                terminal().print(Text(f"report: {path}"), soft_wrap=True)
            return
        path, verdicts = report_runs(directories, out, gold)
        if not quiet:
            for verdict in verdicts:
                terminal().print(Text(verdict))
            terminal().print(Text(f"report: {path}"), soft_wrap=True)

"""The commands. Heavy packages are imported where they are used, so that errors in the input appear at once."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.completion import (  # type: ignore[attr-defined]
    completion_init,
    install_callback,
    show_callback,
)
from typer.core import TyperCommand, TyperGroup

from bayesrl import cache as compiled_programs
from bayesrl.cli.completion import complete_assignment, complete_model
from bayesrl.cli.exit_codes import exit_on_error, handle_interrupt, one_line_warnings
from bayesrl.cli.memory import keep_memory
from bayesrl.cli.option_values import check_positive, parse_beta, parse_options
from bayesrl.cli.suggestions import suggest_command
from bayesrl.cli.terminal import format_size, make_console, print_line
from bayesrl.ready_models import check_use


class _Light:
    """A command that imports little and guesses well: its `--help` and its suggestions differ from Typer's own."""

    def get_help_option(self, ctx: Any) -> Any:
        option = super().get_help_option(ctx)  # type: ignore[misc]
        if option is not None:
            option.default = False  # for a default of None, Typer imports Pydantic to find that out
        return option

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        typed = list(args)
        try:
            return super().parse_args(ctx, args)  # type: ignore[misc]
        except Exception as error:
            vars(error).update(possibilities=None)  # Click's own guesses take "--" for a likeness
            meant = suggest_command(ctx.info_name or "", typed) if ctx.parent is not None else None
            if hasattr(error, "message") and meant is not None:
                error.message = f"{error.message.rstrip('.')}. Did you mean: bayesrl {meant}"
            raise


class _LightGroup(_Light, TyperGroup):
    pass


class _LightCommand(_Light, TyperCommand):
    pass


completion_init()
app = typer.Typer(
    cls=_LightGroup,
    add_completion=False,  # Typer's own options for it import Pydantic with every command; those of `main` do not
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # importing Rich takes three times as long as everything else that a help text needs
    help="Reinforcement learning as Bayesian inference: fit policies as posteriors, or learn what is unknown.",
)

Folder = Annotated[Path, typer.Argument(help="Run folder, as `bayesrl fit` made it.", show_default=False)]
Steps = Annotated[int | None, typer.Option(help="Gradient steps in all; more than before extends a run.")]
Episodes = Annotated[int | None, typer.Option(help="Episodes of each run; more than before extends a run.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="Print nothing but errors.")]
RandomSeed = Annotated[int | None, typer.Option(help="Fixes everything random; 0 by default.")]
Assignments = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="NAME=VALUE", help="Option of the model; may be repeated.", autocompletion=complete_assignment
    ),
]


def _model_argument(function: str) -> Any:
    about = f"A ready model, or a .py file with {function}()."
    return typer.Argument(metavar="NAME_OR_FILE", help=about, autocompletion=complete_model)


def _print_version(value: bool) -> bool:
    if value:
        typer.echo(f"bayesrl {version('bayesrl')}")
        raise typer.Exit
    return value


@app.callback()
def main(
    _version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
    _install: Annotated[
        bool,
        typer.Option("--install-completion", callback=install_callback, help="Let your shell complete what you type."),
    ] = False,
    _show: Annotated[
        bool, typer.Option("--show-completion", callback=show_callback, help="Print what would be installed for that.")
    ] = False,
) -> None:
    """Handle the options before a command."""


@contextmanager
def _at_work(folder: Path | None, *, quiet: bool) -> Iterator[Callable[..., None]]:
    """Run slow work with a status line, the cache of compiled programs, and a clean end on Ctrl-C.

    Yields the function that a fit must call after each chunk of steps. Meanwhile it holds the run folder.
    """
    from bayesrl.run_folder import hold_folder

    with hold_folder(folder), handle_interrupt(folder) as callback, one_line_warnings():
        from bayesrl.compilation.status import activity
        from bayesrl.display.progress import show_progress

        keep_memory()
        with show_progress(not quiet):
            with activity("importing JAX"):
                compiled_programs.use_by_default()
            with activity("importing NumPyro"):
                import bayesrl.svi.fitting  # noqa: F401
            yield callback


@app.command("fit", cls=_LightCommand)
def fit_command(
    model: Annotated[str, _model_argument("problem")],
    beta: Annotated[str | None, typer.Option(help="Temperatures, reward units per nat, as 0.1,0.3,1.")] = None,
    steps: Steps = None,
    restarts: Annotated[int | None, typer.Option(help="Fits made side by side; the best one is shown.")] = None,
    seed: RandomSeed = None,
    regularizer: Annotated[
        str | None, typer.Option(help="Takes the place of KL: chi_squared, chi_squared_kl, jensen_shannon, ...")
    ] = None,
    alpha: Annotated[float | None, typer.Option(help="Order of --regularizer alpha.")] = None,
    out: Annotated[Path | None, typer.Option(help="Run folder; runs/NAME by default.")] = None,
    assignments: Assignments = None,
    quiet: Quiet = False,
) -> None:
    """Fit a model, or go on with its run."""
    folder = out if out is not None else Path("runs") / Path(model).stem
    with exit_on_error():
        options = parse_options(assignments or [])
        check_use(model, "problem", options)
        check_positive("num_steps", steps)
        check_positive("num_restarts", restarts)
        betas = None if beta is None else parse_beta(beta)
        with _at_work(folder, quiet=quiet) as callback:
            from bayesrl.cli.fit import Overrides, start_fit

            overrides = Overrides(betas, steps, restarts, seed, regularizer, alpha)
            start_fit(model, options, folder, overrides, callback, quiet=quiet)


@app.command("learn", cls=_LightCommand)
def learn_command(
    model: Annotated[str, _model_argument("learning")],
    explore: Annotated[
        str | None, typer.Option(help="Exploration rule: thompson, k_learning, bayes_ucb, epsilon_greedy:0.1, ...")
    ] = None,
    episodes: Episodes = None,
    runs: Annotated[int | None, typer.Option(help="Independent runs, for bands.")] = None,
    seed: RandomSeed = None,
    out: Annotated[Path | None, typer.Option(help="Run folder; runs/learn-NAME by default.")] = None,
    assignments: Assignments = None,
    quiet: Quiet = False,
) -> None:
    """Learn from experience, or go on with a run."""
    folder = out if out is not None else Path("runs") / f"learn-{Path(model).stem}"
    with exit_on_error():
        options = parse_options(assignments or [])
        check_use(model, "learning", options)
        with _at_work(folder, quiet=quiet) as callback:
            from bayesrl.cli.learn import LearnRequest, start_learning

            start_learning(LearnRequest(model, options, explore, episodes, runs, seed), folder, callback, quiet=quiet)


@app.command("resume", cls=_LightCommand)
def resume_command(directory: Folder, steps: Steps = None, episodes: Episodes = None, quiet: Quiet = False) -> None:
    """Go on with a run where it stopped."""
    with exit_on_error():
        from bayesrl.cli.run_info import is_learning, read_model, require_model

        learns = is_learning(directory)
        check_positive("num_steps", steps)
        made: dict[str, Any] | None = read_model(directory) if learns else require_model(directory)
        if made is not None:
            check_use(made["model"], "learning" if learns else "problem", made["options"])
        with _at_work(directory, quiet=quiet) as callback:
            if learns:
                from bayesrl.cli.learn import resume_learning

                resume_learning(directory, episodes, callback, quiet=quiet)
            else:
                from bayesrl.cli.fit import resume_fit

                resume_fit(directory, steps, callback, quiet=quiet)


@app.command(cls=_LightCommand)
def models() -> None:
    """List the ready models and their options."""
    with exit_on_error():
        from bayesrl.cli.models_table import models_text

        typer.echo(models_text())


@app.command(cls=_LightCommand)
def show(directory: Folder) -> None:
    """Show what a run folder holds."""
    with exit_on_error():
        from bayesrl.cli.show import show_run

        show_run(directory)


@app.command(cls=_LightCommand)
def report(
    directories: Annotated[list[Path], typer.Argument(metavar="DIR...", help="Run folders.", show_default=False)],
    out: Annotated[
        Path | None, typer.Option(help="File to write; DIR/report.html for one folder, report.html for several.")
    ] = None,
    gold: Annotated[str | None, typer.Option(help="Metric that the reward stands for, drawn against KL.")] = None,
    quiet: Quiet = False,
) -> None:
    """Write the report of a run, or of several."""
    with exit_on_error():
        from bayesrl.cli.run_info import REPORT, is_learning

        learned = [is_learning(directory) for directory in directories]
        path = out if out is not None else (directories[0] if len(directories) == 1 else Path()) / REPORT
        verdicts: list[str] = []
        with _at_work(None, quiet=quiet):
            if any(learned):
                from bayesrl.cli.learn import report_learning

                report_learning(directories, path)
            else:
                from bayesrl.cli.report import report_runs

                verdicts = report_runs(directories, path, gold)
        if not quiet:
            for text in [*verdicts, f"report: {path}"]:
                make_console().print(text, markup=False, soft_wrap=text.startswith("report: "))


@app.command(cls=_LightCommand)
def cache(
    empty: Annotated[bool, typer.Option("--clear", help="Delete the compiled programs.")] = False,
) -> None:
    """Tell what is kept compiled, or delete it."""
    with exit_on_error():
        folder = compiled_programs.compiled_folder()
        info = compiled_programs.clear(folder) if empty else compiled_programs.cache_info(folder)
        print_line(f"compiled programs in {folder}")
        many = f"{info.entries:,} {'entry' if info.entries == 1 else 'entries'}, {format_size(info.size)}"
        print_line(f"deleted {many}" if empty else many)

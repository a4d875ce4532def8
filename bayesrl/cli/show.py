"""`bayesrl show`: what a run folder holds, in tables for a terminal of 80 columns; without JAX."""

import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Group, RenderableType
from rich.table import Table as RichTable
from rich.text import Text

from bayesrl import run_folder
from bayesrl.cli.run_info import (
    COLOURS,
    RunScores,
    is_learning,
    learning_folder,
    missing_parts,
    model_rows,
    read_episodes,
    read_model,
    read_scores,
)
from bayesrl.cli.terminal import make_console, print_line
from bayesrl.diagnostics.evidence.result import Evidence
from bayesrl.display.formatting import (
    estimate_at,
    format_beta,
    format_estimate,
    format_mean,
    format_number,
    has_mean,
    last_tenth,
    pluralize,
)
from bayesrl.display.tables import WIDTH, Table, format_text, rich_table, split_columns
from bayesrl.statistics.regularizer_names import distils, regularizer_formula

_COLUMNS = ("β", "J", "E[R]", "D", "KL", "log Z", "J*", "gap", "relative gap", "log p(y)")


def show_run(directory: Path) -> None:
    """Print the content of a run folder: a fit's settings, results, history and what is missing; or runs of `learn`."""
    if is_learning(directory):
        make_console().print(plain_table(("what", "value"), _learning_rows(directory)))
        return
    stored = run_folder.read_problem(directory)
    done, history = run_folder.read_history(directory)
    console = make_console()
    console.print(plain_table(("setting", "value"), fit_rows(read_model(directory), stored, done)))
    scores = read_scores(directory)
    if scores is not None:
        after = "" if scores.step == done else f" after {pluralize(scores.step, 'step')}"
        console.print(Text(f"\nresults{after}", style="bold"))
        print_results(scores)
    if history:
        console.print(Text("\nend of the history (means over the steps between the rows)", style="bold"))
        console.print(_history_table(history, _betas(stored)))
    for line in missing_parts(directory, done, stored["settings"]["num_steps"], scores):
        print_line(line, "yellow")


def print_results(scores: RunScores) -> None:
    """Print the table of scores, and the verdict below it."""
    console = make_console()
    console.print(_evidence_table(scores.fit, scores.held_out))
    if scores.verdict is not None:
        console.print(Text(f"\n{format_text([scores.verdict])}", style=COLOURS[scores.verdict.outcome]))


def _learning_rows(directory: Path) -> Iterator[tuple[str, str]]:
    """Describe runs of `learn`, as rows of (what, value); numbers are means over the runs, as `learn` prints them."""
    stored, made = run_folder.read_problem(directory), read_model(directory)
    identity, settings = stored["identity"], stored["settings"]
    num_runs = 1 if made is None or "learn" not in made else made["learn"]["runs"]
    runs = [read_episodes(learning_folder(directory, index)) for index in range(num_runs)]
    total = settings["num_episodes"]
    yield from model_rows(made)
    yield "environment", str(identity["environment"])
    yield "agent", str(identity["agent"]["type"])
    yield "exploration", str(identity["exploration"])
    yield "runs", f"{num_runs:,}"
    yield "episodes", ", ".join(f"{done:,} of {total:,}" for done, _ in runs)
    histories = [history for done, history in runs if done]
    if histories:
        last, named = last_tenth(len(histories[0]["episode"]), "episode")
        yield f"mean return of the {named}", format_mean([h["return"][-last:].mean() for h in histories])
        yield "cumulated regret", format_mean([h["regret"].sum() for h in histories])
    if min(done for done, _ in runs) < total and "confidence" not in settings:
        yield "go on with", f"bayesrl resume {shlex.quote(str(directory))}"


def _evidence_table(fit: Evidence, held_out: Evidence | None = None) -> RenderableType:
    """Lay out the evidence of a fit, and on held-out data, as tables within 80 columns with a legend below."""
    labelled = [("fit", row) for row in fit.rows]
    labelled += [] if held_out is None else [("held out", row) for row in held_out.rows]
    absent = {
        "log p(y)": all(row.log_marginal is None for _, row in labelled),
        "log Z": fit.regularizer != "kl",
        "D": fit.regularizer == "kl",
    }
    if fit.best_of is not None:
        absent |= dict.fromkeys(("J", "J*", "log Z"), True)
    names = [name for name in _COLUMNS if not absent.get(name, False)]
    gap = "gap" if fit.best_of is None else "β·KL(q‖pₙ)"
    headings = [{"D": fit.symbol, "gap": gap}.get(name, name) for name in names]
    rows = [(label, row.cells()) for label, row in labelled]
    parts = _within_80(Table(["", *headings], [[label, *(cells[name] for name in names)] for label, cells in rows]))
    if fit.metrics:
        metrics = [
            [label, row.cells()["β"], *(format_estimate(row.metrics.get(name)) for name in fit.metrics)]
            for label, row in labelled
        ]
        parts += [Text(""), *_within_80(Table(["", "β", *fit.metrics], metrics))]
    parts += [Text(line, style="dim") for line in _legend(fit, held_out)]
    return Group(*parts)


def _history_table(history: Any, betas: Sequence[float | None], rows: int = 5) -> RichTable:
    """Lay out the end of a history, [chunk, *beta, restart], as a table with means over restarts."""
    names = ("objective", "reward", "kl", "spread", "grad_norm")
    lines = []
    for chunk in range(max(0, len(history["step"]) - rows), len(history["step"])):
        for i, beta in enumerate(betas):
            means = (float(history[name][chunk].reshape(len(betas), -1)[i].mean()) for name in names)
            step = f"{int(history['step'][chunk]):,}" if i == 0 else ""
            lines.append((step, format_beta(beta), *map(format_number, means)))
    return rich_table(Table(("step", "β", "J", "E[R]", "KL", "spread", "|gradient|"), lines, "r" * 7))


def fit_rows(made: Mapping[str, Any] | None, stored: Mapping[str, Any], done: int) -> Iterator[tuple[str, str]]:
    """Describe how a fit was made, as rows of (setting, value): its model, if known, its problem, and steps so far."""
    identity, settings, betas = stored["identity"], stored["settings"], _betas(stored)
    yield from model_rows(made)
    yield "β", "none" if betas == [None] else ", ".join(f"{beta:g}" for beta in betas)
    if "start_beta" in settings:
        yield "start of β", f"{settings['start_beta']:g}"
    yield "steps", f"{done:,} of {settings['num_steps']:,}"
    yield "restarts", str(settings["num_restarts"])
    yield "seed", str(identity["seed"][-1])
    for name in ("guide", "objective"):
        told = identity[name]
        fields = {k: v for k, v in told.items() if k != "type"} if isinstance(told, dict) else {}
        shown = ", ".join(f"{k}={v}" for k, v in fields.items())
        yield name, f"{told['type']}({shown})" if isinstance(told, dict) else str(told)
    yield "optimizer", "Adam, cosine decay to 0" if settings["optimizer"] == "default" else "the model's own"
    yield "versions", ", ".join(f"{k.removesuffix('_version')} {v}" for k, v in settings.items() if "_version" in k)


def _betas(stored: Mapping[str, Any]) -> list[float | None]:
    beta = stored["identity"]["beta"]
    return beta if isinstance(beta, list) else [beta]


def plain_table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> "RichTable":
    """Lay out text in columns; the last one wraps."""
    return rich_table(Table(headings, list(rows), "l" * len(headings)), wrap_last=True)


def _within_80(table: Table) -> list[RenderableType]:
    """Return a table, or several narrow enough ones that repeat the first two columns."""
    tables: list[RenderableType] = []
    for part in split_columns(table, WIDTH, 2):
        grid = rich_table(part)
        for row, cells in zip(grid.rows, part.rows, strict=True):
            row.style = None if cells[0] == "fit" else "dim"
        tables += [*([Text("")] if tables else []), grid]
    return tables


def _legend(fit: Evidence, held_out: Evidence | None) -> Iterator[str]:
    each = f", means over {fit.num_contexts:,} contexts" if fit.num_contexts > 1 else ""
    if fit.beta is None:
        yield f"Without rewards J is the ELBO and J* = log Z: all in nats{each}."
    elif fit.best_of is not None:
        yield f"{distils(fit.best_of)} KL in nats, the rest in reward units{each}."
        yield "relative gap = KL(q‖pₙ) / KL(pₙ‖π₀), pₙ their law."
        return
    elif fit.regularizer == "kl":
        yield f"J = E[R] − β·KL, E[R], J* and gap in reward units; KL and log Z in nats{each}."
    else:
        yield f"J = E[R] − β·{fit.symbol}, E[R], J* and gap in reward units; KL in nats, and in no J{each}."
        yield f"{regularizer_formula(fit.regularizer, fit.alpha)}."
    if any(np.any(one.objective.se > 0) for one in (fit, held_out) if one is not None):
        yield "± is one standard error, [ ] a 95% interval."
    if fit.gap is not None:
        yield "gap = J* − J; relative gap = gap / (J* − J(π₀))."
    if fit.prior_objective is not None:
        there = ""
        if held_out is not None and held_out.prior_objective is not None:
            there = f", {format_estimate(estimate_at(held_out.prior_objective, 0))} on what was held out"
        before = format_estimate(estimate_at(fit.prior_objective, 0))
        yield f"J(π₀) = {before} is what the policy earned before the fit{there}."
    if fit.caveat and not all(has_mean(row.optimum) and row.gap is not None for row in fit.rows):
        yield f"J* is not known: {fit.caveat.rstrip('.')}."

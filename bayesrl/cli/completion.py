"""What a shell completes: names of ready models, files, and options of a model."""

import os
from collections.abc import Iterator
from pathlib import Path

import typer

from bayesrl.cli.option_values import format_option
from bayesrl.cli.suggestions import USES
from bayesrl.ready_models import ProblemError, model_names, model_options


def complete_model(incomplete: str) -> Iterator[tuple[str, str]]:
    """Complete the name of a ready model, or the path of a Python file."""
    for name, about in model_names().items():
        if name.startswith(incomplete):
            yield name, about
    typed = Path(incomplete)
    inside = typed if incomplete.endswith("/") else typed.parent
    if inside.is_dir():
        for path in sorted(inside.iterdir()):
            if path.suffix == ".py" and str(path).startswith(incomplete):
                yield str(path), ""


def complete_assignment(ctx: typer.Context, incomplete: str) -> Iterator[tuple[str, str]]:
    """Complete the name of an option of the model typed before it, with its default."""
    # Click does not parse the line while a value is missing; the shell's integration passes it in one of these.
    typed = os.environ.get("_TYPER_COMPLETE_ARGS") or os.environ.get("COMP_WORDS", "")
    for word in typed.split()[2:]:
        try:
            options = model_options(word, USES.get(ctx.info_name or "", "problem"))
        except ProblemError:
            continue
        for name, default in options.items():
            if name.startswith(incomplete):
                yield f"{name}=", f"{format_option(default)} by default"
        return

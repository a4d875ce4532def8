"""`bayesrl models`: the ready models and their options, as text for a terminal of any width."""

import shutil
import textwrap

from bayesrl.cli.option_values import format_option
from bayesrl.ready_models import COMMANDS, model_names, model_options, model_uses

_NARROWEST = 20


def models_text() -> str:
    """List the ready models: what each is, and its options for each command."""
    names = model_names()
    indent = max(map(len, names), default=5) + 2
    width = max(shutil.get_terminal_size().columns, indent + _NARROWEST)
    lines = ["model".ljust(indent) + "what it is, and the options of each command for --set"]
    for name, about in names.items():
        paragraphs = [about]
        for use in model_uses(name):
            options = "  ".join(
                f"{option}={format_option(value)}" for option, value in model_options(name, use).items()
            )
            paragraphs.append(f"{COMMANDS[use]}: {options}")
        body: list[str] = []
        for text in paragraphs:
            body += textwrap.wrap(text, width - indent, subsequent_indent="  ", break_on_hyphens=False)
        lines += [(name if i == 0 else "").ljust(indent) + line for i, line in enumerate(body)] + [""]
    return "\n".join(lines[:-1])

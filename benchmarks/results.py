"""RESULTS.md: one section per benchmark; only its own command rewrites it."""

import os
import platform
import re
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import jax

RESULTS = Path(__file__).with_name("RESULTS.md")
DOCUMENTS = Path(__file__).parents[1] / "docs"
PAGES = {"gradient_bias": DOCUMENTS / "unbiased_or_named.md", "engines": DOCUMENTS / "engines.md"}
"""Pages of the documents that show the tables of a benchmark too."""
HEAD = """# Results

Measured by `make benchmarks`; each section is written by the command that it names. Times depend on the
machine, ratios less so: what is compared runs in turn in one process.
"""


def write_section(name: str, title: str, text: str, order: Sequence[str]) -> None:
    """Replace the section of one benchmark and leave the others as they are."""
    sections = _sections(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    sections[name] = f"## {title}\n\n`python -m benchmarks {name}`: {environment()}.\n\n{text.strip()}\n"
    # A run that began before others were added knows nothing of their sections, and must leave them.
    keys = [*(key for key in order if key in sections), *(key for key in sections if key not in order)]
    parts = [f"<!-- {key} -->\n{sections[key]}<!-- end of {key} -->\n" for key in keys]
    beside = RESULTS.with_suffix(".new")
    beside.write_text("\n".join([HEAD, *parts]), encoding="utf-8", errors="backslashreplace")
    beside.replace(RESULTS)  # atomic: a failed write leaves the other sections as they were


def write_page(name: str, text: str) -> None:
    """Replace the part of a page of the documents that a benchmark writes, between comments of its name."""
    page = PAGES[name]
    before, start, rest = page.read_text(encoding="utf-8").partition(f"<!-- {name} -->\n")
    _, end, after = rest.partition(f"<!-- end of {name} -->\n")
    if not (start and end):
        raise ValueError(f"{page} has no place for {name}")
    page.write_text(f"{before}{start}{text.strip()}\n{end}{after}", encoding="utf-8")


def _sections(text: str) -> dict[str, str]:
    found = re.findall(r"<!-- (\w+) -->\n(.*?)<!-- end of \1 -->\n", text, re.DOTALL)
    return dict(found)


def environment() -> str:
    """Describe the machine and versions, without a date."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    packages = ", ".join(f"{package} {version(package)}" for package in ("jax", "numpyro", "optax"))
    return f"{cores} cores, {jax.default_backend().upper()}; Python {platform.python_version()}, {packages}"


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Format a Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def target(what: str, *, met: bool, why_not: str = "") -> str:
    """Say in one sentence whether a target was met."""
    return f"Target: {what}. **{'Met' if met else 'Not met'}**{'' if met or not why_not else ': ' + why_not}."

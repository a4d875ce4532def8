"""Robustness: damaged files and files laid by somebody else, processes that are killed.

Options: `--part NAME` measures one part and leaves the others as they were found; `--count NAME=N` makes a part larger
or smaller; `--tell` measures nothing and writes the section from what is kept. Every part keeps what it found in
robustness.json beside this file, after each case, and goes on from there, so that an ended run loses nothing; `--anew`
begins it again.

A part is a module `robustness_NAME` with a docstring, `NUMBER`, the number of cases that its target asks for,
`measure(count, found, note)`, which adds to what was found before and calls `note` after each case, and `tell(found)`.
"""

import argparse
import importlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

PARTS = {"mutations": "Damaged and foreign files", "kills": "Killed processes"}
KEPT = Path(__file__).with_suffix(".json")


def is_partial(options: Sequence[str]) -> bool:
    """Return False: parts that are not measured keep their earlier results, so RESULTS.md is always rewritten."""
    return False


def run(options: Sequence[str] = ()) -> str:
    """Measure the requested parts, and report all."""
    asked = _parse(options)
    kept: dict[str, Any] = json.loads(KEPT.read_text(encoding="utf-8")) if KEPT.exists() else {}
    for name in [] if asked.tell else asked.part or PARTS:
        found = {} if asked.anew else kept.get(name, {})
        kept[name] = found
        part = _part(name)
        part.measure(asked.count.get(name, part.NUMBER), found, lambda: _keep(kept))
        _keep(kept)
    return "\n\n".join(
        f"### {title}\n\n{' '.join((_part(name).__doc__ or '').split())}\n\n{_part(name).tell(kept[name])}"
        for name, title in PARTS.items()
        if kept.get(name)
    )


def _keep(kept: dict[str, Any]) -> None:
    beside = KEPT.with_suffix(".new")
    beside.write_text(json.dumps(kept, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    beside.replace(KEPT)


def _part(name: str) -> Any:
    return importlib.import_module(f"benchmarks.robustness_{name}")


def _parse(options: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks robustness")
    parser.add_argument("--part", action="append", choices=list(PARTS))
    parser.add_argument("--count", action="append", type=_count, default=[])
    parser.add_argument("--anew", action="store_true")
    parser.add_argument("--tell", action="store_true")
    asked = parser.parse_args(options)
    asked.count = dict(asked.count)
    return asked


def _count(text: str) -> tuple[str, int]:
    found = re.fullmatch(r"(\w+)=(\d+)", text)
    if found is None or found[1] not in PARTS:
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form NAME=N, with NAME one of {', '.join(PARTS)}")
    return found[1], int(found[2])

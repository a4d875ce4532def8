"""What standard calls and commands compile, and their CPU seconds, beside an older commit.

Options: `--against REV` gives the older commit; `--of REV` measures a commit in the place of the working tree;
`--only NAME,...` some rows, `--quick` all but the texts; `--repeats N`; `--names` lists each program with the frames
of bayesrl that asked for it. `--keep FILE` writes down each turn when it is measured, and goes on from what the file
holds, so that an ended run loses no more than a turn. RESULTS.md is written where all rows are compared.

Both checkouts run in turn, in fresh processes; numbers are medians, shares medians over the turns. Caches are empty,
but for the bytecode of modules, which everyone has from the second run on. The four calls of README's bandit follow
each other in one process; so do a command and its second run on one cache folder. Programs: those that XLA compiled,
by JAX's own events, and beside them, in brackets, those that came from a cache on disk. Seconds are CPU seconds of all
threads: of commands those of the whole process, of calls in Python those of the call, with the imports that it makes
itself. Each belongs to the innermost of importing, tracing, lowering and compiling (they nest: what is compiled while
something is traced is no tracing), and threads that are in one at once share it; running is all else: XLA's programs,
Python, and tracing outside of `jit`, of which JAX does not tell. Commands that need no JAX are not looked into. Shares
are those of the older commit's CPU seconds.
"""

import argparse
import shutil
import statistics
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from benchmarks.compilation_meter import ACT_CALLS, PHASES, Call
from benchmarks.compilation_rows import (
    BYTECODE,
    GROUPS,
    NAMES,
    REPEATS,
    REPEATS_OF_TEXTS,
    TEXTS,
    Measured,
    Row,
    cpu_seconds,
    make_checkout,
    measure_group,
    num_compiled,
)
from benchmarks.results import table, target
from benchmarks.timing import median_ratio


def is_partial(options: Sequence[str]) -> bool:
    """Tell whether something is left out, so that RESULTS.md keeps what it has."""
    asked = _parse(options)
    return bool(asked.only or asked.quick or not asked.against)


def run(options: Sequence[str] = ()) -> str:
    """Measure the rows that are asked for, at one commit or two in turn."""
    asked = _parse(options)
    commits = tuple(revision or "the working tree" for revision in (asked.against, asked.of))
    measured = Measured(kept=asked.keep, commits=commits)
    measured.read()
    with tempfile.TemporaryDirectory() as folder, ExitStack() as leaving:
        place = Path(folder).resolve()
        leaving.callback(shutil.rmtree, BYTECODE.joinpath(*place.parts[1:]), ignore_errors=True)
        checkouts = [make_checkout(place, "new", asked.of)]
        if asked.against:
            checkouts.insert(0, make_checkout(place, "old", asked.against))
        for group in GROUPS:
            wanted = [i for i, row in enumerate(group.rows) if _is_wanted(row, asked)]
            if wanted:
                measure_group(group, wanted[-1] + 1, checkouts, asked.repeats or group.repeats, measured)
    rows = [row for group in GROUPS for row in group.rows if _is_wanted(row, asked)]
    names = [checkout.name for checkout in checkouts]
    if asked.names:
        print(
            *(_listing(row, name, measured[row.name, name]) for row in rows for name in names), sep="\n\n", end="\n\n"
        )
    return _told(rows, names, measured, asked)


def _parse(options: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m benchmarks compilation", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--against", metavar="REV", help="an older commit, measured in turn")
    parser.add_argument("--of", metavar="REV", help="a commit to measure in the place of the working tree")
    parser.add_argument("--only", metavar="NAME,...", type=lambda names: names.split(","), default=[])
    parser.add_argument("--quick", action="store_true", help="leave out the texts, which take minutes each")
    parser.add_argument("--repeats", type=int, help=f"processes; {REPEATS}, and {REPEATS_OF_TEXTS} for texts")
    parser.add_argument("--keep", metavar="FILE", type=Path, help="write down each turn, and go on from what it holds")
    parser.add_argument("--names", action="store_true", help="list the programs and where they come from")
    asked = parser.parse_args(options)
    if unknown := [name for name in asked.only if name not in NAMES]:
        parser.error(f"no row is called {unknown[0]!r}; choose from {', '.join(NAMES)}")
    if asked.repeats is not None and asked.repeats < 1:
        parser.error(f"--repeats {asked.repeats}; use at least 1")
    return asked


def _is_wanted(row: Row, asked: argparse.Namespace) -> bool:
    if asked.only:
        return row.name in asked.only
    return not (asked.quick and row.name.removesuffix("_again") in TEXTS)


def _listing(row: Row, name: str, calls: Sequence[Call]) -> str:
    """List the programs of the last turn, the most frequent first."""
    programs = calls[-1].programs if calls else []
    counts = Counter((p.name, p.origin, " (from disk)" if p.retrieved else "") for p in programs)
    lines = [f"{count:4d} × {called}{how}: {origin}" for (called, origin, how), count in counts.most_common()]
    return "\n".join([f"{row.name}, {name}: {len(programs)} programs", *lines])


def _told(rows: Sequence[Row], names: Sequence[str], measured: Measured, asked: argparse.Namespace) -> str:
    done = [row for row in rows if all(measured[row.name, name] for name in names)]
    options = f"`--against {asked.against}`" + (f" and `--of {asked.of}`" if asked.of else "")
    words = [f"{options}: what is older stands before the arrow." if asked.against else ""]
    lines = [_line(row, names, measured) for row in done if row.wall is None]
    header = ["name", "call", "programs", *PHASES, "CPU s in all", "share", "target"]
    words.append(table(header, lines) if lines else "")
    for row in done:
        if row.wall is not None:
            times, programs = (_cells(row, names, measured, of) for of in (_milliseconds, _programs))
            text = f"{row.call}: {times} ms, the median of {ACT_CALLS} calls; programs: {programs}."
            words.append(f"{text} {target(_wish(row), met=_is_met(row, names, measured))}")
    if asked.against:
        words.append(_second_call(done, measured))
        failed = [row.name for row in rows if row not in done or not _is_met(row, names, measured)]
        words.append(target("every row within its target", met=not failed, why_not=", ".join(failed)))
    words.append((__doc__ or "").partition("\n\n")[2].strip())
    return "\n\n".join(text for text in words if text)


def _line(row: Row, names: Sequence[str], measured: Measured) -> list[str]:
    parts = [_cells(row, names, measured, _phase(phase)) for phase in PHASES]
    compares = len(names) > 1
    share = f"{_share(row.name, row.name, measured):.3f}" if compares else ""
    met = f": {'met' if _is_met(row, names, measured) else '**not met**'}" if compares else ""
    programs, cpu = (_cells(row, names, measured, of) for of in (_programs, _seconds))
    return [row.name, row.call, programs, *parts, cpu, share, f"{_wish(row)}{met}"]


def _cells(row: Row, names: Sequence[str], measured: Measured, of: Callable[[Sequence[Call]], str]) -> str:
    """Write one figure of a row for each checkout."""
    return " → ".join(cell for name in names if (cell := of(measured[row.name, name])))


def _programs(calls: Sequence[Call]) -> str:
    """Write how many programs were compiled, and in brackets how many came from a cache on disk."""
    if not _is_looked_into(calls):
        return ""
    retrieved = statistics.median(len(call.programs) - num_compiled(call) for call in calls)
    return f"{statistics.median(map(num_compiled, calls)):g}" + (f" (+{retrieved:g})" if retrieved else "")


def _is_looked_into(calls: Sequence[Call]) -> bool:
    return set(PHASES) <= set(calls[0].seconds)


def _phase(phase: str) -> Callable[[Sequence[Call]], str]:
    return lambda calls: _median(call.seconds[phase] for call in calls) if _is_looked_into(calls) else ""


def _seconds(calls: Sequence[Call]) -> str:
    return _median(map(cpu_seconds, calls))


def _milliseconds(calls: Sequence[Call]) -> str:
    return _median(1e3 * (call.wall or 0.0) for call in calls)


def _median(values: Iterable[float]) -> str:
    return f"{statistics.median(values):.2f}"


def _share(row: str, of: str, measured: Measured) -> float:
    """Give the CPU seconds of a row as a share of those of a row of the older commit, the median over the turns."""
    return median_ratio(
        [cpu_seconds(call) for call in measured[row, "new"]], [cpu_seconds(call) for call in measured[of, "old"]]
    )


def _second_call(done: Sequence[Row], measured: Measured) -> str:
    if "another_key" not in [row.name for row in done]:
        return ""
    share = _share("another_key", "first_fit", measured)
    return f"The same call again takes {share:.3f} of the CPU seconds of the older commit's first fit."


def _wish(row: Row) -> str:
    wishes: list[Any] = [f"≤ {row.programs} programs"] if row.programs is not None else []
    wishes += [f"share ≤ {row.share:.2f}"] if row.share is not None else []
    wishes += [f"≤ {1e3 * row.wall:g} ms"] if row.wall is not None else []
    return ", ".join(wishes)


def _is_met(row: Row, names: Sequence[str], measured: Measured) -> bool:
    calls = measured[row.name, "new"]
    few = row.programs is None or max(map(num_compiled, calls)) <= row.programs
    cheap = row.share is None or len(names) == 1 or _share(row.name, row.name, measured) <= row.share
    quick = row.wall is None or statistics.median(call.wall or 0.0 for call in calls) <= row.wall
    return few and cheap and quick

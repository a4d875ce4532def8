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
import io
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.compilation_meter import ACT_CALLS, PHASES, RUNNING, Call, XLAProgram
from benchmarks.results import table, target
from benchmarks.timing import median_ratio

REPOSITORY = Path(__file__).parent.parent
METER = Path(__file__).with_name("compilation_meter.py")
MEASURED = ("bayesrl", "models")
REPEATS, REPEATS_OF_TEXTS = 3, 1
TEXTS = ("translation", "text_generation", "question_answering", "data_to_text")
COMMAND_LINE = "from bayesrl.cli import app; app()"
BYTECODE = Path(__file__).with_name(".bytecode")
"""Where Python keeps the bytecode of all that is imported, whatever it does elsewhere; made once."""
NOT_IMPORTED = r"[/\\](test|tests|idlelib|lib2to3|ensurepip)[/\\]"
CACHES = (
    "BAYESRL_",
    "JAX_COMPILATION_CACHE",
    "JAX_ENABLE_COMPILATION_CACHE",
    "JAX_PERSISTENT_CACHE",
    "PYTHONDONTWRITEBYTECODE",
    "XDG_CACHE",
)
"""Beginnings of environment variables that name caches or say how they are used."""


@dataclass(frozen=True)
class Row:
    """A call, and what is wanted of it: at most so many programs, this share of CPU seconds, these seconds of wall."""

    name: str
    call: str
    programs: int | None = None
    share: float | None = None
    wall: float | None = None


@dataclass(frozen=True)
class Group:
    """Rows that follow each other on one cache folder.

    Attributes:
        rows: in the order in which they run.
        run: measures the first so many rows.
        repeats: where nothing else is asked for.
    """

    rows: tuple[Row, ...]
    run: Callable[["Checkout", Path, int], list[Call]]
    repeats: int = REPEATS


@dataclass(frozen=True)
class Checkout:
    """A copy of the library and its models, and the environment that its processes get."""

    name: str
    root: Path
    matplotlib: Path

    def environment(self, home: Path) -> dict[str, str]:
        """Give variables under which every cache lies in a folder, but those of bytecode and matplotlib's fonts."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith(CACHES)}
        own = {"HOME": home, "XDG_CACHE_HOME": home / "cache", "BAYESRL_CACHE": home / "cache" / "bayesrl"}
        own |= {"PYTHONPATH": self.root, "PYTHONPYCACHEPREFIX": BYTECODE, "MPLCONFIGDIR": self.matplotlib}
        return kept | {name: str(path) for name, path in own.items()}

    def python(self, home: Path, *arguments: str) -> float:
        """Run Python in a folder, and give its CPU seconds."""
        command = [sys.executable, "-P", *arguments]
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run(  # noqa: S603
            command, cwd=home, env=self.environment(home), capture_output=True, text=True, check=False
        )
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        if done.returncode:
            raise RuntimeError(f"{' '.join(arguments)} of {self.name} failed:\n{done.stderr[-2000:]}")
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    def meter(self, home: Path, what: str, *arguments: str) -> tuple[list[Call], float]:
        """Measure in a process of its own; give what its calls took, and the CPU seconds of the process."""
        answer = home / "answer.json"
        seconds = self.python(home, str(METER), str(self.root), str(answer), what, *arguments)
        told = json.loads(answer.read_text(encoding="utf-8"))
        calls = [Call([XLAProgram(**made) for made in call.pop("programs")], **call) for call in told]
        return calls, seconds


def readme(checkout: Checkout, home: Path, num_rows: int) -> list[Call]:
    """Measure README's bandit."""
    return checkout.meter(home, "readme", str(num_rows))[0]


def act(checkout: Checkout, home: Path, _: int) -> list[Call]:
    """Measure actions of a fitted policy."""
    return checkout.meter(home, "act")[0]


def command(*arguments: str) -> Callable[[Checkout, Path, int], list[Call]]:
    """Make a command, and the same with another seed, to be measured."""

    def run(checkout: Checkout, home: Path, num_rows: int) -> list[Call]:
        found = []
        for seed in range(num_rows):
            more = ("--seed", str(seed), "--out", str(home / f"run-{seed}"))
            (call,), seconds = checkout.meter(home, "command", *arguments, *more)
            found.append(_whole(call, seconds))
        return found

    return run


def plain(*arguments: str) -> Callable[[Checkout, Path, int], list[Call]]:
    """Make a command to be measured that JAX must not be imported for, so that its programs go uncounted."""
    return lambda checkout, home, _: [Call([], {RUNNING: checkout.python(home, "-c", COMMAND_LINE, *arguments)})]


def _whole(call: Call, seconds: float) -> Call:
    """Give a call the CPU seconds of its whole process, those of the processes that it started included."""
    return Call(call.programs, call.seconds | {RUNNING: call.seconds[RUNNING] + seconds - _cpu(call)})


def _fitted(name: str, *arguments: str, programs: int, share: float, again: float, repeats: int = REPEATS) -> Group:
    said = f"`bayesrl {' '.join(arguments)}`"
    rows = (
        Row(name, said, programs, share),
        Row(f"{name}_again", f"{said} a second time, another seed", share=again),
    )
    return Group(rows, command(*arguments), repeats)


GROUPS = (
    Group(
        (
            Row("first_fit", "`fit` of README's bandit, first in a process", 6, 0.25),
            Row("another_key", "the same call again, another key", 0, 0.04),
            Row("defined_anew", "the same function defined anew with other means", 0, 0.10),
            Row("judged", "`estimate`, `evidence`, `diagnose` and `write_report` after it", 6, 0.35),
        ),
        readme,
    ),
    _fitted("digits_bandit", "fit", "digits_bandit", programs=10, share=0.35, again=0.15),
    _fitted("frozen_lake", "fit", "frozen_lake", programs=15, share=0.35, again=0.15),
    _fitted("cartpole", "fit", "cartpole", "--set", "physics=program", programs=15, share=0.35, again=0.15),
    _fitted("deep_sea", "learn", "deep_sea", programs=15, share=0.35, again=0.15),
    *(_fitted(name, "fit", name, programs=25, share=0.40, again=0.25, repeats=REPEATS_OF_TEXTS) for name in TEXTS),
    Group((Row("help", "`bayesrl --help`", share=0.05),), plain("--help")),
    Group((Row("models", "`bayesrl models`", share=0.05),), plain("models")),
    Group((Row("act", "`posterior.act(key, observation)` of CartPole's policy, after its first", 0, wall=1e-3),), act),
)
NAMES = tuple(row.name for group in GROUPS for row in group.rows)


@dataclass(frozen=True)
class Measured:
    """Calls by row and checkout, one for each turn, and the file that keeps them, one line a call."""

    calls: defaultdict[tuple[str, str], list[Call]] = field(default_factory=lambda: defaultdict(list))
    kept: Path | None = None
    commits: tuple[str, ...] = ()

    def __getitem__(self, key: tuple[str, str]) -> list[Call]:
        return self.calls[key]

    def read(self) -> None:
        """Take what the file holds of the same commits."""
        if self.kept is None or not self.kept.exists():
            return
        for line in self.kept.read_text(encoding="utf-8").splitlines():
            told = json.loads(line)
            if tuple(told["commits"]) != self.commits:
                raise SystemExit(
                    f"--keep {self.kept}: holds {' and '.join(told['commits'])}, not {' and '.join(self.commits)}; "
                    "name another file"
                )
            programs = [XLAProgram(**made) for made in told["call"].pop("programs")]
            self.calls[told["row"], told["checkout"]].append(Call(programs, **told["call"]))

    def add(self, row: str, checkout: str, call: Call) -> None:
        """Take one call, and write it down."""
        self.calls[row, checkout].append(call)
        if self.kept is not None:
            told = {"commits": self.commits, "row": row, "checkout": checkout, "call": asdict(call)}
            with self.kept.open("a", encoding="utf-8") as file:
                file.write(json.dumps(told) + "\n")


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
        checkouts = [_checkout(place, "new", asked.of)]
        if asked.against:
            checkouts.insert(0, _checkout(place, "old", asked.against))
        for group in GROUPS:
            wanted = [i for i, row in enumerate(group.rows) if _is_wanted(row, asked)]
            if wanted:
                _measure(group, wanted[-1] + 1, checkouts, asked.repeats or group.repeats, measured)
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


def _checkout(place: Path, name: str, revision: str | None) -> Checkout:
    """Copy the library as it is now, so that edits meanwhile change nothing, or as it was at a commit."""
    root, matplotlib = place / name, place / "matplotlib"
    if revision is None:
        for part in MEASURED:
            shutil.copytree(REPOSITORY / part, root / part, ignore=shutil.ignore_patterns("__pycache__"))
    else:
        git = ["git", "-C", str(REPOSITORY), "archive", revision, *MEASURED]
        packed = subprocess.run(git, check=True, stdout=subprocess.PIPE).stdout  # noqa: S603
        with tarfile.open(fileobj=io.BytesIO(packed)) as archive:
            archive.extractall(root, filter="data")
    checkout = Checkout(name, root, matplotlib)
    # Neither bytecode nor the list of fonts is made while something is measured. Some files of packages cannot be
    # compiled, and are never imported.
    folders = [str(root), *(sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib"))]
    making = [sys.executable, "-m", "compileall", "-q", "-j", "0", "-x", NOT_IMPORTED, *dict.fromkeys(folders)]
    subprocess.run(making, env=checkout.environment(place), capture_output=True, check=False)  # noqa: S603
    checkout.python(place, "-c", "import matplotlib.font_manager")
    return checkout


def _measure(group: Group, num_rows: int, checkouts: Sequence[Checkout], repeats: int, measured: Measured) -> None:
    """Measure the first rows of a group in turn; where it fails, say so and go on with the next."""
    last = group.rows[num_rows - 1].name
    for turn in range(repeats):
        for checkout in checkouts:
            if len(measured[last, checkout.name]) > turn:
                continue
            with tempfile.TemporaryDirectory() as home:
                try:
                    calls = group.run(checkout, Path(home), num_rows)
                except RuntimeError as error:
                    print(error, file=sys.stderr, flush=True)
                    for row in group.rows:
                        measured[row.name, checkouts[0].name].clear()
                    return
            for row, call in zip(group.rows, calls, strict=False):
                measured.add(row.name, checkout.name, call)
                counted = f"{_compiled(call)} programs, {_cpu(call):.2f} CPU s"
                print(f"{row.name}, {checkout.name}, turn {turn + 1}: {counted}", file=sys.stderr, flush=True)


def _cpu(call: Call) -> float:
    return sum(call.seconds.values())


def _compiled(call: Call) -> int:
    return sum(not program.retrieved for program in call.programs)


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
    retrieved = statistics.median(len(call.programs) - _compiled(call) for call in calls)
    return f"{statistics.median(map(_compiled, calls)):g}" + (f" (+{retrieved:g})" if retrieved else "")


def _is_looked_into(calls: Sequence[Call]) -> bool:
    return set(PHASES) <= set(calls[0].seconds)


def _phase(phase: str) -> Callable[[Sequence[Call]], str]:
    return lambda calls: _median(call.seconds[phase] for call in calls) if _is_looked_into(calls) else ""


def _seconds(calls: Sequence[Call]) -> str:
    return _median(map(_cpu, calls))


def _milliseconds(calls: Sequence[Call]) -> str:
    return _median(1e3 * (call.wall or 0.0) for call in calls)


def _median(values: Iterable[float]) -> str:
    return f"{statistics.median(values):.2f}"


def _share(row: str, of: str, measured: Measured) -> float:
    """Give the CPU seconds of a row as a share of those of a row of the older commit, the median over the turns."""
    return median_ratio([_cpu(call) for call in measured[row, "new"]], [_cpu(call) for call in measured[of, "old"]])


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
    few = row.programs is None or max(map(_compiled, calls)) <= row.programs
    cheap = row.share is None or len(names) == 1 or _share(row.name, row.name, measured) <= row.share
    quick = row.wall is None or statistics.median(call.wall or 0.0 for call in calls) <= row.wall
    return few and cheap and quick

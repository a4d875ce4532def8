"""The calls and commands that `compilation` measures, and how: each in a fresh process, at one commit or another."""

import io
import json
import os
import resource
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from benchmarks.compilation_meter import RUNNING, Call, XLAProgram

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
    return Call(call.programs, call.seconds | {RUNNING: call.seconds[RUNNING] + seconds - cpu_seconds(call)})


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


def make_checkout(place: Path, name: str, revision: str | None) -> Checkout:
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


def measure_group(group: Group, num_rows: int, checkouts: Sequence[Checkout], repeats: int, measured: Measured) -> None:
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
                counted = f"{num_compiled(call)} programs, {cpu_seconds(call):.2f} CPU s"
                print(f"{row.name}, {checkout.name}, turn {turn + 1}: {counted}", file=sys.stderr, flush=True)


def cpu_seconds(call: Call) -> float:
    """Add up the CPU seconds of all phases."""
    return sum(call.seconds.values())


def num_compiled(call: Call) -> int:
    """Count the programs that XLA compiled, without those from a cache on disk."""
    return sum(not program.retrieved for program in call.programs)

"""Files of run folders of a fit and of `learn` that were damaged, and files that somebody else laid there.

Each case changes one file of a fresh copy of a folder and reads the copy as users do: by `show`, by `load` with and
without the policy, by `resume` or `learn`, and now and then by `report`. Damage (bits, bytes, blocks, ends, parts of
other files, files that are gone) is *named* where an error of bayesrl names the file or `show` tells it. *Silent* is
damage in a file that was read without a word; *unharmed* is what does not read the file, or comes to the same without
it. Files that were laid bear a right digest and hold other values, or are no plain files: they may be refused, or be
taken as written where they hold what such a file may hold. *Raw* is any error that is not bayesrl's own, *hung* what
takes over 30 s, *led out* a file outside that changed, or a character sent to the terminal that steers it.
"""

import contextlib
import io
import random
import re
import shutil
import signal
import tempfile
import unicodedata
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.results import table, target
from benchmarks.robustness_damage import DAMAGE, LAID, damage, lay

NUMBER = 2000
OUTCOMES = ("named", "unharmed", "as written", "silent", "raw", "hung", "led out")
FAULTS = ("silent", "raw", "hung", "led out")
_LONGEST = 30
_MOST_NAMED = 40
_REPORTED = 50
"""`report` reads one case in this many, too."""

# ---- the folders ------------------------------------------------------------------------------


class Folder(NamedTuple):
    """An intact run folder, and its readers.

    Attributes:
        place: its path.
        readers: by name, a function that reads a copy of it, and the files that it reads.
    """

    place: Path
    readers: dict[str, tuple[Callable[[Path], str], frozenset[str]]]


def _quietly(run: Callable[[], Any]) -> str:
    """Run, and return the printed text."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        run()
    return out.getvalue()


def _show(folder: Path) -> str:
    from bayesrl.cli.show import show_run

    return _quietly(lambda: show_run(folder))


def _described(posterior: Any) -> str:
    """Describe a loaded posterior by a digest of its arrays."""
    import jax

    from bayesrl.files.digests import digest_of

    told = (posterior.draws, posterior.history, posterior.params)
    arrays = b"".join(np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(told))
    return f"{digest_of(arrays)} {'stopped' if posterior.interrupted else ''}"


def fit_folder(place: Path) -> Folder:
    """Make the folder of a fit, as the command line does."""
    import bayesrl
    from bayesrl import run_folder
    from bayesrl.cli.fit import Overrides, start_fit
    from bayesrl.cli.report import report_runs

    overrides = Overrides([0.2], 20, 1, 0)
    _quietly(lambda: start_fit("bernoulli_bandit", {"arms": 3}, place, overrides, lambda _: None, quiet=True))
    problem = bayesrl.load_problem("bernoulli_bandit", arms=3)
    names = {path.name for path in place.iterdir()} - {run_folder.PREVIOUS_CHECKPOINT}
    fitted = {run_folder.PROBLEM, run_folder.CHECKPOINT}

    def again(folder: Path) -> str:
        return _described(bayesrl.resume(folder, problem.policy, *problem.args, progress=False))

    def report(folder: Path) -> str:
        return "\n".join(report_runs([folder], folder / "other.html", None))

    return Folder(
        place,
        {
            "show": (_show, frozenset(names)),
            "load": (lambda f: _described(bayesrl.load(f)), frozenset(fitted | {run_folder.POSTERIOR})),
            "load with the policy": (
                lambda f: _described(bayesrl.load(f, problem.policy, *problem.args)),
                frozenset(fitted),
            ),
            "resume": (again, frozenset(fitted)),
            "report": (report, frozenset(fitted | {run_folder.MODEL})),
        },
    )


def learn_folder(place: Path) -> Folder:
    """Make the folder of a run of `learn`."""
    import jax

    from bayesrl import control, run_folder

    swim = control.river_swim()
    agent = control.BayesianAgent(control.TabularModel.of(swim, noise=0.1))

    def learn(folder: Path) -> str:
        told = control.learn(
            jax.random.key(0), swim, agent, exploration=control.thompson(), num_episodes=6, directory=folder,
            progress=False,
        )  # fmt: skip
        return str(told.history["return"].tolist())

    learn(place)
    files = frozenset({run_folder.PROBLEM, run_folder.CHECKPOINT})
    return Folder(place, {"show": (_show, files), "learn": (learn, files)})


# ---- reading ----------------------------------------------------------------------------------


class _Hung(BaseException):
    pass


@contextlib.contextmanager
def _in_time() -> Iterator[None]:
    def stop(*_: object) -> None:
        raise _Hung

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(_LONGEST)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def _steers(text: str) -> bool:
    return any(unicodedata.category(c) in ("Cc", "Cs") and c != "\n" for c in text)


def outcome(
    read: Callable[[Path], str], folder: Path, name: str, *, reads: bool, whole: str, laid: bool, gone: bool
) -> tuple[str, str]:
    """Read a folder with one changed file, and return the outcome and the message.

    Args:
        read: one of `Folder.readers`.
        folder: the copy.
        name: name of the changed file.
        reads: whether the reader reads that file.
        whole: the reader's result for the intact folder.
        laid: whether the file is somebody else's, not damaged.
        gone: whether the file was removed.
    """
    from bayesrl.errors import BayesRLError

    try:
        with _in_time():
            told = read(folder)
    except BayesRLError as error:
        return ("named" if laid or name in str(error) else "raw"), str(error)
    except _Hung:
        return "hung", ""
    except Exception as error:  # noqa: BLE001
        return "raw", f"{type(error).__name__}: {error}"
    if _steers(told):
        return "led out", repr(told)
    on_a_line = " ".join(told.split())
    if (
        re.search(rf"(damaged|missing): .*|cannot be (read|made)|stopped|go on with|{re.escape(name)}", on_a_line)
        and told != whole
    ):
        return "named", on_a_line
    if not reads or (gone and told == whole):
        return ("unharmed" if told == whole or laid else "silent"), on_a_line
    return ("as written" if laid else "silent"), on_a_line


def case(folder: Folder, number: int, place: Path, wholes: dict[str, str]) -> dict[str, Any]:
    """Do one case: change a file of a copy, and read the copy.

    Args:
        folder: the intact folder.
        number: number of the case, which fixes everything random in it.
        place: an empty folder for the copy and for files outside it.
        wholes: the readers' results for the intact folder.

    Returns:
        The change, and the outcome of each reader.
    """
    from bayesrl import run_folder
    from bayesrl.files.digests import problem_digest

    rng = random.Random(number)  # noqa: S311
    copy, outside = place / "run", place / "outside"
    shutil.copytree(folder.place, copy)
    names = sorted(path.name for path in copy.iterdir())
    problem = problem_digest(run_folder.read_problem(copy)["identity"])
    laid = rng.random() < 0.4
    plain = [name for name in names if name.endswith((".json", ".safetensors", ".nc"))]
    name = rng.choice(plain if laid or rng.random() < 0.8 else names)
    path, kind = copy / name, rng.choice(LAID if laid else DAMAGE)
    gone = kind == "gone"
    if laid:
        lay(rng, path, kind, outside, problem)
    else:
        # The previous checkpoint in place of the last one is older, but not damage.
        same = (name, run_folder.PREVIOUS_CHECKPOINT) if name == run_folder.CHECKPOINT else (name,)
        others = [(copy / other).read_bytes() for other in names if other not in same]
        before = path.read_bytes()
        after = damage(rng, before, kind, others)
        if after == before:
            after = before + b"\0"
        path.unlink()
        if after is not None:
            path.write_bytes(after)
    lies = outside.read_bytes() if outside.exists() else None
    came: dict[str, tuple[str, str]] = {}
    for reader, (read, files) in folder.readers.items():
        if reader == "report" and number % _REPORTED:
            continue
        came[reader] = outcome(
            read, copy, name, reads=name in files, whole=wholes.get(reader, ""), laid=laid, gone=gone
        )
        if (outside.read_bytes() if outside.exists() else None) != lies:
            came[reader] = ("led out", "what lies outside has changed")
    return {"file": name, "laid": laid, "kind": kind, "came": came}


def folders(place: Path) -> list[tuple[Folder, dict[str, str]]]:
    """Make the intact folders, each with the results of its readers."""
    made = []
    for kind, make in (("fit", fit_folder), ("learn", learn_folder)):
        folder = make(place / kind)
        wholes = {}
        for reader, (read, _) in folder.readers.items():
            shutil.copytree(folder.place, place / "copy")
            wholes[reader] = read(place / "copy").replace(str(place / "copy"), str(place / "case" / "run"))
            shutil.rmtree(place / "copy")
        made.append((folder, wholes))
    return made


def measure(count: int, found: dict[str, Any], note: Callable[[], None]) -> None:
    """Do the remaining cases, up to `count`.

    Args:
        count: number of cases in all.
        found: earlier results; new ones are added.
        note: called now and then.
    """
    found.setdefault("cases", 0)
    found.setdefault("came", {})
    found.setdefault("faults", [])
    with tempfile.TemporaryDirectory() as made:
        place = Path(made).resolve()
        whole = folders(place)
        for number in range(found["cases"], count):
            copy = place / "case"
            copy.mkdir()
            told = case(*whole[0 if number % 4 else 1][:1], number, copy, whole[0 if number % 4 else 1][1])
            shutil.rmtree(copy)
            row = found["came"].setdefault(told["kind"], dict.fromkeys(OUTCOMES, 0))
            for reader, (what, said) in told["came"].items():
                row[what] += 1
                if what in FAULTS and len(found["faults"]) < _MOST_NAMED:
                    found["faults"].append(f"{number}: {told['kind']} in {told['file']}, {reader}: {what} {said[:200]}")
            found["cases"] = number + 1
            if number % 50 == 0:
                note()


def tell(found: dict[str, Any]) -> str:
    """Format the results of `measure`."""
    order = [*DAMAGE, *dict.fromkeys(LAID)]
    rows = [(kind, *(found["came"][kind][name] for name in OUTCOMES)) for kind in order if kind in found["came"]]
    total = [sum(row[i + 1] for row in rows) for i in range(len(OUTCOMES))]
    told = table(("what was done to a file", *OUTCOMES), [*rows, ("all", *total)])
    faults = dict(zip(OUTCOMES, total, strict=True))
    bad = {name: faults[name] for name in FAULTS}
    met = found["cases"] >= NUMBER and not any(bad.values())
    why = f"{found['cases']:,} cases, {', '.join(f'{number} {name}' for name, number in bad.items())}"
    return f"{found['cases']:,} cases, {sum(total):,} readings.\n\n{told}\n\n" + target(
        f"{NUMBER:,} mutations of run folders, none silent, none raw", met=met, why_not=why
    )

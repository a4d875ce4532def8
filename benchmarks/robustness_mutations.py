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
import json
import os
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

NUMBER = 2000
OUTCOMES = ("named", "unharmed", "as written", "silent", "raw", "hung", "led out")
FAULTS = ("silent", "raw", "hung", "led out")
_LONGEST = 30
_MOST_NAMED = 40
_REPORTED = 50
"""Every so many cases are read by `report` too."""

# ---- the folders ------------------------------------------------------------------------------


class Folder(NamedTuple):
    """A run folder that is whole, and how it is read.

    Attributes:
        place: where it is.
        readers: by name, what reads a copy of it, and which files that reads.
    """

    place: Path
    readers: dict[str, tuple[Callable[[Path], str], frozenset[str]]]


def _quietly(run: Callable[[], Any]) -> str:
    """Run, and give what was printed."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        run()
    return out.getvalue()


def _show(folder: Path) -> str:
    from bayesrl.cli.holdings import is_learning, show_fit, show_learning

    return _quietly(lambda: show_learning(folder) if is_learning(folder) else show_fit(folder))


def _described(posterior: Any) -> str:
    """Tell what was loaded, by a digest of its arrays."""
    import jax

    from bayesrl.files.stamps import digest_of

    told = (posterior.draws, posterior.history, posterior.params)
    arrays = b"".join(np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(told))
    return f"{digest_of(arrays)} {'stopped' if posterior.interrupted else ''}"


def fit_folder(place: Path) -> Folder:
    """Make the folder of a fit, as the command line does."""
    import bayesrl
    from bayesrl import run_folder
    from bayesrl.cli.fitting import Wishes, start
    from bayesrl.cli.reporting import report_runs

    _quietly(lambda: start("bernoulli_bandit", {"arms": 3}, place, Wishes([0.2], 20, 1, 0), lambda _: None, quiet=True))
    problem = bayesrl.ready_model("bernoulli_bandit", arms=3)
    names = {path.name for path in place.iterdir()} - {run_folder.BEFORE}
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
    agent = control.Bayesian(control.TabularModel.of(swim, noise=0.1))

    def learn(folder: Path) -> str:
        told = control.learn(
            jax.random.key(0), swim, agent, exploration=control.thompson(), num_episodes=6, directory=folder,
            progress=False,
        )  # fmt: skip
        return str(told.history["return"].tolist())

    learn(place)
    files = frozenset({run_folder.PROBLEM, run_folder.CHECKPOINT})
    return Folder(place, {"show": (_show, files), "learn": (learn, files)})


# ---- damage -----------------------------------------------------------------------------------


def _damaged(rng: random.Random, content: bytes, kind: str, others: list[bytes]) -> bytes | None:  # noqa: PLR0912
    """Damage the content of a file; None takes it away."""
    data, size = bytearray(content), len(content)
    at, length = rng.randrange(size), rng.choice((1, 4, 16, 64, 512))
    # Half of the damage falls near the beginning, where headers are.
    at = at if rng.random() < 0.5 else min(at, rng.randrange(min(size, 400)))
    other = rng.randrange(size)
    match kind:
        case "a bit flipped":
            data[at] ^= 1 << rng.randrange(8)
        case "a byte changed":
            data[at] = (data[at] + rng.randrange(1, 256)) % 256
        case "a block of zeros":
            data[at : at + length] = bytes(len(data[at : at + length]))
        case "a block of noise":
            data[at : at + length] = rng.randbytes(len(data[at : at + length]))
        case "a block lost":
            del data[at : at + length]
        case "a block twice":
            data[at:at] = data[at : at + length]
        case "two blocks exchanged":
            one, two = min(at, other), max(at, other)
            length = min(length, two - one)
            data[one : one + length], data[two : two + length] = data[two : two + length], data[one : one + length]
        case "cut short":
            del data[at:]
        case "longer":
            data += rng.randbytes(length)
        case "empty":
            data.clear()
        case "another file":
            return rng.choice(others)
        case "gone":
            return None
        case _:
            raise ValueError(kind)
    return bytes(data)


DAMAGE = (
    "a bit flipped", "a byte changed", "a block of zeros", "a block of noise", "a block lost", "a block twice",
    "two blocks exchanged", "cut short", "longer", "empty", "another file", "gone",
)  # fmt: skip

# ---- files laid by somebody else ----------------------------------------------------------------

_STEERS = "\x1b[2J\x1b]0;x\x07\u202e\x9b31m"
_VALUES: tuple[Any, ...] = (
    None, True, False, 0, -1, 3, 2**31, 2**63, 10**40, 0.5, -0.0, 1e308, float("nan"), float("inf"), "", "x", _STEERS,
    "../../x", "x" * 5000, "\ud800", [], [None], [[0, 0]], [[[]]], ["x"] * 3, {}, {"type": "AutoTilt"},
    {"type": "ReverseKL", "num_particles": "many"}, {"type": _STEERS}, {"x": {"y": {}}}, {"": ""},
)  # fmt: skip


def _other_value(rng: random.Random, told: Any) -> Any:
    """Give the same with one value exchanged, taken away or added, somewhere inside."""
    if isinstance(told, dict) and told and rng.random() < 0.9:
        name = rng.choice(list(told))
        if name == "digest":
            return told
        if rng.random() < 0.1:
            return {key: value for key, value in told.items() if key != name}
        if rng.random() < 0.05:
            return {**told, rng.choice(("x", _STEERS, "kind", "learn", "note")): rng.choice(_VALUES)}
        return {**told, name: _other_value(rng, told[name])}
    if isinstance(told, list) and told and rng.random() < 0.7:
        at = rng.randrange(len(told))
        return [*told[:at], _other_value(rng, told[at]), *told[at + 1 :]]
    return rng.choice(_VALUES)


def _laid_json(rng: random.Random, path: Path, problem: str) -> None:
    from bayesrl.files.stamps import FORMAT, problem_digest, stamped_json

    told = json.loads(path.read_bytes())
    told = _other_value(rng, told)
    told = told if isinstance(told, dict) else {"value": told}
    if path.name == "problem.json" and isinstance(told.get("identity"), dict):
        problem = problem_digest(told["identity"])
    content = stamped_json(told, path.name, problem)
    if rng.random() < 0.1:
        content = content.replace(f"bayesrl format {FORMAT}".encode(), f"bayesrl format {FORMAT + 5}".encode())
    path.write_bytes(content)


def _laid_arrays(rng: random.Random, path: Path, problem: str) -> None:
    from safetensors.numpy import load, save

    from bayesrl.files.stamps import STAMP, blank, stamped

    arrays = load(path.read_bytes())
    name = rng.choice(list(arrays))
    array = arrays.pop(name)
    match rng.randrange(6):
        case 0:
            arrays[name + _STEERS] = array
        case 1:
            arrays[name] = np.zeros((*array.shape, 2), array.dtype)
        case 2:
            arrays[name] = array.astype(np.float16 if array.dtype.kind == "f" else np.int64)
        case 3:
            arrays[name] = np.zeros((0, *array.shape[1:]), array.dtype)
        case 4:
            arrays |= {name: array, "state.more": np.ones(3), "history/more": np.ones(2), "agent/more": np.ones(1)}
    path.write_bytes(stamped(save(arrays, metadata={STAMP: blank("checkpoint.safetensors", problem)})))


def _laid_draws(rng: random.Random, path: Path, problem: str) -> None:
    import h5netcdf

    from bayesrl.files.stamps import blank, stamped

    held = io.BytesIO()
    with h5netcdf.File(held, "w") as file:
        for group in rng.sample(("posterior", "prior", "sample_stats", "training"), rng.randrange(5)):
            made = file.create_group(group)
            made.dimensions = {rng.choice(("chain", "draw", "step", "beta", "x")): 2}
            made.create_variable(rng.choice(("arm", "loss", "x")), tuple(made.dimensions), data=np.zeros(2))
    path.write_bytes(stamped(held.getvalue() + f"\n{blank(path.name, problem)}\n".encode()))


def _laid(rng: random.Random, path: Path, kind: str, outside: Path, problem: str) -> None:
    """Lay something in the place of a file; what it leads to lies outside of the folder."""
    if kind == "other values":
        if path.suffix == ".json":
            _laid_json(rng, path, problem)
        elif path.suffix == ".safetensors":
            _laid_arrays(rng, path, problem)
        elif path.suffix == ".nc":
            _laid_draws(rng, path, problem)
        return
    content = path.read_bytes()
    path.unlink()
    match kind:
        case "a link":
            outside.write_bytes(content)
            path.symlink_to(outside)
        case "a link to nothing":
            path.symlink_to(outside)
        case "a pipe":
            os.mkfifo(path)
        case "a device":
            path.symlink_to("/dev/zero")
        case "a folder":
            path.mkdir()
        case "a file of a terabyte":
            with path.open("wb") as file:
                file.truncate(2**40)
        case "a nest of brackets":
            path.write_bytes(b'{"a":' * 100_000 if rng.random() < 0.5 else b"[" * 1_000_000)
        case _:
            raise ValueError(kind)


LAID = (
    *("other values",) * 12, "a link", "a link to nothing", "a pipe", "a device", "a folder", "a file of a terabyte",
    "a nest of brackets",
)  # fmt: skip

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
    """Read a folder of which one file was changed, and tell what came of it, with what was said.

    Args:
        read: as one of `Folder.readers`.
        folder: the copy.
        name: of the file that was changed.
        reads: whether the file is read by it.
        whole: what it gives for the whole folder.
        laid: whether the file was laid, and not damaged.
        gone: whether it was taken away.
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
        folder: that is whole.
        number: of the case, which fixes all that is random in it.
        place: an empty folder for the copy and what lies outside of it.
        wholes: what the readers give for the whole folder.

    Returns:
        What was changed and how, and for each reader what came of it.
    """
    from bayesrl import run_folder
    from bayesrl.files.stamps import problem_digest

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
        _laid(rng, path, kind, outside, problem)
    else:
        # The checkpoint before the last one, in the place of that, is older, and no damage.
        same = (name, run_folder.BEFORE) if name == run_folder.CHECKPOINT else (name,)
        others = [(copy / other).read_bytes() for other in names if other not in same]
        before = path.read_bytes()
        after = _damaged(rng, before, kind, others)
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
    """Make the whole folders, each with what its readers give."""
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
    """Do the cases that are left of so many.

    Args:
        count: of the cases.
        found: what was found before; it is added to.
        note: is called now and then.
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
    """Lay out what `measure` found."""
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

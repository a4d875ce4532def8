"""Robustness: calls of every public name, one argument of each of another kind than it should be.

Options: `--only REGEX` calls some names; `--processes N`; `--list` writes each call that was let through, or that ended
otherwise than by an error of ours. RESULTS.md is written where all names are called.

Around a small valid call of each public name (those of `__all__`, and methods of what users hold) each argument is
replaced in turn by each of the values below. A call may end in an error of ours (a `BayesRLError`), or be right to
pass: what is right for which argument stands in `robustness_verdicts`, written apart from the library's own checks. All
else is a fault: a raw error of Python, NumPy or JAX, a value that is let through in silence, NaN in what a call gives
whose valid twin gives none, more than a minute, or the end of the process.
"""

import argparse
import inspect
import json
import math
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from benchmarks.results import table, target

LIMIT = 60
"""Seconds for one call; a valid call may take ten times as long, since it compiles."""
_GRACE = 600
"""Seconds after which a process is ended that does not even answer a signal."""
_MEMORY = 12 * 2**30
"""Bytes that a process may map, so that a call that needs more fails without harm to the machine."""

OUTCOMES = ("ours", "passed", "raw", "silent", "nan", "hung", "died")


def values(things: Any) -> dict[str, Any]:
    """Make the values, by name."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    import numpyro.distributions as dist

    return {
        "None": None, "True": True, "False": False, "0": 0, "1": 1, "-1": -1, "2**40": 2**40, "10**400": 10**400,
        "0.5": 0.5, "2.5": 2.5, "-0.5": -0.5, "nan": math.nan, "inf": math.inf, "-inf": -math.inf, "1e-320": 1e-320,
        "1e308": 1e308, "1j": 1j, "'3'": "3", "''": "", "'abc'": "abc", "half a surrogate pair": "\ud800",
        "'a\\0b'": "a\0b", "b'abc'": b"abc", "[]": [], "[1]": [1], "['a']": ["a"], "[None]": [None], "()": (), "{}": {},
        "{'a': 1}": {"a": 1}, "{1: 'a'}": {1: "a"}, "object()": object(), "function": lambda *args: None, "class": dict,
        "array of 3, no axes": np.array(3), "array [3]": np.array([3]), "array [0.5]": jnp.array([0.5]),
        "array []": np.array([]), "array of 2 × 2 × 2": np.full((2, 2, 2), 0.5),
        "array [nan, 1]": jnp.array([jnp.nan, 1.0]),
        "array of objects": np.array([None, "a"], object), "array of texts": np.array(["0.5", "a"]),
        "array of complex": np.array([1j, 2.0]), "key": jax.random.key(1), "keys": jax.random.split(jax.random.key(1)),
        "old key": jax.random.PRNGKey(1), "words of a key": np.zeros(2, np.uint32), "distribution": dist.Normal(),
    }  # fmt: skip


# ---- one process -----------------------------------------------------------------------------


class _TooLong(BaseException):
    """Raised by the alarm; handlers of `Exception` do not catch it."""


def _work(names: Sequence[str], skip: set[str], log: Path) -> None:
    """Make all calls of some names, and log each before and after it."""
    import resource

    os.nice(10)
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
    from bayesrl.errors import BayesRLError
    from benchmarks.robustness_calls import parameters, targets
    from benchmarks.robustness_things import Things

    warnings.simplefilter("ignore")
    things = Things()
    kinds = values(things)

    def too_long(number: int, frame: FrameType | None) -> None:
        raise _TooLong

    signal.signal(signal.SIGALRM, too_long)

    def outcome(call: Callable[[], Any], usual: bool | None) -> tuple[str, str, bool]:
        signal.setitimer(signal.ITIMER_REAL, LIMIT if usual is not None else 10 * LIMIT)
        try:
            result = call()
            unusual = _has_nan(result)
        except BayesRLError as error:
            return "ours", str(error), False
        except _TooLong:
            return "hung", "", False
        except Exception as error:  # noqa: BLE001
            return "raw", f"{type(error).__name__}: {error}", False
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
        return ("nan" if usual is False and unusual else "passed"), "", unusual

    with log.open("a", encoding="utf-8", buffering=1) as lines:
        for name, called, valid in targets(things, names):
            usual: bool | None = None
            for param, value in [("", None), *((p, v) for p in parameters(called) for v in kinds)]:
                place = f"{name}|{param}|{value}"
                if param and place in skip:
                    continue
                given = valid | ({param: kinds[value]} if param and value is not None else {})
                lines.write(json.dumps({"start": place}) + "\n")
                start = time.perf_counter()
                how, told, nan = outcome(lambda c=called, g=given: _called(c, g), usual)  # type: ignore[misc]
                if not param:
                    usual = nan
                took = time.perf_counter() - start
                lines.write(json.dumps({"place": place, "how": how, "told": told[:300], "took": round(took, 2)}) + "\n")


def _called(called: Callable[..., Any], given: dict[str, Any]) -> Any:
    """Call with keyword arguments, except for those before and in `*args`."""
    found = inspect.signature(called).parameters.values()
    if not any(p.kind is p.VAR_POSITIONAL for p in found) or "args" not in given:
        return called(**given)
    rest = dict(given)
    first = [rest.pop(p.name) for p in found if p.kind is p.POSITIONAL_OR_KEYWORD and p.name in rest]
    return called(*first, *rest.pop("args"), **rest)


def _has_nan(result: Any) -> bool:
    """Check whether a result holds a NaN."""
    import jax
    import numpy as np

    for leaf in jax.tree.leaves(getattr(result, "__dict__", result)):
        numbers = isinstance(leaf, float | np.ndarray | np.floating | jax.Array)
        if numbers and jax.dtypes.issubdtype(getattr(leaf, "dtype", float), jax.dtypes.extended):
            continue
        array = np.asarray(leaf) if numbers else None
        if array is not None and array.dtype.kind == "f" and bool(np.isnan(array).any()):
            return True
    return False


# ---- all of them -----------------------------------------------------------------------------


def run(options: Sequence[str] = ()) -> str:
    """Call everything, and return numbers and findings as Markdown."""
    asked = _options(options)
    from benchmarks.robustness_calls import names

    chosen = [name for name in names() if re.search(asked.only, name)]
    with tempfile.TemporaryDirectory() as folder:
        found = list(_collect(chosen, asked.processes, Path(folder)))
    return told(found, complete=asked.only == "", every=asked.list)


def is_partial(options: Sequence[str]) -> bool:
    """Check whether RESULTS.md stays as it is."""
    return _options(options).only != ""


def _options(options: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks robustness_fuzz", description=__doc__)
    parser.add_argument("--only", default="", metavar="REGEX")
    parser.add_argument("--processes", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--list", action="store_true")
    return parser.parse_args(options)


def _collect(names: Sequence[str], processes: int, folder: Path) -> Iterator[dict[str, Any]]:
    """Share the names between processes; restart one that hangs or dies after the call that caused it."""
    logs = {folder / f"{i}.jsonl": list(names[i::processes]) for i in range(min(processes, len(names)))}
    running = {log: _started(own, log, folder) for log, own in logs.items()}
    while running:
        time.sleep(0.5)
        for log, process in list(running.items()):
            ended = process.poll()
            stuck = log.exists() and time.time() - log.stat().st_mtime > LIMIT + _GRACE
            if ended is None and not stuck:
                continue
            process.kill()
            process.wait()
            if ended == 0:
                del running[log]
                continue
            lines = _lines(log)
            open_call = lines[-1].get("start") if lines else None
            if open_call is None or open_call.endswith("||None"):
                error = (folder / f"{log.stem}.err").read_text(encoding="utf-8")
                raise RuntimeError(f"the fuzz itself failed at {open_call}: {error[-2000:]}")
            with log.open("a", encoding="utf-8") as more:
                how = "hung" if stuck else "died"
                more.write(json.dumps({"place": open_call, "how": how, "told": f"status {ended}", "took": 0}) + "\n")
            running[log] = _started(logs[log], log, folder)
    for log in logs:
        yield from (line for line in _lines(log) if "place" in line and not line["place"].endswith("||None"))


def _started(names: Sequence[str], log: Path, folder: Path) -> subprocess.Popen[bytes]:
    """Start a process in its own folder, without network, at low priority."""
    own = folder / f"work{log.stem}"
    own.mkdir(exist_ok=True)
    done = [line["place"] for line in _lines(log) if "place" in line] if log.exists() else []
    (folder / f"{log.stem}.json").write_text(json.dumps({"names": list(names), "skip": done}), encoding="utf-8")
    environment = os.environ | {
        "PYTHONPATH": str(Path(__file__).parents[1]), "BAYESRL_CACHE": str(folder / "cache"), "HF_HUB_OFFLINE": "1",
        "MPLBACKEND": "agg", "SDL_VIDEODRIVER": "dummy", "XLA_FLAGS": "--xla_backend_optimization_level=0",
    }  # fmt: skip
    command = [sys.executable, "-m", "benchmarks.robustness_fuzz", str(folder / f"{log.stem}.json"), str(log)]
    error = (folder / f"{log.stem}.err").open("wb")
    return subprocess.Popen(  # noqa: S603
        command,
        cwd=own,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=error,
    )


def _lines(log: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()] if log.exists() else []


# ---- what was found --------------------------------------------------------------------------


def told(found: Sequence[dict[str, Any]], *, complete: bool, every: bool = False) -> str:
    """Report the outcomes of the calls."""
    from benchmarks.robustness_calls import defaults
    from benchmarks.robustness_verdicts import REASONS, reason

    default = defaults()

    counts: Counter[str] = Counter()
    rooms: dict[str, Counter[str]] = {}
    why: Counter[str] = Counter()
    faults: list[str] = []
    for one in found:
        name, param, value = one["place"].split("|")
        how = one["how"]
        if how == "passed":
            key = reason(name, param, value, default.get(f"{name}.{param}"))
            if key is None:
                how = "silent"
            else:
                why[key] += 1
        counts[how] += 1
        rooms.setdefault(name.partition(".")[0] if name[0].islower() else "methods", Counter())[how] += 1
        if how not in ("ours", "passed"):
            faults.append(f"{how}: {name} {param}={value} {one['told']}")
    total = max(len(found), 1)
    header = ["", "calls", *OUTCOMES]
    rows = [[room, rooms[room].total(), *(rooms[room][how] for how in OUTCOMES)] for room in sorted(rooms)]
    rows.append(["all", len(found), *(counts[how] for how in OUTCOMES)])
    parts = [table(header, rows)]
    if complete:
        met = len(found) >= 15_000 and counts["raw"] <= 0.01 * total
        met = met and not any(counts[how] for how in ("hung", "died", "silent", "nan"))
        parts.append(target("at least 15,000 calls; raw ≤ 1%, none hung, died or let through in silence", met=met))
    parts.append(
        "What passes on purpose:\n\n" + table(["why", "calls"], [[REASONS[k], n] for k, n in why.most_common()])
    )
    if faults and (every or complete):
        shown = faults if every else faults[:20]
        parts.append(f"{len(faults):,} faults:\n\n" + "\n".join(f"    {_plain(line)[:220]}" for line in shown))
    return "\n\n".join(parts)


def _plain(line: str) -> str:
    """Escape lone surrogates, which no file can hold, and characters that control a terminal."""
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in " ".join(line.split()))


if __name__ == "__main__":
    plan = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    _work(plan["names"], set(plan["skip"]), Path(sys.argv[2]))

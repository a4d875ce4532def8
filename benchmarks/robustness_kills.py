"""Processes that are killed (SIGKILL) at random moments: nothing is lost, and what follows is bit for bit the same.

Four kinds of runs, each in a process of its own that writes a checkpoint after every chunk of steps or episode, so that
many kills fall into a write. A killed run is started again, killed again, and so on until it ends by itself; then its
checkpoint and its saved draws are compared with those of a run that was never disturbed. After each kill the folder is
read: it must be whole, with no fewer steps than before.
"""

import contextlib
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.results import table, target

NUMBER = 1000
KINDS = {"fit": 0.35, "learn": 0.3, "fit with rewards from Python": 0.3, "fit of texts": 0.05}
"""Kinds of runs, and their shares of the kills: a fit of texts takes five times as long to start."""

_AFTER_THE_FIRST_CHUNK = 0.8
_LONGEST = 120.0
"""Seconds after which a run counts as hung."""


def _bandit() -> None:
    import jax.numpy as jnp
    import numpyro
    import numpyro.distributions as dist

    import bayesrl

    arm = numpyro.sample("arm", dist.Categorical(logits=jnp.zeros(6)))
    bayesrl.reward("payoff", jnp.linspace(0.0, 1.0, 6)[arm])


def _counted() -> None:
    """Collect a reward that Python computes."""
    import jax
    import jax.numpy as jnp
    import numpyro
    import numpyro.distributions as dist

    import bayesrl

    arm = numpyro.sample("arm", dist.Categorical(logits=jnp.zeros(6)))
    shape = jax.ShapeDtypeStruct((), jnp.float32)
    value = jax.pure_callback(lambda a: np.asarray(a, np.float32) / 5, shape, arm, vmap_method="broadcast_all")
    bayesrl.reward("payoff", value)


def _share_of_a(text: str) -> float:
    return text.count("a") / 4


def _run(kind: str, folder: Path, began: Callable[..., None]) -> None:
    """Do a run of a kind in a folder, or the rest of it."""
    import jax

    import bayesrl
    from bayesrl import control, lm
    from bayesrl.control.learning import loop
    from bayesrl.svi import training_loop as running

    running.SECONDS_BETWEEN_CHECKPOINTS = loop.SECONDS_BETWEEN_CHECKPOINTS = 0.0
    key, told = jax.random.key(3), {"directory": folder, "callback": began, "progress": False}
    sampled = bayesrl.objectives.ReverseKL(num_particles=8, enumerated=())
    if kind == "fit":
        bayesrl.fit(key, _bandit, beta=0.2, objective=sampled, num_steps=500, num_restarts=2, **told)
    elif kind == "learn":
        swim = control.river_swim()
        agent = control.BayesianAgent(control.TabularModel.of(swim, noise=0.1))
        control.learn(key, swim, agent, exploration=control.thompson(), num_episodes=60, **told)
    elif kind == "fit with rewards from Python":
        bayesrl.fit(key, _counted, beta=0.2, objective=sampled, num_steps=300, **told)
    else:
        tokenizer = lm.char_tokenizer("abcdefgh ")
        config = lm.GPT2Config(vocab_size=tokenizer.vocab_size, max_length=24, width=8, depth=1, heads=2)
        model = lm.Pretrained(lm.GPT2.init(jax.random.key(0), config), tokenizer)
        policy = lm.policy(model, ["abc", "d"], reward=_share_of_a, max_new_tokens=4, batch_size=2)
        bayesrl.fit(key, policy, beta=0.1, guide=lm.FullParameters(), num_steps=100, **told)


def _child(kind: str, folder: Path, cache: Path, pipe: int) -> None:
    """Run in a separate process, and signal when the first chunk is done."""
    import bayesrl

    os.setpgid(0, 0)
    told = False

    def began(_: Any) -> None:
        nonlocal told
        if not told:
            told = True
            os.write(pipe, b"+")

    bayesrl.use_cache(cache)
    _run(kind, folder, began)


def _started(kind: str, folder: Path, cache: Path) -> tuple[int, int]:
    """Start a run; return its process and the pipe that signals the end of its first chunk."""
    out, into = os.pipe()
    pid = os.fork()
    if pid:
        os.close(into)
        return pid, out
    try:
        quiet = os.open(folder.with_suffix(".errors"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(quiet, 1)
        os.dup2(quiet, 2)
        _child(kind, folder, cache, into)
    except BaseException:  # noqa: BLE001
        import traceback

        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
    os._exit(0)


def _ended(pid: int, seconds: float) -> int | None:
    """Wait for a process, and return its exit status, or None if it still runs."""
    until = time.monotonic() + seconds
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() >= until:
            return None
        time.sleep(0.002)


def _wait_for_steps(pipe: int, pid: int) -> bool:
    """Wait for the end of the first chunk; return whether it came."""
    import select

    until = time.monotonic() + _LONGEST
    while time.monotonic() < until:
        if select.select([pipe], [], [], 0.05)[0]:
            return os.read(pipe, 1) == b"+"
    os.kill(pid, signal.SIGKILL)
    return False


def _held(folder: Path) -> tuple[int, dict[str, Any]]:
    """Read a folder: its number of steps, and all arrays of its checkpoint."""
    from bayesrl import run_folder

    if not run_folder.is_begun(folder):
        return 0, {}
    run_folder.read_problem(folder)
    run_folder.read_draws(folder)
    arrays = run_folder.read_checkpoint(folder) or {}
    return int(arrays["state.step"]) if "state.step" in arrays else len(arrays.get("history/episode", ())), arrays


def _same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return one.keys() == other.keys() and all(np.array_equal(one[k], other[k], equal_nan=True) for k in one)


def _draws(folder: Path) -> dict[str, Any]:
    """Read the draws that a fit saved, by group and name."""
    from io import BytesIO

    import h5netcdf

    from bayesrl import run_folder

    content = run_folder.read_draws(folder)
    if content is None:
        return {}
    with h5netcdf.File(BytesIO(content)) as file:
        return {f"{g}/{n}": np.asarray(v) for g in file.groups for n, v in file.groups[g].variables.items()}


def _undisturbed(kind: str, place: Path) -> tuple[float, tuple[dict[str, Any], dict[str, Any]]]:
    """Do an undisturbed run; return the seconds of its steps, and the contents of its folder."""
    folder = place / f"whole {kind}"
    seconds = 0.0
    for _ in range(2):  # the second run finds everything compiled
        shutil.rmtree(folder, ignore_errors=True)
        pid, pipe = _started(kind, folder, place / "cache")
        _wait_for_steps(pipe, pid)
        began = time.monotonic()
        if _ended(pid, _LONGEST) != 0:
            raise RuntimeError(folder.with_suffix(".errors").read_text(encoding="utf-8"))
        seconds = time.monotonic() - began
        os.close(pipe)
    return seconds, (_held(folder)[1], _draws(folder))


def _killed(kind: str, folder: Path, cache: Path, seconds: float, rng: random.Random) -> tuple[int, str]:
    """Start a run, kill it, and restart it until it ends by itself; return the number of kills, and any loss."""
    from bayesrl.errors import BayesRLError

    kills = before = 0
    while True:
        pid, pipe = _started(kind, folder, cache)
        # Most die after the first chunk, the others at any moment, even while they start or compile.
        if rng.random() < _AFTER_THE_FIRST_CHUNK:
            _wait_for_steps(pipe, pid)
        status = _ended(pid, rng.uniform(0.0, 1.2 * seconds))
        if status is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            status = _ended(pid, _LONGEST)
        os.close(pipe)
        kills += status == -signal.SIGKILL
        try:
            done = _held(folder)[0]
        except BayesRLError as error:
            return kills, str(error)
        if done < before:
            return kills, f"{done} steps, and {before} before"
        before = done
        if status == 0:
            return kills, ""
        if status != -signal.SIGKILL:
            return kills, folder.with_suffix(".errors").read_text(encoding="utf-8")[-500:]


def measure(count: int, found: dict[str, Any], note: Callable[[], None]) -> None:
    """Kill runs until there are `count` kills in all, earlier ones included.

    Args:
        count: number of kills.
        found: earlier results, by kind of run; new ones are added.
        note: called after each run.
    """
    # Import everything once: forked processes inherit it, and JAX starts its threads only at its first computation.
    import h5netcdf  # noqa: F401

    for kind in KINDS:
        found.setdefault(kind, {"runs": 0, "kills": 0, "lost": 0, "different": 0, "faults": []})
    with tempfile.TemporaryDirectory() as made:
        place = Path(made)
        whole = {kind: _undisturbed(kind, place) for kind in KINDS}
        while sum(own["kills"] for own in found.values()) < count:
            kind = min(KINDS, key=lambda name: found[name]["kills"] / KINDS[name])
            own, (seconds, expected) = found[kind], whole[kind]
            folder = place / f"run {own['runs']} {kind}"
            rng = random.Random(f"{kind} {own['runs']}")  # noqa: S311
            kills, fault = _killed(kind, folder, place / "cache", seconds, rng)
            own["runs"] += 1
            own["kills"] += kills
            own["lost"] += bool(fault)
            if fault:
                own["faults"].append(fault.replace(made, ""))
            elif not (_same(_held(folder)[1], expected[0]) and _same(_draws(folder), expected[1])):
                own["different"] += 1
            shutil.rmtree(folder, ignore_errors=True)
            note()


def tell(found: dict[str, Any]) -> str:
    """Format the results of `measure`."""
    names = ("runs", "kills", "lost", "different")
    rows = [(kind, *(own[name] for name in names)) for kind, own in found.items()]
    total = [sum(own[name] for own in found.values()) for name in names]
    told = table(("what was killed", "runs", "SIGKILLs", "lost", "different"), [*rows, ("all", *total)])
    met = total[1] >= NUMBER and total[2] == total[3] == 0
    why = f"{total[1]:,} kills so far, {total[2]} runs lost, {total[3]} different"
    return f"{told}\n\n{target(f'{NUMBER:,} SIGKILLs, nothing lost, nothing different', met=met, why_not=why)}"

"""A script that runs calls of one checkout of bayesrl, and counts what JAX traces, lowers and compiles meanwhile.

`python -P compilation_meter.py ROOT ANSWER WHAT [ARGUMENT ...]` with ROOT on PYTHONPATH: WHAT is `readme`, `act` or
`command`, and ANSWER the file for the counts. The script imports nothing from this folder, since the checkout may be
older.
"""

import functools
import json
import statistics
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from importlib.machinery import ExtensionFileLoader, SourceFileLoader
from pathlib import Path
from types import FrameType
from typing import Any

IMPORTING, RUNNING = "importing", "running"
EVENTS = {
    "/jax/core/compile/jaxpr_trace_duration": "tracing",
    "/jax/core/compile/jaxpr_to_mlir_module_duration": "lowering",
    "/jax/core/compile/backend_compile_duration": "compiling",
}
PHASES = (IMPORTING, *EVENTS.values(), RUNNING)
RETRIEVED = "/jax/compilation_cache/cache_hits"

MEANS, OTHER_MEANS = (0.1, 0.3, 0.5, 0.7, 0.9), (0.2, 0.9, 0.4, 0.1, 0.6)
SHOWN_FRAMES = 3
ACT_CALLS = 100


class PhaseClock:
    """Divides seconds among phases that nest and run side by side, so that each second counts once.

    A second belongs to the innermost phase of the thread. If several threads are in phases, they share it; if none is,
    it counts as running.

    Args:
        clock: returns the seconds of all threads.
    """

    def __init__(self, clock: Callable[[], float] = time.process_time) -> None:
        self._clock, self._last = clock, clock()
        self._inside: defaultdict[int, list[str]] = defaultdict(list)
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._lock = threading.Lock()

    def enter(self, phase: str, thread: int = 0) -> None:
        """Begin a phase of a thread."""
        with self._lock:
            self._divide()
            self._inside[thread].append(phase)

    def leave(self, thread: int = 0) -> None:
        """End the innermost phase of a thread."""
        with self._lock:
            self._divide()
            self._inside[thread].pop()

    def read(self) -> dict[str, float]:
        """Return the seconds of each phase up to now."""
        with self._lock:
            self._divide()
            return {phase: self._seconds[phase] for phase in PHASES}

    def _divide(self) -> None:
        now = self._clock()
        innermost = [phases[-1] for phases in self._inside.values() if phases] or [RUNNING]
        for phase in innermost:
            self._seconds[phase] += (now - self._last) / len(innermost)
        self._last = now


@dataclass
class XLAProgram:
    """A program that JAX asked XLA for.

    Attributes:
        name: JAX's name for it.
        origin: the checkout's innermost frames that asked for it, as `file:line`, one for each run of the same file.
        retrieved: whether it came from a cache on disk.
    """

    name: str
    origin: str
    retrieved: bool = False


@dataclass
class Call:
    """The cost of one call.

    Attributes:
        programs: the programs that it asked XLA for.
        seconds: CPU seconds by phase.
        wall: median wall-clock seconds, if there were many calls.
    """

    programs: list[XLAProgram] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    wall: float | None = None


class Meter:
    """Watches imports and listens to `jax.monitoring` from its creation on.

    Args:
        root: folder of the checkout; its frames are the origins of programs.
    """

    def __init__(self, root: Path) -> None:
        self.root, self.clock = root, PhaseClock()
        time_imports(self.clock)
        from jax import monitoring

        self.programs: list[XLAProgram] = []
        self._compiling: defaultdict[int, list[XLAProgram]] = defaultdict(list)
        monitoring.register_scalar_listener(self._began)
        monitoring.register_event_duration_secs_listener(self._ended)
        monitoring.register_event_listener(self._happened)

    def measure(self, function: Callable[[], Any]) -> tuple[Call, Any]:
        """Call a function, wait for its arrays, and return its cost."""
        import jax

        done, before = len(self.programs), self.clock.read()
        result = function()
        jax.block_until_ready(jax.live_arrays())
        after = self.clock.read()
        seconds = {phase: after[phase] - before[phase] for phase in PHASES}
        return Call(self.programs[done:], seconds), result

    def _began(self, event: str, value: float | int, **told: str | int) -> None:
        if event not in EVENTS:
            return
        thread = threading.get_ident()
        if EVENTS[event] == "compiling":
            program = XLAProgram(str(told.get("fun_name", "")), origin(sys._getframe(), self.root))
            self.programs.append(program)
            self._compiling[thread].append(program)
        self.clock.enter(EVENTS[event], thread)

    def _ended(self, event: str, duration_secs: float, **told: str | int) -> None:
        if event not in EVENTS:
            return
        thread = threading.get_ident()
        self.clock.leave(thread)
        if EVENTS[event] == "compiling":
            self._compiling[thread].pop()

    def _happened(self, event: str, **told: str | int) -> None:
        if event == RETRIEVED:
            self._compiling[threading.get_ident()][-1].retrieved = True


def time_imports(clock: PhaseClock) -> None:
    """Count the time in the bodies of modules from now on, however they are imported."""

    def timed(method: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(method)
        def load(*args: Any) -> Any:
            thread = threading.get_ident()
            clock.enter(IMPORTING, thread)
            try:
                return method(*args)
            finally:
                clock.leave(thread)

        return load

    SourceFileLoader.exec_module = timed(SourceFileLoader.exec_module)  # type: ignore[method-assign]
    ExtensionFileLoader.create_module = timed(ExtensionFileLoader.create_module)  # type: ignore[method-assign]
    ExtensionFileLoader.exec_module = timed(ExtensionFileLoader.exec_module)  # type: ignore[method-assign]


def origin(frame: FrameType | None, root: Path) -> str:
    """Name the innermost frames that lie in a checkout, one for each run of the same file."""
    found: list[str] = []
    files: list[str] = []
    while frame is not None and len(found) < SHOWN_FRAMES:
        path = Path(frame.f_code.co_filename)
        if path.is_relative_to(root) and files[-1:] != [path.name]:
            files.append(path.name)
            found.append(f"{path.relative_to(root)}:{frame.f_lineno}")
        frame = frame.f_back
    return " < ".join(found) or "the caller"


def _old_names() -> bool:
    """Whether the commit that is measured is older than the names of today."""
    import bayesrl

    return "load_problem" not in bayesrl.__all__


def readme(meter: Meter, num_calls: str) -> list[Call]:
    """Run the first calls of these: README's fit, with another key, redefined, and everything that judges the first."""
    import jax
    import jax.numpy as jnp
    import numpyro
    import numpyro.distributions as dist

    import bayesrl

    for name in bayesrl.__all__:  # names are imported at first use, which must not count as part of a call
        getattr(bayesrl, name)

    def defined(means: jax.Array) -> Callable[[], None]:
        def bandit() -> None:
            arm = numpyro.sample("arm", dist.Categorical(logits=jnp.zeros(5)))
            bayesrl.reward("payoff", means[arm])

        return bandit

    first, other = defined(jnp.array(MEANS)), defined(jnp.array(OTHER_MEANS))
    keys = [jax.random.key(seed) for seed in range(5)]
    made: list[Any] = []

    def judge() -> None:
        made[0].estimate(keys[2], 1000)
        bayesrl.evidence(keys[3], made[0])
        bayesrl.diagnose(keys[4], made[0])
        given = ("report.html", made[0])
        bayesrl.write_report(*(given if _old_names() else (jax.random.key(0), *given)))

    calls: list[Callable[[], Any]] = [
        lambda: made.append(bayesrl.fit(keys[0], first, beta=0.1)),
        lambda: bayesrl.fit(keys[1], first, beta=0.1),
        lambda: bayesrl.fit(keys[0], other, beta=0.1),
        judge,
    ]
    return [meter.measure(call)[0] for call in calls[: int(num_calls)]]


def act(meter: Meter) -> list[Call]:
    """Ask a policy fitted to CartPole for many actions, one at a time, after a first one."""
    import jax
    import numpy as np

    import bayesrl

    load: Any = getattr(bayesrl, "ready_model" if _old_names() else "load_problem")
    problem = load("cartpole", physics="program", steps=2)
    posterior = bayesrl.fit(
        jax.random.key(0), problem.policy, *problem.args, beta=problem.beta, progress=False, **problem.fit_options
    )
    keys = list(jax.random.split(jax.random.key(1), ACT_CALLS + 1))
    observations = np.random.default_rng(0).normal(0, 0.05, (ACT_CALLS + 1, 4)).astype(np.float32)
    times: list[float] = []

    def ask(i: int) -> None:
        start = time.perf_counter()
        int(posterior.act(keys[i], observations[i]))
        times.append(time.perf_counter() - start)

    def ask_many() -> None:
        for i in range(1, ACT_CALLS + 1):
            ask(i)

    ask(0)
    call, _ = meter.measure(ask_many)
    call.wall = statistics.median(times[1:])
    return [call]


def command(meter: Meter, *arguments: str) -> list[Call]:
    """Run the command line in this process; the seconds count from the first import on."""

    def run() -> None:
        from bayesrl.cli import app

        sys.argv = ["bayesrl", *arguments]
        try:
            app()
        except SystemExit as ended:
            if ended.code:
                raise

    call, _ = meter.measure(run)
    call.seconds = meter.clock.read()
    return [call]


WHAT: dict[str, Callable[..., list[Call]]] = {"readme": readme, "act": act, "command": command}


def main(root: str, answer: str, what: str, *arguments: str) -> None:
    """Measure, and write the costs as JSON."""
    meter = Meter(Path(root))
    import bayesrl

    found = Path(bayesrl.__file__)
    if not found.is_relative_to(root):
        raise SystemExit(f"bayesrl was imported from {found}, not from {root}; put {root} on PYTHONPATH")
    calls = WHAT[what](meter, *arguments)
    Path(answer).write_text(json.dumps([asdict(call) for call in calls]), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])

"""A sweep over 16 β × 4 restarts in one call against one fit, on a 5-arm bandit.

Calls alternate. "Steps alone" is the time between the first and the last chunk of the loop, without
compilation; "whole call" is everything from `fit` called to the posterior returned. Compilations of the
loop are those of the function that takes a chunk of steps.
"""

import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist

import bayesrl
from benchmarks.results import table, target
from benchmarks.timing import median_ratio

MEANS = jnp.array([0.1, 0.3, 0.5, 0.7, 0.9])
BETAS = jnp.geomspace(0.05, 5, 16)
RESTARTS = 4
REPEATS = 7
LIMIT = 8.0
STEPS = 2000


def bandit() -> None:
    """Choose among five arms."""
    arm = numpyro.sample("arm", dist.Categorical(logits=jnp.zeros(len(MEANS))))
    bayesrl.reward("payoff", MEANS[arm])


def run() -> str:
    """Fit one temperature, and all of them with restarts, in turn."""
    compiled: list[str] = []
    _watch_compilations(compiled.append)
    one, many, loops = [], [], []
    for repeat in range(REPEATS):
        key = jax.random.key(repeat)
        one.append(_times(key, beta=0.5, num_restarts=1))
        compiled.clear()
        many.append(_times(key, beta=BETAS, num_restarts=RESTARTS))
        loops.append(sum("fit_step" in name for name in compiled))
    steps, whole = (median_ratio([x[i] for x in many], [x[i] for x in one]) for i in (0, 1))
    rows: list[list[object]] = [
        ["steps alone", *(_milliseconds([x[0] for x in xs]) for xs in (one, many)), f"{steps:.2f}×"],
        ["whole call", *(_milliseconds([x[1] for x in xs]) for xs in (one, many)), f"{whole:.2f}×"],
        ["compilations of the loop", 1, max(loops), ""],
    ]
    header = ["", "one fit", f"{len(BETAS)} β × {RESTARTS} restarts", "ratio"]
    met = steps <= LIMIT and max(loops) == 1
    words = target(f"one compilation, and at most {LIMIT:.0f}× the time of one fit without compilation", met=met)
    return f"{table(header, rows)}\n\n{__doc__.partition('\n\n')[2].strip()}\n\n{words}"


def _times(key: jax.Array, **options: Any) -> tuple[float, float]:
    """Time the loop without its first chunk, and the whole call, in seconds."""
    ticks: list[float] = []
    start = time.perf_counter()
    posterior = bayesrl.fit(
        key, bandit, num_steps=STEPS, callback=lambda _: ticks.append(time.perf_counter()), progress=False, **options
    )
    jax.block_until_ready(posterior.params)
    return ticks[-1] - ticks[0], time.perf_counter() - start


def _milliseconds(times: list[float]) -> str:
    return f"{1000 * statistics.median(times):.0f} ms"


def _watch_compilations(note: Callable[[str], Any]) -> None:
    """Pass on the name of every function that XLA compiles from now on."""

    def listen(event: str, duration_secs: float, **kwargs: str | int) -> None:
        if event.endswith("backend_compile_duration"):
            note(str(kwargs.get("fun_name")))

    jax.monitoring.register_event_duration_secs_listener(listen)

"""Time of a step of `fit` against a hand-written JAX loop.

`bayesrl.fit` runs as users run it; its callback, called after every chunk of steps, runs the same
number of steps of each hand-written loop, so that all take turns. The time of a chunk of `fit` is all
that passes between two calls of the callback: the jitted steps, the row of the history, the checks.

By hand, draws are made as JAX makes them (`jax.random.categorical`, `jax.random.choice`). The last column
puts bayesrl's cheaper draws into the hand-written loops as well, so that it shows what the generality of
`fit` costs beside a loop written for one problem.
"""

import statistics
import time
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

import bayesrl
from bayesrl.objectives import ReverseKL
from bayesrl.svi.optimizers import default_optimizer
from benchmarks import handwritten, problems
from benchmarks.results import table, target
from benchmarks.timing import median_ratio, seconds

PARTICLES = 64
BATCH = 256
RATE = 0.005
LIMIT = 1.05


def run() -> str:
    """Measure the problems in the targets."""
    bandit, digits = problems.bandit(), problems.digits(batch=BATCH)
    cases: list[tuple[problems.Benchmark, Any, int, int]] = [(bandit, handwritten.bandit_loss, PARTICLES, 10_000)]
    for stochastic in (True, False):
        cases.append((problems.chain(stochastic=stochastic), handwritten.chain_loss, PARTICLES, 10_000))
    cases.append((digits, handwritten.digits_loss, BATCH, 5_000))
    rows, worst, quick = [], 0.0, []
    for problem, make_loss, size, num_steps in cases:
        losses = [make_loss(problem, size, draw) for draw in (handwritten.PLAIN, handwritten.QUICK)]
        times = chunk_times(problem, losses, num_steps)
        ratios = [median_ratio(times[0], own) for own in times[1:]]
        worst = max(worst, ratios[0])
        quick.append(ratios[1])
        each = [1e6 * statistics.median(own) / (num_steps // 100) for own in times]
        rows.append([problem.name, f"{num_steps:,}", *(f"{x:.0f}" for x in each), *(f"{x:.2f}×" for x in ratios)])
    header = [
        "problem",
        "steps",
        "fit, µs a step",
        "by hand, µs",
        "by hand, quick draws, µs",
        "ratio",
        "ratio to quick",
    ]
    words = target(f"at most {LIMIT}× the hand-written loop on each problem", met=worst <= LIMIT)
    words += (
        f" Beside loops with the same quick draws it is {min(quick):.2f}–{max(quick):.2f}×: guide and policy are two "
        "programs, so that on the chains what the guide drew in one scan is scored in a second."
    )
    return f"{table(header, rows)}\n\n{__doc__.partition('\n\n')[2].strip()}\n\n{words}"


def chunk_times(problem: problems.Benchmark, losses: list[handwritten.Loss], num_steps: int) -> list[list[float]]:
    """Time each chunk except the first, in seconds: of `fit`, and of the loops with these losses."""
    optimizer = default_optimizer(RATE, num_steps)
    chunks = [handwritten.make_chunk(loss, optimizer) for loss in losses]
    states = [handwritten.init(problem.params, optimizer) for _ in losses]
    steps, key = jnp.int32(num_steps // 100), jax.random.key(1)
    for chunk, state in zip(chunks, states, strict=True):
        jax.block_until_ready(chunk(key, state, steps))
    times: list[list[float]] = [[] for _ in range(len(losses) + 1)]
    resumed: list[float] = []

    def take_turns(_: Any) -> None:
        now = time.perf_counter()
        if resumed:
            times[0].append(now - resumed[-1])
        for i, chunk in enumerate(chunks):
            spent, states[i] = seconds(partial(chunk, key, states[i], steps))
            if resumed:
                times[i + 1].append(spent)
        resumed.append(time.perf_counter())

    bayesrl.fit(
        jax.random.key(0),
        problem.policy,
        *problem.args,
        beta=problem.beta,
        guide=problem.guide,
        objective=ReverseKL(num_particles=PARTICLES),
        optimizer=optimizer,
        num_steps=num_steps,
        callback=take_turns,
        progress=False,
    )
    return times

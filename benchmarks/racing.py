"""Fits that can stop at any step, by bayesrl and by stock NumPyro, for the race to a given gap."""

import copy
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from jax import Array, lax
from numpyro.infer import SVI, TraceGraph_ELBO
from numpyro.optim import optax_to_numpyro

import bayesrl
from bayesrl.objectives import Objective
from bayesrl.svi.problem_setup import set_up
from bayesrl.svi.step import StepConfig, run_chunk
from bayesrl.svi.training_loop import TrainingLoop
from benchmarks.problems import Benchmark
from benchmarks.timing import seconds


class Racer(NamedTuple):
    """One way to fit one problem, with one number of particles.

    Attributes:
        start: (seed) → the state before the first step.
        advance: (seed, learning rate, state, number of steps) → state; compiled once.
        params: (state) → the parameters that the fit would return if it ended here.
        clock: (seed, learning rate) → (number of steps) → seconds of a run of that length, compiled.
    """

    start: Callable[[int], Any]
    advance: Callable[[int, float, Any, int], Any]
    params: Callable[[Any], dict[str, Any]]
    clock: Callable[[int, float], Callable[[int], float]]


def stock(problem: Benchmark, num_particles: int) -> Racer:
    """Race NumPyro's SVI with `TraceGraph_ELBO`, with all its steps inside one jit."""
    model, elbo = bayesrl.tilt(problem.policy, problem.beta), TraceGraph_ELBO(num_particles=num_particles)

    ready = SVI(model, problem.guide, optax.adam(0.0), elbo)
    ready.init(jax.random.key(0), *problem.args)

    def svi(rate: Any) -> SVI:
        other = copy.copy(ready)  # `init` has set what `update` needs
        other.optim = optax_to_numpyro(optax.adam(rate))
        return other

    @jax.jit
    def chunk(rate: Array, state: Any, args: Any, num_steps: Array) -> Any:
        return lax.fori_loop(0, num_steps, lambda _, s: svi(rate).update(s, *args)[0], state)

    def start(seed: int) -> Any:
        return svi(0.0).init(jax.random.key(seed), *problem.args)

    def advance(seed: int, rate: float, state: Any, num_steps: int) -> Any:
        del seed  # the state has the key
        return chunk(np.float32(rate), state, problem.args, np.int32(num_steps))

    def clock(seed: int, rate: float) -> Callable[[int], float]:
        first = start(seed)
        return lambda num_steps: seconds(lambda: advance(seed, rate, first, num_steps))[0]

    return Racer(start, advance, lambda state: svi(0.0).get_params(state), clock)


def own(problem: Benchmark, objective: Objective) -> Racer:
    """Race `bayesrl.fit` with Adam; the clock runs its own loop, with its chunks, history and checks."""

    def prepared(seed: int) -> Any:
        key = jax.random.key(seed)
        return set_up(key, problem.policy, problem.args, problem.beta, problem.guide, objective, 1)

    setup = prepared(0)

    def run(seed: int, rate: Any, num_steps: int) -> TrainingLoop:
        return TrainingLoop(jax.random.key(seed), setup, optax.adam(rate), num_steps, None, None, None)

    @jax.jit
    def chunk(rate: Array, keys: Array, train: Any, num_steps: Array) -> Any:
        config = StepConfig(setup.objective, optax.adam(rate), setup.programs)
        return run_chunk(keys, replace(first, train=train, config=config), num_steps)[0]

    first = run(0, 0.0, 1).start()

    def advance(seed: int, rate: float, state: Any, num_steps: int) -> Any:
        keys = jax.random.split(jax.random.fold_in(jax.random.key(seed), 5), 1)
        return chunk(np.float32(rate), keys, state, np.int32(num_steps))

    compiled: dict[float, Any] = {}

    def clock(seed: int, rate: float) -> Callable[[int], float]:
        if rate not in compiled:
            compiled[rate] = run(seed, rate, 1).chunk()
            run(seed, rate, 1).run(show=False, chunk=compiled[rate])
        return lambda num_steps: _loop_seconds(run(seed, rate, num_steps), compiled[rate])

    return Racer(lambda _: first.train, advance, lambda s: jax.tree.map(lambda x: x[0], s.average), clock)


def _loop_seconds(run: TrainingLoop, chunk: Any) -> float:
    """Time the loop of a fit from its first step to its last, including state and history."""
    begun: list[float] = []

    def watched(*args: Any) -> Any:
        begun.append(time.perf_counter())
        return chunk(*args)

    state, _, _ = run.run(show=False, chunk=watched)
    jax.block_until_ready(state)
    return time.perf_counter() - begun[0]


class Crossing(NamedTuple):
    """The number of steps, and about how many seconds, after which a run stays below the gap."""

    steps: int
    seconds: float


def first_crossing(
    racer: Racer, problem: Benchmark, seed: int, rate: float, level: float, cap: float
) -> Crossing | None:
    """Find the first sustained crossing: the gap stays below the level from there to twice the number of steps.

    Args:
        racer: how to fit.
        problem: what to fit.
        seed: seed of the fit.
        rate: Adam's learning rate.
        level: share of J* − J(π₀).
        cap: seconds of stepping after which a run that has not reached the level gives up.

    Returns:
        The crossing, or None. The gap is exact; it is computed every 5 steps, later every 5% of the steps.
    """
    gap = jax.jit(lambda params: (problem.optimum - problem.exact(params)) / (problem.optimum - problem.start))
    racer.advance(seed, rate, racer.start(seed), 0)
    state, done, spent = racer.start(seed), 0, 0.0
    crossing: Crossing | None = None
    while crossing is not None or spent < cap:
        steps = max(5, done // 20)
        taken, state = seconds(partial(racer.advance, seed, rate, state, steps))
        done, spent = done + steps, spent + taken
        if float(gap(racer.params(state))) > level:
            crossing = None
        elif crossing is None:
            crossing = Crossing(done, spent)
        elif done >= 2 * crossing.steps:
            return crossing
    return None

"""Accelerator: the same compiled programs on a GPU and on the CPU beside it, in one process.

Steps of CartPole as a program (500 steps each, a rule that holds the pole), steps of `fit` on a chain of 10 states, and
Thompson sampling on ten Bernoulli arms, 1,000 pulls each. Language models with random weights write 128 tokens after a
prompt of 64, and take the gradient of LoRA of rank 8 on them; 2 and 4 flop for each parameter and token count, beside
the dense peak in bfloat16. Without compilation; medians of repeats in turn.
"""

import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from jax import Array
from numpyro import handlers

import bayesrl
from bayesrl import control
from bayesrl.control.bandits import BernoulliArms
from bayesrl.control.bandits.simulation import _play
from bayesrl.objectives import ReverseKL
from bayesrl.svi.optimizers import default_optimizer
from bayesrl.svi.problem_setup import set_up
from bayesrl.svi.training_loop import TrainingLoop
from benchmarks import language_shapes
from benchmarks.results import table, target

LANGUAGE = ["language model, bf16", "parameters", "written, tokens/s", "of peak", "LoRA gradient, tokens/s", "of peak"]
REPEATS = 3


def run() -> str:
    """Time each program on every device."""
    found = jax.devices()[0]
    language = table(LANGUAGE, language_shapes.rows(found))
    if found.platform == "cpu":
        return "\n\n".join(["There is no accelerator on this machine: one small language model on the CPU.", language])
    devices = [jax.devices("cpu")[0], found]
    cases: list[tuple[str, str, float, Callable[[], Callable[[int], Any]]]] = [
        *(
            (f"CartPole, {n:,} episodes side by side", "million steps/s", n * 500 / 1e6, _cartpole(n))
            for n in (1024, 65536)
        ),
        ("fit: chain of 20 steps, 256 particles", "steps/s", 50.0, _fit(_chain, 256)),
        ("fit: chain of 20 steps, 16,384 particles", "steps/s", 50.0, _fit(_chain, 16_384)),
        ("Thompson, 10 arms, 1,000 runs", "million pulls/s", 1.0, _bandit(1000)),
        ("Thompson, 10 arms, 50,000 runs", "million pulls/s", 50.0, _bandit(50_000)),
    ]
    rows, best = [], 0.0
    for name, unit, work, make in cases:
        print(name, file=sys.stderr, flush=True)
        speeds = [work / _timed(device, make) for device in devices]
        best = max(best, speeds[1] / speeds[0])
        rows.append([name, unit, *(f"{speed:.3g}" for speed in speeds), f"{speeds[1] / speeds[0]:.2g}"])
    header = ["", "unit", f"CPU, {_cores()} cores", found.device_kind, "GPU / CPU"]
    words = target("at least one of the programs gains tenfold on the accelerator", met=best >= 10)
    return "\n\n".join([table(header, rows), language, (__doc__ or "").partition("\n\n")[2].strip(), words])


def _timed(device: Any, make: Callable[[], Callable[[int], Any]]) -> float:
    """Return the median time of a program on a device, in seconds."""
    with jax.default_device(device):
        call = make()
        jax.block_until_ready(call(0))
        seconds = []
        for repeat in range(REPEATS):
            began = time.perf_counter()
            jax.block_until_ready(call(repeat + 1))
            seconds.append(time.perf_counter() - began)
    return float(np.median(seconds))


def _cartpole(episodes: int) -> Callable[[], Callable[[int], Any]]:
    def rule(seen: Array, time: Array) -> dist.Distribution:
        pull = 30.0 * (seen[2] + 0.3 * seen[3] + 0.01 * seen[0] + 0.03 * seen[1])
        return dist.Categorical(logits=jnp.stack([-pull, pull]))

    def make() -> Callable[[int], Any]:
        program = control.Rollout(control.CartPole(), 500, prior=rule)

        @jax.jit
        @jax.vmap
        def play(key: Any) -> Array:
            with handlers.seed(rng_seed=key), handlers.trace() as trace:
                program()
            returned: Array = trace["return"]["value"]
            return returned

        return lambda seed: play(jax.random.split(jax.random.key(seed), episodes))

    return make


def _chain() -> None:
    rewards = jax.random.normal(jax.random.key(1), (10, 4))

    def step(state: Array, _: Array) -> tuple[Array, None]:
        action = numpyro.sample("action", dist.Categorical(logits=jnp.zeros(4)))
        bayesrl.reward("r", rewards[state, action])
        return (state + action) % 10, None

    numpyro.contrib.control_flow.scan(step, jnp.asarray(0), jnp.arange(20))


def _fit(program: Callable[[], None], particles: int) -> Callable[[], Callable[[int], Any]]:
    def make() -> Callable[[int], Any]:
        key = jax.random.key(0)
        setup = set_up(key, program, (), 0.1, None, ReverseKL(num_particles=particles), 1)
        one = TrainingLoop(key, setup, default_optimizer(setup.learning_rate, 1000), 1000, None, None, None)
        chunk, state = one.chunk(), one.start()
        return lambda seed: chunk(jax.random.key(seed)[None], state, jnp.asarray(50))[0].params

    return make


def _bandit(runs: int) -> Callable[[], Callable[[int], Any]]:
    def make() -> Callable[[int], Any]:
        play = _play(BernoulliArms(10), control.thompson(), 1000, runs)
        return lambda seed: play(jax.random.key(seed))[1]

    return make


def _cores() -> int:
    import os

    return os.cpu_count() or 1

"""Environment steps per second: CartPole as a program beside gymnax's CartPole.

1,024 episodes of 500 steps under the same noisy linear rule, which holds the pole, so that every step is played;
actions are drawn from a Categorical in both. Compiled; medians of 15 repeats of each in turn, in one run.
"""

import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jax import Array
from numpyro import handlers

from bayesrl import control
from benchmarks.peers import GYMNAX, run_peer
from benchmarks.results import table, target

EPISODES, HORIZON, REPEATS, ROUNDS = 1024, 500, 5, 3


def rule(seen: Array, time: Array) -> dist.Distribution:
    """Push towards the side to which the pole falls."""
    pull = 30.0 * (seen[2] + 0.3 * seen[3] + 0.01 * seen[0] + 0.03 * seen[1])
    return dist.Categorical(logits=jnp.stack([-pull, pull]))


def run() -> str:
    """Time both in turn."""
    program = control.Rollout(control.CartPole(), HORIZON, prior=rule)

    @jax.jit
    @jax.vmap
    def play(key: Any) -> Array:
        with handlers.seed(rng_seed=key), handlers.trace() as trace:
            program()
        returned: Array = trace["return"]["value"]
        return returned

    jax.block_until_ready(play(jax.random.split(jax.random.key(0), EPISODES)))
    ours, theirs, returns = [], [], [0.0, 0.0]
    for _ in range(ROUNDS):
        for repeat in range(REPEATS):
            keys = jax.random.split(jax.random.key(repeat + 1), EPISODES)
            began = time.perf_counter()
            total = jax.block_until_ready(play(keys))
            ours.append(time.perf_counter() - began)
        told = run_peer(GYMNAX, "peer_gymnax.py", str(EPISODES), str(HORIZON), str(REPEATS))
        theirs += told["seconds"]
        returns = [float(total.mean()), told["return"]]
    speeds = [EPISODES * HORIZON / float(np.median(seconds)) for seconds in (ours, theirs)]
    rows = [
        [name, f"{speed / 1e6:.2f}", f"{speed / speeds[1]:.2f}", f"{mean:.0f}"]
        for name, speed, mean in zip(("bayesrl, as a program", "gymnax 1.0.1"), speeds, returns, strict=True)
    ]
    words = target("at least as many steps per second as gymnax", met=speeds[0] >= speeds[1])
    header = ["", "million steps/s", "× gymnax", "mean return"]
    return "\n\n".join([table(header, rows), (__doc__ or "").partition("\n\n")[2].strip(), words])

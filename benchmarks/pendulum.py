"""Pendulum-v1: mean return of 100 episodes of the ready model, beside Stable-Baselines3's SAC.

Seeds 0 to 2, all in one run on one machine. SAC has the settings of rl-zoo (20,000 steps); of bayesrl the whole fit
counts, compilation included. Fitted policies are random ones, and are judged as such; SAC's is by its mean action.
As a program: episodes of the program, whose physics is tested against Gymnasium's.
"""

import sys
import time
from typing import Any

import jax
import numpy as np

import bayesrl
from benchmarks.peers import SB3, run_peer
from benchmarks.results import table, target

SEEDS, MARK, EPISODES = 3, -200.0, 100


def run() -> str:
    """Fit by each way and seed, and compare."""
    found: dict[str, list[Any]] = {
        "Stable-Baselines3 SAC": [],
        "bayesrl, real environment": [],
        "bayesrl, as a program": [],
    }
    for seed in range(SEEDS):
        one = (run_peer(SB3, "peer_sac.py", str(seed)), _fit(seed, "gymnasium"), _fit(seed, "program"))
        for results, result in zip(found.values(), one, strict=True):
            results.append(result)
        print(f"seed {seed}: {one}", file=sys.stderr, flush=True)
    rows = []
    for name, results in found.items():
        returns = [result["return"] for result in results]
        seconds = float(np.median([result["seconds"] for result in results]))
        rows.append([name, f"{np.median(returns):.0f}", ", ".join(f"{x:.0f}" for x in returns), f"{seconds:.0f}"])
    words = [
        target(f"mean return of at least {MARK:.0f}, {name}", met=min(one["return"] for one in results) >= MARK)
        for name, results in list(found.items())[1:]
    ]
    header = ["", "median of seeds", "mean returns", "median seconds"]
    return "\n\n".join([table(header, rows), (__doc__ or "").partition("\n\n")[2].strip(), *words])


def _fit(seed: int, physics: str) -> dict[str, float]:
    jax.clear_caches()
    problem = bayesrl.load_problem("pendulum", physics=physics, seed=seed)
    options = {"beta": problem.beta, "progress": False, **problem.fit_options}
    began = time.perf_counter()
    posterior = bayesrl.fit(jax.random.key(seed), problem.policy, **options)
    seconds = time.perf_counter() - began
    returns = posterior.estimate(jax.random.key(100 + seed), EPISODES).metrics["return"]
    return {"seconds": seconds, "return": float(np.ravel(returns.mean)[0])}

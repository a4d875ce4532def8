"""CartPole: wall time until the mean return of 100 episodes is 475, beside Stable-Baselines3's PPO.

Seeds 0 to 4, all in one run on one machine. Of Stable-Baselines3 (settings of rl-zoo) the time until the mark, looked
for every 5,000 steps, evaluation not counted; of bayesrl the whole fit of the ready model `cartpole`, compilation
included, which is evaluated once, at its end. As a program: the same physics inside one compiled loop, the
return being that of 100 episodes of the fit; without compilation means from the first chunk of steps to the last.
"""

import sys
import time
from typing import Any

import jax
import numpy as np

import bayesrl
from benchmarks.peers import SB3, run_peer
from benchmarks.results import table, target

SEEDS, MARK, EPISODES = 5, 475.0, 100


def run() -> str:
    """Fit by each way and seed, and compare."""
    peers, real, simulated = [], [], []
    for seed in range(SEEDS):
        peers.append(run_peer(SB3, "peer_ppo.py", str(seed)))
        real.append(_fit(seed, "gymnasium"))
        simulated.append(_fit(seed, "program"))
        print(f"{seed + 1} of {SEEDS} seeds", file=sys.stderr, flush=True)
    return _told(peers, real, simulated)


def _fit(seed: int, physics: str) -> dict[str, Any]:
    """Fit the ready model, and time it."""
    jax.clear_caches()
    problem = bayesrl.load_problem("cartpole", physics=physics, seed=seed)
    times: list[float] = []
    began = time.perf_counter()
    posterior = bayesrl.fit(
        jax.random.key(seed),
        problem.policy,
        beta=problem.beta,
        progress=False,
        callback=lambda row: times.append(time.perf_counter() - began) and None,
        **problem.fit_options,
    )
    returns = posterior.estimate(jax.random.key(100 + seed), EPISODES).metrics["return"]
    return {"seconds": times[-1], "running": times[-1] - times[0], "return": float(np.ravel(returns.mean)[0])}


def _told(peers: list[Any], real: list[Any], simulated: list[Any]) -> str:
    reached = [peer["seconds"] for peer in peers if peer["steps"] is not None]
    sb3 = float(np.median(reached)) if reached else float("nan")
    rows = [["Stable-Baselines3 PPO", f"{len(reached)} of {SEEDS}", f"{sb3:.1f}", "1.00", ""]]
    for name, found, key in (
        ("bayesrl, real environment", real, "seconds"),
        ("bayesrl, as a program", simulated, "seconds"),
        ("the same without compilation", simulated, "running"),
    ):
        seconds = float(np.median([one[key] for one in found]))
        returns = [one["return"] for one in found]
        good = sum(value >= MARK for value in returns)
        shown = ", ".join(f"{value:.0f}" for value in returns)
        rows.append([name, f"{good} of {SEEDS}", f"{seconds:.1f}", f"{seconds / sb3:.2f}", shown])
    times = [float(row[3]) for row in rows]
    solved = [int(row[1].split()[0]) == SEEDS for row in rows]
    words = [
        target("real environment: 475 on 5 of 5 seeds in at most 1.5× the time", met=solved[1] and times[1] <= 1.5),
        target("as a program: at least 5× faster with compilation", met=solved[2] and times[2] <= 0.2),
        target("as a program: at least 20× faster without compilation", met=solved[3] and times[3] <= 0.05),
    ]
    header = ["", "seeds at 475", "median seconds", "× SB3", "mean returns"]
    return "\n\n".join([table(header, rows), (__doc__ or "").partition("\n\n")[2].strip(), *words])

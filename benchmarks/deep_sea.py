"""DeepSea: episodes until it is solved, by size and exploration rule, with the fitted growth law.

Variant: `control.deep_sea(size=N)`, N steps an episode, .01/N for each step right, 1 at the far corner. Prior: one gets
a row down and left or right, which action does which in each cell being unknown, Dirichlet(1, 1); rewards of each cell
and action Normal(0, 1), observed with noise .01. Solved: the first episode at which the mean regret so far is at most
half of the optimum. Five seeds; medians, and least and greatest. Rules that dither get as many episodes as the others
need at more than twice the size. At most 6,000 episodes. Seconds include compilation.
"""

import sys
import time
from typing import Any

import jax
import numpy as np

from bayesrl import control
from benchmarks.results import table, target

SIZES, SEEDS, MOST = (10, 20, 30, 40, 50), 5, 6000
DITHERING = {"ε-greedy, ε = .1": control.epsilon_greedy(0.1), "Boltzmann, .1": control.boltzmann(0.1)}


def run() -> str:
    """Learn at all sizes, and fit the growth."""
    rows, laws, slow = [], [], 0.0
    solved = True
    for name, rule in (("Thompson", control.thompson()), ("K-learning", control.k_learning())):
        medians = []
        for size in SIZES:
            found = [_solve(size, rule, seed, MOST) for seed in range(SEEDS)]
            episodes = [e for e, _ in found if e is not None]
            seconds = max(s for _, s in found)
            slow = max(slow, seconds) if size == 30 else slow
            solved = solved and len(episodes) == SEEDS
            medians.append(float(np.median(episodes)) if episodes else np.nan)
            spread = f"{min(episodes):,}–{max(episodes):,}" if episodes else "never"
            rows.append(
                [name, str(size), f"{len(episodes)} of {SEEDS}", f"{medians[-1]:,.0f}", spread, f"{seconds:.0f}"]
            )
            print(rows[-1], file=sys.stderr, flush=True)
        slope, _ = np.polyfit(np.log(SIZES), np.log(medians), 1)
        laws.append((name, float(slope)))
    for name, rule in DITHERING.items():
        for size, most in ((10, 1000), (20, 2000)):
            found = [_solve(size, rule, seed, most) for seed in range(SEEDS)]
            episodes = [e for e, _ in found if e is not None]
            told = f"{np.median(episodes):,.0f}" if episodes else f"none in {most:,}"
            rows.append([name, str(size), f"{len(episodes)} of {SEEDS}", told, "", f"{max(s for _, s in found):.0f}"])
            print(rows[-1], file=sys.stderr, flush=True)
    header = ["rule", "N", "seeds solved", "episodes, median", "least–greatest", "seconds of the slowest"]
    laws_told = "; ".join(f"{name}: episodes ∝ N^{slope:.2f}" for name, slope in laws)
    words = [
        f"Growth, by least squares on logarithms of the medians: {laws_told}. Dithering takes some 2^N.",
        target("Thompson and K-learning solve every size on 5 of 5 seeds", met=solved),
        target("N = 30 in under a minute", met=slow < 60),
    ]
    return "\n\n".join([table(header, rows), (__doc__ or "").partition("\n\n")[2].strip(), *words])


def _solve(size: int, rule: Any, seed: int, most: int) -> tuple[int | None, float]:
    """Learn until solved; return the number of episodes, or None, and the seconds."""
    sea = control.deep_sea(size=size)
    agent = control.BayesianAgent(control.TabularModel.of(sea, noise=0.01))
    best = float(control.soft_value_iteration(sea, 0.0).objective)
    total = [0.0]

    def enough(row: dict[str, float]) -> bool:
        total[0] += row["regret"]
        return total[0] / row["episode"] <= 0.5 * best

    began = time.perf_counter()
    found = control.learn(
        jax.random.key(seed), sea, agent, exploration=rule, num_episodes=most, callback=enough, progress=False
    )
    return found.solved_after(), time.perf_counter() - began

"""Learning: cumulated regret on RiverSwim and FrozenLake, by agent and exploration rule.

RiverSwim (6 states, 20 steps) over 300 episodes, and Gymnasium's slippery FrozenLake 4 × 4 (100 steps, undiscounted)
over 500, with the priors of the ready models. Five seeds: mean, and least to greatest. Regret is exact: the optimum
less the expected return of what was played. Never learning costs the regret of the uniform policy.
"""

import sys
import time
from typing import Any

import jax
import numpy as np

import bayesrl
from bayesrl import control
from benchmarks.results import table, target

SEEDS = 5


def run() -> str:
    """Learn both problems in each way, and compare."""
    rows: list[list[str]] = []
    best: dict[str, tuple[float, str]] = {}
    for name, episodes, beta in (("river_swim", 300, 0.1), ("frozen_lake", 500, 0.01)):
        ready = bayesrl.load_learning_problem(name)
        ways: list[tuple[str, Any, Any]] = [
            ("Bayesian, Thompson", ready.agent, control.thompson()),
            ("Bayesian, K-learning", ready.agent, control.k_learning()),
            ("Bayesian, Bayes-UCB", ready.agent, control.bayes_ucb()),
            ("Bayesian, ε-greedy, ε = .1", ready.agent, control.epsilon_greedy(0.1)),
            (f"KLControl, β = {beta}", control.KLControlAgent(beta), None),
            (f"KLControl, β = {beta}, previous", control.KLControlAgent(beta, "previous"), None),
            ("uniform", ready.agent, control.random()),
        ]
        for way, agent, rule in ways:
            began = time.perf_counter()
            found = [
                control.learn(
                    jax.random.key(seed),
                    ready.environment,
                    agent,
                    exploration=rule,
                    num_episodes=episodes,
                    progress=False,
                )
                for seed in range(SEEDS)
            ]
            ends = np.array([run.regret[-1] for run in found])
            last = np.mean([run.history["return"][-episodes // 10 :].mean() for run in found])
            optimum = float(found[0].env.optimum or np.nan)
            shown = [f"{ends.mean():.1f}", f"{ends.min():.1f}–{ends.max():.1f}", f"{last:.3f} of {optimum:.3f}"]
            rows.append([name, way, *shown, f"{(time.perf_counter() - began) / SEEDS:.1f}"])
            print(rows[-1], file=sys.stderr, flush=True)
            if name not in best or ends.mean() < best[name][0]:
                best[name] = (float(ends.mean()), way)
    header = ["environment", "way", "regret, mean", "least–greatest", "return of the last tenth", "seconds a run"]
    words = target(
        "the least regret is that of a posterior over what is unknown, on both",
        met=all(way.startswith("Bayesian") for _, way in best.values()),
    )
    return "\n\n".join([table(header, rows), (__doc__ or "").partition("\n\n")[2].strip(), words])

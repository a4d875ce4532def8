"""Bandits: Bayes regret of exploration rules, beside known values and optimal play.

Worlds are drawn from the prior, Beta(1, 1) for each arm. The known regrets of Thompson sampling are 2.782 ± .005 (2
arms, 100 steps) and 28.35 ± .14 (10 arms, 1,000 steps), by an independent simulation. Seconds include compilation.
"""

import time

import jax
import numpy as np

from bayesrl import control
from bayesrl.control import bandits
from benchmarks.results import table, target

KNOWN = ((2, 100, 2.782, 0.005), (10, 1000, 28.35, 0.14))
RULES = {
    "Thompson": control.thompson(),
    "Bayes-UCB": control.bayes_ucb(),
    "K-learning": control.k_learning(),
    "ε-greedy, ε = .1": control.epsilon_greedy(0.1),
    "Boltzmann, .1": control.boltzmann(0.1),
    "greedy": control.greedy(),
    "random": control.random(),
}
GITTINS = {(0.9, 1): 0.7029, (0.9, 2): 0.6346, (0.9, 3): 0.6010, (0.99, 1): 0.8699}
OPTIMAL = {10: 0.644881, 50: 1.336621, 100: 1.748246}


def run() -> str:
    """Play, and compare."""
    rows, fits, seconds = [], [], 0.0
    for arms, steps, known, error in KNOWN:
        began = time.perf_counter()
        runs = bandits.play_bandit(
            jax.random.key(0), bandits.BernoulliArms(arms), control.thompson(), num_steps=steps, num_runs=10_000
        )
        seconds = time.perf_counter() - began
        found, se = float(runs.mean[-1]), float(runs.se[-1])
        z = (found - known) / float(np.hypot(se, error))
        fits.append(abs(z) <= 3)
        measured = f"{found:.3f} ± {se:.3f}"
        rows.append([str(arms), f"{steps:,}", measured, f"{known} ± {error}", f"{z:.1f}", f"{seconds:.1f}"])
    rules = []
    for name, rule in RULES.items():
        told = bandits.play_bandit(jax.random.key(1), bandits.BernoulliArms(2), rule, num_steps=100, num_runs=2000)
        low, high = told.band()[:, -1]
        rules.append([name, f"{told.mean[-1]:.2f} ± {told.se[-1]:.2f}", f"{low:.2f} to {high:.2f}"])
    rules.append(["optimal play", f"{bandits.bayes_optimal_regret(100):.6f}", ""])
    indices = [abs(bandits.gittins_index(a, a, discount=g) - known) for (g, a), known in GITTINS.items()]
    regrets = [abs(bandits.bayes_optimal_regret(horizon) - known) for horizon, known in OPTIMAL.items()]
    words = [
        target("Thompson's Bayes regret within 3 standard errors of the known", met=all(fits)),
        target("10,000 runs × 10 arms × 1,000 steps in under 20 s", met=seconds < 20),
        target("Gittins indices to 4 digits", met=max(indices) < 5.1e-5),
        target("Bayes-optimal regret to 5 digits", met=max(regrets) < 5e-6),
    ]
    first = table(["arms", "steps", "Bayes regret of 10,000 runs", "known", "z", "seconds"], rows)
    second = table(["two arms, 100 steps, 2,000 runs", "Bayes regret", "90% of runs"], rules)
    return "\n\n".join([first, second, (__doc__ or "").partition("\n\n")[2].strip(), *words])

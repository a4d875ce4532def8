"""Tabular control: exact optima beside known values, and fitted policies by exact evaluation.

The fitted policy is read out of its guide as a table, and evaluated by planning: no draws. The share is that of
J* − J(π₀); CliffWalking is judged by the gap itself, since its prior earns −1,072.
"""

import sys
import time
from typing import Any

import jax
import numpy as np
import optax

import bayesrl
from bayesrl import control
from bayesrl.objectives import ReverseKL
from benchmarks.results import table, target

BETAS = (0.0, 1.0, 0.1, 0.01)
KNOWN = {
    "FrozenLake-v1": (0.542026, 0.013029, 0.019292, 0.152841),
    "CliffWalking-v1": (-12.247898, -27.628944, -13.945802, -12.417690),
    "river_swim": (3.397264, 0.061668, 2.105631, 3.264429),
}
# problem, β, objective, steps, learning rate, horizon of episodes, β to start at
FITS: tuple[tuple[str, float, Any, int, float, int, float | None], ...] = (
    ("FrozenLake-v1", 1.0, control.ActorCritic(512, trace=1.0, clip=None), 4000, 0.01, 100, None),
    ("FrozenLake-v1", 0.1, control.ActorCritic(256, trace=1.0, clip=None), 4000, 0.05, 150, None),
    ("FrozenLake-v1", 0.01, control.ActorCritic(128, trace=1.0, clip=None), 4000, 0.1, 150, None),
    ("river_swim", 1.0, control.ActorCritic(256, trace=1.0, clip=None), 3000, 0.1, 20, None),
    ("river_swim", 0.1, control.ActorCritic(128, trace=1.0, clip=None), 2000, 0.1, 20, None),
    ("river_swim", 0.01, control.ActorCritic(256, trace=0.9, clip=None), 4000, 0.1, 20, None),
    ("CliffWalking-v1", 1.0, ReverseKL(64), 3000, 0.1, 200, 10.0),
    ("CliffWalking-v1", 0.1, ReverseKL(64), 3000, 0.1, 150, 10.0),
    ("CliffWalking-v1", 0.01, ReverseKL(64), 3000, 0.1, 150, 10.0),
)


def run() -> str:
    """Plan, fit, evaluate."""
    exact = [[name, *_planned(name, known)] for name, known in KNOWN.items()]
    digits = max(float(row[-1]) for row in exact)
    rows, met = [], True
    for name, beta, objective, steps, rate, horizon, hot in FITS:
        share, gap, optimum, reached, seconds = _fitted(name, beta, objective, steps, rate, horizon, hot)
        good = gap <= 0.1 if name.startswith("Cliff") else share <= 0.01
        met &= good
        told = [name, f"{beta:g}", f"{optimum:.6g}", f"{reached:.6g}", f"{gap:.3g}", f"{share:.2%}", f"{seconds:.0f}"]
        rows.append([*told, "yes" if good else "no"])
        print(" ".join(rows[-1]), file=sys.stderr, flush=True)
    first = table(["J*", *(f"β = {beta:g}" for beta in BETAS), "greatest error"], exact)
    second = table(["fit", "β", "J*", "J", "gap", "share", "seconds", "met"], rows)
    words = [
        target("known optima to 5 digits", met=digits < 1e-6),
        target("FrozenLake and RiverSwim within 1% of J* − J(π₀), CliffWalking within .1", met=met),
    ]
    return "\n\n".join([first, second, (__doc__ or "").partition("\n\n")[2].strip(), *words])


def _problem(name: str) -> control.TabularMDP:
    return control.river_swim() if name == "river_swim" else control.from_gymnasium(name, discount=0.99)


def _planned(name: str, known: tuple[float, ...]) -> list[str]:
    found = control.soft_value_iteration(_problem(name), np.array(BETAS)).objective
    return [*(f"{value:.6f}" for value in found), f"{np.abs(found - np.array(known)).max():.1e}"]


def _fitted(
    name: str, beta: float, objective: Any, steps: int, rate: float, horizon: int, start_beta: float | None
) -> tuple[float, float, float, float, float]:
    mdp = _problem(name)
    exact = control.TabularOptimum(mdp)
    began = time.perf_counter()
    posterior = bayesrl.fit(
        jax.random.key(0),
        control.tabular_rollout(mdp, horizon=None if mdp.horizon else horizon),
        beta=beta,
        guide=control.TablePolicy(stationary=mdp.horizon is None),
        objective=objective,
        optimizer=optax.adam(optax.cosine_decay_schedule(rate, steps)),
        num_steps=steps,
        start_beta=start_beta,
        progress=False,
    )
    seconds = time.perf_counter() - began
    told = exact.evaluate(posterior.select(restart=0))
    assert told is not None
    gap = exact(beta) - told[0]
    return gap / (exact(beta) - exact.prior_objective(beta)), gap, exact(beta), told[0], seconds

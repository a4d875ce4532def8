"""Hypergrid 8 × 8: the L1 distance of end points from the law of the reward, by objective, behaviour and guide.

L1 is Σ|q(x) − R(x)/ΣR| over the 64 cells, exact: q by summing all 12,869 walks. The reward has R0 = 0.1, R1 = 0.5 and
R2 = 2. The prior ends uniformly over the cells. "Uniform actions" is a guide that starts elsewhere, at equal
probabilities of the allowed actions, as an untrained network does. All tables are over cells, 64 walks a step. A walk
visits 8 states in the mean, so that 128,000 walks visit about a million. Mean over 5 seeds, and the greatest. Published
for torchgfn's example: .012 ± .015. There, networks learn, so that the steps do not compare.
"""

import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro

import bayesrl
from bayesrl.guides import PolicyGuide
from bayesrl.objectives import ReverseKL, TrajectoryBalance
from bayesrl.problem import load_problem
from benchmarks.results import table, target

SEEDS, STEPS = 5, (250, 500, 2000)
GOOD = 0.012

ROWS: dict[str, tuple[Any, bool, Any]] = {
    "learned log Z": (TrajectoryBalance(), False, None),
    "learned log Z, uniform actions": (TrajectoryBalance(), True, None),
    "variance": (TrajectoryBalance(form="variance"), False, None),
    "pairs": (TrajectoryBalance(form="pairs"), False, None),
    "sub-trajectories": (TrajectoryBalance(form="subtrajectory"), False, None),
    "a fifth from the prior": (TrajectoryBalance(prior_fraction=0.2), False, None),
    "the prior alone": (TrajectoryBalance(prior_fraction=1.0), False, None),
    "replay, half of each batch, by rank": (TrajectoryBalance(), False, {"priority": 0.5}),
    "reverse KL": (ReverseKL(64), False, None),
}


def run() -> str:
    """Fit by every row for every number of steps."""
    problem: Any = load_problem("hypergrid")
    actions, ends, law = list_walks(problem)
    rows, best = [], {}
    for name, (objective, elsewhere, replay) in ROWS.items():
        cells = []
        for steps in STEPS:
            found = []
            for seed in range(SEEDS):
                options = {**problem.fit_options, "objective": objective, "num_steps": steps, "progress": False}
                if elsewhere:
                    options["guide"] = from_uniform_actions(problem.policy)
                if replay is not None:
                    options["source"] = bayesrl.ReplayDraws(num_particles=64, **replay)
                fitted = bayesrl.fit(jax.random.key(seed), problem.policy, beta=1.0, **options)
                found.append(distance(fitted, actions, ends, law))
            cells.append(f"{np.mean(found):.1e} ({max(found):.1e})")
            best[name] = max(found)
        rows.append([name, *cells])
        print(rows[-1], file=sys.stderr, flush=True)
    header = ["fit", *(f"{64 * steps:,} walks" for steps in STEPS)]
    met = best["learned log Z, uniform actions"] <= GOOD and best["learned log Z"] <= GOOD
    words = [
        (__doc__ or "").partition("\n\n")[2].strip(),
        f"At the start, L1 is {np.abs(1 / 64 - law).sum():.2f} for the prior.",
        target(f"L1 at most {GOOD} after a million states, on 5 of 5 seeds", met=met),
    ]
    return "\n\n".join([table(header, rows), *words])


def distance(fitted: bayesrl.Posterior, actions: jax.Array, ends: np.ndarray, law: np.ndarray) -> float:
    """Compute the L1 distance of the end points from the law of the reward, by the probabilities of all walks."""
    scores = np.asarray(fitted.log_prob({"action": actions})[0], float)
    return float(np.abs(np.bincount(ends, np.exp(scores)) - law).sum())


def list_walks(problem: Any) -> tuple[jax.Array, np.ndarray, np.ndarray]:
    """List the actions of all walks, padded by stops, the cells where they end, and the law of the reward."""
    size, stop = problem.policy.height, problem.policy.dimensions
    found: list[tuple[int, list[int]]] = []

    def go_on(x: int, y: int, actions: list[int]) -> None:
        found.append((x * size + y, actions + [stop] * (stop * (size - 1) + 1 - len(actions))))
        if x < size - 1:
            go_on(x + 1, y, [*actions, 0])
        if y < size - 1:
            go_on(x, y + 1, [*actions, 1])

    go_on(0, 0, [])
    law = np.exp(np.asarray(problem.policy.gain, float))
    return jnp.asarray([a for _, a in found]), np.array([end for end, _ in found]), law / law.sum()


def from_uniform_actions(walk: Any) -> PolicyGuide:
    """Make a guide with a table of logits that begins at equal probabilities of the allowed actions."""
    allowed = jnp.where(walk.logits > -jnp.inf, 0.0, -jnp.inf)

    def guide() -> None:
        walk.run(allowed + numpyro.param("table", jnp.zeros(allowed.shape)))

    return PolicyGuide(guide, within_prior=True)

"""Hypergrid 8 × 8 by trajectory balance, beside torchgfn in one run.

torchgfn runs by the settings of its simple hypergrid example: Adam at .001, and at .1 for log Z, 16 walks a step,
1,000 steps, gradients clipped to norm 1, forward and backward policies of two hidden layers of 256, on one core, where
it is faster than on two. Ours has a network as wide, drawn alike, with the same rates and batches, and the table of
logits of `hypergrid`. All begin at nearly uniform actions. torchgfn learns the steps back too, which ours fixes at
uniform ones. Seconds are of training, and of the whole of `bayesrl.fit`, each once all is imported and compiled; CPU
seconds depend less on what else the machine does. States are those that walks visit. L1 is exact, as in `hypergrid`.
"""

import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro

import bayesrl
from bayesrl.guides import PolicyGuide
from bayesrl.objectives import TrajectoryBalance
from bayesrl.problem import load_problem
from benchmarks.hypergrid import GOOD, distance, from_uniform_actions, list_walks
from benchmarks.peers import TORCHGFN, run_peer
from benchmarks.results import table, target

STEPS, BATCH, WIDTH, SPEED_UP = 1000, 16, 256, 5
SEEDS = (0, 1)


def run() -> str:
    """Train both for as many walks, seed by seed in turn."""
    problem: Any = load_problem("hypergrid")
    walks = list_walks(problem)
    rows: list[list[str]] = []
    ratios, distances, close = [], [], []
    versions = {}
    for seed in SEEDS:
        answer = run_peer(TORCHGFN, "peer_torchgfn.py", "--marks", str(STEPS), "--seed", str(seed))
        theirs, versions = answer["rows"][-1], answer["versions"]
        rows.append(_row("torchgfn, network", seed, theirs))
        print(rows[-1], file=sys.stderr, flush=True)
        for name, options in _settings(problem).items():
            ours = _train(problem, options, seed, walks)
            rows.append(_row(name, seed, ours))
            print(rows[-1], file=sys.stderr, flush=True)
            ratios.append([theirs[clock] / ours[clock] for clock in ("seconds", "cpu_seconds")])
            distances.append((ours["distance"], theirs["distance"]))
            close.append(ours["distance"] <= GOOD)
    header = ["", "seed", "walks", "states", "seconds", "CPU seconds", "L1"]
    least = np.min(ratios, 0)
    words = [
        (__doc__ or "").partition("\n\n")[2].strip(),
        "torchgfn {torchgfn} with torch {torch}.".format(**versions),
        target(
            f"at least {SPEED_UP}× fewer seconds than torchgfn for as many walks; at the least it is "
            f"{least[0]:.0f}×, and {least[1]:.0f}× in CPU seconds",
            met=bool((least >= SPEED_UP).all()),
        ),
        target(
            f"L1 at most {GOOD} after these walks, and less than torchgfn's; a million states are in `hypergrid`",
            met=all(close) and all(own < other for own, other in distances),
            why_not=f"{sum(close)} of {len(close)} are below {GOOD}, and "
            f"{sum(own < other for own, other in distances)} of {len(distances)} are below torchgfn's",
        ),
    ]
    return "\n\n".join([table(header, rows), *words])


def _row(name: str, seed: int, found: dict[str, Any]) -> list[str]:
    seconds = (f"{found[clock]:.2f}" for clock in ("seconds", "cpu_seconds"))
    return [name, str(seed), f"{found['walks']:,}", f"{found['states']:,.0f}", *seconds, f"{found['distance']:.4f}"]


def _settings(problem: Any) -> dict[str, dict[str, Any]]:
    balance = TrajectoryBalance(BATCH, log_z_rate=100.0)
    network = {"guide": _from_network(problem.policy), "learning_rate": 1e-3, "objective": balance}
    loose = {"guide": from_uniform_actions(problem.policy), "objective": TrajectoryBalance(BATCH)}
    return {"bayesrl, network": network, "bayesrl, table": loose}


def _train(problem: Any, own: dict[str, Any], seed: int, walks: Any) -> dict[str, Any]:
    options = {**problem.fit_options, **own, "num_steps": STEPS, "progress": False}
    bayesrl.fit(jax.random.key(100), problem.policy, beta=1.0, **options)  # compiles
    began, began_work = time.perf_counter(), time.process_time()
    fitted = bayesrl.fit(jax.random.key(seed), problem.policy, beta=1.0, **options)
    seconds, used = time.perf_counter() - began, time.process_time() - began_work
    # A walk to x visits Σx + 1 states; the history has the mean coordinate of the ends.
    coordinate = float(np.mean(fitted.history["metrics/end"]))
    states = STEPS * BATCH * (problem.policy.dimensions * coordinate + 1)
    found = {"walks": STEPS * BATCH, "states": states, "seconds": seconds, "cpu_seconds": used}
    return {**found, "distance": distance(fitted, *walks)}


def _from_network(walk: Any) -> PolicyGuide:
    """Make a guide whose logits are a network's, of the coordinates as one-hot vectors."""
    allowed = jnp.where(walk.logits > -jnp.inf, 0.0, -jnp.inf)
    size = walk.height
    seen = jnp.concatenate([jnp.eye(size)[jnp.arange(size**2) // size], jnp.eye(size)[jnp.arange(size**2) % size]], -1)
    keys = iter(jax.random.split(jax.random.key(0), 6))
    layers = []
    for before, after in ((2 * size, WIDTH), (WIDTH, WIDTH), (WIDTH, walk.dimensions + 1)):
        # As torch draws linear layers, so that both begin alike.
        bound = before**-0.5
        shapes = ((before, after), (after,))
        layers.append([jax.random.uniform(next(keys), shape, minval=-bound, maxval=bound) for shape in shapes])

    def guide() -> None:
        hidden = seen  # all cells at once: the walks of a step share them
        for i, (weights, bias) in enumerate(layers):
            hidden = hidden @ numpyro.param(f"weights{i}", weights) + numpyro.param(f"bias{i}", bias)
            hidden = jax.nn.relu(hidden) if i < len(layers) - 1 else hidden
        walk.run(allowed + hidden)

    return PolicyGuide(guide, within_prior=True)

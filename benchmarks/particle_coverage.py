"""Particles on random programs with time: whether Ẑ is unbiased, and what both sides of log Z cover.

Programs of 4 to 12 steps over 2 to 6 states with 2 to 5 actions: random prior, transitions, rewards of each step and of
the end; β from .2 to 2. Programs of one shape are the contexts of one plate and their tables are its arguments: they do
not interact, each is resampled on its own, and all of them cost one compilation. Half of the shapes propose from the
prior, half from fits stopped between 3 and 100 steps. Truth: soft backward induction in double precision. Each
program gets the two limits and the interval that `evidence(method="smc")` would report of it, from the same runs; its
upper side rests on chains of 12 conditional runs, and is given where they have met.
"""

import sys
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from numpyro.contrib.control_flow import scan
from scipy.special import logsumexp

import bayesrl
from bayesrl.diagnostics.evidence.by_particles import bracket_of_runs, from_chains
from bayesrl.exact.tabulation import freeze_program
from bayesrl.monte_carlo.particles.conditional_chains import Runs, run_particles
from bayesrl.monte_carlo.particles.engines import ParticleOptions
from bayesrl.monte_carlo.sequential_monte_carlo import choose_engine
from benchmarks.results import table, target

SHAPES, PER_SHAPE = 8, 125
NUM_PARTICLES, NUM_REPLICATIONS, NUM_SWEEPS = 32, 32, 12


class Tables(NamedTuple):
    """Numbers of all programs of a shape, contexts first; rewards in units of β."""

    logits: Any  # of actions, [contexts, states, actions]
    following: Any  # states, [contexts, states, actions]
    rewards: Any  # [contexts, states, actions]
    ends: Any  # rewards of the last state, [contexts, states]


def draw_tables(rng: np.random.Generator, contexts: int) -> tuple[Tables, int]:
    """Draw the numbers of programs of one random shape, and their number of steps."""
    states, actions, steps = int(rng.integers(2, 7)), int(rng.integers(2, 6)), int(rng.integers(4, 13))
    beta = np.exp(rng.uniform(np.log(0.2), np.log(2), size=(contexts, 1, 1)))
    shape = (contexts, states, actions)
    rewards = rng.uniform(size=shape) / beta
    ends = 2 * rng.uniform(size=(contexts, states)) / beta[..., 0]
    logits = rng.normal(size=shape)
    as_float = [jnp.asarray(x, jnp.float32) for x in (logits, rewards, ends)]
    return Tables(as_float[0], jnp.asarray(rng.integers(states, size=shape), jnp.int32), *as_float[1:]), steps


def program_of(steps: int) -> Any:
    """Make the program of a shape: all its numbers are arguments."""

    def program(logits: Any, following: Any, rewards: Any, ends: Any) -> None:
        own = jnp.arange(len(ends))

        def step(state: Any, _: None) -> tuple[Any, None]:
            with numpyro.plate("program", len(ends)):
                action = numpyro.sample("action", dist.Categorical(logits=logits[own, state]))
                bayesrl.reward("gain", rewards[own, state, action])
            return following[own, state, action], None

        state, _ = scan(step, jnp.zeros(len(ends), jnp.int32), None, length=steps)
        with numpyro.plate("program", len(ends)):
            bayesrl.reward("end", ends[own, state])

    return program


def log_evidence(tables: Tables, steps: int) -> np.ndarray:
    """Compute log Z of each program by soft backward induction, [contexts], nats."""
    logits, rewards, ends = (np.asarray(x, float) for x in (tables.logits, tables.rewards, tables.ends))
    log_prior = logits - logsumexp(logits, axis=-1, keepdims=True)
    value, at = ends, np.arange(len(ends))[:, None, None]
    for _ in range(steps):
        value = logsumexp(log_prior + rewards + value[at, np.asarray(tables.following)], axis=-1)
    return np.asarray(value[:, 0])


def run() -> str:
    """Bracket all programs, and compare with the truth."""
    rng = np.random.default_rng(17)
    rows: list[dict[str, np.ndarray]] = []
    for s in range(SHAPES):
        tables, steps = draw_tables(rng, PER_SHAPE)
        rows.append(measure(jax.random.key(s), tables, steps, rng, fitted=s % 2 == 1))
        print(f"{s + 1} of {SHAPES} shapes", file=sys.stderr, flush=True)
    return _told({name: np.concatenate([row[name] for row in rows]) for name in rows[0]})


def measure(
    key: jax.Array, tables: Tables, steps: int, rng: np.random.Generator, *, fitted: bool
) -> dict[str, np.ndarray]:
    """Run the particles of one shape, and bracket each of its programs as if it stood alone."""
    program, truth = program_of(steps), log_evidence(tables, steps)
    proposal = None
    if fitted:
        number = int(np.exp(rng.uniform(np.log(3), np.log(100))))
        proposal = bayesrl.fit(key, program, *tables, beta=1.0, num_steps=number, progress=False)
    frozen = freeze_program(program, tuple(tables), 1.0)
    options = ParticleOptions(NUM_PARTICLES, NUM_REPLICATIONS, 0.5, "systematic", None)
    engine = choose_engine(frozen, proposal, "auto", options)
    forward = run_particles(jax.random.fold_in(key, 1), engine, 1.0, NUM_PARTICLES, None)
    above = from_chains(jax.random.fold_in(key, 2), frozen, engine, 1.0, NUM_PARTICLES, forward, NUM_SWEEPS)
    found = []
    for c in range(PER_SHAPE):
        interval = bracket_of_runs(forward.log_z[:, c : c + 1], above.of_context(c)).interval
        found.append((*interval, truth[c]))
    names = ("mean", "se", "lower", "upper", "least", "most", "truth")
    columns = dict(zip(names, np.asarray(found, float).T, strict=True))
    return columns | _unbiased(forward, above.log_z, truth)


def _unbiased(forward: Runs, held: np.ndarray, truth: np.ndarray) -> dict[str, np.ndarray]:
    """Average Ẑ/Z over free runs and Z/Ẑ over the last conditional ones, with their standard errors."""
    parts = {"ratio": np.exp(forward.log_z - truth), "inverse": np.exp(truth - held[-1])}
    means = {name: x.mean(0) for name, x in parts.items()}
    return means | {f"{name}_se": x.std(0, ddof=1) / np.sqrt(len(x)) for name, x in parts.items()}


def _told(found: dict[str, np.ndarray]) -> str:
    given, both = np.isfinite(found["upper"]), np.isfinite(found["most"])
    inside = (found["lower"] <= found["truth"]) & (found["truth"] <= found["upper"])
    safe = (found["least"] <= found["truth"]) & (found["truth"] <= found["most"])
    count = len(given)
    rows, scores = [], {}
    for name, label in (("ratio", "mean of Ẑ/Z over free runs"), ("inverse", "mean of Z/Ẑ over conditional runs")):
        mean, se = float(found[name].mean()), float(np.sqrt((found[f"{name}_se"] ** 2).sum()) / count)
        scores[name] = abs(mean - 1) / se
        rows.append([label, f"{mean:.5f} ± {se:.5f}", f"{scores[name]:.1f} standard errors from 1"])
    calibrated, conservative = float(inside[given].mean()), float(safe[both].mean())
    width = np.median((found["upper"] - found["lower"])[given])
    wide = np.median((found["most"] - found["least"])[both])
    rows += [
        ["calibrated interval", f"given of {given.mean():.1%}", f"covers {calibrated:.1%}, median width {width:.2g}"],
        ["both limits", f"given of {both.mean():.1%}", f"cover {conservative:.1%}, median width {wide:.2g}"],
    ]
    words = [
        target("log Z unbiased on the natural scale within 3 standard errors", met=scores["ratio"] < 3),
        target(
            "calibrated intervals cover 93–97%", met=0.93 <= calibrated <= 0.97, why_not=f"they cover {calibrated:.1%}"
        ),
        target("both limits cover at least 94%", met=conservative >= 0.94),
    ]
    head = table([f"{count:,} programs, {NUM_PARTICLES} particles, {NUM_REPLICATIONS} runs", "", ""], rows)
    return "\n\n".join([head, (__doc__ or "").partition("\n\n")[2].strip(), *words])

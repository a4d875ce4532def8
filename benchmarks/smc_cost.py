"""Cost of sequential particles: a pass beside plain generation, time per particle, memory.

Texts: GPT-2 of 2 layers × 128, 98 tokens, one prompt of one token, 16 new tokens, reward = vowels / 4, β = .1, the
twist its value so far. Plain generation draws as many texts by `CausalLMDistribution.sample` under `jax.jit`. Chains: a
scan of 16 steps over 10 states with 4 actions, β = .1. Compilation is left out; programs run in turn in one process,
and ratios are medians over pairs of neighbours. "On the host" is the whole call of the engine after its first: with
rewards of the finished texts, checks and copies. Memory is what XLA plans for temporaries and results of the program.
"""

import sys
from collections.abc import Callable
from contextlib import contextmanager
from typing import Any, NamedTuple
from unittest.mock import patch

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from numpyro.contrib.control_flow import scan

import bayesrl
from bayesrl import lm
from bayesrl.compilation.jit import TracedProgram, trace_cache
from bayesrl.exact.tabulation import freeze_program
from bayesrl.monte_carlo.particles.engines import ParticleOptions
from bayesrl.monte_carlo.sequential_monte_carlo import choose_engine
from benchmarks.language_models import BETA, COMPLETIONS, CONFIG, LENGTH, policy_of
from benchmarks.results import table, target
from benchmarks.timing import interleaved, median_ratio

REPEATS = 41
SIZES = (64, 256, 1024, 4096)
ALLOWED = 1.3
GROWTH = 1.25
"""What time or memory per particle may grow by from the fewest to the most particles, and still count as constant."""


class Pass(NamedTuple):
    """A pass of particles: its compiled program alone, the whole engine, and the bytes that XLA plans."""

    program: Callable[[], Any]
    engine: Callable[[], Any]
    memory: int


def run() -> str:
    """Time passes of many sizes."""
    model = lm.GPT2.init(jax.random.key(0), CONFIG)
    with trace_cache():
        beside, ratio = _beside_generation(model)
        rows, worst = _by_size(model)
    words = [
        (__doc__ or "").partition("\n\n")[2].strip(),
        target(
            f"a pass over {COMPLETIONS} texts of {LENGTH} tokens at most {ALLOWED}× plain generation of as many",
            met=ratio <= ALLOWED,
            why_not=f"it takes {ratio:.2f}×",
        ),
        target(
            f"time per particle constant from {SIZES[0]} to {SIZES[-1]:,} particles, to {GROWTH:g}×",
            met=max(found[0] for found in worst.values()) <= GROWTH,
            why_not=", ".join(f"{name}: {found[0]:.2f}×" for name, found in worst.items()),
        ),
        target(
            f"memory linear: bytes per particle at {SIZES[-1]:,} at most {GROWTH:g}× those at {SIZES[0]}",
            met=max(found[1] for found in worst.values()) <= GROWTH,
            why_not=", ".join(f"{name}: {found[1]:.2f}×" for name, found in worst.items()),
        ),
    ]
    header = ["program", "particles", "time", "per particle", "memory", "per particle"]
    return "\n\n".join([table(["pass over 64 texts", "time", "ratio"], beside), table(header, rows), *words])


def _beside_generation(model: Any) -> tuple[list[list[str]], float]:
    policy = policy_of(model)
    answers = policy.distribution(model, policy.prompts.tokens, policy.prompts.mask)
    write = jax.jit(lambda key: jax.vmap(answers.sample)(jax.random.split(key, COMPLETIONS)))
    key = jax.random.key(0)
    kinds: dict[str, tuple[float, Any]] = {
        "no twist, never resampled": (0.0, None),
        "twist, resampled where fewer than half are effective": (0.5, "reward"),
        "twist, resampled at every token": (1.0, "reward"),
    }
    passes = {name: _pass(policy, COMPLETIONS, *kind) for name, kind in kinds.items()}
    main = passes["twist, resampled where fewer than half are effective"]
    named: dict[str, Callable[[], Any]] = {"plain generation": lambda: write(key)}
    named |= {name: one.program for name, one in passes.items()}
    named["the second of these, on the host"] = main.engine
    for one in named.values():
        jax.block_until_ready(one())
    times = dict(zip(named, interleaved(list(named.values()), REPEATS), strict=True))
    plain = times["plain generation"]
    ratios = {name: median_ratio(own, plain) for name, own in times.items()}
    rows = [[name, f"{1e3 * float(np.median(own)):.1f} ms", f"{ratios[name]:.2f}×"] for name, own in times.items()]
    return rows, ratios["twist, resampled where fewer than half are effective"]


def _by_size(model: Any) -> tuple[list[list[str]], dict[str, tuple[float, float]]]:
    """Time programs of all sizes in turn; also return by what time and memory per particle grow."""
    rows, worst = [], {}
    for name, policy, twist in (("texts", policy_of(model), "reward"), ("chains", _chain, None)):
        passes = {size: _pass(policy, size, 0.5, twist) for size in SIZES}
        for one in passes.values():
            jax.block_until_ready(one.program())
        times = interleaved([one.program for one in passes.values()], REPEATS // 4)
        each = {size: float(np.median(own)) / size for size, own in zip(SIZES, times, strict=True)}
        memory = {size: one.memory / size for size, one in passes.items()}
        rows += [
            [
                name,
                f"{size:,}",
                f"{1e3 * size * each[size]:.1f} ms",
                f"{1e6 * each[size]:.1f} µs",
                f"{passes[size].memory / 2**20:.1f} MiB",
                f"{memory[size] / 2**10:.1f} KiB",
            ]
            for size in SIZES
        ]
        worst[name] = (max(each.values()) / each[SIZES[0]], max(memory.values()) / memory[SIZES[0]])
        print(rows[-1], file=sys.stderr, flush=True)
    return rows, worst


def _chain() -> None:
    """Ten states in a ring; an action moves by 0 to 3 of them, and some pay."""

    def step(state: Any, _: Any) -> tuple[Any, None]:
        action = numpyro.sample("action", dist.Categorical(logits=jnp.zeros(4)))
        state = (state + action) % 10
        bayesrl.reward("pay", jnp.where(state % 3 == 0, 0.2, 0.0))
        return state, None

    scan(step, jnp.zeros((), int), None, length=LENGTH)


def _pass(policy: Any, size: int, threshold: float, twist: Any) -> Pass:
    """Prepare one replication of particles."""
    options = ParticleOptions(size, 1, threshold, "systematic", twist)
    engine = choose_engine(freeze_program(policy, (), BETA), None, "sequential", options)
    key = jax.random.key(0)
    with _recorded() as runs:
        engine.run(key, BETA)
    # The engine runs its filter first; other programs only read what has come of it.
    program, leaves = next(run for run in runs if run[0].program.name in ("filter", "write_particles"))
    planned = program.program.jitted.lower(program.consts, program.fillings, leaves).compile().memory_analysis()
    used = planned.temp_size_in_bytes + planned.output_size_in_bytes
    return Pass(lambda: program.run(leaves), lambda: engine.run(key, BETA), used)


@contextmanager
def _recorded() -> Any:
    """Record compiled programs and the arrays that they run on."""
    runs: list[tuple[TracedProgram, list[Any]]] = []
    run = TracedProgram.run

    def noted(self: TracedProgram, leaves: list[Any]) -> Any:
        runs.append((self, leaves))
        return run(self, leaves)

    with patch.object(TracedProgram, "run", noted):
        yield runs

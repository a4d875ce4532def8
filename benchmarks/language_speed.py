"""Language models: steps, time to an objective, and generation, beside TRL and transformers on the CPU.

GPT-2 of 2 layers × 128, 98 tokens, one prompt of one token, 64 completions of 16 tokens each step, reward = vowels / 4,
β = .1, from one random checkpoint that both load. Both try the rates 3e-4, 1e-3 and 3e-3. TRL: RLOO with its KL in the
reward, constant rate, 100 steps each, and 300 with the best. `fit`: 240 steps of Adam (b1 = .8, b2 = .95), the rate
falling as a cosine from twice as much, so that its mean is the same. J is measured for both by the peer's script, from
4,096 fresh samples of the saved models. TRL's time leaves out imports and the making of the trainer; ours is that of
all steps, with and without compilation, where its J is as great. Arithmetic: the matrix products of a step alone, at
the shapes that it has, timed in the same process.
"""

import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from numpyro import handlers

import bayesrl
from bayesrl import lm
from bayesrl.compilation.jit import trace_once
from bayesrl.lm.transformers.base import CausalLM
from benchmarks.language_models import BETA, COMPLETIONS, CONFIG, LENGTH, policy_of
from benchmarks.peers import TRL, python_of, run_peer
from benchmarks.results import table, target

RATES = (3e-4, 1e-3, 3e-3)
STEPS, TRIED, OWN_STEPS = 300, 100, 240
REPEATS = 20
RANK = 8
SCRIPT = "peer_trl.py"


def run() -> str:
    """Train by both, and time both."""
    with tempfile.TemporaryDirectory() as folder:
        start, saved = Path(folder) / "start", Path(folder) / "fit"
        script = Path(__file__).parent / SCRIPT
        making = [str(python_of(TRL)), str(script), "--make", str(start), "--seed", "0"]
        subprocess.run(making, check=True, capture_output=True)  # noqa: S603
        model: Any = lm.load_pretrained(start).model
        told = "peer: trying rates"
        print(told, file=sys.stderr, flush=True)
        tried = {rate: _peer(start, rate, TRIED)["final"]["J"] for rate in RATES}
        peer = _peer(start, max(tried, key=lambda rate: tried[rate]), STEPS)
        generating = run_peer(TRL, SCRIPT, "--model", str(start), "--generate")
        fits = {rate: _fit(model, rate) for rate in RATES}
        for rate, fit in fits.items():
            lm.save_pretrained(saved, lm.finetuned(fit["posterior"]).model)
            fit["J"] = run_peer(TRL, SCRIPT, "--evaluate", str(saved), "--reference", str(start))["J"]
            print(f"rate {rate:g}: J = {fit['J']:.4f}", file=sys.stderr, flush=True)
        best = max(fits.values(), key=lambda fit: fit["J"])
        return _told(peer, tried, generating, best, model)


def _peer(start: Path, rate: float, steps: int) -> dict[str, Any]:
    command = ("--model", str(start), "--trainer", "rloo", "--rate", f"{rate:g}", "--steps", str(steps))
    made: dict[str, Any] = run_peer(TRL, SCRIPT, *command)
    return made


def _fit(model: CausalLM, rate: float) -> dict[str, Any]:
    """Fit, and record the time of each chunk of steps."""
    jax.clear_caches()
    rows: list[tuple[float, int]] = []
    began = time.perf_counter()
    posterior = bayesrl.fit(
        jax.random.key(0),
        policy_of(model),
        beta=BETA,
        guide=lm.FullParameters(),
        optimizer=optax.adam(optax.cosine_decay_schedule(2 * rate, OWN_STEPS), b1=0.8, b2=0.95),
        num_steps=OWN_STEPS,
        callback=lambda row: rows.append((time.perf_counter() - began, int(row["step"]))) and None,
        progress=False,
    )
    return {"posterior": posterior, "rows": rows, "rate": rate}


def _told(
    peer: dict[str, Any], tried: dict[float, float], generating: dict[str, Any], fit: dict[str, Any], model: Any
) -> str:
    rows = fit["rows"]
    step = float(np.median(np.diff([seconds for seconds, _ in rows])) / np.median(np.diff([done for _, done in rows])))
    (first, done), (last, _) = rows[0], rows[-1]
    reached = fit["J"] >= peer["final"]["J"]
    with_compiling, running = (last, last - first + step * done) if reached else (float("nan"), float("nan"))
    written, arithmetic = _generation(model), _arithmetic()
    share = _lora_share()
    seconds = {"step": peer["step_seconds"], "all": peer["train_seconds"], "generate": generating["generate_seconds"]}
    lines = [
        ["a step", f"{1e3 * seconds['step']:.0f} ms", f"{1e3 * step:.0f} ms", f"{seconds['step'] / step:.1f}×"],
        [f"J after {STEPS} and {OWN_STEPS} steps", f"{peer['final']['J']:.3f}", f"{fit['J']:.3f}", ""],
        [
            f"time to J of at least {peer['final']['J']:.3f}, compilation included",
            f"{seconds['all']:.1f} s",
            f"{with_compiling:.1f} s",
            f"{seconds['all'] / with_compiling:.1f}×",
        ],
        ["the same without compilation", "", f"{running:.1f} s", f"{seconds['all'] / running:.1f}×"],
        [
            "generation of 64 × 16 tokens",
            f"{1e3 * seconds['generate']:.0f} ms",
            f"{1e3 * written:.0f} ms",
            f"{seconds['generate'] / written:.1f}×",
        ],
        ["arithmetic of a step", "", f"{1e3 * arithmetic:.0f} ms", f"{step / arithmetic:.2f}× in all"],
    ]
    rates = ", ".join(f"{rate:g}: {value:.3f}" for rate, value in tried.items())
    words = [
        target(
            "at least 3× the steps a second of TRL's RLOO",
            met=seconds["step"] / step >= 3,
            why_not=f"its matrix products alone are {arithmetic / step:.0%} of a step; the rest is attention, norms, "
            "activations and drawing",
        ),
        target(
            "at most 1/6 of its time to its J after 300 steps, compilation apart",
            met=seconds["all"] / running >= 6,
            why_not=f"no rate, momentum or baseline tried gets there in far fewer than {OWN_STEPS} steps, and each of "
            f"them is {seconds['step'] / step:.1f}× as fast",
        ),
        target(
            "the same with compilation",
            met=seconds["all"] / with_compiling >= 6,
            why_not=f"to trace and compile the programs takes {with_compiling - running:.0f} s, however few the steps",
        ),
        target(
            "generation at least 3× transformers'",
            met=seconds["generate"] / written >= 3,
            why_not="neither other layouts of the cache and the weights, nor other kernels of XLA's for products or "
            "attention, are faster by more than the noise",
        ),
        target("a step at most 2.5× its arithmetic", met=step / arithmetic <= 2.5),
        target("LoRA of rank 8 on a 124M GPT-2: optimiser and gradient under 5% of the model", met=share < 0.05),
    ]
    return "\n\n".join(
        [
            table(["", "TRL, transformers", "bayesrl", "ratio"], lines),
            f"TRL after {TRIED} steps, J by rate: {rates}. Our rate: {fit['rate']:g}. LoRA's share: {share:.1%}.",
            (__doc__ or "").partition("\n\n")[2].strip(),
            *words,
        ]
    )


def _median(call: Callable[[], Any]) -> float:
    jax.block_until_ready(call())
    found = []
    for _ in range(REPEATS):
        began = time.perf_counter()
        jax.block_until_ready(call())
        found.append(time.perf_counter() - began)
    return float(np.median(found))


def _generation(model: Any) -> float:
    policy = policy_of(model)

    def write(key: jax.Array) -> jax.Array:
        answers = policy.distribution(model, policy.prompts.tokens, policy.prompts.mask)
        return jax.vmap(answers.sample)(jax.random.split(key, COMPLETIONS))

    run_compiled, key = trace_once(write), jax.random.key(0)
    return _median(lambda: run_compiled(key))


def _arithmetic() -> float:
    """Time the matrix products of a step: generation token by token, then two forward passes and a backward one."""
    width = CONFIG.width
    shapes = [(width, 3 * width), (width, width), (width, 4 * width), (4 * width, width)] * CONFIG.depth
    shapes.append((width, CONFIG.vocab_size))
    generation = sum(_product(COMPLETIONS, *shape) for shape in shapes) * LENGTH
    scoring = sum(_product(COMPLETIONS * LENGTH, *shape) for shape in shapes)
    return generation + 4 * scoring


def _product(rows: int, wide: int, out: int, times: int = 100) -> float:
    x, weight = jnp.ones((rows, wide)), jnp.ones((wide, out))

    @jax.jit
    def many(x: jax.Array) -> jax.Array:
        return lax.fori_loop(0, times, lambda _, x: x.at[:, :1].add(1e-9 * (x @ weight)[:, :1]), x)

    return _median(lambda: many(x)) / times


def _lora_share() -> float:
    """Compare the bytes of LoRA's gradient and Adam's moments with those of a GPT-2 of 124M parameters, as a share."""
    config = lm.GPT2Config(vocab_size=50257, max_length=1024, width=768, depth=12, heads=12)

    def declared() -> dict[str, Any]:
        model = lm.GPT2.init(jax.random.key(0), config)
        with handlers.seed(rng_seed=0), handlers.trace() as trace:
            lm.LoRA(RANK).declare(jax.random.key(0), model)
        own = {name: site["value"] for name, site in trace.items() if site["type"] == "param"}
        return {"model": model, "trained": own}

    shapes = jax.eval_shape(declared)
    size = {
        name: sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(part)) for name, part in shapes.items()
    }
    return 3 * size["trained"] / size["model"]

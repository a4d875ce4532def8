"""Tokens per second of language models in bfloat16: generation, and the gradient of LoRA, with their shares of peak."""

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from numpyro import handlers

from bayesrl import lm
from bayesrl.compilation.jit import trace_once
from bayesrl.lm.transformers.base import CausalLM

PEAKS = {"H100": 989e12, "H200": 989e12, "A100": 312e12}
"""Dense bfloat16 products, flop/s, from the makers' data sheets."""

REPEATS = 3
RANK = 8


class Shape(NamedTuple):
    """A model, its number of sequences side by side, and the lengths of prompts and texts."""

    name: str
    model: Callable[[], CausalLM]
    sequences: int
    prompt: int
    written: int


def _gpt2(depth: int, width: int, heads: int, vocabulary: int) -> Callable[[], CausalLM]:
    config = lm.GPT2Config(vocab_size=vocabulary, max_length=512, width=width, depth=depth, heads=heads)
    return lambda: lm.GPT2.init(jax.random.key(0), config, dtype=jnp.bfloat16)


def _llama() -> CausalLM:
    config = lm.LlamaConfig(
        vocab_size=128256, max_length=512, width=2048, depth=16, heads=32, kv_heads=8, inner=8192, tied=True
    )
    return lm.Llama.init(jax.random.key(0), config, dtype=jnp.bfloat16)


LARGE = (
    Shape("GPT-2, 124M", _gpt2(12, 768, 12, 50257), 256, 64, 128),
    Shape("Llama, 1.2B", _llama, 128, 64, 128),
)
SMALL = (Shape("GPT-2, 4 × 256", _gpt2(4, 256, 8, 1024), 32, 16, 32),)


def rows(device: Any) -> list[list[str]]:
    """Measure every shape on a device: large ones on an accelerator, a small one on a CPU."""
    peak = next((speed for name, speed in PEAKS.items() if name in device.device_kind), None) or _measured_peak()
    return [_row(shape, peak) for shape in (SMALL if device.platform == "cpu" else LARGE)]


def _row(shape: Shape, peak: float) -> list[str]:
    model = shape.model()
    size = sum(leaf.size for leaf in jax.tree.leaves(eqx.filter(model, eqx.is_inexact_array)))
    prompt = jnp.ones((1, shape.prompt), jnp.int32)
    answers = lm.CausalLMDistribution(model, prompt, num_steps=shape.written)

    def write(key: jax.Array) -> jax.Array:
        return jax.vmap(answers.sample)(jax.random.split(key, shape.sequences))

    written = trace_once(write)
    tokens = written(jax.random.key(0))
    seconds = _median(lambda: written(jax.random.key(1)))
    count = shape.sequences * shape.written
    updating = _median(_update(model, prompt, tokens, shape.written))
    return [
        shape.name,
        f"{size / 1e6:,.0f}M",
        f"{count / seconds:,.0f}",
        f"{2 * size * count / seconds / peak:.1%}",
        f"{count / updating:,.0f}",
        f"{4 * size * count / updating / peak:.1%}",
    ]


def _update(model: CausalLM, prompt: jax.Array, tokens: jax.Array, written: int) -> Callable[[], Any]:
    """Make a call that takes the gradient of the log-probability of written tokens in LoRA's parameters."""
    adapted = lm.LoRA(RANK)

    def declare() -> CausalLM:
        return adapted.declare(jax.random.key(0), model)

    with handlers.seed(rng_seed=0), handlers.trace() as trace:
        declare()
    params = {name: site["value"] for name, site in trace.items() if site["type"] == "param"}

    @trace_once
    def gradient(params: dict[str, jax.Array]) -> dict[str, jax.Array]:
        def score(params: dict[str, jax.Array]) -> jax.Array:
            own = handlers.seed(handlers.substitute(declare, data=params), rng_seed=0)()
            answers = lm.CausalLMDistribution(own, prompt, num_steps=written)
            return lax.map(lambda x: answers.log_prob(x).sum(), tokens, batch_size=16).sum()

        found: dict[str, jax.Array] = jax.grad(score)(params)
        return found

    return lambda: gradient(params)


def _measured_peak() -> float:
    """Time a large product in bfloat16, to stand for the best that this machine can do; flop/s."""
    x = jnp.ones((1024, 1024), jnp.bfloat16)
    product = jax.jit(lambda x: x @ x)
    return 2 * 1024**3 / _median(lambda: product(x))


def _median(call: Callable[[], Any]) -> float:
    jax.block_until_ready(call())
    found = []
    for _ in range(REPEATS):
        began = time.perf_counter()
        jax.block_until_ready(call())
        found.append(time.perf_counter() - began)
    return float(np.median(found))

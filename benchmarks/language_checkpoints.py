"""Language models that were fitted, saved, and loaded by transformers: the largest difference of their logits.

Every family begins with random weights, is fitted by LoRA of rank 4 for 30 steps, merged, saved by `save_pretrained`,
and read by transformers in an environment of its own, which must find every tensor and none too many. The change is
what the fit did to the logits, the difference what is left between the two libraries.
"""

import tempfile
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

import bayesrl
from bayesrl import lm
from bayesrl.lm import rewards
from bayesrl.lm.transformers.base import CausalLM
from bayesrl.lm.transformers.llama_config import Rope
from benchmarks.peers import TRL, run_peer
from benchmarks.results import table, target

SHAPE = {"vocab_size": 64, "max_length": 64, "width": 32, "depth": 2, "heads": 4, "initializer_range": 0.2}
GATED: dict[str, Any] = {**SHAPE, "inner": 48, "kv_heads": 2}
STRETCH = Rope(theta=500.0, kind="llama3", factor=4.0, low=1.0, high=4.0, original=16)
ALLOWED = 1e-4


def run() -> str:
    """Fit, save, load elsewhere and compare."""
    rows, gaps = [], []
    with tempfile.TemporaryDirectory() as root:
        ours = {name: _fitted(Path(root) / name, model) for name, model in _models().items()}
        kinds = run_peer(TRL, "peer_transformers.py", root)
        for name, (before, after) in ours.items():
            theirs = np.load(Path(root) / name / "theirs.npy")
            gaps.append(float(np.abs(theirs - after).max()))
            rows.append([name, kinds[name], f"{np.abs(after - before).max():.2f}", f"{gaps[-1]:.1e}"])
    words = target(f"logits equal to {ALLOWED:g} for every family", met=max(gaps) <= ALLOWED)
    said = (__doc__ or "").partition("\n\n")[2].strip()
    return "\n\n".join([table(["family", "in transformers", "change", "difference"], rows), said, words])


def _models() -> dict[str, CausalLM]:
    key = jax.random.key(0)
    configs = {
        "llama": lm.LlamaConfig(**GATED, rope=STRETCH),
        "mistral": lm.LlamaConfig(**GATED, model_type="mistral"),
        "qwen2": lm.LlamaConfig(**GATED, model_type="qwen2", attention_bias=True),
        "qwen3": lm.LlamaConfig(**GATED, model_type="qwen3", head_dim=16, query_key_norm=True),
        "smollm": lm.LlamaConfig(**GATED, tied=True),
    }
    return {
        "gpt2": lm.GPT2.init(key, lm.GPT2Config(**SHAPE)),
        **{name: lm.Llama.init(key, config) for name, config in configs.items()},
    }


def _fitted(folder: Path, model: CausalLM) -> tuple[np.ndarray, np.ndarray]:
    """Fit and save a model; return its logits before and after, [texts, tokens, vocabulary]."""
    policy = lm.policy(
        model,
        np.full((1, 2), 3, np.int32),
        reward=rewards.token_reward(lambda x, mask: 1.0 * (x == 5).sum()),
        max_new_tokens=6,
    )
    posterior = bayesrl.fit(jax.random.key(1), policy, beta=0.5, guide=lm.LoRA(4), num_steps=30, progress=False)
    made: Any = lm.finetuned(posterior).model
    lm.save_pretrained(folder, made)
    tokens = np.random.default_rng(0).integers(0, SHAPE["vocab_size"], (4, 40))
    np.save(folder / "tokens.npy", tokens)
    logits = eqx.filter_jit(lambda one, rows: jax.vmap(one)(rows))
    return np.asarray(logits(model, jnp.asarray(tokens))), np.asarray(logits(made, jnp.asarray(tokens)))

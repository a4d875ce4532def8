"""Llama and its relatives: rotary positions, norms of the mean square, gated feeding, shared keys."""

from collections.abc import Iterator

import equinox as eqx

from bayesrl.lm.transformers.checkpoint_names import CheckpointTensor, affine
from bayesrl.lm.transformers.decoder import Decoder
from bayesrl.lm.transformers.layers.block import POST_NORMS, PRE_NORMS
from bayesrl.lm.transformers.llama_config import LlamaConfig


class Llama(Decoder):
    """Llama, Mistral, Mixtral, Qwen2, Qwen3, Gemma, Phi-3, OLMo 2, SmolLM and GPT-NeoX: what differs is in `config`.

        x = token[t];  x += attention(norm(x)), x += W₂(silu(W₁·norm(x))·W₃·norm(x)) per block;  logits = H·norm(x)

    Example:
        >>> import equinox as eqx, jax, jax.numpy as jnp
        >>> from bayesrl.lm import LlamaConfig
        >>> config = LlamaConfig(vocab_size=7, max_length=8, width=4, depth=1, heads=2, kv_heads=1, inner=8)
        >>> model = Llama.init(jax.random.key(0), config)
        >>> eqx.filter_jit(model)(jnp.array([1, 2, 3])).shape
        (3, 7)

    References:
        Touvron et al. (2023), "LLaMA", section 2.2; Jiang et al. (2023), "Mistral 7B"; Yang et al. (2025), "Qwen3
        technical report", section 2; Gemma Team (2024), "Gemma 2", section 2; OLMo Team (2024), "2 OLMo 2 furious",
        section 2; Black et al. (2022), "GPT-NeoX-20B", section 2.
    """

    config: LlamaConfig = eqx.field(static=True)

    @classmethod
    def tensors(cls, config: LlamaConfig) -> Iterator[CheckpointTensor]:
        """List the arrays with their names in a checkpoint."""
        if config.model_type == "gpt_neox":
            yield from _neox(config)
            return
        traits = config.traits
        yield CheckpointTensor("model.embed_tokens.weight", ".token.weight")
        for layer in range(config.depth):
            name, path = f"model.layers.{layer}", f".blocks[{layer}]"
            for told, ours in _NORMS[traits.norms].items():
                yield CheckpointTensor(f"{name}.{told}.weight", f"{path}.{ours}.weight")
            parts = (("qkv_proj", "mix"),) if traits.joined else _PARTS
            for part, ours in parts:
                yield from affine(f"{name}.self_attn.{part}", f"{path}.{ours}", bias=config.attention_bias)
            yield from affine(f"{name}.self_attn.o_proj", f"{path}.output", bias=config.output_bias)
            if config.query_key_norm:
                yield CheckpointTensor(f"{name}.self_attn.q_norm.weight", f"{path}.query_norm.weight")
                yield CheckpointTensor(f"{name}.self_attn.k_norm.weight", f"{path}.key_norm.weight")
            yield from _feeding(config, name, path)
        yield CheckpointTensor("model.norm.weight", ".norm.weight")
        if not config.tied:
            yield CheckpointTensor("lm_head.weight", ".head.weight")


_PARTS = (("q_proj", "query"), ("k_proj", "key"), ("v_proj", "value"))
# One name, two places: in Llama, post_attention_layernorm is the norm before feeding; with POST_NORMS it is the norm
# of what attention returns.
_NORMS = {
    PRE_NORMS: {"input_layernorm": "before_attention", "post_attention_layernorm": "before_feeding"},
    POST_NORMS: {"post_attention_layernorm": "after_attention", "post_feedforward_layernorm": "after_feeding"},
    (*PRE_NORMS, *POST_NORMS): {
        "input_layernorm": "before_attention",
        "post_attention_layernorm": "after_attention",
        "pre_feedforward_layernorm": "before_feeding",
        "post_feedforward_layernorm": "after_feeding",
    },
}


def _feeding(config: LlamaConfig, name: str, path: str) -> Iterator[CheckpointTensor]:
    """List the arrays of a feed-forward layer, or of several experts."""
    if config.experts:
        yield CheckpointTensor(f"{name}.block_sparse_moe.gate.weight", f"{path}.experts.router.weight")
        for each in range(config.experts):
            for part, ours in (("w1", "gate"), ("w2", "narrow"), ("w3", "widen")):
                told = f"{name}.block_sparse_moe.experts.{each}.{part}.weight"
                yield CheckpointTensor(told, f"{path}.experts.each[{each}].{ours}.weight")
        return
    joined = (("gate_up_proj", "widen"), ("down_proj", "narrow"))
    apart = (("gate_proj", "gate"), ("up_proj", "widen"), ("down_proj", "narrow"))
    for part, ours in joined if config.traits.gated == "joined" else apart:
        yield from affine(f"{name}.mlp.{part}", f"{path}.{ours}", bias=config.feeding_bias)


def _neox(config: LlamaConfig) -> Iterator[CheckpointTensor]:
    """List the arrays of a GPT-NeoX."""
    yield CheckpointTensor("gpt_neox.embed_in.weight", ".token.weight")
    for layer in range(config.depth):
        name, path = f"gpt_neox.layers.{layer}", f".blocks[{layer}]"
        yield from affine(f"{name}.input_layernorm", f"{path}.before_attention")
        yield from affine(f"{name}.post_attention_layernorm", f"{path}.before_feeding")
        yield from affine(f"{name}.attention.query_key_value", f"{path}.mix", bias=config.attention_bias)
        yield from affine(f"{name}.attention.dense", f"{path}.output", bias=config.output_bias)
        yield from affine(f"{name}.mlp.dense_h_to_4h", f"{path}.widen")
        yield from affine(f"{name}.mlp.dense_4h_to_h", f"{path}.narrow")
    yield from affine("gpt_neox.final_layer_norm", ".norm")
    if not config.tied:
        yield CheckpointTensor("embed_out.weight", ".head.weight")

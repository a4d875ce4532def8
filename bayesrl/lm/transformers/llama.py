"""Llama and its relatives (Mistral, Qwen2, Qwen3, SmolLM): rotary positions, RMS norms, gated feeding, shared keys."""

from collections.abc import Iterator
from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int

from bayesrl.lm.transformers.caching import Cache, Reach, attend, reach
from bayesrl.lm.transformers.causal import CausalLM, check_capacity
from bayesrl.lm.transformers.layers import Embedding, Linear, RMSNorm
from bayesrl.lm.transformers.llama_config import LlamaConfig
from bayesrl.lm.transformers.stored import Stored, affine
from bayesrl.typing import PRNGKey


def rotated(x: Float[Array, "n heads head_dim"], angles: Float[Array, "n half"]) -> Float[Array, "n heads head_dim"]:
    """Turn each pair (x_i, x_{i + head_dim/2}) by its angle, in float32.

    References:
        Su et al. (2021), "RoFormer", equation 34, with the pairs laid out in halves as Llama's checkpoints have them.
    """
    first, second = jnp.split(x.astype(angles.dtype), 2, axis=-1)
    cosine, sine = jnp.cos(angles)[:, None], jnp.sin(angles)[:, None]
    turned = jnp.concatenate([first * cosine - second * sine, second * cosine + first * sine], -1)
    return turned.astype(x.dtype)


class LlamaBlock(eqx.Module):
    """Attention and a gated feed-forward layer, each added to the residual stream."""

    before_attention: RMSNorm
    query: Linear
    key: Linear
    value: Linear
    output: Linear
    query_norm: RMSNorm | None
    key_norm: RMSNorm | None
    before_feeding: RMSNorm
    gate: Linear
    widen: Linear
    narrow: Linear

    @classmethod
    def random(cls, key: PRNGKey, config: LlamaConfig, dtype: Any) -> "LlamaBlock":
        """Draw the weights; those that write to the residual stream are smaller by √(2·depth)."""
        keys = iter(jax.random.split(key, 7))
        scale = config.initializer_range
        written = scale / (2 * config.depth) ** 0.5
        width, inner, bias = config.width, config.inner, config.attention_bias
        wide, shared = config.heads * config.head_dim, config.kv_heads * config.head_dim

        def linear(width: int, out: int, scale: float, *, bias: bool) -> Linear:
            return Linear.random(next(keys), width, out, scale=scale, bias=bias, dtype=dtype)

        def norm(width: int) -> RMSNorm:
            return RMSNorm.fresh(width, config.epsilon, dtype)

        return cls(
            before_attention=norm(width),
            query=linear(width, wide, scale, bias=bias),
            key=linear(width, shared, scale, bias=bias),
            value=linear(width, shared, scale, bias=bias),
            output=linear(wide, width, written, bias=config.output_bias),
            query_norm=norm(config.head_dim) if config.query_key_norm else None,
            key_norm=norm(config.head_dim) if config.query_key_norm else None,
            before_feeding=norm(width),
            gate=linear(width, inner, scale, bias=config.feeding_bias),
            widen=linear(width, inner, scale, bias=config.feeding_bias),
            narrow=linear(inner, width, written, bias=config.feeding_bias),
        )

    def __call__(
        self, x: Float[Array, "n width"], layer: int, where: Reach, angles: Float[Array, "n half"], cache: Cache
    ) -> tuple[Float[Array, "n width"], Array, Array]:
        """Give the residual stream after the block, and the layer's keys and values."""
        heads = (x.shape[0], -1, 2 * angles.shape[1])
        y = self.before_attention(x)
        query, key, value = (part(y).reshape(heads) for part in (self.query, self.key, self.value))
        if self.query_norm is not None and self.key_norm is not None:
            query, key = self.query_norm(query), self.key_norm(key)
        out, keys, values = attend(rotated(query, angles), rotated(key, angles), value, cache, layer, where.mask)
        x = x + self.output(out)
        y = self.before_feeding(x)
        return x + self.narrow(jax.nn.silu(self.gate(y)) * self.widen(y)), keys, values


class Llama(CausalLM):
    """Llama, Mistral, Qwen2, Qwen3 and SmolLM.

        x = token[t];  x += attention(norm(x)), x += W₂(silu(W₁·norm(x))·W₃·norm(x)) per block;  logits = H·norm(x)

    Example:
        >>> import equinox as eqx, jax, jax.numpy as jnp
        >>> from bayesrl.lm.transformers import LlamaConfig
        >>> config = LlamaConfig(vocab_size=7, max_length=8, width=4, depth=1, heads=2, kv_heads=1, inner=8)
        >>> model = Llama.random(jax.random.key(0), config)
        >>> eqx.filter_jit(model)(jnp.array([1, 2, 3])).shape
        (3, 7)

    References:
        Touvron et al. (2023), "LLaMA", section 2.2; Jiang et al. (2023), "Mistral 7B"; Yang et al. (2025), "Qwen3
        technical report", section 2.
    """

    config: LlamaConfig = eqx.field(static=True)
    token: Embedding
    blocks: tuple[LlamaBlock, ...]
    norm: RMSNorm
    head: Linear | None
    PREFIX: ClassVar[str] = "model."

    @classmethod
    def random(cls, key: PRNGKey, config: LlamaConfig, *, dtype: Any = jnp.float32) -> "Llama":
        """Make a model with random weights; the key is consumed.

        Args:
            key: consumed.
            config: the shape.
            dtype: of all weights: float32 or bfloat16.
        """
        keys = jax.random.split(key, config.depth + 2)
        make = {"scale": config.initializer_range, "dtype": dtype}
        return cls(
            config,
            Embedding.random(keys[0], config.vocab_size, config.width, **make),
            tuple(LlamaBlock.random(key, config, dtype) for key in keys[2:]),
            RMSNorm.fresh(config.width, config.epsilon, dtype),
            None if config.tied else Linear.random(keys[1], config.width, config.vocab_size, bias=False, **make),
        )

    @classmethod
    def tensors(cls, config: LlamaConfig) -> Iterator[Stored]:
        """List the arrays with their names in a checkpoint."""
        yield Stored("model.embed_tokens.weight", ".token.weight")
        for layer in range(config.depth):
            name, path = f"model.layers.{layer}", f".blocks[{layer}]"
            yield Stored(f"{name}.input_layernorm.weight", f"{path}.before_attention.weight")
            for part, ours in (("q_proj", "query"), ("k_proj", "key"), ("v_proj", "value")):
                yield from affine(f"{name}.self_attn.{part}", f"{path}.{ours}", bias=config.attention_bias)
            yield from affine(f"{name}.self_attn.o_proj", f"{path}.output", bias=config.output_bias)
            if config.query_key_norm:
                yield Stored(f"{name}.self_attn.q_norm.weight", f"{path}.query_norm.weight")
                yield Stored(f"{name}.self_attn.k_norm.weight", f"{path}.key_norm.weight")
            yield Stored(f"{name}.post_attention_layernorm.weight", f"{path}.before_feeding.weight")
            for part, ours in (("gate_proj", "gate"), ("up_proj", "widen"), ("down_proj", "narrow")):
                yield from affine(f"{name}.mlp.{part}", f"{path}.{ours}", bias=config.feeding_bias)
        yield Stored("model.norm.weight", ".norm.weight")
        if not config.tied:
            yield Stored("lm_head.weight", ".head.weight")

    def start(self, capacity: int) -> Cache:
        """Make an empty cache; see `CausalLM.start`."""
        config = self.config
        check_capacity(capacity, config)
        return Cache.empty(config.depth, capacity, config.kv_heads, config.head_dim, self.token.weight.dtype)

    def extend(
        self, tokens: Int[Array, "n"], real: Bool[Array, "n"], cache: Cache
    ) -> tuple[Float[Array, "n width"], Cache]:
        """Feed n tokens; see `CausalLM.extend`."""
        where = reach(real, cache)
        turns = jnp.asarray(self.config.rope.frequencies(self.config.head_dim), jnp.float32)
        angles = where.positions[:, None].astype(turns.dtype) * turns
        x = self.token(tokens)
        keys, values = [], []
        for layer, block in enumerate(self.blocks):
            x, key, value = block(x, layer, where, angles, cache)
            keys.append(key)
            values.append(value)
        return self.norm(x), where.after(cache, keys, values)

    def logits(self, hidden: Float[Array, "*n width"]) -> Float[Array, "*n vocab"]:
        """Give the logits in float32; see `CausalLM.logits`."""
        return (self.token if self.head is None else self.head).scores(hidden)

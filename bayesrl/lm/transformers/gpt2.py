"""GPT-2: learned positions, norms before each part, one table for tokens and logits."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int

from bayesrl.lm.transformers.caching import Cache, Reach, attend, reach
from bayesrl.lm.transformers.causal import CausalLM, Config, check_capacity
from bayesrl.lm.transformers.layers import Embedding, LayerNorm, Linear, activation
from bayesrl.lm.transformers.stored import Stored, affine, optional, refuse, required
from bayesrl.typing import PRNGKey


@dataclass(frozen=True, kw_only=True)
class GPT2Config(Config):
    """The shape of a GPT-2.

    Args:
        vocab_size: how many tokens there are.
        max_length: context length.
        width: length of the residual stream.
        depth: how many blocks.
        heads: attention heads per block; divides `width`.
        inner: width of the feed-forward layer; None is 4·width.
        activation: its activation, by the name in transformers.
        epsilon: of the norms.
        tied: whether the logits use the table of the tokens.
        initializer_range: standard deviation of random weights.
        model_type: the family.

    Raises:
        LanguageModelError: the numbers do not fit together, or config.json asks for what is not implemented.
    """

    vocab_size: int = 50257
    max_length: int = 1024
    width: int = 768
    depth: int = 12
    heads: int = 12
    inner: int | None = None
    activation: str = "gelu_new"
    epsilon: float = 1e-5
    tied: bool = True
    initializer_range: float = 0.02
    model_type: str = "gpt2"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_heads()
        activation(self.activation)

    @classmethod
    def from_json(cls, json: Mapping[str, Any]) -> "GPT2Config":
        """Read what transformers writes as config.json."""
        refuse(json, "add_cross_attention", False)
        refuse(json, "scale_attn_weights", True)
        refuse(json, "scale_attn_by_inverse_layer_idx", False)
        return cls(
            vocab_size=required(json, "vocab_size"),
            max_length=required(json, "n_positions"),
            width=required(json, "n_embd"),
            depth=required(json, "n_layer"),
            heads=required(json, "n_head"),
            inner=json.get("n_inner"),
            activation=optional(json, "activation_function", "gelu_new"),
            epsilon=optional(json, "layer_norm_epsilon", 1e-5),
            tied=optional(json, "tie_word_embeddings", True),
            initializer_range=optional(json, "initializer_range", 0.02),
        )

    def to_json(self) -> dict[str, Any]:
        """Give what transformers reads as config.json."""
        return {
            "model_type": self.model_type,
            "architectures": ["GPT2LMHeadModel"],
            "vocab_size": self.vocab_size,
            "n_positions": self.max_length,
            "n_ctx": self.max_length,
            "n_embd": self.width,
            "n_layer": self.depth,
            "n_head": self.heads,
            "n_inner": self.inner,
            "activation_function": self.activation,
            "layer_norm_epsilon": self.epsilon,
            "tie_word_embeddings": self.tied,
            "initializer_range": self.initializer_range,
        }


class GPT2Block(eqx.Module):
    """Attention and a feed-forward layer, each added to the residual stream."""

    before_attention: LayerNorm
    mix: Linear
    output: Linear
    before_feeding: LayerNorm
    widen: Linear
    narrow: Linear

    @classmethod
    def random(cls, key: PRNGKey, config: GPT2Config, dtype: Any) -> "GPT2Block":
        """Draw the weights; those that write to the residual stream are smaller by √(2·depth)."""
        keys = jax.random.split(key, 4)
        width, inner = config.width, config.inner or 4 * config.width
        scale = config.initializer_range
        written = scale / (2 * config.depth) ** 0.5
        return cls(
            LayerNorm.fresh(width, config.epsilon, dtype),
            Linear.random(keys[0], width, 3 * width, scale=scale, bias=True, dtype=dtype),
            Linear.random(keys[1], width, width, scale=written, bias=True, dtype=dtype),
            LayerNorm.fresh(width, config.epsilon, dtype),
            Linear.random(keys[2], width, inner, scale=scale, bias=True, dtype=dtype),
            Linear.random(keys[3], inner, width, scale=written, bias=True, dtype=dtype),
        )

    def __call__(
        self, x: Float[Array, "n width"], layer: int, where: Reach, cache: Cache, config: GPT2Config
    ) -> tuple[Float[Array, "n width"], Array, Array]:
        """Give the residual stream after the block, and the layer's keys and values."""
        mixed = self.mix(self.before_attention(x)).reshape(x.shape[0], 3, config.heads, -1)
        out, keys, values = attend(mixed[:, 0], mixed[:, 1], mixed[:, 2], cache, layer, where.mask)
        x = x + self.output(out)
        return x + self.narrow(activation(config.activation)(self.widen(self.before_feeding(x)))), keys, values


class GPT2(CausalLM):
    """GPT-2.

        x = token[t] + position[i];  x += attention(norm(x)), x += feed(norm(x)) per block;  logits = token·norm(x)

    Example:
        >>> import equinox as eqx, jax, jax.numpy as jnp
        >>> config = GPT2Config(vocab_size=7, max_length=8, width=4, depth=1, heads=2)
        >>> model = GPT2.random(jax.random.key(0), config)
        >>> eqx.filter_jit(model)(jnp.array([1, 2, 3])).shape
        (3, 7)

    References:
        Radford et al. (2019), "Language models are unsupervised multitask learners", section 2.3.
    """

    config: GPT2Config = eqx.field(static=True)
    token: Embedding
    position: Embedding
    blocks: tuple[GPT2Block, ...]
    norm: LayerNorm
    head: Linear | None
    PREFIX: ClassVar[str] = "transformer."

    @classmethod
    def random(cls, key: PRNGKey, config: GPT2Config, *, dtype: Any = jnp.float32) -> "GPT2":
        """Make a model with random weights; the key is consumed.

        Args:
            key: consumed.
            config: the shape.
            dtype: of all weights: float32 or bfloat16.
        """
        keys = jax.random.split(key, config.depth + 3)
        scale = config.initializer_range
        make = {"scale": scale, "dtype": dtype}
        return cls(
            config,
            Embedding.random(keys[0], config.vocab_size, config.width, **make),
            Embedding.random(keys[1], config.max_length, config.width, **make),
            tuple(GPT2Block.random(key, config, dtype) for key in keys[3:]),
            LayerNorm.fresh(config.width, config.epsilon, dtype),
            None if config.tied else Linear.random(keys[2], config.width, config.vocab_size, bias=False, **make),
        )

    @classmethod
    def tensors(cls, config: GPT2Config) -> Iterator[Stored]:
        """List the arrays; GPT-2's checkpoints hold the weights of linear maps transposed."""
        yield Stored("transformer.wte.weight", ".token.weight")
        yield Stored("transformer.wpe.weight", ".position.weight")
        for layer in range(config.depth):
            name, path = f"transformer.h.{layer}", f".blocks[{layer}]"
            yield from affine(f"{name}.ln_1", f"{path}.before_attention")
            yield from affine(f"{name}.attn.c_attn", f"{path}.mix", transposed=True)
            yield from affine(f"{name}.attn.c_proj", f"{path}.output", transposed=True)
            yield from affine(f"{name}.ln_2", f"{path}.before_feeding")
            yield from affine(f"{name}.mlp.c_fc", f"{path}.widen", transposed=True)
            yield from affine(f"{name}.mlp.c_proj", f"{path}.narrow", transposed=True)
        yield from affine("transformer.ln_f", ".norm")
        if not config.tied:
            yield Stored("lm_head.weight", ".head.weight")

    def start(self, capacity: int) -> Cache:
        """Make an empty cache; see `CausalLM.start`."""
        config = self.config
        heads, dtype = config.heads, self.token.weight.dtype
        return Cache.empty(config.depth, check_capacity(capacity, config), heads, config.width // heads, dtype)

    def extend(
        self, tokens: Int[Array, "n"], real: Bool[Array, "n"], cache: Cache
    ) -> tuple[Float[Array, "n width"], Cache]:
        """Feed n tokens; see `CausalLM.extend`."""
        where = reach(real, cache)
        x = self.token(tokens) + self.position(where.positions)
        keys, values = [], []
        for layer, block in enumerate(self.blocks):
            x, key, value = block(x, layer, where, cache, self.config)
            keys.append(key)
            values.append(value)
        return self.norm(x), where.after(cache, keys, values)

    def logits(self, hidden: Float[Array, "*n width"]) -> Float[Array, "*n vocab"]:
        """Give the logits in float32; see `CausalLM.logits`."""
        return (self.token if self.head is None else self.head).scores(hidden)

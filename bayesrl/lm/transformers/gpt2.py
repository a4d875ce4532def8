"""GPT-2: learned positions, norms before each part, one table for tokens and logits."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import equinox as eqx

from bayesrl.arguments import checked
from bayesrl.errors import LanguageModelError
from bayesrl.lm.transformers.checkpoint_names import CheckpointTensor, affine, refuse, required
from bayesrl.lm.transformers.decoder import Decoder, DecoderConfig
from bayesrl.lm.transformers.config_json import with_defaults
from bayesrl.lm.transformers.layers.block import Layout
from bayesrl.lm.transformers.layers.layers import activation


@dataclass(frozen=True, kw_only=True)
class GPT2Config(DecoderConfig):
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
    @checked(LanguageModelError)
    def from_json(cls, json: Mapping[str, Any]) -> "GPT2Config":
        """Read what transformers writes as config.json."""
        json = with_defaults(json, ("gpt2",))
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
            activation=required(json, "activation_function"),
            epsilon=required(json, "layer_norm_epsilon"),
            tied=required(json, "tie_word_embeddings"),
            initializer_range=required(json, "initializer_range"),
        )

    @property
    def learned_positions(self) -> bool:
        """There is a table of positions."""
        return True

    def layout(self, layer: int) -> Layout:
        """Tell how a block computes."""
        return Layout(
            width=self.width,
            inner=self.inner or 4 * self.width,
            heads=self.heads,
            kv_heads=self.heads,
            head_dim=self.width // self.heads,
            activation=self.activation,
            epsilon=self.epsilon,
            norm="layer",
            joined="stacked",
            attention_bias=True,
            output_bias=True,
            feeding_bias=True,
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


class GPT2(Decoder):
    """GPT-2.

        x = token[t] + position[i];  x += attention(norm(x)), x += feed(norm(x)) per block;  logits = token·norm(x)

    Example:
        >>> import equinox as eqx, jax, jax.numpy as jnp
        >>> config = GPT2Config(vocab_size=7, max_length=8, width=4, depth=1, heads=2)
        >>> model = GPT2.init(jax.random.key(0), config)
        >>> eqx.filter_jit(model)(jnp.array([1, 2, 3])).shape
        (3, 7)

    References:
        Radford et al. (2019), "Language models are unsupervised multitask learners", section 2.3.
    """

    config: GPT2Config = eqx.field(static=True)

    @classmethod
    def tensors(cls, config: GPT2Config) -> Iterator[CheckpointTensor]:
        """List the arrays; GPT-2's checkpoints hold the weights of linear maps transposed."""
        yield CheckpointTensor("transformer.wte.weight", ".token.weight")
        yield CheckpointTensor("transformer.wpe.weight", ".position.weight")
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
            yield CheckpointTensor("lm_head.weight", ".head.weight")

"""GPT-2: learned positions, norms before each part, one table for tokens and logits."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import equinox as eqx

from bayesrl.arguments import checked
from bayesrl.errors import LanguageModelError
from bayesrl.lm.transformers.checkpoint_names import CheckpointTensor, affine
from bayesrl.lm.transformers.config_json import read_fields, refuse, with_defaults
from bayesrl.lm.transformers.decoder import Decoder, DecoderConfig
from bayesrl.lm.transformers.layers.block import Layout


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

    Example:
        >>> GPT2Config(width=8, depth=1, heads=2).max_length
        1024
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

    @classmethod
    @checked(LanguageModelError)
    def from_json(cls, json: Mapping[str, Any]) -> "GPT2Config":
        """Read the config.json of transformers."""
        json = with_defaults(json, ("gpt2",))
        refuse(json, "scale_attn_weights", True)
        refuse(json, "scale_attn_by_inverse_layer_idx", False)
        return cls(**read_fields(json, _NAMES), inner=json.get("n_inner"))

    @property
    def learned_positions(self) -> bool:
        """Whether there is a table of positions: always."""
        return True

    def layout(self, layer: int) -> Layout:
        """Describe how a block computes."""
        inner = self.inner or 4 * self.width
        biases = dict.fromkeys(("attention_bias", "output_bias", "feeding_bias"), True)
        return self._layout(layer, inner=inner, norm="layer", joined="stacked", **biases)

    def to_json(self) -> dict[str, Any]:
        """Return the config.json for transformers."""
        own = {"architectures": ["GPT2LMHeadModel"], "n_ctx": self.max_length, "n_inner": self.inner}
        return {"model_type": self.model_type, **own, **{key: getattr(self, name) for name, key in _NAMES.items()}}


_NAMES = {
    "vocab_size": "vocab_size",
    "max_length": "n_positions",
    "width": "n_embd",
    "depth": "n_layer",
    "heads": "n_head",
    "activation": "activation_function",
    "epsilon": "layer_norm_epsilon",
    "tied": "tie_word_embeddings",
    "initializer_range": "initializer_range",
}


class GPT2(Decoder):
    """GPT-2.

        x = token[t] + position[i];  x += attention(norm(x)), x += feed(norm(x)) per block;  logits = token·norm(x)

    Example:
        >>> import equinox as eqx, jax, jax.numpy as jnp
        >>> model = GPT2.init(jax.random.key(0), GPT2Config(vocab_size=7, max_length=8, width=4, depth=1, heads=2))
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

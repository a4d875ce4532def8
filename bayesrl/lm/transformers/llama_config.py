"""The shapes of Llama and its relatives, and how fast their positions turn."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from bayesrl.core.draws import is_count, is_number
from bayesrl.errors import LanguageModelError
from bayesrl.lm.transformers.causal import Config
from bayesrl.lm.transformers.stored import optional, refuse, required

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}


@dataclass(frozen=True)
class Rope:
    """How fast each pair of coordinates turns with the position.

        ω_i = theta^(−2i/head_dim),   stretched where a model was made for longer contexts

    Args:
        theta: the base.
        kind: "default"; "linear", ω/factor; or "llama3", which stretches only slow turns.
        factor: by how much.
        low: turns with more than `original`/low tokens per turn are stretched in full ("llama3").
        high: turns with fewer than `original`/high are left alone ("llama3").
        original: the context length before the stretch, in tokens ("llama3").

    References:
        Su et al. (2021), "RoFormer", equation 15; Dubey et al. (2024), "The Llama 3 herd of models", section 3.2.
    """

    theta: float = 10000.0
    kind: str = "default"
    factor: float = 1.0
    low: float = 1.0
    high: float = 4.0
    original: int = 8192

    def frequencies(self, head_dim: int) -> np.ndarray:
        """Give ω, in radians per token, [head_dim/2]."""
        turns = 1.0 / self.theta ** (np.arange(0, head_dim, 2) / head_dim)
        if self.kind == "linear":
            return turns / self.factor
        if self.kind == "llama3":
            # The share left alone is linear in 1/wavelength between the two bounds.
            share = (self.original * turns / (2 * math.pi) - self.low) / (self.high - self.low)
            share = np.clip(share, 0.0, 1.0)
            return share * turns + (1 - share) * turns / self.factor
        return turns

    @classmethod
    def from_json(cls, json: Mapping[str, Any]) -> "Rope":
        """Read `rope_parameters`, or `rope_theta` and `rope_scaling` of older files.

        Raises:
            LanguageModelError: another kind of stretch is asked for.
        """
        told = json.get("rope_parameters") or json.get("rope_scaling") or {}
        if not isinstance(told, Mapping):
            raise LanguageModelError(
                f"config.json sets rope_scaling={told!r}; it must be null, or name a rope_type with its factor"
            )
        kind = told.get("rope_type") or told.get("type") or "default"
        theta = _positive("rope_theta", told.get("rope_theta") or optional(json, "rope_theta", 10000.0))
        if kind not in ("default", "linear", "llama3"):
            raise LanguageModelError(
                f"config.json asks for rotary positions of type {kind!r}; bayesrl knows default, linear and llama3: "
                "choose another model"
            )
        refuse({**json, **told}, "partial_rotary_factor", 1.0)
        if kind == "default":
            return cls(theta)
        try:
            if kind == "linear":
                return cls(theta, kind, _positive("factor", told["factor"]))
            names = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
            factor, low, high, original = (_positive(name, told[name]) for name in names)
            return cls(theta, kind, factor, low, high, int(original))
        except KeyError as error:
            raise LanguageModelError(
                f"config.json asks for {kind!r} rotary positions without {error.args[0]!r}; it is damaged: "
                "copy it anew from where the model came from"
            ) from error

    def to_json(self) -> dict[str, Any]:
        """Give the settings in the words of old and new versions of transformers."""
        told: dict[str, Any] = {"rope_type": self.kind}
        if self.kind != "default":
            told["factor"] = self.factor
        if self.kind == "llama3":
            told |= {"low_freq_factor": self.low, "high_freq_factor": self.high}
            told["original_max_position_embeddings"] = self.original
        return {
            "rope_theta": self.theta,
            "rope_scaling": None if self.kind == "default" else told,
            "rope_parameters": {"rope_theta": self.theta, **told},
        }


def _positive(name: str, value: Any) -> float:
    if not (is_number(value) and value > 0):
        raise LanguageModelError(f"config.json sets {name}={value!r} of the rotary positions; use a number above 0")
    return float(value)


@dataclass(frozen=True, kw_only=True)
class LlamaConfig(Config):
    """The shape of a Llama, Mistral, Qwen2, Qwen3 or SmolLM.

    Args:
        vocab_size: how many tokens there are.
        max_length: context length.
        width: length of the residual stream.
        depth: how many blocks.
        heads: attention heads per block.
        kv_heads: how many of keys and values they share; divides `heads`.
        inner: width of the feed-forward layer.
        head_dim: length of a query; 0 is width/heads.
        rope: how fast positions turn.
        epsilon: of the norms.
        attention_bias: whether queries, keys and values have a bias.
        output_bias: whether what attention writes has one.
        feeding_bias: whether the feed-forward layer has one.
        query_key_norm: whether queries and keys are normalised.
        tied: whether the logits use the table of the tokens.
        initializer_range: standard deviation of random weights.
        model_type: "llama", "mistral", "qwen2" or "qwen3".

    Raises:
        LanguageModelError: the numbers do not fit together, or config.json asks for what is not implemented.
    """

    vocab_size: int
    max_length: int
    width: int
    depth: int
    heads: int
    kv_heads: int
    inner: int
    head_dim: int = 0
    rope: Rope = Rope()
    epsilon: float = 1e-6
    attention_bias: bool = False
    output_bias: bool = False
    feeding_bias: bool = False
    query_key_norm: bool = False
    tied: bool = False
    initializer_range: float = 0.02
    model_type: str = "llama"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.head_dim == 0:
            self.check_heads()
            object.__setattr__(self, "head_dim", self.width // self.heads)
        if self.heads % self.kv_heads or self.head_dim % 2:
            raise LanguageModelError(
                f"a {self.model_type} model has heads={self.heads}, kv_heads={self.kv_heads}, "
                f"head_dim={self.head_dim}; kv_heads must divide heads, and head_dim must be even"
            )

    @classmethod
    def from_json(cls, json: Mapping[str, Any]) -> "LlamaConfig":
        """Read what transformers writes as config.json."""
        family = json.get("model_type")
        refuse(json, "hidden_act", "silu")
        heads, bias = required(json, "num_attention_heads"), bool(json.get("attention_bias"))
        length = required(json, "max_position_embeddings")
        _refuse_windows(json, length)
        return cls(
            vocab_size=required(json, "vocab_size"),
            max_length=length,
            width=required(json, "hidden_size"),
            depth=required(json, "num_hidden_layers"),
            heads=heads,
            kv_heads=optional(json, "num_key_value_heads", heads),
            inner=required(json, "intermediate_size"),
            head_dim=optional(json, "head_dim", 128 if family == "qwen3" else 0),
            rope=Rope.from_json(json),
            epsilon=optional(json, "rms_norm_eps", 1e-6),
            attention_bias=bias or family == "qwen2",
            output_bias=bias and family != "qwen2",
            feeding_bias=bool(json.get("mlp_bias")),
            query_key_norm=family == "qwen3",
            tied=optional(json, "tie_word_embeddings", False),
            initializer_range=optional(json, "initializer_range", 0.02),
            model_type=optional(json, "model_type", "llama"),
        )

    def to_json(self) -> dict[str, Any]:
        """Give what transformers reads as config.json."""
        told = {
            "model_type": self.model_type,
            "architectures": [ARCHITECTURES[self.model_type]],
            "vocab_size": self.vocab_size,
            "max_position_embeddings": self.max_length,
            "hidden_size": self.width,
            "num_hidden_layers": self.depth,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "intermediate_size": self.inner,
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "rms_norm_eps": self.epsilon,
            "tie_word_embeddings": self.tied,
            "initializer_range": self.initializer_range,
            **self.rope.to_json(),
        }
        if self.model_type in ("llama", "qwen3"):
            told["attention_bias"] = self.attention_bias
        if self.model_type == "llama":
            told["mlp_bias"] = self.feeding_bias
        if self.model_type != "llama":
            told["sliding_window"] = None
        if self.model_type.startswith("qwen"):
            told["use_sliding_window"] = False
        return told


def _refuse_windows(json: Mapping[str, Any], length: int) -> None:
    """Refuse attention that does not see the whole context."""
    window = json.get("sliding_window")
    if window is not None and not (is_count(window, least=1) and is_count(length, least=1)):
        raise LanguageModelError(
            f"config.json of a {json.get('model_type')!r} model sets sliding_window={window!r} in a context of "
            f"{length!r} tokens; use whole numbers of at least 1, or no window"
        )
    unused = json.get("model_type") in ("qwen2", "qwen3") and not json.get("use_sliding_window")
    if window is not None and window < length and not unused:
        raise LanguageModelError(
            f"config.json of a {json.get('model_type')!r} model sets sliding_window={window} in a context of {length} "
            "tokens, which bayesrl does not implement; where no sequence will be longer than the window, "
            f"set max_position_embeddings to {window} in config.json"
        )

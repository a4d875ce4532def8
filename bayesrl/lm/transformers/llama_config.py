"""The shapes of Llama and its relatives: the settings of config.json, and the traits that follow from the family."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple

from bayesrl.arguments import checked
from bayesrl.errors import LanguageModelError
from bayesrl.lm.transformers.config_json import (
    COMMON_NAMES,
    DEFAULTS,
    FULL,
    LATER_GEMMA,
    OPTIONS,
    QWEN,
    SLIDING,
    SWITCHED,
    consistent,
    layer_types,
    optional,
    read_fields,
    required,
    windowed_layers,
    with_defaults,
)
from bayesrl.lm.transformers.decoder import DecoderConfig
from bayesrl.lm.transformers.layers.block import POST_NORMS, PRE_NORMS, Layout
from bayesrl.lm.transformers.layers.rope import Rope
from bayesrl.value_checks import is_count

_PLAIN = Rope()


class DecoderTraits(NamedTuple):
    """The traits that every model of a family has, which config.json therefore leaves out; see `Layout`."""

    architecture: str  # the name of the class in transformers
    norm: str = "rms"
    norms: tuple[str, ...] = PRE_NORMS
    query_key_norm: str = ""
    joined: str = ""
    gated: str = "apart"
    scaled: bool = False  # whether embedded tokens are multiplied by √width
    biased: bool = False  # whether the feed-forward layer has biases
    partial: bool = False  # whether some coordinates of a head may stay unturned

    @property
    def epsilon_name(self) -> str:
        """The name of the norms' epsilon in config.json."""
        return "layer_norm_eps" if self.norm == "layer" else "rms_norm_eps"


_AROUND = (*PRE_NORMS, *POST_NORMS)
DECODER_FAMILIES: Mapping[str, DecoderTraits] = MappingProxyType(
    {
        "llama": DecoderTraits("LlamaForCausalLM"),
        "mistral": DecoderTraits("MistralForCausalLM"),
        "mixtral": DecoderTraits("MixtralForCausalLM"),
        "qwen2": DecoderTraits("Qwen2ForCausalLM"),
        "qwen3": DecoderTraits("Qwen3ForCausalLM", query_key_norm="head"),
        "gemma": DecoderTraits("GemmaForCausalLM", norm="rms_plus_one", scaled=True),
        "gemma2": DecoderTraits("Gemma2ForCausalLM", norm="rms_plus_one", norms=_AROUND, scaled=True),
        "gemma3_text": DecoderTraits(
            "Gemma3ForCausalLM",
            norm="rms_plus_one",
            norms=_AROUND,
            query_key_norm="head",
            scaled=True,
        ),
        "phi3": DecoderTraits("Phi3ForCausalLM", joined="stacked", gated="joined", partial=True),
        "olmo2": DecoderTraits("Olmo2ForCausalLM", norms=POST_NORMS, query_key_norm="whole"),
        "smollm3": DecoderTraits("SmolLM3ForCausalLM"),
        "gpt_neox": DecoderTraits(
            "GPTNeoXForCausalLM", norm="layer", joined="by_head", gated="", biased=True, partial=True
        ),
    }
)


@dataclass(frozen=True, kw_only=True)
class LlamaConfig(DecoderConfig):
    """The shape of a Llama or one of its relatives.

    Args:
        vocab_size: how many tokens there are.
        max_length: context length.
        width: length of the residual stream.
        depth: how many blocks.
        heads: attention heads per block.
        kv_heads: heads of keys and values, which the attention heads share; divides `heads`.
        inner: width of the feed-forward layer.
        head_dim: length of a query; 0 means width/heads.
        rope: how fast positions turn.
        local_rope: the same in layers with a window, if that differs; else None.
        window: how many tokens a layer with a window sees.
        windowed: the layers with a window.
        unturned: the layers whose positions do not turn.
        activation: of the feed-forward layer, by its name in transformers.
        epsilon: of the norms.
        attention_bias: whether queries, keys and values have a bias.
        output_bias: whether the output of attention has one.
        feeding_bias: whether the feed-forward layer has one.
        query_key_norm: whether queries and keys are normalized.
        parallel: whether attention and feed-forward layer read the residual stream before either writes to it.
        query_scale: its square root divides the scores; 0 means `head_dim`.
        score_cap: bound of the scores; 0 for no bound.
        logit_cap: bound of the logits; 0 for no bound.
        experts: number of feed-forward layers to choose from; 0 means a single one, without choice.
        chosen: how many of them each token uses.
        tied: whether the logits use the table of the tokens.
        initializer_range: standard deviation of random weights.
        model_type: the family, by its name in transformers.

    Raises:
        LanguageModelError: the numbers do not fit together, or config.json asks for what is not implemented.

    Example:
        >>> LlamaConfig(vocab_size=7, max_length=8, width=4, depth=1, heads=2, kv_heads=1, inner=8).head_dim
        2
    """

    vocab_size: int
    max_length: int
    width: int
    depth: int
    heads: int
    kv_heads: int
    inner: int
    head_dim: int = 0
    rope: Rope = _PLAIN
    local_rope: Rope | None = None
    window: int = 0
    windowed: tuple[int, ...] = ()
    unturned: tuple[int, ...] = ()
    activation: str = "silu"
    epsilon: float = 1e-6
    attention_bias: bool = False
    output_bias: bool = False
    feeding_bias: bool = False
    query_key_norm: bool = False
    parallel: bool = False
    query_scale: float = 0
    score_cap: float = 0
    logit_cap: float = 0
    experts: int = 0
    chosen: int = 0
    tied: bool = False
    initializer_range: float = 0.02
    model_type: str = "llama"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.model_type not in DECODER_FAMILIES:
            raise LanguageModelError(
                f"a Llama's relative has model_type={self.model_type!r}; use one of {', '.join(DECODER_FAMILIES)}"
            )
        if self.head_dim == 0:
            self.check_heads()
            # Filled in now, so that a shape that leaves head_dim out equals one that gives it.
            object.__setattr__(self, "head_dim", self.width // self.heads)
        # Coordinates turn in pairs, so an even number of them must turn.
        if self.heads % self.kv_heads or int(self.head_dim * self.rope.share) % 2:
            raise LanguageModelError(
                f"a {self.model_type} model has heads={self.heads}, kv_heads={self.kv_heads}, "
                f"head_dim={self.head_dim}; kv_heads must divide heads, and head_dim must be even"
            )
        if self.rope.share != 1 and not self.traits.partial:
            raise LanguageModelError(
                f"config.json of a {self.model_type!r} model sets partial_rotary_factor={self.rope.share}, which its "
                "class in transformers does not know; choose another model"
            )
        if self.traits.joined == "by_head" and self.kv_heads != self.heads:
            raise LanguageModelError(
                f"a {self.model_type} model has heads={self.heads} and kv_heads={self.kv_heads}; the two must be equal"
            )
        if not min(self.experts, 1) <= self.chosen <= self.experts:
            raise LanguageModelError(
                f"a {self.model_type} model has experts={self.experts} and chosen={self.chosen}; choose at least one "
                "of them, and no more than there are"
            )

    @property
    def traits(self) -> DecoderTraits:
        """The traits of the family."""
        return DECODER_FAMILIES[self.model_type]

    @property
    def embedding_scale(self) -> float:
        """The factor of embedded tokens."""
        return self.width**0.5 if self.traits.scaled else 1.0

    @property
    def cap(self) -> float:
        """Bound of the logits; 0 for no bound."""
        return self.logit_cap

    def layout(self, layer: int) -> Layout:
        """Describe how a block computes."""
        return self._layout(
            layer,
            query_key_norm=(self.traits.query_key_norm or "head") if self.query_key_norm else "",
            scale=self.query_scale**-0.5 if self.query_scale else 0.0,
            cap=self.score_cap,
            **({"rope": None} if layer in self.unturned else {}),
        )

    @classmethod
    @checked(LanguageModelError)
    def from_json(cls, json: Mapping[str, Any]) -> "LlamaConfig":
        """Read the config.json of transformers."""
        json = with_defaults(json, DECODER_FAMILIES)
        family, traits = json["model_type"], DECODER_FAMILIES[json["model_type"]]
        common = read_fields(json, COMMON_NAMES)
        depth = common["depth"]
        bias = optional(json, "attention_bias", False)
        rope, local = _ropes(json)
        # Beyond this length the turns would change, and with them the density of what was read before.
        if rope.kind == "longrope":
            common["max_length"] = rope.original
        window, windowed = _windows(json, depth)
        return cls(
            **common,
            kv_heads=optional(json, "num_key_value_heads", common["heads"]),
            head_dim=optional(json, "head_dim", 0),
            rope=rope,
            local_rope=local,
            window=window,
            windowed=windowed,
            unturned=_unturned(json, depth) if family == "smollm3" else (),
            epsilon=required(json, traits.epsilon_name),
            # Qwen2 has these biases, but no setting that says so.
            attention_bias=bias or family == "qwen2",
            output_bias=bias and family != "qwen2",
            feeding_bias=traits.biased or optional(json, "mlp_bias", False),
            query_key_norm=bool(traits.query_key_norm),
            parallel=optional(json, "use_parallel_residual", False),
            query_scale=optional(json, "query_pre_attn_scalar", 0),
            score_cap=optional(json, "attn_logit_softcapping", 0),
            logit_cap=optional(json, "final_logit_softcapping", 0),
            experts=optional(json, "num_local_experts", 0),
            chosen=optional(json, "num_experts_per_tok", 0),
            tied=required(json, "tie_word_embeddings"),
            model_type=family,
        )

    def to_json(self) -> dict[str, Any]:
        """Return the config.json for transformers."""
        family, rope = self.model_type, self.rope
        names = {**COMMON_NAMES, "epsilon": self.traits.epsilon_name}
        if family in LATER_GEMMA:
            names["activation"] = "hidden_activation"
        settings: dict[str, Any] = {
            "model_type": family,
            "architectures": [self.traits.architecture],
            **{key: getattr(self, name) for name, key in names.items()},
            "tie_word_embeddings": self.tied,
            **rope.to_json(),
            **{key: value(self) for key, value in _OWN.items() if family in OPTIONS[key].families},
        }
        if family == "gpt_neox":
            settings |= {"rotary_pct": rope.share, "rotary_emb_base": rope.theta}
        else:
            settings["num_key_value_heads"] = self.kv_heads
            # Where it follows from the rest, files of most families have null or nothing.
            if "head_dim" in DEFAULTS[family] or self.head_dim * self.heads != self.width:
                settings["head_dim"] = self.head_dim
        if family in SWITCHED:
            settings["use_sliding_window"] = bool(self.windowed)
        if self.local_rope is not None:
            parameters = {FULL: rope, SLIDING: self.local_rope}
            settings["rope_parameters"] = {kind: one.to_json()["rope_parameters"] for kind, one in parameters.items()}
            settings["rope_local_base_freq"] = self.local_rope.theta
        if rope.kind == "longrope":
            settings["original_max_position_embeddings"] = rope.original
            # `max_length` is only the original context (see `from_json`); the file wants the stretched one.
            settings["max_position_embeddings"] = round(rope.original * rope.factor)
        return settings


_OWN: Mapping[str, Callable[[LlamaConfig], Any]] = MappingProxyType(
    {
        "attention_bias": lambda config: config.attention_bias,
        "mlp_bias": lambda config: config.feeding_bias,
        "sliding_window": lambda config: config.window or None,
        "layer_types": lambda config: layer_types(config.windowed, config.depth),
        "query_pre_attn_scalar": lambda config: config.query_scale or config.head_dim,
        "attn_logit_softcapping": lambda config: config.score_cap or None,
        "final_logit_softcapping": lambda config: config.logit_cap or None,
        "no_rope_layers": lambda config: [int(layer not in config.unturned) for layer in range(config.depth)],
        "use_parallel_residual": lambda config: config.parallel,
        "num_local_experts": lambda config: config.experts,
        "num_experts_per_tok": lambda config: config.chosen,
    }
)
"""How the settings of `OPTIONS` follow from a configuration."""


def _ropes(json: Mapping[str, Any]) -> tuple[Rope, Rope | None]:
    """Read the rope of all layers, and the separate one of layers with a window, if there is one."""
    family, settings = json["model_type"], json.get("rope_parameters")
    by_kind = isinstance(settings, Mapping) and (FULL in settings or SLIDING in settings)
    if settings and by_kind != (family == "gemma3_text"):
        one_set = "one set of parameters for all layers; put that there"
        sets = f"only what stands there under {FULL!r} and {SLIDING!r}; put the parameters of each kind of layer there"
        raise LanguageModelError(
            f"config.json of a {family!r} model sets rope_parameters={settings!r:.200}, and transformers reads "
            f"{one_set if by_kind else sets}"
        )
    if family == "gemma3_text":
        kinds = settings or {}
        whole = kinds.get(FULL) or json.get("rope_scaling") or {}
        local = {"rope_theta": json.get("rope_local_base_freq") or 10000.0, **(kinds.get(SLIDING) or {})}
        return Rope.from_json(json, parameters=whole, theta=1e6), Rope.from_json({}, parameters=local)
    if family != "gpt_neox":
        return Rope.from_json(json), None
    if settings:
        return Rope.from_json(json, theta=json.get("rotary_emb_base") or 10000.0, share=json["rotary_pct"]), None
    theta = consistent(json, "rotary_emb_base", "rope_theta", 10000)
    share = consistent(json, "rotary_pct", "partial_rotary_factor", 0.25)
    return Rope.from_json(json, theta=theta, share=share), None


def _windows(json: Mapping[str, Any], depth: Any) -> tuple[int, tuple[int, ...]]:
    """Read how many tokens layers with a window see, and which layers have one."""
    family, window = json["model_type"], json.get("sliding_window")
    # A depth that is no count is refused later, when the configuration is made.
    if window is None or not is_count(depth, least=1):
        return 0, ()
    if not is_count(window, least=1):
        raise LanguageModelError(
            f"config.json of a {family!r} model sets sliding_window={window!r}; use a whole number of at least 1, or "
            "null for none"
        )
    if family in SWITCHED and not json.get("use_sliding_window"):
        return int(window), ()
    if family in OPTIONS["layer_types"].families and json.get("layer_types") is not None:
        return int(window), windowed_layers(json, json["layer_types"], depth)
    if family == "smollm3":
        return int(window), _unturned(json, depth)
    if family in QWEN:
        # Despite its name, max_window_layers counts the first layers, those without a window.
        return int(window), tuple(range(depth))[required(json, "max_window_layers") :]
    if family in LATER_GEMMA:
        # The last of every `period` layers sees all.
        period = 2 if family == "gemma2" else required(json, "sliding_window_pattern")
        return int(window), tuple(layer for layer in range(depth) if (layer + 1) % period)
    if json.get("use_sliding_window") is False:
        raise LanguageModelError(
            f"config.json of a {family!r} model sets use_sliding_window=False, which its class in transformers "
            f"does not read, and sliding_window={window}; set that to null"
        )
    return int(window), tuple(range(depth))


def _unturned(json: Mapping[str, Any], depth: int) -> tuple[int, ...]:
    """Read which layers of a SmolLM3 leave positions out."""
    listed = json.get("no_rope_layers")
    if listed is None:
        period = required(json, "no_rope_layer_interval")
        return tuple(layer for layer in range(depth) if (layer + 1) % period == 0)
    if not (isinstance(listed, list) and len(listed) == depth):
        raise LanguageModelError(
            f"config.json of a 'smollm3' model sets no_rope_layers={listed!r:.200}; give 0 or 1 for each of {depth} "
            "layers"
        )
    return tuple(layer for layer, turned in enumerate(listed) if not turned)

"""Read the settings of config.json, with the defaults of transformers and the other names of some settings."""

from collections.abc import Collection, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

from bayesrl.errors import LanguageModelError
from bayesrl.value_checks import format_value

_GATED: Mapping[str, Any] = {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "rms_norm_eps": 1e-6,
    "initializer_range": 0.02,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
}
_MISTRAL = {
    **_GATED, "vocab_size": 32000, "intermediate_size": 14336, "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
}  # fmt: skip
_QWEN = {
    **_GATED, "vocab_size": 151936, "intermediate_size": 22016, "num_key_value_heads": 32,
    "max_position_embeddings": 32768, "sliding_window": 4096, "max_window_layers": 28,
}  # fmt: skip
_GEMMA = {
    **_GATED, "vocab_size": 256000, "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26,
    "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "hidden_act": "gelu_pytorch_tanh",
    "max_position_embeddings": 8192, "tie_word_embeddings": True, "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
}  # fmt: skip
_BERT: Mapping[str, Any] = {
    "vocab_size": 30522, "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12,
    "intermediate_size": 3072, "hidden_act": "gelu", "max_position_embeddings": 512, "type_vocab_size": 2,
    "layer_norm_eps": 1e-12, "initializer_range": 0.02, "pad_token_id": 0,
}  # fmt: skip

DEFAULTS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "gpt2": {
            "vocab_size": 50257, "n_positions": 1024, "n_embd": 768, "n_layer": 12, "n_head": 12,
            "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5, "initializer_range": 0.02,
            "tie_word_embeddings": True,
        },
        "llama": {**_GATED, "vocab_size": 32000, "max_position_embeddings": 2048},
        "mistral": {**_MISTRAL, "sliding_window": 4096},
        "mixtral": {
            **_MISTRAL, "rms_norm_eps": 1e-5, "rope_theta": 1e6, "num_local_experts": 8, "num_experts_per_tok": 2,
        },
        "qwen2": _QWEN,
        "qwen3": {**_QWEN, "head_dim": 128},
        # 0 and None take back what only later Gemmas have, since `check_options` would refuse it here.
        "gemma": {
            **_GEMMA, "hidden_size": 3072, "intermediate_size": 24576, "num_hidden_layers": 28,
            "num_attention_heads": 16, "num_key_value_heads": 16, "query_pre_attn_scalar": 0, "sliding_window": None,
        },
        "gemma2": {**_GEMMA, "final_logit_softcapping": 30.0, "attn_logit_softcapping": 50.0},
        "gemma3_text": {
            **_GEMMA, "vocab_size": 262208, "max_position_embeddings": 131072, "sliding_window_pattern": 6,
        },
        "phi3": {**_GATED, "vocab_size": 32064, "hidden_size": 3072, "intermediate_size": 8192,
                 "rms_norm_eps": 1e-5, "max_position_embeddings": 4096},
        "olmo2": {**_GATED, "vocab_size": 50304, "rms_norm_eps": 1e-5, "max_position_embeddings": 2048},
        "smollm3": {
            **_GATED, "vocab_size": 128256, "hidden_size": 2048, "num_hidden_layers": 36, "num_attention_heads": 16,
            "num_key_value_heads": 4, "max_position_embeddings": 32768, "rope_theta": 2e6, "no_rope_layer_interval": 4,
            "tie_word_embeddings": True,
        },
        "gpt_neox": {
            "vocab_size": 50432, "hidden_size": 6144, "num_hidden_layers": 44, "num_attention_heads": 64,
            "intermediate_size": 24576, "hidden_act": "gelu", "max_position_embeddings": 2048, "rotary_pct": 0.25,
            "layer_norm_eps": 1e-5, "initializer_range": 0.02, "tie_word_embeddings": False,
            "attention_bias": True, "use_parallel_residual": True,
        },
        "bert": _BERT,
        "roberta": {**_BERT, "vocab_size": 50265, "pad_token_id": 1},
        "xlm-roberta": {**_BERT, "pad_token_id": 1},
        "distilbert": {
            "vocab_size": 30522, "dim": 768, "n_layers": 6, "n_heads": 12, "hidden_dim": 3072, "activation": "gelu",
            "max_position_embeddings": 512, "initializer_range": 0.02,
        },
        "modernbert": {
            "vocab_size": 50368, "hidden_size": 768, "intermediate_size": 1152, "num_hidden_layers": 22,
            "num_attention_heads": 12, "hidden_act": "gelu", "max_position_embeddings": 8192,
            "initializer_range": 0.02, "norm_eps": 1e-5, "norm_bias": False, "local_attention": 128,
            "attention_bias": False, "mlp_bias": False,
            "classifier_pooling": "cls", "classifier_bias": False, "classifier_activation": "gelu",
            "global_attn_every_n_layers": 3,
        },
    }
)  # fmt: skip
"""By family: the defaults of its configuration class in transformers 5."""

COMMON_NAMES: Mapping[str, str] = MappingProxyType(
    {
        "vocab_size": "vocab_size",
        "max_length": "max_position_embeddings",
        "width": "hidden_size",
        "depth": "num_hidden_layers",
        "heads": "num_attention_heads",
        "inner": "intermediate_size",
        "activation": "hidden_act",
        "initializer_range": "initializer_range",
    }
)
"""Most families' names of the common settings, by field."""

_TEXTBOOK = {
    "max_position_embeddings": "n_positions",
    "hidden_size": "n_embd",
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
}
ALIASES: Mapping[str, Mapping[str, str]] = MappingProxyType(
    {
        "gpt2": _TEXTBOOK,
        "distilbert": {"hidden_size": "dim", "num_attention_heads": "n_heads", "num_hidden_layers": "n_layers"},
        **{name: {"hidden_activation": "hidden_act"} for name in ("gemma2", "gemma3_text", "modernbert")},
    }
)
"""By family: other names of settings, and their names here."""


SLIDING, FULL = "sliding_attention", "full_attention"
QWEN, LATER_GEMMA = ("qwen2", "qwen3"), ("gemma2", "gemma3_text")
SWITCHED = (*QWEN, "smollm3")
"""Families whose windows `use_sliding_window` turns on."""
_ENCODERS = ("bert", "roberta", "xlm-roberta", "distilbert")
_ROTARY = tuple(family for family in DEFAULTS if family not in ("gpt2", *_ENCODERS))


class Option(NamedTuple):
    """A setting that changes what some families compute, and that the classes of all others in transformers ignore."""

    field: str  # of the configuration; "" if it is not a field of its own
    families: tuple[str, ...] = ()  # whose config.json has it
    implied: tuple[str, ...] = ()  # that have what it says, whatever their config.json says
    plain: tuple[Any, ...] = ()  # without effect, besides null, 0 and False; neither has a list of plain values

    def is_off(self, value: Any) -> bool:
        """Whether a value has no effect."""
        if isinstance(value, list):
            return all(one in self.plain for one in value)
        return not value or value in self.plain


OPTIONS: Mapping[str, Option] = MappingProxyType(
    {
        "attention_bias": Option(
            "attention_bias",
            ("llama", "qwen3", "gemma", *LATER_GEMMA, "olmo2", "smollm3", "gpt_neox", "modernbert"),
            implied=("gpt2", "qwen2", *_ENCODERS),
        ),
        "mlp_bias": Option(
            "feeding_bias", ("llama", "smollm3", "modernbert"), implied=("gpt2", "gpt_neox", *_ENCODERS)
        ),
        "sliding_window": Option(
            "window", ("mistral", "mixtral", *QWEN, *LATER_GEMMA, "phi3", "smollm3", "modernbert")
        ),
        "layer_types": Option("", (*SWITCHED, *LATER_GEMMA, "modernbert"), plain=(FULL,)),
        **dict.fromkeys(("rope_parameters", "rope_scaling", "rope_theta"), Option("rope", _ROTARY)),
        "rope_local_base_freq": Option("local_rope", ("gemma3_text",), implied=("modernbert",)),
        "no_rope_layers": Option("unturned", ("smollm3",), plain=(1,)),
        "query_pre_attn_scalar": Option("query_scale", LATER_GEMMA),
        "attn_logit_softcapping": Option("score_cap", LATER_GEMMA),
        "final_logit_softcapping": Option("logit_cap", LATER_GEMMA),
        "use_parallel_residual": Option("parallel", ("gpt_neox",)),
        "num_local_experts": Option("experts", ("mixtral",)),
        "num_experts_per_tok": Option("chosen", ("mixtral",)),
        "classifier_pooling": Option("mean", ("modernbert",), plain=("cls",)),
        # Of families that are not read: multipliers of Granite and Cohere, OLMo's bound, Falcon's and MPT's positions.
        **dict.fromkeys(
            ("embedding_multiplier", "residual_multiplier", "logits_scaling", "logit_scale"), Option("", plain=(1,))
        ),
        **dict.fromkeys(("attention_multiplier", "clip_qkv", "alibi", "add_cross_attention"), Option("")),
        "use_bidirectional_attention": Option(""),
    }
)
"""By name in config.json."""


def check_options(json: Mapping[str, Any]) -> None:
    """Refuse options of other families, which would be read and then have no effect."""
    family = json["model_type"]
    for key, option in OPTIONS.items():
        if family in (*option.families, *option.implied) or option.is_off(json.get(key)):
            continue
        if not option.families:
            refuse(json, key, *option.plain)
        raise LanguageModelError(
            f"config.json of a {family!r} model sets {key}={format_value(json[key])}, which only "
            f"{', '.join(option.families)} models have; set it to null, or model_type to the family of the weights"
        )


def with_defaults(json: Mapping[str, Any], families: Collection[str]) -> dict[str, Any]:
    """Return a config.json with one name per setting, and with defaults for missing settings."""
    family = json.get("model_type")
    if not isinstance(family, str) or family not in families:
        raise LanguageModelError(
            f"config.json sets model_type={format_value(family)}; use {' or '.join(map(repr, families))}"
        )
    names = ALIASES.get(family, {})
    # A family with its own name for the activation ignores the common one, which some files have too.
    unread = ("hidden_act",) if "hidden_activation" in names else ()
    settings = {key: value for key, value in json.items() if key not in (*names, *unread)}
    settings |= {names[key]: value for key, value in json.items() if key in names and value is not None}
    # A null in the file stays a null: `optional` reads it as missing, `required` refuses it.
    settings = {**DEFAULTS[family], **settings}
    check_options(settings)
    return settings


def required(json: Mapping[str, Any], key: str) -> Any:
    """Read a setting that has no default."""
    value = json.get(key)
    if value is None:
        raise LanguageModelError(
            f"config.json of a {json.get('model_type')!r} model has no {key!r}; it is damaged, or of an old format: "
            "load the model in transformers and save it anew with save_pretrained"
        )
    return value


def read_fields(json: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """Read settings that have no default, by field."""
    return {field: required(json, key) for field, key in names.items()}


def optional(json: Mapping[str, Any], key: str, default: Any) -> Any:
    """Read a setting; null, which transformers writes, counts as missing."""
    value = json.get(key)
    return default if value is None else value


def consistent(json: Mapping[str, Any], key: str, other: str, default: Any) -> Any:
    """Read a setting with two names, one or the other of which each version of transformers reads."""
    value = optional(json, key, default)
    if optional(json, other, value) != value:
        raise LanguageModelError(
            f"config.json of a {json.get('model_type')!r} model sets {other}={json[other]!r} where {key} is {value!r}, "
            "and versions of transformers read the one or the other; set both to what the model was trained with"
        )
    return value


def refuse(json: Mapping[str, Any], key: str, *accepted: Any) -> None:
    """Refuse a setting that would change the model's computation and is not implemented."""
    value = json.get(key)
    if value is not None and value not in accepted:
        raise LanguageModelError(
            f"config.json of a {json.get('model_type')!r} model sets {key}={value!r}, which bayesrl does not implement "
            f"(it reads {' or '.join(map(repr, accepted)) or 'models without it'}); choose another model"
        )


def windowed_layers(json: Mapping[str, Any], kinds: Any, depth: int) -> tuple[int, ...]:
    """Return the layers with a window, from the kind of each layer."""
    if not (isinstance(kinds, list) and len(kinds) == depth and set(kinds) <= {SLIDING, FULL}):
        raise LanguageModelError(
            f"config.json of a {json.get('model_type')!r} model sets layer_types={kinds!r:.200}; name {SLIDING!r} or "
            f"{FULL!r} for each of {depth} layers"
        )
    return tuple(layer for layer, kind in enumerate(kinds) if kind == SLIDING)


def layer_types(windowed: Sequence[int], depth: int) -> list[str]:
    """Return the kind of each layer."""
    return [SLIDING if layer in windowed else FULL for layer in range(depth)]

"""The shapes of BERT and its relatives that classify texts."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple

from bayesrl.arguments import checked
from bayesrl.errors import LanguageModelError
from bayesrl.lm.transformers.base import Config
from bayesrl.lm.transformers.config_json import (
    COMMON_NAMES,
    FULL,
    SLIDING,
    consistent,
    layer_types,
    optional,
    read_fields,
    refuse,
    required,
    windowed_layers,
    with_defaults,
)
from bayesrl.lm.transformers.layers.block import POST_NORMS, PRE_NORMS, Layout
from bayesrl.lm.transformers.layers.linear_and_norm import find_activation
from bayesrl.lm.transformers.layers.rope import Rope
from bayesrl.value_checks import is_count

PROBLEMS = ONE_LABEL, SEVERAL_LABELS, REGRESSION = (
    "single_label_classification",
    "multi_label_classification",
    "regression",
)


class EncoderTraits(NamedTuple):
    """The traits that every model of a family has, which config.json therefore leaves out."""

    architecture: str  # the name of the class in transformers
    pooling: str = "tanh"  # the activation of the layer between the encoder and the head
    kinds: bool = True  # whether tokens have a kind of segment
    learned: bool = True  # whether there is a table of positions
    padded: bool = False  # whether positions begin after that of the padding token


ENCODER_FAMILIES: Mapping[str, EncoderTraits] = MappingProxyType(
    {
        "bert": EncoderTraits("BertForSequenceClassification"),
        "roberta": EncoderTraits("RobertaForSequenceClassification", padded=True),
        "xlm-roberta": EncoderTraits("XLMRobertaForSequenceClassification", padded=True),
        "distilbert": EncoderTraits("DistilBertForSequenceClassification", pooling="relu", kinds=False),
        "modernbert": EncoderTraits("ModernBertForSequenceClassification", kinds=False, learned=False),
    }
)


@dataclass(frozen=True, kw_only=True)
class BertConfig(Config):
    """The shape of a BERT, or one of its relatives, that classifies texts.

    Args:
        vocab_size: number of tokens.
        max_length: the most tokens of a text.
        width: length of the residual stream.
        depth: how many blocks.
        heads: attention heads per block; divides `width`.
        inner: width of the feed-forward layer.
        labels: names of the classes.
        problem: how they are scored, by the name in transformers: "single_label_classification" if exactly one holds,
            "multi_label_classification" if each may hold, or "regression".
        token_types: number of kinds of segments.
        activation: of the feed-forward layer, by the name in transformers.
        epsilon: of the norms.
        pad: the padding token; RoBERTa's positions begin after it.
        mean: whether the head classifies the mean over the text rather than its first token (ModernBERT).
        pooling: activation of the layer before the head; "" is the family's.
        rope: how positions turn (ModernBERT).
        local_rope: the same in layers with a window.
        window: in layers with a window, how far a token sees to each side, itself included.
        windowed: the layers with a window.
        norm_bias: whether norms have a bias.
        attention_bias: whether attention has biases.
        feeding_bias: whether the feed-forward layer has.
        pool_bias: whether the layer before the head has.
        initializer_range: standard deviation of random weights.
        model_type: the family: "bert", "roberta", "xlm-roberta", "distilbert" or "modernbert".

    Raises:
        LanguageModelError: the numbers do not fit together, or config.json asks for what is not implemented.

    Example:
        >>> BertConfig(width=4, depth=1, heads=2, inner=8, labels=("bad", "good")).problem
        'single_label_classification'
    """

    vocab_size: int = 30522
    max_length: int = 512
    width: int = 768
    depth: int = 12
    heads: int = 12
    inner: int = 3072
    labels: tuple[str, ...] = ("LABEL_0", "LABEL_1")
    problem: str = ONE_LABEL
    token_types: int = 2
    activation: str = "gelu"
    epsilon: float = 1e-12
    pad: int = 0
    mean: bool = False
    pooling: str = ""
    rope: Rope | None = None
    local_rope: Rope | None = None
    window: int = 0
    windowed: tuple[int, ...] = ()
    norm_bias: bool = True
    attention_bias: bool = True
    feeding_bias: bool = True
    pool_bias: bool = True
    initializer_range: float = 0.02
    model_type: str = "bert"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.model_type not in ENCODER_FAMILIES:
            raise LanguageModelError(
                f"a classifier has model_type={self.model_type!r}; use one of {', '.join(ENCODER_FAMILIES)}"
            )
        self.check_heads()
        find_activation(self.pooled_by)
        if self.problem not in PROBLEMS:
            raise LanguageModelError(
                f"a {self.model_type} model has problem={self.problem!r}; use one of {', '.join(PROBLEMS)}"
            )

    @property
    def traits(self) -> EncoderTraits:
        """The traits of the family."""
        return ENCODER_FAMILIES[self.model_type]

    @property
    def pooled_by(self) -> str:
        """The activation of the layer before the head."""
        return self.pooling or self.traits.pooling

    @property
    def first_position(self) -> int:
        """The place of the first token in the table of positions."""
        return self.pad + 1 if self.traits.padded else 0

    def layout(self, layer: int) -> Layout:
        """Describe how a block computes."""
        if self.rope is None:
            own: dict[str, Any] = {"norms": POST_NORMS, "norm_of_sums": True}
        else:
            # The first block needs no norm before attention: the embeddings are normalized already.
            own = {"norms": PRE_NORMS if layer else PRE_NORMS[1:], "joined": "stacked", "gated": "joined"}
        return self._layout(layer, norm="layer", output_bias=self.attention_bias, **own)

    @classmethod
    @checked(LanguageModelError)
    def from_json(cls, json: Mapping[str, Any]) -> "BertConfig":
        """Read the config.json of transformers."""
        refuse(json, "position_embedding_type", "absolute")
        refuse(json, "is_decoder", False)
        json = with_defaults(json, ENCODER_FAMILIES)
        family, labels = json["model_type"], _labels(json)
        own = read_fields(json, _NAMES[family])
        if family == "modernbert":
            own |= _modern(json, own["depth"])
        if ENCODER_FAMILIES[family].padded:
            own["pad"] = required(json, "pad_token_id")
            # The table has rows up to the padding token's too; what is left is for texts.
            own["max_length"] = own["max_length"] - own["pad"] - 1
        return cls(
            **own,
            labels=labels,
            problem=optional(json, "problem_type", REGRESSION if len(labels) == 1 else ONE_LABEL),
            token_types=optional(json, "type_vocab_size", 2),
            model_type=family,
        )

    def to_json(self) -> dict[str, Any]:
        """Return the config.json for transformers."""
        settings: dict[str, Any] = {
            "model_type": self.model_type,
            "architectures": [self.traits.architecture],
            "id2label": {str(index): name for index, name in enumerate(self.labels)},
            "label2id": {name: index for index, name in enumerate(self.labels)},
            "problem_type": self.problem,
        }
        settings |= {key: getattr(self, name) for name, key in _NAMES[self.model_type].items()}
        settings["max_position_embeddings"] = self.max_length + self.first_position
        if self.traits.padded:
            settings["pad_token_id"] = self.pad
        if self.traits.kinds:
            settings["type_vocab_size"] = self.token_types
        if self.rope is not None and self.local_rope is not None:
            # The class of ModernBERT ignores the common name.
            settings["hidden_activation"] = settings.pop("hidden_act")
            settings |= {
                "local_attention": 2 * (self.window - 1),
                "layer_types": layer_types(self.windowed, self.depth),
                "classifier_pooling": "mean" if self.mean else "cls",
                "classifier_activation": self.pooled_by,
                "rope_parameters": {
                    kind: rope.to_json()["rope_parameters"]
                    for kind, rope in ((FULL, self.rope), (SLIDING, self.local_rope))
                },
                "global_rope_theta": self.rope.theta,
                "local_rope_theta": self.local_rope.theta,
            }
        return settings


_NAMES: Mapping[str, Mapping[str, str]] = MappingProxyType(
    {
        **{family: {**COMMON_NAMES, "epsilon": "layer_norm_eps"} for family in ("bert", "roberta", "xlm-roberta")},
        # The epsilon of DistilBERT is no setting: it is always the default of `BertConfig`.
        "distilbert": {
            **COMMON_NAMES, "width": "dim", "depth": "n_layers", "heads": "n_heads", "inner": "hidden_dim",
            "activation": "activation",
        },
        "modernbert": {
            **COMMON_NAMES, "epsilon": "norm_eps", "norm_bias": "norm_bias", "attention_bias": "attention_bias",
            "feeding_bias": "mlp_bias", "pool_bias": "classifier_bias",
        },
    }
)  # fmt: skip
"""By family: the names of settings in config.json, by field."""


def _modern(json: Mapping[str, Any], depth: int) -> dict[str, Any]:
    """Read the settings that only ModernBERT has."""
    settings = json.get("rope_parameters") or {}
    if not isinstance(settings, Mapping) or (settings and not {FULL, SLIDING} & set(settings)):
        refuse(json, "rope_parameters", {FULL: {}, SLIDING: {}})
    if not settings:
        refuse(json, "rope_scaling", {}, {"rope_type": "default"}, {"type": "default"})
    ropes = [
        Rope.from_json({}, parameters={"rope_theta": optional(json, name, theta), **(settings.get(kind) or {})})
        for kind, name, theta in ((FULL, "global_rope_theta", 160000.0), (SLIDING, "local_rope_theta", 10000.0))
    ]
    near, period = json["local_attention"], json["global_attn_every_n_layers"]
    kinds = json.get("layer_types")
    if not (is_count(near, least=2) and is_count(period, least=1)):
        raise LanguageModelError(
            f"config.json of a 'modernbert' model sets local_attention={near!r} and global_attn_every_n_layers="
            f"{period!r}; use whole numbers of at least 2 and 1"
        )
    consistent({**json, "half of local_attention": near // 2}, "half of local_attention", "sliding_window", None)
    if kinds is None:
        # The first of every `period` layers sees the whole text.
        kinds = layer_types([layer for layer in range(depth) if layer % int(period)], depth)
    refuse(json, "classifier_pooling", "cls", "mean")
    return {
        "rope": ropes[0],
        "local_rope": ropes[1],
        # local_attention spans both sides; `window` is one side and the token itself.
        "window": near // 2 + 1,
        "windowed": windowed_layers(json, kinds, depth),
        "mean": json["classifier_pooling"] == "mean",
        "pooling": required(json, "classifier_activation"),
    }


def _labels(json: Mapping[str, Any]) -> tuple[str, ...]:
    """Read `id2label`, the names of the classes by index, or make names from their number."""
    count: Any = json.get("num_labels")
    names = json.get("id2label")
    if names is None:
        names = {place: f"LABEL_{place}" for place in range(int(count) if is_count(count, least=1) else 2)}
    # Keys are texts in JSON, but may be numbers in a mapping made in Python.
    names_by_index = {str(place): name for place, name in names.items()} if isinstance(names, Mapping) else {}
    places = [str(place) for place in range(len(names_by_index))]
    if (
        not names_by_index
        or set(names_by_index) != set(places)
        or not all(isinstance(name, str) for name in names_by_index.values())
    ):
        raise LanguageModelError(
            f"config.json of a {json['model_type']!r} model sets id2label={names!r}; it must name the classes by their "
            'places: {"0": "bad", "1": "good"}'
        )
    return tuple(names_by_index[place] for place in places)

"""BERT with a classification head: an encoder that sees in both directions, norms after each part."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int

from bayesrl.errors import LanguageModelError
from bayesrl.lm.transformers.causal import Config, Transformer
from bayesrl.lm.transformers.layers import Embedding, LayerNorm, Linear, activation
from bayesrl.lm.transformers.stored import Stored, affine, optional, refuse, required
from bayesrl.typing import PRNGKey

PROBLEMS = ONE_LABEL, SEVERAL_LABELS, REGRESSION = (
    "single_label_classification",
    "multi_label_classification",
    "regression",
)


@dataclass(frozen=True, kw_only=True)
class BertConfig(Config):
    """The shape of a BERT that classifies texts.

    Args:
        vocab_size: how many tokens there are.
        max_length: the most tokens of a text.
        width: length of the residual stream.
        depth: how many blocks.
        heads: attention heads per block; divides `width`.
        inner: width of the feed-forward layer.
        labels: names of the classes.
        problem: how they are scored, by the name in transformers: "single_label_classification", where just one holds,
            "multi_label_classification", where each may, or "regression".
        token_types: how many kinds of segment there are.
        activation: of the feed-forward layer, by the name in transformers.
        epsilon: of the norms.
        initializer_range: standard deviation of random weights.
        model_type: the family.

    Raises:
        LanguageModelError: the numbers do not fit together, or config.json asks for what is not implemented.
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
    initializer_range: float = 0.02
    model_type: str = "bert"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_heads()
        activation(self.activation)
        if self.problem not in PROBLEMS:
            raise LanguageModelError(f"a bert model has problem={self.problem!r}; use one of {', '.join(PROBLEMS)}")

    @classmethod
    def from_json(cls, json: Mapping[str, Any]) -> "BertConfig":
        """Read what transformers writes as config.json."""
        refuse(json, "position_embedding_type", "absolute")
        refuse(json, "is_decoder", False)
        refuse(json, "add_cross_attention", False)
        labels = _labels(optional(json, "id2label", {"0": "LABEL_0", "1": "LABEL_1"}))
        return cls(
            vocab_size=required(json, "vocab_size"),
            max_length=required(json, "max_position_embeddings"),
            width=required(json, "hidden_size"),
            depth=required(json, "num_hidden_layers"),
            heads=required(json, "num_attention_heads"),
            inner=required(json, "intermediate_size"),
            labels=labels,
            problem=optional(json, "problem_type", REGRESSION if len(labels) == 1 else ONE_LABEL),
            token_types=optional(json, "type_vocab_size", 2),
            activation=optional(json, "hidden_act", "gelu"),
            epsilon=optional(json, "layer_norm_eps", 1e-12),
            initializer_range=optional(json, "initializer_range", 0.02),
        )

    def to_json(self) -> dict[str, Any]:
        """Give what transformers reads as config.json."""
        return {
            "model_type": self.model_type,
            "architectures": ["BertForSequenceClassification"],
            "vocab_size": self.vocab_size,
            "max_position_embeddings": self.max_length,
            "hidden_size": self.width,
            "num_hidden_layers": self.depth,
            "num_attention_heads": self.heads,
            "intermediate_size": self.inner,
            "id2label": {str(index): name for index, name in enumerate(self.labels)},
            "label2id": {name: index for index, name in enumerate(self.labels)},
            "problem_type": self.problem,
            "type_vocab_size": self.token_types,
            "hidden_act": self.activation,
            "layer_norm_eps": self.epsilon,
            "initializer_range": self.initializer_range,
        }


def _labels(names: Any) -> tuple[str, ...]:
    """Read `id2label`: the names of the classes by their places."""
    given = {str(place): name for place, name in names.items()} if isinstance(names, Mapping) else {}
    places = [str(place) for place in range(len(given))]
    if not given or set(given) != set(places) or not all(isinstance(name, str) for name in given.values()):
        raise LanguageModelError(
            f"config.json of a 'bert' model sets id2label={names!r}; it must name the classes by their places: "
            '{"0": "bad", "1": "good"}'
        )
    return tuple(given[place] for place in places)


class BertBlock(eqx.Module):
    """Attention and a feed-forward layer, each added to the residual stream, which is then normalised."""

    query: Linear
    key: Linear
    value: Linear
    output: Linear
    after_attention: LayerNorm
    widen: Linear
    narrow: Linear
    after_feeding: LayerNorm

    @classmethod
    def random(cls, key: PRNGKey, config: BertConfig, dtype: Any) -> "BertBlock":
        """Draw the weights."""
        keys = iter(jax.random.split(key, 6))

        def linear(width: int, out: int) -> Linear:
            return Linear.random(next(keys), width, out, scale=config.initializer_range, bias=True, dtype=dtype)

        width = config.width
        return cls(
            query=linear(width, width),
            key=linear(width, width),
            value=linear(width, width),
            output=linear(width, width),
            after_attention=LayerNorm.fresh(width, config.epsilon, dtype),
            widen=linear(width, config.inner),
            narrow=linear(config.inner, width),
            after_feeding=LayerNorm.fresh(width, config.epsilon, dtype),
        )

    def __call__(
        self, x: Float[Array, "n width"], mask: Bool[Array, "1 n"], config: BertConfig
    ) -> Float[Array, "n width"]:
        """Give the residual stream after the block."""
        heads = (x.shape[0], config.heads, -1)
        query, key, value = (part(x).reshape(heads) for part in (self.query, self.key, self.value))
        out = jax.nn.dot_product_attention(query, key, value, mask=jnp.broadcast_to(mask, (1, *mask.shape)))
        x = self.after_attention(x + self.output(out.reshape(x.shape)))
        return self.after_feeding(x + self.narrow(activation(config.activation)(self.widen(x))))


class BertClassifier(Transformer):
    """BERT with a head that scores a text for each class; `jax.vmap` makes batches of it.

        x = norm(token[t] + position[i] + kind[s]);  blocks;  logits = C·tanh(P·x₀ + p) + c

    Unlike those of causal models, texts are padded on the right, as BERT was trained.

    Example:
        >>> import equinox as eqx, jax, jax.numpy as jnp
        >>> config = BertConfig(vocab_size=7, max_length=8, width=4, depth=1, heads=2, inner=8)
        >>> model = BertClassifier.random(jax.random.key(0), config)
        >>> eqx.filter_jit(model)(jnp.array([1, 2, 0]), jnp.array([True, True, False])).shape
        (2,)

    References:
        Devlin et al. (2019), "BERT", section 3.
    """

    config: BertConfig = eqx.field(static=True)
    token: Embedding
    position: Embedding
    kind: Embedding
    norm: LayerNorm
    blocks: tuple[BertBlock, ...]
    pool: Linear
    head: Linear
    PREFIX: ClassVar[str] = "bert."

    @classmethod
    def random(cls, key: PRNGKey, config: BertConfig, *, dtype: Any = jnp.float32) -> "BertClassifier":
        """Make a model with random weights; the key is consumed.

        Args:
            key: consumed.
            config: the shape.
            dtype: of all weights: float32 or bfloat16.
        """
        keys = jax.random.split(key, config.depth + 5)
        make = {"scale": config.initializer_range, "dtype": dtype}
        return cls(
            config=config,
            token=Embedding.random(keys[0], config.vocab_size, config.width, **make),
            position=Embedding.random(keys[1], config.max_length, config.width, **make),
            kind=Embedding.random(keys[2], config.token_types, config.width, **make),
            norm=LayerNorm.fresh(config.width, config.epsilon, dtype),
            blocks=tuple(BertBlock.random(key, config, dtype) for key in keys[5:]),
            pool=Linear.random(keys[3], config.width, config.width, bias=True, **make),
            head=Linear.random(keys[4], config.width, len(config.labels), bias=True, **make),
        )

    @classmethod
    def tensors(cls, config: BertConfig) -> Iterator[Stored]:
        """List the arrays with their names in a checkpoint."""
        for part, ours in (("word", "token"), ("position", "position"), ("token_type", "kind")):
            yield Stored(f"bert.embeddings.{part}_embeddings.weight", f".{ours}.weight")
        yield from affine("bert.embeddings.LayerNorm", ".norm")
        for layer in range(config.depth):
            name, path = f"bert.encoder.layer.{layer}", f".blocks[{layer}]"
            for part in ("query", "key", "value"):
                yield from affine(f"{name}.attention.self.{part}", f"{path}.{part}")
            yield from affine(f"{name}.attention.output.dense", f"{path}.output")
            yield from affine(f"{name}.attention.output.LayerNorm", f"{path}.after_attention")
            yield from affine(f"{name}.intermediate.dense", f"{path}.widen")
            yield from affine(f"{name}.output.dense", f"{path}.narrow")
            yield from affine(f"{name}.output.LayerNorm", f"{path}.after_feeding")
        yield from affine("bert.pooler.dense", ".pool")
        yield from affine("classifier", ".head")

    def __call__(
        self, tokens: Int[Array, "n"], real: Bool[Array, "n"], kinds: Int[Array, "n"] | None = None
    ) -> Float[Array, "labels"]:
        """Score a text.

        Args:
            tokens: token ids, the first of which is the one that BERT pools, [n].
            real: False for padding, [n].
            kinds: segment of each token, [n]; None is the first for all.

        Returns:
            unnormalised log-probabilities of the classes, in float32, [labels].
        """
        x = self.token(tokens) + self.position(jnp.arange(tokens.shape[0]))
        x = self.norm(x + self.kind(jnp.zeros_like(tokens) if kinds is None else kinds))
        mask = real[None, :]
        for block in self.blocks:
            x = block(x, mask, self.config)
        return self.head.scores(jnp.tanh(self.pool(x[0])))

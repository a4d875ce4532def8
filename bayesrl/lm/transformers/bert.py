"""BERT and its relatives with a classification head: encoders that see in both directions."""

from collections.abc import Iterator
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from bayesrl.arguments import checked
from bayesrl.errors import LanguageModelError
from bayesrl.lm.transformers.base import Transformer, WeightType, check_model_room
from bayesrl.lm.transformers.bert_config import BertConfig
from bayesrl.lm.transformers.checkpoint_names import CheckpointTensor, affine
from bayesrl.lm.transformers.layers.block import TransformerBlock, attention_inputs
from bayesrl.lm.transformers.layers.linear_and_norm import Embedding, Linear, Norm, find_activation
from bayesrl.typing import PRNGKey


class BertClassifier(Transformer):
    """BERT, RoBERTa, DistilBERT or ModernBERT with a head that scores a text for each class; `jax.vmap` makes batches.

        x = norm(token[t] + position[i] + kind[s]);  blocks;  logits = C·tanh(P·x₀ + p) + c

    Unlike those of causal models, texts are padded on the right, as BERT was trained. Its relatives lack some of these
    parts, or have another activation than tanh, according to `config`.

    Example:
        >>> import equinox as eqx, jax, jax.numpy as jnp
        >>> config = BertConfig(vocab_size=7, max_length=8, width=4, depth=1, heads=2, inner=8)
        >>> model = BertClassifier.init(jax.random.key(0), config)
        >>> eqx.filter_jit(model)(jnp.array([1, 2, 0]), jnp.array([True, True, False])).shape
        (2,)

    References:
        Devlin et al. (2019), "BERT", section 3; Liu et al. (2019), "RoBERTa"; Sanh et al. (2019), "DistilBERT";
        Warner et al. (2024), "Smarter, better, faster, longer", section 2.
    """

    config: BertConfig = eqx.field(static=True)
    token: Embedding
    position: Embedding | None
    kind: Embedding | None
    norm: Norm
    blocks: tuple[TransformerBlock, ...]
    last_norm: Norm | None
    pool: Linear
    pool_norm: Norm | None
    head: Linear

    @classmethod
    @checked(LanguageModelError)
    def init(cls, key: PRNGKey, config: BertConfig, *, dtype: WeightType = jnp.float32) -> "BertClassifier":
        """Make a model with random weights; the key is consumed.

        Args:
            key: consumed.
            config: the shape.
            dtype: of all weights: float32 or bfloat16.
        """
        check_model_room(config, key)
        keys = jax.random.split(key, config.depth + 5)
        scale, width, traits = config.initializer_range, config.width, config.traits
        make: dict[str, Any] = {"scale": scale, "dtype": dtype}
        # RoBERTa's table begins with rows that no text uses; its checkpoints hold them.
        rows = config.max_length + config.first_position
        fresh = config.layout(0).init_norm
        blocks = [
            TransformerBlock.init(own, config.layout(layer), scale=scale, output_scale=scale, dtype=dtype)
            for layer, own in enumerate(keys[5:])
        ]
        return cls(
            config=config,
            token=Embedding.init(keys[0], config.vocab_size, width, **make),
            position=Embedding.init(keys[1], rows, width, **make) if traits.learned else None,
            kind=Embedding.init(keys[2], config.token_types, width, **make) if traits.kinds else None,
            norm=fresh(width, dtype),
            blocks=tuple(blocks),
            # ModernBERT alone has no table of positions, and it alone has this norm and `pool_norm`.
            last_norm=None if traits.learned else fresh(width, dtype),
            pool=Linear.init(keys[3], width, width, bias=config.pool_bias, **make),
            pool_norm=None if traits.learned else fresh(width, dtype),
            head=Linear.init(keys[4], width, len(config.labels), bias=True, **make),
        )

    @classmethod
    def tensors(cls, config: BertConfig) -> Iterator[CheckpointTensor]:
        """List the arrays with their names in a checkpoint."""
        if config.model_type == "modernbert":
            yield from _modern(config)
            return
        distil = config.model_type == "distilbert"
        # The arrays of XLM-RoBERTa have RoBERTa's names.
        base = "distilbert" if distil else "bert" if config.model_type == "bert" else "roberta"
        for part, ours in (("word", "token"), ("position", "position"), ("token_type", "kind")):
            if ours != "kind" or config.traits.kinds:
                yield CheckpointTensor(f"{base}.embeddings.{part}_embeddings.weight", f".{ours}.weight")
        yield from affine(f"{base}.embeddings.LayerNorm", ".norm")
        for layer in range(config.depth):
            name = f"{base}.transformer.layer.{layer}" if distil else f"{base}.encoder.layer.{layer}"
            for part, ours in (_DISTIL if distil else _PARTS).items():
                yield from affine(f"{name}.{part}", f".blocks[{layer}].{ours}")
        pool, head = _HEADS[base]
        yield from affine(pool, ".pool")
        yield from affine(head, ".head")

    def __call__(
        self, tokens: Int[Array, "n"], mask: Bool[Array, "n"], kinds: Int[Array, "n"] | None = None
    ) -> Float[Array, "labels"]:
        """Score a text.

        Args:
            tokens: token ids, the first of which is the one that BERT pools, [n].
            mask: False for padding, [n].
            kinds: segment of each token, [n]; None means the first segment for all.

        Returns:
            Unnormalized log-probabilities of the classes, in float32, [labels].
        """
        return self.head.scores(self.features(tokens, mask, kinds))

    def features(
        self, tokens: Int[Array, "n"], mask: Bool[Array, "n"], kinds: Int[Array, "n"] | None = None
    ) -> Float[Array, "width"]:
        """Return what the last layer reads of a text, [width]; arguments as above."""
        places = jnp.arange(tokens.shape[0])
        x = self.token(tokens)
        if self.position is not None:
            x = x + self.position(places + self.config.first_position)
        if self.kind is not None:
            x = x + self.kind(jnp.zeros_like(tokens) if kinds is None else kinds)
        x = self.norm(x)
        apart = jnp.abs(places[:, None] - places[None, :])
        seen = jnp.broadcast_to(mask[None, :], apart.shape)
        inputs = attention_inputs(self.blocks, places, lambda window: seen & (apart < window) if window else seen)
        for block in self.blocks:
            x, _, _ = block(x, inputs[block.layout.window, block.layout.rope])
        x = x if self.last_norm is None else self.last_norm(x)
        pooled = jnp.where(mask[:, None], x, 0).sum(0) / jnp.maximum(mask.sum(), 1) if self.config.mean else x[0]
        pooled = find_activation(self.config.pooled_by)(self.pool(pooled.astype(x.dtype)))
        return pooled if self.pool_norm is None else self.pool_norm(pooled)


_PARTS = {
    "attention.self.query": "query",
    "attention.self.key": "key",
    "attention.self.value": "value",
    "attention.output.dense": "output",
    "attention.output.LayerNorm": "after_attention",
    "intermediate.dense": "widen",
    "output.dense": "narrow",
    "output.LayerNorm": "after_feeding",
}
_DISTIL = {
    "attention.q_lin": "query",
    "attention.k_lin": "key",
    "attention.v_lin": "value",
    "attention.out_lin": "output",
    "sa_layer_norm": "after_attention",
    "ffn.lin1": "widen",
    "ffn.lin2": "narrow",
    "output_layer_norm": "after_feeding",
}
_HEADS = {
    "bert": ("bert.pooler.dense", "classifier"),
    "roberta": ("classifier.dense", "classifier.out_proj"),
    "distilbert": ("pre_classifier", "classifier"),
}


def _modern(config: BertConfig) -> Iterator[CheckpointTensor]:
    """List the arrays of a ModernBERT."""
    yield CheckpointTensor("model.embeddings.tok_embeddings.weight", ".token.weight")
    yield from affine("model.embeddings.norm", ".norm", bias=config.norm_bias)
    for layer in range(config.depth):
        name, path = f"model.layers.{layer}", f".blocks[{layer}]"
        if layer:
            yield from affine(f"{name}.attn_norm", f"{path}.before_attention", bias=config.norm_bias)
        yield from affine(f"{name}.attn.Wqkv", f"{path}.mix", bias=config.attention_bias)
        yield from affine(f"{name}.attn.Wo", f"{path}.output", bias=config.attention_bias)
        yield from affine(f"{name}.mlp_norm", f"{path}.before_feeding", bias=config.norm_bias)
        yield from affine(f"{name}.mlp.Wi", f"{path}.widen", bias=config.feeding_bias)
        yield from affine(f"{name}.mlp.Wo", f"{path}.narrow", bias=config.feeding_bias)
    yield from affine("model.final_norm", ".last_norm", bias=config.norm_bias)
    yield from affine("head.dense", ".pool", bias=config.pool_bias)
    yield from affine("head.norm", ".pool_norm", bias=config.norm_bias)
    yield from affine("classifier", ".head")

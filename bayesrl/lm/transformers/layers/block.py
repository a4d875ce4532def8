"""`TransformerBlock`: attention and a feed-forward layer; `Layout` selects the variant of the family."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int

from bayesrl.lm.transformers.layers.experts import Experts
from bayesrl.lm.transformers.layers.kv_cache import Cache, attend
from bayesrl.lm.transformers.layers.linear_and_norm import LayerNorm, Linear, Norm, RMSNorm, find_activation
from bayesrl.lm.transformers.layers.rope import Rope, Rotation, apply_rotary
from bayesrl.typing import PRNGKey

PRE_NORMS = ("before_attention", "before_feeding")
POST_NORMS = ("after_attention", "after_feeding")


@dataclass(frozen=True, kw_only=True)
class Layout:
    """The shape of a block, and how it computes where families differ."""

    width: int  # of the residual stream
    inner: int  # width of the feed-forward layer
    heads: int
    kv_heads: int  # heads of keys and values, which the attention heads share
    head_dim: int  # length of a query
    activation: str  # of the feed-forward layer, by its name in transformers
    epsilon: float  # of the norms
    norm: str = "rms"  # or "rms_plus_one", whose weight is added to 1; or "layer"
    norms: tuple[str, ...] = PRE_NORMS  # their places: before or after attention and feed-forward layer
    norm_of_sums: bool = False  # norms after a part apply to the residual stream, as in BERT, not to the part's output
    norm_bias: bool = True  # whether norms of kind "layer" have one
    query_key_norm: str = ""  # "head" normalizes each query and key, "whole" all heads at once
    joined: str = ""  # one matrix gives queries, keys and values: "stacked" one after another, or "by_head"
    gated: str = ""  # "apart" from what it gates, or "joined" with it in one matrix
    attention_bias: bool = False  # of queries, keys and values
    output_bias: bool = False  # of the output of attention
    feeding_bias: bool = False
    parallel: bool = False  # both parts read the residual stream before either writes to it
    rope: Rope | None = None  # how positions turn; None if they do not
    window: int = 0  # how many tokens each token sees, itself included; 0 means all. In an encoder, to each side
    scale: float = 0.0  # of the scores; 0 means 1/√head_dim
    cap: float = 0.0  # bound of the scores; 0 for no bound
    experts: int = 0  # number of feed-forward layers to choose from; 0 means a single one, without choice
    chosen: int = 0  # how many of them each token uses

    def init_norm(self, width: int, dtype: Any) -> Norm:
        """Make a norm of this kind."""
        if self.norm == "layer":
            return LayerNorm.init(width, self.epsilon, dtype, bias=self.norm_bias)
        return RMSNorm.init(width, self.epsilon, dtype, offset=float(self.norm == "rms_plus_one"))

    def linears(self) -> Iterator[tuple[str, int, int, bool]]:
        """List the linear maps: name, width, outputs, and whether they have a bias."""
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        if self.joined:
            yield "mix", self.width, queries + 2 * keys, self.attention_bias
        else:
            for name, out in (("query", queries), ("key", keys), ("value", keys)):
                yield name, self.width, out, self.attention_bias
        yield "output", queries, self.width, self.output_bias
        if self.experts:
            return
        if self.gated == "apart":
            yield "gate", self.width, self.inner, self.feeding_bias
        yield "widen", self.width, self.inner * (2 if self.gated == "joined" else 1), self.feeding_bias
        yield "narrow", self.inner, self.width, self.feeding_bias


class AttentionInputs(NamedTuple):
    """What the new tokens of a layer may attend to, and how their positions turn."""

    visible: Bool[Array, "n sight"]  # which slots each token sees
    rotation: Rotation | None  # None where positions do not turn


def attention_inputs(
    blocks: Sequence["TransformerBlock"], positions: Int[Array, "n"], visible: Callable[[int], Bool[Array, "n sight"]]
) -> dict[Any, AttentionInputs]:
    """Compute the inputs of each kind of layer, by its window and its rope, once for all layers of the kind."""
    kinds = {(block.layout.window, block.layout.rope): block.layout.head_dim for block in blocks}
    return {
        (window, rope): AttentionInputs(visible(window), None if rope is None else rope.rotation(positions, head_dim))
        for (window, rope), head_dim in kinds.items()
    }


class TransformerBlock(eqx.Module):
    """Attention and a feed-forward layer, each added to the residual stream.

        x += after(attention(before(x)));  x += after(feed(before(x)))

    where `before` and `after` are norms, or nothing; `Layout` tells which, and what else families do differently.
    """

    layout: Layout = eqx.field(static=True)
    before_attention: Norm | None
    mix: Linear | None
    query: Linear | None
    key: Linear | None
    value: Linear | None
    output: Linear
    query_norm: Norm | None
    key_norm: Norm | None
    after_attention: Norm | None
    before_feeding: Norm | None
    experts: Experts | None
    gate: Linear | None
    widen: Linear | None
    narrow: Linear | None
    after_feeding: Norm | None

    @classmethod
    def init(cls, key: PRNGKey, layout: Layout, *, scale: float, output_scale: float, dtype: Any) -> "TransformerBlock":
        """Draw the weights; the key is consumed."""
        shapes = list(layout.linears())
        keys = jax.random.split(key, len(shapes) + (layout.experts > 0))
        # None is an empty pytree, so a part that the layout lacks has no leaf, and no name in a checkpoint.
        parts: dict[str, Any] = dict.fromkeys(cls.__dataclass_fields__)
        # Not strict: with experts there is one key more, the last, and it is theirs.
        for own, (name, width, out, bias) in zip(keys, shapes, strict=False):
            size = output_scale if name in ("output", "narrow") else scale
            parts[name] = Linear.init(own, width, out, scale=size, bias=bias, dtype=dtype)
        if layout.experts:
            shape = (layout.experts, layout.width, layout.inner)
            parts["experts"] = Experts.init(keys[-1], *shape, scale=scale, output_scale=output_scale, dtype=dtype)
        for name in layout.norms:
            parts[name] = layout.init_norm(layout.width, dtype)
        if layout.query_key_norm:
            # A norm by head has one weight that all heads share.
            queries, keys_ = (layout.heads, layout.kv_heads) if layout.query_key_norm == "whole" else (1, 1)
            parts["query_norm"] = layout.init_norm(queries * layout.head_dim, dtype)
            parts["key_norm"] = layout.init_norm(keys_ * layout.head_dim, dtype)
        return cls(**{**parts, "layout": layout})

    def __call__(
        self, x: Float[Array, "n width"], sight: AttentionInputs, cache: Cache | None = None, layer: int = 0
    ) -> tuple[Float[Array, "n width"], Array, Array]:
        """Return the residual stream after the block, and the layer's keys and values."""
        out, keys, values = self._attend(_apply(self.before_attention, x), sight, cache, layer)
        if self.layout.norm_of_sums:
            x = _apply(self.after_attention, x + out)
            return _apply(self.after_feeding, x + self._feed(x)), keys, values
        after = x + _apply(self.after_attention, out)
        read = x if self.layout.parallel else after
        return after + _apply(self.after_feeding, self._feed(_apply(self.before_feeding, read))), keys, values

    def _attend(
        self, x: Float[Array, "n width"], sight: AttentionInputs, cache: Cache | None, layer: int
    ) -> tuple[Float[Array, "n width"], Array, Array]:
        layout = self.layout
        query, key, value = self._project(x)
        if sight.rotation is not None:
            # Turned before they are stored: cached keys keep their positions and are never turned again.
            query, key = apply_rotary(query, sight.rotation), apply_rotary(key, sight.rotation)
        out, keys, values = attend(query, key, value, sight.visible, cache, layer, scale=layout.scale, cap=layout.cap)
        return self.output(out), keys, values

    def _project(self, x: Float[Array, "n width"]) -> tuple[Array, Array, Array]:
        """Return queries, keys and values, [n, heads, head_dim]."""
        layout, n = self.layout, x.shape[0]
        if self.mix is not None:
            mixed = self.mix(x)
            if layout.joined == "by_head":
                # The query, key and value of a head lie side by side here, so the axis of heads comes first.
                query, key, value = jnp.split(mixed.reshape(n, layout.heads, -1), 3, axis=-1)
                return query, key, value
            mixed = mixed.reshape(n, -1, layout.head_dim)
            query, key, value = jnp.split(mixed, [layout.heads, layout.heads + layout.kv_heads], axis=1)
            return query, key, value
        query, key, value = _apply(self.query, x), _apply(self.key, x), _apply(self.value, x)
        # This norm takes its mean over all heads, so it must come before they are split.
        if layout.query_key_norm == "whole":
            query, key = _apply(self.query_norm, query), _apply(self.key_norm, key)
        query, key, value = (part.reshape(n, -1, layout.head_dim) for part in (query, key, value))
        if layout.query_key_norm == "head":
            query, key = _apply(self.query_norm, query), _apply(self.key_norm, key)
        return query, key, value

    def _feed(self, x: Float[Array, "n width"]) -> Float[Array, "n width"]:
        act = find_activation(self.layout.activation)
        if self.experts is not None:
            return self.experts(x, act, self.layout.chosen)
        wide = _apply(self.widen, x)
        if self.layout.gated == "joined":
            # The half that goes through the activation comes first, in Phi-3 and in ModernBERT.
            first, second = jnp.split(wide, 2, axis=-1)
            return _apply(self.narrow, act(first) * second)
        return _apply(self.narrow, act(wide) if self.gate is None else act(self.gate(x)) * wide)


def _apply(part: Norm | Linear | None, x: Array) -> Array:
    """Send x through a part that a block may lack."""
    return x if part is None else part(x)

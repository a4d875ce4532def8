"""`Cache`: the keys and values of the tokens so far, and attention over them."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Bool, Float, Int, Shaped

from bayesrl.errors import LanguageModelError


class Cache(eqx.Module):
    """Keys and values of the tokens so far: one slot per token, padding included.

    `length` and `count` may be Python integers. Attention then covers only the slots in use, which makes a prefill as
    cheap as attention without a cache. As arrays, they let one compiled step serve all lengths.
    """

    keys: tuple[Float[Array, "capacity kv_heads head_dim"], ...]  # per layer
    values: tuple[Float[Array, "capacity kv_heads head_dim"], ...]
    mask: Bool[Array, "capacity"]  # which slots hold a token rather than padding, or nothing
    length: int | Int[Array, ""] = 0  # slots in use
    count: int | Int[Array, ""] = 0  # real tokens so far: the position of the next one

    @classmethod
    def empty(cls, layers: int, capacity: int, kv_heads: int, head_dim: int, dtype: Any) -> "Cache":
        """Make an empty cache."""
        slots = tuple(jnp.zeros((capacity, kv_heads, head_dim), dtype) for _ in range(layers))
        return cls(slots, slots, jnp.zeros(capacity, bool))

    @property
    def capacity(self) -> int:
        """Number of slots."""
        return self.mask.shape[0]

    @property
    def axes(self) -> "Cache":
        """The `in_axes` and `out_axes` that `jax.vmap` needs for rows that grow in step: one `length` for all.

        Example:
            >>> import jax, jax.numpy as jnp
            >>> from bayesrl.lm import GPT2, GPT2Config
            >>> model = GPT2.init(jax.random.key(0), GPT2Config(vocab_size=5, max_length=8, width=4, depth=1, heads=2))
            >>> empty = model.start(8)
            >>> feed = jax.vmap(model.extend, in_axes=(0, 0, None), out_axes=(0, empty.axes))
            >>> hidden, caches = jax.jit(feed)(jnp.zeros((3, 2), int), jnp.ones((3, 2), bool), empty)
            >>> hidden.shape, caches.keys[0].shape, int(caches.length)
            ((3, 2, 4), (3, 8, 2, 2), 2)
        """
        # All rows share one length: with a length for each, vmap would turn the write of a slot into a scatter.
        shared = jax.tree_util.GetAttrKey("length")
        return jax.tree_util.tree_map_with_path(lambda path, _: None if path == (shared,) else 0, self)


class TokenSlots(NamedTuple):
    """The slots of new tokens, and what each of them may attend to.

    Padding has the position of the real token before it, but no token attends to padding.
    """

    positions: Int[Array, "n"]  # place among the real tokens; 0 for padding before them
    visible: Bool[Array, "n sight"]  # which slots each token sees
    mask: Bool[Array, "capacity"]  # `Cache.mask` with the new tokens
    num_tokens: Int[Array, ""]  # `Cache.count` with the new tokens

    def visible_within(self, window: int) -> Bool[Array, "n sight"]:
        """Return which slots each token sees within a window of `window` tokens, itself included; 0 sees all."""
        if window == 0:
            return self.visible
        # Counted in real tokens, as positions are, so that padding does not use up the window.
        places = jnp.cumsum(self.mask[: self.visible.shape[1]], dtype=jnp.int32) - 1
        return self.visible & (self.positions[:, None] - places[None, :] < window)

    def updated_cache(self, cache: Cache, keys: Sequence[Array], values: Sequence[Array]) -> Cache:
        """Return the cache with the new tokens in it, from the keys and values of each layer."""
        return Cache(tuple(keys), tuple(values), self.mask, cache.length + self.visible.shape[0], self.num_tokens)


def allocate_slots(mask: Bool[Array, "n"], cache: Cache) -> TokenSlots:
    """Place n new tokens after those in a cache; a token sees itself and the real tokens before it."""
    n = mask.shape[0]
    start = cache.length
    # A traced length cannot be checked, and `dynamic_update_slice` would clamp it and write over the last slots.
    if n > cache.capacity or (isinstance(start, int) and start + n > cache.capacity):
        raise LanguageModelError(
            f"{n} tokens do not fit into a cache of capacity {cache.capacity} that holds {start}; "
            "pass a larger capacity to start()"
        )
    everything = write_slots(cache.mask, mask, start)
    # Shapes cannot depend on a traced length: attention then covers every slot, and the mask hides the unused ones.
    sight = start + n if isinstance(start, int) else cache.capacity
    earlier = jnp.arange(sight)[None, :] <= start + jnp.arange(n)[:, None]
    counts = cache.count + jnp.cumsum(mask, dtype=jnp.int32)
    return TokenSlots(jnp.maximum(counts - 1, 0), earlier & everything[None, :sight], everything, counts[-1])


def write_slots(
    slots: Shaped[Array, "capacity *slot"], new: Shaped[Array, "n *slot"], start: int | Int[Array, ""]
) -> Array:
    """Write new slots after those in use, [capacity, ...]."""
    new = new.astype(slots.dtype)
    if isinstance(start, int):
        # `dynamic_update_slice` would become a scatter under vmap; a concatenation stays one.
        return jnp.concatenate([slots[:start], new, slots[start + new.shape[0] :]])
    return lax.dynamic_update_slice_in_dim(slots, new, start, 0)


def _attend_one(
    query: Float[Array, "heads head_dim"],
    keys: Float[Array, "sight kv_heads head_dim"],
    values: Float[Array, "sight kv_heads head_dim"],
    visible: Bool[Array, "sight"],
    scale: float,
    cap: float,
) -> Float[Array, "1 width"]:
    """Attend from one token without matrix products, which for one row cost more to lay out than to compute."""
    wide = jnp.promote_types(query.dtype, jnp.float32)
    # Query heads that share a key head are neighbors, so a reshape groups them.
    shared = query.reshape(keys.shape[1], -1, query.shape[-1]).astype(wide) * scale
    scores = soft_cap((shared * keys[:, :, None].astype(wide)).sum(-1), cap)
    # Half the lowest number: the softmax subtracts the largest score, which must stay finite where nothing is visible.
    weights = jax.nn.softmax(jnp.where(visible[:, None, None], scores, jnp.finfo(wide).min / 2), axis=0)
    return (weights[..., None] * values[:, :, None].astype(wide)).sum(0).astype(query.dtype).reshape(1, -1)


def _attend_capped(
    query: Float[Array, "n heads head_dim"],
    keys: Float[Array, "sight kv_heads head_dim"],
    values: Float[Array, "sight kv_heads head_dim"],
    visible: Bool[Array, "n sight"],
    scale: float,
    cap: float,
) -> Float[Array, "n width"]:
    """Attend with bounded scores, which JAX's own attention does not have."""
    wide = jnp.promote_types(query.dtype, jnp.float32)
    shared = query.reshape(query.shape[0], keys.shape[1], -1, query.shape[-1])
    scores = jnp.einsum("nkgd,skd->kgns", shared, keys, preferred_element_type=wide) * scale
    # Cap first, mask second: tanh would lift a masked score up to -cap.
    weights = jax.nn.softmax(jnp.where(visible, soft_cap(scores, cap), jnp.finfo(wide).min / 2), axis=-1)
    out = jnp.einsum("kgns,skd->nkgd", weights.astype(values.dtype), values)
    return out.reshape(query.shape[0], -1)


def soft_cap(scores: Float[Array, "*n"], cap: float) -> Float[Array, "*n"]:
    """Return cap·tanh(scores / cap), which stays within ±cap; a cap of 0 leaves scores as they are.

    References:
        Gemma Team (2024), "Gemma 2", section 2.
    """
    return cap * jnp.tanh(scores / cap) if cap else scores


def attend(
    query: Float[Array, "n heads head_dim"],
    key: Float[Array, "n kv_heads head_dim"],
    value: Float[Array, "n kv_heads head_dim"],
    visible: Bool[Array, "n sight"],  # from `allocate_slots`, or of a whole text
    cache: Cache | None = None,  # of the earlier tokens; None if there are none, and none follow
    layer: int = 0,  # of the cache
    *,
    scale: float = 0.0,  # of the scores; 0 is 1/√head_dim
    cap: float = 0.0,  # bounds the scores; see `soft_cap`
) -> tuple[Float[Array, "n width"], Array, Array]:
    """Attend from n new tokens to themselves and to the tokens in a layer of the cache.

        out_i = Σ_j softmax_j(scale·q_i·k_j) v_j,   over the slots j that `visible` lets i see

    If there are fewer key heads than query heads, several query heads share one. The softmax is in float32. A token
    that sees nothing, which happens only to padding, gets a finite average.

    Returns:
        The output, [n, heads·head_dim]; and the layer's keys and values, including the new ones.

    References:
        Vaswani et al. (2017), "Attention is all you need", equation 1; Ainslie et al. (2023), "GQA", section 2.2.
    """
    keys, values = key, value
    if cache is not None:
        stored = ((cache.keys[layer], key), (cache.values[layer], value))
        keys, values = (write_slots(slots, new, cache.length) for slots, new in stored)
    sight = visible.shape[1]
    # Without earlier tokens, use the new keys directly, so that XLA need not wait for the write into the cache.
    seen = (key, value) if sight == key.shape[0] else (keys[:sight], values[:sight])
    scale = scale or 1 / math.sqrt(query.shape[-1])
    if query.shape[0] == 1 and sight > 1:
        return _attend_one(query[0], *seen, visible[0], scale, cap), keys, values
    if cap:
        return _attend_capped(query, *seen, visible, scale, cap), keys, values
    # JAX masks scores by a large negative number, not by -inf, so rows that see nothing stay finite.
    out = jax.nn.dot_product_attention(query, *seen, mask=visible[None], scale=scale)
    return out.reshape(query.shape[0], -1), keys, values

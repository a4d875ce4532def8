"""`Decoder`: embeddings, blocks, a norm and a head, the parts of every causal family."""

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int

from bayesrl.arguments import checked
from bayesrl.errors import LanguageModelError
from bayesrl.lm.transformers.base import AnyConfig, CausalLM, Config, WeightType, check_capacity, check_model_room
from bayesrl.lm.transformers.layers.block import TransformerBlock, attention_inputs
from bayesrl.lm.transformers.layers.kv_cache import Cache, allocate_slots, soft_cap
from bayesrl.lm.transformers.layers.linear_and_norm import Embedding, Linear, Norm
from bayesrl.typing import PRNGKey


class DecoderConfig(Config):
    """The configuration of a `Decoder` beyond its blocks."""

    tied: bool  # whether the logits use the table of the tokens
    initializer_range: float  # standard deviation of random weights

    @property
    def learned_positions(self) -> bool:
        """Whether there is a table of positions."""
        return False

    @property
    def embedding_scale(self) -> float:
        """The factor of embedded tokens."""
        return 1.0

    @property
    def cap(self) -> float:
        """Bound of the logits; 0 for no bound."""
        return 0.0


class Decoder(CausalLM):
    """A causal model of blocks.

    x = scale·token[t] + position[i];  blocks;  logits = H·norm(x)
    """

    config: eqx.AbstractVar[DecoderConfig]
    token: Embedding
    position: Embedding | None
    blocks: tuple[TransformerBlock, ...]
    norm: Norm  # after the blocks
    head: Linear | None  # None if the table of tokens is the head too

    @classmethod
    @checked(LanguageModelError)
    def init(cls, key: PRNGKey, config: AnyConfig, *, dtype: WeightType = jnp.float32) -> "Decoder":
        """Make a model with random weights; those that write to the residual stream are smaller by √(2·depth).

        Args:
            key: consumed.
            config: the shape.
            dtype: of all weights: float32 or bfloat16.
        """
        check_model_room(config, key)
        # Keys in order: the tokens, the positions if there is a table, the head, and then the blocks.
        first = 2 + config.learned_positions
        keys = jax.random.split(key, config.depth + first)
        scale = config.initializer_range
        make = {"scale": scale, "dtype": dtype}
        output_scale = scale / (2 * config.depth) ** 0.5
        blocks = [
            TransformerBlock.init(own, config.layout(layer), scale=scale, output_scale=output_scale, dtype=dtype)
            for layer, own in enumerate(keys[first:])
        ]
        table = Embedding.init(keys[1], config.max_length, config.width, **make) if first == 3 else None
        last = keys[first - 1]
        return cls(
            config=config,
            token=Embedding.init(keys[0], config.vocab_size, config.width, **make),
            position=table,
            blocks=tuple(blocks),
            norm=config.layout(0).init_norm(config.width, dtype),
            head=None if config.tied else Linear.init(last, config.width, config.vocab_size, bias=False, **make),
        )

    def start(self, capacity: int) -> Cache:
        """Make an empty cache; see `CausalLM.start`."""
        check_capacity(capacity, self.config)
        # Heads are the same in all layers, so the first layer's shape serves all.
        layout = self.config.layout(0)
        return Cache.empty(self.config.depth, capacity, layout.kv_heads, layout.head_dim, self.token.weight.dtype)

    def extend(
        self, tokens: Int[Array, "n"], mask: Bool[Array, "n"], cache: Cache
    ) -> tuple[Float[Array, "n width"], Cache]:
        """Feed n tokens; see `CausalLM.extend`."""
        slots = allocate_slots(mask, cache)
        x = self.token(tokens)
        if self.config.embedding_scale != 1:
            # Gemma rounds the factor to the dtype of its weights before it multiplies.
            x = x * jnp.asarray(self.config.embedding_scale, x.dtype)
        if self.position is not None:
            x = x + self.position(slots.positions)
        # A cache that a window covers needs no mask of its own.
        inputs = attention_inputs(
            self.blocks, slots.positions, lambda window: slots.visible_within(window if window < cache.capacity else 0)
        )
        keys, values = [], []
        for layer, block in enumerate(self.blocks):
            x, key, value = block(x, inputs[block.layout.window, block.layout.rope], cache, layer)
            keys.append(key)
            values.append(value)
        return self.norm(x), slots.updated_cache(cache, keys, values)

    def logits(self, hidden: Float[Array, "*n width"]) -> Float[Array, "*n vocab"]:
        """Return the logits in float32; see `CausalLM.logits`."""
        return soft_cap((self.token if self.head is None else self.head).scores(hidden), self.config.cap)

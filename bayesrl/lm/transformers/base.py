"""`CausalLM`: the interface of every autoregressive language model, and its description for checkpoints."""

import abc
import dataclasses
from collections.abc import Iterator, Mapping
from typing import Annotated, Any

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Bool, Float, Int

from bayesrl.argument_types import Requirement, checker
from bayesrl.arguments import Count, CountOrZero, NonNegative, check_memory
from bayesrl.errors import LanguageModelError
from bayesrl.lm.transformers.checkpoint_names import CheckpointTensor
from bayesrl.lm.transformers.config_json import OPTIONS
from bayesrl.lm.transformers.layers.block import Layout
from bayesrl.lm.transformers.layers.kv_cache import Cache
from bayesrl.lm.transformers.layers.linear_and_norm import find_activation
from bayesrl.typing import PRNGKey
from bayesrl.value_checks import format_value, is_traced


class Config(abc.ABC):
    """The shape of a model: a frozen dataclass with JSON-able fields."""

    model_type: str  # the family, by its name in transformers
    vocab_size: int
    max_length: int  # the context length: the most tokens that the model can read
    width: int  # length of the residual stream
    depth: int  # how many blocks
    heads: int  # attention heads per block
    activation: str  # of the feed-forward layers, by its name in transformers
    epsilon: float  # of the norms

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):  # type: ignore[arg-type]  # every subclass is a dataclass
            # Types, not strings: under `from __future__ import annotations`, `known` would find none of them.
            value, kind = getattr(self, field.name), field.type
            # A default of 0 means "without", so 0 is a value too; any other whole number must count something.
            count = CountOrZero if field.default == 0 else Count
            known: dict[Any, Any] = {int: count, int | None: count | None, float: NonNegative}
            refuses = checker(known.get(kind, kind))
            if refuses is not None and (wanted := refuses(value)):
                raise LanguageModelError(
                    f"a {self.model_type} model has {field.name}={format_value(value)}; use {wanted}"
                )
            for option in OPTIONS.values():
                known_to = (*option.families, *option.implied)
                if option.field == field.name and value != field.default and self.model_type not in known_to:
                    raise LanguageModelError(
                        f"a {self.model_type} model has {field.name}={format_value(value)}, which only "
                        f"{', '.join(known_to)} models have; leave it out, or set model_type to one of these"
                    )
            if field.name in ("windowed", "unturned") and any(layer >= self.depth for layer in value):
                raise LanguageModelError(
                    f"a {self.model_type} model has {field.name}={value} and depth={self.depth}; name layers from 0 to "
                    f"{self.depth - 1}"
                )
        if getattr(self, "windowed", ()) and getattr(self, "window", 0) == 0:
            raise LanguageModelError(f"a {self.model_type} model has layers with a window and window=0; use at least 1")
        find_activation(self.activation)

    def check_heads(self) -> None:
        """Refuse heads that cannot share the residual stream."""
        if self.width % self.heads:
            raise LanguageModelError(
                f"a {self.model_type} model has width={self.width} and heads={self.heads}; heads must divide width"
            )

    @classmethod
    @abc.abstractmethod
    def from_json(cls, json: Mapping[str, Any]) -> "Config":
        """Read the config.json of transformers."""

    @abc.abstractmethod
    def to_json(self) -> dict[str, Any]:
        """Return the config.json for transformers."""

    @abc.abstractmethod
    def layout(self, layer: int) -> Layout:
        """Describe how a block computes."""

    def _layout(self, layer: int, **own: Any) -> Layout:
        """Make the layout of a block from the fields of the model and its family of the same names, and from `own`."""
        names = [part.name for part in dataclasses.fields(Layout)]
        shared = {"kv_heads": self.heads, "head_dim": self.width // self.heads}
        # The model comes last: its fields win over the traits of its family.
        for source in (getattr(self, "traits", None), self):
            shared |= {name: getattr(source, name) for name in names if hasattr(source, name)}
        if "windowed" in vars(self):
            near = layer in vars(self)["windowed"]
            shared |= {"window": shared["window"] if near else 0}
            shared |= {"rope": vars(self)["local_rope"]} if near and vars(self)["local_rope"] is not None else {}
        return Layout(**{**shared, **own})


class Transformer(eqx.Module):
    """A transformer that can be stored in a checkpoint."""

    config: eqx.AbstractVar[Config]

    @classmethod
    @abc.abstractmethod
    def init(cls, key: PRNGKey, config: Any, *, dtype: Any = jnp.float32) -> "Transformer":
        """Make a model with random weights; the key is consumed."""

    @classmethod
    @abc.abstractmethod
    def tensors(cls, config: Any) -> Iterator[CheckpointTensor]:
        """List all arrays of a model of this shape, each with its name in a checkpoint."""


def _is_weight_type(value: Any) -> bool:
    try:
        fits = isinstance(value, type | np.dtype) or (isinstance(value, str) and value.isascii())
        return fits and bool(jnp.issubdtype(jnp.dtype(value), jnp.floating))
    except (TypeError, ValueError):
        return False


def check_model_room(config: Config, key: Any = None) -> None:
    """Refuse a model whose weights would not fit into memory; accept any while JAX only traces shapes."""
    if is_traced(key):
        return
    layout = config.layout(0)
    block = config.width * (2 * layout.inner + 2 * config.width)
    weights = config.width * float(config.vocab_size) + float(config.depth) * block
    what = (
        f"a {config.model_type} model with vocab_size={config.vocab_size}, width={config.width}, depth={config.depth} "
        f"and inner={layout.inner}"
    )
    # Two bytes a weight, as in bfloat16, is the least that it takes.
    check_memory(2 * weights, what, "make it smaller", LanguageModelError)


type AnyConfig = Annotated[
    Any,
    Requirement(
        "the shape of a model, such as lm.GPT2Config(...)", lambda value: isinstance(value, Config), any_type=True
    ),
]
"""The shape of a model, of whatever family."""

type WeightType = Annotated[
    Any, Requirement("a type of weights: jnp.float32 or jnp.bfloat16", _is_weight_type, any_type=True)
]
"""The dtype of weights."""


class CausalLM(Transformer):
    """An autoregressive language model of one sequence; use `jax.vmap` for batches.

    Prompts are padded on the left: padding has `mask` False, no token attends to it, and positions count only real
    tokens. A row has the same logits with and without padding.

    Example:
        >>> import equinox as eqx, jax, jax.numpy as jnp
        >>> from bayesrl.lm import GPT2, GPT2Config
        >>> model = GPT2.init(jax.random.key(0), GPT2Config(vocab_size=5, max_length=8, width=4, depth=1, heads=2))
        >>> tokens, mask = jnp.array([0, 3, 1]), jnp.array([False, True, True])
        >>> hidden, cache = eqx.filter_jit(model.extend)(tokens, mask, model.start(8))
        >>> logits = eqx.filter_jit(model)(jnp.array([3, 1]))
        >>> bool(jnp.allclose(model.logits(hidden[-1]), logits[-1], atol=1e-5))
        True

    References:
        Radford et al. (2019), "Language models are unsupervised multitask learners".
    """

    @abc.abstractmethod
    def start(self, capacity: int) -> Cache:
        """Make an empty cache with room for `capacity` tokens, padding included."""

    @abc.abstractmethod
    def extend(
        self, tokens: Int[Array, "n"], mask: Bool[Array, "n"], cache: Cache
    ) -> tuple[Float[Array, "n width"], Cache]:
        """Feed n tokens: many at once for a prompt or for scoring, one at a time for generation.

        While `cache.length` is a Python integer, as `start` makes it, attention covers only the slots in use.

        Args:
            tokens: token ids, [n].
            mask: False for padding, [n].
            cache: of the earlier tokens.

        Returns:
            The input of `logits`, [n, width]; and the cache with the n tokens in it.
        """

    @abc.abstractmethod
    def logits(self, hidden: Float[Array, "*n width"]) -> Float[Array, "*n vocab"]:
        """Return the unnormalized log-probabilities of the next token, in float32 (in nats)."""

    def __call__(self, tokens: Int[Array, "n"]) -> Float[Array, "n vocab"]:
        """Return the logits after each of n tokens, without padding, [n, vocab]."""
        n = tokens.shape[0]
        hidden, _ = self.extend(tokens, jnp.ones(n, bool), self.start(n))
        return self.logits(hidden)


def check_capacity(capacity: int, config: Config) -> int:
    """Refuse more tokens than a model can read."""
    if not 1 <= capacity <= config.max_length:
        raise LanguageModelError(
            f"a cache for {capacity} tokens was asked of a {config.model_type} model, whose context is "
            f"{config.max_length} tokens long; shorten prompts or completions"
        )
    return capacity

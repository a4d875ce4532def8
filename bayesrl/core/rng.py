"""Draws with the distribution of NumPyro's own, at lower cost: keys, categories, mini-batches."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from numpyro.distributions import CategoricalLogits, Distribution, MaskedDistribution
from numpyro.primitives import Messenger

from bayesrl.compilation.random_keys import as_threefry_key, fold_in
from bayesrl.typing import PRNGKey, Program

_COUNTS = ("Poisson", "NegativeBinomial")


def _gather_in_order(name: str) -> None:
    """Make NumPyro list the fields of distributions in alphabetical order.

    NumPyro lists them in the order of a set, which differs between processes. The stacked outputs of a scan then
    change places, and the cache of compiled programs never finds a program with a scan again.
    """
    gather = getattr(Distribution, name).__func__

    def in_order(cls: type[Distribution]) -> tuple[str, ...]:
        return tuple(sorted(gather(cls)))

    setattr(Distribution, name, classmethod(in_order))


_gather_in_order("gather_pytree_data_fields")
_gather_in_order("gather_pytree_aux_fields")


class FoldedKeys(Messenger):
    """Seed the program inside: the n-th draw gets the key folded with n, at half the cost of a split.

    Args:
        fn: a program, called once.
        key: consumed whole.
        first: the number of the first draw; programs that share a key must start far apart.
    """

    def __init__(self, fn: Program, key: PRNGKey, first: int = 0) -> None:
        super().__init__(fn)
        self.key = key
        self.count = first

    def process_message(self, msg: dict[str, Any]) -> None:
        """Give a key to a message that would draw and has none."""
        if msg["type"] not in ("sample", "prng_key", "plate", "control_flow"):
            return
        if msg["value"] is None and msg["kwargs"]["rng_key"] is None:
            key = fold_in(self.key, self.count)
            msg["kwargs"]["rng_key"] = key if _draws_from_any(msg) else as_threefry_key(key)
            self.count += 1


def _draws_from_any(msg: dict[str, Any]) -> bool:
    """Whether a message's samplers take keys of every generator; `jax.random.poisson` does not.

    Foreign distributions, and keys that a program asks for, may need any sampler: they get keys of JAX's default.
    """
    if msg["type"] != "sample":
        return bool(msg["type"] != "prng_key")
    parts = [msg["fn"]]
    while parts:
        fn = parts.pop()
        kind = type(fn)
        if kind.__module__.split(".")[0] not in ("numpyro", "bayesrl") or any(x in kind.__name__ for x in _COUNTS):
            return False
        # Wrappers and mixtures hold distributions, which draw too.
        held = [x for part in vars(fn).values() for x in (part if isinstance(part, list | tuple) else (part,))]
        parts += [part for part in held if isinstance(part, Distribution)]
    return True


class QuickDraws(Messenger):
    """Draw categorical sites and subsampled plates that have a key and no value yet."""

    def process_message(self, msg: dict[str, Any]) -> None:
        """Set the value, so that NumPyro draws none."""
        if msg["type"] not in ("sample", "plate") or msg["value"] is not None:
            return
        key = msg["kwargs"].get("rng_key")
        if key is None:
            return
        if msg["type"] == "plate":
            msg["value"] = draw_subset(key, *msg["args"])
            return
        fn = msg["fn"].base_dist if type(msg["fn"]) is MaskedDistribution else msg["fn"]
        # Its exact type, because a subclass may draw otherwise.
        if type(fn) is CategoricalLogits and not msg["kwargs"].get("sample_shape"):
            msg["value"] = draw_category(key, fn.logits)


def draw_category(key: PRNGKey, logits: Array) -> Array:
    """Draw from Categorical(logits), [...] of [..., categories], by inverting the distribution function.

    This takes one uniform number per draw; the Gumbel trick takes one per category.
    """
    return category_at(jax.random.uniform(key, (*logits.shape[:-1], 1), logits.dtype), logits)


def category_at(uniform: Array, logits: Array) -> Array:
    """Return the quantile of Categorical(logits) at `uniform`, which has shape [..., 1] and lies in [0, 1)."""
    cumulative = jnp.cumsum(jax.nn.softmax(logits, axis=-1), axis=-1)
    # Scale by the last sum, which rounding may leave off 1. The uniform number stays below 1 by more than rounding
    # adds, so a category of probability 0 is never drawn.
    return (cumulative <= uniform * cumulative[..., -1:]).sum(-1)


def draw_subset(key: PRNGKey, size: int, num: int) -> Array:
    """Draw `num` of `size` indices without replacement: a Fisher–Yates shuffle with all random numbers at once."""
    last = size - 1 - jnp.arange(num)
    chosen = jax.random.randint(key, (num,), 0, last + 1)

    def swap(indices: Array, pair: tuple[Array, Array]) -> tuple[Array, None]:
        i, j = pair
        return indices.at[jnp.array([i, j])].set(indices[jnp.array([j, i])]), None

    return lax.scan(swap, jnp.arange(size), (last, chosen))[0][-num:]

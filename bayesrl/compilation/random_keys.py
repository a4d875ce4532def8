"""Random keys that are cheap to compile, and to derive on the host.

Each use of JAX's default generator, threefry, takes a tenth of a second of compilation on a CPU. So the library draws
with a generator that hashes (key, counter) by pcg4d (Jarzynski & Olano 2020, "Hash functions for GPU rendering"). The
user's key seeds it, so equal keys give equal draws. A key of another generator than threefry is a deliberate choice,
and is used as it is.
"""

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.extend.random import define_prng_impl

from bayesrl.typing import PRNGKey, PRNGKeys

_MULTIPLIER, _INCREMENT = np.uint32(1664525), np.uint32(1013904223)
_BITS, _SPLIT, _FOLD, _SEED = (np.uint32(n) for n in (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344))
"""What a hash is used for; digits of π."""


# Outside of a trace each hash is one program, and not one for every operation in it.
_in_one = partial(jax.jit, inline=True)


def _mix(x: Any, y: Any, z: Any, w: Any) -> tuple[Any, Any, Any, Any]:
    """Hash four words of 32 bits to four; works on NumPy and JAX arrays alike."""
    with np.errstate(over="ignore"):  # words are meant to wrap around
        x, y, z, w = (word * _MULTIPLIER + _INCREMENT for word in (x, y, z, w))
        x, y, z, w = _crossed(x, y, z, w)
        x, y, z, w = _crossed(*(word ^ (word >> np.uint32(16)) for word in (x, y, z, w)))
    return x, y, z, w


def _crossed(x: Any, y: Any, z: Any, w: Any) -> tuple[Any, Any, Any, Any]:
    x = x + y * w
    y = y + z * x
    z = z + x * y
    w = w + y * z
    return x, y, z, w


def _derived(words: tuple[Any, Any], counter: Any, purpose: np.uint32) -> tuple[Any, Any]:
    """Return the two words of the key that belongs to a number."""
    x, _, z, _ = _mix(words[0], words[1], counter, purpose)
    return x, z


@_in_one
def _seed(seed: Any) -> Any:
    seed = lax.convert_element_type(seed, np.uint32)
    # Zeros times the seed have its shape, if it is a batch of seeds.
    return _stacked(_derived((seed, np.uint32(0) * seed), np.uint32(0) * seed, _SEED))


def _stacked(words: tuple[Any, Any]) -> Any:
    # Without a barrier XLA expands hashes of hashes anew at each use, and the program grows exponentially.
    return lax.optimization_barrier(lax.concatenate([lax.expand_dims(w, (w.ndim,)) for w in words], words[0].ndim))


@partial(_in_one, static_argnames="shape")
def _split(key: Any, shape: tuple[int, ...], first: Any = 0) -> Any:
    counters = lax.reshape(lax.iota(np.uint32, math.prod(shape)), shape)
    return _stacked(_derived((key[0], key[1]), counters + lax.convert_element_type(first, np.uint32), _SPLIT))


@_in_one
def _fold_in(key: Any, data: Any) -> Any:
    return _stacked(_derived((key[0], key[1]), lax.convert_element_type(data, np.uint32), _FOLD))


@partial(_in_one, static_argnames=("bit_width", "shape"))
def _random_bits(key: Any, bit_width: int, shape: tuple[int, ...]) -> Any:
    size = math.prod(shape)
    words = -(-size * max(bit_width, 32) // 32)
    if size == 0:
        return lax.full(shape, 0, np.dtype(f"uint{bit_width}"))
    # Each hash gives four words.
    counter = lax.iota(np.uint32, -(-words // 4))
    mixed = _mix(key[0], key[1], counter, _BITS)
    bits = mixed[0] if words == 1 else lax.slice(lax.concatenate(mixed, 0), (0,), (words,))
    if bit_width < 32:
        bits = lax.convert_element_type(bits, np.dtype(f"uint{bit_width}"))
    elif bit_width == 64:
        high, low = (lax.convert_element_type(lax.slice(bits, (i,), (words,), (2,)), np.uint64) for i in (0, 1))
        bits = lax.shift_left(high, np.uint64(32)) | low
    return lax.reshape(bits, shape)


_HASH = define_prng_impl(
    key_shape=(2,), seed=_seed, split=_split, random_bits=_random_bits, fold_in=_fold_in, name="bayesrl_hash", tag="bh"
)
_DEFAULT = "threefry2x32"


def key_from_seed(seed: int) -> PRNGKey:
    """Return the key of `jax.random.key`; for the default generator this compiles nothing."""
    if jax.config.jax_default_prng_impl != _DEFAULT or not 0 <= seed < 2**32:
        return jax.random.key(seed)
    # Threefry makes a key of the seed's high word and its low word.
    words: Any = np.array([0, seed], np.uint32)
    return jax.random.wrap_key_data(words, impl=_DEFAULT)


def as_hash_key(key: Any) -> Any:
    """Return the key for draws that belong to a user's key; keys of a deliberately chosen generator stay.

    Args:
        key: a JAX key, or an array of keys; old-style keys count as keys of the default generator.
    """
    if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        return wrap_key_data(key)
    return wrap_key_data(jax.random.key_data(key)) if str(jax.random.key_impl(key)) == _DEFAULT else key


def fold_in(key: PRNGKey, data: Any) -> PRNGKey:
    """Derive the key that belongs to a number, as `jax.random.fold_in` does; on the host if the key is known."""
    key = as_hash_key(key)
    words = None if isinstance(data, jax.core.Tracer) else _on_host(key)
    if words is None:
        return jax.random.fold_in(key, data)
    return wrap_key_data(np.stack(_derived(words, np.uint32(data), _FOLD), -1))


def split(key: PRNGKey, num: int = 2, first: Any = None) -> PRNGKeys:
    """Derive `num` keys, as `jax.random.split` does; on the host if the key is known.

    Args:
        key: consumed whole, or for the numbers `first` to `first + num`.
        num: number of keys; a key does not depend on how many others there are.
        first: number of the first key, traced; None starts from 0.
    """
    key = as_hash_key(key)
    if first is not None and jax.random.key_impl(key) == _HASH:
        return wrap_key_data(_split(jax.random.key_data(key), (num,), first))
    if first is not None:
        # `jax.random.split` can only start at 0.
        return jax.vmap(partial(jax.random.fold_in, key))(first + jnp.arange(num))
    words = _on_host(key)
    if words is None:
        return jax.random.split(key, num)
    return wrap_key_data(np.stack(_derived(words, np.arange(num, dtype=np.uint32), _SPLIT), -1))


def split_keys(key: PRNGKey, num: int = 2) -> tuple[PRNGKey, ...]:
    """Derive the keys of `split` one by one, so that no array of keys must be taken apart."""
    key = as_hash_key(key)
    words = _on_host(key)
    if words is None:
        return tuple(jax.random.split(key, num))
    return tuple(wrap_key_data(np.stack(_derived(words, np.uint32(i), _SPLIT), -1)) for i in range(num))


def as_threefry_key(key: PRNGKey) -> PRNGKey:
    """Return the default generator's key for a hash key: some samplers accept only that generator."""
    if jax.random.key_impl(key) != _HASH:
        return key
    return jax.random.wrap_key_data(jax.random.key_data(key), impl=_DEFAULT)


def key_data(key: PRNGKey | PRNGKeys) -> Array:
    """Return the numbers of a key, or of an array of keys, which can be reshaped and traced like other arrays."""
    words: Array = jax.random.key_data(as_hash_key(key))
    return words


def wrap_key_data(words: Any) -> Any:
    """Return the key for numbers that `key_data` returned for a key of the default generator."""
    return jax.random.wrap_key_data(words, impl=_HASH)


def dummy_key() -> PRNGKey:
    """Return the same key every time, for programs whose sites all have values, or if only shapes matter."""
    return wrap_key_data(np.zeros(2, np.uint32))


def _on_host(key: Array) -> tuple[Any, Any] | None:
    """Return the words of a hash key if its numbers are known, else None."""
    if isinstance(key, jax.core.Tracer) or jax.random.key_impl(key) != _HASH:
        return None
    # Inside a trace a known key must be read now, not become part of the program.
    with jax.ensure_compile_time_eval():
        words = np.asarray(jax.random.key_data(key))
    return words[0], words[1]

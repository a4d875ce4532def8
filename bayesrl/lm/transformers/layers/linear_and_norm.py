"""The parts that transformers are made of: linear maps with a low-rank path, norms, embeddings, activations."""

import functools
import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from bayesrl.errors import LanguageModelError
from bayesrl.typing import PRNGKey

_gelu, _gelu_tanh = (functools.partial(jax.nn.gelu, approximate=kind) for kind in (False, True))

ACTIVATIONS: Mapping[str, Callable[[Array], Array]] = MappingProxyType(
    {
        **dict.fromkeys(("gelu", "gelu_python"), _gelu),
        **dict.fromkeys(
            ("gelu_new", "gelu_pytorch_tanh", "gelu_python_tanh", "gelu_fast", "gelu_accurate"), _gelu_tanh
        ),
        "gelu_10": lambda x: jnp.clip(_gelu(x), -10, 10),
        "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
        **dict.fromkeys(("silu", "swish"), jax.nn.silu),
        "mish": jax.nn.mish,
        "relu": jax.nn.relu,
        "relu2": lambda x: jax.nn.relu(x) ** 2,
        "relu6": jax.nn.relu6,
        "leaky_relu": jax.nn.leaky_relu,
        "hardswish": jax.nn.hard_swish,
        # The mean 1/√2 and the deviation 1/√(4π), to six digits.
        "laplace": lambda x: 0.5 * (1 + jax.lax.erf((x - 0.707107) / (0.282095 * math.sqrt(2)))),
        "sqrtsoftplus": lambda x: jnp.sqrt(jax.nn.softplus(x)),
        "sigmoid": jax.nn.sigmoid,
        "tanh": jnp.tanh,
        "linear": lambda x: x,
    }
)
"""The activation names of transformers, some for the same function, without activations that have weights."""


def find_activation(name: str) -> Callable[[Array], Array]:
    """Return the activation function for a name of transformers."""
    if name not in ACTIVATIONS:
        raise LanguageModelError(f"unknown activation {name!r}; bayesrl knows {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]


def normal(key: PRNGKey, shape: tuple[int, ...], scale: float, dtype: Any) -> Array:
    """Draw weights from N(0, scale²); the key is consumed."""
    return _scaled_normal(key, shape, scale, dtype)


# One program for each shape, and not one for each operation.
@functools.partial(jax.jit, static_argnames=("shape", "dtype"))
def _scaled_normal(key: PRNGKey, shape: tuple[int, ...], scale: Any, dtype: Any) -> Array:
    # Drawn in float32 and then rounded, so that a key gives the same model in either dtype.
    return (scale * jax.random.normal(key, shape, jnp.float32)).astype(dtype)


class Linear(eqx.Module):
    """A linear map of the last axis, with an optional low-rank path beside its weight.

        y = W·x + b + factor·U·(D·x)

    The path is computed in the dtype of D and U, which may be wider than that of W, so that float32 adapters can
    train a bfloat16 model.

    Args:
        weight: W, [out, in].
        bias: b, [out], or None.
        down: D, [rank, in], or None.
        up: U, [out, rank], or None.
        factor: of the low-rank path.

    Example:
        >>> import jax.numpy as jnp
        >>> Linear(jnp.eye(2), None, jnp.ones((1, 2)), jnp.array([[1.0], [0.0]]))(jnp.array([1.0, 2.0])).tolist()
        [4.0, 2.0]

    References:
        Hu et al. (2021), "LoRA: low-rank adaptation of large language models", equation 3.
    """

    weight: Float[Array, "out in"]
    bias: Float[Array, "out"] | None = None
    down: Float[Array, "rank in"] | None = None
    up: Float[Array, "out rank"] | None = None
    factor: float = eqx.field(static=True, default=1.0)

    @classmethod
    def init(cls, key: PRNGKey, width: int, out: int, *, scale: float, bias: bool, dtype: Any) -> "Linear":
        """Draw W from N(0, scale²), with b = 0; the key is consumed."""
        return cls(normal(key, (out, width), scale, dtype), jnp.zeros(out, dtype) if bias else None)

    def __call__(self, x: Float[Array, "*n in"]) -> Float[Array, "*n out"]:
        """Map the last axis."""
        return self._with_bias_and_path(x @ self.weight.T, x)

    def scores(self, x: Float[Array, "*n in"]) -> Float[Array, "*n out"]:
        """Map the last axis, with a result of at least float32."""
        return self._with_bias_and_path(scores(self.weight, x), x)

    def _with_bias_and_path(self, y: Array, x: Array) -> Array:
        if self.bias is not None:
            y = y + self.bias
        if self.down is not None and self.up is not None:
            # D·x first: U·D is as large as W. And scale U: its size does not grow with the number of tokens.
            y = y + ((x.astype(self.down.dtype) @ self.down.T) @ (self.factor * self.up).T).astype(y.dtype)
        return y

    def merge(self) -> "Linear":
        """Add the low-rank path to the weight: the same map, without the path."""
        if self.down is None or self.up is None:
            return self
        wide = jnp.promote_types(self.weight.dtype, jnp.float32)
        # Round once, after the sum: alone, a small path could be below the step of bfloat16 at W.
        weight = self.weight.astype(wide) + self.factor * (self.up.astype(wide) @ self.down.astype(wide))
        return Linear(weight.astype(self.weight.dtype), self.bias)


def is_linear(part: Any) -> bool:
    """Whether a part of a model is a `Linear`, as the `is_leaf` of `jax.tree.map`."""
    return isinstance(part, Linear)


def merge_adapters[Model](model: Model) -> Model:
    """Add every low-rank path of a model to the weight beside it: W + factor·U·D, without U and D.

    Args:
        model: any pytree with `Linear` parts.

    Returns:
        The same function up to rounding, without low-rank paths.

    Example:
        >>> import jax.numpy as jnp
        >>> merge_adapters({"a": Linear(jnp.eye(2), None, jnp.ones((1, 2)), jnp.ones((2, 1)))})["a"].weight.tolist()
        [[2.0, 1.0], [1.0, 2.0]]

    References:
        Hu et al. (2021), section 4.1.
    """
    return jax.tree.map(lambda part: part.merge() if is_linear(part) else part, model, is_leaf=is_linear)


class Embedding(eqx.Module):
    """A table of vectors, one per token or position; used backwards it gives logits.

    Args:
        weight: [rows, width].
    """

    weight: Float[Array, "rows width"]

    @classmethod
    def init(cls, key: PRNGKey, rows: int, width: int, *, scale: float, dtype: Any) -> "Embedding":
        """Draw the table from N(0, scale²); the key is consumed."""
        return cls(normal(key, (rows, width), scale, dtype))

    def __call__(self, rows: Int[Array, "*n"]) -> Float[Array, "*n width"]:
        """Look rows up."""
        return self.weight[rows]

    def scores(self, hidden: Float[Array, "*n width"]) -> Float[Array, "*n rows"]:
        """Return the inner products with all rows, summed in float32."""
        return scores(self.weight, hidden)


def scores(weight: Float[Array, "rows width"], hidden: Float[Array, "*n width"]) -> Float[Array, "*n rows"]:
    """Return W·h in float32 (float64 if the weights are), whatever the dtype of W and h."""
    wide = jnp.promote_types(weight.dtype, jnp.float32)
    return jnp.matmul(hidden, weight.T, preferred_element_type=wide)


class LayerNorm(eqx.Module):
    """(x − mean) / √(variance + ε) · w + b over the last axis, the statistics in float32; b may be missing.

    References:
        Ba, Kiros & Hinton (2016), "Layer normalization", equation 4.
    """

    weight: Float[Array, "width"]
    bias: Float[Array, "width"] | None
    epsilon: float = eqx.field(static=True)

    @classmethod
    def init(cls, width: int, epsilon: float, dtype: Any, *, bias: bool = True) -> "LayerNorm":
        """Start with w = 1, b = 0."""
        return cls(jnp.ones(width, dtype), jnp.zeros(width, dtype) if bias else None, epsilon)

    def __call__(self, x: Float[Array, "*n width"]) -> Float[Array, "*n width"]:
        """Normalize the last axis."""
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        # Center first: E[x²] − E[x]² would cancel where the mean is large.
        centered = wide - wide.mean(-1, keepdims=True)
        scaled = centered * jax.lax.rsqrt((centered**2).mean(-1, keepdims=True) + self.epsilon) * self.weight
        return (scaled if self.bias is None else scaled + self.bias).astype(x.dtype)


class RMSNorm(eqx.Module):
    """x / √(mean x² + ε) · (w + offset) over the last axis, the statistics in float32.

    Gemma's checkpoints store w with `offset` 1, and multiply in float32.

    References:
        Zhang & Sennrich (2019), "Root mean square layer normalization", equation 4.
    """

    weight: Float[Array, "width"]
    epsilon: float = eqx.field(static=True)
    offset: float = eqx.field(static=True, default=0.0)

    @classmethod
    def init(cls, width: int, epsilon: float, dtype: Any, *, offset: float = 0.0) -> "RMSNorm":
        """Start with w + offset = 1."""
        return cls(jnp.full(width, 1.0 - offset, dtype), epsilon, offset)

    def __call__(self, x: Float[Array, "*n width"]) -> Float[Array, "*n width"]:
        """Normalize the last axis."""
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        scaled = wide * jax.lax.rsqrt((wide**2).mean(-1, keepdims=True) + self.epsilon)
        # Gemma multiplies before it rounds to the dtype of x, Llama after: each as its checkpoints were trained.
        if self.offset:
            return (scaled * (self.offset + self.weight.astype(wide.dtype))).astype(x.dtype)
        return self.weight * scaled.astype(x.dtype)


type Norm = LayerNorm | RMSNorm

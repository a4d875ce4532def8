"""Tilt compound distributions part by part: mixtures, and gates of structural zeros.

Tilting a mixture by exp(θ·x) gives the mixture of the tilted components, with other weights. The same holds for a gate,
whose structural zero is a component.
"""

import math
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpyro.distributions as dist
from jax import Array
from numpyro.distributions import biject_to

from bayesrl.core.structure import FiniteSupport, finite_support, is_discrete

_LEAST = 1e-37

type ShapeOf = Callable[[str, Any, FiniteSupport | None], tuple[int, ...]]
type Tilted = Callable[[Any, Array, FiniteSupport | None], Any]

_GATED = (dist.ZeroInflatedProbs, dist.HurdleProbs)
_MIXED = (dist.MixtureSameFamily, dist.MixtureGeneral)


class Hurdle(dist.HurdleLogits):
    """A structural zero beside a continuous distribution, whose density is never evaluated at 0: no slope there."""

    def log_prob(self, value: Array, intermediates: Any = None) -> Array:
        """Log-probability of zero, log-density of other values, nats."""
        is_zero = jnp.asarray(value) == 0
        inside = self.base_dist.log_prob(jnp.where(is_zero, biject_to(self.base_dist.support)(0.0), value))
        return jnp.where(is_zero, self._log_gate(), self._log_one_minus_gate() + inside)


def is_compound(fn: Any) -> bool:
    """Whether a distribution, without its wrappers, is made of others."""
    return isinstance(fn, (*_GATED, *_MIXED))


def num_compound(name: str, fn: Any, shape_of: ShapeOf) -> int:
    """Count the numbers in a tilt of one element: those of the weights or the gate, and of all parts."""
    if isinstance(fn, _GATED):
        return 1 + _size(name, fn.base_dist, shape_of)
    count = int(fn.mixture_size)
    if isinstance(fn, dist.MixtureSameFamily):
        return count * (1 + _size(name, fn.component_distribution, shape_of))
    return count + sum(_size(name, part, shape_of) for part in fn.component_distributions)


def tilted_parts(fn: Any, theta: Array, tilted: Tilted, name: str, shape_of: ShapeOf) -> Any:
    """Tilt a compound by `theta`, [*batch, num_compound], whose zero leaves it as it is; `tilted` tilts a part."""
    batch = theta.shape[:-1]
    if isinstance(fn, _GATED):
        base = _tilted(fn.base_dist.expand(batch), theta[..., 1:], tilted, name, shape_of)
        kind = dist.ZeroInflatedLogits
        if isinstance(fn, dist.HurdleProbs):
            kind = dist.HurdleLogits if is_discrete(fn) else Hurdle
        return kind(base, _gate_logits(fn) + theta[..., 0])
    count = int(fn.mixture_size)
    # NumPyro refuses −inf as a logit.
    logits = jnp.maximum(fn.mixing_distribution.logits, -1e30) + theta[..., :count]
    weights = dist.CategoricalLogits(logits)
    rest = theta[..., count:]
    if isinstance(fn, dist.MixtureSameFamily):
        parts = fn.component_distribution.expand((*batch, count))
        own = rest.reshape((*batch, count, -1))
        return dist.MixtureSameFamily(weights, _tilted(parts, own, tilted, name, shape_of))
    found, used = [], 0
    for part in fn.component_distributions:
        size = _size(name, part, shape_of)
        found.append(_tilted(part.expand(batch), rest[..., used : used + size], tilted, name, shape_of))
        used += size
    return dist.MixtureGeneral(weights, found)


def _support_of(part: Any) -> FiniteSupport | None:
    return finite_support(part) if is_discrete(part) else None


def _size(name: str, part: Any, shape_of: ShapeOf) -> int:
    return math.prod(shape_of(name, part, _support_of(part)))


def _tilted(part: Any, theta: Array, tilted: Tilted, name: str, shape_of: ShapeOf) -> Any:
    support = _support_of(part)
    return tilted(part, theta.reshape((*theta.shape[:-1], *shape_of(name, part, support))), support)


def _gate_logits(fn: Any) -> Array:
    if hasattr(fn, "gate_logits"):
        return jnp.asarray(fn.gate_logits)
    # A gate of exactly 0 or 1 would have an infinite logit, to which no θ adds anything.
    return jnp.log(jnp.maximum(fn.gate, _LEAST)) - jnp.log(jnp.maximum(1 - fn.gate, _LEAST))

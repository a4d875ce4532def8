"""Distributions for tilted sites that NumPyro does not have."""

import copy
from typing import Any

import jax
import jax.numpy as jnp
import numpyro.distributions as dist
from jax import Array
from numpyro.distributions import biject_to, constraints
from numpyro.distributions.batch_util import promote_batch_shape

from bayesrl.core.log_ratios import Ratio
from bayesrl.core.structure import elementwise_support
from bayesrl.core.support_edges import EdgeInterval, at_edge, safe
from bayesrl.guides.tilts.sinh_arcsinh import SinhArcsinh

# exp and sigmoid overflow or underflow float32 beyond these, so coordinates of bounded supports are clipped to them.
_LOWEST, _HIGHEST = -87.0, 88.0
_NEAREST = 1e-5
"""The least distance to an end, as a share of the interval, at which a coordinate is mapped."""


def coordinate_shape(fn: Any) -> tuple[int, ...]:
    """Return the shape of one event in unconstrained space.

    Batch and event go through the transform together, because bounds may have batch axes.
    """
    shape: tuple[int, ...] = biject_to(fn.support).inverse_shape(tuple(fn.shape()))
    return shape[len(fn.batch_shape) :]


class Finite(dist.Distribution):
    """A distribution over finitely many consecutive integers, with free logits.

    log p(values[k]) = log softmax(logits)_k

    Args:
        logits: [*batch, K].
        values: the K integers, ascending.
    """

    arg_constraints = {"logits": constraints.real_vector}  # noqa: RUF012  (NumPyro's protocol)
    has_enumerate_support = True
    pytree_data_fields = ("logits",)
    pytree_aux_fields = ("values",)

    def __init__(self, logits: Array, values: tuple[float, ...], *, validate_args: bool | None = None) -> None:
        self.logits = logits
        # A tuple of ints can be hashed, as an auxiliary field of a pytree must.
        self.values = tuple(int(value) for value in values)
        super().__init__(batch_shape=jnp.shape(logits)[:-1], validate_args=validate_args)

    @constraints.dependent_property(is_discrete=True, event_dim=0)  # type: ignore[untyped-decorator]
    def support(self) -> Any:
        """The interval of the values."""
        return constraints.integer_interval(self.values[0], self.values[-1])

    def sample(self, key: Any, sample_shape: tuple[int, ...] = ()) -> Array:
        """Draw [*sample_shape, *batch]."""
        drawn = jax.random.categorical(key, self.logits, shape=sample_shape + self.batch_shape)
        return drawn + self.values[0]

    def log_prob(self, value: Array, intermediates: Any = None) -> Array:
        """Log-probability, nats; −inf off the support."""
        log_probs = jax.nn.log_softmax(self.logits)
        index = jnp.asarray(value) - self.values[0]
        inside = (index >= 0) & (index < len(self.values))
        # Beyond its ends `take_along_axis` would give nan.
        index = jnp.clip(index, 0, len(self.values) - 1).astype(jnp.int32)
        shape = jnp.broadcast_shapes(index.shape, log_probs.shape[:-1])
        log_probs = jnp.broadcast_to(log_probs, (*shape, len(self.values)))
        picked = jnp.take_along_axis(log_probs, jnp.broadcast_to(index, shape)[..., None], -1)[..., 0]
        return jnp.where(inside, picked, -jnp.inf)

    def enumerate_support(self, expand: bool = True) -> Array:
        """Return all values, [K, *batch or ones]."""
        values = jnp.asarray(self.values).reshape((-1,) + (1,) * len(self.batch_shape))
        return jnp.broadcast_to(values, (len(self.values), *self.batch_shape)) if expand else values


class Affine(dist.Distribution):
    """The prior's own draw, bent coordinate by coordinate and moved by an affine map, in unconstrained coordinates.

    x = T(a + B · s(T⁻¹(x₀))),  x₀ ~ base,  T = biject_to(support),  B lower triangular,  s as in `SinhArcsinh`.

    Args:
        base: the prior, [*batch] of events with N unconstrained coordinates.
        shift: a, [*batch, N].
        log_scale: logarithm of the diagonal of B, [*batch, N].
        lower: the entries of B below the diagonal, [*batch, N(N−1)/2], or of length 0 for a diagonal B.
        ends: coordinates beyond which single precision cannot resolve a draw, if the prior often draws there
            (see `bayesrl.core.support_edges`). Such draws stay where they are, and score 0. All other draws stay
            between the ends: a logistic map takes the line onto that interval before T.
        bend: the numbers of s, [*batch, 4 N], or of length 0 if s is the identity.
        centre: of the prior's coordinates, where s bends, [*batch, N] or fewer axes; 0 by default.
        width: of the prior's coordinates, [*batch, N] or fewer axes; 1 by default.
    """

    arg_constraints: dict[str, Any] = {}  # noqa: RUF012  (NumPyro's protocol)
    pytree_data_fields = ("base", "shift", "log_scale", "lower", "bend", "centre", "width", "_support")
    pytree_aux_fields = ("ends",)

    def __init__(
        self,
        base: Any,
        shift: Array,
        log_scale: Array,
        lower: Array,
        *,
        ends: EdgeInterval | None = None,
        bend: Array | None = None,
        centre: Any = 0.0,
        width: Any = 1.0,
        validate_args: bool | None = None,
    ) -> None:
        self.base, self.shift, self.log_scale, self.lower, self.ends = base, shift, log_scale, lower, ends
        # Empty and not None, because its length tells whether there is a bend.
        self.bend = log_scale[..., :0] if bend is None else bend
        self.centre, self.width = (jnp.broadcast_to(part, log_scale.shape) for part in (centre, width))
        # Give bounds the full shape, so that they stay aligned when a scan stacks them over time.
        self._support = jax.tree.map(lambda bound: jnp.broadcast_to(bound, base.shape()), base.support)
        super().__init__(base.batch_shape, base.event_shape, validate_args=validate_args)

    @property
    def has_rsample(self) -> bool:
        """Whether the prior is reparameterised."""
        return bool(self.base.has_rsample)

    @property
    def support(self) -> Any:
        """The prior's support."""
        return self._support

    @property
    def stands_for(self) -> Any:
        """The prior, whose terms the density has."""
        return self.base

    def log_ratio_to(self, prior: Any, value: Array) -> Ratio | None:
        """Return log π₀ − log q of a tilted Gamma, without the huge terms in its concentration, which cancel.

        With Δ = log x − log x₀: c·Δ − r·(x − x₀) + log B.
        """
        base = _unexpanded(self.base)
        if self.ends is not None or not (isinstance(base, dist.Gamma) and isinstance(_unexpanded(prior), dist.Gamma)):
            return None
        shift, log_scale = self.shift[..., 0], self.log_scale[..., 0]
        log_value = self._bounded(jnp.log(value))
        # log x₀ = (log x − a)/B, so that Δ = (a + (B − 1)·log x)/B, where nothing large is subtracted.
        moved = jnp.exp(-log_scale) * (shift + log_value * jnp.expm1(log_scale))
        stretch = log_scale
        if self.bend.shape[-1]:
            _, back, bent = self._bend.inverse((log_value - moved)[..., None])
            moved, stretch = moved - back[..., 0], stretch + bent[..., 0]
        terms = (base.concentration * moved, base.rate * value * jnp.expm1(-moved), stretch)
        size = abs(terms[0]) + abs(terms[1]) + abs(terms[2])
        return Ratio(terms[0] + terms[1] + terms[2], size)

    def rsample(self, key: Any, sample_shape: tuple[int, ...] = ()) -> Array:
        """Draw with gradients, [*sample_shape, *batch, *event]."""
        return self._forward(self.base.rsample(key, sample_shape))

    def sample(self, key: Any, sample_shape: tuple[int, ...] = ()) -> Array:
        """Draw [*sample_shape, *batch, *event]."""
        return self._forward(self.base.sample(key, sample_shape))

    def log_prob(self, value: Array, intermediates: Any = None) -> Array:
        """Log-density by change of variables, nats; 0 for draws at the edge."""
        if self.ends is None:
            return self._log_prob(value)
        lost = at_edge(self, value, self.ends)
        return jnp.where(lost, 0.0, self._log_prob(safe(self, value, lost)))

    def _log_prob(self, value: Array) -> Array:
        transform = biject_to(self.support)
        moved = self._bounded(transform.inv(value))
        flat, grown = self._outward(self._flat(moved))
        solved = self._solve(flat - self.shift)
        if self.bend.shape[-1]:
            solved, _, bent = self._bend.inverse(solved)
            grown = grown - bent.sum(-1)
        inside, shrunk = self._inward(solved)
        drawn = self._bounded(self._unflat(inside, moved))
        before = transform(drawn)
        # The map goes through T twice: out of the support at x, and back into it at x₀.
        stretch = transform.log_abs_det_jacobian(moved, value) - transform.log_abs_det_jacobian(drawn, before)
        result: Array = self.base.log_prob(before) - stretch - self.log_scale.sum(-1) + grown + shrunk
        return result

    def _forward(self, draw: Array) -> Array:
        if self.ends is None:
            return self._moved(draw)
        lost = at_edge(self, draw, self.ends)
        moved = self._moved(safe(self, draw, lost))
        return jnp.where(lost.reshape(lost.shape + (1,) * int(self.event_dim)), draw, moved)

    def _moved(self, draw: Array) -> Array:
        transform = biject_to(self.support)
        drawn = self._bounded(transform.inv(draw))
        flat, _ = self._outward(self._flat(drawn))
        if self.bend.shape[-1]:
            flat, _ = self._bend.forward(flat)
        scaled = jnp.exp(self.log_scale) * flat
        if self.lower.shape[-1]:
            scaled = scaled + (self._matrix() @ flat[..., None])[..., 0]
        inside, _ = self._inward(self.shift + scaled)
        moved: Array = transform(self._bounded(self._unflat(inside, drawn)))
        return moved

    @property
    def _bend(self) -> SinhArcsinh:
        centre = self.centre if self.ends is None else self._outward(self.centre)[0]
        return SinhArcsinh(self.bend, centre, self.width)

    def _outward(self, flat: Array) -> tuple[Array, Array]:
        """Map the interval between the ends onto the line; return also the log-Jacobian, [*batch]."""
        if self.ends is None:
            return flat, jnp.zeros(())
        low, high = self.ends
        unit = (high - low) / 4  # slope 1 in the middle, where the map is nearly a shift
        share = jnp.clip((flat - low) / (high - low), _NEAREST, 1 - _NEAREST)
        return unit * (jnp.log(share) - jnp.log1p(-share)), -(jnp.log(4 * share) + jnp.log1p(-share)).sum(-1)

    def _inward(self, line: Array) -> tuple[Array, Array]:
        """Map the line onto the interval between the ends; return also the log-Jacobian, [*batch]."""
        if self.ends is None:
            return line, jnp.zeros(())
        low, high = self.ends
        share = jnp.clip(jax.nn.sigmoid(line * 4 / (high - low)), _NEAREST, 1 - _NEAREST)
        return low + (high - low) * share, (jnp.log(4 * share) + jnp.log1p(-share)).sum(-1)

    def _solve(self, target: Array) -> Array:
        if not self.lower.shape[-1]:
            return target * jnp.exp(-self.log_scale)
        size = self.log_scale.shape[-1]
        matrix = self._matrix() + jnp.exp(self.log_scale)[..., None] * jnp.eye(size)
        shape = jnp.broadcast_shapes(matrix.shape[:-2], target.shape[:-1])
        # `solve_triangular` does not broadcast.
        matrix = jnp.broadcast_to(matrix, (*shape, size, size))
        target = jnp.broadcast_to(target, (*shape, size))[..., None]
        return jax.scipy.linalg.solve_triangular(matrix, target, lower=True)[..., 0]

    def _matrix(self) -> Array:
        """Put `lower` strictly below the diagonal, [*batch, N, N]."""
        size = self.log_scale.shape[-1]
        rows, columns = jnp.tril_indices(size, -1)
        # Divide by √N, so that noise of a given size in all entries moves a draw equally far whatever N is.
        entries = self.lower / jnp.sqrt(float(size))
        return jnp.zeros((*entries.shape[:-1], size, size)).at[..., rows, columns].set(entries)

    def _flat(self, coordinates: Array) -> Array:
        kept = coordinates.ndim - self._coordinate_ndim
        return coordinates.reshape((*coordinates.shape[:kept], -1))

    def _unflat(self, flat: Array, like: Array) -> Array:
        shape = like.shape[like.ndim - self._coordinate_ndim :]
        return flat.reshape((*flat.shape[:-1], *shape))

    @property
    def _coordinate_ndim(self) -> int:
        return len(coordinate_shape(self))

    def _bounded(self, coordinates: Array) -> Array:
        if elementwise_support(self.support) in (constraints.real, constraints.real_vector, constraints.real_matrix):
            return coordinates
        return jnp.clip(coordinates, _LOWEST, _HIGHEST)


def _unexpanded(fn: Any) -> Any:
    return fn.base_dist if isinstance(fn, dist.ExpandedDistribution) else fn


@promote_batch_shape.register(Affine)  # type: ignore[untyped-decorator]
def promote_with_base(d: Any) -> Any:
    """Give a distribution with a base, stacked by a scan, the leading time axis in its batch shape."""
    promoted = copy.copy(d)
    promoted.base = promote_batch_shape(d.base)
    promoted._batch_shape = promoted.base.batch_shape
    return promoted

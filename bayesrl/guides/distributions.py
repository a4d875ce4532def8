"""Distributions that tilted sites draw from where NumPyro has none of the right shape."""

import copy
from typing import Any

import jax
import jax.numpy as jnp
import numpyro.distributions as dist
from jax import Array
from numpyro.distributions import biject_to, constraints
from numpyro.distributions.batch_util import promote_batch_shape

# exp and sigmoid leave float32 beyond these; unconstrained coordinates of bounded supports stay inside.
_LOWEST, _HIGHEST = -87.0, 88.0


def coordinate_shape(fn: Any) -> tuple[int, ...]:
    """Shape of one event in unconstrained space.

    The transform is asked about batch and event together: bounds may have batch axes.
    """
    shape: tuple[int, ...] = biject_to(fn.support).inverse_shape(tuple(fn.shape()))
    return shape[len(fn.batch_shape) :]


class Finite(dist.Distribution):
    """A distribution over finitely many consecutive integers, by free logits.

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
        index = jnp.clip(index, 0, len(self.values) - 1).astype(jnp.int32)
        shape = jnp.broadcast_shapes(index.shape, log_probs.shape[:-1])
        log_probs = jnp.broadcast_to(log_probs, (*shape, len(self.values)))
        picked = jnp.take_along_axis(log_probs, jnp.broadcast_to(index, shape)[..., None], -1)[..., 0]
        return jnp.where(inside, picked, -jnp.inf)

    def enumerate_support(self, expand: bool = True) -> Array:
        """Give all values, [K, *batch or ones]."""
        values = jnp.asarray(self.values).reshape((-1,) + (1,) * len(self.batch_shape))
        return jnp.broadcast_to(values, (len(self.values), *self.batch_shape)) if expand else values


class Affine(dist.Distribution):
    """The prior's own draw, moved by an affine map in unconstrained coordinates.

    x = T(a + B · T⁻¹(x₀)),  x₀ ~ base,  T = biject_to(support),  B lower triangular.

    Args:
        base: the prior, [*batch] of events whose unconstrained coordinates number N.
        shift: a, [*batch, N].
        log_scale: logarithm of the diagonal of B, [*batch, N].
        lower: what stands below the diagonal of B, [*batch, N(N−1)/2], or of length 0 for a diagonal B.
    """

    arg_constraints: dict[str, Any] = {}  # noqa: RUF012  (NumPyro's protocol)
    pytree_data_fields = ("base", "shift", "log_scale", "lower", "_support")

    def __init__(
        self, base: Any, shift: Array, log_scale: Array, lower: Array, *, validate_args: bool | None = None
    ) -> None:
        self.base, self.shift, self.log_scale, self.lower = base, shift, log_scale, lower
        # Bounds of full shape stay aligned when a scan stacks them over time; NumPyro's own do not.
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

    def rsample(self, key: Any, sample_shape: tuple[int, ...] = ()) -> Array:
        """Draw with gradients, [*sample_shape, *batch, *event]."""
        return self._forward(self.base.rsample(key, sample_shape))

    def sample(self, key: Any, sample_shape: tuple[int, ...] = ()) -> Array:
        """Draw [*sample_shape, *batch, *event]."""
        return self._forward(self.base.sample(key, sample_shape))

    def log_prob(self, value: Array, intermediates: Any = None) -> Array:
        """Log-density by change of variables, nats."""
        transform = biject_to(self.support)
        moved = self._bounded(transform.inv(value))
        flat = self._flat(moved)
        drawn = self._bounded(self._unflat(self._solve(flat - self.shift), moved))
        before = transform(drawn)
        stretch = transform.log_abs_det_jacobian(moved, value) - transform.log_abs_det_jacobian(drawn, before)
        result: Array = self.base.log_prob(before) - stretch - self.log_scale.sum(-1)
        return result

    def _forward(self, draw: Array) -> Array:
        transform = biject_to(self.support)
        drawn = self._bounded(transform.inv(draw))
        flat = self._flat(drawn)
        scaled = jnp.exp(self.log_scale) * flat
        if self.lower.shape[-1]:
            scaled = scaled + (self._matrix() @ flat[..., None])[..., 0]
        moved: Array = transform(self._bounded(self._unflat(self.shift + scaled, drawn)))
        return moved

    def _solve(self, target: Array) -> Array:
        if not self.lower.shape[-1]:
            return target * jnp.exp(-self.log_scale)
        size = self.log_scale.shape[-1]
        matrix = self._matrix() + jnp.exp(self.log_scale)[..., None] * jnp.eye(size)
        shape = jnp.broadcast_shapes(matrix.shape[:-2], target.shape[:-1])
        matrix = jnp.broadcast_to(matrix, (*shape, size, size))
        target = jnp.broadcast_to(target, (*shape, size))[..., None]
        return jax.scipy.linalg.solve_triangular(matrix, target, lower=True)[..., 0]

    def _matrix(self) -> Array:
        """Lay `lower` out strictly below the diagonal, [*batch, N, N]."""
        size = self.log_scale.shape[-1]
        rows, columns = jnp.tril_indices(size, -1)
        # Divided so that noise of one size in every entry disturbs a draw alike, whatever N is.
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
        support = self.support
        while isinstance(support, constraints.independent):
            support = support.base_constraint
        if support in (constraints.real, constraints.real_vector, constraints.real_matrix):
            return coordinates
        return jnp.clip(coordinates, _LOWEST, _HIGHEST)


@promote_batch_shape.register  # type: ignore[untyped-decorator]
def _promote_affine(d: Affine) -> Affine:
    """Give an `Affine` stacked by a scan its leading axis of time."""
    promoted = copy.copy(d)
    promoted.base = promote_batch_shape(d.base)
    promoted._batch_shape = promoted.base.batch_shape
    return promoted

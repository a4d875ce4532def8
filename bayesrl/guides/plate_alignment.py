"""Align the values of a site with the plates, and aligned tilts with the axes of a site.

The aligned form of a value has one axis per plate dimension (of size 1 where there is no plate) and one
last axis of components, which flattens all other axes of the site.
"""

import math
from typing import Any

import jax.numpy as jnp
from jax import Array

type Dims = tuple[int, ...]
"""Axes of plates, negative and ascending."""


def align(value: Array, dims: Dims, event_ndim: int) -> Array:
    """Bring a site's value [*batch, *event] to aligned form, [*plates, components]."""
    value = jnp.asarray(value)
    num_batch = value.ndim - event_ndim
    framed = [num_batch + dim for dim in dims]
    others = [axis for axis in range(value.ndim) if axis not in framed]
    shape = [1] * num_plate_axes(dims)
    for axis, dim in zip(framed, dims, strict=True):
        shape[dim] = value.shape[axis]
    return value.transpose([*framed, *others]).reshape((*shape, -1))


def unalign(components: Array, batch_shape: tuple[int, ...], dims: Dims, tail: tuple[int, ...]) -> Array:
    """Bring aligned numbers [*plates, components] to the batch axes of a site, [*batch, *tail]."""
    num_batch = len(batch_shape)
    framed = [num_batch + dim for dim in dims]
    free = [axis for axis in range(num_batch) if axis not in framed]
    shape = [1] * num_plate_axes(dims)
    for axis, dim in zip(framed, dims, strict=True):
        shape[dim] = batch_shape[axis]
    full = jnp.broadcast_to(components, (*shape, components.shape[-1]))
    sizes = [*(batch_shape[axis] for axis in framed), *(batch_shape[axis] for axis in free)]
    full = full.reshape((*sizes, *tail))
    order = [*framed, *free]
    back = [order.index(axis) for axis in range(num_batch)]
    return full.transpose([*back, *range(num_batch, num_batch + len(tail))])


def num_components(batch_shape: tuple[int, ...], dims: Dims, tail: tuple[int, ...]) -> int:
    """Count the numbers per plate element that `unalign` takes."""
    framed = [len(batch_shape) + dim for dim in dims]
    return math.prod(size for axis, size in enumerate(batch_shape) if axis not in framed) * math.prod(tail)


def num_plate_axes(dims: Dims) -> int:
    """Count the plate axes of the aligned form."""
    return max((-dim for dim in dims), default=0)


def concatenate_aligned(parts: list[Array]) -> Array:
    """Concatenate aligned arrays along their components, broadcasting the plates."""
    shape = jnp.broadcast_shapes(*(part.shape[:-1] for part in parts))
    return jnp.concatenate([jnp.broadcast_to(part, (*shape, part.shape[-1])) for part in parts], -1)


def plate_dims(frames: Any) -> Dims:
    """Return the axes of plates, ascending."""
    return tuple(sorted(frame.dim for frame in frames))

"""Composite Gymnasium spaces: split them into simple parts, in order, and assemble values from the parts."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

LARGEST_BOUND = 1e6
"""Wider bounds count as no bounds: float32's greatest number is a common way to say "unbounded"."""


@dataclass(frozen=True)
class SpaceLeaf:
    """A simple space inside another, where `path` leads; `sizes` and `least` of its integers, empty for floats."""

    path: tuple[Any, ...]
    space: Any
    sizes: tuple[int, ...]
    least: tuple[int, ...]

    @property
    def width(self) -> int:
        """How many numbers it holds."""
        return math.prod(self.space.shape or ())

    def extract(self, values: Any) -> np.ndarray:
        """Extract its numbers from a batch of composite values, [num, width]."""
        for step in self.path:
            values = values[step]
        array = np.asarray(values)
        return array.reshape(len(array), -1)

    def scale(self) -> np.ndarray:
        """Return the typical size of its numbers, [width]."""
        size = np.maximum(np.abs(self.space.low.astype(float)), np.abs(self.space.high.astype(float)))
        return np.where((size > 0) & (size < LARGEST_BOUND), size, 1.0).astype(np.float32).ravel()


def flatten_space(space: Any, *, counted: bool = False, path: tuple[Any, ...] = ()) -> list[SpaceLeaf] | None:
    """Split a space into its simple parts; None if one of them is not supported.

    With `counted`, bounded boxes of integers are finite sets, not arrays of numbers.
    """
    from gymnasium import spaces

    if isinstance(space, spaces.Dict | spaces.Tuple):
        inner = space.spaces.items() if isinstance(space, spaces.Dict) else enumerate(space.spaces)
        found = [flatten_space(part, counted=counted, path=(*path, step)) for step, part in inner]
        return None if None in found else [leaf for own in found for leaf in own or ()]
    if isinstance(space, spaces.Discrete):
        return [SpaceLeaf(path, space, (int(space.n),), (int(space.start),))]
    if isinstance(space, spaces.MultiDiscrete):
        sizes = tuple(int(n) for n in np.ravel(space.nvec))
        return [SpaceLeaf(path, space, sizes, tuple(int(n) for n in np.ravel(space.start)))]
    if isinstance(space, spaces.MultiBinary) or (isinstance(space, spaces.Box) and space.dtype == bool):
        count = math.prod(space.shape)
        return [SpaceLeaf(path, space, (2,) * count, (0,) * count)]
    if not isinstance(space, spaces.Box) or not np.issubdtype(space.dtype, np.number):
        return None
    if not counted or np.issubdtype(space.dtype, np.floating):
        return [SpaceLeaf(path, space, (), ())]
    low, high = np.ravel(space.low).astype(object), np.ravel(space.high).astype(object)
    sizes = tuple(int(b) - int(a) + 1 for a, b in zip(low, high, strict=True))
    return [SpaceLeaf(path, space, sizes, tuple(map(int, low)))] if max(sizes, default=0) < LARGEST_BOUND else None


def assemble(space: Any, leaves: tuple[SpaceLeaf, ...], numbers: np.ndarray) -> Any:
    """Assemble a batch of values of a space from the concatenated numbers of its leaves, [num, total width]."""
    from gymnasium import spaces

    ends = np.cumsum([leaf.width for leaf in leaves])
    parts = zip(leaves, np.split(numbers, ends[:-1], 1), strict=True)

    def build(space: Any) -> Any:
        # The leaves come in the order in which `flatten_space` met them, which is this one.
        if isinstance(space, spaces.Dict):
            return {name: build(part) for name, part in space.spaces.items()}
        if isinstance(space, spaces.Tuple):
            return tuple(map(build, space.spaces))
        leaf, own = next(parts)
        low, high = (np.ravel(getattr(space, end, 0)) for end in ("low", "high"))
        own = own + np.asarray(leaf.least) if leaf.sizes else np.clip(own, low, high)
        return own.reshape(len(numbers), *space.shape).astype(space.dtype)

    return build(space)


def add_batch_axis(value: Any) -> Any:
    """Turn one value into a batch of one."""
    if isinstance(value, dict):
        return {name: add_batch_axis(part) for name, part in value.items()}
    return tuple(map(add_batch_axis, value)) if isinstance(value, tuple) else np.asarray(value)[None]

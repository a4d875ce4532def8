"""Interval arithmetic over JAX programs: bounds that no value can leave if the inputs lie in given ranges."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Jaxpr, jaxprs_in_params

from bayesrl.jaxprs.interpreter import Interpreter, scan_layout
from bayesrl.jaxprs.interval_rules import INEXACT, INTERVAL_RULES, Range, RangeEnd, nan_to_unbounded

_ULPS = 8
_MOST_STEPS = 256
_ROUNDS = 4


def unbounded_range(aval: Any) -> Range:
    """Return the range of an array of which only shape and type are known."""
    truth = np.issubdtype(aval.dtype, np.bool_)
    return Range(np.zeros(aval.shape), np.ones(aval.shape)) if truth else _unbounded(aval.shape)


def _unbounded(shape: tuple[int, ...]) -> Range:
    return Range(np.full(shape, -np.inf), np.full(shape, np.inf))


def propagate_ranges(jaxpr: Jaxpr, inputs: Sequence[Range]) -> list[Range]:
    """Bound the outputs of a closed jaxpr whose inputs lie in given ranges.

    The bounds hold for every output that is not nan, rounding included: endpoints that the program's own
    number format cannot represent are moved outwards. Operations without a rule give (−inf, inf).
    """
    with np.errstate(all="ignore"):
        return _Ranges().run(jaxpr, list(inputs))


class _Ranges(Interpreter[Range]):
    def constant(self, value: Any, aval: Any) -> Range:
        if jnp.issubdtype(aval.dtype, jax.dtypes.extended):  # a random key has no numeric range
            return _unbounded(aval.shape)
        return nan_to_unbounded(np.asarray(value, float), np.asarray(value, float))

    def join(self, facts: list[Range]) -> Range:
        lower, upper = zip(*facts, strict=True)
        return Range(np.minimum.reduce(lower), np.maximum.reduce(upper))

    def equal(self, one: Range, other: Range) -> bool:
        return all(map(np.array_equal, one, other))

    def widen(self, old: Range, new: Range, attempt: int) -> Range:
        """Give up on ends that still move after a few rounds, and on both ends after some more."""
        if attempt >= 4 * _ROUNDS and not self.equal(old, self.join([old, new])):
            return _unbounded(old.lower.shape)
        (low, high), (lower, upper) = old, self.join([old, new])
        if attempt < _ROUNDS:
            return Range(lower, upper)
        return Range(np.where(lower < low, -np.inf, lower), np.where(upper > high, np.inf, upper))

    def equation(self, eqn: Any, inputs: list[Range]) -> list[Range]:
        avals = [var.aval for var in eqn.outvars]
        if any(jnp.issubdtype(aval.dtype, jax.dtypes.extended) for aval in avals):
            return [_unbounded(aval.shape) for aval in avals]
        return super().equation(eqn, inputs)

    def operation(self, eqn: Any, inputs: list[Range]) -> list[Range]:
        name, avals = eqn.primitive.name, [var.aval for var in eqn.outvars]
        if name in ("split", "unstack"):
            return _parts(eqn, inputs[0])
        found = INTERVAL_RULES[name](eqn, inputs) if name in INTERVAL_RULES and len(avals) == 1 else None
        if found is None:
            return [unbounded_range(aval) for aval in avals]
        return [_rounded(found, avals[0], rough=name in INEXACT)]

    def scan(self, eqn: Any, inputs: list[Range]) -> list[Range]:
        """Run a short scan step by step; bound a long one with one range for all of its steps."""
        (program,) = jaxprs_in_params(eqn.params)
        num_consts, num_carries = scan_layout(eqn, program)
        length, backwards = eqn.params["length"], -1 if eqn.params["reverse"] else 1
        before, series = inputs[: num_consts + num_carries], inputs[num_consts + num_carries :]
        if length == 0:
            return [unbounded_range(var.aval) for var in eqn.outvars]
        # One range over time for each input holds at all steps, however many.
        if length > _MOST_STEPS:
            outs = super().scan(eqn, [*before, *(Range(x.lower.min(0), x.upper.max(0)) for x in series)])
            stacked = [[np.broadcast_to(side, (length, *side.shape)) for side in out] for out in outs[num_carries:]]
            return [*outs[:num_carries], *(Range(*sides) for sides in stacked)]
        fixed, carry = before[:num_consts], before[num_consts:]
        steps = []
        for t in range(length)[::backwards]:
            outs = self.run(program, [*fixed, *carry, *(Range(x.lower[t], x.upper[t]) for x in series)])
            carry = outs[:num_carries]
            steps.append(outs[num_carries:])
        return [
            *carry,
            *(Range(*map(np.stack, zip(*outs, strict=True))) for outs in zip(*steps[::backwards], strict=True)),
        ]


def _parts(eqn: Any, whole: Range) -> list[Range]:
    axis, apart = eqn.params["axis"], eqn.primitive.name == "unstack"
    sizes = [1] * len(eqn.outvars) if apart else eqn.params["sizes"]
    sides = [np.split(side, np.cumsum(sizes)[:-1], axis) for side in whole]
    return [Range(*(np.squeeze(s, axis) if apart else s for s in pair)) for pair in zip(*sides, strict=True)]


# ---- rounding --------------------------------------------------------------------------------


def _rounded(found: Range, aval: Any, *, rough: bool) -> Range:
    """Move endpoints outwards, unless rounding cannot pass them because it is monotone."""
    lower, upper = nan_to_unbounded(*(np.broadcast_to(side, aval.shape) for side in found))
    if jnp.issubdtype(aval.dtype, jnp.integer):
        # Integers wrap around on overflow, so a range that leaves the type says nothing.
        info = jnp.iinfo(aval.dtype)
        wraps = (lower < info.min) | (upper > info.max)
        return Range(np.where(wraps, -np.inf, lower), np.where(wraps, np.inf, upper))
    if not jnp.issubdtype(aval.dtype, jnp.floating):
        return Range(lower, upper)
    limits = jnp.finfo(aval.dtype)

    def outwards(side: RangeEnd, sign: int) -> RangeEnd:
        step = np.abs(side) * _ULPS * float(limits.eps) + float(limits.tiny)
        moved = np.where(np.isfinite(side), side + sign * step, side)
        exact = (side == 0) | (False if rough else side.astype(aval.dtype).astype(float) == side)
        result = np.where(exact, side, moved)
        return np.where(np.abs(result) > float(limits.max), np.where(result > 0, np.inf, -np.inf), result)

    low, high = outwards(lower, -1), outwards(upper, 1)
    # A bound beyond the largest number leaves that number possible, since the value may just not have overflowed.
    return Range(np.where(low == np.inf, float(limits.max), low), np.where(high == -np.inf, float(limits.min), high))

"""Interval arithmetic over JAX programs: bounds that no value inside given ranges can leave."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Jaxpr, Literal

from bayesrl.jaxprs.dataflow import inner_jaxpr, scan_layout
from bayesrl.jaxprs.interval_rules import INEXACT, INTERVAL_RULES, Range, RangeEnd, nan_to_unbounded

_ULPS = 8
_MOST_STEPS = 256
_ROUNDS = 4


def unbounded_range(aval: Any) -> Range:
    """Give the range of which nothing is known but its shape and type."""
    if np.issubdtype(aval.dtype, np.bool_):
        return Range(np.zeros(aval.shape), np.ones(aval.shape))
    return Range(np.full(aval.shape, -np.inf), np.full(aval.shape, np.inf))


def constant_range(value: Any, aval: Any) -> Range:
    """Give the range of a constant; of a random key nothing is known."""
    if jnp.issubdtype(aval.dtype, jax.dtypes.extended):
        return Range(np.full(aval.shape, -np.inf), np.full(aval.shape, np.inf))
    return nan_to_unbounded(np.asarray(value, float), np.asarray(value, float))


def hull(ranges: Sequence[Range]) -> Range:
    """Give the smallest range that holds all of some ranges."""
    lower, upper = ranges[0]
    for other in ranges[1:]:
        lower, upper = np.minimum(lower, other.lower), np.maximum(upper, other.upper)
    return Range(lower, upper)


def propagate_ranges(jaxpr: Jaxpr, consts: Sequence[Range], inputs: Sequence[Range]) -> list[Range]:
    """Bound the outputs of a program whose inputs lie in ranges.

    The bounds hold for every output that is a number, rounding included: endpoints that the program's own
    number format does not hold are moved outwards. What is not understood is (−inf, inf).
    """
    known: dict[Any, Range] = dict(zip(jaxpr.constvars, consts, strict=True))
    known |= dict(zip(jaxpr.invars, inputs, strict=True))

    def read(atom: Any) -> Range:
        return constant_range(atom.val, atom.aval) if isinstance(atom, Literal) else known[atom]

    with np.errstate(all="ignore"):
        for eqn in jaxpr.eqns:
            for var, out in zip(eqn.outvars, _through(eqn, [read(atom) for atom in eqn.invars]), strict=True):
                known[var] = out
        return [read(atom) for atom in jaxpr.outvars]


def _through(eqn: Any, incoming: list[Range]) -> list[Range]:
    name = eqn.primitive.name
    avals = [var.aval for var in eqn.outvars]
    inner = inner_jaxpr(eqn)
    if any(jnp.issubdtype(aval.dtype, jax.dtypes.extended) for aval in avals):
        return [Range(np.full(aval.shape, -np.inf), np.full(aval.shape, np.inf)) for aval in avals]
    if name == "scan" and inner is not None:
        return _through_scan(eqn, inner, incoming)
    if name == "cond":
        branches = [_inside(branch, incoming[1:]) for branch in eqn.params["branches"]]
        return [hull(outs) for outs in zip(*branches, strict=True)]
    if name != "while" and inner is not None and len(inner.invars) == len(eqn.invars):
        return _inside(_first_program(eqn), incoming)
    if name in ("split", "unstack"):
        return _parts(eqn, incoming[0])
    found = INTERVAL_RULES[name](eqn, incoming) if name in INTERVAL_RULES and len(avals) == 1 else None
    if found is None:
        return [unbounded_range(aval) for aval in avals]
    return [_rounded(found, avals[0], rough=name in INEXACT)]


def _first_program(eqn: Any) -> Any:
    return next(value for value in eqn.params.values() if isinstance(getattr(value, "jaxpr", value), Jaxpr))


def _inside(program: Any, incoming: list[Range]) -> list[Range]:
    """Go through an open or a closed program."""
    jaxpr = getattr(program, "jaxpr", program)
    consts = [constant_range(c, v.aval) for c, v in zip(getattr(program, "consts", ()), jaxpr.constvars, strict=True)]
    return propagate_ranges(jaxpr, consts, incoming)


def _through_scan(eqn: Any, body: Jaxpr, incoming: list[Range]) -> list[Range]:
    num_consts, num_carries = scan_layout(eqn, body)
    length, program = eqn.params["length"], _first_program(eqn)
    fixed, carry = incoming[:num_consts], incoming[num_consts : num_consts + num_carries]
    series = incoming[num_consts + num_carries :]
    if length == 0:
        return [unbounded_range(var.aval) for var in eqn.outvars]
    if length <= _MOST_STEPS:
        steps = []
        for t in range(length)[:: -1 if eqn.params["reverse"] else 1]:
            outs = _inside(program, [*fixed, *carry, *(Range(x.lower[t], x.upper[t]) for x in series)])
            carry = outs[:num_carries]
            steps.append(outs[num_carries:])
        stacked = [
            Range(np.stack([out.lower for out in outs]), np.stack([out.upper for out in outs]))
            for outs in zip(*steps[:: -1 if eqn.params["reverse"] else 1], strict=True)
        ]
        return [*carry, *stacked]
    anytime = [Range(x.lower.min(0), x.upper.max(0)) for x in series]
    carry = _invariant(lambda state: _inside(program, [*fixed, *state, *anytime])[:num_carries], carry)
    outs = _inside(program, [*fixed, *carry, *anytime])[num_carries:]
    return [
        *carry,
        *(Range(*(np.broadcast_to(side, (length, *side.shape)) for side in out)) for out in outs),
    ]


def _invariant(step: Callable[[list[Range]], list[Range]], carry: list[Range]) -> list[Range]:
    """Widen a carry until a step keeps it inside: what still grows after a few rounds has no bound."""
    for attempt in range(4 * _ROUNDS):
        wider = [hull([old, new]) for old, new in zip(carry, step(carry), strict=True)]
        if all((a.lower == b.lower).all() and (a.upper == b.upper).all() for a, b in zip(carry, wider, strict=True)):
            return carry
        if attempt >= _ROUNDS:
            wider = [
                Range(np.where(b.lower < a.lower, -np.inf, b.lower), np.where(b.upper > a.upper, np.inf, b.upper))
                for a, b in zip(carry, wider, strict=True)
            ]
        carry = wider
    return [Range(np.full(c.lower.shape, -np.inf), np.full(c.upper.shape, np.inf)) for c in carry]


def _parts(eqn: Any, whole: Range) -> list[Range]:
    axis, apart = eqn.params["axis"], eqn.primitive.name == "unstack"
    sizes = [1] * len(eqn.outvars) if apart else eqn.params["sizes"]
    sides = [np.split(side, np.cumsum(sizes)[:-1], axis) for side in whole]
    return [Range(*(np.squeeze(s, axis) if apart else s for s in pair)) for pair in zip(*sides, strict=True)]


# ---- rounding --------------------------------------------------------------------------------


def _rounded(found: Range, aval: Any, *, rough: bool) -> Range:
    """Move endpoints outwards unless rounding, which is monotone, cannot pass them."""
    lower, upper = nan_to_unbounded(*(np.broadcast_to(side, aval.shape) for side in found))
    if jnp.issubdtype(aval.dtype, jnp.integer):
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
    return Range(np.where(low == np.inf, float(limits.max), low), np.where(high == -np.inf, float(limits.min), high))

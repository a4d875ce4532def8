"""Which inputs of a function its outputs depend on, in any way at all."""

from collections.abc import Callable
from typing import Any

import jax
from jax import Array
from jax.extend.core import Jaxpr, Literal

from bayesrl.jaxprs.dataflow import inner_jaxpr, scan_layout

type _Names = frozenset[str]


def input_dependencies(function: Callable[[dict[str, Array]], Any], values: dict[str, Any]) -> list[_Names]:
    """Name the inputs that each output depends on.

    Unlike a derivative, this follows comparisons, casts and stopped gradients. Where it cannot look
    inside an operation, every output depends on every input: it errs towards dependence.

    Args:
        function: of a dictionary of arrays.
        values: where to trace it: arrays, or their shapes and dtypes, which alone matter.

    Returns:
        One set of names per leaf of the output.
    """
    names = sorted(values)
    closed = jax.make_jaxpr(lambda *arrays: function(dict(zip(names, arrays, strict=True))))(
        *(values[n] for n in names)
    )
    return _follow(closed.jaxpr, [frozenset({name}) for name in names])


def _follow(jaxpr: Jaxpr, inputs: list[_Names]) -> list[_Names]:
    known: dict[Any, _Names] = dict(zip(jaxpr.invars, inputs, strict=True))

    def read(atom: Any) -> _Names:
        return frozenset() if isinstance(atom, Literal) else known.get(atom, frozenset())

    for eqn in jaxpr.eqns:
        incoming = [read(atom) for atom in eqn.invars]
        known.update(zip(eqn.outvars, _through(eqn, incoming), strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _through(eqn: Any, incoming: list[_Names]) -> list[_Names]:
    if eqn.primitive.name == "scan":
        return _through_scan(eqn, incoming)
    inner = inner_jaxpr(eqn)
    if inner is not None and eqn.primitive.name != "while" and len(inner.invars) == len(incoming):
        return _follow(inner, incoming)
    return [frozenset[str]().union(*incoming)] * len(eqn.outvars)


def _through_scan(eqn: Any, incoming: list[_Names]) -> list[_Names]:
    body = inner_jaxpr(eqn)
    assert body is not None
    consts, carries = scan_layout(eqn, body)
    state = list(incoming)
    while True:
        outputs = _follow(body, state)
        new = list(state)
        for i in range(carries):
            new[consts + i] = state[consts + i] | outputs[i]
        if new == state:
            return outputs
        state = new

"""How the outputs of a function depend on its inputs: whether at all, through a jump, and at what cost."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.extend.core import jaxprs_in_params

from bayesrl.jaxprs.interpreter import Interpreter, called_program

# A comparison of floats jumps. Equality jumps only on a null set, and the other cuts are intentional.
_JUMPS = frozenset({"lt", "le", "gt", "ge", "floor", "ceil", "round", "sign", "argmax", "argmin", "rem"})
_CUTS = frozenset({"eq", "ne", "is_finite", "stop_gradient"})
_OWN_DERIVATIVE = frozenset({"custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr"})


class _Reached(NamedTuple):
    """The inputs that reach a value at all, and those that reach it through a jump."""

    all: frozenset[str] = frozenset()
    jumping: frozenset[str] = frozenset()


class _Discontinuities(Interpreter[_Reached]):
    def constant(self, value: Any, aval: Any) -> _Reached:
        return _Reached()

    def join(self, facts: list[_Reached]) -> _Reached:
        return _Reached(*(frozenset().union(*sides) for sides in zip(*facts, strict=True)))

    def equation(self, eqn: Any, inputs: list[_Reached]) -> list[_Reached]:
        # A handwritten derivative takes care of the jumps inside.
        own = eqn.primitive.name in _OWN_DERIVATIVE
        return self.operation(eqn, inputs) if own else super().equation(eqn, inputs)

    def operation(self, eqn: Any, inputs: list[_Reached]) -> list[_Reached]:
        name = eqn.primitive.name
        out = self.join([_Reached(), *inputs])
        if name in _CUTS:
            out = _Reached()
        elif name in _JUMPS or name == "while" or _casts_to_integer(eqn):
            out = _jump(out)
        return [out] * len(eqn.outvars)

    def cond(self, eqn: Any, inputs: list[_Reached]) -> list[_Reached]:
        return [self.join([_jump(inputs[0]), out]) for out in super().cond(eqn, inputs)]


def _jump(reached: _Reached) -> _Reached:
    return _Reached(reached.all, reached.all | reached.jumping)


def _casts_to_integer(eqn: Any) -> bool:
    if eqn.primitive.name != "convert_element_type":
        return False
    new, old = eqn.outvars[0].aval.dtype, eqn.invars[0].aval.dtype
    return jnp.issubdtype(old, jnp.floating) and not jnp.issubdtype(new, jnp.floating)


def discontinuous_inputs(
    function: Callable[[dict[str, Array]], Any], values: dict[str, Array]
) -> tuple[set[str], set[str]]:
    """Find the inputs for which a pathwise gradient would be silently wrong.

    Args:
        function: function of a dictionary of arrays.
        values: point at which to trace it; only shapes and dtypes matter.

    Returns:
        Names of the inputs that reach an output at all, and of those that reach one through a jump
        (a float comparison, rounding, an arg-max, a cast to integers).
    """
    # JAX flattens a dictionary in the order of its sorted keys.
    inputs = [_Reached(frozenset({name})) for name in sorted(values)]
    outputs = _Discontinuities().run(jax.make_jaxpr(function)(values), inputs)
    reached = _Discontinuities().join([_Reached(), *outputs])
    return set(reached.all), set(reached.jumping)


class _Dependencies(Interpreter[frozenset[str]]):
    def constant(self, value: Any, aval: Any) -> frozenset[str]:
        return frozenset()

    def join(self, facts: list[frozenset[str]]) -> frozenset[str]:
        return frozenset[str]().union(*facts)

    def operation(self, eqn: Any, inputs: list[frozenset[str]]) -> list[frozenset[str]]:
        return [self.join(inputs)] * len(eqn.outvars)

    def cond(self, eqn: Any, inputs: list[frozenset[str]]) -> list[frozenset[str]]:
        return [self.join([inputs[0], out]) for out in super().cond(eqn, inputs)]


def input_dependencies(function: Callable[[dict[str, Array]], Any], values: dict[str, Any]) -> list[frozenset[str]]:
    """Name the inputs that each output depends on, one set per leaf of the output.

    Unlike a derivative, this follows comparisons, casts and stopped gradients. Of an operation that it
    cannot look into, every output depends on every input: it errs towards dependence.
    """
    return _Dependencies().run(jax.make_jaxpr(function)(values), [frozenset({name}) for name in sorted(values)])


class _CallsPythonError(Exception):
    """A program calls Python, whose cost is unknown."""


class _Counter(Interpreter[bool]):
    """Marks values that depend on the inputs, and counts their numbers."""

    def __init__(self) -> None:
        self.total = 0

    def constant(self, value: Any, aval: Any) -> bool:
        return False

    def join(self, facts: list[bool]) -> bool:
        return any(facts)

    def equation(self, eqn: Any, inputs: list[bool]) -> list[bool]:
        if "callback" in eqn.primitive.name:
            raise _CallsPythonError
        if not any(inputs):
            return [False] * len(eqn.outvars)
        if called_program(eqn) is None and (program := next(jaxprs_in_params(eqn.params), None)) is not None:
            inside = _Counter()  # a loop: assume that each step computes its whole body anew
            inside.run(program, [True] * len(program.invars))
            self.total += inside.total * int(eqn.params.get("length", 1))
            return [True] * len(eqn.outvars)
        return super().equation(eqn, inputs)

    def operation(self, eqn: Any, inputs: list[bool]) -> list[bool]:
        size = sum(math.prod(var.aval.shape) for var in eqn.outvars)
        if eqn.primitive.name in ("dot_general", "conv_general_dilated"):
            size *= max(math.prod(var.aval.shape[-1:]) for var in eqn.invars)
        self.total += size
        return [True] * len(eqn.outvars)


def count_dependent_numbers(function: Callable[[dict[str, Array]], Any], values: dict[str, Array]) -> int | None:
    """Roughly count the numbers that a function recomputes for other values; None if it calls Python."""
    counter = _Counter()
    try:
        counter.run(jax.make_jaxpr(function)(values), [True] * len(values))
    except _CallsPythonError:
        return None
    return counter.total

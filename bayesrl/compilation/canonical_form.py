"""What a traced program computes, apart from the numbers in it: programs of one form share one compilation.

JAX writes Python numbers that a function closes over into its program. So a changed reward table, learning rate or
number of steps would give a new program to compile. This module moves such numbers out of the program and makes them
arguments, like the arrays that it closes over.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.extend.core import Jaxpr, Literal, jaxprs_in_params

from bayesrl.jaxprs.interpreter import scan_layout

_PLAIN = frozenset({0.0, 1.0, -1.0, 2.0, -2.0, 0.5, float("inf"), float("-inf")})
"""Numbers that XLA simplifies away: they shape the program, so they stay in it."""

DIFFERENTIATION_ONLY = frozenset({"jvp_jaxpr_fun", "fwd_jaxpr_thunk", "bwd", "symbolic_zeros"})
"""Parameters of operations that matter only if a program is differentiated further, which does not happen here."""

_NAMES = frozenset({"name", "ctx_mesh"})
_OPENED = frozenset({"jit", "scan", "while", "cond", "custom_jvp_call", "custom_vjp_call"})
"""Operations whose inner programs `evaluate_jaxpr` can rebuild; numbers inside other operations stay in place."""


class CanonicalForm(NamedTuple):
    """A program's form, and the numbers that fill it.

    Attributes:
        form: equal for programs that compute the same function of their arguments and fillings.
        fillings: numbers, and arrays that inner programs close over, in the order in which `evaluate_jaxpr` takes them.
    """

    form: tuple[Any, ...]
    fillings: tuple[Any, ...]


def canonical_form(jaxpr: Jaxpr) -> CanonicalForm:
    """Return the form of a traced program.

    Args:
        jaxpr: result of `jax.make_jaxpr`; arrays that it closes over count by shape and type only.
    """
    form = _Form()
    encoded = form.program(jaxpr, lift=True)
    return CanonicalForm(encoded, tuple(form.fillings))


class _Form:
    """Turns programs into tuples that compare equal if the programs do the same."""

    def __init__(self) -> None:
        self.fillings: list[Any] = []
        self._known: dict[tuple[int, bool], tuple[Any, list[Any], Any]] = {}

    def program(self, jaxpr: Jaxpr, *, lift: bool) -> tuple[Any, ...]:
        if (known := self._known.get((id(jaxpr), lift))) is not None:
            # `evaluate_jaxpr` takes the numbers of a program anew at each place where it stands.
            self.fillings += known[1]
            encoded: tuple[Any, ...] = known[0]
            return encoded
        before = len(self.fillings)
        # Variables are numbered by appearance, so that two traces of one function agree.
        place: dict[Any, int] = {}
        for var in (*jaxpr.constvars, *jaxpr.invars):
            place[var] = len(place)
        header = tuple((v.aval.shape, v.aval.dtype, getattr(v.aval, "weak_type", False)) for v in place)
        steps = []
        for eqn in jaxpr.eqns:
            inputs = tuple(self._atom(atom, place, lift=lift) for atom in eqn.invars)
            params = tuple(
                self._param(value, lift=lift and _is_opened(eqn))
                for key, value in sorted(eqn.params.items())
                if key not in _NAMES and key not in DIFFERENTIATION_ONLY
            )
            for var in eqn.outvars:
                place[var] = len(place)
            steps.append((eqn.primitive, inputs, params, len(eqn.outvars)))
        outputs = tuple(self._atom(atom, place, lift=lift) for atom in jaxpr.outvars)
        encoded = (len(jaxpr.constvars), header, tuple(steps), outputs)
        # Keep the jaxpr too: its id must not pass to another object.
        self._known[id(jaxpr), lift] = (encoded, self.fillings[before:], jaxpr)
        return encoded

    def _atom(self, atom: Any, place: dict[Any, int], *, lift: bool) -> Any:
        if not isinstance(atom, Literal):
            return place[atom]
        aval: Any = atom.aval
        # Weak types promote differently, so they belong to the form.
        weak = getattr(aval, "weak_type", False)
        if lift and is_lifted_number(atom):
            self.fillings.append(np.asarray(atom.val, aval.dtype)[()])
            return ("number", aval.dtype, weak)
        return (*_array(atom.val, aval.dtype), weak)

    def _param(self, value: Any, *, lift: bool) -> Any:
        if isinstance(value, Jaxpr):
            if lift:
                self.fillings += [const if isinstance(const, Array) else np.asarray(const) for const in value.consts]
                return self.program(value, lift=True)
            consts = tuple(_array(const, np.result_type(const)) for const in value.consts)
            return (*self.program(value, lift=False), consts)
        if isinstance(value, tuple | list):
            return tuple(self._param(item, lift=lift) for item in value)
        if isinstance(value, dict):
            return tuple((key, self._param(item, lift=lift)) for key, item in value.items())
        if isinstance(value, Array | np.ndarray):
            return _array(value, value.dtype)
        try:
            hash(value)
        except TypeError:
            return _Same(value)
        return value


class _Same:
    """Something that cannot be compared, so it equals only itself."""

    def __init__(self, thing: Any) -> None:
        self.thing = thing

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and other.thing is self.thing

    def __hash__(self) -> int:
        return id(self.thing)


def _array(value: Any, dtype: Any) -> tuple[Any, ...]:
    if jnp.issubdtype(dtype, jax.dtypes.extended):
        return (_Same(value),)
    array = np.asarray(value, dtype)
    return ("array", array.dtype, array.shape, array.tobytes())


def is_lifted_number(atom: Any) -> bool:
    """Whether an input of an operation is a number that moves out of the program."""
    aval: Any = atom.aval
    if not isinstance(atom, Literal) or aval.shape != ():
        return False
    dtype = aval.dtype
    if jnp.issubdtype(dtype, jax.dtypes.extended) or np.dtype(dtype).kind not in "fi":
        return False
    value = float(atom.val)
    return value not in _PLAIN and value == value  # noqa: PLR0124  (nan stays)


def evaluate_jaxpr(jaxpr: Jaxpr, consts: Sequence[Any], fillings: Sequence[Any], *args: Any) -> list[Any]:
    """Run a program with other numbers instead of its own.

    Args:
        jaxpr: the program.
        consts: arrays that it closes over.
        fillings: its fillings, in the order of `canonical_form`.
        *args: its arguments.
    """
    values: dict[Any, Any] = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*consts, *args), strict=True))
    left = iter(fillings)

    def read(atom: Any) -> Any:
        if not isinstance(atom, Literal):
            return values[atom]
        return next(left) if is_lifted_number(atom) else atom.val

    for eqn in jaxpr.eqns:
        inputs = [read(atom) for atom in eqn.invars]
        if _num_inside(eqn):
            outputs = _rebuild(eqn, left, inputs)
        else:
            with eqn.ctx.manager:
                outputs = eqn.primitive.bind(*inputs, **eqn.primitive.get_bind_params(eqn.params))
            if not eqn.primitive.multiple_results:
                outputs = [outputs]
        values.update(zip(eqn.outvars, outputs, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _is_opened(eqn: Any) -> bool:
    """Whether `evaluate_jaxpr` rebuilds an operation: loops with one condition per element (`vmap`) stay closed."""
    if eqn.primitive.name == "while":
        condition: Any = eqn.params["cond_jaxpr"].outvars[0].aval
        return condition.shape == ()
    return eqn.primitive.name in _OPENED


def _programs(eqn: Any) -> list[Jaxpr]:
    """Return the programs inside an operation, in the order in which `canonical_form` meets them."""
    return list(jaxprs_in_params(dict(sorted(eqn.params.items()))))


def _num_inside(eqn: Any) -> int:
    """Count the fillings of the programs inside an operation."""
    return sum(len(p.consts) + _num_numbers(p) for p in _programs(eqn)) if _is_opened(eqn) else 0


def _num_numbers(jaxpr: Jaxpr) -> int:
    atoms = itertools.chain(*(eqn.invars for eqn in jaxpr.eqns), jaxpr.outvars)
    return sum(map(is_lifted_number, atoms)) + sum(map(_num_inside, jaxpr.eqns))


def _rebuild(eqn: Any, fillings: Iterator[Any], inputs: list[Any]) -> list[Any]:
    """Run an operation with new fillings in its inner programs."""
    runs: list[Callable[..., list[Any]]] = []
    for program in _programs(eqn):
        consts, numbers = ([next(fillings) for _ in range(n)] for n in (len(program.consts), _num_numbers(program)))
        runs.append(partial(evaluate_jaxpr, program, consts, numbers))
    params = eqn.params
    match eqn.primitive.name:
        case "scan":
            (step,) = runs
            num_consts, num_carry = scan_layout(eqn, params["jaxpr"])
            fixed, init, xs = inputs[:num_consts], inputs[num_consts:][:num_carry], inputs[num_consts + num_carry :]

            def body(carry: list[Any], x: list[Any]) -> tuple[list[Any], list[Any]]:
                outputs = step(*fixed, *carry, *x)
                return outputs[:num_carry], outputs[num_carry:]

            carry, ys = lax.scan(body, init, xs, params["length"], reverse=params["reverse"], unroll=params["unroll"])
            return [*carry, *ys]
        case "while":
            advance, go_on = runs  # sorted by parameter name: body_jaxpr, cond_jaxpr
            first, second = params["cond_nconsts"], params["cond_nconsts"] + params["body_nconsts"]
            of_cond, of_body, init = inputs[:first], inputs[first:second], inputs[second:]
            return lax.while_loop(lambda x: go_on(*of_cond, *x)[0], lambda x: advance(*of_body, *x), init)
        case "cond":
            chosen: list[Any] = lax.switch(inputs[0], runs, *inputs[1:])
            return chosen
        case _:
            # Calls, and functions with derivatives of their own, are run in place: nothing differentiates them here.
            return runs[0](*inputs)

"""Abstract interpretation of jaxprs: what is known of a program's inputs, followed through to its outputs."""

import abc
import itertools
from typing import Any

from jax.extend.core import Jaxpr, Literal, jaxprs_in_params


class Interpreter[T](abc.ABC):
    """Runs a jaxpr on facts of type `T` in the place of arrays.

    A subclass says what is known of constants and what an operation makes of the facts of its inputs. Calls, `scan` and
    `cond` are followed here: a `scan` until the facts of its carry no longer change. A `while` is one operation.
    """

    @abc.abstractmethod
    def constant(self, value: Any, aval: Any) -> T:
        """Give what is known of a constant."""

    @abc.abstractmethod
    def operation(self, eqn: Any, inputs: list[T]) -> list[T]:
        """Give what is known of the outputs of an operation that is not looked into."""

    @abc.abstractmethod
    def join(self, facts: list[T]) -> T:
        """Give what holds whichever of some facts does."""

    def widen(self, old: T, new: T, attempt: int) -> T:
        """Join a carry's fact with that after one more step; a subclass whose facts may grow for ever jumps ahead."""
        return self.join([old, new])

    def equal(self, one: T, other: T) -> bool:
        """Whether two facts are the same."""
        return bool(one == other)

    def run(self, jaxpr: Jaxpr, inputs: list[T]) -> list[T]:
        """Follow facts through a jaxpr."""
        known: dict[Any, T] = dict(zip(jaxpr.invars, inputs, strict=True))
        for var, value in zip(jaxpr.constvars, jaxpr.consts, strict=True):
            known[var] = self.constant(value, var.aval)

        def read(atom: Any) -> T:
            return self.constant(atom.val, atom.aval) if isinstance(atom, Literal) else known[atom]

        for eqn in jaxpr.eqns:
            known.update(zip(eqn.outvars, self.equation(eqn, [read(atom) for atom in eqn.invars]), strict=True))
        return [read(atom) for atom in jaxpr.outvars]

    def equation(self, eqn: Any, inputs: list[T]) -> list[T]:
        """Follow facts through one equation."""
        if eqn.primitive.name == "scan":
            return self.scan(eqn, inputs)
        if eqn.primitive.name == "cond":
            return self.cond(eqn, inputs)
        program = called_program(eqn)
        return self.operation(eqn, inputs) if program is None else self.run(program, inputs)

    def scan(self, eqn: Any, inputs: list[T]) -> list[T]:
        """Follow the carry of a scan until it stays what it is."""
        (program,) = jaxprs_in_params(eqn.params)
        first, num = scan_layout(eqn, program)
        state, carry = list(inputs), slice(first, first + num)
        for attempt in itertools.count():
            outputs = self.run(program, state)
            wider = [self.widen(*pair, attempt) for pair in zip(state[carry], outputs[:num], strict=True)]
            if all(map(self.equal, wider, state[carry])):
                break
            state[carry] = wider
        return outputs

    def cond(self, eqn: Any, inputs: list[T]) -> list[T]:
        """Join what the branches give."""
        branches = [self.run(branch, inputs[1:]) for branch in eqn.params["branches"]]
        return [self.join(list(outputs)) for outputs in zip(*branches, strict=True)]


def called_program(eqn: Any) -> Jaxpr | None:
    """Give the jaxpr that an operation runs once on its own inputs, such as that of `jit`; None where there is none."""
    if eqn.primitive.name in ("scan", "while", "cond"):
        return None
    shapes = [atom.aval.shape for atom in eqn.invars]
    # The shapes tell apart the jaxprs of reductions, which take single elements.
    return next((p for p in jaxprs_in_params(eqn.params) if _shapes_of(p) == shapes), None)


def _shapes_of(program: Any) -> list[tuple[int, ...]]:
    return [var.aval.shape for var in program.invars]


def scan_layout(eqn: Any, body: Jaxpr) -> tuple[int, int]:
    """Count the constants and the carries of a scan: inputs and outputs per step have one axis more outside."""

    def per_step(outside: Any, inside: Any) -> bool:
        return bool(len(outside.aval.shape) > len(inside.aval.shape))

    carries = sum(not per_step(*pair) for pair in zip(eqn.outvars, body.outvars, strict=True))
    steps = sum(per_step(*pair) for pair in zip(eqn.invars, body.invars, strict=True))
    return len(eqn.invars) - carries - steps, carries

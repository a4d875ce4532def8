"""Compilation: each computation is compiled once per process, whatever numbers fill it."""

import math
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Jaxpr, jaxprs_in_params, subjaxprs

from bayesrl.compilation.callbacks import callbacks_kept_alive, host_errors
from bayesrl.compilation.canonical_form import canonical_form, evaluate_jaxpr
from bayesrl.compilation.status import activity

MAX_PROGRAMS = 256
"""How many compiled programs to keep; a process can map a few thousand before the system refuses."""

_LEVEL = "xla_backend_optimization_level"
_LITTLE = 2**21
"""A program that runs a few times and makes fewer numbers than this is compiled as fast as possible."""


class ClosureJit:
    """A function compiled by JAX: traced at every call, compiled only if no program of its form exists yet.

    `jax.jit` caches by a function's identity, and keeps using what the function read when it was first traced,
    even if the numbers of a closure, a global or an attribute have changed since. Here a function is traced at each
    call, so its answer reflects what it reads now. Compiled programs are stored by what they compute: another function
    that computes the same, or the same function with other numbers, finds them.

    The arrays and numbers that a function closes over are arguments of its program. (`jax.jit` writes them into the
    program as constants; it then holds a copy of a network's weights, and compiles slowly.)

    Most of the library's programs run a few times only, so on a CPU they are compiled with fewer optimisations, or with
    none if they compute little; steps of a fit are compiled with all optimisations.

    Args:
        fn: a function of (static, *arguments); arrays in the arguments are traced, all else is static.
        name: name of the compiled program, in profiles and in the progress line; by default that of `fn`.
        full_optimization: whether it runs so often that all optimisations pay.

    Example:
        >>> import jax.numpy as jnp
        >>> from bayesrl.compilation.jit import ClosureJit
        >>> weights = jnp.ones((3, 3))
        >>> double = ClosureJit(lambda factor, x: factor * (weights @ x), name="double")
        >>> double(2, jnp.ones(3)).tolist()
        [6.0, 6.0, 6.0]
    """

    def __init__(self, fn: Callable[..., Any], *, name: str | None = None, full_optimization: bool = False) -> None:
        self.fn, self.full_optimization = fn, full_optimization
        self.name = name or getattr(fn, "__name__", "program").strip("_")

    def __call__(self, static: Any, *args: Any) -> Any:
        """Call the function."""
        leaves = _leaves(args)
        # Inside another trace the function becomes a part of that program.
        if has_tracers(leaves):
            return self.fn(static, *args)
        return _traced(self, static, args).run(leaves)

    def traced(self, static: Any, *args: Any) -> "TracedProgram":
        """Trace the function, and return its program with its fillings."""
        return _traced(self, static, args)

    def prepare(self, static: Any, *args: Any) -> Callable[..., Any]:
        """Trace the function once for many calls with arrays of these shapes; other arguments stay as they are.

        What the function reads besides its arguments is read now, and never again.
        """
        traced = _traced(self, static, args)
        return lambda *args: traced.run(_leaves(args))


def _of_arguments(fn: Callable[..., Any], name: str | None, *, full_optimization: bool = False) -> ClosureJit:
    name = name or getattr(fn, "__name__", None)
    return ClosureJit(lambda _, *args: fn(*args), name=name, full_optimization=full_optimization)


def closure_jit(fn: Callable[..., Any], *, name: str | None = None) -> Callable[..., Any]:
    """Compile a function as `ClosureJit` does; only arguments that are not arrays are static."""
    made = _of_arguments(fn, name)
    return lambda *args: made(None, *args)


def trace_once(
    fn: Callable[..., Any], *, name: str | None = None, full_optimization: bool = False
) -> Callable[..., Any]:
    """Trace a function at its first call, and again only for arguments of other shapes; see `ClosureJit.prepare`."""
    made = _of_arguments(fn, name, full_optimization=full_optimization)
    traced: dict[Any, TracedProgram] = {}

    def call(*args: Any) -> Any:
        leaves = _leaves(args)
        held = tuple(jax.typeof(x) if _is_traced(x) else x for x in jax.tree.leaves(args))
        key = (jax.tree.structure(args), held)
        if key not in traced:
            traced[key] = _traced(made, None, args)
        return traced[key].run(leaves)

    return call


def has_tracers(tree: Any) -> bool:
    """Whether a pytree has values that are not known before a program runs."""
    return any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(tree))


def to_host(tree: Any) -> Any:
    """Turn JAX arrays of a pytree into NumPy arrays without a copy if the device is the host; else leave them.

    Later operations on single arrays, such as taking a slice, then compile nothing.
    """
    if jax.default_backend() != "cpu":
        return tree

    def moved(x: Any) -> Any:
        known = isinstance(x, jax.Array) and not isinstance(x, jax.core.Tracer)
        return np.asarray(x) if known and not jnp.issubdtype(x.dtype, jax.dtypes.extended) else x

    return jax.tree.map(moved, tree)


def clear_programs() -> None:
    """Forget all compiled programs of this process; those on disk stay."""
    with _lock:
        _programs.clear()


def num_programs() -> int:
    """Return the number of compiled programs that this process keeps."""
    return len(_programs)


class _Program:
    """One compiled program, shared by all functions that compute the same."""

    def __init__(self, jaxpr: Jaxpr, name: str, level: int | None) -> None:
        def run(consts: list[Any], fillings: list[Any], leaves: list[Any]) -> list[Any]:
            return evaluate_jaxpr(jaxpr, consts, fillings, *leaves)

        # JAX and its profiler name the program after the function.
        run.__name__ = run.__qualname__ = name
        self.name, self.compiled = name, False
        self.jitted = jax.jit(run, compiler_options=None if level is None else {_LEVEL: level})

    def __call__(self, *args: list[Any]) -> list[Any]:
        if not self.compiled:
            # Compile before the first run, so that the display shows the time of compilation only.
            with activity(f"compiling {self.name}"):
                self.jitted.lower(*args).compile()
            self.compiled = True
        outputs: list[Any] = self.jitted(*args)
        return outputs


class TracedProgram:
    """The trace of one function: a program, and the arrays and numbers that fill it."""

    def __init__(self, closed: Jaxpr, tree: Any, name: str, level: int | None, functions: list[Any]) -> None:
        form, fillings = canonical_form(closed)
        key = (form, level)
        with _lock:
            program = _programs.get(key)
            if program is None:
                program = _programs[key] = _Program(closed, name, level)
                while len(_programs) > MAX_PROGRAMS:
                    _programs.popitem(last=False)
            _programs.move_to_end(key)
        self.program, self.tree, self.functions = program, tree, functions
        self.consts, self.fillings = jax.device_put(
            ([c if isinstance(c, jax.Array) else np.asarray(c) for c in closed.consts], list(fillings))
        )
        self.calls_host = _calls_host(closed)

    def text(self, leaves: list[Any]) -> str:
        """Return the program as XLA reads it."""
        return str(self.program.jitted.lower(self.consts, self.fillings, leaves).as_text())

    def run(self, leaves: list[Any]) -> Any:
        """Run the program on these arrays."""
        with host_errors() if self.calls_host else nullcontext():
            outputs = self.program(self.consts, self.fillings, leaves)
            if self.calls_host:  # a function on the host may fail: wait, so that its error is raised here, not later
                jax.block_until_ready(outputs)
        return jax.tree.unflatten(self.tree, outputs)


_programs: OrderedDict[Any, _Program] = OrderedDict()
_lock = threading.RLock()


def _leaves(args: Any) -> list[Any]:
    return [leaf for leaf in jax.tree.leaves(args) if _is_traced(leaf)]


def _is_traced(value: Any) -> bool:
    return isinstance(value, jax.Array | np.ndarray)


_reading: ContextVar[dict[Any, Any] | None] = ContextVar("reading", default=None)


@contextmanager
def trace_cache() -> Iterator[None]:
    """Assume that what functions read besides their arguments does not change inside the context.

    They are then traced once for each static value and each shape of arguments. The context spans one call of the
    library, such as one evidence, whose answer describes one state of everything that the user's program reads.
    """
    if _reading.get() is not None:
        yield
        return
    token = _reading.set({})
    try:
        yield
    finally:
        _reading.reset(token)


def cached_analysis[T](make: Callable[[], T], program: Any, args: tuple[Any, ...]) -> T:
    """Run an analysis that reads only a program and its arguments; inside `trace_cache`, once for the same objects."""
    read = _reading.get()
    leaves, tree = jax.tree.flatten(args)
    if read is None or has_tracers(leaves):
        return make()
    # `make` is a new closure each time, so its name stands for the analysis; a random key in it does not count.
    key = (make.__qualname__, id(program), tree, tuple(id(leaf) for leaf in leaves))
    if key not in read:
        read[key] = make(), program, leaves  # keep references, so that no other object gets their addresses
    found: T = read[key][0]
    return found


def _traced(made: ClosureJit, static: Any, args: Any) -> TracedProgram:
    arrays, rest = eqx.partition(args, _is_traced)
    leaves, tree = jax.tree.flatten(arrays)

    def rebuild(leaves: list[Any]) -> Any:
        return eqx.combine(jax.tree.unflatten(tree, leaves), rest)

    read = _reading.get()
    if read is None:
        return _trace(made, static, leaves, rebuild)
    held, form = jax.tree.flatten(rest)
    key = (made, static, form, tuple(held), tuple(jax.typeof(leaf) for leaf in leaves))
    try:
        hash(key)
    except TypeError:
        # Without a hash the static values cannot be looked up, so trace at each call.
        return _trace(made, static, leaves, rebuild)
    if key not in read:
        read[key] = _trace(made, static, leaves, rebuild)
    return read[key]


def _trace(made: ClosureJit, static: Any, leaves: list[Any], rebuild: Callable[[list[Any]], Any]) -> TracedProgram:
    def flat(*leaves: Any) -> Any:
        return made.fn(static, *rebuild(list(leaves)))

    with callbacks_kept_alive() as functions:
        closed, shapes = jax.make_jaxpr(flat, return_shape=True)(*leaves)
    # An optimisation level set in XLA_FLAGS takes precedence.
    chosen = made.full_optimization or jax.default_backend() != "cpu" or _LEVEL in os.environ.get("XLA_FLAGS", "")
    level = None if chosen else int(_work(closed) >= _LITTLE)
    return TracedProgram(closed, jax.tree.structure(shapes), made.name, level, functions)


def _work(jaxpr: Any) -> int:
    """Count the numbers that a program makes; a loop of unknown length counts as one step."""
    total = 0
    for eqn in jaxpr.eqns:
        inner = sum(map(_work, jaxprs_in_params(eqn.params)))
        total += inner * int(eqn.params.get("length", 1) if eqn.primitive.name == "scan" else 1)
        total += sum(math.prod(var.aval.shape) for var in eqn.outvars)
    return total


def _calls_host(jaxpr: Jaxpr) -> bool:
    """Whether a program calls a Python function on the host, at any depth."""
    called = any(eqn.primitive.name == "pure_callback" for eqn in jaxpr.eqns)
    return called or any(map(_calls_host, subjaxprs(jaxpr)))

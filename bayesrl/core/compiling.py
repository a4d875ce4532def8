"""Compilation that takes what a function closes over as arguments, so that weights never become constants."""

import os
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any

import equinox as eqx
import jax
from jax.extend.core import Jaxpr

from bayesrl.core.host import host_errors

_MOST_KEPT = 64
_LEVEL = "xla_backend_optimization_level"


class Compiled:
    """A function compiled by JAX, to whose programs the arrays that it closes over are passed as arguments.

    `jax.jit` writes such arrays into the compiled program, as constants: it then holds a copy of a network's weights,
    and takes long to compile. Programs close over the networks that are their priors, so every function of the
    library that runs a program is compiled by this.

    Most of what the library compiles runs a few times only, so it is compiled with fewer optimisations, which takes
    half as long on a CPU; steps of a fit are compiled with all of them.

    Args:
        fn: a function of (what is static, *arguments); arrays in the arguments are traced, all else is static.
        often: whether it is called so often that all optimisations pay.

    Example:
        >>> import jax.numpy as jnp
        >>> from bayesrl.core.compiling import Compiled
        >>> weights = jnp.ones((3, 3))
        >>> double = Compiled(lambda factor, x: factor * (weights @ x))
        >>> double(2, jnp.ones(3)).tolist()
        [6.0, 6.0, 6.0]
    """

    def __init__(self, fn: Callable[..., Any], *, often: bool = False) -> None:
        self.fn, self.often = fn, often
        self._made: OrderedDict[Hashable, Any] = OrderedDict()

    def __call__(self, static: Hashable, *args: Any) -> Any:
        """Call the function; it is traced once for each static value, and shape of arguments."""
        arrays, rest = eqx.partition(args, eqx.is_array)
        leaves, tree = jax.tree.flatten(arrays)
        held, held_tree = jax.tree.flatten(rest)
        key = (static, tree, tuple(jax.typeof(leaf) for leaf in leaves), tuple(held), held_tree)
        if key not in self._made:
            self._made[key] = self._make(static, tree, rest, leaves)
            if len(self._made) > _MOST_KEPT:
                self._made.popitem(last=False)
        self._made.move_to_end(key)
        run, closed_over, out_tree, calls_host = self._made[key]
        if not calls_host:
            return jax.tree.unflatten(out_tree, run(closed_over, leaves))
        with host_errors():
            # What runs on the host may fail, and its error shall come from here, not from whoever looks at the result.
            return jax.tree.unflatten(out_tree, jax.block_until_ready(run(closed_over, leaves)))

    def _make(self, static: Hashable, tree: Any, rest: Any, leaves: list[Any]) -> tuple[Any, ...]:
        """Trace the function; what was compiled goes with the entry: a process has room for so many programs only."""

        def flat(*leaves: Any) -> Any:
            return self.fn(static, *eqx.combine(jax.tree.unflatten(tree, leaves), rest))

        closed, shapes = jax.make_jaxpr(flat, return_shape=True)(*leaves)
        # Whoever set the level of optimisation in XLA_FLAGS is heard.
        fewer = not self.often and jax.default_backend() == "cpu" and _LEVEL not in os.environ.get("XLA_FLAGS", "")

        def run(closed_over: Any, leaves: list[Any]) -> Any:
            return jax.core.eval_jaxpr(closed.jaxpr, closed_over, *leaves)

        run_compiled = jax.jit(run, compiler_options={_LEVEL: 1} if fewer else None)
        return run_compiled, closed.consts, jax.tree.structure(shapes), _calls_host(closed.jaxpr)


def compiled(fn: Callable[..., Any], *, often: bool = False) -> Callable[..., Any]:
    """Compile a function as `Compiled` does, nothing in it static but what is no array."""
    made = Compiled(lambda _, *args: fn(*args), often=often)
    return lambda *args: made(None, *args)


def _calls_host(jaxpr: Any) -> bool:
    """Tell whether a program calls a Python function on the host, however deep inside."""
    return any(
        eqn.primitive.name == "pure_callback"
        or any(
            _calls_host(opened)
            for value in eqn.params.values()
            for inner in (value if isinstance(value, tuple | list) else (value,))
            if isinstance(opened := getattr(inner, "jaxpr", inner), Jaxpr)  # closed jaxprs hold an open one
        )
        for eqn in jaxpr.eqns
    )

"""Compilation that takes what a function closes over as arguments, so that weights never become constants."""

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any

import equinox as eqx
import jax

_MOST_KEPT = 64


class Compiled:
    """A function compiled by JAX, to whose programs the arrays that it closes over are passed as arguments.

    `jax.jit` writes such arrays into the compiled program, as constants: it then holds a copy of a network's weights,
    and takes long to compile. Programs close over the networks that are their priors, so every function of the
    library that runs a program is compiled by this.

    Args:
        fn: a function of (what is static, *arguments); arrays in the arguments are traced, all else is static.

    Example:
        >>> import jax.numpy as jnp
        >>> from bayesrl.core.compiling import Compiled
        >>> weights = jnp.ones((3, 3))
        >>> double = Compiled(lambda factor, x: factor * (weights @ x))
        >>> double(2, jnp.ones(3)).tolist()
        [6.0, 6.0, 6.0]
    """

    def __init__(self, fn: Callable[..., Any]) -> None:
        self.fn = fn
        self._made: OrderedDict[Hashable, Any] = OrderedDict()

    def __call__(self, static: Hashable, *args: Any) -> Any:
        """Call the function; it is traced once for each static value, and shape of arguments."""
        arrays, rest = eqx.partition(args, eqx.is_array)
        leaves, tree = jax.tree.flatten(arrays)
        held, held_tree = jax.tree.flatten(rest)
        key = (static, tree, tuple(jax.typeof(leaf) for leaf in leaves), tuple(held), held_tree)
        if key not in self._made:
            fn = self.fn
            self._made[key] = eqx.filter_closure_convert(lambda *own: fn(static, *own), *args)
            if len(self._made) > _MOST_KEPT:
                self._made.popitem(last=False)
        self._made.move_to_end(key)
        return _run(self._made[key], *args)


def compiled(fn: Callable[..., Any]) -> Callable[..., Any]:
    """Compile a function as `Compiled` does, nothing in it static but what is no array."""
    made = Compiled(lambda _, *args: fn(*args))
    return lambda *args: made(None, *args)


@eqx.filter_jit
def _run(fn: Callable[..., Any], *args: Any) -> Any:
    return fn(*args)

"""How annotations are checked at run time: fast enough that a test is not mostly its checks.

jaxtyping's import hook puts `jaxtyping.jaxtyped` around every function and class. That follows shapes through all
arguments, which most functions do not annotate, and makes its wrapper anew whenever a function inside of another is
defined. Here functions without shapes are checked by beartype alone, and the wrapper of an inner function is made
once for its code.
"""

import functools
import inspect
import typing
from collections.abc import Callable
from typing import Any

import beartype
import jaxtyping

_CONF = beartype.BeartypeConf(is_pep484_tower=True)
_with_shapes = jaxtyping.jaxtyped


def be_quick() -> None:
    """Take the place of `jaxtyping.jaxtyped` in all that is imported from now on."""
    jaxtyping.jaxtyped = _jaxtyped


def _jaxtyped(*, typechecker: Any) -> Callable[[Any], Any]:
    return lambda fn: _checked(fn, typechecker)


def _checked(fn: Any, typechecker: Any) -> Any:
    if inspect.isclass(fn) or _tells_shapes(fn):
        return _with_shapes(fn, typechecker=typechecker)
    if "<locals>" in fn.__qualname__:
        return fn
    checked = beartype.beartype(conf=_CONF)(fn)

    @functools.wraps(fn)
    def quick(*args: Any, **kwargs: Any) -> Any:
        __tracebackhide__ = True
        if jaxtyping.config.jaxtyping_disable:
            return fn(*args, **kwargs)
        return checked(*args, **kwargs)

    return quick


def _tells_shapes(fn: Any) -> bool:
    return any(map(_names_dimensions, getattr(fn, "__annotations__", {}).values()))


def _names_dimensions(hint: Any) -> bool:
    """Whether a hint holds an array whose dimensions have names, which other arguments may share.

    So may one that is written as text: its name may be known to type checkers alone, which jaxtyping puts up with.
    """
    if isinstance(hint, str):
        return True
    if isinstance(hint, type) and issubclass(hint, jaxtyping.AbstractArray):
        return bool(hint.dim_str)
    within = (hint.__value__,) if isinstance(hint, typing.TypeAliasType) else typing.get_args(hint)
    return any(map(_names_dimensions, within))

"""Check arguments against their signature, and raise the library's own error before any work starts.

A signature states its conditions once, in annotations: types, and ranges with names such as `Count`, `Positive` or
`UnitInterval`. `checked` reads them at the first call of the function. Conditions on several arguments together stay in
the body, except for unused options and memory needs, which `checked` takes as rules.
"""

import contextlib
import functools
import inspect
import math
import os
import sys
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from bayesrl.argument_types import Checker, Requirement, annotated_types, checker, error_of_annotation
from bayesrl.errors import BayesRLError
from bayesrl.value_checks import (
    LEAST,
    are_finite,
    are_flags,
    are_numbers,
    are_positive,
    format_value,
    has_no_nan,
    is_traced,
    is_under_jit,
)

MOST = 2**31 - 1
"""The largest count: the largest integer of JAX's default integer type."""


def integer_range(least: int, most: int = MOST) -> Requirement:
    """Return the requirement of a whole number between two bounds."""
    if most != MOST:
        return Requirement(f"a whole number from {least} to {most}", lambda n: least <= n <= most)
    wanted, beyond = f"a whole number of at least {least}", f"a whole number of at most {most}"
    return Requirement(wanted, lambda n: least <= n <= most, explain=lambda n: beyond if n > most else wanted)


def real_range(
    least: float | None = None, most: float | None = None, *, above: float | None = None, below: float | None = None
) -> Requirement:
    """Return the requirement of a number between bounds, closed (`least`, `most`) or open (`above`, `below`)."""
    ends = {"of at least": least, "of at most": most, "above": above, "below": below}
    if least is not None and most is not None:
        ends = {f"from {least:g} to": most}
    text = f"a number {' and '.join(f'{word} {end:g}' for word, end in ends.items() if end is not None)}".strip()

    def hold(x: float) -> bool:
        return (
            (least is None or x >= least)
            and (most is None or x <= most)
            and (above is None or x > above)
            and (below is None or x < below)
            and (above != 0 or x >= LEAST)  # smaller numbers become 0 in single precision
        )

    return Requirement(text, hold)


def _is_path(value: Any) -> bool:
    return str(value) != "" and "\0" not in str(value) and not any("\ud800" <= c <= "\udfff" for c in str(value))


type Location = Annotated[str | Path, Requirement("a path, as a text or a Path", _is_path)]
"""The path of a file or folder."""

type Count = Annotated[int, integer_range(1)]
"""A count: a whole number of at least 1."""

type CountAboveOne = Annotated[int, integer_range(2)]
"""A count of at least 2."""

type CountOrZero = Annotated[int, integer_range(0)]
"""A count of at least 0."""

type Bytes = Annotated[int, integer_range(1, 2**62)]
"""A size of files or memory, of at least one byte."""

type Seed = Annotated[int, integer_range(0, 2**32 - 1)]
"""A seed: a whole number of 32 bits."""

type Positive = Annotated[float, real_range(above=0)]
"""A number above 0."""

type NonNegative = Annotated[float, real_range(0)]
"""A number of at least 0."""

type UnitInterval = Annotated[float, real_range(0, 1)]
"""A share, probability or discount, in [0, 1]."""

type Level = Annotated[float, real_range(above=0, below=1)]
"""A level of confidence, or a relative tolerance, in (0, 1)."""


def _or_none(requirement: Requirement) -> Requirement:
    return Requirement(
        f"{requirement.wanted}, or None", lambda value: value is None or requirement.is_met(value), any_type=True
    )


_NUMBERS = Requirement("a number, or an array of numbers", are_numbers, any_type=True)
_FINITE = Requirement("a finite number, or an array of finite numbers", are_finite, any_type=True)
_FLAGS = Requirement("True and False, or an array of them", are_flags, any_type=True)

type AnyNumbers = Annotated[Any, _NUMBERS]
"""A number, or an array or lists of them, not necessarily finite."""

type AnyNumbersOrNone = Annotated[Any, _or_none(_NUMBERS)]
"""The same, or None."""

type FiniteNumbers = Annotated[Any, _FINITE]
"""A finite number, or an array or lists of them."""

type FiniteNumbersOrNone = Annotated[Any, _or_none(_FINITE)]
"""The same, or None."""

type PositiveNumbers = Annotated[Any, Requirement("a number above 0, or an array of such", are_positive, any_type=True)]
"""A number above 0, or an array or lists of them."""

type AnyWithoutNaN = Annotated[Any, Requirement("what holds no nan", has_no_nan, any_type=True)]
"""Any value or pytree without a NaN."""

type FlagsOrNone = Annotated[Any, _or_none(_FLAGS)]
"""True or False, or an array or lists of them, or None."""


@contextlib.contextmanager
def user_code(what: str, error: type[Exception], remedy: str) -> Iterator[None]:
    """Run a user's code; if it fails, raise the library's error with the original one as its cause.

    Args:
        what: the call, as in "exact(0.5)".
        error: the class of error to raise.
        remedy: what to do.

    Raises:
        Exception: the `error`.
    """
    try:
        yield
    except BayesRLError:
        raise
    except Exception as cause:
        said = (str(cause).splitlines() or [""])[0]
        raise error(f"{what} failed: {type(cause).__name__}: {said:.200}; {remedy}") from cause


def check_memory(num_bytes: float, what: str, remedy: str, error: type[Exception]) -> None:
    """Refuse arrays that would not fit into this process's memory, before making any.

    Args:
        num_bytes: the least memory that they need.
        what: their description, with the numbers that determine their size.
        remedy: what to do instead.
        error: the class of error to raise.

    Raises:
        Exception: the `error`.
    """
    room = _memory()
    if num_bytes > room:
        raise error(f"{what} would take {num_bytes / 1e9:,.3g} GB of memory, and there are {room / 1e9:,.3g}; {remedy}")


def _memory() -> float:
    """Return the memory of this machine in bytes, or this process's limit if that is less."""
    if not hasattr(os, "sysconf"):
        return math.inf
    limits = [float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))]
    import resource

    if (soft := resource.getrlimit(resource.RLIMIT_AS)[0]) != resource.RLIM_INFINITY:
        limits.append(float(soft))
    with contextlib.suppress(OSError, ValueError):
        limits.append(float(Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii")))
    return min(limits)


class UnusedOption(NamedTuple):
    """An option that has no effect with certain other arguments, so that passing it is a mistake.

    Attributes:
        option: its name.
        when: maps all arguments by name, defaults included, to whether the option has no effect.
        because: the reason, as in "only inference='fit' makes steps".
    """

    option: str
    when: Callable[[Mapping[str, Any]], bool]
    because: str


class MemoryNeed(NamedTuple):
    """The least memory that a call needs, so that a call that would not fit fails at once.

    Attributes:
        num_bytes: a function of all arguments by name.
        counts: the arguments that determine the size.
        remedy: what to do instead.
    """

    num_bytes: Callable[[Mapping[str, Any]], float]
    counts: tuple[str, ...]
    remedy: str


class Untraced(NamedTuple):
    """A call that looks at the numbers it is given, and so cannot be part of a `jax.jit`, `jax.vmap` or `jax.grad`.

    Attributes:
        remedy: what to do instead of calling it there.
    """

    remedy: str


type CallRule = UnusedOption | MemoryNeed | Untraced
"""A condition on several arguments of a call."""


def checked[F: Callable[..., Any]](error: type[Exception], *rules: CallRule) -> Callable[[F], F]:
    """Check the arguments of a function, or of a class's constructor and public methods, against their annotations.

    Signature, annotations and docstring stay as they are. Each call costs some microseconds more. Where an annotation
    wants a number, NumPy and JAX scalars become Python numbers. Traced values are checked only by shape and type. A
    class may say in `GIVEN_BY` where its objects come from.

    Args:
        error: the class of error to raise; its message names the function, the value and the remedy.
        *rules: conditions on several arguments: options that would have no effect, sizes that would not fit into
            memory, and traced values; for a class, they apply to its constructor.

    Example:
        >>> from bayesrl.arguments import Count, checked
        >>> @checked(ValueError)
        ... def grow(size: Count) -> int:
        ...     return size + 1
        >>> grow(0)
        Traceback (most recent call last):
        ValueError: grow got size=0; use a whole number of at least 1
    """

    def around(target: F) -> F:
        if not isinstance(target, type):
            return typing.cast(F, _gate(target, error, target.__qualname__, rules))
        kind: Any = target
        for name, member in list(vars(kind).items()):
            if name == "__init__" and isinstance(member, types.FunctionType):
                kind.__init__ = _gate(member, error, kind.__name__, rules)
            elif not name.startswith("_"):
                full = f"{kind.__name__}.{name}"
                if hasattr(member, _GATED):  # checked already, with its own rules
                    continue
                if isinstance(member, types.FunctionType):
                    setattr(kind, name, _gate(member, error, full, ()))
                elif isinstance(member, classmethod | staticmethod):
                    setattr(kind, name, type(member)(_gate(member.__func__, error, full, ())))
        return target

    return around


def _gate(fn: Callable[..., Any], error: type[Exception], name: str, rules: Sequence[CallRule]) -> Callable[..., Any]:
    """Wrap one function by its checks."""
    gates: list[tuple[list[tuple[str, _Check | None]], dict[str, _Check]]] = []

    @functools.wraps(fn)
    def gated(*args: Any, **kwargs: Any) -> Any:
        __tracebackhide__ = True
        if not gates:
            gates.append(_checks(fn))
        positional, by_name = gates[0]
        read = list(args)
        for i, ((param, check), value) in enumerate(zip(positional, args, strict=False)):
            if check is not None:
                read[i] = check.read(value, error, name, param)
        for param, value in kwargs.items():
            if param in by_name:
                kwargs[param] = by_name[param].read(value, error, name, param)
        if rules:
            _keep_rules(fn, rules, read, kwargs, error, name)
        return fn(*read, **kwargs)

    setattr(gated, _GATED, True)
    return gated


_GATED = "__gated__"


def _checks(fn: Callable[..., Any]) -> "tuple[list[tuple[str, _Check | None]], dict[str, _Check]]":
    """Read a signature into checks by position and checks by name."""
    hints = _hints(fn)
    positional, by_name = [], {}
    for param in inspect.signature(fn).parameters.values():
        refuses = None if param.name not in hints else checker(hints[param.name])
        hint = hints.get(param.name)
        check = None if refuses is None else _Check(refuses, annotated_types(hint), error_of_annotation(hint))
        if param.kind in (param.POSITIONAL_ONLY, param.POSITIONAL_OR_KEYWORD):
            positional.append((param.name, check))
        if check is not None and param.kind in (param.KEYWORD_ONLY, param.POSITIONAL_OR_KEYWORD):
            by_name[param.name] = check
    return positional, by_name


def _hints(fn: Callable[..., Any]) -> dict[str, Any]:
    """Return the annotations of a function, without those that only a type checker can resolve."""
    space = getattr(inspect.unwrap(fn), "__globals__", {})
    found = {}
    for name, hint in inspect.get_annotations(fn).items():
        if name == "return":
            continue
        try:
            found[name] = typing.get_type_hints(
                types.SimpleNamespace(__annotations__={name: hint}), globalns=space, include_extras=True
            )[name]
        except NameError:
            continue
    return found


class _Check(NamedTuple):
    """The check of one parameter."""

    refuses: Checker
    kinds: set[Any]
    error: type[Exception] | None

    def read(self, value: Any, error: type[Exception], name: str, param: str) -> Any:
        """Return a valid value, with scalars as Python numbers; raise for others."""
        wanted = self.refuses(value)
        if wanted is not None:
            raise (self.error or error)(f"{name} got {param}={format_value(value)}; use {wanted}")
        if self.kinds <= {int, float, bool} and hasattr(value, "dtype") and not is_traced(value):
            return value.item()
        if type(value) is int and abs(value) > MOST and float in self.kinds and int not in self.kinds:
            return float(value)  # compiled programs refuse integers this large
        return value


_signature = functools.lru_cache(256)(inspect.signature)


def _keep_rules(
    fn: Callable[..., Any],
    rules: Sequence[CallRule],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    error: type[Exception],
    name: str,
) -> None:
    signature = _signature(fn)
    try:
        bound = signature.bind(*args, **kwargs)
    except TypeError:  # the call itself will raise this error
        return
    bound.apply_defaults()
    given = bound.arguments
    for rule in rules:
        if isinstance(rule, MemoryNeed):
            what = ", ".join(f"{count}={format_value(given[count])}" for count in rule.counts)
            check_memory(rule.num_bytes(given), f"{name}({what})", rule.remedy, error)
            continue
        if isinstance(rule, Untraced):
            _refuse_traced(given, rule, error, name)
            continue
        value, default = given[rule.option], signature.parameters[rule.option].default
        empty = isinstance(value, dict | list | tuple) and not value
        as_default = empty or value is default or (type(value) is type(default) and value == default)
        if not as_default and rule.when(given):
            raise error(
                f"{name} got {rule.option}={format_value(value)}, "
                f"which nothing would read: {rule.because}; leave it out"
            )


def _refuse_traced(given: Mapping[str, Any], rule: Untraced, error: type[Exception], name: str) -> None:
    jax = sys.modules.get("jax")
    if is_under_jit() or (jax is not None and any(map(is_traced, _leaves_of(given)))):
        raise error(
            f"{name} cannot run inside of jax.jit, vmap or grad, where numbers are not known yet; {rule.remedy}"
        )


def _leaves_of(given: Mapping[Any, Any]) -> Iterator[Any]:
    """Give the leaves of arguments; dictionaries may have names of several types, which JAX cannot sort."""
    jax = sys.modules["jax"]
    for value in given.values():
        yield from _leaves_of(value) if isinstance(value, Mapping) else jax.tree.leaves(value)

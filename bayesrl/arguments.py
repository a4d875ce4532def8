"""One gate for arguments: what a signature does not allow ends in an error of ours before any work is done.

A signature says it once, by its annotations: types, and ranges by names such as `Count`, `Positive` or `UnitInterval`.
`checked` reads them when the function is first called. What only several arguments tell together stays in its body,
except for options that nothing would read, which `checked` takes as rules.
"""

import contextlib
import functools
import inspect
import math
import os
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
)

MOST = 2**31 - 1
"""The largest count: the largest integer of JAX's default type."""


def integer_range(least: int, most: int = MOST) -> Requirement:
    """Give the condition of whole numbers between two ends."""
    if most != MOST:
        return Requirement(f"a whole number from {least} to {most}", lambda n: least <= n <= most)
    wanted, beyond = f"a whole number of at least {least}", f"a whole number of at most {most}"
    return Requirement(wanted, lambda n: least <= n <= most, explain=lambda n: beyond if n > most else wanted)


def real_range(
    least: float | None = None, most: float | None = None, *, above: float | None = None, below: float | None = None
) -> Requirement:
    """Give the condition of numbers between two ends, which are closed (`least`, `most`) or open (`above`, `below`)."""
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
            and (above != 0 or x >= LEAST)  # smaller ones are 0 in single precision
        )

    return Requirement(text, hold)


def _is_path(value: Any) -> bool:
    return str(value) != "" and "\0" not in str(value) and not any("\ud800" <= c <= "\udfff" for c in str(value))


type Location = Annotated[str | Path, Requirement("a path, as a text or a Path", _is_path)]
"""Where a file or folder is."""

type Count = Annotated[int, integer_range(1)]
"""How many: a whole number of at least 1."""

type CountAboveOne = Annotated[int, integer_range(2)]
"""How many, where one is not enough: a whole number of at least 2."""

type CountOrZero = Annotated[int, integer_range(0)]
"""How many, perhaps none: a whole number of at least 0."""

type Bytes = Annotated[int, integer_range(1, 2**62)]
"""A size of files or memory, of at least one byte."""

type Seed = Annotated[int, integer_range(0, 2**32 - 1)]
"""A seed: a whole number that 32 bits hold."""

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
"""A number, or an array or lists of them, of which some may not be finite."""

type AnyNumbersOrNone = Annotated[Any, _or_none(_NUMBERS)]
"""The same, or None."""

type FiniteNumbers = Annotated[Any, _FINITE]
"""A finite number, or an array or lists of them."""

type FiniteNumbersOrNone = Annotated[Any, _or_none(_FINITE)]
"""The same, or None."""

type PositiveNumbers = Annotated[Any, Requirement("a number above 0, or an array of such", are_positive, any_type=True)]
"""A number above 0, or an array or lists of them."""

type AnyWithoutNaN = Annotated[Any, Requirement("what holds no nan", has_no_nan, any_type=True)]
"""Any value, or tree of values, of which no number is NaN."""

type FlagsOrNone = Annotated[Any, _or_none(_FLAGS)]
"""True or False, or an array or lists of them, or None."""


@contextlib.contextmanager
def user_code(what: str, error: type[Exception], remedy: str) -> Iterator[None]:
    """Call code that a user wrote; where it fails, raise an error of ours with its own as the cause.

    Args:
        what: is called, as in "exact(0.5)".
        error: raised.
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
    """Refuse what would not fit into the memory of this process, before anything is made.

    Args:
        num_bytes: how many it would take at least.
        what: is made, with the numbers that say how large it is.
        remedy: what to do in its stead.
        error: raised.

    Raises:
        Exception: the `error`.
    """
    room = _memory()
    if num_bytes > room:
        raise error(f"{what} would take {num_bytes / 1e9:,.3g} GB of memory, and there are {room / 1e9:,.3g}; {remedy}")


def _memory() -> float:
    """Give the bytes that this machine has, or that this process may have where that is less."""
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
    """An option that has no effect beside others, so that giving it is a mistake.

    Attributes:
        option: its name.
        when: whether it has none, a function of all arguments by name, defaults among them.
        because: who would read it, as in "only inference='fit' makes steps".
    """

    option: str
    when: Callable[[Mapping[str, Any]], bool]
    because: str


class MemoryNeed(NamedTuple):
    """What a call takes of memory at least, so that one that would not fit ends before anything is made.

    Attributes:
        num_bytes: a function of all arguments by name.
        counts: the arguments that say how much it is.
        remedy: what to do in its stead.
    """

    num_bytes: Callable[[Mapping[str, Any]], float]
    counts: tuple[str, ...]
    remedy: str


def checked[F: Callable[..., Any]](error: type[Exception], *rules: UnusedOption | MemoryNeed) -> Callable[[F], F]:
    """Refuse what a signature does not allow, of a function, or of a class's constructor and public methods.

    Signature, annotations and docstring stay as they are. A call costs some microseconds more. Numbers without axes
    of NumPy's and JAX's arrays become Python's where a number is wanted; values that are traced are looked at by
    shape and type alone. A class may say in `GIVEN_BY` where its objects come from.

    Args:
        error: raised for what is refused; it says who got what, and what to use.
        *rules: what only several arguments tell: options that are refused where nothing reads them, sizes that are
            refused where they would not fit into memory; of a class, of its constructor.

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
                if hasattr(member, _GATED):  # which has rules of its own
                    continue
                if isinstance(member, types.FunctionType):
                    setattr(kind, name, _gate(member, error, full, ()))
                elif isinstance(member, classmethod | staticmethod):
                    setattr(kind, name, type(member)(_gate(member.__func__, error, full, ())))
        return target

    return around


def _gate(
    fn: Callable[..., Any], error: type[Exception], name: str, rules: Sequence[UnusedOption | MemoryNeed]
) -> Callable[..., Any]:
    """Put the gate before one function."""
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
    """Read a signature: checks by place, and by name."""
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
    """Give the annotations of a function; a name that only type checkers know leaves its own parameter unchecked."""
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
    """What one parameter may hold."""

    refuses: Checker
    kinds: set[Any]
    error: type[Exception] | None

    def read(self, value: Any, error: type[Exception], name: str, param: str) -> Any:
        """Give the value, a number without axes as Python's; or raise."""
        wanted = self.refuses(value)
        if wanted is not None:
            raise (self.error or error)(f"{name} got {param}={format_value(value)}; use {wanted}")
        if self.kinds <= {int, float, bool} and hasattr(value, "dtype") and not is_traced(value):
            return value.item()
        if type(value) is int and abs(value) > MOST and float in self.kinds and int not in self.kinds:
            return float(value)  # compiled programs do not take larger integers
        return value


_signature = functools.lru_cache(256)(inspect.signature)


def _keep_rules(
    fn: Callable[..., Any],
    rules: Sequence[UnusedOption | MemoryNeed],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    error: type[Exception],
    name: str,
) -> None:
    signature = _signature(fn)
    try:
        bound = signature.bind(*args, **kwargs)
    except TypeError:  # the call itself says it
        return
    bound.apply_defaults()
    given = bound.arguments
    for rule in rules:
        if isinstance(rule, MemoryNeed):
            what = ", ".join(f"{count}={format_value(given[count])}" for count in rule.counts)
            check_memory(rule.num_bytes(given), f"{name}({what})", rule.remedy, error)
            continue
        value, default = given[rule.option], signature.parameters[rule.option].default
        empty = isinstance(value, dict | list | tuple) and not value
        as_default = empty or value is default or (type(value) is type(default) and value == default)
        if not as_default and rule.when(given):
            raise error(
                f"{name} got {rule.option}={format_value(value)}, "
                f"which nothing would read: {rule.because}; leave it out"
            )

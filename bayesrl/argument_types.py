"""Turn each annotation, once, into a function that checks values and says in words what it wants instead."""

import importlib
import itertools
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np

from bayesrl.value_checks import (
    dtype_kind,
    format_value,
    is_array,
    is_function,
    is_integer,
    is_real,
    is_traced,
    is_valid_text,
)

_PARTS = 100_000
"""How many elements of a collection are checked."""


CHECKED_IN_BODY = object()
"""Marks parameters that the function's own body checks with a better message: `Annotated[Program, CHECKED_IN_BODY]`."""


@dataclass(frozen=True)
class Requirement:
    """A further condition of an annotation: `Annotated[float, Requirement("a number above 0", lambda x: x > 0)]`.

    Attributes:
        wanted: description of valid values, which the error puts after "use".
        is_met: whether a value of the annotated type is valid.
        any_type: whether `is_met` takes values of any type, so that the annotated type itself is not checked.
        error: the class of error to raise instead of the caller's own.
        explain: maps a value of the annotated type to a description that replaces `wanted`.
    """

    wanted: str
    is_met: Callable[[Any], bool]
    any_type: bool = False
    error: type[Exception] | None = None
    explain: Callable[[Any], str] | None = None


@dataclass(frozen=True)
class LazyAnnotation:
    """An annotation from another module, which is imported when the first value is checked.

    Attributes:
        module: the full name of the module.
        name: of the class, or of the alias.
    """

    module: str
    name: str

    def __call__(self) -> Any:
        """Import the annotation."""
        return getattr(importlib.import_module(self.module), self.name)


type Checker = Callable[[Any], str | None]
"""Returns None for a valid value, or else a description of valid values."""


def checker(hint: Any) -> Checker | None:
    """Return the check of an annotation, or None if it allows anything."""
    if isinstance(hint, typing.TypeAliasType):
        return checker(hint.__value__)
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated and CHECKED_IN_BODY in parts:
        return None
    if origin is Annotated and isinstance(parts[1], LazyAnnotation):
        return _when_asked(parts[1])
    if origin is Annotated:
        return _conditioned(parts[0], [part for part in parts[1:] if isinstance(part, Requirement)])
    if origin in (typing.Union, types.UnionType):
        return _any_of([checker(part) for part in parts])
    if origin is typing.Literal:
        return _one_of(parts)
    if hint is None or hint is type(None):
        return _of(lambda value: value is None, "None")
    if hint in _SIMPLE:
        return _SIMPLE[hint]
    if origin is not None:
        return _of_parts(origin, parts)
    # `isinstance` fails for most protocols.
    if not isinstance(hint, type) or hint is object or getattr(hint, "_is_protocol", False):
        return None
    return _of_class(hint)


def _of(fits: Callable[[Any], bool], wanted: str) -> Checker:
    return lambda value: None if fits(value) else wanted


def _conditioned(base: Any, conditions: Sequence[Requirement]) -> Checker | None:
    within = None if any(condition.any_type for condition in conditions) else checker(base)
    if not conditions:
        return within
    parted = typing.get_origin(base) is not None

    def refuses(value: Any) -> str | None:
        wrong = None if within is None else within(value)
        if wrong is not None:  # for a collection, the message about its wrong element says more
            return wrong if parted and isinstance(value, list | tuple | dict) else conditions[-1].wanted
        for condition in conditions:
            if (condition.any_type or not is_traced(value)) and not condition.is_met(value):
                return condition.wanted if condition.explain is None else condition.explain(value)
        return None

    return refuses


def _when_asked(elsewhere: LazyAnnotation) -> Checker:
    found: list[Checker | None] = []

    def refuses(value: Any) -> str | None:
        if not found:
            found.append(checker(elsewhere()))
        return None if found[0] is None else found[0](value)

    return refuses


def error_of_annotation(hint: Any) -> type[Exception] | None:
    """Return the error class that an annotation or a part of it declares, or None."""
    if isinstance(hint, typing.TypeAliasType):
        return error_of_annotation(hint.__value__)
    if isinstance(hint, Requirement):
        return hint.error
    parts = (*typing.get_args(hint), *getattr(hint, "__metadata__", ()))
    return next((error for error in map(error_of_annotation, parts) if error is not None), None)


def _any_of(checks: Sequence[Checker | None]) -> Checker | None:
    told_apart = [check for check in checks if check is not None]
    if len(told_apart) < len(checks):
        return None

    def refuses(value: Any) -> str | None:
        wanted = []
        for check in told_apart:
            text = check(value)
            if text is None:
                return None
            wanted.append(text)
        some = " or ".join(text for text in dict.fromkeys(wanted) if text != "None")
        return f"{some}, or None" if "None" in wanted else some

    return refuses


def _one_of(choices: Sequence[Any]) -> Checker:
    listed = [repr(choice) for choice in choices]
    wanted = " or ".join([", ".join(listed[:-1]), listed[-1]] if len(listed) > 1 else listed)
    # In Python 1 equals True, so the types must agree too.
    return _of(lambda value: any(isinstance(value, type(c)) and bool(value == c) for c in choices), wanted)


def _of_parts(origin: Any, parts: tuple[Any, ...]) -> Checker | None:
    """Return the check of a collection and its elements."""
    if origin is Callable or not isinstance(origin, type):
        return _SIMPLE[Callable] if origin is Callable else None
    if origin is type:
        return _of(lambda value: isinstance(value, type), "a class")
    if issubclass(origin, Mapping) and len(parts) == 2:
        return _mapping(origin, *parts)
    if issubclass(origin, tuple) and parts[-1:] != (Ellipsis,):
        return _record(parts)
    if issubclass(origin, Iterable) and not issubclass(origin, Mapping) and parts:
        return _series(origin, parts[0])
    return _of_class(origin)


def _wrong(check: Checker | None, parts: Iterable[Any]) -> str | None:
    """Describe what the first wrong part of a collection should be, and what it is."""
    for part in itertools.islice(parts if check is not None else (), _PARTS):
        text = None if check is None else check(part)
        if text is not None:
            return f"{text}, and not {format_value(part)}"
    return None


def _mapping(origin: type, key: Any, value: Any) -> Checker:
    keys, values = checker(key), checker(value)
    wanted = f"a dictionary{_held(values).replace('each', 'each value')}"

    def refuses(mapping: Any) -> str | None:
        if not isinstance(mapping, origin) or not isinstance(mapping, Mapping):
            return wanted
        for what, check, parts in (("names", keys, mapping), ("values", values, mapping.values())):
            if (wrong := _wrong(check, parts)) is not None:
                return f"a dictionary of which all {what} are {wrong}"
        return None

    return refuses


def _held(check: Checker | None) -> str:
    text = None if check is None else check(_NOTHING)
    return "" if text is None else f" of which each is {text}"


# No check accepts this, so each says what it wants.
_NOTHING = type("Nothing", (), {})()


def _record(parts: tuple[Any, ...]) -> Checker:
    checks = [checker(part) for part in parts]

    def refuses(value: Any) -> str | None:
        if not isinstance(value, tuple) or len(value) != len(checks):
            return f"a tuple of {len(checks)}"
        for check, part in zip(checks, value, strict=True):
            if (wrong := _wrong(check, [part])) is not None:
                return f"a tuple that holds {wrong}"
        return None

    return refuses


def _series(origin: type, part: Any) -> Checker:
    check = checker(part) if part is not str else _of(lambda text: isinstance(text, str), "a text")
    name = "a tuple" if issubclass(origin, tuple) else "a list"
    wanted = f"{name} of texts" if part is str else f"{name}{_held(check)}"

    def refuses(value: Any) -> str | None:
        if (
            not isinstance(value, origin)
            or isinstance(value, str | bytes | Mapping)
            or getattr(value, "shape", None) == ()
        ):
            return wanted
        if check is None or not isinstance(value, Sequence | set | frozenset):  # checking would exhaust an iterator
            return None
        wrong = _wrong(check, value)
        return None if wrong is None else f"{name} of which each is {wrong}"

    return refuses


def _of_class(kind: type) -> Checker:
    # Functions that take NumPy arrays can read JAX arrays too.
    return _of(lambda value: isinstance(value, kind) or (kind is np.ndarray and is_array(value)), _named(kind))


def _named(kind: type) -> str:
    if kind.__module__ == "numpy" or kind.__name__ in ("Array", "ArrayImpl"):
        return "an array"
    shape = getattr(kind, "dim_str", None)
    if shape is not None:
        words = kind.__name__.partition("[")[0].lower()
        return f"an array of type {words} and shape [{', '.join(shape.split())}]"
    source = getattr(kind, "GIVEN_BY", None)
    return f"{'an' if kind.__name__[0] in 'AEIOU' else 'a'} {kind.__name__}{f', {source}' if source else ''}"


def annotated_types(hint: Any) -> set[Any]:
    """Return the types in an annotation, without None."""
    if isinstance(hint, typing.TypeAliasType):
        return annotated_types(hint.__value__)
    parts = typing.get_args(hint)
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return set().union(*map(annotated_types, parts))
    if typing.get_origin(hint) is Annotated:
        return annotated_types(parts[0])
    return set() if hint in (None, type(None)) else {hint if parts == () else typing.get_origin(hint)}


_SIMPLE: dict[Any, Checker | None] = {
    Any: None,
    int: _of(is_integer, "a whole number"),
    float: _of(is_real, "a finite number"),
    bool: _of(lambda value: dtype_kind(value) == "b", "True or False"),
    str: lambda value: (
        None if is_valid_text(value) else f"a text{' without halves of characters' * isinstance(value, str)}"
    ),
    Callable: _of(is_function, "a function"),
    typing.Callable: _of(is_function, "a function"),
}

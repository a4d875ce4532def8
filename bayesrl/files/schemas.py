"""Read JSON files with a bound on size and depth, and check them against a schema."""

import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

MOST_BYTES = 2**26
DEEPEST = 60
"""Deepest nesting of objects and lists."""

# Strings match too, so that brackets inside them do not count; even one without an end.
_BRACKETS = re.compile(rb'"(?:[^"\\]|\\.)*"?|[\[{]|[\]}]', re.DOTALL)


@dataclass(frozen=True)
class ValueKind:
    """A kind of value.

    Attributes:
        told: its description in words.
        holds: whether a value is of this kind.
    """

    told: str
    holds: Callable[[Any], bool]


def _is_number(value: Any) -> bool:
    return isinstance(value, float) or (isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63)


def integer_between(least: int, most: int) -> ValueKind:
    """Make the kind of integers within these bounds."""
    return ValueKind(
        f"an integer from {least} to {most}",
        lambda value: isinstance(value, int) and not isinstance(value, bool) and least <= value <= most,
    )


ANY = ValueKind("any value", lambda _: True)
TEXT = ValueKind("text", lambda value: isinstance(value, str))
NUMBER = ValueKind("a number", _is_number)
POSITIVE = ValueKind("a positive number", lambda value: _is_number(value) and 0 < value < math.inf)
FLAG = ValueKind("true or false", lambda value: isinstance(value, bool))
NOTHING = ValueKind("null", lambda value: value is None)

type Schema = Any
"""A kind; a tuple of alternatives; a list with the schema of every element; or an object by names. A name that ends in
"?" may be missing, and "*" is the schema of all other names, which may have any value without it."""


def parsed(content: bytes) -> Any:
    """Read JSON.

    Raises:
        ValueError: it is not JSON, or is too large or too deep; the message says which.
    """
    if len(content) > MOST_BYTES:
        raise ValueError(f"it has {len(content):,} bytes, over {MOST_BYTES:,}")
    depth = 0
    # Count brackets before parsing: Python's parser recurses, and would exhaust the stack.
    for found in _BRACKETS.finditer(content):
        first = found[0][:1]
        depth += (first in b"[{") - (first in b"]}")
        if depth > DEEPEST:
            raise ValueError(f"objects and lists are nested over {DEEPEST} deep")
    return json.loads(content.decode("utf-8"))


def misfit(value: Any, schema: Schema, place: str = "it") -> str | None:
    """Say where a value does not fit its schema, or return None if it fits.

    Example:
        >>> from bayesrl.files.schemas import TEXT, misfit, integer_between
        >>> misfit({"steps": "many"}, {"steps": integer_between(1, 10), "name?": TEXT})
        "steps is 'many', not an integer from 1 to 10"
    """
    match schema:
        case ValueKind():
            return None if schema.holds(value) else f"{place} is {value!r:.40}, not {schema.told}"
        case tuple():
            misfits = [misfit(value, one, place) for one in schema]
            return None if None in misfits else misfits[-1]
        case list():
            if not isinstance(value, list):
                return f"{place} is {value!r:.40}, not a list"
            return next((told for i, v in enumerate(value) if (told := misfit(v, schema[0], f"{place}[{i}]"))), None)
        case dict():
            return _misfit_of_object(value, schema, place)
    raise TypeError(schema)


def _misfit_of_object(value: Any, schema: dict[str, Schema], place: str) -> str | None:
    if not isinstance(value, dict):
        return f"{place} is {value!r:.40}, not an object"
    lead = "" if place == "it" else f"{place}."
    for name, own in schema.items():
        key = name.removesuffix("?")
        if name != "*" and key in value:
            if told := misfit(value[key], own, f"{lead}{key}"):
                return told
        elif name not in ("*", key + "?"):
            return f"{place} has no {key!r}"
    others = schema.get("*")
    if others is not None:
        named = {name.removesuffix("?") for name in schema}
        for key, v in value.items():
            if key not in named and (told := misfit(v, others, f"{lead}{key!r:.40}")):
                return told
    return None

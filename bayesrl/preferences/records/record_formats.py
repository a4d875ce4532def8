"""The records of preferences that trainers and the hub know, each read into items, ranks or labels."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from bayesrl.lm.tokenization.chat_templates import SETTINGS, is_conversation
from bayesrl.preferences.records.reading_rows import Row
from bayesrl.value_checks import format_value, is_count, is_integer, is_real, is_valid_text

type Item = dict[str, Any]
"""What was judged: `completion`, and `prompt` if there is one: texts, conversations or token ids."""

_COMMON = ("prompt", "annotator", *SETTINGS)
_SEPARATOR = "\n"
"""What stands between steps, as TRL has it."""
_MOST_SHOWN = 60
_WHOLE = "whole"
"""Where an item keeps prompt and answer in one while it is read, if its prompt is implicit."""


class Refusal(Exception):  # noqa: N818  (not for users: `read` turns it into a PreferenceError)
    """Says why a record cannot be used."""


class Judgement(NamedTuple):
    """One judgement of one annotator.

    Attributes:
        items: what was judged.
        keys: of the items; equal ones are the same item.
        ranks: place of each item, 0 for the best, equal for ties; None for a label.
        label: 1 or 0 for a single item, or its rating; None for ranks.
        annotator: who judged, or None.
    """

    items: list[Item]
    keys: list[str]
    ranks: list[int] | None
    label: float | None
    annotator: Any


class Format(NamedTuple):
    """A form of records.

    Attributes:
        kind: of the data that come of it.
        required: the columns that tell it.
        optional: further columns that it reads.
        parse: turns a record into judgements.
    """

    kind: str
    required: tuple[str, ...]
    optional: tuple[str, ...]
    parse: Callable[[Row], list[Judgement]]

    @property
    def read(self) -> tuple[str, ...]:
        """All columns that it reads."""
        return (*self.required, *self.optional, *_COMMON)


def find_format(columns: Sequence[str]) -> Format | None:
    """Find the form of records with these columns; one of two sides is enough to tell pairs."""
    if {"chosen", "rejected"} & set(columns):
        return FORMATS["pairs"]
    return next((form for form in FORMATS.values() if set(form.required) <= set(columns)), None)


# ---- forms -----------------------------------------------------------------------------------


def _parse_pair(row: Row) -> list[Judgement]:
    chosen, rejected = _sides(row, "chosen", "rejected")
    tie = _flag(row.get("tie"), "tie", missing=False)
    return [_judged([chosen, rejected], row, ranks=[0, 0 if tie else 1])]


def _parse_shown_pair(row: Row) -> list[Judgement]:
    outcome = _outcome(row.get("outcome"))
    ranks = {1.0: [0, 1], 0.0: [1, 0], 0.5: [0, 0]}[outcome]
    return [_judged(_sides(row, "first", "second"), row, ranks=ranks)]


def _parse_ranking(row: Row) -> list[Judgement]:
    completions = _list(row.get("completions"), "completions")
    if len(completions) < 2:
        raise Refusal(f"completions has {len(completions)} of them, and a ranking needs two")
    if row.get("ranks") is not None:
        given = _numbers(row["ranks"], "ranks", len(completions))
    elif row.get("scores") is not None:
        given = [-score for score in _numbers(row["scores"], "scores", len(completions))]
    else:
        given = [float(place) for place in range(len(completions))]
    ranks = [sorted(set(given)).index(rank) for rank in given]
    items = [_item(row, _text(one, f"completion {at}")) for at, one in enumerate(completions)]
    return [_judged(items, row, ranks=ranks)]


def _parse_label(row: Row) -> list[Judgement]:
    item = _item(row, _text(row.get("completion"), "completion"))
    return [_judged([item], row, label=int(_flag(row.get("label"), "label")))]


def _parse_rating(row: Row) -> list[Judgement]:
    item = _item(row, _text(row.get("completion"), "completion"))
    if _is_missing(row.get("score")):
        raise Refusal("score is missing")
    given = _parsed(row["score"]) if isinstance(row["score"], str) else row["score"]
    if not is_real(given):
        raise Refusal(f"score is {_shown(row['score'])}; give a finite number")
    return [_judged([item], row, label=float(given))]


def _parse_steps(row: Row) -> list[Judgement]:
    steps = [_text(one, f"step {at}") for at, one in enumerate(_list(row.get("completions"), "completions"))]
    labels = [_flag(one, f"label {at}") for at, one in enumerate(_list(row.get("labels"), "labels"))]
    if not steps or len(steps) != len(labels):
        raise Refusal(f"completions has {len(steps)} steps and labels {len(labels)}; every step has one")
    prompt = row.get("prompt")
    if not all(isinstance(step, str) for step in steps) or not isinstance(prompt if prompt is not None else "", str):
        raise Refusal("prompt and steps must be texts")
    judgements = []
    for at, (step, label) in enumerate(zip(steps, labels, strict=True)):
        before = (prompt or "") + "".join(f"{done}{_SEPARATOR}" for done in steps[:at])
        judgements.append(_judged([_item({**row, "prompt": before}, step)], row, label=int(label)))
    return judgements


FORMATS = {
    "pairs": Format("pairs", ("chosen", "rejected"), ("tie",), _parse_pair),
    "shown pairs": Format("pairs", ("first", "second", "outcome"), (), _parse_shown_pair),
    "steps": Format("labels", ("completions", "labels"), (), _parse_steps),
    "rankings": Format("rankings", ("completions",), ("ranks", "scores"), _parse_ranking),
    "labels": Format("labels", ("completion", "label"), (), _parse_label),
    "ratings": Format("ratings", ("completion", "score"), (), _parse_rating),
}
"""The forms, by name; where a record has the columns of several, the first counts."""

COLUMNS = tuple(dict.fromkeys(name for form in FORMATS.values() for name in form.read))
"""All columns that some form reads."""


# ---- items -----------------------------------------------------------------------------------


def _judged(items: list[Item], row: Row, *, ranks: list[int] | None = None, label: float | None = None) -> Judgement:
    keys = [_key(item) for item in items]
    for at, (key, item) in enumerate(zip(keys, items, strict=True)):
        if key in keys[:at]:
            names = "chosen and rejected" if "chosen" in row else "first and second"
            names = names if "completions" not in row else f"completions {keys.index(key)} and {at}"
            raise Refusal(f"{names} are equal: {_shown(item.get(_WHOLE, item['completion']))}")
        item.pop(_WHOLE, None)
    annotator = row.get("annotator")
    return Judgement(items, keys, ranks, label, None if _is_missing(annotator) or annotator == "" else annotator)


def _key(item: Item) -> str:
    """Return what tells an item from others: a conversation or an implicit prompt counts as a whole."""
    prompt, completion = item.get("prompt", ""), item["completion"]
    whole = [*prompt, *completion] if is_conversation(prompt) else [prompt, completion]
    return json.dumps(item.get(_WHOLE, whole), sort_keys=True, default=str)


def _item(row: Row, completion: Any) -> Item:
    settings = {name: row[name] for name in SETTINGS if not _is_missing(row.get(name))}
    given = row.get("prompt")
    if _is_missing(given) or (isinstance(given, str) and not given):
        return {"completion": completion, **settings}
    prompt = _text(given, "prompt", empty=True)
    if is_conversation(prompt) and is_conversation(completion) and completion[: len(prompt)] == prompt:
        completion = completion[len(prompt) :]  # the answer repeats the conversation before it
        if not completion:
            raise Refusal("a completion ends with the prompt")
    return {"prompt": prompt, "completion": completion, **settings}


def _sides(row: Row, one: str, other: str) -> list[Item]:
    """Return both items of a pair, with an implicit prompt taken out."""
    sides = [_text(row.get(name), name) for name in (one, other)]
    kinds = {"conversation" if is_conversation(side) else type(side).__name__ for side in sides}
    if len(kinds) > 1:
        raise Refusal(f"{one} and {other} are of two kinds; give both as texts, or both as conversations")
    prompt = None if _is_missing(row.get("prompt")) else _text(row["prompt"], "prompt", empty=True)
    chats = kinds == {"conversation"}
    if chats and isinstance(prompt, str):  # the same prompt as a text, as UltraFeedback has it
        opening = [side[0].get("content") for side in sides]
        if prompt and opening != [prompt, prompt]:
            raise Refusal("the prompt is a text, and the answers are conversations that do not begin with it")
        prompt = None
    if prompt:
        return [_item({**row, "prompt": prompt}, side) for side in sides]
    length = _common_length(*sides)
    items = [_item({**row, "prompt": side[:length] or None}, side[length:]) for side in sides]
    for name, item, side in zip((one, other), items, sides, strict=True):
        if not item["completion"] and sides[0] != sides[1]:
            raise Refusal(f"{name} is only the beginning of the other side, so that its answer is empty")
        item[_WHOLE] = side
    return items


def _common_length(one: Any, other: Any) -> int:
    """Return the length of the implicit prompt: of a common beginning that ends where a word, or a message, does."""
    shorter = min(len(one), len(other))
    length = next((at for at, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), shorter)
    if not isinstance(one, str):
        return length
    # The blank before a word belongs to the word, as it does for tokenizers.
    while length > 0 and not (length < shorter and one[length].isspace() and other[length].isspace()):
        length -= 1
    while length > 0 and one[length - 1].isspace():
        length -= 1
    return length


def _text(value: Any, what: str, *, empty: bool = False) -> Any:
    """Read a text, a conversation as a list of messages, or token ids as a list."""
    if isinstance(value, np.ndarray):
        value = value.tolist()
    if _is_missing(value):
        raise Refusal(f"{what} is missing")
    if isinstance(value, str):
        if not is_valid_text(value):
            raise Refusal(f"{what} holds half of a character")
        if value.lstrip().startswith("[{") and is_conversation(parsed := _parsed(value)):  # a cell of a CSV file
            return _text(parsed, what)
        if not value.strip() and not empty:
            raise Refusal(f"{what} is empty")
        return value
    if is_conversation(value):
        if not any(message.get("content") or message.get("tool_calls") for message in value):
            raise Refusal(f"{what} is empty: its messages have no content")
        return [dict(message) for message in value]
    if isinstance(value, Sequence) and all(is_count(one, least=0) for one in value):
        if not value:
            raise Refusal(f"{what} is empty")
        return [int(one) for one in value]
    raise Refusal(f"{what} is {_shown(value)}; give a text, a list of messages, or token ids")


def _shown(value: Any) -> str:
    return repr(value)[:_MOST_SHOWN] if isinstance(value, str | list) else format_value(value)


# ---- values ----------------------------------------------------------------------------------


def _is_missing(value: Any) -> bool:
    """Whether a cell is None, or the nan that data frames put into empty cells."""
    return value is None or (isinstance(value, float | np.floating) and math.isnan(value))


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return None


def _list(value: Any, what: str) -> list[Any]:
    read = value.tolist() if isinstance(value, np.ndarray) else _parsed(value) if isinstance(value, str) else value
    if not isinstance(read, list | tuple):
        raise Refusal(f"{what} is {_shown(value)}; give a list")
    return list(read)


def _numbers(value: Any, what: str, count: int) -> list[float]:
    numbers = _list(value, what)
    if len(numbers) != count or not all(is_real(one) for one in numbers):
        raise Refusal(f"{what} is {_shown(numbers)}; give one finite number for each of {count} completions")
    return [float(one) for one in numbers]


def _flag(value: Any, what: str, *, missing: bool | None = None) -> bool:
    """Read 0 or 1, True or False, or one of these as a text, as CSV files have them."""
    if _is_missing(value) or value == "":
        if missing is None:
            raise Refusal(f"{what} is missing")
        return missing
    text = str(value).strip().lower()
    if isinstance(value, str | bool | np.bool_) or is_integer(value) or is_real(value):
        if text in ("1", "1.0", "true"):
            return True
        if text in ("0", "0.0", "false"):
            return False
    raise Refusal(f"{what} is {_shown(value)}; labels are 0 or 1")


def _outcome(value: Any) -> float:
    if isinstance(value, str) and value.strip().lower() in ("first", "second", "tie"):
        return {"first": 1.0, "second": 0.0, "tie": 0.5}[value.strip().lower()]
    if is_real(value) and float(value) == 0.5:
        return 0.5
    if isinstance(value, str) and value.strip() in ("0.5", ".5"):
        return 0.5
    try:
        return float(_flag(value, "outcome"))
    except Refusal as error:
        raise Refusal(f"{error}, 0.5 or 'tie' for a tie") from None


def told_forms() -> str:
    """Name the forms of records, for messages."""
    return "; ".join(f"{' and '.join(map(repr, form.required))} ({name})" for name, form in FORMATS.items())


def renamed(row: Mapping[str, Any], columns: Mapping[str, str]) -> Row:
    """Give the columns of a record the names that forms read; a column whose name another one takes is left out."""
    ours = {theirs: name for name, theirs in columns.items()}
    return {ours.get(name, name): cell for name, cell in row.items() if name in ours or name not in columns}

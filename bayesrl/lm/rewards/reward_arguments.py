"""How a reward function of the user's is called: with texts, with records, or with columns by name."""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from bayesrl.errors import LanguageModelError
from bayesrl.lm.prompts import NOT_COLUMNS
from bayesrl.lm.tokenization.chat_templates import MESSAGES

COMPLETIONS, PROMPTS = "completions", "prompts"
"""Arguments of reward functions as TRL calls them."""

EXAMPLES = ("example", "examples")
"""Names of an argument that gets whole records."""


@dataclass(frozen=True)
class CallForm:
    """How to call a function.

    Attributes:
        batched: with lists, one entry for each text.
        wants_example: with the record of the prompt as the second argument.
        text: the name of the argument that gets the text, if all go by name; else None.
        columns: the arguments that get fields of the records; None for all fields.
        optional: those of them that have a default.
        chats: whether conversations are given as messages, and prompts under `prompts`.
    """

    batched: bool
    wants_example: bool = False
    text: str | None = None
    columns: tuple[str, ...] | None = ()
    optional: frozenset[str] = frozenset()
    chats: bool = False

    @property
    def reads_records(self) -> bool:
        """Whether equal texts of two prompts may have two scores."""
        return self.wants_example or self.text is not None

    @property
    def fields(self) -> frozenset[str] | None:
        """The fields of records that it reads beside the prompt; None if that is not known."""
        if self.wants_example or self.columns is None:
            return None
        return frozenset(self.columns) - {PROMPTS}

    def arguments(self, name: str, texts: Sequence[str], rows: Sequence[Any], known: Sequence[Any]) -> Any:
        """Return the arguments of one call: a tuple, or a dictionary of those by name.

        Args:
            name: of the reward, for messages.
            texts: of this call; one if it is not batched.
            rows: the record of each.
            known: the records of all prompts.
        """
        if self.text is None:
            columns: list[list[Any]] = [list(texts), *([list(rows)] if self.wants_example else [])]
            return tuple(columns if self.batched else (column[0] for column in columns))
        given: dict[str, list[Any]] = {self.text: list(texts)}
        if self.chats:
            given[COMPLETIONS] = [_as_chat(text, row) for text, row in zip(texts, rows, strict=True)]
        for column in self._columns_of(known):
            if self.chats and column == PROMPTS:
                given[PROMPTS] = [row.get(MESSAGES, row.get("prompt")) for row in rows]
            elif any(column in row for row in known):
                given[column] = [row.get(column) for row in rows]
            elif column not in self.optional:
                there = sorted({str(field) for row in known for field in row})
                raise LanguageModelError(
                    f"reward {name!r} takes {column!r}, and the records of the prompts have no such field (they have "
                    f"{', '.join(map(repr, there))}); add it, or give it by functools.partial"
                )
        return given if self.batched else {argument: values[0] for argument, values in given.items()}

    def _columns_of(self, known: Sequence[Any]) -> Sequence[str]:
        if self.columns is not None:
            return self.columns
        found = dict.fromkeys(str(field) for row in known for field in row if field not in NOT_COLUMNS)
        return [PROMPTS, *(field for field in found if field not in (COMPLETIONS, PROMPTS))]


def _as_chat(text: str, row: Any) -> Any:
    return [{"role": "assistant", "content": text}] if MESSAGES in row else text


def call_form(fn: Callable[..., Any], name: str, *, batched: bool) -> CallForm:
    """Find out from a function's signature how to call it.

    Raises:
        LanguageModelError: it is a coroutine, or takes other arguments.
    """
    if inspect.iscoroutinefunction(fn):
        raise LanguageModelError(f"reward {name!r} is a coroutine; pass an ordinary function (asyncio.run inside it)")
    try:
        signature = inspect.signature(fn)
    except (TypeError, ValueError):  # some functions written in C have no signature
        return CallForm(batched)
    parameters = list(signature.parameters.values())
    by_name = _form_by_name(parameters, batched=batched)
    if by_name is not None:
        return by_name
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    places = [parameter for parameter in parameters if parameter.kind in kinds]
    named = len(places) > 1 and places[1].name in EXAMPLES
    for count, wants in ((2, True), (1, False)) if named else ((1, False), (2, True)):
        try:
            signature.bind(*range(count))
        except TypeError:
            continue
        return CallForm(batched, wants_example=wants)
    what = "(texts) or (texts, examples)" if batched else "(text) or (text, example)"
    raise LanguageModelError(
        f"reward {name!r} takes {signature}; it is called with {what}, with fields of the records by name after a *, "
        "or with completions=, prompts= and fields: give other arguments by functools.partial"
    )


def _form_by_name(parameters: Sequence[inspect.Parameter], *, batched: bool) -> CallForm | None:
    """Return the form of a function that takes `completions`, or names of fields behind its text."""
    keyword, variable = inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.VAR_KEYWORD
    by_name = [one for one in parameters if one.kind in (keyword, inspect.Parameter.POSITIONAL_OR_KEYWORD)]
    optional = frozenset(one.name for one in by_name if one.default is not one.empty)
    if any(one.name == COMPLETIONS for one in by_name) and not any(one.name in EXAMPLES for one in by_name):
        names = tuple(one.name for one in by_name if one.name != COMPLETIONS)
        everything = any(one.kind == variable for one in parameters)
        return CallForm(True, False, COMPLETIONS, None if everything else names, optional, chats=True)
    fields = tuple(one.name for one in by_name if one.kind == keyword)
    before = [one for one in by_name if one.kind != keyword and one.name not in optional]
    if len(before) != 1 or not set(fields) - optional:
        return None
    return CallForm(batched, False, before[0].name, fields, optional)

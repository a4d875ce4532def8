"""Rewards that check a text against its prompt's record: 1 if it is right, else 0."""

import math
import re
from dataclasses import replace
from functools import partial

from bayesrl.arguments import NonNegative, Positive, checked
from bayesrl.errors import LanguageModelError
from bayesrl.lm.prompts import Example
from bayesrl.lm.rewards.text import TextReward, text_reward
from bayesrl.value_checks import is_real

# A minus right behind a word, a point or a bracket subtracts, so it is no sign; commas stand before three digits.
_NUMBER = re.compile(r"(?:(?<![\w.)])[-−])?(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d+)?")


def _equals(text: str, example: Example, *, field: str, strip: bool, ignore_case: bool) -> float:
    pair = [text, _text_of(example, field, "exact_match")]
    if strip:
        pair = [part.strip() for part in pair]
    if ignore_case:
        pair = [part.casefold() for part in pair]
    return float(pair[0] == pair[1])


def _holds(text: str, example: Example, *, field: str, ignore_case: bool) -> float:
    wanted = _text_of(example, field, "contains")
    if ignore_case:
        text, wanted = text.casefold(), wanted.casefold()
    return float(wanted in text)


def _matches(text: str, *, pattern: re.Pattern[str], full: bool) -> float:
    return float((pattern.fullmatch(text) if full else pattern.search(text)) is not None)


def _ends_with_number(text: str, example: Example, *, field: str, tolerance: float) -> float:
    wanted = _last_number(_text_of(example, field, "number_match"))
    if wanted is None:
        raise LanguageModelError(
            f"number_match found no number in field {field!r} of the example with prompt {_prompt_of(example)}: "
            f"{example[field]!r:.80}; put one there"
        )
    found = _last_number(text)
    return float(found is not None and (found == wanted or abs(found - wanted) <= tolerance))


@checked(LanguageModelError)
def exact_match(field: str = "answer", *, strip: bool = True, ignore_case: bool = False) -> TextReward:
    """Make a reward of 1 if the text equals a field of its example, else 0.

    Args:
        field: of the prompt's record; a text, or a number, which is compared as it prints.
        strip: whether to ignore blanks around both.
        ignore_case: whether to ignore case.

    Raises:
        LanguageModelError: on use: an example has no such field.

    Example:
        >>> exact_match().scores([0, 0], [" 42", "41"], [{"prompt": "6*7=", "answer": 42}]).tolist()
        [1.0, 0.0]
    """
    return replace(
        text_reward(partial(_equals, field=field, strip=strip, ignore_case=ignore_case), name="exact_match"),
        only_field=field,
    )


@checked(LanguageModelError)
def contains(field: str = "answer", *, ignore_case: bool = False) -> TextReward:
    """Make a reward of 1 if the text contains a field of its example, else 0.

    Args:
        field: of the prompt's record; a text, or a number, which is searched as it prints.
        ignore_case: whether to ignore case.

    Raises:
        LanguageModelError: on use: an example has no such field.

    Example:
        >>> contains("city").scores([0], ["It is Paris."], [{"prompt": "Where?", "city": "Paris"}]).tolist()
        [1.0]
    """
    return replace(
        text_reward(partial(_holds, field=field, ignore_case=ignore_case), name="contains"), only_field=field
    )


@checked(LanguageModelError)
def regex_match(
    pattern: str | re.Pattern[str], *, full: bool = False, time_limit: Positive | None = None
) -> TextReward:
    """Make a reward of 1 if a regular expression matches somewhere in the text, else 0.

    Args:
        pattern: a pattern of `re`, as a text or compiled.
        full: whether it must match the whole text.
        time_limit: seconds per text, because some expressions take time that is exponential in the length;
            a separate process then does the search.

    Raises:
        LanguageModelError: it is not a regular expression. On use: it took too long.

    Example:
        >>> regex_match("[0-9]+", full=True).scores([0, 0], ["12", "12a"], [{"prompt": ""}]).tolist()
        [1.0, 0.0]
    """
    try:
        compiled = re.compile(pattern)
    except (re.error, TypeError) as error:
        raise LanguageModelError(
            f"regex_match got {pattern!r}, which is no regular expression: {error}; mend it"
        ) from error
    if not isinstance(compiled.pattern, str):
        raise LanguageModelError(f"regex_match got {pattern!r}, which matches bytes; pass one that matches texts")
    return text_reward(partial(_matches, pattern=compiled, full=full), name="regex_match", time_limit=time_limit)


@checked(LanguageModelError)
def number_match(field: str = "answer", *, tolerance: NonNegative = 0.0) -> TextReward:
    """Make a reward of 1 if the last number in the text is the example's, else 0.

    Numbers may have a sign, thousands separated by commas, decimals after a point and an exponent; 3-1 ends with 1.

    Args:
        field: of the prompt's record: a number, or a text whose last number counts.
        tolerance: the largest |found − wanted| that counts as right.

    Raises:
        LanguageModelError: the tolerance is negative. On use: an example has no such field, or no number in it.

    Example:
        >>> asked = [{"prompt": "", "answer": "600 + 634 = 1,234"}]
        >>> number_match().scores([0, 0], ["so it is 1234.0.", "I have 2 guesses"], asked).tolist()
        [1.0, 0.0]
    """
    return replace(
        text_reward(partial(_ends_with_number, field=field, tolerance=float(tolerance)), name="number_match"),
        only_field=field,
    )


def _text_of(example: Example, field: str, name: str) -> str:
    if field not in example:
        raise LanguageModelError(
            f"{name} needs the field {field!r}, and the example with prompt {_prompt_of(example)} has only "
            f"{', '.join(map(repr, example))}; give it to every prompt, or name another field"
        )
    value = example[field]
    if not isinstance(value, str) and not is_real(value):
        raise LanguageModelError(
            f"{name} found {value!r:.80} in the field {field!r} of the example with prompt {_prompt_of(example)}; "
            "put a text or a number there"
        )
    return str(value)


def _prompt_of(example: Example) -> str:
    prompt = str(example.get("prompt"))
    return repr(prompt if len(prompt) <= 60 else f"{prompt[:59]}…")


def _last_number(text: str) -> float | None:
    found = _NUMBER.findall(text)
    number = float(found[-1].replace(",", "").replace("−", "-")) if found else math.nan
    return number if math.isfinite(number) else None

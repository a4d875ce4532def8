"""`score_records`: rewards of answers that stand in records, as trainers and the hub write them."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from bayesrl.arguments import checked
from bayesrl.errors import LanguageModelError
from bayesrl.lm.policy_draws import reward_values
from bayesrl.lm.prompts import encode_prompts
from bayesrl.lm.rewards.base import Reward, WeightedSum
from bayesrl.lm.rewards.text import TextReward, as_reward
from bayesrl.lm.supervised import encode_answers
from bayesrl.lm.tokenization.chat_templates import MESSAGES, is_conversation
from bayesrl.lm.tokenization.tokenizer import Tokenizer, pad_left
from bayesrl.value_checks import format_value

_ANSWERS = ("completion", "completions", "chosen", "rejected")


@checked(LanguageModelError)
def score_records(
    reward: Reward | Callable[..., Any],
    records: Sequence[Mapping[str, Any]],
    *,
    tokenizer: Tokenizer | None = None,
    name: str = "score",
) -> list[dict[str, Any]]:
    """Score the answers in records by a reward, and return copies of the records with the scores.

    | columns of a record | what it gets |
    |---|---|
    | `completion`, perhaps `prompt` | `score` |
    | `messages` that end with the assistant's | `score` |
    | `completions` | `scores`, a list |
    | `chosen` and `rejected` | `score_chosen`, `score_rejected` |

    Texts may be conversations. `bayesrl.preferences.read` reads the first two as ratings and the third as rankings.

    Args:
        reward: a `Reward`, or a function of the text as `rewards.text_reward` takes it.
        records: mappings, such as the rows of a data set.
        tokenizer: for rewards that read tokens, and for conversations whose prompt a reward reads as a text.
        name: of the new columns, in the place of `score`.

    Raises:
        LanguageModelError: a record has no answer, or has such a column already; a reward of tokens without a
            tokenizer; a score is nan.

    Example:
        >>> from bayesrl import lm
        >>> pairs = [{"prompt": "1+1=", "chosen": "2", "rejected": "11"}]
        >>> lm.score_records(lambda text: -len(text), pairs)[0]
        {'prompt': '1+1=', 'chosen': '2', 'rejected': '11', 'score_chosen': -1.0, 'score_rejected': -2.0}
    """
    places: list[tuple[int, str]] = []
    rows: list[dict[str, Any]] = []
    for at, record in enumerate(records):
        for column, row in _answers_of(at, record, name):
            places.append((at, column))
            rows.append(row)
    values = _scores_of(as_reward(reward), rows, tokenizer)
    if np.isnan(values).any():
        raise LanguageModelError(f"the reward gave nan for record {places[int(np.isnan(values).argmax())][0]}; mend it")
    scored = [dict(record) for record in records]
    for (at, column), value in zip(places, values.tolist(), strict=True):
        if column == f"{name}s":
            scored[at].setdefault(column, []).append(value)
        else:
            scored[at][column] = value
    return scored


def _answers_of(at: int, record: Mapping[str, Any], name: str) -> list[tuple[str, dict[str, Any]]]:
    """Return the new column of each answer in a record, and the record of its prompt with the answer."""
    if "completion" in record:
        given = [(name, record["completion"])]
    elif "completions" in record:
        given = [(f"{name}s", one) for one in record["completions"]]
    elif "chosen" in record and "rejected" in record:
        given = [(f"{name}_{side}", record[side]) for side in ("chosen", "rejected")]
    elif is_conversation(record.get(MESSAGES)) and "prompt" not in record:
        given = [(name, record[MESSAGES])]
    else:
        there = ", ".join(map(repr, record)) or "nothing"
        raise LanguageModelError(
            f"record {at} has {there}; to be scored it needs completion, completions, chosen and rejected, or messages"
        )
    taken = [column for column, _ in given if column in record]
    if taken or not given:
        what = f"has {taken[0]!r} already; pass another name=" if taken else "has no completions; leave it out"
        raise LanguageModelError(f"record {at} {what}")
    own = {field: value for field, value in record.items() if field not in (*_ANSWERS, MESSAGES)}
    return [(column, _with_answer(at, own, value)) for column, value in given]


def _with_answer(at: int, own: Mapping[str, Any], answer: Any) -> dict[str, Any]:
    prompt = own.get("prompt", "")
    spoken = is_conversation(answer) and answer[-1]["role"] == "assistant"
    if spoken and isinstance(answer[-1].get("content"), str):
        before = [*(prompt if is_conversation(prompt) else []), *answer[:-1]]
        return {**own, "prompt": before or prompt, "completion": [answer[-1]]}
    if not isinstance(answer, str):
        raise LanguageModelError(
            f"an answer of record {at} is {format_value(answer)}; give a text, or messages that end with the "
            "assistant's"
        )
    return {**own, "prompt": prompt, "completion": answer}


def _scores_of(reward: Reward, rows: Sequence[dict[str, Any]], tokenizer: Tokenizer | None) -> np.ndarray:
    """Return the score of each answer, [rows]."""
    parts = reward.parts if isinstance(reward, WeightedSum) else ((1.0, reward),)
    index, total = np.arange(len(rows)), np.zeros(len(rows))
    answers = [row["completion"] for row in rows]
    texts = [one if isinstance(one, str) else one[-1]["content"] for one in answers]
    prompts = None if tokenizer is None else encode_prompts(rows, tokenizer)
    examples: Sequence[Any] = [_as_example(row) for row in rows] if prompts is None else prompts.examples
    for weight, part in parts:
        if isinstance(part, TextReward):
            total += weight * part.scores(index, texts, examples)
            continue
        if prompts is None or tokenizer is None:
            raise LanguageModelError(f"a {type(part).__name__} reads tokens; pass tokenizer=")
        tokens, mask = pad_left(encode_answers("completion", examples, tokenizer), tokenizer.pad or 0)
        # Completions are padded behind their end.
        order = np.argsort(~mask, -1, kind="stable")
        tokens, mask = np.take_along_axis(tokens, order, -1), np.take_along_axis(mask, order, -1)
        total += weight * reward_values({"score": part}, prompts, index, tokens, mask)["score"]
    return total


def _as_example(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return the record of a prompt as rewards see it, with a conversation under `messages`."""
    chat = is_conversation(row["prompt"])
    return {**row, MESSAGES: row["prompt"]} if chat else dict(row)

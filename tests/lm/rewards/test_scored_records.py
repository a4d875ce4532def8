"""Rewards of answers in records: every form gets its columns, and they are read back as judgements."""

import dataclasses
from typing import Any

import numpy as np
import pytest

from bayesrl import lm, preferences
from bayesrl.errors import LanguageModelError
from bayesrl.lm import rewards, score_records
from bayesrl.lm.text_samples import ModelSamples, TextSamples

TOKENIZER = lm.char_tokenizer("abc ")
USER, REPLY = {"role": "user", "content": "a"}, {"role": "assistant", "content": "bb"}


def by_length(text: str) -> int:
    return len(text)


def test_every_form_gets_its_columns() -> None:
    forms: list[tuple[dict[str, Any], dict[str, Any]]] = [
        ({"prompt": "a", "completion": "bc"}, {"score": 2.0}),
        ({"completion": "b", "id": 7}, {"score": 1.0}),
        ({"prompt": "a", "completions": ["b", "", "ccc"]}, {"scores": [1.0, 0.0, 3.0]}),
        ({"prompt": "a", "chosen": "b", "rejected": "cc"}, {"score_chosen": 1.0, "score_rejected": 2.0}),
        ({"messages": [USER, REPLY]}, {"score": 2.0}),
        ({"prompt": [USER], "completion": [REPLY]}, {"score": 2.0}),
        ({"chosen": [USER, REPLY], "rejected": [USER, {**REPLY, "content": "c"}]},
         {"score_chosen": 2.0, "score_rejected": 1.0}),
    ]  # fmt: skip
    records = [record for record, _ in forms]
    assert score_records(by_length, records) == [record | new for record, new in forms]
    assert score_records(by_length, records[:1], name="n")[0]["n"] == 2


def test_rewards_see_the_fields_of_their_record() -> None:
    seen: list[Any] = []

    def judge(prompts: Any, completions: Any, level: Any) -> list[float]:
        seen.extend([prompts, completions, level])
        return [0.5] * len(completions)

    records = [{"prompt": "a", "chosen": "b", "rejected": "c", "level": 1}, {"messages": [USER, REPLY], "level": 2}]
    score_records(judge, records)
    assert seen == [["a", "a", [USER]], ["b", "c", [REPLY]], [1, 1, 2]]


def test_rewards_of_tokens_need_a_tokenizer_and_see_the_end() -> None:
    records = [{"prompt": "a", "completion": "bcb"}, {"prompt": "ab", "completion": "c"}]
    both = 2.0 * rewards.text_reward(by_length) - rewards.length()
    assert [row["score"] for row in score_records(both, records, tokenizer=TOKENIZER)] == [2 * 3 - 4, 2 * 1 - 2]
    with pytest.raises(LanguageModelError, match="a TokenReward reads tokens; pass tokenizer="):
        score_records(rewards.length(), records)
    pytest.importorskip("jinja2")
    template = "{% for m in messages %}{{ m.content }}{{ ' ' if m.role == 'user' else eos_token }}{% endfor %}"
    talking = dataclasses.replace(TOKENIZER, config={"chat_template": template})
    # The template writes the end itself.
    told = score_records(rewards.length(), [{"messages": [USER, REPLY]}], tokenizer=talking)
    assert told == [{"messages": [USER, REPLY], "score": 3.0}]


def test_scores_are_read_back_as_judgements() -> None:
    rated = preferences.read(score_records(by_length, [{"prompt": "a", "completion": text} for text in ("b", "cc")]))
    assert rated.ratings is not None
    assert (rated.kind, rated.ratings.tolist()) == ("ratings", [1, 2])
    ranked = preferences.read(score_records(by_length, [{"prompt": "a", "completions": ["b", "cc", "c"]}]))
    assert ranked.ranks.tolist() == [[1, 0, 1]]


def test_texts_of_a_fit_are_written_as_records() -> None:
    prompts = lm.encode_prompts([{"prompt": "a", "id": 3}, "b"], TOKENIZER)
    tokens = np.asarray([[TOKENIZER.encode(["cb"])[0], [*TOKENIZER.encode(["c"])[0], TOKENIZER.eos]]])
    zero = np.zeros(tokens.shape)
    written = ModelSamples(
        tokens, np.ones(tokens.shape, bool), np.array([[1.5, 2.5]]), {"gold": np.array([[0.0, 1.0]])}, zero, zero, zero
    )
    records = TextSamples(prompts, written, written._replace(reward=-written.reward)).records()
    assert records == [
        {"prompt": "a", "id": 3, "completion": "cb", "score": 1.5, "gold": 0.0},
        {"prompt": "b", "completion": "c", "score": 2.5, "gold": 1.0},
    ]
    assert preferences.read(records, ignore=["id", "gold"]).names == ["acb", "bc"]
    plain = TextSamples(lm.encode_prompts(np.array([[4], [5]])), written, written).records(prior=True)
    assert (plain[0]["prompt"], plain[0]["completion"]) == ([4], tokens[0, 0].tolist())


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"prompt": "a"}, "record 1 has 'prompt'; to be scored it needs completion, completions, chosen and rejected"),
        ({"completion": "a", "score": 1}, "record 1 has 'score' already; pass another name="),
        ({"completions": []}, "record 1 has no completions; leave it out"),
        ({"completion": 3}, "an answer of record 1 is 3; give a text, or messages that end with the assistant's"),
        ({"completion": [USER]}, "an answer of record 1 is .*; give a text"),
    ],
)
def test_bad_records_are_refused(record: Any, message: str) -> None:
    with pytest.raises(LanguageModelError, match=message):
        score_records(by_length, [{"completion": "a"}, record])

"""Rewards of language models, against what plain Python says of the same texts."""

import functools
import logging
import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reward_functions as functions
import tokenizers as tk
from jax import Array

from bayesrl.compilation.callbacks import host_call, host_errors
from bayesrl.core.structure import inspect
from bayesrl.errors import LanguageModelError
from bayesrl.lm import (
    GPT2,
    BertClassifier,
    BertConfig,
    GPT2Config,
    Pretrained,
    Tokenizer,
    byte_tokenizer,
    char_tokenizer,
    policy,
)
from bayesrl.lm.policy_draws import reward_values
from bayesrl.lm.prompts import Completions, Examples, encode_prompts
from bayesrl.lm.rewards import (
    Reward,
    classifier,
    contains,
    exact_match,
    length,
    number_match,
    regex_match,
    sklearn_pipeline,
    text_reward,
    token_reward,
    worker_pool,
)
from bayesrl.lm.rewards.base import evaluate
from bayesrl.lm.rewards.text import as_reward
from bayesrl.monte_carlo.reward_bounds import reward_bounds

LETTERS = char_tokenizer("abcdefgh 0123456789.,-=")
RECORDS = [{"prompt": "ab", "answer": "a"}, {"prompt": "c", "answer": "bb"}]


def written(
    texts: list[Any], records: list[dict[str, Any]] = RECORDS, tokenizer: Tokenizer = LETTERS, width: int = 0
) -> Completions:
    """Give completions, of any nesting of lists whose innermost holds one text for each record."""
    asked = encode_prompts(records, tokenizer)
    array = np.asarray(texts, object)
    rows = [[*row, tokenizer.eos] for row in tokenizer.encode(list(array.reshape(-1)))]
    width = max(width, *map(len, rows))
    tokens, mask = np.full((len(rows), width), tokenizer.pad), np.zeros((len(rows), width), bool)
    for index, row in enumerate(rows):
        tokens[index, : len(row)], mask[index, : len(row)] = row, True
    index = jnp.broadcast_to(jnp.arange(len(records)), array.shape)
    prompt, prompt_mask = (jnp.broadcast_to(a, (*array.shape, a.shape[-1])) for a in (asked.tokens, asked.mask))
    shape = (*array.shape, width)
    return Completions(
        index, prompt, prompt_mask, jnp.asarray(tokens.reshape(shape)), jnp.asarray(mask.reshape(shape)), asked.examples
    )


def scored(reward: Reward, completions: Completions) -> np.ndarray:
    with host_errors():
        return np.asarray(jax.block_until_ready(reward(completions)))


def compiled(reward: Reward, completions: Completions) -> np.ndarray:
    """Score [particles, prompts] as the library does: a jitted function of one particle, mapped over particles."""

    @jax.jit
    def run(tokens: Array, mask: Array) -> Array:
        def one(tokens: Array, mask: Array) -> Array:
            parts = completions.index[0], completions.prompt[0], completions.prompt_mask[0]
            return reward(Completions(*parts, tokens, mask, completions.examples))

        return jax.vmap(one)(tokens, mask)

    with host_errors():
        return np.asarray(jax.block_until_ready(run(completions.tokens, completions.mask)))


def refused(reward: Reward, completions: Completions) -> str:
    with pytest.raises(LanguageModelError) as caught:
        scored(reward, completions)
    assert "\n" not in str(caught.value)
    return str(caught.value)


TABLE = [["a", "bb"], ["bb", ""], ["a", "c"]]
FLAT = [(text, record) for row in TABLE for text, record in zip(row, RECORDS, strict=True)]


# ---- functions of the text ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reward", "truth"),
    [
        (text_reward(len), lambda text, example: len(text)),
        (text_reward(functions.equals), lambda text, example: text == example["answer"]),
        (
            text_reward(functions.lengths, batched=True),
            lambda text, example: len(text) + len(example["prompt"]),
        ),
        (text_reward(lambda texts: np.array([len(t) for t in texts]), batched=True), lambda text, example: len(text)),
        (text_reward(lambda text, weight=2.0: weight), lambda text, example: 2.0),
        (text_reward(lambda text, example=None: len(example)), lambda text, example: 2.0),
        (
            text_reward(lambda text: -math.inf if text == "" else np.float64(1)),
            lambda t, example: 1 if t else -math.inf,
        ),
        (text_reward(functools.partial(lambda n, text: n, 3)), lambda text, example: 3),
        (text_reward(functions.as_in_trl), lambda text, example: text == example["answer"]),
        (text_reward(functools.partial(functions.wanted, weight=2.0)), lambda t, example: 2 * (t == example["answer"])),
        (length(), lambda text, example: len(text) + 1),
        (2.0 * text_reward(len) - length(), lambda text, example: 2 * len(text) - len(text) - 1),
        (exact_match(), lambda text, example: text == example["answer"]),
        (contains("answer"), lambda text, example: example["answer"] in text),
        (regex_match("b+"), lambda text, example: "b" in text),
        (regex_match("b+", full=True), lambda text, example: text in ("b", "bb")),
    ],
)
def test_scores_are_those_of_plain_python(reward: Reward, truth: Callable[..., float]) -> None:
    expected = np.asarray([truth(text, record) for text, record in FLAT], np.float32).reshape(3, 2)
    completions = written(TABLE)
    np.testing.assert_array_equal(scored(reward, completions), expected)
    np.testing.assert_array_equal(compiled(reward, completions), expected)


def test_functions_get_fields_by_name() -> None:
    seen: list[Any] = []

    def chat(prompts: Any, completions: Any, level: Any, note: Any = "none") -> list[float]:
        seen.extend([prompts, completions, level, note])
        return [0.0] * len(completions)

    reward = text_reward(chat)
    assert (reward.fields, text_reward(functions.wanted).fields) == ({"level", "note"}, {"answer", "weight"})
    assert text_reward(functions.as_in_trl).fields is None
    talk = [{"role": "user", "content": "hi"}]
    rows = [{"prompt": "<hi>", "messages": talk, "level": 3}, {"prompt": "plain"}]
    reward.scores([0, 1], ["a", "b"], rows)
    # A conversation is told as one; a record without a field gives None, and a field that none has its default.
    assert seen == [[talk, "plain"], [[{"role": "assistant", "content": "a"}], "b"], [3, None], "none"]
    with pytest.raises(LanguageModelError, match=r"reward 'chat' takes 'level', and the records .* have 'prompt'"):
        reward.scores([0], ["a"], rows[1:])
    with pytest.raises(
        LanguageModelError, match=r"returned 1 value for 2 texts, .*; with batched=True, or completions=, return"
    ):
        text_reward(lambda completions: [0.0]).scores([0, 0], ["a", "b"], rows)


def test_one_scoring_for_what_is_the_same() -> None:
    seen: list[Any] = []
    by_text = text_reward(lambda text: seen.append(text) or 1.0)
    scored(by_text, written(TABLE))
    assert sorted(seen) == ["", "a", "bb", "c"]
    seen.clear()
    by_pair = text_reward(lambda text, example: seen.append((text, example["prompt"])) or 1.0)
    scored(by_pair, written(TABLE))
    assert len(seen) == len(set(seen)) == 5


def test_a_constant_for_derivatives() -> None:
    completions, reward = written(TABLE), text_reward(len)
    slope = jax.grad(lambda x: jnp.sum(x * reward(completions)))(1.0)
    assert float(slope) == sum(len(text) for text, _ in FLAT)


def test_as_reward() -> None:
    reward = text_reward(len)
    assert as_reward(reward) is reward
    assert as_reward(len).name == "len"
    with pytest.raises(LanguageModelError, match="3 is no reward"):
        as_reward(3)


@pytest.mark.parametrize(
    ("value", "told"),
    [
        (math.nan, "returned nan for the text 'a'"),
        (math.inf, "returned inf for the text 'a'"),
        (1e39, "returned 1e\\+39"),
        (10**400, "a int, for"),
        ("0.5", "returned '0.5', a str, for the text 'a'"),
        (np.str_("0.5"), "a str_, for the text 'a'"),
        (np.array("0.5"), "returned array\\('0.5', dtype='<U3'\\), a ndarray, for the text 'a'"),
        (np.array("0.5", object), "a ndarray, for the text 'a'"),
        (np.array(b"1"), "a ndarray, for the text 'a'"),
        (None, "returned None, a NoneType, for the text 'a'"),
        ([1.0], "returned \\[1.0\\], a list"),
        (1j, "a complex"),
        (np.ones(1), "a ndarray"),
    ],
)
def test_what_is_no_number(value: Any, told: str) -> None:
    def judge(text: str) -> Any:
        return value

    with pytest.raises(LanguageModelError, match=f"reward 'judge' returned|{told}") as caught:
        scored(text_reward(judge, on_error=0.0), written(["a", "a"]))
    assert "return one finite number" in str(caught.value)
    with pytest.raises(LanguageModelError, match=told):
        scored(text_reward(lambda texts: [value for _ in texts], batched=True), written(["a", "a"]))


class Words(Reward):
    """A reward of the user's own that returns texts."""

    def __call__(self, completions: Completions) -> Any:
        return np.full(completions.index.shape, "1.0")


@pytest.mark.parametrize("reward", [Words(), 2.0 * Words(), Words() + length()])
def test_texts_are_no_numbers(reward: Reward) -> None:
    completions = written(["a", "b"])
    prompts = encode_prompts(RECORDS, LETTERS)
    rows = (np.asarray(completions.index), np.asarray(completions.tokens), np.asarray(completions.mask))
    told = r"reward 'Words' returned array\(\['1.0', '1.0'.* for completions .*; return one number for each"
    with pytest.raises(LanguageModelError, match=told):
        evaluate(reward, completions)
    with pytest.raises(LanguageModelError, match=told):
        reward_values({"words": reward}, prompts, *rows)


@pytest.mark.parametrize(
    "given", [[1.0], [1.0] * 3, None, 2.0, "12", [], iter([1.0]), np.array("12"), {1.0, 2.0}, {1.0: "a", 2.0: "b"}]
)
def test_wrong_number_of_values(given: Any) -> None:
    told = refused(text_reward(lambda texts: given, batched=True), written(["a", "b"]))
    assert "for 2 texts, the first 'a'; with batched=True, or completions=, return one number for each text" in told


def test_a_function_that_raises(caplog: pytest.LogCaptureFixture) -> None:
    completions = written([["a", "b"], ["b", "b" * 200]])
    with pytest.raises(LanguageModelError, match="raised KeyError: 'no b, please', on the text 'b'; mend") as caught:
        compiled(text_reward(functions.picky), completions)
    assert isinstance(caught.value.__cause__, KeyError)
    assert not [record for record in caplog.records if "pure_callback" in record.message]
    lenient = text_reward(functions.picky, on_error=-2.0)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            np.testing.assert_array_equal(scored(lenient, completions), [[1, -2], [-2, 1]])
    assert len(caplog.records) == 1
    assert lenient.num_failures == 2
    assert "raised ZeroDivisionError" in refused(text_reward(lambda text: 1 / 0), completions)
    long = refused(text_reward(lambda text: [][len(text)]), written(["a" * 500, "a"]))
    assert "…'" in long
    assert len(long) < 300


@pytest.mark.parametrize(
    ("fn", "options", "told"),
    [
        (3, {}, "text_reward got fn=3; use a function"),
        (lambda: 1.0, {}, "takes \\(\\); it is called with \\(text\\) or"),
        (lambda a, b, c: 1.0, {}, "functools.partial"),
        (len, {"num_workers": -1}, "num_workers=-1"),
        (len, {"num_workers": 1.5}, "num_workers=1.5"),
        (len, {"time_limit": 0}, "time_limit=0"),
        (len, {"on_error": "ignore"}, "on_error='ignore'"),
        (len, {"on_error": math.nan}, "on_error=nan"),
        (lambda text: 1.0, {"num_workers": 1}, "'<lambda>' cannot be sent to a worker.*top level"),
        (lambda text: 1.0, {"time_limit": 1.0}, "leave num_workers and time_limit out"),
    ],
)
def test_what_cannot_be_a_reward(unchecked: None, fn: Any, options: dict[str, Any], told: str) -> None:
    with pytest.raises(LanguageModelError, match=told):
        text_reward(fn, **options)


def test_coroutines_and_prompts_of_tokens() -> None:
    async def slow(text: str) -> float:
        return 1.0

    with pytest.raises(LanguageModelError, match="is a coroutine"):
        text_reward(slow)
    completions = written(["a", "b"])
    bare = Completions(
        completions.index,
        completions.prompt,
        completions.prompt_mask,
        completions.tokens,
        completions.mask,
        Examples(RECORDS, None),
    )
    with pytest.raises(LanguageModelError, match="given as tokens"):
        text_reward(len)(bare)
    assert token_reward(lambda tokens, mask: jnp.sum(mask))(bare).tolist() == [2, 2]


# ---- workers --------------------------------------------------------------------------------


def test_workers_score_alike_and_come_back() -> None:
    completions = written([["a" * n, "bb"] for n in range(12)])
    for reward in (
        text_reward(functions.wanted, num_workers=2),
        text_reward(functions.lengths, num_workers=2, batched=True),
    ):
        expected = scored(text_reward(reward.fn, batched=reward.form.batched), completions)
        np.testing.assert_array_equal(compiled(reward, completions), expected)
        reward.close()
        np.testing.assert_array_equal(scored(reward, completions), expected)
        reward.close()


def test_workers_are_lean_and_kept() -> None:
    reward = text_reward(functions.loaded_jax, num_workers=1)
    assert scored(reward, written(["a", "b"])).tolist() == [0, 0]
    reward.close()
    reward = text_reward(functions.process, num_workers=1)
    first, second = (scored(reward, written([text, text])) for text in ("a", "b"))
    assert first[0] == second[0] != os.getpid()
    reward.close()


def test_a_function_that_hangs_is_killed(caplog: pytest.LogCaptureFixture) -> None:
    reward = text_reward(functions.stubborn, time_limit=0.5)
    began = time.monotonic()
    told = refused(reward, written([["a", "b"], ["aa", "aaa"]]))
    assert "'stubborn' took more than 0.5 seconds, on the text 'b'; raise time_limit" in told
    lenient = text_reward(functions.stubborn, time_limit=0.5, on_error=-1.0)
    assert scored(lenient, written([["a", "b"], ["aa", "aaa"]])).tolist() == [[1, -1], [2, 3]]
    assert time.monotonic() - began < 20
    assert "61.25" not in subprocess.run(["/bin/ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
    lenient.close()
    slow = text_reward(functions.backtracking, time_limit=0.5)
    assert "took more than 0.5 seconds" in refused(slow, written(["a" * 40 + "c", "a"]))


def test_a_worker_that_died_while_idle_is_replaced() -> None:
    pool = worker_pool.WorkerPool(len, "len", 1, None)
    assert pool.run([("four",)]) == [4]
    process = pool._workers[0].process
    process.kill()
    process.join()
    assert pool.run([("a",), ("ab",)]) == [1, 2]
    pool.close()


def test_rewards_are_summed() -> None:
    total: Any = sum([length(), 2.0 * length()])
    assert scored(total, written(["ab", "a"])).tolist() == [9, 6], "the end counts"


def test_a_worker_that_dies_or_cannot_tell() -> None:
    texts = [[text, "c"] for text in "abdefgh"]
    assert "'deadly' ended its worker process (exit code 7), on the text 'b'" in refused(
        text_reward(functions.deadly, num_workers=1), written(texts)
    )
    lenient = text_reward(functions.deadly, num_workers=1, on_error=5.0)
    assert scored(lenient, written(texts))[:, 0].tolist() == [1, 5, 1, 1, 1, 1, 1]
    lenient.close()
    with pytest.raises(LanguageModelError, match="raised KeyError: 'no b, please', on the text 'b'") as caught:
        scored(text_reward(functions.picky, num_workers=1), written(texts))
    assert "in picky" in "".join(caught.value.__notes__)
    odd = text_reward(functions.odd, num_workers=1)
    assert "<function> <function odd" in refused(odd, written(["a", "b"]))
    assert "returned 'c', a str, for the text 'c'" in refused(odd, written(["a", "c"]))
    odd.close()
    strange = [{"prompt": "a", "answer": lambda: 0}] * 2
    sent = text_reward(functions.equals, num_workers=1)
    assert "cannot be sent to a worker process" in refused(sent, written(["a", "b"], strange))


SCRIPT = """
import os, signal, sys, threading
sys.path.insert(0, {folder!r})
import reward_functions as functions

def mine(text):
    return float(len(text))

if __name__ == "__main__":
    from bayesrl.lm.rewards import text_reward  # not above: workers import what is above

    print(text_reward(mine, num_workers=1).scores([0, 0], ["aaa", "a"], [dict(prompt="")]), flush=True)
    threading.Timer(1.5, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
    text_reward(functions.stubborn, num_workers=1).scores([0], ["b"], [dict(prompt="")])
"""


def test_a_script_that_is_interrupted_leaves_nothing_behind(tmp_path: Path) -> None:
    path = tmp_path / "script.py"
    path.write_text(SCRIPT.format(folder=str(Path(__file__).parent)))
    run = subprocess.run([sys.executable, str(path)], capture_output=True, text=True, timeout=60, check=False)
    assert "[3. 1.]" in run.stdout
    assert "KeyboardInterrupt" in run.stderr
    assert run.returncode != 0
    running = subprocess.run(["/bin/ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
    assert str(path) not in running
    assert "61.25" not in running


def test_workers_that_cannot_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = tmp_path / "broken.py"
    broken.write_text("raise SystemExit(3)")
    monkeypatch.setattr(worker_pool, "_SCRIPT", str(broken))
    told = refused(text_reward(functions.length, num_workers=2), written(["a", "b"]))
    assert "ended with exit code 3 before it was ready; in a script, put what runs under `if __name__" in told


# ---- verifiers ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "answer", "right"),
    [
        ("it is 12.", "12", 1),
        ("1,234", 1234, 1),
        ("1,23", 23, 1),
        ("3-1", 1, 1),
        ("3 -1", -1, 1),
        ("-.5", "-0.5", 1),
        ("5e2 is it", 500.0, 1),
        ("so 7", "7 + 1 = 8", 0),
        ("none", 3, 0),
        ("9" * 400, 3, 0),
        ("0.34", "1/3 or .33", 0),
    ],
)
def test_number_match(text: str, answer: Any, right: int) -> None:
    record = [{"prompt": "", "answer": answer}]
    assert number_match().scores([0], [text], record).tolist() == [right]
    if text == "0.34":
        assert number_match(tolerance=0.02).scores([0], [text], record).tolist() == [1]


def test_options_of_verifiers() -> None:
    record = [{"prompt": "p", "answer": " A "}]
    assert exact_match().scores([0], ["A"], record).tolist() == [1]
    assert exact_match(strip=False).scores([0], ["A"], record).tolist() == [0]
    assert exact_match(ignore_case=True).scores([0], ["a"], record).tolist() == [1]
    assert regex_match("a", time_limit=3).time_limit == 3
    assert contains("answer", ignore_case=True).scores([0], ["b a c"], record).tolist() == [1]


def test_verifiers_name_what_is_missing(unchecked: None) -> None:
    told = refused(exact_match("key"), written(["a", "b"]))
    assert "exact_match needs the field 'key', and the example with prompt 'ab' has only 'prompt', 'answer'" in told
    assert "no number in field 'answer' of the example with prompt 'ab': 'a'" in refused(
        number_match(), written(["1", "2"])
    )
    bad = [{"prompt": "ab", "answer": None}] * 2
    assert "found None in the field 'answer'" in refused(contains("answer"), written(["a", "b"], bad))
    for make, told in [
        (lambda: regex_match("("), "no regular expression"),
        (lambda: regex_match(b"a"), "regex_match got pattern=b'a'"),
        (lambda: number_match(tolerance=-1.0), "tolerance=-1.0"),
        (lambda: exact_match(3), "field=3"),
    ]:
        with pytest.raises(LanguageModelError, match=told):
            make()


# ---- classifiers ----------------------------------------------------------------------------


def bert(
    tokenizer: Tokenizer, max_length: int = 40, labels: tuple[str, ...] = ("bad", "so", "good"), **more: Any
) -> Pretrained:
    shape = {"width": 8, "depth": 1, "heads": 2, "inner": 16, "initializer_range": 0.7, **more}
    config = BertConfig(vocab_size=tokenizer.vocab_size, max_length=max_length, labels=labels, **shape)
    return Pretrained(BertClassifier.init(jax.random.key(3), config), tokenizer, Path(), {})


def framed() -> Tokenizer:
    """Make a tokenizer of letters that puts [CLS] and [SEP] around texts."""
    tokenizer = char_tokenizer("abcdefgh 0123456789.,-=")
    core = tk.Tokenizer.from_str(tokenizer.core.to_str())
    core.add_special_tokens(["[CLS]", "[SEP]"])
    ends = [(name, core.token_to_id(name)) for name in ("[CLS]", "[SEP]")]
    core.post_processor = tk.processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ends)
    return Tokenizer(core, eos=tokenizer.eos, pad=tokenizer.pad)


def by_hand(pretrained: Pretrained, text: str, *, keep_end: bool = False) -> np.ndarray:
    """Give the logits of one text."""
    tokenizer, longest = pretrained.tokenizer, pretrained.model.config.max_length
    assert tokenizer is not None
    row = tokenizer.encode([text])[0]
    if len(row) > longest:
        inner, room = row[1:-1], longest - 2
        row = [row[0], *(inner[-room:] if keep_end else inner[:room]), row[-1]]
    filled = jnp.asarray(row + [0] * (longest - len(row)))
    return np.asarray(eqx.filter_jit(pretrained.model)(filled, jnp.arange(longest) < len(row)))


@pytest.mark.parametrize("with_prompt", [False, True])
@pytest.mark.parametrize("same", [True, False])
def test_bert_reads_what_was_written(same: bool, with_prompt: bool) -> None:
    judge = bert(framed())
    table = [["a", "bb"], ["", "ab ab"], ["abcdefgh" * 6, "h" * 38]]
    writer = framed() if same else byte_tokenizer()
    completions = written(table, tokenizer=writer)
    logits = np.stack(
        [
            np.stack(
                [
                    by_hand(judge, record["prompt"] * with_prompt + text, keep_end=with_prompt)
                    for text, record in zip(row, RECORDS, strict=True)
                ]
            )
            for row in table
        ]
    )
    normal = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    reward = classifier(judge, "good", with_prompt=with_prompt)
    np.testing.assert_allclose(compiled(reward, completions), normal[..., 2], rtol=2e-5, atol=2e-5)


def test_bert_without_special_tokens_and_with_nothing_to_read() -> None:
    judge = bert(LETTERS)
    texts = written([["ab", ""], ["c", "ddd"]])
    logits = np.stack([scored(classifier(judge, label, scale="logit"), texts) for label in range(3)], -1)
    for place, text in (((0, 0), "ab"), ((1, 0), "c"), ((1, 1), "ddd")):
        np.testing.assert_allclose(logits[place], by_hand(judge, text), rtol=1e-5, atol=1e-5)
    normal = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    np.testing.assert_allclose(scored(classifier(judge, "good"), texts), normal[..., 2], rtol=1e-5)
    chance = scored(classifier(judge, "good", scale="probability"), texts)
    np.testing.assert_allclose(chance, np.exp(normal[..., 2]), rtol=1e-5)
    recoded = scored(
        classifier(judge, 0, scale="logit"), written([["ab", ""], ["c", "ddd"]], tokenizer=byte_tokenizer())
    )
    np.testing.assert_allclose(logits[..., 0], recoded, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("scale", "most"), [("log_prob", 0.0), ("probability", 1.0)])
def test_what_a_classifier_can_give_at_most_is_proven(scale: Any, most: float) -> None:
    """So that rejection knows when to accept, and evidence has an upper side."""
    model = GPT2.init(
        jax.random.key(0), GPT2Config(vocab_size=LETTERS.vocab_size, max_length=4, width=4, depth=1, heads=1)
    )
    judged = policy(
        Pretrained(model, LETTERS), ["a"], reward=classifier(bert(LETTERS), "good", scale=scale), max_new_tokens=2
    )
    structure = inspect(jax.random.key(0), judged)
    np.testing.assert_allclose(reward_bounds(judged, structure, ())[1], most, rtol=1e-5)


def test_labels_that_may_hold_together_have_probabilities_of_their_own() -> None:
    """P(label | text) is the logistic function of its logit, whatever the other labels are."""
    judge = bert(LETTERS, problem="multi_label_classification")
    texts = written([["ab", "b"], ["c", "ddd"]])
    logit, chance, log_prob = (
        scored(classifier(judge, "good", scale=scale), texts) for scale in ("logit", "probability", "log_prob")
    )
    np.testing.assert_allclose(chance, 1 / (1 + np.exp(-logit)), rtol=1e-5)
    np.testing.assert_allclose(log_prob, np.log(chance), rtol=1e-5)


def test_what_cannot_classify(unchecked: None) -> None:
    judge = bert(LETTERS)
    for make, told in [
        (lambda: classifier(judge, "great"), "no label 'great'; use one of 0: 'bad', 1: 'so', 2: 'good'"),
        (lambda: classifier(judge, 3), "no label 3"),
        (lambda: classifier(judge, 0, scale="odds"), "scale='odds'"),
        (lambda: classifier(judge.model, 0), "as lm.load_pretrained gives it"),
        (lambda: classifier(Pretrained(judge.model, None, Path("f"), {}), 0), "f has no tokenizer.json"),
        (lambda: classifier(bert(LETTERS, labels=("one",)), 0), "with 1 labels, whose outputs are no probabilities"),
        (lambda: classifier(bert(LETTERS, problem="regression"), 0), "model of regression .*use scale='logit'"),
        (
            lambda: classifier(Pretrained(judge.model, char_tokenizer("".join(map(chr, range(33, 120))))), 0),
            "use the tokenizer that",
        ),
    ]:
        with pytest.raises(LanguageModelError, match=told):
            make()


def test_scikit_learn(unchecked: None) -> None:
    from sklearn.feature_extraction.text import CountVectorizer
    from sklearn.linear_model import LogisticRegression, Ridge
    from sklearn.pipeline import make_pipeline
    from sklearn.svm import LinearSVC

    texts, marks = ["a a", "a c", "b b", "b c", "d d", "d c"], ["A", "A", "B", "B", "D", "D"]
    many = make_pipeline(CountVectorizer(analyzer="char"), LogisticRegression()).fit(texts, marks)
    two = make_pipeline(CountVectorizer(analyzer="char"), LogisticRegression()).fit(texts[:4], marks[:4])
    number = make_pipeline(CountVectorizer(analyzer="char"), Ridge()).fit(texts, np.arange(6.0))
    flat = [text for text, _ in FLAT]
    completions = written(TABLE)
    for reward, expected in [
        (sklearn_pipeline(many, "D", scale="probability"), many.predict_proba(flat)[:, 2]),
        (sklearn_pipeline(many, "B"), many.predict_log_proba(flat)[:, 1]),
        (sklearn_pipeline(many, "A", scale="logit"), many.decision_function(flat)[:, 0]),
        (sklearn_pipeline(two, "B", scale="logit"), two.decision_function(flat)),
        (sklearn_pipeline(two, "A", scale="logit"), -two.decision_function(flat)),
        (sklearn_pipeline(number), number.predict(flat)),
    ]:
        np.testing.assert_allclose(compiled(reward, completions), expected.reshape(3, 2), rtol=1e-5, atol=1e-6)
    margin = make_pipeline(CountVectorizer(analyzer="char"), LinearSVC()).fit(texts, marks)
    for make, told in [
        (lambda: sklearn_pipeline(make_pipeline(CountVectorizer(), LogisticRegression()), "A"), "not fitted"),
        (lambda: sklearn_pipeline(many), "a classifier and no label"),
        (lambda: sklearn_pipeline(many, "E"), "no class 'E'; pass one of"),
        (lambda: sklearn_pipeline(number, "E"), "it is a regressor"),
        (lambda: sklearn_pipeline(margin, "A"), "no predict_proba; use scale='logit'"),
        (lambda: sklearn_pipeline(many, "A", scale="odds"), "scale='odds'"),
        (lambda: sklearn_pipeline(3), "a int, which cannot predict"),
    ]:
        with pytest.raises(LanguageModelError, match=told):
            make()


# ---- errors from the host -------------------------------------------------------------------


def test_errors_come_as_they_were() -> None:
    def fail(kind: type[BaseException]) -> Any:
        def run(x: np.ndarray) -> np.ndarray:
            raise kind("as it was")

        return jax.jit(lambda x: host_call(run, jax.ShapeDtypeStruct((), jnp.float32), x))

    with pytest.raises(KeyboardInterrupt), host_errors():
        jax.block_until_ready(fail(KeyboardInterrupt)(1.0))
    with pytest.raises(jax.errors.JaxRuntimeError, match="as it was"), host_errors():
        jax.block_until_ready(fail(OSError)(1.0))
    with pytest.raises(jax.errors.JaxRuntimeError, match="as it was"):
        jax.block_until_ready(fail(LanguageModelError)(1.0))
    for _ in range(2):
        with pytest.raises(LanguageModelError, match=r"^as it was$"), host_errors():
            jax.block_until_ready(fail(LanguageModelError)(1.0))


def test_interrupts_reach_threads_that_wait_for_workers() -> None:
    pool = worker_pool.WorkerPool(functions.stubborn, "stubborn", 1, None)
    pool.run([("a",)])
    heard: list[bool] = []

    def wait() -> None:
        try:
            pool.run([("b",)])
        except KeyboardInterrupt:
            heard.append(True)

    with host_errors():
        thread = threading.Thread(target=wait)
        thread.start()
        with pytest.raises(KeyboardInterrupt):  # noqa: PT012  (the signal comes when it comes)
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(5)
        thread.join(10)
    assert heard == [True]
    host_call(lambda x: x, jax.ShapeDtypeStruct((), jnp.float32), 1.0)  # and is forgotten


def test_many_large_calls_in_a_loop_come_to_an_end() -> None:
    def total(x: np.ndarray) -> np.ndarray:
        return np.float32(x.mean())

    @jax.jit
    def run(x: Array) -> Array:
        def body(_: Any, x: Array) -> Array:
            return x + host_call(total, jax.ShapeDtypeStruct((), jnp.float32), x)

        return jax.lax.fori_loop(0, 100, body, x)

    assert np.isfinite(np.asarray(run(jnp.full((1000, 256), 1e-9)))).all()

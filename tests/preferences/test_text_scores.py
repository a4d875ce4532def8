"""Scores of texts: what the last layer reads, what is trained underneath, and texts that do not fit."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bayesrl import lm
from bayesrl.errors import PreferenceError
from bayesrl.preferences import PreferenceData, TextScores, bradley_terry, infer, read

TOKENIZER = lm.char_tokenizer("abc ")
CONFIG = lm.GPT2Config(vocab_size=TOKENIZER.vocab_size, max_length=8, width=8, depth=1, heads=2, initializer_range=0.4)
GPT = lm.Pretrained(lm.GPT2.init(jax.random.key(0), CONFIG), TOKENIZER)
JUDGE = lm.Pretrained(
    lm.BertClassifier.init(
        jax.random.key(1),
        lm.BertConfig(
            vocab_size=TOKENIZER.vocab_size, max_length=8, width=8, depth=1, heads=2, inner=8, labels=("a", "b"),
            initializer_range=0.4,
        ),
    ),
    TOKENIZER,
)  # fmt: skip
# Whoever judged likes the letter a.
ANSWERS = ["a", "b", "c", "aa", "ab", "cb", "aac", "bcb"]
PAIRS = [
    {"prompt": prompt, "chosen": one, "rejected": other}
    for prompt in ("b", "c ")
    for one in ANSWERS
    for other in ANSWERS
    if one.count("a") > other.count("a")
]


@pytest.fixture(scope="module")
def data() -> PreferenceData:
    return read(PAIRS)


def test_the_last_layer_reads_the_last_token(data: PreferenceData) -> None:
    reader = TextScores(GPT)
    tokens, mask = reader.tokens_of(data.items)
    features = reader.features_of(tokens, mask)
    assert features.shape == (16, 8)
    model: Any = GPT.model

    @jax.jit
    def by_hand(ids: Any) -> Any:
        hidden, _ = model.extend(ids, jnp.ones(ids.shape, bool), model.start(ids.shape[0]))
        return hidden[-1] / 8**0.5

    for at in (0, 15):
        item = data.items[at]
        ids = [*TOKENIZER.encode([item["prompt"] + item["completion"]])[0], TOKENIZER.eos]
        assert tokens[at][mask[at]].tolist() == ids
        np.testing.assert_allclose(features[at], by_hand(jnp.asarray(ids)), atol=1e-5)


def test_a_classifier_reads_what_it_pools(data: PreferenceData) -> None:
    reader = TextScores(JUDGE)
    tokens, mask = reader.tokens_of(data.items)
    assert mask[:, 0].all()
    features = reader.features_of(tokens, mask)
    judge: Any = JUDGE.model
    logits = jax.jit(jax.vmap(judge))(tokens, mask)
    head = np.asarray(features, np.float32) * 8**0.5 @ np.asarray(judge.head.weight).T + np.asarray(judge.head.bias)
    np.testing.assert_allclose(head, logits, atol=1e-5)


def test_a_posterior_of_the_last_layer_scores_other_texts(data: PreferenceData) -> None:
    reader = TextScores(GPT)
    held_out = read(
        [{"prompt": "b", "chosen": "ba", "rejected": "bc"}, {"prompt": "b", "chosen": "ac", "rejected": "cc"}]
    )
    posterior = infer(jax.random.key(0), bradley_terry(data, features=reader, scale=3.0), num_samples=200)
    assert posterior.log_score().mean > np.log(0.5)
    assert posterior.scores_of(held_out.items).shape == (200, 4)
    np.testing.assert_allclose(posterior.scores_of(data.items), posterior.scores, atol=1e-4)
    model = posterior.model.with_data(held_out)
    np.testing.assert_allclose(
        posterior.draws["weights"] @ model.score_model.features.T,  # type: ignore[attr-defined]
        posterior.scores_of(held_out.items),
        atol=1e-4,
    )
    assert np.isfinite(posterior.log_score(held_out).mean)


@pytest.mark.parametrize(("model", "train"), [(GPT, lm.LoRA(rank=2)), (JUDGE, lm.FullParameters())])
def test_what_is_underneath_is_trained(data: PreferenceData, model: Any, train: Any) -> None:
    program = bradley_terry(data, features=TextScores(model, train=train), batch_size=20)
    with pytest.raises(PreferenceError, match="method='laplace' trains nothing, and the scores have train="):
        infer(jax.random.key(0), program)
    before = infer(jax.random.key(0), bradley_terry(data, features=TextScores(model)), num_samples=100)
    after = infer(jax.random.key(0), program, method="fit", num_steps=80, num_samples=100)
    assert after.log_score().mean > before.log_score().mean + 0.05
    # The model of the posterior stands on what was trained, and any method takes it.
    reader: Any = after.model.score_model
    assert reader.source.train is None
    assert any(
        bool((a != b).any())
        for a, b in zip(
            jax.tree.leaves(reader.source.features_of(*reader.source.tokens_of(data.items[:2]))),
            jax.tree.leaves(TextScores(model).features_of(*reader.source.tokens_of(data.items[:2]))),
            strict=True,
        )
    )
    np.testing.assert_allclose(after.scores_of(data.items), after.scores, atol=1e-3)


def test_conversations_are_written_by_the_chat_template() -> None:
    pytest.importorskip("jinja2")
    template = "{% for m in messages %}{{ m.content }}{{ ' ' if m.role == 'user' else eos_token }}{% endfor %}"
    talking = replace(TOKENIZER, config={"chat_template": template})
    talk = [{"prompt": [{"role": "user", "content": "b"}], "chosen": [{"role": "assistant", "content": "a"}],
             "rejected": [{"role": "assistant", "content": "c"}]}]  # fmt: skip
    rows = TextScores(lm.Pretrained(GPT.model, talking)).encode(read(talk).items)
    assert TOKENIZER.decode(rows) == ["b a", "b c"]
    assert [row[-1] for row in rows] == [TOKENIZER.eos] * 2


def test_texts_longer_than_the_context_are_counted_and_never_cut() -> None:
    long = {"prompt": "a", "chosen": "bbbbbbbbb", "rejected": "c"}
    data = read([PAIRS[0], long, PAIRS[1], {**long, "chosen": "cc cc cc cc"}])
    reader = TextScores(GPT)
    message = r"2 items of \d+, in 2 rows of 4 \(1, 3\), exceed 8 tokens \(the longest has 13\), and nothing is cut"
    with pytest.raises(PreferenceError, match=message):
        bradley_terry(data, features=reader)
    kept = reader.fitting(data)
    assert (len(kept), list(kept.left_out)) == (2, [1, 3])
    assert kept.left_out[1] == "11 tokens, and the context is 8"
    assert kept.records() == [PAIRS[0], PAIRS[1]]
    assert bradley_terry(kept, features=reader).score_model.size == 8
    with pytest.raises(PreferenceError, match="all 1 rows are longer than 8 tokens"):
        reader.fitting(read([long]))
    with pytest.raises(PreferenceError, match="exceed 4 tokens"):
        bradley_terry(data.take([0]), features=TextScores(GPT, max_length=4))


@pytest.mark.parametrize(
    ("records", "model", "message"),
    [
        (
            [{"prompt": [2], "chosen": [3, 1], "rejected": [99]}],
            GPT,
            "item 1 holds token 99, and the model knows 0 to 6; was",
        ),
        (
            [{"prompt": "a", "chosen": [3, 1], "rejected": [2]}],
            GPT,
            "completion is token ids, and its prompt is a text",
        ),
        ([{"prompt": "a", "chosen": "b", "rejected": "c"}], GPT.model, "the model has no tokenizer; pass tokenizer="),
    ],
)
def test_bad_texts_are_refused(records: Any, model: Any, message: str) -> None:
    with pytest.raises(PreferenceError, match=message):
        bradley_terry(read(records), features=TextScores(model))


def test_token_ids_need_no_tokenizer() -> None:
    ids = read([{"prompt": [2], "chosen": [3, 4], "rejected": [5]}])
    assert TextScores(GPT.model).encode(ids.items) == [[2, 3, 4], [2, 5]]


@pytest.mark.usefixtures("unchecked")
def test_bad_options_are_refused() -> None:
    for options in ({"train": 3}, {"max_length": 0}, {"model": 3}):
        with pytest.raises(PreferenceError, match="TextScores got"):
            TextScores(**{"model": GPT, **options})

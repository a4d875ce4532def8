"""Training from texts: the likelihood written out, what training makes of it, and models that are kept."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import optax
import pytest
from numpyro import handlers
from numpyro.infer.util import log_density

import bayesrl
from bayesrl import lm
from bayesrl.cache import cache_folder
from bayesrl.errors import LanguageModelError
from bayesrl.lm import (
    GPT2,
    BertClassifier,
    BertConfig,
    GPT2Config,
    Pretrained,
    char_tokenizer,
    finetuned,
    language_modeling,
    load_pretrained,
    sft,
)
from bayesrl.lm.small_models import cached_model, train_small_lm
from bayesrl.lm.supervised import TextLikelihood

TOKENIZER = char_tokenizer("abc")
CONFIG = GPT2Config(vocab_size=6, max_length=8, width=8, depth=1, heads=2, tied=False, initializer_range=0.4)
TEXT = "abcabcabacabcabcab"
EXAMPLES = [
    {"prompt": "a", "answer": "bc"},
    {"prompt": "bca", "answer": "b"},
    {"prompt": "cc", "answer": ""},
]


@pytest.fixture(scope="module")
def model() -> GPT2:
    return GPT2.init(jax.random.key(3), CONFIG)


def log_likelihood(program: TextLikelihood) -> float:
    @jax.jit
    def run() -> Any:
        return log_density(handlers.seed(program, jax.random.key(0)), (), {}, {})[0]

    return float(run())


def plainly(model: Any, before: str, after: list[int]) -> float:
    """Σ_t log p of tokens after a text, by one run of the model over all of them."""
    (seen,) = TOKENIZER.encode([before])
    logits = eqx.filter_jit(model)(jnp.array(seen + after[:-1]))
    log_probs = np.asarray(jax.nn.log_softmax(logits, -1))
    return float(sum(log_probs[len(seen) - 1 + i, token] for i, token in enumerate(after)))


def test_the_likelihood_of_a_corpus_is_that_of_its_pieces(model: GPT2) -> None:
    program = language_modeling(model, TEXT + "bc", tokenizer=TOKENIZER, length=6, batch_size=9)
    assert program.tokens.shape == (3, 5)
    coded = TOKENIZER.encode([TEXT])[0]
    wanted = sum(plainly(model, TEXT[i], coded[i + 1 : i + 6]) for i in (0, 6, 12))
    assert log_likelihood(program) == pytest.approx(wanted, abs=1e-4)


def test_the_likelihood_of_pairs_is_that_of_answers_and_their_end(model: GPT2) -> None:
    program = sft(Pretrained(model, TOKENIZER), EXAMPLES)
    answers = TOKENIZER.encode([row["answer"] for row in EXAMPLES])
    assert TOKENIZER.eos is not None
    wanted = sum(
        plainly(model, row["prompt"], [*told, TOKENIZER.eos]) for row, told in zip(EXAMPLES, answers, strict=True)
    )
    assert log_likelihood(program) == pytest.approx(wanted, abs=1e-4)
    other = sft(model, [{"prompt": "a", "other": "c"}], answer="other", tokenizer=TOKENIZER)
    assert other.tokens.tolist()[0] == [TOKENIZER.encode(["c"])[0][0], TOKENIZER.eos]


def test_mini_batches_stand_for_all_rows(model: GPT2) -> None:
    program = sft(model, EXAMPLES, tokenizer=TOKENIZER, batch_size=2)
    recorded = handlers.trace(handlers.seed(program, jax.random.key(0))).get_trace()
    assert recorded["row"]["args"] == (3, 2)
    assert recorded["text"]["scale"] == 1.5


def test_training_makes_texts_likelier(model: GPT2) -> None:
    """From about 1.9 nats a token, to less than .4: of 'abc' over and over little is left to guess."""
    program = language_modeling(model, "abc" * 12, tokenizer=TOKENIZER, length=6)
    posterior = bayesrl.fit(jax.random.key(0), program, num_steps=120, optimizer=optax.adam(0.03), progress=False)
    made = finetuned(posterior)
    assert made.tokenizer is TOKENIZER
    before, after = (
        log_likelihood(language_modeling(m, "abc" * 12, tokenizer=TOKENIZER, length=6)) / 30
        for m in (model, made.model)
    )
    assert before < -1.0
    assert after > -0.4
    for now, then in zip(*map(jax.tree.leaves, (model, GPT2.init(jax.random.key(3), CONFIG))), strict=True):
        np.testing.assert_array_equal(now, then)


def test_only_language_models_are_given_back() -> None:
    def coin() -> None:
        x = numpyro.sample("x", numpyro.distributions.Bernoulli(0.5))
        bayesrl.reward("r", 1.0 * x)

    posterior = bayesrl.fit(jax.random.key(0), coin, beta=1.0, num_steps=1, progress=False)
    with pytest.raises(LanguageModelError, match="the posterior holds no language model; fit what"):
        finetuned(posterior)


def test_fields_that_nothing_reads_are_named(model: GPT2) -> None:
    with pytest.warns(UserWarning, match="sft reads 'answer', and nothing reads the fields 'id', 'rejected' of these"):
        sft(model, [{"prompt": "a", "answer": "b", "id": 3, "rejected": "c"}], tokenizer=TOKENIZER)
    # As trainers have it.
    completed = sft(model, [{"prompt": "a", "completion": "b"}], tokenizer=TOKENIZER)
    assert (
        completed.tokens.tolist() == sft(model, [{"prompt": "a", "answer": "b"}], tokenizer=TOKENIZER).tokens.tolist()
    )


@pytest.mark.usefixtures("unchecked")
def test_bad_input(model: GPT2) -> None:
    given: dict[str, Any] = {"tokenizer": TOKENIZER}
    with pytest.raises(LanguageModelError, match="the text has 3 tokens, fewer than one piece of length=5"):
        language_modeling(model, "abc", length=5, **given)
    with pytest.raises(LanguageModelError, match="language_modeling got length=1; use a whole number of at least 2"):
        language_modeling(model, TEXT, length=1, **given)
    with pytest.raises(LanguageModelError, match="batch_size=0"):
        language_modeling(model, TEXT, length=4, batch_size=0, **given)
    with pytest.raises(LanguageModelError, match="pieces of 10 tokens exceed the model's context of 8"):
        language_modeling(model, TEXT, length=10, **given)
    with pytest.raises(LanguageModelError, match="texts need a tokenizer"):
        language_modeling(model, TEXT, length=4)
    with pytest.raises(LanguageModelError, match="the tokenizer has 7 tokens and the model knows 6"):
        language_modeling(model, TEXT, length=4, tokenizer=char_tokenizer("abcd"))
    bert = BertClassifier.init(
        jax.random.key(0),
        BertConfig(vocab_size=6, max_length=8, width=8, depth=1, heads=2, inner=8, labels=("a", "b")),
    )
    with pytest.raises(LanguageModelError, match="model=a BertClassifier; use a Pretrained"):
        language_modeling(bert, TEXT, length=4, **given)
    with pytest.raises(
        LanguageModelError, match=r"example 1 has no text under 'answer'; it has \['prompt', 'wanted'\]"
    ):
        sft(model, [EXAMPLES[0], {"prompt": "a", "wanted": "b"}], **given)
    with pytest.raises(LanguageModelError, match="example 0 has no text under 'answer'"):
        sft(model, [{"prompt": "a", "answer": 3}], **given)
    with pytest.raises(LanguageModelError, match="there are no prompts"):
        sft(model, [], **given)
    with pytest.raises(LanguageModelError, match="a record with one of these under 'prompt'"):
        sft(model, [{"answer": "a"}], **given)
    with pytest.raises(
        LanguageModelError, match="prompts of 3 tokens and answers of up to 8 exceed the model's context of 8"
    ):
        sft(model, [{"prompt": "abc", "answer": "a"}, {"prompt": "a", "answer": "abcabca"}], **given)
    bare = type(TOKENIZER)(TOKENIZER.core)
    with pytest.raises(LanguageModelError, match="no eos token, so an answer could not end"):
        sft(model, EXAMPLES, tokenizer=bare)
    with pytest.raises(LanguageModelError, match="example 1 has no text under 'answer'"):
        train_small_lm(jax.random.key(0), "bad", [EXAMPLES[0], {"prompt": "a"}], TOKENIZER, num_steps=2)


# ---- models that are kept ----------------------------------------------------------------------


@pytest.fixture
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("BAYESRL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


class Training:
    """Counts how often a model was trained."""

    def __init__(self, model: GPT2) -> None:
        self.model, self.count = model, 0

    def __call__(self) -> Pretrained:
        self.count += 1
        return Pretrained(self.model, TOKENIZER)


def assert_same(one: Any, other: Any) -> None:
    for a, b in zip(*map(jax.tree.leaves, (one, other)), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_kept_model_is_trained_once(cache: Path, model: GPT2) -> None:
    train = Training(model)
    first = cached_model("tiny", {"seed": 0, "data": "x"}, train)
    again = cached_model("tiny", {"data": "x", "seed": 0}, train)
    assert train.count == 1
    assert first.folder == again.folder
    assert first.folder is not None
    assert first.folder.parent == cache == cache_folder()
    assert_same(first.model, model)
    assert_same(again.model, model)
    assert again.tokenizer is not None
    assert again.tokenizer.digest == TOKENIZER.digest
    cached_model("tiny", {"seed": 1, "data": "x"}, train)
    cached_model("small", {"seed": 0, "data": "x"}, train)
    assert train.count == 3
    assert len(list(cache.iterdir())) == 3, "nothing temporary is left"


@pytest.mark.parametrize(
    "damage", ["weights", "weights are gone", "config", "config is gone", "tokenizer", "no folder"]
)
def test_a_damaged_folder_is_made_anew(cache: Path, model: GPT2, damage: str) -> None:
    train = Training(model)
    folder = cached_model("tiny", {"seed": 0}, train).folder
    assert folder is not None
    match damage:
        case "weights":
            (folder / "model.safetensors").write_bytes(b"\x00" * 20)
        case "weights are gone":
            (folder / "model.safetensors").unlink()
        case "config":
            (folder / "config.json").write_text('{"model_type"')
        case "config is gone":
            (folder / "config.json").unlink()
        case "tokenizer":
            (folder / "tokenizer.json").write_text("{}")
        case "no folder":
            shutil.rmtree(folder)
            folder.write_text("")
    again = cached_model("tiny", {"seed": 0}, train)
    assert train.count == 2
    assert_same(again.model, model)
    assert_same(cached_model("tiny", {"seed": 0}, train).model, model)
    assert train.count == 2


def test_a_cache_that_cannot_be_written_costs_nothing_but_time(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, model: GPT2
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("BAYESRL_CACHE", str(tmp_path / "file" / "cache"))
    train = Training(model)
    made = cached_model("tiny", {}, train)
    assert made.model is model
    assert train.count == 1


def test_what_json_cannot_hold_is_refused(cache: Path, model: GPT2) -> None:
    with pytest.raises(LanguageModelError, match="what model 'tiny' is made of cannot be written as JSON"):
        cached_model("tiny", {"data": object()}, Training(model))


def test_where_models_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BAYESRL_CACHE", "/else/where")
    assert cache_folder() == Path("/else/where")
    monkeypatch.delenv("BAYESRL_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/own")
    assert cache_folder() == Path("/own/bayesrl")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path.home() / ".cache" / "bayesrl"


@pytest.mark.parametrize("kind", ["text", "pairs"])
def test_small_writer_trains_and_keeps(cache: Path, kind: str) -> None:
    options: dict[str, Any] = {"num_steps": 3, "width": 8, "depth": 1}
    data = TEXT if kind == "text" else EXAMPLES
    if kind == "text":
        options["length"] = 6
    made = train_small_lm(jax.random.key(0), "tiny", data, TOKENIZER, **options)
    room = 32  # beyond the longest text, for prompts that are longer than those of the data
    assert made.model.config.max_length == room + (6 if kind == "text" else 3 + 2 + 1)
    assert made.folder is not None
    told = json.loads((made.folder / "config.json").read_text())
    assert told["model_type"] == "gpt2"
    again = train_small_lm(jax.random.key(0), "tiny", data, TOKENIZER, **options)
    assert again.folder == made.folder
    assert_same(load_pretrained(made.folder).model, made.model)
    assert len(list(cache.iterdir())) == 1


def test_labels_need_a_model_and_a_tokenizer_that_fit() -> None:
    tokenizer = lm.char_tokenizer("abcdefgh")
    config = lm.BertConfig(vocab_size=4, max_length=8, width=4, depth=1, heads=2, inner=8, labels=("no", "yes"))
    judge = lm.BertClassifier.init(jax.random.key(0), config)
    with pytest.raises(LanguageModelError, match="has 11 tokens and the model knows 4"):
        lm.classification(judge, ["a"], ["no"], tokenizer=tokenizer)
    several = dataclasses.replace(config, problem="multi_label_classification")
    with pytest.raises(LanguageModelError, match="model of multi_label_classification, and would teach it one label"):
        lm.classification(
            lm.BertClassifier.init(jax.random.key(0), several), ["a"], ["no"], tokenizer=lm.char_tokenizer("a")
        )
    with pytest.raises(LanguageModelError, match="label 'perhaps' is not one of the model's"):
        lm.classification(judge, ["a"], ["perhaps"], tokenizer=lm.char_tokenizer("a"))
    with pytest.raises(LanguageModelError, match="1 text and 2 labels; pass one label for each"):
        lm.classification(judge, ["a"], ["no", "yes"], tokenizer=lm.char_tokenizer("a"))


def test_a_text_that_is_cut_keeps_the_token_that_closes_it() -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer = lm.char_tokenizer("abcd")
    first, last = tokenizer.pad, tokenizer.eos
    tokenizer.core.post_processor = TemplateProcessing(
        single="<pad> $A <eos>", special_tokens=[("<pad>", first), ("<eos>", last)]
    )
    config = lm.BertConfig(vocab_size=9, max_length=8, width=4, depth=1, heads=2, inner=8, labels=("no", "yes"))
    judge = lm.BertClassifier.init(jax.random.key(0), config)
    rows = lm.classification(judge, ["abcdab", "a"], ["no", "yes"], tokenizer=tokenizer, length=4)
    a, b = tokenizer.encode(["ab"], special=False)[0]
    assert rows.tokens.tolist() == [[first, a, b, last], [first, a, last, first]]
    assert rows.mask.tolist() == [[True] * 4, [True] * 3 + [False]]


def test_a_judge_learns_its_labels() -> None:
    """Letters that never stand together are told apart after 60 steps, every one of them."""
    texts = ["abab", "ba", "aab", "cdc", "dd", "ccd"]
    judge = lm.train_small_classifier(
        jax.random.key(0), "letters", texts, ["ab"] * 3 + ["cd"] * 3, lm.char_tokenizer("abcd"), num_steps=60, width=8
    )
    program = lm.classification(judge, texts, ["ab"] * 3 + ["cd"] * 3)
    logits = jax.jit(jax.vmap(judge.model))(program.tokens, program.mask)  # type: ignore[arg-type]
    assert np.asarray(logits).argmax(-1).tolist() == [0, 0, 0, 1, 1, 1]

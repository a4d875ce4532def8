"""What reports say of language models: texts and not tokens, escaped, with KL and rewards as they are."""

import re
from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from jax import Array
from readings import adds_up, read_report, several

import bayesrl
from bayesrl.display.section import Section
from bayesrl.errors import LanguageModelError, PolicyError
from bayesrl.lm import (
    GPT2,
    CausalLMDistribution,
    FullParameters,
    GPT2Config,
    Pretrained,
    byte_tokenizer,
    char_tokenizer,
    encode_prompts,
    estimate_kl,
    finetuned,
    policy,
    rewards,
    sample_texts,
    text_sections,
    train_bpe,
)
from bayesrl.lm.prompted_policy import PromptedPolicy
from bayesrl.lm.report import color_tokens, subset_evenly, token_pieces
from bayesrl.lm.text_samples import prefix_rewards
from bayesrl.posterior.posterior import Posterior
from bayesrl.report.fit_figures import best_over_all_data
from bayesrl.report.site_panels import value_text

TOKENIZER = char_tokenizer('<&"a')
T = 3
TITLES = [
    "Samples, token by token",
    "Reward and KL by position",
    "Length and reward",
    "Prompts where the policy collapsed",
    "Before and after, on held-out prompts",
]


@jax.jit
def by_step(sentences: CausalLMDistribution, tokens: Array) -> Array:
    return sentences.log_prob_by_step(tokens)


@pytest.fixture(scope="module")
def writer() -> PromptedPolicy:
    shape = GPT2Config(vocab_size=7, max_length=6, width=8, depth=1, heads=2, tied=False, initializer_range=0.4)
    return policy(
        Pretrained(GPT2.init(jax.random.key(0), shape), TOKENIZER),
        ["<", "a&"],
        reward={
            "open": rewards.token_reward(lambda tokens, mask: 1.0 * jnp.sum((tokens == 3) & mask)),
            "brief": -0.2 * rewards.length(),
        },
        metrics={"length": rewards.length()},
        max_new_tokens=T,
    )


@pytest.fixture(scope="module")
def posterior(writer: PromptedPolicy) -> Posterior:
    return bayesrl.fit(
        jax.random.key(0),
        writer,
        beta=0.5,
        guide=FullParameters(),
        num_steps=60,
        optimizer=optax.adam(0.02),
        progress=False,
    )


@pytest.fixture(scope="module")
def sections(posterior: Posterior) -> list[Section]:
    return text_sections(jax.random.key(0), posterior, held_out=encode_prompts(["aa", '"'], TOKENIZER))


def test_kl_is_that_of_all_sentences(writer: PromptedPolicy, posterior: Posterior) -> None:
    """The whole and each of three positions within 5 standard errors: 2.4e-6 false alarms; far quieter than ratios."""
    whole = estimate_kl(jax.random.key(1), posterior, 800)
    by_position = estimate_kl(jax.random.key(1), posterior, 800, by_position=True)
    asked = writer.prompts
    ours, theirs = (
        writer.distribution(m, asked.tokens, asked.mask) for m in (finetuned(posterior).model, writer.model)
    )
    rows = jnp.asarray(np.repeat(np.asarray(ours.finite_values)[:, None], 2, 1))
    log_q, log_p = (np.asarray(by_step(one, rows), float) for one in (ours, theirs))
    q = np.exp(log_q.sum(-1))
    exact = (q[..., None] * (log_q - log_p)).sum(0).mean(0)
    assert exact.sum() > 0.2
    assert abs(whole.mean - exact.sum()) < 5 * whole.se
    assert (np.abs(by_position.mean - exact) < 5 * by_position.se + 1e-5).all()
    ratio = (log_q - log_p).sum(-1)
    spread = np.sqrt(((q * ratio**2).sum(0) - (q * ratio).sum(0) ** 2).sum()) / 2
    assert whole.se < 0.7 * spread / 800**0.5


def test_samples_are_scored_under_both_models(writer: PromptedPolicy, posterior: Posterior) -> None:
    samples = sample_texts(jax.random.key(2), posterior, 50)
    asked = writer.prompts
    for written in samples[1:]:
        assert written.tokens.shape == (50, 2, T)
        for found, model in ((written.log_q, finetuned(posterior).model), (written.log_prior, writer.model)):
            wanted = by_step(writer.distribution(model, asked.tokens, asked.mask), written.tokens)
            np.testing.assert_allclose(found, wanted, atol=1e-4)
        length = written.mask.sum(-1)
        np.testing.assert_array_equal(written.metrics["length"], length)
        np.testing.assert_allclose(written.reward, (written.tokens == 3).sum(-1) - 0.2 * length, atol=1e-6)
        assert (written.log_ratio[~written.mask] == 0).all()
    assert samples.fitted.reward.mean() > samples.prior.reward.mean()
    so_far = prefix_rewards(writer, samples.prompts, samples.fitted, np.arange(T))
    np.testing.assert_allclose(so_far[-1], samples.fitted.reward, atol=1e-6)
    np.testing.assert_allclose(so_far[0], (samples.fitted.tokens[..., 0] == 3) - 0.2, atol=1e-6)


def test_sections_of_a_language_model(sections: list[Section]) -> None:
    assert [section.title for section in sections] == TITLES
    table = sections[0].body
    assert [row[0] for row in table[1:]].count("median") == 1
    assert {"best", "worst"} <= {row[0] for row in table}
    scores = [float(row[1].replace("−", "-")) for row in table[1:]]
    assert scores[0] == max(scores)
    assert scores[-1] == min(scores)
    assert {row[0] for row in sections[-1].body[1:]} == {"aa", '"'}
    assert re.search(r"\d of 2 prompts have kept less than 10%", sections[3].caption)


def test_a_report_holds_texts(posterior: Posterior, sections: list[Section], tmp_path: Path) -> None:
    path = bayesrl.write_report(jax.random.key(0), tmp_path / "report.html", posterior, sections)
    page = path.read_text(encoding="utf-8")
    for title in TITLES:
        assert title in page
    assert re.search(r'<span style="background:rgba\([\d,.]+\)" title="[+-][\d.]+ nats">&lt;</span>', page)
    assert ">&quot;&quot;&quot;<" in page, "draws are shown as text: the best is three times token 3"
    assert "[3, 3" not in page
    assert "[3 3" not in page
    told, _ = read_report(page)
    assert several(told) == {}
    assert adds_up(told, "0.5")


def test_tokens_are_escaped_and_coloured() -> None:
    tokens = np.array([*TOKENIZER.encode(['<&"a'])[0], TOKENIZER.eos, TOKENIZER.pad])
    mask = np.array([True] * 5 + [False])
    shown = color_tokens(TOKENIZER, tokens, mask, np.array([1.53, -3.0, 9.0, 0.0, -0.31, 0.0]))
    spans = re.findall(r'<span style="background:rgba\((.*?)\)" title="(.*?)">(.*?)</span>', shown)
    assert [span[2] for span in spans] == ["&lt;", "&amp;", "&quot;", "a", "∎"]
    assert [span[1] for span in spans] == ["+1.53 nats", "-3.00 nats", "+9.00 nats", "+0.00 nats", "-0.31 nats"]
    blue, orange = "30,120,220", "230,120,20"
    strengths = [f"{blue},0.28", f"{orange},0.55", f"{blue},0.55", f"{orange},0.00", f"{orange},0.06"]
    assert [span[0] for span in spans] == strengths
    assert ">1 </span>" in color_tokens(None, np.array([1, 2]), np.array([True, True]), np.zeros(2))


TEXTS = ["naïve café", "日本語 and ascii", "🙂🙃 ok", "", "plain"]


@pytest.mark.parametrize("name", ["pairs", "bytes"])
def test_pieces_add_up_to_the_text(name: str) -> None:
    tokenizer = train_bpe(["naïve café 日本", "plain and ascii"], 266) if name == "pairs" else byte_tokenizer()
    for text, row in zip(TEXTS, tokenizer.encode(TEXTS), strict=True):
        for count in range(len(row) + 1):
            cut = np.array(row[:count], int)
            pieces = token_pieces(tokenizer, cut)
            assert len(pieces) == count
            # Cut inside of a character, too: then what is not whole stands at the end.
            assert "".join(pieces) == tokenizer.decode([cut])[0]
        assert tokenizer.eos is not None
        ended = token_pieces(tokenizer, np.array([*row, tokenizer.eos]))
        assert "".join(ended) == text + "∎"


def test_prompts_are_taken_evenly() -> None:
    asked = encode_prompts([f"{'a' * (i + 1)}" for i in range(10)], TOKENIZER)
    few = subset_evenly(asked, 4)
    assert [len(row["prompt"]) for row in few.examples] == [1, 4, 7, 10]
    assert few.mask.sum(-1).tolist() == [1, 4, 7, 10]
    assert subset_evenly(asked, 10) is asked


def test_prompts_stand_beside_others() -> None:
    few, longer = encode_prompts(["<", "a<"], TOKENIZER), encode_prompts(['&a"<'], TOKENIZER)
    both = few.concatenate(longer)
    assert both.tokens.shape == (3, 4)
    assert both.mask.sum(-1).tolist() == [1, 2, 4]
    assert TOKENIZER.decode([np.asarray(row[kept]).tolist() for row, kept in zip(both.tokens, both.mask, strict=True)])
    assert [row["prompt"] for row in both.take([2, 0])] == ['&a"<', "<"]
    assert jnp.array_equal(longer.concatenate(few).tokens[0], longer.tokens[0])


def test_later_prompts_are_looked_at(posterior: Posterior) -> None:
    with pytest.raises(LanguageModelError, match="has 6 tokens, and with max_new_tokens=3 exceeds the model's context"):
        posterior.sample(jax.random.key(0), 2, encode_prompts(["<<<<<<"], TOKENIZER))
    with pytest.raises(LanguageModelError, match="the prompts were encoded by another tokenizer"):
        posterior.estimate(jax.random.key(0), 2, encode_prompts(["x"], char_tokenizer("xyz&")))


def test_both_models_answer_every_prompt(posterior: Posterior) -> None:
    asked = encode_prompts(["<", "a&", '"'], TOKENIZER)
    written = sample_texts(jax.random.key(3), posterior, 4, asked)
    last = written.of(slice(2, 3))
    assert [row["prompt"] for row in last.prompts] == ['"']
    assert np.array_equal(last.fitted.tokens, written.fitted.tokens[:, 2:])
    assert np.array_equal(last.prior.log_q, written.prior.log_q[:, 2:])


def test_texts_are_read_where_a_fit_saw_mini_batches(writer: PromptedPolicy) -> None:
    part = policy(
        Pretrained(writer.model, TOKENIZER),
        ["<", "a&", '"'],
        reward=rewards.length(),
        max_new_tokens=T,
        batch_size=2,
    )
    fit = bayesrl.fit(jax.random.key(0), part, beta=1.0, guide=FullParameters(), num_steps=1, progress=False)
    whole = best_over_all_data(fit)
    assert whole.draws["text"].shape[-2:] == (3, T)
    assert value_text(whole, "text", np.array([5, 3, 4])) == TOKENIZER.decode([[5, 3, 4]])[0]


def test_other_posteriors_are_refused(posterior: Posterior) -> None:
    with pytest.raises(LanguageModelError, match="num_samples=0"):
        sample_texts(jax.random.key(0), posterior, 0)
    with pytest.raises(LanguageModelError, match="estimate_kl got num_samples=1; use a whole number of at least 2"):
        estimate_kl(jax.random.key(0), posterior, 1)

    def bandit() -> None:
        arm = numpyro.sample("arm", dist.Categorical(logits=jnp.zeros(3)))
        bayesrl.reward("payoff", 1.0 * arm)

    other = bayesrl.fit(jax.random.key(0), bandit, beta=1.0, num_steps=1, progress=False)
    for ask in (text_sections, partial(sample_texts, num_samples=2)):
        with pytest.raises(LanguageModelError, match="the posterior holds no language model"):
            ask(jax.random.key(0), other)
    with pytest.raises(PolicyError, match="loaded without its policy"):
        text_sections(jax.random.key(0), replace(posterior, programs=None))

"""What a language model writes: probabilities add up, samples have them, and they are those of a plain loop.

Models have five tokens and write three, so that every sentence can be listed. Frequencies are compared by χ², cells
of fewer than 5 expected counts taken together; a test fails below p = 1e-6, and there are 10 comparisons: 1e-5 false
alarms in all.
"""

import functools
import itertools
import math
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import pytest
from jax import Array
from numpyro import handlers
from scipy import stats

from bayesrl.errors import LanguageModelError
from bayesrl.lm.text_distribution import CausalLMDistribution, TokenSequences, truncation_mask
from bayesrl.lm.transformers.gpt2 import GPT2, GPT2Config
from bayesrl.lm.transformers.llama import Llama
from bayesrl.lm.transformers.llama_config import LlamaConfig

V, T = 5, 3
CONFIG = GPT2Config(vocab_size=V, max_length=8, width=8, depth=1, heads=2, tied=False, initializer_range=0.4)
PROMPT = jnp.array([[0, 0, 3], [2, 4, 1]])
REAL = jnp.array([[False, False, True], [True, True, True]])
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "eos": {"eos": 1, "pad": 0},
    "ends": {"eos": (1, 4), "pad": 0},
    "top_k": {"top_k": 2},
    "top_p": {"top_p": 0.7, "eos": 1},
    "min_p": {"min_p": 0.3},
    "everything": {"temperature": 0.7, "top_k": 4, "top_p": 0.95, "min_p": 0.15, "eos": 1, "pad": 2},
}


@pytest.fixture(scope="module")
def model() -> GPT2:
    return made()


@functools.cache
def made() -> GPT2:
    return GPT2.init(jax.random.key(3), CONFIG)


@pytest.fixture(scope="module")
def other() -> GPT2:
    return GPT2.init(jax.random.key(4), CONFIG)


def text(model: Any, **options: Any) -> CausalLMDistribution:
    return CausalLMDistribution(model, PROMPT, REAL, num_steps=T, **options)


def listed(sentences: CausalLMDistribution) -> Array:
    """All sentences, for each of the two prompts: [sentences, 2, T]."""
    rows = np.asarray(sentences.finite_values)
    return jnp.asarray(np.repeat(rows[:, None], 2, 1))


@jax.jit
def by_step(sentences: CausalLMDistribution, tokens: Array) -> Array:
    return sentences.log_prob_by_step(tokens)


@functools.partial(jax.jit, static_argnums=2)
def sampled(sentences: CausalLMDistribution, key: Array, number: int) -> Array:
    return sentences.sample(key, (number,))


@functools.cache
def scored(name: str) -> tuple[Array, np.ndarray]:
    """All sentences, and their log-probabilities token by token, [sentences, 2, T]."""
    sentences = text(made(), **OPTIONS[name])
    every = listed(sentences)
    return every, np.asarray(by_step(sentences, every), float)


def may_follow(log_probs: np.ndarray, top_k: int | None, top_p: float, min_p: float) -> np.ndarray:
    """Which tokens a truncation leaves, one at a time from the likeliest on."""
    order = np.argsort(-log_probs)[:top_k]
    shares = np.exp(log_probs[order])
    shares /= shares.sum()
    kept, mass = [], 0.0
    for token, share in zip(order, shares, strict=True):
        if mass >= top_p or share < min_p * shares[0]:
            break
        kept.append(token)
        mass += share
    return np.isin(np.arange(len(log_probs)), kept)


def plain_loop(model: Any, prompt: list[int], tokens: list[int], options: dict[str, Any]) -> list[float]:
    """Log-probability token by token, each by a run of the model over all that came before it."""
    eos, found, done = options.get("eos"), [], False
    ends = eos if isinstance(eos, tuple) else (eos,)
    for step, token in enumerate(tokens):
        if done:
            found.append(0.0)
            continue
        seen = jnp.array(prompt + tokens[:step])
        logits = np.asarray(model(seen)[-1], float) / options.get("temperature", 1.0)
        log_probs = logits - np.log(np.exp(logits).sum())
        fine = may_follow(log_probs, options.get("top_k"), options.get("top_p", 1.0), options.get("min_p", 0.0))
        log_probs = np.where(fine, log_probs - np.log(np.exp(log_probs[fine]).sum()), -np.inf)
        found.append(float(log_probs[token]))
        done = token in ends
    return found


@pytest.mark.parametrize("name", OPTIONS)
def test_probabilities_add_up_to_one(name: str) -> None:
    _, log_prob = scored(name)
    total = log_prob.sum(-1)
    assert total[np.isfinite(total)].std() > 0.1
    np.testing.assert_allclose(np.exp(total).sum(0), 1.0, atol=1e-5)


@pytest.mark.parametrize("name", OPTIONS)
def test_samples_have_the_probabilities_that_they_are_scored_by(model: GPT2, name: str) -> None:
    sentences = text(model, **OPTIONS[name])
    drawn = np.asarray(sampled(sentences, jax.random.key(5), 8192))
    assert drawn.shape == (8192, 2, T)
    every, log_prob = scored(name)
    place = {row.tobytes(): i for i, row in enumerate(np.asarray(every[:, 0], drawn.dtype))}
    for prompt in range(2):
        counts = np.zeros(len(every))
        for row in drawn[:, prompt]:
            counts[place[np.ascontiguousarray(row).tobytes()]] += 1
        expected = len(drawn) * np.exp(log_prob[:, prompt].sum(-1))
        assert counts[expected == 0].sum() == 0, "what is scored as impossible was drawn"
        rare = expected < 5
        found, wanted = (np.append(x[~rare], x[rare].sum()) for x in (counts, expected))
        used = wanted > 0
        assert used.sum() > 4
        statistic = ((found - wanted)[used] ** 2 / wanted[used]).sum()
        assert stats.chi2.sf(statistic, used.sum() - 1) > 1e-6


@pytest.mark.parametrize("name", OPTIONS)
def test_log_probabilities_are_those_of_a_plain_loop(model: GPT2, name: str) -> None:
    every, log_prob = scored(name)
    run = eqx.filter_jit(model)
    rows = range(0, len(every), max(1, len(every) // 6))
    for i, j in itertools.product(rows, range(2)):
        wanted = plain_loop(run, PROMPT[j][REAL[j]].tolist(), every[i, j].tolist(), OPTIONS[name])
        # Once a token is impossible, what follows it need not agree: neither is ever asked for.
        until = wanted.index(-np.inf) + 1 if -np.inf in wanted else T
        np.testing.assert_allclose(log_prob[i, j, :until], wanted[:until], atol=2e-5)


def test_another_architecture_adds_up_too() -> None:
    shape = LlamaConfig(
        vocab_size=V, max_length=8, width=8, depth=1, heads=2, kv_heads=1, inner=8, initializer_range=0.6
    )
    sentences = text(Llama.init(jax.random.key(0), shape), eos=1)
    log_prob = np.asarray(by_step(sentences, listed(sentences)).sum(-1), float)
    assert log_prob.std() > 0.1
    np.testing.assert_allclose(np.exp(log_prob).sum(0), 1.0, atol=1e-5)


def test_what_stands_behind_the_end_counts_nothing_and_is_padding(model: GPT2) -> None:
    sentences = text(model, eos=1, pad=0)
    tokens = jnp.array([[2, 1, 0], [2, 1, 3], [2, 1, 1], [1, 0, 0], [1, 1, 0]])[:, None].repeat(2, 1)
    found = np.asarray(by_step(sentences, tokens))
    assert (found[0, :, 2] == 0).all()
    assert (found[[1, 2], :, 2] == -np.inf).all()
    assert (found[3, :, 1:] == 0).all()
    assert (found[4, :, 1] == -np.inf).all()
    assert (found[:, :, 0] < 0).all()
    assert np.isfinite(found[:, :, 0]).all()
    np.testing.assert_array_equal(
        sentences.text_mask(tokens)[:, 0],
        [[True, True, False], [True, True, False], [True, True, False], [True, False, False], [True, False, False]],
    )


def test_what_fills_the_left_of_a_prompt_does_not_matter(model: GPT2) -> None:
    every, log_prob = scored("plain")
    tokens, plain = every[::7], log_prob[::7]
    filled = CausalLMDistribution(model, jnp.where(REAL, PROMPT, 4), REAL, num_steps=T)
    np.testing.assert_allclose(by_step(filled, tokens), plain, atol=1e-5)
    bare = CausalLMDistribution(model, PROMPT[:1, 2:], num_steps=T)
    np.testing.assert_allclose(by_step(bare, tokens[:, :1]), plain[:, :1], atol=1e-5)


def test_short_and_long_prompts_are_scored_alike(model: GPT2) -> None:
    """Four tokens after one are read along with it; after two, one of them padding, from a cache."""
    short = CausalLMDistribution(model, jnp.array([[3]]), num_steps=4, eos=1)
    padded = CausalLMDistribution(model, jnp.array([[0, 3]]), jnp.array([[False, True]]), num_steps=4, eos=1)
    tokens = sampled(short, jax.random.key(0), 20)
    found = by_step(short, tokens)
    assert np.isfinite(found).all()
    np.testing.assert_allclose(found, by_step(padded, tokens), atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"eos": 1, "pad": 0, "temperature": 0.5}])
def test_the_mean_of_kl_by_step_is_the_kl(model: GPT2, other: GPT2, options: dict[str, Any]) -> None:
    ours, theirs = text(model, **options), text(other, **options)
    every = listed(ours)
    log_p, log_q = (np.asarray(by_step(one, every).sum(-1), float) for one in (ours, theirs))
    kl = (np.exp(log_p) * (log_p - log_q)).sum(0)
    found = np.asarray(jax.jit(lambda a, b: a.kl_by_step(b, every))(ours, theirs), float)
    assert (kl > 0.05).all()
    assert found.min() > -1e-6
    np.testing.assert_allclose((np.exp(log_p)[..., None] * found).sum((0, -1)), kl, rtol=1e-4)


def test_a_fitted_model_keeps_to_the_tokens_of_its_reference(model: GPT2, other: GPT2) -> None:
    reference = text(model, top_k=2)
    kept, free = text(other, top_k=2, support_model=model), text(other, top_k=2)
    every = listed(reference)
    log_p, log_q, log_free = (np.asarray(by_step(one, every).sum(-1), float) for one in (reference, kept, free))
    np.testing.assert_array_equal(np.isfinite(log_q), np.isfinite(log_p))
    assert (np.isfinite(log_free) & ~np.isfinite(log_p)).any(), "this model would go elsewhere by itself"
    np.testing.assert_allclose(np.exp(log_q).sum(0), 1.0, atol=1e-5)
    possible = np.isfinite(log_p)
    kl = np.where(possible, np.exp(log_q) * np.where(possible, log_q - np.where(possible, log_p, 0), 0), 0).sum(0)
    steps = np.asarray(jax.jit(lambda a, b: a.kl_by_step(b, every))(kept, reference), float)
    np.testing.assert_allclose(
        np.where(possible[..., None], np.exp(log_q)[..., None] * steps, 0).sum((0, -1)), kl, rtol=1e-4
    )
    drawn = sampled(kept, jax.random.key(1), 500)
    assert np.isfinite(by_step(reference, drawn)).all()


@pytest.mark.parametrize(("eos", "pad"), [(None, 0), (2, 2), (2, 0), (0, 3), ((2,), 2), ((0, 3), 0), ((1, 2, 3), 1)])
def test_all_sentences_are_listed_once(eos: int | tuple[int, ...] | None, pad: int) -> None:
    every = TokenSequences(4, 3, eos, pad)
    ends = eos if isinstance(eos, tuple) else (eos,)
    wanted = set()
    for tokens in itertools.product(range(4), repeat=3):
        length = next((i + 1 for i, token in enumerate(tokens) if token in ends), 3)
        wanted.add(tokens[:length] + (pad,) * (3 - length))
    rows = [tuple(row) for row in np.asarray(every).tolist()]
    assert len(rows) == len(every) == len(wanted)
    assert set(rows) == wanted
    assert tuple(every[0].tolist()) == rows[0]


def test_sentences_are_listed_where_they_are_few(model: GPT2) -> None:
    assert text(model).finite_values == TokenSequences(V, T, None, 0)
    many = GPT2.init(jax.random.key(0), GPT2Config(vocab_size=2000, max_length=8, width=4, depth=1, heads=1))
    assert CausalLMDistribution(many, PROMPT, num_steps=2).finite_values is None


def test_truncation_lets_ties_in_and_always_the_likeliest() -> None:
    logits = jnp.log(jnp.array([0.4, 0.3, 0.3, 0.0]))
    assert truncation_mask(logits, 1, 1.0).tolist() == [True, False, False, False]
    assert truncation_mask(logits, 2, 1.0).tolist() == [True, True, True, False]
    assert truncation_mask(logits, None, 0.4).tolist() == [True, False, False, False]
    assert truncation_mask(logits, None, 0.41).tolist() == [True, True, True, False]
    assert truncation_mask(logits, None, 1e-6).tolist() == [True, False, False, False]
    assert truncation_mask(logits, 9, 1.0).tolist() == [True] * 4


def test_gradients_of_log_probabilities(model: GPT2) -> None:
    """Σ_x p(x)·∇log p(x) = 0, and along one direction it is what differences say."""
    name = "everything"
    every, log_prob = scored(name)
    arrays, rest = eqx.partition(model, eqx.is_array)
    weight = np.exp(log_prob.sum(-1)).astype(np.float32)

    def mean(arrays: Any, weight: Array) -> Array:
        log_prob = text(eqx.combine(arrays, rest), **OPTIONS[name]).log_prob(every)
        return jnp.where(weight != 0, weight * jnp.where(weight != 0, log_prob, 0.0), 0.0).sum()

    both = jax.jit(jax.value_and_grad(mean))
    assert max(np.abs(leaf).max() for leaf in jax.tree.leaves(jax.device_get(both(arrays, weight)[1]))) < 1e-4
    chosen = np.array(weight)
    chosen[::2] = 0.0
    rng, here = np.random.default_rng(9), jax.device_get(arrays)
    way = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), here)
    gradient = jax.device_get(both(arrays, chosen)[1])
    slope = sum(np.vdot(a, b) for a, b in zip(*map(jax.tree.leaves, (gradient, way)), strict=True))
    ahead, behind = (
        both(jax.tree.map(lambda a, w, sign=sign: a + np.float32(sign * 1e-3) * w, here, way), chosen)[0]
        for sign in (1, -1)
    )
    assert abs(float(slope)) > 0.05
    # Differences of float32 numbers of size 10 over 2e-3: rounding of about 1e-3, and terms of third order.
    assert float(ahead - behind) / 2e-3 == pytest.approx(float(slope), rel=0.02, abs=5e-3)


def test_gradients_of_kl_are_finite_where_tokens_are_left_out(model: GPT2, other: GPT2) -> None:
    tokens = sampled(text(model, top_k=2), jax.random.key(0), 8)

    @eqx.filter_jit
    @eqx.filter_grad
    def gradient(fitted: GPT2) -> Array:
        return text(fitted, top_k=2, support_model=model).kl_by_step(text(model, top_k=2), tokens).sum()

    leaves = jax.tree.leaves(jax.device_get(gradient(other)))
    assert all(np.isfinite(leaf).all() for leaf in leaves)
    assert max(np.abs(leaf).max() for leaf in leaves) > 1e-3


def test_it_maps_and_is_passed_into_compiled_functions(model: GPT2) -> None:
    tokens = scored("plain")[0][:4]
    wanted = scored("plain")[1][:4].sum(-1)

    def one(prompt: Array, mask: Array, tokens: Array) -> Array:
        return CausalLMDistribution(model, prompt, mask, num_steps=T).log_prob(tokens)

    mapped = jax.jit(jax.vmap(one, (0, 0, 1), 1))(PROMPT, REAL, tokens)
    np.testing.assert_allclose(mapped, wanted, atol=1e-5)
    flat, tree = jax.tree.flatten(text(model, eos=1, top_p=0.9))
    again = jax.tree.unflatten(tree, flat)
    assert (again.eos, again.pad, again.top_p, again.num_steps) == (1, 1, 0.9, T)
    assert (again.batch_shape, again.event_shape) == ((2,), (T,))


def test_it_is_a_distribution_of_numpyro(model: GPT2) -> None:
    def program() -> Array:
        with numpyro.plate("prompt", 2):
            return numpyro.sample("text", text(model, eos=1))

    @jax.jit
    def run(key: Array) -> tuple[Array, Array]:
        site = handlers.trace(handlers.seed(program, key)).get_trace()["text"]
        return site["value"], site["fn"].log_prob(site["value"])

    value, log_prob = run(jax.random.key(0))
    assert value.shape == (2, T)
    np.testing.assert_allclose(log_prob, by_step(text(model, eos=1), value).sum(-1), atol=1e-6)
    support = text(model).support
    assert support(value).tolist() == [True, True]
    assert support(value.at[0, 0].set(V)).tolist() == [False, True]


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_steps": 0}, "num_steps=0; use a whole number of at least 1"),
        ({"num_steps": 2.5}, "num_steps=2.5"),
        ({"temperature": 0.0}, "temperature=0.0; use a number above 0"),
        ({"temperature": math.nan}, "temperature=nan"),
        ({"top_k": 0}, "top_k=0; use a whole number of at least 1, or None"),
        ({"top_p": 0.0}, "top_p=0.0; use a number of at most 1 and above 0"),
        ({"top_p": 1.2}, "top_p=1.2"),
        ({"min_p": 1.5}, "min_p=1.5"),
        ({"num_steps": 7}, "prompts of 3 tokens and 7 new ones exceed the model's context of 8"),
    ],
)
def test_options_out_of_range_are_refused(model: GPT2, options: dict[str, Any], message: str) -> None:
    with pytest.raises(LanguageModelError, match=message):
        CausalLMDistribution(model, PROMPT, REAL, **{"num_steps": T, **options})


def test_the_context_is_used_up_to_its_last_place(model: GPT2) -> None:
    """The last token is only written, never read: 3 + 6 tokens fit into a context of 8."""
    sentences = CausalLMDistribution(model, PROMPT, REAL, num_steps=6)
    tokens = sampled(sentences, jax.random.key(0), 2)
    found = np.asarray(by_step(sentences, tokens))
    run = eqx.filter_jit(model)
    np.testing.assert_allclose(found[0, 1], plain_loop(run, PROMPT[1].tolist(), tokens[0, 1].tolist(), {}), atol=2e-5)

"""Transformers against transformers' own logits, with and without a cache, padded and not, in both dtypes."""

import functools
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bayesrl.errors import LanguageModelError
from bayesrl.lm.checkpoints.pretrained import Pretrained, load_pretrained
from bayesrl.lm.transformers.base import CausalLM
from bayesrl.lm.transformers.gpt2 import GPT2, GPT2Config
from bayesrl.lm.transformers.layers.linear_and_norm import Linear, find_activation, is_linear, merge_adapters
from bayesrl.lm.transformers.layers.rope import Rope
from bayesrl.lm.transformers.llama import Llama
from bayesrl.lm.transformers.llama_config import LlamaConfig

GOLDEN = Path(__file__).parents[1] / "golden"
CAUSAL = ["gpt2", "llama", "smollm", "mistral", "qwen2", "qwen3"]
TINY = LlamaConfig(vocab_size=11, max_length=16, width=8, depth=2, heads=2, kv_heads=1, inner=8)


@functools.cache
def golden(name: str) -> tuple[Pretrained, dict[str, np.ndarray]]:
    with np.load(GOLDEN / name / "expected.npz") as arrays:
        return load_pretrained(GOLDEN / name), dict(arrays)


def prompts_in(arrays: dict[str, np.ndarray]) -> tuple[jax.Array, jax.Array]:
    return jnp.asarray(arrays["tokens"], jnp.int32), jnp.asarray(arrays["real"], bool)


@eqx.filter_jit
def logits_of(model: CausalLM, tokens: jax.Array, mask: jax.Array) -> jax.Array:
    def row(tokens: jax.Array, mask: jax.Array) -> jax.Array:
        return model.logits(model.extend(tokens, mask, model.start(len(tokens)))[0])

    return jax.vmap(row)(tokens, mask)


@eqx.filter_jit
def greedy(model: CausalLM, tokens: jax.Array, mask: jax.Array, new: int) -> jax.Array:
    """Generate with one prefill and steps of one token, all rows in step."""
    empty = model.start(tokens.shape[1] + new)
    hidden, caches = jax.vmap(model.extend, (0, 0, None), (0, empty.axes))(tokens, mask, empty)
    feed = jax.vmap(model.extend, (0, 0, empty.axes), (0, empty.axes))

    def step(carry: Any, _: Any) -> tuple[Any, jax.Array]:
        last, caches = carry
        token = jnp.argmax(model.logits(last), -1)
        hidden, caches = feed(token[:, None], jnp.ones((len(token), 1), bool), caches)
        return (hidden[:, -1], caches), token

    caches = eqx.tree_at(lambda cache: cache.length, caches, jnp.asarray(caches.length))
    return jax.lax.scan(step, (hidden[:, -1], caches), None, new)[1].T


@pytest.mark.parametrize("name", CAUSAL)
def test_logits_are_those_of_transformers(name: str) -> None:
    loaded, arrays = golden(name)
    assert loaded.model.config.model_type == {"smollm": "llama"}.get(name, name)
    tokens, mask = prompts_in(arrays)
    logits = logits_of(loaded.model, tokens, mask)
    assert logits.dtype == jnp.float32
    np.testing.assert_allclose(logits[mask], arrays["logits"][np.asarray(mask)], atol=1e-4)
    assert np.isfinite(logits).all(), "padding that sees nothing is finite too"


@pytest.mark.parametrize("name", CAUSAL)
def test_greedy_tokens_are_those_of_transformers(name: str) -> None:
    loaded, arrays = golden(name)
    made = greedy(loaded.model, *prompts_in(arrays), arrays["greedy"].shape[1])
    np.testing.assert_array_equal(made, arrays["greedy"])


def test_bert_scores_are_those_of_transformers() -> None:
    loaded, arrays = golden("bert")
    tokens, mask = prompts_in(arrays)
    score = eqx.filter_jit(eqx.filter_vmap(loaded.model))
    logits = score(tokens, mask)
    assert logits.shape == (3, 3)
    np.testing.assert_allclose(logits, arrays["logits"], atol=1e-4)
    np.testing.assert_allclose(score(jnp.where(mask, tokens, 9), mask), logits, atol=1e-6)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_a_row_is_scored_alike_with_padding_and_without(name: str) -> None:
    loaded, arrays = golden(name)
    tokens, mask = prompts_in(arrays)
    padded = logits_of(loaded.model, jnp.where(mask, tokens, 7), mask)
    for row in range(len(tokens)):
        alone = eqx.filter_jit(loaded.model)(tokens[row][mask[row]])
        np.testing.assert_allclose(padded[row][mask[row]], alone, atol=1e-5)


@pytest.mark.parametrize("name", ["gpt2", "qwen3"])
@pytest.mark.parametrize("static", [True, False])
def test_in_pieces_is_as_in_one_go(name: str, static: bool) -> None:
    loaded, arrays = golden(name)
    tokens, mask = (array[2] for array in prompts_in(arrays))
    model = loaded.model
    whole, at_end = eqx.filter_jit(model.extend)(tokens, mask, model.start(9))

    @eqx.filter_jit
    def pieces(cache: Any) -> Any:
        # The first piece is nothing but padding.
        first, cache = model.extend(tokens[:4], mask[:4], cache)
        second, cache = model.extend(tokens[4:5], mask[4:5], cache)
        third, cache = model.extend(tokens[5:], mask[5:], cache)
        return jnp.concatenate([first, second, third]), cache

    empty = model.start(12)
    if not static:
        empty = eqx.tree_at(lambda cache: (cache.length, cache.count), empty, (jnp.asarray(0), jnp.asarray(0)))
    parts, cache = pieces(empty)
    np.testing.assert_allclose(parts[mask], whole[mask], atol=1e-5)
    assert cache.length == 9
    assert cache.count == at_end.count == 3
    assert cache.mask.sum() == 3
    np.testing.assert_allclose(cache.keys[1][6:9], at_end.keys[1][6:9], atol=1e-5)


@pytest.mark.parametrize("name", ["gpt2", "qwen3"])
def test_gradients_are_finite_with_padding(name: str) -> None:
    loaded, arrays = golden(name)
    tokens, mask = prompts_in(arrays)
    mask = mask.at[0].set(False)

    @eqx.filter_jit
    def gradient(model: CausalLM) -> CausalLM:
        return eqx.filter_grad(lambda model: jnp.sum(logits_of(model, tokens, mask) ** 2))(model)

    leaves = jax.tree.leaves(jax.device_get(gradient(loaded.model)))
    assert all(np.isfinite(leaf).all() for leaf in leaves)
    assert sum(np.abs(leaf).max() > 0 for leaf in leaves) >= len(leaves) - 2


@pytest.mark.parametrize("name", ["gpt2", "qwen3"])
def test_bfloat16(name: str) -> None:
    model = load_pretrained(GOLDEN / name, dtype=jnp.bfloat16).model
    assert {leaf.dtype for leaf in jax.tree.leaves(model)} == {jnp.dtype(jnp.bfloat16)}
    _, arrays = golden(name)
    tokens, mask = prompts_in(arrays)
    logits = logits_of(model, tokens, mask)
    assert logits.dtype == jnp.float32
    # bfloat16 keeps 8 bits: two blocks of a handful of roundings each, on logits of size 1.
    np.testing.assert_allclose(logits[mask], arrays["logits"][np.asarray(mask)], atol=0.05)
    if name == "qwen3":
        assert greedy(model, tokens, mask, 2).shape == (3, 2)


def apply_adapter(model: Any, key: jax.Array, dtype: Any = jnp.float32) -> Any:
    def adapt(part: Any) -> Any:
        if not is_linear(part):
            return part
        out, width = part.weight.shape
        down, up = (0.1 * jax.random.normal(key, shape, dtype) for shape in ((2, width), (out, 2)))
        return Linear(part.weight, part.bias, down, up)

    return jax.tree.map(adapt, model, is_leaf=is_linear)


def test_merging_low_rank_paths_changes_nothing(key: jax.Array) -> None:
    loaded, arrays = golden("llama")
    tokens, mask = prompts_in(arrays)
    model = apply_adapter(loaded.model, key)
    plain, with_paths = logits_of(loaded.model, tokens, mask), logits_of(model, tokens, mask)
    assert jnp.abs(with_paths - plain)[mask].max() > 0.1
    np.testing.assert_allclose(logits_of(merge_adapters(model), tokens, mask)[mask], with_paths[mask], atol=1e-4)
    assert jax.tree.structure(merge_adapters(model)) == jax.tree.structure(loaded.model)


def test_low_rank_paths_may_be_wider_than_the_weights(key: jax.Array) -> None:
    narrow = Linear.init(key, 4, 3, scale=1.0, bias=True, dtype=jnp.bfloat16)
    wide = apply_adapter(narrow, key)
    assert wide(jnp.ones(4, jnp.bfloat16)).dtype == jnp.bfloat16
    assert wide.scores(jnp.ones(4, jnp.bfloat16)).dtype == jnp.float32
    assert wide.merge().weight.dtype == jnp.bfloat16


def test_random_weights_have_the_asked_spread(key: jax.Array) -> None:
    config = GPT2Config(vocab_size=64, max_length=16, width=32, depth=2, heads=4, tied=False, initializer_range=0.1)
    model = GPT2.init(key, config, dtype=jnp.bfloat16)
    assert model.token.weight.dtype == jnp.bfloat16
    # 2048 and 4096 draws: the standard deviation is known to 1.6 % and 1.1 %, and five of these are allowed.
    assert float(model.token.weight.astype(float).std()) == pytest.approx(0.1, rel=0.08)
    assert float(model.blocks[1].narrow.weight.astype(float).std()) == pytest.approx(0.1 / 2, rel=0.06)
    assert not model.blocks[0].mix.bias.any()


def test_rope_stretches() -> None:
    plain = Rope(theta=100.0).frequencies(8)
    np.testing.assert_allclose(plain, 100.0 ** -np.array([0, 0.25, 0.5, 0.75]))
    np.testing.assert_allclose(Rope(100.0, "linear", 4.0).frequencies(8), plain / 4)
    stretched = Rope(100.0, "llama3", 4.0, 1.0, 4.0, 40).frequencies(8)
    # Wavelengths 6, 20, 63 and 199 tokens: left alone below 40/4, stretched above 40/1, in between in between.
    assert stretched[0] == plain[0]
    assert plain[1] / 4 < stretched[1] < plain[1]
    np.testing.assert_allclose(stretched[2:], plain[2:] / 4)


@pytest.mark.parametrize("kind", ["type", "rope_type"])
def test_rope_is_read_from_old_and_new_files(kind: str) -> None:
    old = Rope.from_json({"rope_theta": 5.0, "rope_scaling": {kind: "linear", "factor": 2.0}})
    assert old == Rope(5.0, "linear", 2.0)
    assert Rope.from_json({"rope_parameters": {"rope_theta": 5.0, kind: "linear", "factor": 2.0}}) == old
    assert Rope.from_json({"rope_theta": 5.0, "rope_scaling": None}) == Rope(5.0)
    assert Rope.from_json(old.to_json()) == old


def test_capacity_is_checked(key: jax.Array) -> None:
    model = eqx.filter_eval_shape(Llama.init, key, TINY)
    for capacity in (0, 17):
        with pytest.raises(LanguageModelError, match=f"cache for {capacity} tokens.*context is 16 tokens"):
            model.start(capacity)
    with pytest.raises(LanguageModelError, match="3 tokens do not fit into a cache of capacity 2 that holds 0"):
        model.extend(jnp.zeros(3, int), jnp.ones(3, bool), model.start(2))


def test_sizes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(LanguageModelError, match="kv_heads must divide heads"):
        LlamaConfig(vocab_size=11, max_length=16, width=12, depth=2, heads=3, kv_heads=2, inner=8)
    with pytest.raises(LanguageModelError, match="unknown activation 'tanhshrink'; bayesrl knows gelu"):
        find_activation("tanhshrink")

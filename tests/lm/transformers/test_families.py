"""Every family against transformers' own logits and greedy texts, the head tied and not, in a cache and out of it."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from bayesrl.errors import LanguageModelError
from bayesrl.lm.checkpoints.pretrained import load_pretrained, save_pretrained
from bayesrl.lm.transformers.base import CausalLM
from bayesrl.lm.transformers.layers.linear_and_norm import ACTIVATIONS, find_activation
from bayesrl.lm.transformers.layers.rope import Rope
from bayesrl.lm.transformers.llama_config import LlamaConfig
from bayesrl.lm.transformers.registry import FAMILIES
from tests.lm.checkpoints.test_checkpoints import arrays_in, assert_same
from tests.lm.transformers.test_transformers import golden, greedy, prompts_in

GOLDEN = Path(__file__).parents[1] / "golden"
NEW = [
    *("gemma", "gemma2", "gemma3", "phi3", "phi3_long", "olmo2", "smollm3", "neox", "neox_serial"),
    *("mistral_window", "qwen2_window", "mixtral", "llama_yarn", "llama_dynamic"),
]
CAUSAL = [*NEW, "gpt2", "llama", "qwen2"]
ENCODER_NAMES = ["roberta", "distilbert", "modernbert", "modernbert_mean"]
CLOSE = 1e-5
"""How near logits of these sizes are in float32; the largest are 1 to 4."""


def read(model: CausalLM, tokens: Any, mask: Any) -> tuple[Any, Any]:
    """Read rows at once by a program that is compiled quickly rather than well."""

    def rows(tokens: Any, mask: Any) -> tuple[Any, Any]:
        hidden = jax.vmap(lambda row, there: model.extend(row, there, model.start(len(row)))[0])(tokens, mask)
        return hidden, model.logits(hidden)

    program = jax.jit(rows).lower(tokens, mask).compile({"xla_backend_optimization_level": 0})
    hidden, logits = program(tokens, mask)
    return hidden, logits


def with_other_head(name: str, folder: Path) -> Path:
    """Copy a checkpoint and tie its head, or give it the table turned round for one."""
    shutil.copytree(GOLDEN / name, folder)
    arrays = {key: array for path in folder.glob("*.safetensors") for key, array in load_file(path).items()}
    settings = json.loads((folder / "config.json").read_text())
    head = "embed_out.weight" if settings["model_type"] == "gpt_neox" else "lm_head.weight"
    table = next(key for key in arrays if key.endswith(("wte.weight", "embed_tokens.weight", "embed_in.weight")))
    if arrays.pop(head, None) is None:
        arrays[head] = np.ascontiguousarray(arrays[table][::-1])
    settings["tie_word_embeddings"] = head not in arrays
    (folder / "config.json").write_text(json.dumps(settings))
    for path in folder.glob("model*"):
        path.unlink()
    save_file(arrays, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("name", CAUSAL)
def test_logits_and_greedy_texts_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    loaded, arrays = golden(name)
    tokens, mask = prompts_in(arrays)
    # What transformers wrote is read behind the prompts: each of its tokens must be the likeliest.
    made = jnp.asarray(arrays["greedy"], jnp.int32)
    hidden, logits = read(
        loaded.model, jnp.concatenate([tokens, made], 1), jnp.concatenate([mask, jnp.ones_like(made, bool)], 1)
    )
    n, there = tokens.shape[1], np.asarray(mask)
    np.testing.assert_allclose(logits[:, :n][there], arrays["logits"][there], atol=CLOSE)
    np.testing.assert_array_equal(jnp.argmax(logits[:, n - 1 : -1], -1), made)
    other = load_pretrained(with_other_head(name, tmp_path / "other")).model
    assert other.config.tied != loaded.model.config.tied
    np.testing.assert_allclose(other.logits(hidden[:, :n])[there], arrays["other"][there], atol=CLOSE)


@pytest.mark.parametrize("name", ["gemma2", "smollm3"])
def test_texts_written_with_a_cache_are_those_of_transformers(name: str) -> None:
    loaded, arrays = golden(name)
    made = greedy(loaded.model, *prompts_in(arrays), arrays["greedy"].shape[1])
    np.testing.assert_array_equal(made, arrays["greedy"])


@pytest.mark.parametrize("name", ENCODER_NAMES)
def test_scores_of_classifiers_are_those_of_transformers(name: str) -> None:
    loaded, arrays = golden(name)
    tokens, mask = prompts_in(arrays)
    score = eqx.filter_jit(eqx.filter_vmap(loaded.model))
    logits = score(tokens, mask)
    np.testing.assert_allclose(logits, arrays["logits"], atol=CLOSE)
    np.testing.assert_allclose(score(jnp.where(mask, tokens, 9), mask), logits, atol=1e-6)


@pytest.mark.parametrize("name", [*NEW, *ENCODER_NAMES])
def test_what_is_saved_is_what_was_read(name: str, tmp_path: Path) -> None:
    loaded, _ = golden(name)
    save_pretrained(tmp_path / "kept", loaded.model, keep=loaded.config)
    save_pretrained(tmp_path / "bare", loaded.model)
    theirs = arrays_in(GOLDEN / name)
    for folder in (tmp_path / "kept", tmp_path / "bare"):
        ours, again = arrays_in(folder), load_pretrained(folder).model
        assert ours.keys() == theirs.keys()
        assert all((ours[key] == array).all() for key, array in theirs.items())
        assert again.config == loaded.model.config
        assert_same(again, loaded.model)
    told = json.loads((tmp_path / "kept" / "config.json").read_text())
    for key, value in loaded.config.items():
        if key not in ("dtype", "rope_parameters"):
            assert told[key] == value, key


def test_a_window_counts_tokens_and_not_padding() -> None:
    loaded, arrays = golden("mistral_window")
    tokens, mask = prompts_in(arrays)
    row, there = tokens[1], mask[1]
    wide = jnp.concatenate([jnp.full(3, 7), row[:4], jnp.full(3, 7), row[4:]])
    mask = jnp.concatenate([jnp.zeros(3, bool), there[:4], jnp.zeros(3, bool), there[4:]])
    plain, gapped = (read(loaded.model, *pair)[1][0] for pair in ((row[None], there[None]), (wide[None], mask[None])))
    np.testing.assert_allclose(gapped[mask], plain, atol=CLOSE)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_what_a_config_leaves_out_is_as_transformers_has_it(family: str) -> None:
    told = json.loads((GOLDEN / "defaults.json").read_text())[family]
    kind = FAMILIES[family].config
    # Nothing but the name of the family, and every key as transformers fills them in.
    bare, whole = (kind.from_json({**own, "model_type": family}) for own in ({}, told))
    assert [bare.layout(layer) for layer in range(bare.depth)] == [whole.layout(layer) for layer in range(whole.depth)]
    ours, theirs = ({**dataclasses.asdict(one), "window": 0} for one in (bare, whole))
    assert ours == theirs


@pytest.mark.parametrize(
    ("family", "settings", "windowed", "window"),
    [
        ("mistral", {}, 4, 4096),
        ("mistral", {"sliding_window": None}, 0, 0),
        ("mistral", {"sliding_window": 100}, 4, 100),
        ("mixtral", {}, 0, 0),
        ("qwen2", {"use_sliding_window": True, "max_window_layers": 3}, 1, 4096),
        ("qwen3", {"use_sliding_window": False, "sliding_window": 8}, 0, 8),
        ("gemma2", {}, 2, 4096),
        ("gemma3_text", {}, 4, 4096),
        ("gemma3_text", {"sliding_window_pattern": 2}, 2, 4096),
        ("phi3", {"sliding_window": 2047}, 4, 2047),
        ("smollm3", {"use_sliding_window": True, "sliding_window": 9}, 1, 9),
    ],
)
def test_windows(family: str, settings: dict[str, Any], windowed: int, window: int) -> None:
    config = LlamaConfig.from_json({"model_type": family, "num_hidden_layers": 4, **settings})
    assert (len(config.windowed), config.window) == (windowed, window)


def test_activations_are_those_of_transformers() -> None:
    with np.load(GOLDEN / "activations.npz") as arrays:
        at = arrays["at"]
        assert set(arrays.keys()) - {"at"} == set(ACTIVATIONS)
        for name in ACTIVATIONS:
            np.testing.assert_allclose(find_activation(name)(at), arrays[name], atol=1e-6, err_msg=name)


def test_yarn_is_as_its_paper_has_it() -> None:
    told = {"rope_type": "yarn", "rope_theta": 100.0, "factor": 4.0, "original_max_position_embeddings": 64}
    rope = Rope.from_json({"rope_parameters": told | {"beta_fast": 5.0, "beta_slow": 1.0, "truncate": False}})
    plain = Rope(100.0).frequencies(16)
    # Pairs that come round more than 5 times in 64 tokens are left alone, fewer than once in full.
    rounds = 64 * plain / (2 * np.pi)
    found = rope.frequencies(16)
    np.testing.assert_allclose(found[rounds > 5], plain[rounds > 5])
    np.testing.assert_allclose(found[rounds < 1], plain[rounds < 1] / 4)
    between = (rounds < 5) & (rounds > 1)
    assert between.any()
    assert ((found < plain) & (found > plain / 4))[between].all()
    assert rope.sharpness == pytest.approx(0.1 * np.log(4.0) + 1)
    scaled = Rope.from_json({"rope_parameters": told | {"mscale": 0.5, "mscale_all_dim": 1.0}})
    assert scaled.sharpness == pytest.approx((0.05 * np.log(4.0) + 1) / (0.1 * np.log(4.0) + 1))


@pytest.mark.parametrize(
    ("family", "settings", "message"),
    [
        ("gemma2", {"use_bidirectional_attention": True}, "use_bidirectional_attention=True"),
        ("gemma2", {"layer_types": ["full_attention"]}, "layer_types=.*for each of 26 layers"),
        ("gemma3_text", {"layer_types": ["chunked_attention"] * 26}, "layer_types="),
        ("smollm3", {"no_rope_layers": [1, 0]}, "no_rope_layers=.*for each of 36 layers"),
        ("phi3", {"rope_scaling": {"type": "longrope"}}, "without 'short_factor'"),
        ("gpt_neox", {"rotary_pct": 1.5}, "partial_rotary_factor=1.5"),
        ("mixtral", {"num_experts_per_tok": 9}, "experts=8 and chosen=9"),
        ("modernbert", {"classifier_pooling": "max"}, "classifier_pooling='max'"),
        ("modernbert", {"local_attention": 0}, "local_attention=0"),
    ],
)
def test_settings_that_cannot_be_are_refused(family: str, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(LanguageModelError, match=message):
        FAMILIES[family].config.from_json({"model_type": family, **settings})

"""Adapters as PEFT writes them: read with its logits, written as it writes them, and fits that become adapters."""

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpyro import handlers
from safetensors.numpy import load_file, save_file

import bayesrl
from bayesrl import lm
from bayesrl.errors import LanguageModelError
from bayesrl.lm.checkpoints.pretrained import load_pretrained, save_adapter, save_pretrained
from bayesrl.lm.transformers.layers.linear_and_norm import Linear, merge_adapters
from tests.lm.transformers.test_families import CLOSE, read
from tests.lm.transformers.test_transformers import prompts_in

GOLDEN = Path(__file__).parent / "golden"
BASES = {
    "gpt2_lora": "gpt2",
    "llama_lora": "llama_dynamic",
    "neox_lora": "neox",
    "phi3_lora": "phi3",
    "bert_lora": "roberta",
}


@pytest.mark.parametrize("name", BASES)
@pytest.mark.parametrize("merge", [True, False])
def test_logits_are_those_of_peft(name: str, merge: bool) -> None:
    loaded = load_pretrained(GOLDEN / name, base=GOLDEN / BASES[name], merge=merge)
    with np.load(GOLDEN / name / "expected.npz") as arrays:
        (tokens, mask), wanted = prompts_in(arrays), arrays["logits"]
    assert bool(loaded.adapter) != merge
    if name == "bert_lora":
        np.testing.assert_allclose(eqx.filter_jit(eqx.filter_vmap(loaded.model))(tokens, mask), wanted, atol=CLOSE)
        return
    _, logits = read(loaded.model, tokens, mask)  # type: ignore[arg-type]  # the others are causal
    np.testing.assert_allclose(logits[np.asarray(mask)], wanted[np.asarray(mask)], atol=CLOSE)


@pytest.mark.parametrize("name", BASES)
def test_what_is_saved_is_what_peft_saves(name: str, tmp_path: Path) -> None:
    loaded = load_pretrained(GOLDEN / name, base=load_pretrained(GOLDEN / BASES[name]), merge=False)
    save_adapter(tmp_path, loaded, base=BASES[name])
    ours, theirs = (load_file(folder / "adapter_model.safetensors") for folder in (tmp_path, GOLDEN / name))
    assert ours.keys() == theirs.keys()
    for key, array in theirs.items():
        np.testing.assert_array_equal(ours[key], array, err_msg=key)
    told, known = (json.loads((folder / "adapter_config.json").read_text()) for folder in (tmp_path, GOLDEN / name))
    own = {"r", "lora_alpha", "rank_pattern", "alpha_pattern", "target_modules"}
    assert {key: value for key, value in told.items() if key not in own} == {
        key: value for key, value in known.items() if key not in own
    }
    again = load_pretrained(tmp_path, base=GOLDEN / BASES[name], merge=False)
    for one, other in zip(jax.tree.leaves(again.model), jax.tree.leaves(loaded.model), strict=True):
        np.testing.assert_array_equal(one, other)
    factors = [
        [
            leaf.factor
            for leaf in jax.tree.leaves(each.model, is_leaf=lambda x: isinstance(x, Linear))
            if _has_path(leaf)
        ]
        for each in (again, loaded)
    ]
    np.testing.assert_allclose(*factors)
    assert len(factors[0]) == sum("lora_A" in key for key in theirs)


def _has_path(leaf: Any) -> bool:
    return isinstance(leaf, Linear) and leaf.down is not None


def test_a_fit_becomes_an_adapter_and_a_reference_again(tmp_path: Path) -> None:
    tokenizer = lm.char_tokenizer("ab")
    config = lm.GPT2Config(vocab_size=tokenizer.vocab_size, max_length=8, width=8, depth=1, heads=2)
    base = lm.Pretrained(lm.GPT2.init(jax.random.key(0), config), tokenizer)
    save_pretrained(tmp_path / "base", base)
    policy = lm.policy(base, ["a", "b"], reward=lambda text: text.count("a") / 4, max_new_tokens=3, stop_at_eos=False)
    guide = lm.LoRA(rank=2, scale=6)
    fit = bayesrl.fit(jax.random.key(1), policy, beta=0.1, guide=guide, num_steps=3, progress=False)
    apart, whole = lm.finetuned(fit, merge=False), lm.finetuned(fit)
    save_adapter(tmp_path / "adapter", apart, base=tmp_path / "base")
    told = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (told["r"], told["lora_alpha"], told["fan_in_fan_out"]) == (2, 6, True)
    assert told["target_modules"] == ["c_attn", "c_fc", "c_proj"]
    # The adapter names its base, and brings the tokenizer along.
    loaded = load_pretrained(tmp_path / "adapter")
    assert loaded.tokenizer is not None
    assert loaded.tokenizer.digest == tokenizer.digest
    for one, other in zip(jax.tree.leaves(loaded.model), jax.tree.leaves(whole.model), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-6)
    # Paths that stay apart are part of the reference of the next fit.
    parted = load_pretrained(tmp_path / "adapter", merge=False)
    begun = handlers.seed(lambda: guide.declare(jax.random.key(2), parted.model), rng_seed=0)()  # type: ignore[arg-type]
    for one, other in zip(jax.tree.leaves(merge_adapters(begun)), jax.tree.leaves(whole.model), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-6)
    with pytest.raises(LanguageModelError, match="without low-rank paths; pass finetuned"):
        save_adapter(tmp_path / "none", whole)


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    return Path(shutil.copytree(GOLDEN / "gpt2_lora", tmp_path / "adapter"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"peft_type": "IA3"}, "adapter of type 'IA3'; bayesrl reads LORA"),
        ({"use_dora": True}, "use_dora=True, which bayesrl does not implement; merge it in PEFT"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa'"),
        ({"layer_replication": [[0, 2]]}, "layer_replication="),
        ({"r": 5, "rank_pattern": {}}, "r=5 for transformer.h.0.attn.c_attn, whose path has rank 2"),
        ({"lora_alpha": "two"}, "lora_alpha='two'"),
        ({"base_model_name_or_path": None}, "does not name the one that it was trained beside; pass that as base="),
        ({"base_model_name_or_path": "./nowhere"}, "adapter of the model './nowhere'.*pass its folder as base="),
    ],
)
def test_adapters_that_cannot_be_read(adapter: Path, settings: dict[str, Any], message: str) -> None:
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    with pytest.raises(LanguageModelError, match=message):
        load_pretrained(adapter, base=None if "base_model_name_or_path" in settings else GOLDEN / "gpt2")


def test_an_adapter_of_another_model(adapter: Path) -> None:
    with pytest.raises(LanguageModelError, match="which a llama model has no place for; pass the model"):
        load_pretrained(adapter, base=GOLDEN / "llama")
    arrays = load_file(adapter / "adapter_model.safetensors")
    first = next(name for name in arrays if name.endswith("c_attn.lora_A.weight"))
    for change, message in (
        ({first: arrays[first][:, :-1]}, "has a path of shapes .* whose weight is"),
        ({first: arrays[first] * np.nan}, "with numbers that are nan or infinite"),
        ({"base_model.model.transformer.wte.lora_embedding_A": arrays[first]}, "holds .*lora_embedding_A, which"),
    ):
        save_file({**arrays, **{name: np.ascontiguousarray(x) for name, x in change.items()}}, adapter / "changed")
        shutil.copy(adapter / "changed", adapter / "adapter_model.safetensors")
        with pytest.raises(LanguageModelError, match=message):
            load_pretrained(adapter, base=GOLDEN / "gpt2")
    del arrays[first]
    save_file(arrays, adapter / "adapter_model.safetensors")
    with pytest.raises(LanguageModelError, match="has half a path for transformer"):
        load_pretrained(adapter, base=GOLDEN / "gpt2")


# ---- weights of other kinds --------------------------------------------------------------------


def test_float16_is_read_with_a_word(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = Path(shutil.copytree(GOLDEN / "olmo2", tmp_path / "half"))
    arrays = {name: array.astype(np.float16) for name, array in load_file(folder / "model.safetensors").items()}
    save_file(arrays, folder / "model.safetensors")
    with caplog.at_level(logging.WARNING):
        model = load_pretrained(folder).model
    assert "holds float16, which is held as float32" in caplog.text
    assert {leaf.dtype for leaf in jax.tree.leaves(model)} == {jnp.dtype(jnp.float32)}
    np.testing.assert_array_equal(model.token.weight, arrays["model.embed_tokens.weight"].astype(np.float32))  # type: ignore[attr-defined]
    caplog.clear()
    load_pretrained(folder, dtype=jnp.bfloat16)
    assert caplog.text == ""


@pytest.mark.parametrize("kind", ["block", "row", "whole"])
def test_float8_is_multiplied_out(tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture) -> None:
    folder = Path(shutil.copytree(GOLDEN / "olmo2", tmp_path / "eight"))
    arrays: dict[str, Any] = load_file(folder / "model.safetensors")
    name = "model.layers.0.mlp.gate_proj.weight"
    wide = arrays[name]
    out, width = wide.shape
    shape = {"block": (-(-out // 10), -(-width // 7)), "row": (out, 1), "whole": ()}[kind]
    scale = np.random.default_rng(0).uniform(0.5, 2.0, shape).astype(np.float32)
    spread = np.repeat(np.repeat(scale, 10, 0), 7, 1)[:out, :width] if kind == "block" else scale
    eight = jnp.asarray(wide / spread).astype(jnp.float8_e4m3fn)
    told = {"quant_method": "fp8", "weight_block_size": [10, 7]} if kind == "block" else {"quant_method": "fbgemm_fp8"}
    suffix = "_scale_inv" if kind == "block" else "_scale"
    arrays |= {name: np.asarray(eight), f"{name}{suffix}": scale, name.replace("weight", "input_scale"): np.ones(1)}
    save_file(arrays, folder / "model.safetensors")
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "quantization_config": told}))
    with caplog.at_level(logging.WARNING):
        loaded = load_pretrained(folder)
    assert "holds 1 weights as float8 with scales" in caplog.text
    found = np.asarray(loaded.model.blocks[0].gate.weight)  # type: ignore[attr-defined]
    np.testing.assert_allclose(found, np.asarray(eight).astype(np.float32) * spread, rtol=1e-6)
    np.testing.assert_allclose(found, wide, atol=np.abs(wide).max() * 2**-4)
    save_pretrained(tmp_path / "again", loaded)
    assert "quantization_config" not in json.loads((tmp_path / "again" / "config.json").read_text())
    np.testing.assert_array_equal(load_pretrained(tmp_path / "again").model.blocks[0].gate.weight, found)  # type: ignore[attr-defined]
    del arrays[f"{name}{suffix}"]
    save_file(arrays, folder / "model.safetensors")
    with pytest.raises(LanguageModelError, match=r"gate_proj\.weight as float8 without a scale"):
        load_pretrained(folder)


# ---- heads -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gpt2", "qwen2", "gemma2", "smollm3", "gemma3", "smollm"])
def test_a_tied_table_may_bear_the_name_of_the_head(tmp_path: Path, name: str) -> None:
    folder = Path(shutil.copytree(GOLDEN / name, tmp_path / name))
    arrays = {key: array for path in folder.glob("*.safetensors") for key, array in load_file(path).items()}
    for path in folder.glob("model*"):
        path.unlink()
    table = next(key for key in arrays if key.endswith(("wte.weight", "embed_tokens.weight")))
    known = load_pretrained(GOLDEN / name).model
    save_file({**arrays, "lm_head.weight": arrays[table]}, folder / "model.safetensors")
    both = load_pretrained(folder).model
    save_file(
        {"lm_head.weight" if key == table else key: array for key, array in arrays.items()},
        folder / "model.safetensors",
    )
    head = load_pretrained(folder).model
    for model in (both, head):
        assert model.config == known.config
        assert all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(model), jax.tree.leaves(known), strict=True))


@pytest.mark.parametrize("name", ["gpt2", "gemma2", "smollm3"])
def test_two_tables_are_not_tied(tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture) -> None:
    folder = Path(shutil.copytree(GOLDEN / name, tmp_path / name))
    arrays = load_file(folder / "model.safetensors")
    table = next(key for key in arrays if key.endswith(("wte.weight", "embed_tokens.weight")))
    save_file({**arrays, "lm_head.weight": np.ascontiguousarray(arrays[table][::-1])}, folder / "model.safetensors")
    with caplog.at_level(logging.WARNING):
        loaded = load_pretrained(folder)
    assert "it is not tied" in caplog.text
    assert loaded.model.config.tied is False  # type: ignore[attr-defined]
    save_pretrained(tmp_path / "again", loaded)
    assert json.loads((tmp_path / "again" / "config.json").read_text())["tie_word_embeddings"] is False
    np.testing.assert_array_equal(load_pretrained(tmp_path / "again").model.head.weight, arrays[table][::-1])  # type: ignore[attr-defined]

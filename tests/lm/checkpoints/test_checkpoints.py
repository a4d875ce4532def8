"""Checkpoints: bit by bit what transformers writes, and every way in which a folder can be wrong."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.flax import load_file, save_file

from bayesrl.errors import LanguageModelError
from bayesrl.lm.checkpoints.pretrained import load_pretrained, save_pretrained
from bayesrl.lm.tokenization.simple_tokenizers import char_tokenizer
from bayesrl.lm.transformers.gpt2 import GPT2, GPT2Config
from bayesrl.lm.transformers.layers.linear_and_norm import Linear, merge_adapters

GOLDEN = Path(__file__).parents[1] / "golden"
ALL = ["gpt2", "llama", "smollm", "mistral", "qwen2", "qwen3", "bert"]


def arrays_in(folder: Path) -> dict[str, jax.Array]:
    return {name: array for path in sorted(folder.glob("*.safetensors")) for name, array in load_file(path).items()}


def assert_same(left: Any, right: Any) -> None:
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for one, other in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(one, other)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A good copy of a checkpoint, to be damaged."""
    return Path(shutil.copytree(GOLDEN / "gpt2", tmp_path / "model"))


def set_config(folder: Path, **settings: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


def change(folder: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    arrays = load_file(folder / "model.safetensors")
    edit(arrays)
    save_file(arrays, folder / "model.safetensors")


@pytest.mark.parametrize("name", ALL)
def test_what_is_saved_is_what_transformers_saves(name: str, tmp_path: Path) -> None:
    loaded = load_pretrained(GOLDEN / name)
    save_pretrained(tmp_path, loaded.model, loaded.tokenizer, keep=loaded.config)
    ours, theirs = arrays_in(tmp_path), arrays_in(GOLDEN / name)
    assert ours.keys() == theirs.keys()
    for key, array in theirs.items():
        assert ours[key].dtype == array.dtype
        np.testing.assert_array_equal(ours[key], array)
    again = load_pretrained(tmp_path)
    assert_same(again.model, loaded.model)
    assert again.model.config == loaded.model.config
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architectures"] == loaded.config["architectures"]
    assert config["torch_dtype"] == "float32"
    assert "dtype" not in config
    assert loaded.config.keys() - {"dtype"} <= config.keys()


def test_config_without_what_was_kept_is_enough(tmp_path: Path) -> None:
    loaded = load_pretrained(GOLDEN / "llama")
    save_pretrained(tmp_path, loaded.model)
    assert load_pretrained(tmp_path).model.config == loaded.model.config
    assert json.loads((tmp_path / "config.json").read_text())["eos_token_id"] is None


def test_bfloat16_is_saved_as_such(tmp_path: Path) -> None:
    model = load_pretrained(GOLDEN / "llama", dtype=jnp.bfloat16).model
    save_pretrained(tmp_path, model)
    assert json.loads((tmp_path / "config.json").read_text())["torch_dtype"] == "bfloat16"
    again = load_pretrained(tmp_path).model
    assert again.token.weight.dtype == jnp.bfloat16
    assert_same(again, model)
    assert load_pretrained(tmp_path, dtype=jnp.float32).model.token.weight.dtype == jnp.float32


def test_shards(tmp_path: Path) -> None:
    model = load_pretrained(GOLDEN / "qwen2").model
    save_pretrained(tmp_path, model, max_shard_bytes=30_000)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert files == [f"model-0000{n}-of-00003.safetensors" for n in (1, 2, 3)]
    assert sorted(set(index["weight_map"].values())) == files
    assert index["metadata"]["total_size"] == sum(leaf.nbytes for leaf in jax.tree.leaves(model))
    assert_same(load_pretrained(tmp_path).model, model)
    # A later save in one file leaves nothing of the shards behind.
    save_pretrained(tmp_path, model)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    (tmp_path / "model.safetensors").unlink()
    save_pretrained(tmp_path, model, max_shard_bytes=30_000)
    (tmp_path / files[1]).unlink()
    with pytest.raises(LanguageModelError, match=f"has no {files[1]}, which model.safetensors.index.json names"):
        load_pretrained(tmp_path)


def test_tokenizer_comes_along(tmp_path: Path) -> None:
    loaded = load_pretrained(GOLDEN / "gpt2")
    assert loaded.tokenizer is not None
    assert (loaded.tokenizer.pad, loaded.tokenizer.eos, loaded.tokenizer.bos) == (0, 1, 1)
    save_pretrained(tmp_path, loaded.model, loaded.tokenizer)
    again = load_pretrained(tmp_path).tokenizer
    assert again is not None
    assert again.digest == loaded.tokenizer.digest
    assert again.special == loaded.tokenizer.special
    assert json.loads((tmp_path / "config.json").read_text())["pad_token_id"] == 0
    assert json.loads((tmp_path / "generation_config.json").read_text())["eos_token_id"] == 1
    assert load_pretrained(GOLDEN / "llama").tokenizer is None


@pytest.mark.parametrize(
    ("told", "ends"),
    [
        ({"eos_token_id": [1, 4]}, (1, 4)),
        ({"eos_token_id": [4, 3, 1]}, (4, 3, 1)),
        ({"eos_token_id": [4, 99]}, (4, 1)),
        ({"eos_token_id": 4}, (4, 1)),
        ({"temperature": 0.7, "of_a_later_version": None}, (1,)),
    ],
)
def test_settings_of_generation_come_along(tmp_path: Path, told: dict[str, Any], ends: tuple[int, ...]) -> None:
    """Whatever ids end a text in transformers end it here and are written back; the tokenizer's own eos joins them."""
    config = GPT2Config(vocab_size=6, max_length=8, width=4, depth=1, heads=1)
    save_pretrained(tmp_path, GPT2.init(jax.random.key(0), config), char_tokenizer("abc"))
    (tmp_path / "generation_config.json").write_text(json.dumps({"do_sample": True, **told}))
    loaded = load_pretrained(tmp_path)
    assert loaded.tokenizer is not None
    assert loaded.tokenizer.eos_ids == ends
    save_pretrained(tmp_path / "again", loaded.model, loaded.tokenizer)
    kept = json.loads((tmp_path / "again" / "generation_config.json").read_text())
    wanted = {"do_sample": True, "pad_token_id": 0, "eos_token_id": 1, **told}
    assert kept == wanted
    again = load_pretrained(tmp_path / "again")
    assert again.tokenizer is not None
    assert again.tokenizer.eos_ids == ends


def test_low_rank_paths_must_be_merged(tmp_path: Path) -> None:
    model = load_pretrained(GOLDEN / "llama").model
    query = model.blocks[0].query
    out, width = query.weight.shape
    adapted = eqx.tree_at(
        lambda model: model.blocks[0].query, model, Linear(query.weight, None, jnp.ones((1, width)), jnp.ones((out, 1)))
    )
    with pytest.raises(
        LanguageModelError,
        match=r"\.blocks\[0\]\.query\.down, .*up.*pass a model whose low-rank paths are merged: lm.finetuned",
    ):
        save_pretrained(tmp_path, adapted)
    save_pretrained(tmp_path, merge_adapters(adapted))
    saved = arrays_in(tmp_path)["model.layers.0.self_attn.q_proj.weight"]
    np.testing.assert_allclose(saved, query.weight + 1, rtol=1e-6)


def test_names_of_base_models_and_harmless_extras(folder: Path) -> None:
    def edit(arrays: dict[str, Any]) -> None:
        for name in list(arrays):
            arrays[name.removeprefix("transformer.")] = arrays.pop(name)
        arrays["h.0.attn.bias"] = jnp.ones((1, 1, 4, 4))
        arrays["h.0.attn.masked_bias"] = jnp.ones(())
        arrays["lm_head.weight"] = arrays["wte.weight"]

    change(folder, edit)
    assert_same(load_pretrained(folder).model, load_pretrained(GOLDEN / "gpt2").model)


def test_old_names_of_bert(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(GOLDEN / "bert", tmp_path / "model"))

    def edit(arrays: dict[str, Any]) -> None:
        arrays["bert.embeddings.LayerNorm.gamma"] = arrays.pop("bert.embeddings.LayerNorm.weight")
        arrays["bert.embeddings.LayerNorm.beta"] = arrays.pop("bert.embeddings.LayerNorm.bias")
        arrays["bert.embeddings.position_ids"] = jnp.arange(32)[None]

    change(folder, edit)
    assert_same(load_pretrained(folder).model, load_pretrained(GOLDEN / "bert").model)


def test_float16_is_read_as_float32(folder: Path) -> None:
    change(folder, lambda arrays: arrays.update({name: a.astype(jnp.float16) for name, a in arrays.items()}))
    assert {leaf.dtype for leaf in jax.tree.leaves(load_pretrained(folder).model)} == {jnp.dtype(jnp.float32)}


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda arrays: arrays.pop("transformer.h.1.ln_1.bias"), "has no transformer.h.1.ln_1.bias for a gpt2 model"),
        (
            lambda arrays: arrays.update({"wte.weight": arrays.pop("transformer.wte.weight").astype(jnp.int8)}),
            "holds wte.weight as int8; quantized weights are not read",
        ),
        (lambda arrays: arrays.update(score=jnp.ones(2)), "has score too many"),
        (
            lambda arrays: arrays.update({"transformer.wpe.weight": jnp.ones((63, 32))}),
            r"holds transformer.wpe.weight of shape \[63, 32\], and config.json asks for \[64, 32\]",
        ),
        (lambda arrays: arrays.clear(), "has no transformer.wte.weight, .* and 25 more"),
    ],
)
def test_wrong_tensors(folder: Path, edit: Callable[[dict[str, Any]], Any], message: str) -> None:
    change(folder, edit)
    with pytest.raises(LanguageModelError, match=message):
        load_pretrained(folder)


@pytest.mark.parametrize(
    ("family", "settings", "message"),
    [
        (
            "gpt2",
            {"model_type": "mamba", "architectures": ["MambaLM"]},
            r"'mamba' \(MambaLM\); bayesrl reads gpt2, llama",
        ),
        ("gpt2", {"model_type": None}, "names the architecture None"),
        ("gpt2", {"n_embd": None}, "has no 'n_embd'"),
        ("gpt2", {"quantization_config": {"bits": 4}}, r"quantization_config={'bits': 4}.*reads models without it"),
        (
            "gpt2",
            {"scale_attn_by_inverse_layer_idx": True},
            "scale_attn_by_inverse_layer_idx=True, which bayesrl does not",
        ),
        ("gpt2", {"activation_function": "tanhexp"}, "unknown activation 'tanhexp'"),
        ("gpt2", {"n_head": 0}, "gpt2 model has heads=0; use a whole number of at least 1"),
        ("gpt2", {"n_head": 3}, "width=32 and heads=3; heads must divide width"),
        ("gpt2", {"n_embd": "32"}, "gpt2 model has width='32'; use a whole number"),
        ("gpt2", {"layer_norm_epsilon": "small"}, "gpt2 model has epsilon='small'; use a number of at least 0"),
        ("gpt2", {"tie_word_embeddings": "yes"}, "gpt2 model has tied='yes'; use True or False"),
        ("gpt2", {"vocab_size": 63}, r"wte.weight of shape \[64, 32\], and config.json asks for \[63, 32\]"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "axial"}},
            "of type 'axial'; bayesrl knows default, linear, dynamic, yarn",
        ),
        ("llama", {"rope_parameters": {"rope_type": "linear"}}, "without 'factor'"),
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
        (
            "llama",
            {"model_type": "mistral", "sliding_window": "all"},
            "sliding_window='all'; use a whole number",
        ),
        ("llama", {"hidden_act": "geglu"}, "unknown activation 'geglu'"),
        ("llama", {"rope_parameters": ["linear", 2.0]}, "sets rope_scaling=.'linear', 2.0.; it must be null"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "linear", "factor": "two"}},
            "factor='two' of the rotary positions",
        ),
        ("llama", {"num_attention_heads": 0}, "llama model has heads=0; use a whole number of at least 1"),
        ("llama", {"num_key_value_heads": 3}, "kv_heads=3, .*kv_heads must divide heads"),
        (
            "bert",
            {"id2label": ["bad", "good"]},
            r"id2label=\['bad', 'good'\]; it must name the classes by their places",
        ),
        ("bert", {"id2label": {"0": "bad", "2": "good"}}, "it must name the classes by their places"),
        ("bert", {"problem_type": "ranking"}, "problem='ranking'; use one of single_label_classification, "),
        ("bert", {"num_attention_heads": 5}, "heads=5; heads must divide width"),
    ],
)
def test_wrong_config(tmp_path: Path, family: str, settings: dict[str, Any], message: str, unchecked: None) -> None:
    folder = Path(shutil.copytree(GOLDEN / family, tmp_path / "model"))
    set_config(folder, **settings)
    with pytest.raises(LanguageModelError, match=message):
        load_pretrained(folder)


def test_no_such_folder(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(LanguageModelError, match=r"there is no folder .*nowhere; pass the folder"):
        load_pretrained(tmp_path / "nowhere")
    with pytest.raises(LanguageModelError, match=r"there is no folder .*nowhere; pass the folder"):
        load_pretrained(str(tmp_path / "nowhere"))
    (folder / "config.json").unlink()
    with pytest.raises(LanguageModelError, match=r"has no config.json; pass the folder"):
        load_pretrained(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(LanguageModelError, match=r"cannot read .*config.json: .*copy it anew"):
        load_pretrained(folder)


def test_a_name_on_the_hub_without_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(LanguageModelError, match=r"no folder 'someone/something' here, .*pass that") as caught:
        load_pretrained("someone/something")
    assert "check the name and the network" in str(caught.value)


def test_weights_are_missing_pickled_or_damaged(folder: Path) -> None:
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-100])
    with pytest.raises(LanguageModelError, match=r"cannot read .*model.safetensors: .*damaged or cut short"):
        load_pretrained(folder)
    weights.unlink()
    with pytest.raises(LanguageModelError, match=r"has no model.safetensors and no model.safetensors.index.json"):
        load_pretrained(folder)
    (folder / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(LanguageModelError, match=r"pickled weights \(pytorch_model.bin\).*safe_serialization=True"):
        load_pretrained(folder)
    (folder / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(LanguageModelError, match="has no weight_map"):
        load_pretrained(folder)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(
    "name", ["transformer.wte.weight", "transformer.h.0.mlp.c_proj.weight", "transformer.ln_f.bias"]
)
def test_weights_that_are_not_finite_are_named(folder: Path, name: str, bad: float) -> None:
    arrays = load_file(folder / "model.safetensors")
    arrays[name] = arrays[name].at[..., 0].set(bad)
    save_file(arrays, folder / "model.safetensors")
    with pytest.raises(LanguageModelError, match=f"holds {name} with .* numbers nan or infinite"):
        load_pretrained(folder)


def test_arrays_in_host_memory_are_saved_as_they_are(folder: Path, tmp_path: Path) -> None:
    model = load_pretrained(folder).model
    host = jax.tree.map(lambda x: np.asfortranarray(np.asarray(x)), model)
    save_pretrained(tmp_path / "host", host)
    for ours, theirs in zip(
        jax.tree.leaves(model), jax.tree.leaves(load_pretrained(tmp_path / "host").model), strict=True
    ):
        np.testing.assert_array_equal(ours, theirs)


def test_tokenizer_must_fit(tmp_path: Path, folder: Path) -> None:
    large = char_tokenizer("".join(map(chr, range(33, 133))))
    model = load_pretrained(folder).model
    with pytest.raises(LanguageModelError, match="the tokenizer has 103 tokens and the model knows 64"):
        save_pretrained(tmp_path / "new", model, large)
    large.save(folder)
    with pytest.raises(LanguageModelError, match="the tokenizer has 103 tokens and the model knows 64"):
        load_pretrained(folder)
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(LanguageModelError, match=r"cannot read .*tokenizer.json"):
        load_pretrained(folder)


def test_wrong_options(tmp_path: Path) -> None:
    for dtype in (jnp.float16, "float3"):
        with pytest.raises(
            LanguageModelError, match=r"got dtype=.*; use a type of weights: jnp.float32 or jnp.bfloat16, or None"
        ):
            load_pretrained(GOLDEN / "gpt2", dtype=dtype)
    model = load_pretrained(GOLDEN / "gpt2").model
    with pytest.raises(LanguageModelError, match="max_shard_bytes=0; use a whole number from 1"):
        save_pretrained(tmp_path, model, max_shard_bytes=0)
    (tmp_path / "file").write_text("")
    with pytest.raises(LanguageModelError, match="cannot make the folder"):
        save_pretrained(tmp_path / "file", model)

"""What config.json says, against what transformers 5.24 makes of the same file, where a plain reading would differ."""

from typing import Any

import pytest

from bayesrl.errors import LanguageModelError
from bayesrl.lm.transformers.bert_config import BertConfig
from bayesrl.lm.transformers.llama_config import LlamaConfig
from bayesrl.lm.transformers.registry import find_family
from bayesrl.value_checks import format_value

WHOLE, NEAR = "full_attention", "sliding_attention"


def read(family: str, **settings: Any) -> Any:
    json = {"model_type": family, **settings}
    return find_family(json).config.from_json(json)


@pytest.mark.parametrize(
    ("family", "settings", "activation"),
    [
        ("gemma2", {"hidden_act": "gelu"}, "gelu_pytorch_tanh"),
        ("gemma3_text", {"hidden_act": "silu"}, "gelu_pytorch_tanh"),
        ("gemma3_text", {"hidden_act": "silu", "hidden_activation": "gelu"}, "gelu"),
        ("gemma2", {"hidden_activation": "relu"}, "relu"),
        ("modernbert", {"hidden_act": "relu"}, "gelu"),
        ("gemma", {"hidden_act": "gelu"}, "gelu"),
        ("llama", {"hidden_act": "gelu"}, "gelu"),
        ("llama", {"hidden_activation": "gelu"}, "silu"),
        ("gpt2", {"hidden_act": "relu"}, "gelu_new"),
    ],
)
def test_the_activation_is_read_by_the_name_that_the_family_has_for_it(
    family: str, settings: dict[str, Any], activation: str
) -> None:
    assert read(family, **settings).activation == activation


@pytest.mark.parametrize(
    ("family", "settings", "theta", "share"),
    [
        ("gpt_neox", {}, 10000, 0.25),
        ("gpt_neox", {"rotary_emb_base": 500, "rotary_pct": 0.5}, 500, 0.5),
        ("gpt_neox", {"rotary_emb_base": 500, "rope_theta": 500}, 500, 0.25),
        ("gpt_neox", {"rotary_pct": 1.0, "partial_rotary_factor": 1.0}, 10000, 1.0),
        ("gpt_neox", {"rope_parameters": {"rope_theta": 7.0}, "rotary_emb_base": 500}, 7, 0.25),
        ("gemma3_text", {"rope_parameters": {WHOLE: {"rope_theta": 7.0}, NEAR: {"rope_theta": 5.0}}}, 7, 1.0),
        ("gemma3_text", {"rope_theta": 7.0}, 7, 1.0),
        ("modernbert", {"rope_parameters": {WHOLE: {"rope_theta": 7.0}}}, 7, 1.0),
        ("modernbert", {"global_rope_theta": 7.0, "rope_scaling": {"rope_type": "default"}}, 7, 1.0),
    ],
)
def test_turns_are_read(family: str, settings: dict[str, Any], theta: float, share: float) -> None:
    rope = read(family, **settings).rope
    assert (rope.theta, rope.share) == (theta, share)


@pytest.mark.parametrize(
    ("family", "settings", "message"),
    [
        ("gpt_neox", {"rope_theta": 500}, r"sets rope_theta=500 where rotary_emb_base is 10000"),
        ("gpt_neox", {"rotary_emb_base": 7, "rope_theta": 500}, r"sets rope_theta=500 where rotary_emb_base is 7"),
        ("gpt_neox", {"partial_rotary_factor": 1.0}, r"sets partial_rotary_factor=1.0 where rotary_pct is 0.25"),
        ("gemma3_text", {"rope_parameters": {"rope_theta": 7.0}}, "transformers reads only what stands there"),
        ("gemma3_text", {"rope_parameters": {"rope_type": "linear", "factor": 2.0}}, "reads only what stands there"),
        ("modernbert", {"rope_parameters": {"rope_theta": 7.0}}, "sets rope_parameters="),
        ("modernbert", {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "sets rope_scaling="),
        ("modernbert", {"sliding_window": 16}, "sets sliding_window=16 where half of local_attention is 64"),
        ("modernbert", {"sliding_window": 64, "local_attention": 64}, "where half of local_attention is 32"),
    ],
)
def test_what_versions_of_transformers_read_differently_is_refused(
    family: str, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(LanguageModelError, match=message):
        read(family, **settings)


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("llama", {"final_logit_softcapping": 30.0}),
        ("qwen3", {"attn_logit_softcapping": 50.0}),
        ("gemma", {"query_pre_attn_scalar": 144}),
        ("llama", {"sliding_window": 4096}),
        ("gpt_neox", {"sliding_window": 128}),
        ("llama", {"layer_types": [WHOLE, NEAR]}),
        ("mistral", {"use_sliding_window": False}),
        ("qwen2", {"no_rope_layers": [1, 0]}),
        ("gemma2", {"rope_local_base_freq": 10000.0}),
        ("llama", {"rope_parameters": {WHOLE: {"rope_theta": 7.0}}}),
        ("mistral", {"attention_bias": True}),
        ("gemma2", {"mlp_bias": True}),
        ("llama", {"num_local_experts": 8}),
        ("mistral", {"num_experts_per_tok": 2}),
        ("llama", {"use_parallel_residual": True}),
        ("llama", {"embedding_multiplier": 12.0}),
        ("olmo2", {"clip_qkv": 8.0}),
        ("gpt2", {"rope_theta": 10000.0}),
        ("gpt2", {"sliding_window": 128}),
        ("bert", {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}),
        ("bert", {"classifier_pooling": "mean"}),
        ("roberta", {"add_cross_attention": True}),
    ],
)
def test_an_option_that_the_family_does_not_have_is_refused(family: str, settings: dict[str, Any]) -> None:
    ((key, value),) = settings.items()
    with pytest.raises(LanguageModelError, match=f"config.json of a '{family}' model sets {key}=") as caught:
        read(family, **settings)
    assert format_value(value) in str(caught.value)
    assert any(remedy in str(caught.value) for remedy in ("; set ", "; choose another model", "; put that there"))


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "gemma", "gpt_neox", "gpt2", "bert", "modernbert"])
def test_an_option_without_effect_is_accepted(family: str) -> None:
    inert: dict[str, Any] = {
        "final_logit_softcapping": None,
        "num_local_experts": 0,
        "use_parallel_residual": False if family != "gpt_neox" else None,
        "embedding_multiplier": 1.0,
        "attention_dropout": 0.1,
        "pretraining_tp": 2,
        "use_cache": True,
        "max_window_layers": 28,
        "is_decoder": False,
        "add_cross_attention": False,
    }
    assert read(family, **inert) == read(family, use_parallel_residual=inert["use_parallel_residual"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"logit_cap": 30.0},
            "a llama model has logit_cap=30.0, which only gemma2, gemma3_text models have; leave it out, or",
        ),
        ({"experts": 4, "chosen": 2}, "a llama model has experts=4, which only mixtral models have"),
        (
            {"model_type": "mistral", "window": 4, "windowed": (0, 1)},
            r"windowed=\(0, 1\) and depth=1; name layers from 0",
        ),
        ({"model_type": "mistral", "windowed": (0,)}, "layers with a window and window=0"),
        ({"model_type": "gpt_neox", "window": 4}, "a gpt_neox model has window=4"),
        ({"model_type": "mixtral", "experts": 4}, "experts=4 and chosen=0; choose at least one"),
        ({"model_type": "gpt_neox", "kv_heads": 1}, "heads=2 and kv_heads=1; the two must be equal"),
    ],
)
def test_a_shape_takes_no_options_of_other_families(options: dict[str, Any], message: str) -> None:
    shape = {"vocab_size": 7, "max_length": 8, "width": 8, "depth": 1, "heads": 2, "kv_heads": 2, "inner": 8}
    with pytest.raises(LanguageModelError, match=message):
        LlamaConfig(**{**shape, **options})
    with pytest.raises(LanguageModelError, match="a bert model has mean=True, which only modernbert models"):
        BertConfig(mean=True)

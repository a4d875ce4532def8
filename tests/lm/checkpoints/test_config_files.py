"""What config.json says, against what transformers 5.24 makes of the same file, where a plain reading would differ."""

from typing import Any

import pytest

from bayesrl.errors import LanguageModelError
from bayesrl.lm.transformers.registry import find_family

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

"""Map each kind of checkpoint to the model that reads it."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from bayesrl.errors import LanguageModelError
from bayesrl.lm.transformers.base import Config, Transformer
from bayesrl.lm.transformers.bert import BertClassifier
from bayesrl.lm.transformers.bert_config import ENCODER_FAMILIES, BertConfig
from bayesrl.lm.transformers.gpt2 import GPT2, GPT2Config
from bayesrl.lm.transformers.llama import Llama
from bayesrl.lm.transformers.llama_config import DECODER_FAMILIES, LlamaConfig


class Family(NamedTuple):
    """A kind of checkpoint."""

    config: type[Config]  # reads its config.json
    model: type[Transformer]  # has its arrays


FAMILIES: Mapping[str, Family] = MappingProxyType(
    {
        "gpt2": Family(GPT2Config, GPT2),
        **dict.fromkeys(DECODER_FAMILIES, Family(LlamaConfig, Llama)),
        **dict.fromkeys(ENCODER_FAMILIES, Family(BertConfig, BertClassifier)),
    }
)


def find_family(json: Mapping[str, Any]) -> Family:
    """Find the family of a config.json."""
    name = json.get("model_type")
    if not isinstance(name, str) or name not in FAMILIES:
        raise LanguageModelError(
            f"config.json names the architecture {name!r} ({', '.join(json.get('architectures') or ['no class'])}); "
            f"bayesrl reads {', '.join(FAMILIES)}: choose one of these"
        )
    return FAMILIES[name]

"""Language models: transformers, their checkpoints and their tokenizers."""

from bayesrl.lm.checkpoints import Pretrained, load_pretrained, save_pretrained
from bayesrl.lm.tokenizer import Tokenizer, byte_pairs, bytes_level, characters, pad_left
from bayesrl.lm.transformers import (
    GPT2,
    BertClassifier,
    BertConfig,
    Cache,
    CausalLM,
    GPT2Config,
    Linear,
    Llama,
    LlamaConfig,
    Rope,
    Transformer,
    merged,
)

__all__ = [
    "GPT2",
    "BertClassifier",
    "BertConfig",
    "Cache",
    "CausalLM",
    "GPT2Config",
    "Linear",
    "Llama",
    "LlamaConfig",
    "Pretrained",
    "Rope",
    "Tokenizer",
    "Transformer",
    "byte_pairs",
    "bytes_level",
    "characters",
    "load_pretrained",
    "merged",
    "pad_left",
    "save_pretrained",
]

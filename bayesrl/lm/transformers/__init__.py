"""Transformers: GPT-2, Llama and its relatives, and BERT and its relatives, as Equinox modules."""

from bayesrl.lm.transformers.base import CausalLM, Config, Transformer
from bayesrl.lm.transformers.bert import BertClassifier
from bayesrl.lm.transformers.bert_config import BertConfig
from bayesrl.lm.transformers.gpt2 import GPT2, GPT2Config
from bayesrl.lm.transformers.layers.kv_cache import Cache
from bayesrl.lm.transformers.layers.layers import Embedding, LayerNorm, Linear, RMSNorm, is_linear, merged
from bayesrl.lm.transformers.layers.rope import Rope
from bayesrl.lm.transformers.llama import Llama
from bayesrl.lm.transformers.llama_config import LlamaConfig

__all__ = [
    "GPT2",
    "BertClassifier",
    "BertConfig",
    "Cache",
    "CausalLM",
    "Config",
    "Embedding",
    "GPT2Config",
    "LayerNorm",
    "Linear",
    "Llama",
    "LlamaConfig",
    "RMSNorm",
    "Rope",
    "Transformer",
    "is_linear",
    "merged",
]

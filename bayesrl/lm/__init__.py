"""Language models: a model is a distribution over texts, and what rewards make of it is a tilted posterior."""

from bayesrl.lm import rewards
from bayesrl.lm.adapting import FullParameters, LoRA
from bayesrl.lm.checkpoints import Pretrained, load_pretrained, save_pretrained
from bayesrl.lm.completions import Completions, Prompts, prompts
from bayesrl.lm.prompting import PromptedPolicy, policy
from bayesrl.lm.reusing import Reuse
from bayesrl.lm.sequences import Sentences
from bayesrl.lm.tokenizer import Tokenizer, byte_pairs, bytes_level, characters
from bayesrl.lm.training import Corpus, corpus, fitted, pairs
from bayesrl.lm.transformers import GPT2, BertClassifier, BertConfig, CausalLM, GPT2Config, Llama, LlamaConfig

__all__ = [
    "GPT2",
    "BertClassifier",
    "BertConfig",
    "CausalLM",
    "Completions",
    "Corpus",
    "FullParameters",
    "GPT2Config",
    "Llama",
    "LlamaConfig",
    "LoRA",
    "Pretrained",
    "PromptedPolicy",
    "Prompts",
    "Reuse",
    "Sentences",
    "Tokenizer",
    "byte_pairs",
    "bytes_level",
    "characters",
    "corpus",
    "fitted",
    "load_pretrained",
    "pairs",
    "policy",
    "prompts",
    "rewards",
    "save_pretrained",
]

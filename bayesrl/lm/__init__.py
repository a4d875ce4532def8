"""Language models: a model is a distribution over texts, and what rewards make of it is a tilted posterior."""

from bayesrl.cache import cache_folder
from bayesrl.lm import rewards
from bayesrl.lm.checkpoints.checkpoints import Pretrained, load_pretrained, save_adapter, save_pretrained
from bayesrl.lm.checkpoints.model_cache import kept
from bayesrl.lm.completions import Completions, Prompts, prompts, read_json_lines
from bayesrl.lm.guides import FullParameters, LoRA
from bayesrl.lm.prompted_policy import PromptedPolicy, policy
from bayesrl.lm.report import text_sections
from bayesrl.lm.small_models import check_counts, fit_options, small_judge, small_writer
from bayesrl.lm.supervised import Corpus, Labelled, corpus, fitted, labelled, pairs
from bayesrl.lm.text_distribution import Sentences
from bayesrl.lm.text_samples import Samples, kl_of, write_samples
from bayesrl.lm.tokenization.alphabets import byte_pairs, bytes_level, characters
from bayesrl.lm.tokenization.tokenizer import Tokenizer
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
    "Labelled",
    "Llama",
    "LlamaConfig",
    "LoRA",
    "Pretrained",
    "PromptedPolicy",
    "Prompts",
    "Samples",
    "Sentences",
    "Tokenizer",
    "byte_pairs",
    "bytes_level",
    "cache_folder",
    "characters",
    "check_counts",
    "corpus",
    "fit_options",
    "fitted",
    "kept",
    "kl_of",
    "labelled",
    "load_pretrained",
    "pairs",
    "policy",
    "prompts",
    "read_json_lines",
    "rewards",
    "save_adapter",
    "save_pretrained",
    "small_judge",
    "small_writer",
    "text_sections",
    "write_samples",
]

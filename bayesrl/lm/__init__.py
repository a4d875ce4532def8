"""Language models: a model is a distribution over texts, and rewards tilt it to a posterior."""

from bayesrl.lm import rewards
from bayesrl.lm.checkpoints.pretrained import Pretrained, load_pretrained, save_adapter, save_pretrained
from bayesrl.lm.guides import FullParameters, LoRA
from bayesrl.lm.prompted_policy import policy
from bayesrl.lm.prompts import encode_prompts
from bayesrl.lm.report import text_sections
from bayesrl.lm.rewards.scored_records import score_records
from bayesrl.lm.small_models import train_small_classifier, train_small_lm
from bayesrl.lm.supervised import classification, finetuned, language_modeling, sft
from bayesrl.lm.text_distribution import CausalLMDistribution
from bayesrl.lm.text_particles import TextParticles  # noqa: F401  (registers the particles of texts)
from bayesrl.lm.text_samples import estimate_kl, sample_texts
from bayesrl.lm.tokenization.simple_tokenizers import byte_tokenizer, char_tokenizer, train_bpe
from bayesrl.lm.tokenization.tokenizer import Tokenizer
from bayesrl.lm.transformers.bert import BertClassifier
from bayesrl.lm.transformers.bert_config import BertConfig
from bayesrl.lm.transformers.gpt2 import GPT2, GPT2Config
from bayesrl.lm.transformers.llama import Llama
from bayesrl.lm.transformers.llama_config import LlamaConfig
from bayesrl.lm.twisted_model import TwistHead  # noqa: F401  (registers the twists of texts)

__all__ = [
    "GPT2",
    "BertClassifier",
    "BertConfig",
    "CausalLMDistribution",
    "FullParameters",
    "GPT2Config",
    "Llama",
    "LlamaConfig",
    "LoRA",
    "Pretrained",
    "Tokenizer",
    "byte_tokenizer",
    "char_tokenizer",
    "classification",
    "encode_prompts",
    "estimate_kl",
    "finetuned",
    "language_modeling",
    "load_pretrained",
    "policy",
    "rewards",
    "sample_texts",
    "save_adapter",
    "save_pretrained",
    "score_records",
    "sft",
    "text_sections",
    "train_bpe",
    "train_small_classifier",
    "train_small_lm",
]

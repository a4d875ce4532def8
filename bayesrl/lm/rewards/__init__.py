"""Rewards for the completions of a language model."""

from bayesrl.lm.rewards.base import Reward, length, token_reward
from bayesrl.lm.rewards.classifiers import classifier, sklearn_pipeline
from bayesrl.lm.rewards.text import text_reward
from bayesrl.lm.rewards.verifiers import contains, exact_match, number_match, regex_match

__all__ = [
    "Reward",
    "classifier",
    "contains",
    "exact_match",
    "length",
    "number_match",
    "regex_match",
    "sklearn_pipeline",
    "text_reward",
    "token_reward",
]

"""Rewards for what a language model writes."""

from bayesrl.lm.rewards.base import Length, Reward, TokenReward, WeightedSum, length, on_tokens
from bayesrl.lm.rewards.classifiers import ClassifierReward, classifier, sklearn_pipeline
from bayesrl.lm.rewards.text import TextReward, as_reward, decoded, on_text
from bayesrl.lm.rewards.verifiers import contains, exact_match, matches, number_match

__all__ = [
    "ClassifierReward",
    "Length",
    "Reward",
    "TextReward",
    "TokenReward",
    "WeightedSum",
    "as_reward",
    "classifier",
    "contains",
    "decoded",
    "exact_match",
    "length",
    "matches",
    "number_match",
    "on_text",
    "on_tokens",
    "sklearn_pipeline",
]

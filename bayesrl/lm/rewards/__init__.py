"""Rewards for what a language model writes."""

from bayesrl.lm.rewards.base import Length, Reward, TokenReward, WeightedSum, length, on_tokens
from bayesrl.lm.rewards.text import TextReward, as_reward, on_text

__all__ = [
    "Length",
    "Reward",
    "TextReward",
    "TokenReward",
    "WeightedSum",
    "as_reward",
    "length",
    "on_text",
    "on_tokens",
]

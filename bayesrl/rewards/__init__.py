"""Rewards that are not known: a posterior over rewards and an attitude to risk make an ordinary reward."""

from bayesrl.rewards.uncertain_reward import uncertain

__all__ = ["uncertain"]

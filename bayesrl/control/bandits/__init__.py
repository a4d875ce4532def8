"""Bandits: a posterior over what each action pays, and rules that use it to explore."""

from bayesrl.control.bandits.arms import BernoulliArms, GaussianArms, LinearArms, LogisticArms
from bayesrl.control.bandits.gittins import bayes_optimal_regret, gittins_index
from bayesrl.control.bandits.simulation import play_bandit

__all__ = [
    "BernoulliArms",
    "GaussianArms",
    "LinearArms",
    "LogisticArms",
    "bayes_optimal_regret",
    "gittins_index",
    "play_bandit",
]

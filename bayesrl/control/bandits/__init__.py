"""Bandits: a posterior over what each action pays, and rules that explore by it."""

from bayesrl.control.bandits.arms import Bandit, BernoulliArms, GaussianArms, LinearArms, LogisticArms
from bayesrl.control.bandits.beliefs import Belief, BetaBelief, LinearBelief, LogisticBelief, NormalBelief
from bayesrl.control.bandits.optimal import bayes_optimal_regret, gittins_index
from bayesrl.control.bandits.playing import BanditRuns, play_bandit
from bayesrl.control.bandits.rules import (
    Decision,
    Exploration,
    bayes_ucb,
    boltzmann,
    decide_between,
    epsilon_greedy,
    greedy,
    k_learning,
    random,
    thompson,
)

__all__ = [
    "Bandit",
    "BanditRuns",
    "Belief",
    "BernoulliArms",
    "BetaBelief",
    "Decision",
    "Exploration",
    "GaussianArms",
    "LinearArms",
    "LinearBelief",
    "LogisticArms",
    "LogisticBelief",
    "NormalBelief",
    "bayes_optimal_regret",
    "bayes_ucb",
    "boltzmann",
    "decide_between",
    "epsilon_greedy",
    "gittins_index",
    "greedy",
    "k_learning",
    "play_bandit",
    "random",
    "thompson",
]

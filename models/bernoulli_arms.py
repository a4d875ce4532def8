"""Arms that pay or do not, with unknown chances: what is learned by pulling them."""

import numpy as np

import bayesrl
from bayesrl import control
from bayesrl.control.learning.adapters import BanditEnv


def learning(
    *, arms: int = 5, best: float = 0.7, worst: float = 0.3, episodes: int = 500, runs: int = 5
) -> bayesrl.LearningProblem:
    """Make the problem: chances evenly spaced from worst to best, each with the prior Beta(1, 1).

    Args:
        arms: number of arms, at least 2.
        best: chance of the last arm.
        worst: chance of the first arm.
        episodes: number of pulls.
        runs: number of independent runs, for the bands.

    Raises:
        bayesrl.errors.ControlError: a chance is outside [0, 1], or there are too few arms.
    """
    if not 0 <= worst <= best <= 1:
        raise bayesrl.errors.ControlError(f"worst={worst!r}, best={best!r}; use 0 ≤ worst ≤ best ≤ 1")
    bandit = control.bandits.BernoulliArms(int(arms))
    chances = np.linspace(worst, best, int(arms))
    return bayesrl.LearningProblem(
        BanditEnv(bandit, chances),
        control.BayesianAgent(control.ArmsModel(bandit)),
        num_episodes=int(episodes),
        num_runs=int(runs),
        sections=(control.learning_values(chances.tolist()),),
    )

"""A trial of treatments that cure or do not; it stops once one of them is most probably the best."""

import numpy as np

import bayesrl
from bayesrl import control
from bayesrl.control.learning.adapters import BanditEnv


def learning(
    *,
    control_rate: float = 0.4,
    first_rate: float = 0.45,
    second_rate: float = 0.65,
    patients: int = 500,
    confidence: float = 0.95,
    runs: int = 5,
) -> bayesrl.LearningProblem:
    """Make the problem: a control and two treatments; each patient gets the one that a posterior draw favours.

    Args:
        control_rate: chance of a cure without treatment.
        first_rate: chance under the first treatment.
        second_rate: chance under the second treatment.
        patients: greatest number of patients.
        confidence: the trial stops once P(best) of a treatment has been at least this for ten patients.
        runs: number of independent trials, for the bands.

    References:
        Adaptive allocation and stopping: Berry (2006), "Bayesian clinical trials".
    """
    rates = np.array([control_rate, first_rate, second_rate], float)
    if not bool(((rates >= 0) & (rates <= 1)).all()):
        raise bayesrl.errors.ControlError(f"rates are {rates.tolist()}; use chances, in [0, 1]")
    bandit = control.bandits.BernoulliArms(3)
    return bayesrl.LearningProblem(
        BanditEnv(bandit, rates, names=("control", "treatment 1", "treatment 2")),
        control.BayesianAgent(control.ArmsModel(bandit)),
        num_episodes=int(patients),
        num_runs=int(runs),
        learn_options={"confidence": float(confidence)},
        sections=(control.learning_values(rates.tolist()),),
    )

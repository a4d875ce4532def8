"""Objectives of a fit; each has two pure parts, `draw` and `surrogate`."""

from bayesrl.objectives.base import Objective
from bayesrl.objectives.best_of_n import BestOfN
from bayesrl.objectives.clipped_kl import ClippedKL
from bayesrl.objectives.f_divergence import FDivergence
from bayesrl.objectives.forward_kl import ForwardKL
from bayesrl.objectives.numpyro_elbo import NumPyroELBO
from bayesrl.objectives.regularized_reward import RegularizedReward
from bayesrl.objectives.reverse_kl import ReverseKL
from bayesrl.objectives.trajectory_balance import TrajectoryBalance
from bayesrl.objectives.twist_learning import ContrastiveTwist, SoftValueRegression

__all__ = [
    "BestOfN",
    "ClippedKL",
    "ContrastiveTwist",
    "FDivergence",
    "ForwardKL",
    "NumPyroELBO",
    "Objective",
    "RegularizedReward",
    "ReverseKL",
    "SoftValueRegression",
    "TrajectoryBalance",
]

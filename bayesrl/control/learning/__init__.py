"""Learning from experience: one loop for KL-regularised and for Bayesian RL."""

from bayesrl.control.learning.agents import Agent, Bayesian
from bayesrl.control.learning.experience import Episode, Experience
from bayesrl.control.learning.kl_control import KLControl
from bayesrl.control.learning.learned import Learned, Stage
from bayesrl.control.learning.loop import learn
from bayesrl.control.learning.tabular_model import TabularModel
from bayesrl.control.learning.unknown import ProgramModel, UnknownModel, by_conjugacy
from bayesrl.control.learning.values import EnsembleValues, LastLayerValues, LinearValues
from bayesrl.control.learning.worlds import BanditWorld, World

__all__ = [
    "Agent",
    "BanditWorld",
    "Bayesian",
    "EnsembleValues",
    "Episode",
    "Experience",
    "KLControl",
    "LastLayerValues",
    "Learned",
    "LinearValues",
    "ProgramModel",
    "Stage",
    "TabularModel",
    "UnknownModel",
    "World",
    "by_conjugacy",
    "learn",
]

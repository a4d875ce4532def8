"""Learning from experience: one loop for KL-regularised and for Bayesian RL."""

from bayesrl.control.learning.agents import Bayesian
from bayesrl.control.learning.arms_model import ArmsModel
from bayesrl.control.learning.checking import check_learned, nuts_posterior, predictive_p_values
from bayesrl.control.learning.experience import Episode, Experience
from bayesrl.control.learning.kl_control import KLControl, agent_named
from bayesrl.control.learning.learned import Learned, Stage
from bayesrl.control.learning.loop import learn
from bayesrl.control.learning.minds import Agent
from bayesrl.control.learning.pictures import learning_maps, learning_values
from bayesrl.control.learning.tabular_model import TabularModel
from bayesrl.control.learning.unknown import ProgramModel, UnknownModel, by_conjugacy
from bayesrl.control.learning.values import EnsembleValues, LastLayerValues, LinearValues
from bayesrl.control.learning.world import Act, World
from bayesrl.control.learning.worlds import BanditWorld

__all__ = [
    "Act",
    "Agent",
    "ArmsModel",
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
    "agent_named",
    "by_conjugacy",
    "check_learned",
    "learn",
    "learning_maps",
    "learning_values",
    "nuts_posterior",
    "predictive_p_values",
]

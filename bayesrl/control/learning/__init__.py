"""Learning from experience: one loop for KL-regularised and for Bayesian RL."""

from bayesrl.control.learning.agents.base import Agent
from bayesrl.control.learning.agents.bayesian import Bayesian
from bayesrl.control.learning.agents.kl_control import KLControl, agent_named
from bayesrl.control.learning.env_adapter import Act, World
from bayesrl.control.learning.figures import learning_maps, learning_values
from bayesrl.control.learning.interaction import BanditWorld
from bayesrl.control.learning.loop import learn
from bayesrl.control.learning.models.arms import ArmsModel
from bayesrl.control.learning.models.base import ProgramModel, UnknownModel, by_conjugacy
from bayesrl.control.learning.models.tabular import TabularModel
from bayesrl.control.learning.models.value_regression import EnsembleValues, LastLayerValues, LinearValues
from bayesrl.control.learning.posterior_checks import check_learned, nuts_posterior, predictive_p_values
from bayesrl.control.learning.replay_memory import Episode, Experience
from bayesrl.control.learning.result import Learned, Stage

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

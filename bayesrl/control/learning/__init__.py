"""Learning from experience: one loop for KL-regularised and for Bayesian RL."""

from bayesrl.control.learning.agents.base import Agent
from bayesrl.control.learning.agents.bayesian import BayesianAgent
from bayesrl.control.learning.agents.kl_control import KLControlAgent, agent_from_name
from bayesrl.control.learning.env_adapter import EnvAdapter, EpisodePolicy
from bayesrl.control.learning.figures import learning_maps, learning_values
from bayesrl.control.learning.interaction import BanditEnv
from bayesrl.control.learning.loop import learn
from bayesrl.control.learning.models.arms import ArmsModel
from bayesrl.control.learning.models.base import EnvironmentModel, ProgramModel, conjugate_inference
from bayesrl.control.learning.models.tabular import TabularModel
from bayesrl.control.learning.models.value_regression import EnsembleValues, LastLayerValues, LinearValues
from bayesrl.control.learning.posterior_checks import check_learning, nuts_posterior, predictive_p_values
from bayesrl.control.learning.replay_memory import Episode, Experience
from bayesrl.control.learning.result import LearnResult, Snapshot

__all__ = [
    "Agent",
    "ArmsModel",
    "BanditEnv",
    "BayesianAgent",
    "EnsembleValues",
    "EnvAdapter",
    "EnvironmentModel",
    "Episode",
    "EpisodePolicy",
    "Experience",
    "KLControlAgent",
    "LastLayerValues",
    "LearnResult",
    "LinearValues",
    "ProgramModel",
    "Snapshot",
    "TabularModel",
    "agent_from_name",
    "check_learning",
    "conjugate_inference",
    "learn",
    "learning_maps",
    "learning_values",
    "nuts_posterior",
    "predictive_p_values",
]

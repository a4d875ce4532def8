"""Control: KL-regularised and Bayesian RL in environments, exact, simulated and real."""

from bayesrl.control import bandits
from bayesrl.control.actor_critic import ActorCritic
from bayesrl.control.environments.base import Environment, Transition
from bayesrl.control.environments.classic_control import CartPole, Pendulum
from bayesrl.control.environments.from_gymnasium import from_gymnasium
from bayesrl.control.environments.jax_environments import JaxEnvironment
from bayesrl.control.environments.logged import LoggedData, LoggedEnvironment, evaluate_off_policy
from bayesrl.control.environments.tabular import TabularMDP
from bayesrl.control.environments.tabular_examples import deep_sea, grid_world, river_swim
from bayesrl.control.environments.tabular_rollout import TabularOptimum, tabular_rollout
from bayesrl.control.exploration.duels import double_thompson, most_informative, pairs_to_ask
from bayesrl.control.exploration.rules import bayes_ucb, boltzmann, epsilon_greedy, greedy, k_learning, random, thompson
from bayesrl.control.figures import episode_sections, tabular_sections
from bayesrl.control.gymnasium.behaviour_policies import prior_mixture
from bayesrl.control.gymnasium.source import GymnasiumSource
from bayesrl.control.gymnasium.spaces import squashed_normal
from bayesrl.control.learning.agents.bayesian import BayesianAgent
from bayesrl.control.learning.agents.kl_control import KLControlAgent
from bayesrl.control.learning.duels import Duels
from bayesrl.control.learning.loop import learn
from bayesrl.control.learning.models.arms_model import ArmsModel
from bayesrl.control.learning.models.duels_model import DuelsModel
from bayesrl.control.learning.models.tabular import TabularModel
from bayesrl.control.learning.models.value_regression import EnsembleValues, LastLayerValues, LinearValues
from bayesrl.control.learning.posterior_checks import check_learning, nuts_posterior, predictive_p_values
from bayesrl.control.learning.report import learning_maps, learning_values
from bayesrl.control.learning.result import LearnResult
from bayesrl.control.planning import evaluate_policy, soft_value_iteration
from bayesrl.control.policies import LinearPolicy, NetworkPolicy, TablePolicy, as_prior
from bayesrl.control.rollout import Rollout

__all__ = [
    "ActorCritic",
    "ArmsModel",
    "BayesianAgent",
    "CartPole",
    "Duels",
    "DuelsModel",
    "EnsembleValues",
    "Environment",
    "GymnasiumSource",
    "JaxEnvironment",
    "KLControlAgent",
    "LastLayerValues",
    "LearnResult",
    "LinearPolicy",
    "LinearValues",
    "LoggedData",
    "LoggedEnvironment",
    "NetworkPolicy",
    "Pendulum",
    "Rollout",
    "TablePolicy",
    "TabularMDP",
    "TabularModel",
    "TabularOptimum",
    "Transition",
    "as_prior",
    "bandits",
    "bayes_ucb",
    "boltzmann",
    "check_learning",
    "deep_sea",
    "double_thompson",
    "episode_sections",
    "epsilon_greedy",
    "evaluate_off_policy",
    "evaluate_policy",
    "from_gymnasium",
    "greedy",
    "grid_world",
    "k_learning",
    "learn",
    "learning_maps",
    "learning_values",
    "most_informative",
    "nuts_posterior",
    "pairs_to_ask",
    "predictive_p_values",
    "prior_mixture",
    "random",
    "river_swim",
    "soft_value_iteration",
    "squashed_normal",
    "tabular_rollout",
    "tabular_sections",
    "thompson",
]

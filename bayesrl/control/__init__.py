"""Control: KL-regularised and Bayesian RL in environments, exact, simulated and real."""

from bayesrl.control import bandits
from bayesrl.control.behaviours import prior_mixture
from bayesrl.control.beliefs import Belief, BetaBelief, LinearBelief, LogisticBelief, NormalBelief, SampleBelief
from bayesrl.control.classics import classic, deep_sea, grid_world, n_chain, river_swim
from bayesrl.control.critic import ActorCritic
from bayesrl.control.environments import Environment, Outcome
from bayesrl.control.exploration import (
    Decision,
    Exploration,
    bayes_ucb,
    boltzmann,
    decide_between,
    epsilon_greedy,
    exploration_named,
    greedy,
    k_learning,
    random,
    thompson,
)
from bayesrl.control.figures import (
    episode_sections,
    episode_strip,
    occupancy_map,
    policy_map,
    return_curve,
    tabular_sections,
)
from bayesrl.control.gymnasium_source import GymnasiumSource
from bayesrl.control.jax_environments import JaxEnvironment
from bayesrl.control.learning import (
    Agent,
    ArmsModel,
    BanditWorld,
    Bayesian,
    EnsembleValues,
    Episode,
    Experience,
    KLControl,
    LastLayerValues,
    Learned,
    LinearValues,
    ProgramModel,
    Stage,
    TabularModel,
    UnknownModel,
    World,
    agent_named,
    by_conjugacy,
    check_learned,
    learn,
    learning_maps,
    nuts_posterior,
    predictive_p_values,
)
from bayesrl.control.logged import LoggedData, LoggedEnvironment, LoggedValue, logged_value
from bayesrl.control.physics import CartPole, Pendulum
from bayesrl.control.planning import Planned, evaluate_policy, soft_value_iteration
from bayesrl.control.policies import LinearPolicy, NetworkPolicy, TablePolicy, as_prior
from bayesrl.control.replay import Replay
from bayesrl.control.rollout import Rollout
from bayesrl.control.spaces import squashed_normal
from bayesrl.control.tabular import TabularMDP
from bayesrl.control.tabular_policy import TabularEnvironment, TabularOptimum, action_probs, tabular_rollout
from bayesrl.control.toy_text import from_gymnasium

__all__ = [
    "ActorCritic",
    "Agent",
    "ArmsModel",
    "BanditWorld",
    "Bayesian",
    "Belief",
    "BetaBelief",
    "CartPole",
    "Decision",
    "EnsembleValues",
    "Environment",
    "Episode",
    "Experience",
    "Exploration",
    "GymnasiumSource",
    "JaxEnvironment",
    "KLControl",
    "LastLayerValues",
    "Learned",
    "LinearBelief",
    "LinearPolicy",
    "LinearValues",
    "LoggedData",
    "LoggedEnvironment",
    "LoggedValue",
    "LogisticBelief",
    "NetworkPolicy",
    "NormalBelief",
    "Outcome",
    "Pendulum",
    "Planned",
    "ProgramModel",
    "Replay",
    "Rollout",
    "SampleBelief",
    "Stage",
    "TablePolicy",
    "TabularEnvironment",
    "TabularMDP",
    "TabularModel",
    "TabularOptimum",
    "UnknownModel",
    "World",
    "action_probs",
    "agent_named",
    "as_prior",
    "bandits",
    "bayes_ucb",
    "boltzmann",
    "by_conjugacy",
    "check_learned",
    "classic",
    "decide_between",
    "deep_sea",
    "episode_sections",
    "episode_strip",
    "epsilon_greedy",
    "evaluate_policy",
    "exploration_named",
    "from_gymnasium",
    "greedy",
    "grid_world",
    "k_learning",
    "learn",
    "learning_maps",
    "logged_value",
    "n_chain",
    "nuts_posterior",
    "occupancy_map",
    "policy_map",
    "predictive_p_values",
    "prior_mixture",
    "random",
    "return_curve",
    "river_swim",
    "soft_value_iteration",
    "squashed_normal",
    "tabular_rollout",
    "tabular_sections",
    "thompson",
]

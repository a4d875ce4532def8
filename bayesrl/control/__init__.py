"""Control: KL-regularised RL in environments, exact, simulated and real."""

from bayesrl.control.behaviours import epsilon_greedy, prior_mixture
from bayesrl.control.critic import ActorCritic
from bayesrl.control.environments import Environment, Outcome
from bayesrl.control.gymnasium_source import GymnasiumSource
from bayesrl.control.physics import CartPole, Pendulum
from bayesrl.control.policies import LinearPolicy, NetworkPolicy, TablePolicy
from bayesrl.control.rollout import Rollout
from bayesrl.control.spaces import squashed_normal

__all__ = [
    "ActorCritic",
    "CartPole",
    "Environment",
    "GymnasiumSource",
    "LinearPolicy",
    "NetworkPolicy",
    "Outcome",
    "Pendulum",
    "Rollout",
    "TablePolicy",
    "epsilon_greedy",
    "prior_mixture",
    "squashed_normal",
]

"""A walk along a cliff, where a step too far costs 100: a tabular problem with its exact optimum."""

import bayesrl
from bayesrl import control


def problem(*, beta: float = 1.0, discount: float = 0.99, horizon: int = 200, steps: int = 4000) -> bayesrl.Problem:
    """Make the problem from Gymnasium's CliffWalking-v1.

    Args:
        beta: default temperature, reward units per nat.
        discount: γ.
        horizon: steps after which an episode is cut off, and what would follow is valued by the critic.
        steps: gradient steps.
    """
    mdp = control.from_gymnasium("CliffWalking-v1", discount=discount)
    return bayesrl.Problem(
        control.tabular_rollout(mdp, horizon=int(horizon)),
        beta=beta,
        fit_options={
            "guide": control.TablePolicy(),
            "objective": control.ActorCritic(num_particles=64, trace=0.9),
            "num_steps": int(steps),
        },
        exact=control.TabularOptimum(mdp),
        sections=(control.tabular_sections(mdp),),
    )

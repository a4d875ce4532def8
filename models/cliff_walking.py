"""A walk along a cliff, where a step too far costs 100: a tabular problem with its exact optimum."""

import optax

import bayesrl
from bayesrl import control

NEEDS = {"gymnasium": {}}


def problem(*, beta: float = 1.0, discount: float = 0.99, horizon: int = 200, steps: int = 3000) -> bayesrl.Problem:
    """Make the problem from Gymnasium's CliffWalking-v1.

    Args:
        beta: default temperature, reward units per nat.
        discount: γ.
        horizon: steps after which an episode is truncated.
        steps: gradient steps.
    """
    mdp = control.from_gymnasium("CliffWalking-v1", discount=discount)
    return bayesrl.Problem(
        control.tabular_rollout(mdp, horizon=int(horizon)),
        beta=beta,
        fit_options={
            "guide": control.TablePolicy(),
            # A fit that starts cold settles on a longer path, away from the edge.
            "start_beta": 10 * beta,
            "objective": bayesrl.objectives.ReverseKL(num_particles=64),
            "optimizer": optax.adam(optax.cosine_decay_schedule(0.1, int(steps))),
            "num_steps": int(steps),
        },
        optimum=control.TabularOptimum(mdp),
        sections=(control.tabular_sections(mdp),),
    )

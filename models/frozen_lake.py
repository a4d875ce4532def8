"""A walk over a frozen lake to a goal between holes, on slippery ice: a tabular problem with its exact optimum."""

from functools import partial

import bayesrl
from bayesrl import control
from bayesrl.control.learning.agents.kl_control import agent_from_name

NEEDS = {"gymnasium": {}}


def problem(
    *,
    beta: float = 0.01,
    size: int = 4,
    slippery: bool = True,
    discount: float = 0.99,
    horizon: int = 150,
    steps: int = 3000,
) -> bayesrl.Problem:
    """Make the problem from Gymnasium's FrozenLake-v1.

    Args:
        beta: default temperature, reward units per nat.
        size: 4 or 8, rows and columns of the lake.
        slippery: whether the ice may carry the walker to either side.
        discount: γ.
        horizon: steps after which an episode is truncated; the critic values what would follow.
        steps: gradient steps.

    Raises:
        bayesrl.errors.ControlError: `size` is neither 4 nor 8.
    """
    import gymnasium

    if size not in (4, 8):
        raise bayesrl.errors.ControlError(f"size={size!r}; Gymnasium has lakes of 4 × 4 and 8 × 8")
    env = gymnasium.make("FrozenLake-v1", map_name=f"{size}x{size}", is_slippery=slippery)
    mdp = control.from_gymnasium(env, discount=discount)
    return bayesrl.Problem(
        control.tabular_rollout(mdp, horizon=int(horizon)),
        beta=beta,
        fit_options={
            "guide": control.TablePolicy(),
            "objective": control.ActorCritic(num_particles=128, trace=1.0),
            "num_steps": int(steps),
        },
        optimum=control.TabularOptimum(mdp),
        sections=(control.tabular_sections(mdp),),
        engines={},
    )


def learning(
    *, size: int = 4, slippery: bool = True, episodes: int = 500, runs: int = 3, agent: str = "bayesian"
) -> bayesrl.LearningProblem:
    """Make the problem of learning the lake from experience, on Gymnasium's own environment.

    The model knows the neighbours of each cell, that an episode is truncated after 100 steps (200 for 8 × 8), and that
    only its end pays. It has to learn how slippery the ice is, and where the holes and the goal are.

    Args:
        size: 4 or 8, rows and columns of the lake.
        slippery: whether the ice may carry the walker to either side.
        episodes: number of episodes.
        runs: number of independent runs, for the bands.
        agent: `bayesian`, or `kl_control` for comparison.
    """
    import gymnasium

    if size not in (4, 8):
        raise bayesrl.errors.ControlError(f"size={size!r}; Gymnasium has lakes of 4 × 4 and 8 × 8")
    make = partial(gymnasium.make, "FrozenLake-v1", map_name=f"{size}x{size}", is_slippery=slippery)
    mdp = control.from_gymnasium(make(), discount=1.0, horizon=100 if size == 4 else 200)
    model = control.TabularModel.of(mdp, ends_known=False, paid_at_end=True, concentration=0.5, noise=0.01)
    return bayesrl.LearningProblem(
        make,
        agent_from_name(agent, model, beta=0.01),
        num_episodes=int(episodes),
        num_runs=int(runs),
        sections=(control.learning_maps(mdp),),
    )

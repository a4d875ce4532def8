"""A swim against the current to a reward that chance rarely finds: a tabular problem with its exact optimum."""

import bayesrl
from bayesrl import control
from bayesrl.control.learning.agents.kl_control import agent_from_name


def problem(*, beta: float = 0.1, states: int = 6, horizon: int = 20, steps: int = 2000) -> bayesrl.Problem:
    """Make the problem of Strehl & Littman (2008), with a separate policy for each step.

    Args:
        beta: default temperature, reward units per nat.
        states: length of the river.
        horizon: steps of an episode.
        steps: gradient steps.
    """
    mdp = control.river_swim(num_states=int(states), horizon=int(horizon))
    return bayesrl.Problem(
        control.tabular_rollout(mdp),
        beta=beta,
        fit_options={
            "guide": control.TablePolicy(stationary=False),
            "objective": control.ActorCritic(num_particles=128, trace=1.0),
            "num_steps": int(steps),
        },
        optimum=control.TabularOptimum(mdp),
        sections=(control.tabular_sections(mdp),),
    )


def learning(
    *, states: int = 6, horizon: int = 20, episodes: int = 200, runs: int = 3, agent: str = "bayesian"
) -> bayesrl.LearningProblem:
    """Make the problem with an unknown river: the model knows where one may drift, but not how likely or what it pays.

    Args:
        states: length of the river.
        horizon: steps of an episode.
        episodes: number of episodes.
        runs: number of independent runs, for the bands.
        agent: `bayesian`, or `kl_control` for comparison.
    """
    mdp = control.river_swim(num_states=int(states), horizon=int(horizon))
    return bayesrl.LearningProblem(
        mdp,
        agent_from_name(agent, control.TabularModel.of(mdp, noise=0.01), beta=0.1),
        num_episodes=int(episodes),
        num_runs=int(runs),
        sections=(control.learning_maps(mdp),),
    )

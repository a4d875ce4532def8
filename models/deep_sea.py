"""A dive to the far corner of a square, which only purposeful exploration finds; to fit or to learn."""

import bayesrl
from bayesrl import control
from bayesrl.control.learning.agents.kl_control import agent_from_name


def problem(*, beta: float = 0.05, size: int = 8, steps: int = 2000) -> bayesrl.Problem:
    """Make the problem with known dynamics, for KL-regularised RL.

    Args:
        beta: default temperature, reward units per nat.
        size: rows and columns of the square.
        steps: gradient steps.
    """
    mdp = control.deep_sea(size=int(size))
    return bayesrl.Problem(
        control.tabular_rollout(mdp),
        beta=beta,
        fit_options={
            "guide": control.TablePolicy(),
            "objective": control.ActorCritic(num_particles=128, trace=1.0),
            "num_steps": int(steps),
            "start_beta": 20 * beta,
        },
        optimum=control.TabularOptimum(mdp),
        sections=(control.tabular_sections(mdp),),
    )


def learning(
    *, size: int = 10, episodes: int = 400, runs: int = 3, agent: str = "bayesian", noise: float = 0.01
) -> bayesrl.LearningProblem:
    """Make the problem with unknown dynamics and rewards.

    The model knows that each step leads one row down, left or right. It has to learn which action does which, and what
    it pays.

    Args:
        size: rows and columns of the square; also the length of an episode.
        episodes: number of episodes.
        runs: number of independent runs, for the bands.
        agent: `bayesian`, or `kl_control` for comparison.
        noise: the model's standard deviation of a reward, reward units.
    """
    mdp = control.deep_sea(size=int(size))
    return bayesrl.LearningProblem(
        mdp,
        agent_from_name(agent, control.TabularModel.of(mdp, noise=noise), beta=0.05),
        num_episodes=int(episodes),
        num_runs=int(runs),
        sections=(control.learning_maps(mdp),),
    )

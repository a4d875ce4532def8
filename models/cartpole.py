"""A pole to be balanced on a cart: the real Gymnasium environment, or the same physics as a program."""

import optax

import bayesrl
from bayesrl import control

NEEDS = {"gymnasium": {"physics": "gymnasium"}}


def problem(
    *, beta: float = 0.01, physics: str = "gymnasium", steps: int = 0, horizon: int = 500, seed: int = 0
) -> bayesrl.Problem:
    """Make the problem: rewards discounted by .98 in the real environment, undiscounted as a program.

    Args:
        beta: default temperature, reward units per nat.
        physics: `gymnasium` plays in the real CartPole-v1, `program` in its physics written as a NumPyro program.
        steps: gradient steps; 0 takes a number that suffices.
        horizon: greatest number of steps of an episode, as a program.
        seed: seed of the real environments.

    Raises:
        bayesrl.errors.ControlError: `physics` is neither of these two.
    """
    sections = (control.episode_sections("CartPole-v1"),)
    if physics == "program":
        total = int(steps) or 40
        return bayesrl.Problem(
            control.Rollout(control.CartPole(), int(horizon)),
            beta=beta,
            fit_options={
                "guide": control.NetworkPolicy(),
                "objective": control.ActorCritic(num_particles=32, trace=0.98),
                "optimizer": optax.adam(optax.linear_schedule(0.005, 0.0, total)),
                "num_steps": total,
            },
            sections=sections,
        )
    if physics != "gymnasium":
        raise bayesrl.errors.ControlError(f"physics={physics!r}; use 'gymnasium' or 'program'")
    total = int(steps) or 3000
    source = control.GymnasiumSource("CartPole-v1", num_envs=8, window=32, num_updates=20, seed=int(seed))
    return bayesrl.Problem(
        source.policy(discount=0.98),
        beta=beta,
        fit_options={
            "guide": control.NetworkPolicy(),
            "objective": control.ActorCritic(trace=0.8),
            # The size of gradients changes as the policy learns, so Adam must forget old ones fast.
            "optimizer": optax.adam(optax.linear_schedule(0.003, 0.0, total), b2=0.99),
            "num_steps": total,
            "source": source,
        },
        sections=sections,
    )

"""A pendulum to swing up and balance by a torque: continuous actions, in the real environment or as a program."""

import optax

import bayesrl
from bayesrl import control

NEEDS = {"gymnasium": {"physics": "gymnasium"}}


def problem(*, beta: float = 0.05, physics: str = "program", steps: int = 0, seed: int = 0) -> bayesrl.Problem:
    """Make the problem; rewards are discounted by .95.

    Args:
        beta: default temperature, reward units per nat.
        physics: `program` simulates Pendulum-v1 as a NumPyro program, `gymnasium` plays in the real one.
        steps: gradient steps; 0 takes a number that suffices.
        seed: seed of the real environments.

    Raises:
        bayesrl.errors.ControlError: `physics` is neither of these two.
    """
    if physics not in ("program", "gymnasium"):
        raise bayesrl.errors.ControlError(f"physics={physics!r}; use 'program' or 'gymnasium'")
    real = physics == "gymnasium"
    total = int(steps) or (6000 if real else 1000)
    options = {
        "guide": control.NetworkPolicy(),
        "objective": control.ActorCritic(num_particles=64, trace=0.95, step_weights="equal"),
        "optimizer": optax.adam(optax.linear_schedule(0.003, 0.0, total)),
        "num_steps": total,
    }
    sections = (control.episode_sections("Pendulum-v1"),)
    if not real:
        return bayesrl.Problem(
            control.Rollout(control.Pendulum(), 200, 0.95, unbounded=True),
            beta=beta,
            fit_options={**options, "source": bayesrl.ReuseDraws(num_particles=64, num_updates=10)},
            sections=sections,
        )
    source = control.GymnasiumSource("Pendulum-v1", num_envs=8, window=128, num_updates=20, seed=int(seed))
    return bayesrl.Problem(
        source.policy(discount=0.95), beta=beta, fit_options={**options, "source": source}, sections=sections
    )

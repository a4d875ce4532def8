"""A pole to be balanced on a cart: the real Gymnasium environment, or the same physics as a program."""

import optax

import bayesrl
from bayesrl import control


def problem(
    *, beta: float = 0.01, physics: str = "gymnasium", discount: float = 0.98, steps: int = 0, seed: int = 0
) -> bayesrl.Problem:
    """Make the problem.

    Args:
        beta: default temperature, reward units per nat.
        physics: `gymnasium` plays in the real CartPole-v1, `program` in its physics written as a NumPyro program.
        discount: γ.
        steps: gradient steps; 0 takes what has been enough.
        seed: of the real environments.

    Raises:
        bayesrl.errors.ControlError: `physics` is neither.
    """
    if physics not in ("gymnasium", "program"):
        raise bayesrl.errors.ControlError(f"physics={physics!r}; use 'gymnasium' or 'program'")
    real = physics == "gymnasium"
    total = int(steps) or (4000 if real else 250)
    options = {
        "guide": control.NetworkPolicy(),
        "objective": control.ActorCritic(num_particles=32, trace=0.8 if real else 0.95),
        "optimizer": optax.adam(optax.linear_schedule(0.002 if real else 0.01, 0.0, total)),
        "num_steps": total,
    }
    sections = (control.episode_sections("CartPole-v1"),)
    if not real:
        program = control.Rollout(control.CartPole(), 500, discount)
        return bayesrl.Problem(program, beta=beta, fit_options=options, sections=sections)
    source = control.GymnasiumSource("CartPole-v1", num_envs=8, window=32, num_updates=20, seed=int(seed))
    return bayesrl.Problem(
        source.policy(discount=discount),
        beta=beta,
        fit_options={**options, "source": source},
        sections=sections,
    )

"""`init`: the state of a fit before its first step, for your own training loops."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from numpyro.infer.elbo import ELBO

from bayesrl.arguments import Count, Positive, Untraced, UnusedOption, checked
from bayesrl.compilation.callbacks import host_errors
from bayesrl.compilation.jit import trace_cache
from bayesrl.errors import FitError
from bayesrl.guides.base import Guide
from bayesrl.objectives import Objective, ReverseKL
from bayesrl.objectives.numpyro_elbo import as_objective
from bayesrl.svi.optimizers import UNPILOTED_RATE, Optimizer, as_optimizer, check_update, default_optimizer
from bayesrl.svi.problem_setup import set_up
from bayesrl.svi.step import State, StepConfig, start
from bayesrl.typing import Beta, PRNGKey, Program


@checked(
    FitError,
    Untraced("call it outside, and put bayesrl.step under jax.jit, or under jax.vmap over states"),
    UnusedOption("learning_rate", lambda given: given["optimizer"] is not None, "the optimiser has a rate of its own"),
    UnusedOption("num_steps", lambda given: given["optimizer"] is not None, "only the default optimiser's rate falls"),
)
def init(
    key: PRNGKey,
    policy: Program,
    *args: Any,
    beta: Beta | None = None,
    guide: Guide | None = None,
    objective: Objective | ELBO | None = None,
    optimizer: Optimizer | None = None,
    learning_rate: Positive | None = None,
    num_steps: Count = 2000,
) -> State:
    """Check a policy and a guide, and start a fit without running it; `step` then takes one step at a time.

    `bayesrl.fit` is this start, this step, and a loop around it with history, checkpoints and restarts. With the keys
    of `fit`, your loop reaches its parameters, up to rounding: step i of `fit(key, ...)` uses
    `step_key(lane_keys(key, 1)[0], i)` of `bayesrl.svi.step`.

    Args:
        key: for the random choices before the first step; consumed whole.
        policy: a NumPyro program that draws actions and collects `bayesrl.reward`s.
        *args: its arguments; arrays are leaves of the state, everything else is static.
        beta: temperature, reward units per nat: a number. For several, spread one state over them,
            `states = jax.vmap(lambda beta: dataclasses.replace(state, beta=beta))(betas)`, and step under `jax.vmap`.
        guide: as in `fit`.
        objective: as in `fit`.
        optimizer: as in `fit`; by default Adam with a cosine decay to 0 over `num_steps`.
        learning_rate: of the default optimiser at its first step. By default, the rate that the guide's family
            suggests, or 0.005 for a hand-written guide, for which `fit` chooses the rate by pilots.
        num_steps: how many steps the loop will take, for the decay of the default optimiser.

    Returns:
        `State`, with unbatched parameters [...] and a scalar β. Whatever the programs read besides their arguments
        is read once, when `step` is traced.

    Raises:
        PolicyError, GuideError, ObjectiveError: the programs cannot be fitted with these options.

    Example:
        >>> import jax, jax.numpy as jnp, numpyro, numpyro.distributions as dist, optax, bayesrl
        >>> def bandit():
        ...     arm = numpyro.sample("arm", dist.Categorical(logits=jnp.zeros(3)))
        ...     bayesrl.reward("payoff", jnp.array([0.0, 1.0, 2.0])[arm])
        >>> state = bayesrl.init(jax.random.key(0), bandit, beta=1.0, optimizer=optax.sgd(1.0))
        >>> step = jax.jit(bayesrl.step)
        >>> for i in range(200):
        ...     state, info = step(jax.random.fold_in(jax.random.key(1), i), state)
        >>> round(float(info.objective), 3)  # log((1 + e + e²) / 3)
        1.309
    """
    if isinstance(beta, np.ndarray | jax.Array) and beta.ndim > 0:
        raise FitError(
            f"beta has shape {beta.shape}; pass one number, and spread the state over several: "
            "jax.vmap(lambda beta: dataclasses.replace(state, beta=beta))(betas)"
        )
    given = None if optimizer is None else as_optimizer(optimizer)
    with trace_cache(), host_errors():
        chosen = ReverseKL() if objective is None else as_objective(objective)
        setup = set_up(key, policy, args, beta, guide, chosen, 1)
        rate = learning_rate or setup.learning_rate or UNPILOTED_RATE
        optimiser = default_optimizer(rate, num_steps) if given is None else given
        check_update(optimiser, setup.params)
        config = StepConfig(setup.objective, optimiser, setup.programs)
        stacked = start(config, jax.tree.map(jnp.asarray, setup.params))
    train = jax.tree.map(lambda x: x[0], stacked._replace(step=stacked.step[None]))
    return State(train, jnp.asarray(setup.betas[0]), eqx.filter(setup.programs.args, eqx.is_array), config)

"""One gradient step as a pure function, and chunks of steps in one jit, over lanes of (β, restart)."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array, lax

from bayesrl.arguments import checked
from bayesrl.compilation.random_keys import fold_in, split
from bayesrl.core.draws import Draws
from bayesrl.core.programs import Programs
from bayesrl.errors import FitError
from bayesrl.objectives.base import Info, Objective, guide_params, info_from_reused_draws
from bayesrl.typing import Numbers, Params, PRNGKey, PRNGKeys, Program
from bayesrl.value_checks import LEAST, format_value, is_real, is_traced

AVERAGING_POWER = 8.0
"""η of polynomial-decay averaging (Shamir & Zhang 2013): about the last 1/η of the run counts."""

_OF_STEPS = 5
"""The number to fold the key of a fit with, for the keys of its steps."""


class FitState(NamedTuple):
    """The arrays that training changes and a checkpoint stores.

    Attributes:
        params: unconstrained parameters of the guide.
        opt_state: state of the optimiser.
        average: running average of the parameters.
        skipped: number of steps skipped because the loss or its gradient was not finite.
        step: number of steps done.
    """

    params: Params
    opt_state: Any
    average: Params
    skipped: Array
    step: Array


@dataclass(frozen=True, eq=False)
class StepConfig:
    """The part of a fit that no step changes.

    It compares by identity, so that `jax.jit` reuses the trace of one state for its successors.

    Attributes:
        objective: prepared for the programs.
        optimizer: of the parameters.
        programs: policy and guide; `bind` replaces the arrays among their arguments by those of the state.
    """

    objective: Objective
    optimizer: optax.GradientTransformation
    programs: Programs

    def bind(self, args: Any) -> Programs:
        """Return the programs with these arrays among their arguments."""
        return replace(
            self.programs, args=eqx.combine(args, eqx.filter(self.programs.args, eqx.is_array, inverse=True))
        )


class State(eqx.Module):
    """State of a fit: a pytree of arrays, for `jax.jit`, `jax.vmap` over seeds or β, and `jax.lax.scan`.

    Attributes:
        train: parameters, optimiser, average and counts, which is all that a checkpoint must store.
        beta: temperature, reward units per nat; 1 without rewards. You may change it between steps (annealing).
        args: arrays among the arguments of policy and guide.
        config: the part that no step changes; static.

    Example:
        >>> import jax, jax.numpy as jnp, numpyro, numpyro.distributions as dist, bayesrl
        >>> def bandit():
        ...     arm = numpyro.sample("arm", dist.Categorical(logits=jnp.zeros(3)))
        ...     bayesrl.reward("payoff", jnp.array([0.0, 1.0, 2.0])[arm])
        >>> state = bayesrl.init(jax.random.key(0), bandit, beta=1.0)
        >>> jax.tree.map(jnp.shape, state.params), int(state.train.step)
        ({'arm$table': (3,)}, 0)
    """

    train: FitState
    beta: Any
    args: Any
    config: StepConfig = eqx.field(static=True)

    GIVEN_BY: ClassVar[str] = "as bayesrl.init gives it"

    @property
    def params(self) -> Params:
        """Parameters as the guide declares them, averaged over the last part of the run; `Posterior.at` takes them."""
        return self.config.programs.constrain(guide_params(self.train.average))

    @property
    def policy(self) -> Program:
        """The policy with its own parameters as they were at the start of the run: the prior."""
        return self.config.programs.policy

    @property
    def guide(self) -> Program | None:
        """The program that draws; None if the policy draws nothing."""
        return self.config.programs.guide

    @property
    def lane_axes(self) -> "State":
        """Axes of a state of several lanes, for `jax.vmap`; lanes share the step count and the arguments."""
        return State(LANES, 0, None, self.config)


LANES: Any = FitState(0, 0, 0, 0, None)  # type: ignore[arg-type]
"""The axes of several lanes, which share the step count."""


class StepInfo(NamedTuple):
    """Statistics of one step, or their sum over several: means over draws and contexts, 0 if the step was skipped.

    With both data and rewards, J is known up to −β·log p(y) and KL up to log p(y), as in `Info`.

    Attributes:
        taken: 1 if loss and gradient were finite, else 0.
        loss: nats.
        grad_norm: Euclidean norm of the gradient.
        objective: J = E_q[R] − β·KL(q‖π₀), reward units (the ELBO, nats, without rewards).
        reward: E_q[R], reward units.
        kl: KL(q‖π₀), nats.
        spread: variance of the log-ratio w over draws, nats²; near the optimum, the gap J* − J is β/2 times this.
        metrics: means of the deterministic sites.
        nonfinite: number of draws with a non-finite reward, by reward site.
    """

    taken: Array
    loss: Array
    grad_norm: Array
    objective: Array
    reward: Array
    kl: Array
    spread: Array
    metrics: dict[str, Array]
    nonfinite: dict[str, Array]


def start(config: StepConfig, params: Params) -> FitState:
    """Start training from stacked parameters, [lanes, ...]."""
    lanes = jax.tree.leaves(params)[0].shape[0] if jax.tree.leaves(params) else 1
    opt_state = jax.vmap(config.optimizer.init)(params)
    return FitState(params, opt_state, params, jnp.zeros(lanes, jnp.int32), jnp.zeros((), jnp.int32))


def lane_keys(key: PRNGKey, num_lanes: int) -> PRNGKeys:
    """Return the key of each lane, [lanes], in a fit with this key; see `step_key`."""
    return split(fold_in(key, _OF_STEPS), num_lanes)


def step_key(lane_key: PRNGKey, step: Numbers) -> PRNGKey:
    """Return the key of a step: folded with its number, not split, so that a run cut anywhere resumes bit for bit."""
    return fold_in(lane_key, step)


@checked(FitError)
def step(key: PRNGKey, state: State) -> tuple[State, StepInfo]:
    """Take one gradient step: the step of `bayesrl.fit`, for loops of your own.

    θ ← θ − optimizer(∇ loss(θ)), where the gradient is the objective's estimate of −∇J(θ)/β from fresh draws. If the
    loss or its gradient is not finite, or a traced β is not above 0, the step changes only the counts and the average.
    The function is pure: use it under `jax.jit`, inside `jax.lax.scan`, or under `jax.vmap` over stacked states.

    Args:
        key: consumed whole; the draws of the step come from it.
        state: from `init`, or from the previous step.

    Returns:
        The next state, and a `StepInfo` of scalars: loss, J, E[R], KL, spread, metrics.

    Raises:
        FitError: β of the state is not a number above 0, where its value is known: outside of `jax.jit`.

    Example:
        >>> import jax, jax.numpy as jnp, numpyro, numpyro.distributions as dist, bayesrl
        >>> def bandit():
        ...     arm = numpyro.sample("arm", dist.Categorical(logits=jnp.zeros(3)))
        ...     bayesrl.reward("payoff", jnp.array([0.0, 1.0, 2.0])[arm])
        >>> state = bayesrl.init(jax.random.key(0), bandit, beta=1.0, num_steps=500)
        >>> keys = jax.random.split(jax.random.key(1), 500)
        >>> state, info = jax.lax.scan(lambda state, key: bayesrl.step(key, state), state, keys)
        >>> round(float(info.objective[-1]), 3)  # log((1 + e + e²) / 3)
        1.309
        >>> posterior = bayesrl.Posterior.at(bandit, state.guide, state.params, beta=1.0)
        >>> round(float(bayesrl.evidence(jax.random.key(2), posterior).gap.lower), 4)
        0.0
    """
    _check_beta(state.beta)
    config, programs = state.config, state.config.bind(state.args)

    def loss_fn(params: Params) -> tuple[Array, Info]:
        return config.objective.evaluate(key, params, programs, state.beta)

    (loss, info), gradient = jax.value_and_grad(loss_fn, has_aux=True)(state.train.params)
    return _apply(state, loss, info, gradient, lambda params: loss_fn(params)[0])


def _check_beta(beta: Any) -> None:
    """Refuse a temperature of a state that cannot be one, as far as its number is known.

    Raises:
        FitError: it is not a single number above 0.
    """
    if np.shape(beta) != () or not (is_real(beta) and (is_traced(beta) or beta >= LEAST)):
        raise FitError(
            f"the state has beta={beta if is_real(beta) else format_value(beta)}; replace it by one number above 0, "
            "in reward units per nat, and step several under jax.vmap, one state each"
        )


def step_on_draws(state: State, draws: Draws, *, one_batch: bool = False) -> tuple[State, StepInfo]:
    """Take one step on given draws of the guide, instead of the objective's own.

    Args:
        state: of one lane.
        draws: from the guide as it is or as it was, [particles, ...]; rescored, so that gradients flow. Their original
            log q gives J and KL of the policy that drew them.
        one_batch: whether all draws have the same mini-batch.
    """
    config, programs = state.config, state.config.bind(state.args)

    def loss_fn(params: Params) -> tuple[Array, Info]:
        rescored = programs.again(params, draws, one_batch=one_batch)
        return config.objective.surrogate(params, rescored, programs, state.beta)

    (loss, info), gradient = jax.value_and_grad(loss_fn, has_aux=True)(state.train.params)
    if not config.objective.weighs_behaviour:
        info = info_from_reused_draws(info, draws, programs, state.beta)
    return _apply(state, loss, info, gradient, lambda params: loss_fn(params)[0])


def _apply(
    state: State, loss: Array, info: Info, gradient: Params, value_fn: Callable[[Params], Array]
) -> tuple[State, StepInfo]:
    old = state.train
    grad_norm = optax.tree.norm(gradient)
    # A traced β is known only here: with one that is not above 0, the gradient would lead away from the optimum.
    fine = jnp.isfinite(loss) & jnp.isfinite(grad_norm) & (state.beta > 0)
    # A line search evaluates the loss on this step's own draws, so that it compares like with like.
    updates, opt_state = optax.with_extra_args_support(state.config.optimizer).update(
        gradient, old.opt_state, old.params, value=loss, grad=gradient, value_fn=value_fn
    )
    params = optax.apply_updates(old.params, updates)

    def keep(new: Any, old: Any) -> Any:
        # Not `lax.cond`: under `vmap` over lanes it would compute both branches too.
        return jax.tree.map(lambda a, b: jnp.where(fine, a, b), new, old)

    params, opt_state = keep(params, old.params), keep(opt_state, old.opt_state)
    # The first rate is 1, so the initial parameters drop out of the average.
    rate = (AVERAGING_POWER + 1) / (old.step + 1 + AVERAGING_POWER)
    average = jax.tree.map(lambda a, p: a + rate.astype(a.dtype) * (p - a), old.average, params)
    new = FitState(params, opt_state, average, old.skipped + ~fine, old.step + 1)
    seen = StepInfo(fine.astype(jnp.float32), loss, grad_norm, *info)
    # Keep these counts of a skipped step, because they say why it was skipped.
    counted = keep(seen, jax.tree.map(jnp.zeros_like, seen))._replace(nonfinite=info.nonfinite)
    return replace(state, train=new), counted


def run_chunk(keys: PRNGKeys, state: State, num_steps: Numbers) -> tuple[FitState, StepInfo]:
    """Take `num_steps` steps of every lane; one compilation serves every number of steps.

    Args:
        keys: one per lane, [lanes]; see `step_key`.
        state: of all lanes; every leaf has the lane axis, except the step count and the arguments.
        num_steps: how many, traced.
    """

    # jit caches the trace: `sum_steps` needs it twice, for the shapes and inside the loop.
    @jax.jit
    def all_lanes(keys: PRNGKeys, state: State) -> tuple[FitState, StepInfo]:
        def one(key: PRNGKey, lane: State) -> tuple[FitState, StepInfo]:
            new, info = step(step_key(key, lane.train.step), lane)
            return new.train, info

        return jax.vmap(one, in_axes=(0, state.lane_axes), out_axes=(LANES, 0))(keys, state)

    return sum_steps(lambda train: all_lanes(keys, replace(state, train=train)), state.train, num_steps)


def sum_steps(
    take: Callable[[FitState], tuple[FitState, StepInfo]], train: FitState, num_steps: Numbers
) -> tuple[FitState, StepInfo]:
    """Take `num_steps` steps, and sum their statistics. The loop carries no data, because it would copy them."""
    zero = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(take, train)[1])

    def body(_: Array, carried: tuple[FitState, StepInfo]) -> tuple[FitState, StepInfo]:
        new, info = take(carried[0])
        return new, jax.tree.map(jnp.add, carried[1], info)

    return lax.fori_loop(0, num_steps, body, (train, zero))

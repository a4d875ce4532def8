"""The one training loop: pure `init` and `step`, run in chunks inside one jit, over lanes of (β, restart)."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array, lax

from bayesrl.compilation.keys import fold_in
from bayesrl.core.draws import Draws
from bayesrl.core.programs import Programs
from bayesrl.objectives import Info, Objective
from bayesrl.objectives.base import info_from_reused_draws
from bayesrl.typing import Numbers, Params, PRNGKey, PRNGKeys

AVERAGING_POWER = 8.0
"""η of polynomial-decay averaging (Shamir & Zhang 2013): about the last 1/η of the run counts."""


class State(NamedTuple):
    """State of a fit; every leaf but `step` has the leading axis of the lanes.

    Attributes:
        params: unconstrained parameters of the guide.
        opt_state: of the optimiser.
        average: running average of the parameters.
        skipped: steps not taken because the loss or its gradient was not finite.
        step: steps done.
    """

    params: Params
    opt_state: Any
    average: Params
    skipped: Array
    step: Array


class StepSums(NamedTuple):
    """Sums over the steps of a chunk, by lane."""

    taken: Array
    loss: Array
    grad_norm: Array
    info: Info


@dataclass(frozen=True)
class StepConfig:
    """What all lanes share: the objective, the optimiser, and the programs with given arguments."""

    objective: Objective
    optimizer: optax.GradientTransformation
    bind: Callable[[Any], Programs]


def init(lane: StepConfig, params: Params) -> State:
    """Start a fit from stacked parameters, [lanes, ...]."""
    lanes = jax.tree.leaves(params)[0].shape[0] if jax.tree.leaves(params) else 1
    opt_state = jax.vmap(lane.optimizer.init)(params)
    return State(params, opt_state, params, jnp.zeros(lanes, jnp.int32), jnp.zeros((), jnp.int32))


def step(lane: StepConfig, key: PRNGKey, state: State, beta: Array, args: Any) -> tuple[State, StepSums]:
    """Take one step of one lane.

    Args:
        lane: what all lanes share.
        key: consumed whole.
        state: of this lane, without the axis of the lanes.
        beta: temperature, reward units per nat.
        args: arrays among the programs' arguments.
    """
    programs = lane.bind(args)

    def loss_fn(params: Params) -> tuple[Array, Info]:
        return lane.objective.evaluate(key, params, programs, beta)

    (loss, info), gradient = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
    return _apply(lane, state, loss, info, gradient, lambda params: loss_fn(params)[0])


def step_on_draws(
    lane: StepConfig, state: State, draws: Draws, beta: Array, args: Any, *, one_batch: bool = False
) -> tuple[State, StepSums]:
    """Take one step of one lane on given draws of its guide, in the place of the objective's own.

    Args:
        lane: what all lanes share.
        state: of this lane, without the axis of the lanes.
        draws: made by the guide as it stands, or as it stood, [particles, ...]; scored afresh, so that gradients flow.
            What they came with as log q tells J and KL of the policy that drew them.
        beta: temperature, reward units per nat.
        args: arrays among the programs' arguments.
        one_batch: whether the draws are of one mini-batch.
    """
    programs = lane.bind(args)

    def loss_fn(params: Params) -> tuple[Array, Info]:
        return lane.objective.surrogate(params, programs.again(params, draws, one_batch=one_batch), programs, beta)

    (loss, info), gradient = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
    return _apply(
        lane,
        state,
        loss,
        info_from_reused_draws(info, draws, programs, beta),
        gradient,
        lambda params: loss_fn(params)[0],
    )


def _apply(
    lane: StepConfig, state: State, loss: Array, info: Info, gradient: Params, value_fn: Callable[[Params], Array]
) -> tuple[State, StepSums]:
    grad_norm = optax.tree.norm(gradient)
    fine = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
    # A search along a line sees the loss of this step's own draws.
    updates, opt_state = optax.with_extra_args_support(lane.optimizer).update(
        gradient, state.opt_state, state.params, value=loss, grad=gradient, value_fn=value_fn
    )
    params = optax.apply_updates(state.params, updates)

    def keep(new: Any, old: Any) -> Any:
        return jax.tree.map(lambda a, b: jnp.where(fine, a, b), new, old)

    params, opt_state = keep(params, state.params), keep(opt_state, state.opt_state)
    rate = (AVERAGING_POWER + 1) / (state.step + 1 + AVERAGING_POWER)
    average = jax.tree.map(lambda a, p: a + rate.astype(a.dtype) * (p - a), state.average, params)
    new = State(params, opt_state, average, state.skipped + ~fine, state.step + 1)
    blank = jax.tree.map(
        lambda x: jnp.where(fine, x, jnp.zeros_like(x)), (loss, grad_norm, info._replace(nonfinite={}))
    )
    counted = blank[2]._replace(nonfinite=info.nonfinite)
    return new, StepSums(fine.astype(jnp.float32), blank[0], blank[1], counted)


def run_chunk(
    lane: StepConfig, keys: PRNGKeys, state: State, betas: Numbers, args: Any, num_steps: Numbers
) -> tuple[State, StepSums]:
    """Take `num_steps` steps of every lane; one compilation serves every number of steps.

    Args:
        lane: what all lanes share.
        keys: one per lane, [lanes]; folded with the step number, never split, so that a run cut
            anywhere continues bit for bit.
        state: of all lanes.
        betas: [lanes].
        args: arrays among the programs' arguments.
        num_steps: how many, traced.
    """

    # Under jit it is traced once: here for its shapes, and there inside of the loop.
    @jax.jit
    def all_lanes(keys: PRNGKeys, state: State, betas: Array, args: Any) -> tuple[State, StepSums]:
        def one(key: PRNGKey, lane_state: State, beta: Array) -> tuple[State, StepSums]:
            return step(lane, fold_in(key, state.step), lane_state, beta, args)

        axes = State(0, 0, 0, 0, None)  # type: ignore[arg-type]
        return jax.vmap(one, in_axes=(0, axes, 0), out_axes=(axes, 0))(keys, state, betas)

    shapes = jax.eval_shape(all_lanes, keys, state, betas, args)[1]
    zero = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)

    def body(_: Array, carried: tuple[State, StepSums]) -> tuple[State, StepSums]:
        new, sums = all_lanes(keys, carried[0], betas, args)
        return new, jax.tree.map(jnp.add, carried[1], sums)

    return lax.fori_loop(0, num_steps, body, (state, zero))

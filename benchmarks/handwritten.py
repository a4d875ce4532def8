"""The same fits, written by hand as a good JAX user would: same estimator, optimiser and averaging.

They draw with JAX's own functions (`PLAIN`), or in bayesrl's cheaper ways (`QUICK`).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array, lax

from bayesrl.core.rng import draw_category, draw_subset
from benchmarks.problems import Benchmark, network

AVERAGING_POWER = 8.0

type Loss = Callable[[dict[str, Array], Array], Array]


class Draw(NamedTuple):
    """Ways to draw.

    Attributes:
        category: (key, logits [..., categories], shape) → categories [*shape].
        subset: (key, size, num) → `num` out of `size` indices, without replacement.
    """

    category: Callable[[Array, Array, tuple[int, ...]], Array]
    subset: Callable[[Array, int, int], Array]


def _quick_category(key: Array, logits: Array, shape: tuple[int, ...]) -> Array:
    if logits.shape[:-1] == shape:
        return draw_category(key, logits)
    cumulative = jnp.cumsum(jax.nn.softmax(logits))
    return (cumulative <= jax.random.uniform(key, (*shape, 1)) * cumulative[-1]).sum(-1)


PLAIN = Draw(
    lambda key, logits, shape: jax.random.categorical(key, logits, shape=shape),
    lambda key, size, num: jax.random.choice(key, size, (num,), replace=False),
)
QUICK = Draw(_quick_category, draw_subset)


class State(NamedTuple):
    """State of a hand-written fit; `loss` is the sum over the steps of a chunk."""

    params: dict[str, Array]
    opt_state: Any
    average: dict[str, Array]
    step: Array
    loss: Array


def init(params: dict[str, Array], optimizer: optax.GradientTransformation) -> State:
    return State(params, optimizer.init(params), params, jnp.zeros((), jnp.int32), jnp.zeros(()))


def make_chunk(loss_fn: Loss, optimizer: optax.GradientTransformation) -> Callable[[Array, State, Array], State]:
    """Make a jitted function that takes any number of steps."""

    def step(key: Array, state: State) -> State:
        loss, gradient = jax.value_and_grad(loss_fn)(state.params, jax.random.fold_in(key, state.step))
        updates, opt_state = optimizer.update(gradient, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        rate = (AVERAGING_POWER + 1) / (state.step + 1 + AVERAGING_POWER)
        average = jax.tree.map(lambda a, p: a + rate * (p - a), state.average, params)
        return State(params, opt_state, average, state.step + 1, state.loss + loss)

    @jax.jit
    def chunk(key: Array, state: State, num_steps: Array) -> State:
        return lax.fori_loop(0, num_steps, lambda _, s: step(key, s), state._replace(loss=jnp.zeros(())))

    return chunk


def _value_and_gradient(value: Array, surrogate: Array) -> Array:
    # The value of one, the gradient of the other.
    return lax.stop_gradient(value) + surrogate - lax.stop_gradient(surrogate)


def bandit_loss(problem: Benchmark, num_particles: int, draw: Draw = PLAIN) -> Loss:
    """Score-function gradient with a leave-one-out baseline on w."""
    rewards, beta = problem.data["rewards"], problem.beta
    log_prior = -jnp.log(len(rewards))

    def loss_fn(params: dict[str, Array], key: Array) -> Array:
        arms = draw.category(key, params["logits"], (num_particles,))
        log_q = jax.nn.log_softmax(params["logits"])[arms]
        w = lax.stop_gradient(rewards[arms] / beta + log_prior - log_q)
        # w minus the mean of the others: a multiple of w minus the mean of all.
        advantage = (w - w.mean()) * num_particles / (num_particles - 1)
        return _value_and_gradient(-w.mean(), -(log_q * advantage).mean())

    return loss_fn


def chain_loss(problem: Benchmark, num_particles: int, draw: Draw = PLAIN) -> Loss:
    """Score-function gradient with a leave-one-out regression of the cost-to-go on the past cost."""
    R, P, log_prior, following = (problem.data[name] for name in ("reward", "probs", "prior", "following"))
    beta = problem.beta
    stochastic = problem.name.endswith("stochastic")
    log_P = jnp.log(P)

    def trajectory(log_q: Array, key: Array) -> tuple[Array, Array]:
        def step(state: Array, x: tuple[Array, Array]) -> tuple[Array, tuple[Array, Array]]:
            table, key = x
            action_key, state_key = jax.random.split(key)
            action = draw.category(action_key, table[state], state.shape)
            moves = log_P[state, action]
            new = draw.category(state_key, moves, state.shape) if stochastic else following[state, action]
            return new, (state, action)

        keys = jax.random.split(key, len(log_q))
        return lax.scan(step, jnp.zeros(num_particles, jnp.int32), (log_q, keys))[1]

    def loss_fn(params: dict[str, Array], key: Array) -> Array:
        table = jax.nn.log_softmax(log_prior + params["tilts"])
        states, actions = trajectory(lax.stop_gradient(table), key)
        log_q = table[jnp.arange(len(table))[:, None], states, actions]
        costs = lax.stop_gradient(R[states, actions] / beta + log_prior[states, actions] - log_q)
        score = log_q * _regression_advantage(costs)
        return _value_and_gradient(-costs.sum(0).mean(), -score.sum(0).mean())

    return loss_fn


def _regression_advantage(costs: Array) -> Array:
    """Subtract from the cost-to-go its leave-one-out regression on the past cost, [time, particles]."""
    num = costs.shape[1]
    centred = costs - costs.mean(1, keepdims=True)
    to_go = jnp.cumsum(centred[::-1], 0)[::-1]
    past = centred.sum(0) - to_go
    leave_one_out = num / (num - 1)
    covariance = (past * to_go).sum(1, keepdims=True) - leave_one_out * past * to_go
    variance = (past * past).sum(1, keepdims=True) - leave_one_out * past * past
    slope = jnp.clip(covariance / jnp.maximum(variance, jnp.finfo(costs.dtype).tiny), -1.0, 0.0)
    return leave_one_out * (to_go - slope * past)


def digits_loss(problem: Benchmark, batch: int, draw: Draw = PLAIN) -> Loss:
    """Exact expectation over the ten arms on a mini-batch drawn without replacement."""
    images, labels, log_prior = problem.data["images"], problem.data["labels"], problem.data["prior"]
    beta = problem.beta

    def loss_fn(params: dict[str, Array], key: Array) -> Array:
        i = draw.subset(key, len(images), batch)
        log_q = jax.nn.log_softmax(log_prior[i] + network(params, images[i]))
        right = jax.nn.one_hot(labels[i], 10)
        return -(jnp.exp(log_q) * (right / beta + log_prior[i] - log_q)).sum(-1).mean()

    return loss_fn

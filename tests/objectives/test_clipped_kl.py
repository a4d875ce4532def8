"""Clipped ratios: on-policy the gradient of reverse KL, off-policy the importance-weighted one, beyond ε none."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from jax import Array
from oracles import ORACLES, Oracle, Params

import bayesrl
from bayesrl.core.draws import Draws
from bayesrl.core.programs import Programs
from bayesrl.core.structure import inspect
from bayesrl.errors import ObjectiveError
from bayesrl.objectives import ClippedKL, ReverseKL

K_SIGMA = 6.0


def pair_of(oracle: Oracle) -> tuple[Programs, Params]:
    structure = inspect(jax.random.key(0), oracle.policy, *oracle.args)
    args = jax.tree.map(jnp.asarray, oracle.args)
    return Programs(oracle.policy, oracle.guide, structure, args, {}), jax.tree.map(jnp.asarray, oracle.params)


def drawn(programs: Programs, params: Params, key: Array, num: int) -> Draws:
    return jax.lax.stop_gradient(programs.draw(key, params, num, stopped=programs.structure.actions))


@pytest.mark.parametrize("name", ["flat", "dependent", "chain", "contexts", "chain_with_nature"])
@pytest.mark.parametrize("ratio", ["step", "draw"])
def test_on_policy_it_is_the_gradient_of_reverse_kl(name: str, ratio: Any) -> None:
    oracle = ORACLES[name]()
    programs, params = pair_of(oracle)
    plain = ReverseKL(16, estimator="score", enumerated=()).prepare(jax.random.key(1), programs, params)
    clipped = ClippedKL(16, ratio=ratio).prepare(jax.random.key(1), programs, params)

    def gradient(objective: Any) -> Any:
        return jax.jit(
            jax.value_and_grad(lambda p: objective.evaluate(jax.random.key(2), p, programs, oracle.beta)[0])
        )(params)

    (loss, wanted), (own_loss, found) = gradient(plain), gradient(clipped)
    np.testing.assert_allclose(own_loss, loss, rtol=1e-5)
    for site, value in wanted.items():
        size = np.abs(np.asarray(value)).max()
        assert size > 1e-3
        np.testing.assert_allclose(found[site], value, atol=2e-5 * size + 1e-6)


def test_weighted_draws_of_another_policy_give_the_exact_gradient() -> None:
    """Without a baseline and without clipping E ρ·w·∇log q is the gradient of J elsewhere than where draws were made.

    5 coordinates within K_SIGMA = 6 standard errors of means over 4,000 gradients: 1e-8 false alarms.
    """
    oracle = ORACLES["flat"]()
    programs, then = pair_of(oracle)
    now = jax.tree.map(lambda x: x + 0.5 * jnp.cos(jnp.arange(x.size, dtype=float).reshape(x.shape)), then)
    ready = ClippedKL(16, baseline="none", clip=1e6).prepare(jax.random.key(1), programs, then)

    @jax.jit
    @jax.vmap
    def one(key: Array) -> Params:
        draws = drawn(programs, then, key, 16)
        return jax.grad(
            lambda p: -oracle.beta * ready.surrogate(p, programs.again(p, draws), programs, oracle.beta)[0]
        )(now)

    found = one(jax.random.split(jax.random.key(3), 4000))
    gradient = jax.jit(jax.grad(oracle.objective))
    found, wanted, here = jax.tree.map(np.asarray, (found, gradient(now), gradient(then)))
    for site, value in wanted.items():
        mean, error = found[site].mean(0), found[site].std(0) / 4000**0.5
        assert (np.abs(mean - value) <= K_SIGMA * error + 1e-5).all()
        assert (np.abs(mean - here[site]) > K_SIGMA * error).any(), "the test tells the two policies apart"


def steps() -> None:
    for i in range(3):
        arm = numpyro.sample(f"arm{i}", dist.Categorical(logits=jnp.zeros(3)))
        bayesrl.reward(f"payoff{i}", jnp.array([0.0, 1.0, -1.0])[arm] * (i + 1))


def steps_guide() -> None:
    table = numpyro.param("table", jnp.zeros((3, 3)))
    for i in range(3):
        numpyro.sample(f"arm{i}", dist.Categorical(logits=table[i]))


@pytest.mark.parametrize("ratio", ["step", "draw"])
def test_the_gradient_is_that_of_the_formula(ratio: Any) -> None:
    """Written out: min(ρ·A, clip(ρ)·A) has the gradient ρ·A·∇log q where it is not cut, and none where it is."""
    structure = inspect(jax.random.key(0), steps)
    programs = Programs(steps, steps_guide, structure, (), {})
    then = {"table": jnp.zeros((3, 3))}
    now = {"table": jnp.array([[0.9, 0.0, -0.6], [0.05, 0.0, -0.05], [-1.0, 0.5, 0.5]])}
    beta, clip = 0.5, 0.2
    ready = ClippedKL(12, baseline="to_go", clip=clip, ratio=ratio).prepare(jax.random.key(1), programs, then)
    draws = drawn(programs, then, jax.random.key(5), 12)

    @jax.jit
    def run(p: Params) -> Any:
        return jax.value_and_grad(lambda p: ready.surrogate(p, programs.again(p, draws), programs, beta), has_aux=True)(
            p
        )

    (loss, info), gradient = run(now)
    arms = np.stack([np.asarray(draws.sites[f"arm{i}"]) for i in range(3)], 1)
    log_q = np.asarray(jax.nn.log_softmax(now["table"], -1), float)
    own = np.take_along_axis(log_q[None], arms[..., None], -1)[..., 0]
    cost = np.array([0.0, 1.0, -1.0])[arms] * np.arange(1, 4) / beta - np.log(3) - own
    to_go = np.cumsum(cost[:, ::-1], 1)[:, ::-1]
    advantage = 12 / 11 * (to_go - to_go.mean(0))
    moved = own + np.log(3)
    if ratio == "draw":
        moved = np.repeat(moved.mean(1, keepdims=True), 3, 1)
    rho = np.exp(moved)
    free = np.where(advantage > 0, rho < 1 + clip, rho > 1 - clip)
    assert 0 < free.sum() < free.size
    slope = np.where(free, rho * advantage, 0.0)
    wanted = np.zeros((3, 3))
    for draw, i in np.ndindex(12, 3):
        wanted[i] += slope[draw, i] * (np.eye(3)[arms[draw, i]] - np.exp(log_q[i])) / 12
    np.testing.assert_allclose(-gradient["table"], wanted, atol=1e-4)
    np.testing.assert_allclose(-loss, cost.sum(1).mean(), rtol=1e-4)
    # Three of the six events are rewards, which have no ratio and do not count.
    assert float(info.metrics["clipped"]) == pytest.approx((np.abs(rho - 1) > clip).mean())


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"clip": 0.0}, "ClippedKL got clip=0.0; use a number above 0"),
        ({"clip": float("nan")}, "ClippedKL got clip=nan"),
        ({"ratio": "token"}, "ClippedKL got ratio='token'; use 'step' or 'draw'"),
        ({"estimator": "pathwise"}, "takes gradients by scores alone"),
        ({"enumerated": ("arm",)}, "takes gradients by scores alone"),
        ({"num_particles": 0}, "got num_particles=0"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ObjectiveError, match=message):
        ClippedKL(**options)


def test_it_refuses_to_be_used_before_it_is_prepared() -> None:
    programs, params = pair_of(ORACLES["flat"]())
    with pytest.raises(ObjectiveError, match="before prepare"):
        ClippedKL().evaluate(jax.random.key(0), params, programs, 1.0)

"""Gradients of every objective against the exact ones, in standard errors.

Each test averages the gradient over independent keys and compares every coordinate with the
derivative of the oracle's exact objective. A coordinate fails beyond K_SIGMA standard errors; there are
fewer than 10,000 coordinates in this file, so the chance that a correct library fails anywhere is
below 10,000 × 2e-9 = 2e-5 (two-sided normal; every mean is over at least 1,000 gradients).
"""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from jax import Array
from numpyro import handlers
from numpyro.contrib.control_flow import scan
from oracles import ORACLES, Oracle, Params

import bayesrl
from bayesrl.core.pairing import Pair
from bayesrl.core.structure import inspect
from bayesrl.objectives import ForwardKL, Objective, ReverseKL

K_SIGMA = 6.0
DRAWS = 2**17
CORE = ("flat", "dependent", "chain", "contexts", "mixed")


def pair_of(oracle: Oracle) -> tuple[Pair, Params]:
    args = jax.tree.map(jnp.asarray, oracle.args)
    structure = inspect(jax.random.key(0), oracle.policy, *args)
    return Pair(oracle.policy, oracle.guide, structure, args, {}), jax.tree.map(jnp.asarray, oracle.params)


def gradients(oracle: Oracle, objective: Objective, params: Params, num: int) -> tuple[Params, Params]:
    """Mean and standard error of the gradient of J, reward units, over `num` keys."""
    pair, _ = pair_of(oracle)
    ready = objective.prepare(jax.random.key(1), pair, params)

    @jax.jit
    def all_keys(keys: Array, params: Params) -> tuple[Params, Params]:
        def one(key: Array) -> Params:
            return jax.grad(lambda p: -oracle.beta * ready.evaluate(key, p, pair, oracle.beta)[0])(params)

        found = jax.vmap(one)(keys)
        return jax.tree.map(lambda g: g.mean(0), found), jax.tree.map(lambda g: g.std(0) / num**0.5, found)

    return all_keys(jax.random.split(jax.random.key(2), num), params)


def assert_unbiased(oracle: Oracle, objective: Objective, num: int) -> None:
    _, params = pair_of(oracle)
    mean, error = gradients(oracle, objective, params, num)
    exact = jax.grad(oracle.objective)(params)
    for name in exact:
        # Gradients are float32 sums: a share of 1e-5 of the largest coordinate is rounding.
        slack = 2e-5 * (1 + float(jnp.abs(exact[name]).max()))
        off = np.abs(np.asarray(mean[name] - exact[name]))
        allowed = K_SIGMA * np.asarray(error[name]) + slack
        assert (off <= allowed).all(), f"{name}: {off} beyond {allowed}; exact {exact[name]}"


def variants() -> list[Any]:
    """Every oracle with the particle numbers and baselines; all of them where programs differ in kind."""
    cases: list[tuple[str, ReverseKL]] = []
    for name in ORACLES:
        core = name in CORE
        cases += [(name, ReverseKL(n, enumerated=())) for n in ((3, 4, 8, 16, 64) if core else (3, 8))]
        for n in (4, 16) if core else (4,):
            cases += [(name, ReverseKL(n, baseline=b, enumerated=())) for b in ("full", "to_go", "none")]
    cases += [(name, ReverseKL(1, baseline="none", enumerated=())) for name in ("chain", "mixed", "gaussian")]
    cases += [(name, ReverseKL(n)) for name in ("flat", "dependent", "contexts", "nested") for n in (16,)]
    tails = {name: make().tail for name, make in ORACLES.items() if make().tail}
    cases += [(name, ReverseKL(16, enumerated=tail)) for name, tail in tails.items()]
    cases += [(name, ReverseKL(16, baseline="full", enumerated=tails[name])) for name in ("dependent", "mixed")]
    cases += [("dependent", ReverseKL(16, enumerated=("a", "b")))]
    cases += [(name, ReverseKL(8, estimator="score")) for name in ("gaussian", "walk", "mixed", "answered")]
    cases += [(name, ReverseKL(4, estimator="pathwise")) for name in ("gaussian", "walk")]
    return [
        pytest.param(
            name, o, id=f"{name}-{o.num_particles}-{o.baseline}-{o.estimator}-{'+'.join(o.enumerated) or 'sampled'}"
        )
        for name, o in cases
    ]


@pytest.mark.parametrize(("name", "objective"), variants())
def test_reverse_kl_is_unbiased(name: str, objective: ReverseKL) -> None:
    assert_unbiased(ORACLES[name](), objective, max(1000, DRAWS // objective.num_particles))


def test_a_wrong_gradient_is_noticed() -> None:
    """The test has power: pathwise gradients through a jump are seen to be wrong."""
    oracle = ORACLES["jump"]()
    pair, params = pair_of(oracle)
    wrong = ReverseKL(8)
    plan = wrong.prepare(jax.random.key(1), pair, params).plan
    assert plan is not None
    assert plan.score == ("x",)

    class Biased(ReverseKL):
        def prepare(self, key: Array, pair: Pair, params: Params) -> ReverseKL:
            return replace(wrong, plan=replace(plan, score=(), pathwise=("x",)))

    with pytest.raises(AssertionError, match="beyond"):
        assert_unbiased(oracle, Biased(8), 2**14)


@pytest.mark.parametrize("name", list(ORACLES))
def test_the_value_of_the_loss_is_the_objective(name: str) -> None:
    """Within K_SIGMA standard errors of the exact J; fewer than 60 comparisons."""
    oracle = ORACLES[name]()
    pair, params = pair_of(oracle)
    ready = ReverseKL(16, enumerated=()).prepare(jax.random.key(1), pair, params)
    keys = jax.random.split(jax.random.key(3), 2**12)
    loss, info = jax.jit(jax.vmap(lambda key: ready.evaluate(key, params, pair, oracle.beta)))(keys)
    exact = float(oracle.objective(params))
    for values in (-oracle.beta * loss, info.objective, info.reward - oracle.beta * info.kl):
        assert abs(float(values.mean()) - exact) <= K_SIGMA * float(values.std()) / 2**6 + 1e-4


@pytest.mark.parametrize("name", ["flat", "dependent", "contexts", "nested", "interacting"])
def test_enumerated_values_are_exact(name: str) -> None:
    """With all sites enumerated J = β·ELBO = β·log Z − β·KL(q‖p*) to float precision, with no noise."""
    oracle = ORACLES[name]()
    pair, params = pair_of(oracle)
    sites = () if name == "interacting" else pair.structure.actions
    if not sites:
        return
    ready = ReverseKL(64, enumerated=sites).prepare(jax.random.key(1), pair, params)
    exact, slope = jax.value_and_grad(oracle.objective)(params)
    (loss, info), gradient = jax.value_and_grad(
        lambda p: ready.evaluate(jax.random.key(4), p, pair, oracle.beta), has_aux=True
    )(params)
    assert jnp.allclose(-oracle.beta * loss, exact, atol=2e-6)
    assert jnp.allclose(info.objective, exact, atol=2e-6)
    assert jnp.allclose(info.reward - oracle.beta * info.kl, exact, atol=2e-6)
    for site in slope:
        assert jnp.allclose(-oracle.beta * gradient[site], slope[site], atol=2e-6)


FORWARD = [name for name, make in ORACLES.items() if make().forward is not None]


@pytest.mark.parametrize("name", FORWARD)
@pytest.mark.parametrize("prior_fraction", [0.5, 0.0])
def test_forward_kl_approaches_the_exact_gradient(name: str, prior_fraction: float) -> None:
    """Self-normalised weights are biased by O(1/N): at N = 2,048 by less than 2% of the largest coordinate."""
    if name == "gaussian" and prior_fraction == 0.0:
        pytest.skip("the guide's tails are lighter than the posterior's: the weights have no variance")
    oracle = ORACLES[name]()
    _, params = pair_of(oracle)
    mean, error = gradients(oracle, ForwardKL(2048, prior_fraction=prior_fraction), params, 512)
    exact = jax.grad(oracle.forward)(params)  # type: ignore[arg-type]
    for site in exact:
        allowed = K_SIGMA * error[site] / oracle.beta + 0.02 * jnp.abs(exact[site]).max()
        assert (jnp.abs(-mean[site] / oracle.beta - exact[site]) <= allowed).all(), (mean[site], exact[site])


@pytest.mark.parametrize("name", ["flat", "chain", "dependent", "contexts", "subsampled", "gaussian", "observed"])
@pytest.mark.parametrize("baseline", ["regression", "full"])
def test_noise_vanishes_at_the_optimum(name: str, baseline: Any) -> None:
    """Every gradient is zero to float precision where q = p* and nature is quiet: w = log Z for every draw."""
    oracle = ORACLES[name]()
    best = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), oracle.best)
    pair, _ = pair_of(oracle)
    ready = ReverseKL(16, baseline=baseline, enumerated=()).prepare(jax.random.key(1), pair, best)

    def one(key: Array) -> tuple[Params, Array]:
        gradient, info = jax.grad(lambda p: ready.evaluate(key, p, pair, oracle.beta), has_aux=True)(best)
        return gradient, info.spread

    found, spread = jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(2), 200))
    for values in found.values():
        assert float((values**2).mean(0).max()) < 1e-8
    assert float(spread.max()) < 1e-8


def shifted(kind: str, offset: Array) -> tuple[Any, Any, Params]:
    payoffs = jnp.array([[0.3, -0.5], [1.0, 0.2], [0.1, 0.9]])

    def flat() -> None:
        arm = numpyro.sample("arm", dist.Categorical(logits=jnp.zeros(3)))
        bayesrl.reward("payoff", payoffs[arm, 0] + offset)

    def flat_guide() -> None:
        numpyro.sample("arm", dist.Categorical(logits=numpyro.param("table", jnp.zeros(3))))

    def walk() -> None:
        def step(state: Array, _: Any) -> tuple[Array, None]:
            action = numpyro.sample("action", dist.Bernoulli(0.5))
            bayesrl.reward("gain", payoffs[state, action] + offset)
            return (state + action) % 3, None

        scan(step, jnp.array(0), jnp.arange(4))

    def walk_guide() -> None:
        table = numpyro.param("table", jnp.zeros((4, 3)))

        def step(state: Array, logits: Array) -> tuple[Array, None]:
            action = numpyro.sample("action", dist.Bernoulli(logits=logits[state]))
            return (state + action) % 3, None

        scan(step, jnp.array(0), table)

    if kind == "flat":
        return flat, flat_guide, {"table": jnp.array([0.5, -0.3, 0.1])}
    return walk, walk_guide, {"table": jnp.linspace(-1, 1, 12).reshape(4, 3)}


@pytest.mark.parametrize("kind", ["flat", "walk"])
@pytest.mark.parametrize("baseline", ["regression", "full", "to_go"])
def test_a_constant_reward_changes_nothing(kind: str, baseline: Any) -> None:
    """The gradient at reward offsets of 100 and 10,000 is that at 0, as far as float32 holds the rewards."""

    def gradient(offset: Array) -> Array:
        policy, guide, params = shifted(kind, offset)
        structure = inspect(jax.random.key(0), policy)
        pair = Pair(policy, guide, structure, (), {})
        ready = ReverseKL(16, baseline=baseline, enumerated=()).prepare(jax.random.key(1), pair, params)
        keys = jax.random.split(jax.random.key(5), 32)
        return jax.vmap(lambda key: jax.grad(lambda p: ready.evaluate(key, p, pair, 1.0)[0])(params)["table"])(keys)

    with_offset = jax.jit(gradient)
    base = with_offset(jnp.array(0.0))
    scale = float(jnp.abs(base).max())
    for offset in (100.0, 10_000.0):
        change = float(jnp.abs(with_offset(jnp.array(offset)) - base).max()) / scale
        rounding = 4 * offset * float(jnp.finfo(jnp.float32).eps)  # of one step's reward; four steps add up
        assert change < 20 * rounding


def test_the_regression_baseline_is_quieter_than_its_ends() -> None:
    """Off the optimum, on a chain of 4 steps with 64 particles: not noisier than 1.1 × the better fixed slope."""
    oracle = ORACLES["chain"]()
    _, params = pair_of(oracle)
    noise = {
        baseline: float((gradients(oracle, ReverseKL(64, baseline=baseline), params, 2000)[1]["table"] ** 2).sum())  # type: ignore[arg-type]
        for baseline in ("regression", "full", "to_go", "none")
    }
    assert noise["regression"] < 1.1 * min(noise["full"], noise["to_go"])
    assert noise["to_go"] < noise["none"]


def test_scaled_and_masked_rewards_count_as_handlers_ask() -> None:
    """Under handlers.scale(2) the reward counts twice: the exact gradient is that of doubled payoffs."""
    payoffs, beta = jnp.array([0.2, 1.0, -0.4]), 0.5

    def policy() -> None:
        arm = numpyro.sample("arm", dist.Categorical(logits=jnp.zeros(3)))
        with handlers.scale(scale=2.0):
            bayesrl.reward("payoff", payoffs[arm])
        with handlers.mask(mask=False):
            bayesrl.reward("ignored", 100.0 * payoffs[arm])

    def guide() -> None:
        numpyro.sample("arm", dist.Categorical(logits=numpyro.param("logits", jnp.zeros(3))))

    def objective(p: Params) -> Array:
        log_q = jax.nn.log_softmax(p["logits"])
        return (jnp.exp(log_q) * (2 * payoffs - beta * (log_q + jnp.log(3.0)))).sum()

    oracle = Oracle(policy, guide, {"logits": np.array([0.3, -0.2, 0.5])}, beta, objective, 0.0)
    assert_unbiased(oracle, ReverseKL(16, enumerated=()), 4096)
    assert_unbiased(oracle, ReverseKL(16), 2)

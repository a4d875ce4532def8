"""Gradients of every objective against the exact ones, in standard errors.

Each test averages the gradient over independent keys and compares every coordinate with the
derivative of the oracle's exact objective. A coordinate fails beyond K_SIGMA standard errors; there are
fewer than 10,000 coordinates in this file, so the chance that a correct library fails anywhere is
below 10,000 × 2e-9 = 2e-5 (two-sided normal; every mean is over at least 1,000 gradients).
"""

from collections.abc import Sequence
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
from bayesrl.compilation.random_keys import split
from bayesrl.core.draws import Draws
from bayesrl.core.programs import Programs
from bayesrl.core.structure import inspect
from bayesrl.objectives import ForwardKL, Objective, ReverseKL
from bayesrl.objectives.base import Info
from bayesrl.objectives.gradient_plan import GradientPlan

K_SIGMA = 6.0
DRAWS = 2**16
BASELINES = ("regression", "full", "to_go", "none")


def pair_of(oracle: Oracle) -> tuple[Programs, Params]:
    args = jax.tree.map(jnp.asarray, oracle.args)
    structure = inspect(jax.random.key(0), oracle.policy, *args)
    return Programs(oracle.policy, oracle.guide, structure, args, {}), jax.tree.map(jnp.asarray, oracle.params)


def exactly(oracle: Oracle) -> tuple[Array, Params]:
    """Exact J and its gradient at the oracle's parameters."""
    found: tuple[Array, Params] = jax.jit(jax.value_and_grad(oracle.objective))(pair_of(oracle)[1])
    return found


def gradients(
    oracle: Oracle, objectives: Sequence[Objective], params: Params, num: int
) -> tuple[Params, Params, list[tuple[Array, Info]]]:
    """Mean and standard error of the gradient of J (reward units) over `num` keys, [objective, ...]; losses of each key."""
    programs, _ = pair_of(oracle)
    ready = [objective.prepare(jax.random.key(1), programs, params) for objective in objectives]

    @jax.jit
    def all_keys(keys: Array, params: Params) -> tuple[Params, Params, list[tuple[Array, Info]]]:
        def losses(params: Params, key: Array) -> tuple[Array, list[tuple[Array, Info]]]:
            drawn: dict[GradientPlan | None, Draws] = {}
            found = []
            for one in ready:
                if type(one) is not ReverseKL:
                    found.append(one.evaluate(key, params, programs, oracle.beta))
                    continue
                # Baselines are of the same draws, which are made once.
                if one.plan not in drawn:
                    drawn[one.plan] = one.draw(key, params, programs)
                found.append(one.surrogate(params, drawn[one.plan], programs, oracle.beta))
            return jnp.stack([-oracle.beta * loss for loss, _ in found]), found

        found, told = jax.vmap(jax.jacrev(losses, has_aux=True), (None, 0))(params, keys)
        means = jax.tree.map(lambda g: g.mean(0), found)
        return means, jax.tree.map(lambda g: g.std(0) / num**0.5, found), told

    return all_keys(split(jax.random.key(2), num), params)


def assert_unbiased(
    oracle: Oracle, objectives: Sequence[Objective], num: int
) -> tuple[float, list[tuple[Array, Info]]]:
    """Compare means of gradients with the exact one; give the exact J, and loss and info of each objective and key."""
    _, params = pair_of(oracle)
    mean, error, told = gradients(oracle, objectives, params, num)
    mean, error, told, (value, exact) = jax.tree.map(np.asarray, (mean, error, told, exactly(oracle)))
    for name in exact:
        # Gradients are float32 sums: a share of 2e-5 of the largest coordinate is rounding.
        slack = 2e-5 * (1 + np.abs(exact[name]).max())
        for i, objective in enumerate(objectives):
            off = np.abs(mean[name][i] - exact[name])
            allowed = K_SIGMA * error[name][i] + slack
            assert (off <= allowed).all(), f"{objective} {name}: {off} beyond {allowed}; exact {exact[name]}"
    return float(value), told


@pytest.mark.parametrize(
    ("name", "num_particles"),
    [(n, 16) for n in ORACLES] + [(n, 3) for n in ("chain", "contexts", "mixed")] + [("dependent", 4), ("chain", 64)],
)
def test_reverse_kl_is_unbiased(name: str, num_particles: int) -> None:
    """Every baseline on every problem, all sites sampled; the loss and what is told of it are the exact J.

    J within K_SIGMA standard errors: fewer than 400 comparisons.
    """
    oracle, num = ORACLES[name](), max(1000, DRAWS // num_particles)
    objectives = [ReverseKL(num_particles, baseline=b, enumerated=()) for b in BASELINES]
    exact, told = assert_unbiased(oracle, objectives, num)
    for loss, info in told:
        parts = [-oracle.beta * loss, info.objective]
        if name != "observed":  # where the likelihood is a part too
            parts.append(info.reward - oracle.beta * info.kl)
        for values in parts:
            assert abs(float(values.mean()) - exact) <= K_SIGMA * float(values.std()) / num**0.5 + 1e-4


@pytest.mark.parametrize("name", ["flat", "chain", "gaussian", "answered"])
def test_one_particle_without_a_baseline_is_unbiased(name: str) -> None:
    assert_unbiased(ORACLES[name](), [ReverseKL(1, baseline="none", enumerated=())], DRAWS)


@pytest.mark.parametrize("name", [name for name, make in ORACLES.items() if make().tail])
def test_enumerated_tails_are_unbiased(name: str) -> None:
    """The last sites by exact expectation, what comes before them sampled."""
    oracle = ORACLES[name]()
    objectives = [ReverseKL(32, baseline=b, enumerated=oracle.tail) for b in BASELINES]
    assert_unbiased(oracle, objectives, 4000)


@pytest.mark.parametrize("name", ["gaussian", "walk", "mixed", "answered"])
def test_estimators_that_are_asked_for_are_unbiased(name: str) -> None:
    """Score-function gradients where pathwise ones exist; pathwise ones insisted on where all sites have them."""
    objectives = [ReverseKL(16, estimator="score", enumerated=())]
    if name in ("gaussian", "walk"):
        objectives.append(ReverseKL(16, estimator="pathwise", enumerated=()))
    assert_unbiased(ORACLES[name](), objectives, DRAWS // 16)


def test_a_wrong_gradient_is_noticed() -> None:
    """The test has power: pathwise gradients through a jump are seen to be wrong."""
    oracle = ORACLES["jump"]()
    programs, params = pair_of(oracle)
    wrong = ReverseKL(8)
    plan = wrong.prepare(jax.random.key(1), programs, params).plan
    assert plan is not None
    assert plan.score == ("x",)

    class Biased(ReverseKL):
        def prepare(self, key: Array, programs: Programs, params: Params) -> ReverseKL:
            return replace(wrong, plan=replace(plan, score=(), pathwise=("x",)))

    with pytest.raises(AssertionError, match="beyond"):
        assert_unbiased(oracle, [Biased(8)], 2**14)


@pytest.mark.parametrize("name", ["flat", "dependent", "contexts"])
def test_enumerated_values_are_exact(name: str) -> None:
    """With all sites enumerated J = β·ELBO = β·log Z − β·KL(q‖p*) to float precision, with no noise."""
    oracle = ORACLES[name]()
    programs, params = pair_of(oracle)
    ready = ReverseKL(64, enumerated=programs.structure.actions).prepare(jax.random.key(1), programs, params)
    exact, slope = exactly(oracle)
    (loss, info), gradient = jax.jit(
        jax.value_and_grad(lambda p: ready.evaluate(jax.random.key(4), p, programs, oracle.beta), has_aux=True)
    )(params)
    loss, info, gradient = jax.tree.map(np.asarray, (loss, info, gradient))
    assert np.allclose(-oracle.beta * loss, exact, atol=2e-6)
    assert np.allclose(info.objective, exact, atol=2e-6)
    assert np.allclose(info.reward - oracle.beta * info.kl, exact, atol=2e-6)
    for site in slope:
        assert np.allclose(-oracle.beta * gradient[site], slope[site], atol=2e-6)


@pytest.mark.parametrize(
    ("name", "prior_fraction"),
    [(name, 0.5) for name, make in ORACLES.items() if make().forward is not None] + [("flat", 0.0), ("dependent", 0.0)],
)
def test_forward_kl_approaches_the_exact_gradient(name: str, prior_fraction: float) -> None:
    """Self-normalised weights are biased by O(1/N): at N = 2,048 by less than 2% of the largest coordinate."""
    oracle = ORACLES[name]()
    _, params = pair_of(oracle)
    mean, error, _ = gradients(oracle, [ForwardKL(2048, prior_fraction=prior_fraction)], params, 512)
    exact = jax.jit(jax.grad(oracle.forward))(params)  # type: ignore[arg-type]
    mean, error, exact = jax.tree.map(np.asarray, (mean, error, exact))
    for site in exact:
        allowed = K_SIGMA * error[site][0] / oracle.beta + 0.02 * np.abs(exact[site]).max()
        assert (np.abs(-mean[site][0] / oracle.beta - exact[site]) <= allowed).all(), (mean[site], exact[site])


@pytest.mark.parametrize("name", ["flat", "chain", "dependent", "contexts", "subsampled", "gaussian", "observed"])
def test_noise_vanishes_at_the_optimum(name: str) -> None:
    """Every gradient is zero to float precision where q = p* and nature is quiet: w = log Z for every draw."""
    oracle = ORACLES[name]()
    best = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), oracle.best)
    objectives = [
        ReverseKL(16, baseline="regression", enumerated=()),
        ReverseKL(16, baseline="full", enumerated=()),
        ForwardKL(16),
        ForwardKL(16, prior_fraction=0.0),
    ]
    mean, error, told = gradients(oracle, objectives, best, 200)
    for i, objective in enumerate(objectives):
        for site in mean:
            # The mean square over keys is that of the mean, plus the variance.
            mean_square = np.asarray(mean[site][i]) ** 2 + 200 * np.asarray(error[site][i]) ** 2
            assert mean_square.max() / oracle.beta**2 < 1e-8, objective
        assert float(told[i][1].spread.max()) < 1e-8, objective


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
    """The gradient at reward offsets of 100 and 10,000 is that at 0, as far as float32 holds the rewards.

    Where the other particles' pasts nearly agree, the slope of their regression is ill-conditioned: one gradient in ten
    may be off by twenty times as much, which is 2% of the largest at an offset of 100.
    """

    def gradient(offset: Array) -> Array:
        policy, guide, params = shifted(kind, offset)
        structure = inspect(jax.random.key(0), policy)
        programs = Programs(policy, guide, structure, (), {})
        ready = ReverseKL(16, baseline=baseline, enumerated=()).prepare(jax.random.key(1), programs, params)
        keys = jax.random.split(jax.random.key(5), 32)
        return jax.vmap(lambda key: jax.grad(lambda p: ready.evaluate(key, p, programs, 1.0)[0])(params)["table"])(keys)

    with_offset = jax.jit(gradient)
    base = np.asarray(with_offset(jnp.array(0.0)))
    scale = np.abs(base).max()
    for offset in (100.0, 10_000.0):
        by_key = np.abs(np.asarray(with_offset(jnp.array(offset))) - base).reshape(32, -1).max(-1) / scale
        rounding = 4 * offset * float(jnp.finfo(jnp.float32).eps)  # of one step's reward; four steps add up
        assert np.quantile(by_key, 0.9) < 20 * rounding
        assert float(by_key.max()) < 400 * rounding


def test_the_regression_baseline_is_quieter_than_its_ends() -> None:
    """Off the optimum, on a chain of 4 steps with 64 particles: not noisier than 1.1 × the better fixed slope."""
    oracle = ORACLES["chain"]()
    _, params = pair_of(oracle)
    error = np.asarray(gradients(oracle, [ReverseKL(64, baseline=b) for b in BASELINES], params, 2000)[1]["table"])
    noise = dict(zip(BASELINES, (error**2).sum((1, 2, 3)).tolist(), strict=True))
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
    assert_unbiased(oracle, [ReverseKL(16, enumerated=())], 4096)
    assert_unbiased(oracle, [ReverseKL(16)], 2)

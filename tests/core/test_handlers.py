"""`reward`, `environment`, `tilt` and `whole` under NumPyro's own handlers and JAX's transformations."""

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
from numpyro.infer.util import log_density as numpyro_log_density
from oracles import ORACLES

import bayesrl
from bayesrl.core.structure import inspect
from bayesrl.errors import PolicyError

PRIOR = np.log([0.2, 0.3, 0.5])
MEANS = np.array([1.0, -2.0, 0.5])


def bandit() -> Array:
    arm = numpyro.sample("arm", dist.Categorical(logits=jnp.asarray(PRIOR)))
    bayesrl.reward("payoff", jnp.asarray(MEANS)[arm])
    return arm


def tilted(arm: Any, beta: Any, program: Any = bandit) -> Array:
    return numpyro_log_density(bayesrl.tilt(program, beta), (), {}, {"arm": jnp.asarray(arm)})[0]


@pytest.mark.parametrize("arm", [0, 1, 2])
@pytest.mark.parametrize("beta", [0.1, 1, 7.0])
def test_tilt_multiplies_the_density(arm: int, beta: float) -> None:
    assert float(tilted(arm, beta)) == pytest.approx(PRIOR[arm] + MEANS[arm] / beta, rel=1e-5)


def test_tilt_as_context_manager_and_twice() -> None:
    """Tilting twice multiplies the two temperatures, since each scales what is inside."""
    with handlers.seed(rng_seed=0), bayesrl.tilt(beta=0.5), handlers.trace() as trace:
        bandit()
    assert trace["payoff"]["scale"] == pytest.approx(2.0)
    assert float(tilted(1, 3.0, bayesrl.tilt(bandit, 2.0))) == pytest.approx(PRIOR[1] + MEANS[1] / 6, rel=1e-5)


def test_untilted_rewards_leave_the_prior_alone_up_to_their_unit_scale() -> None:
    """A reward site is a factor at β = 1 until a handler says otherwise, and has no value of its own."""
    trace = handlers.trace(handlers.seed(bandit, rng_seed=0)).get_trace()
    assert trace["payoff"]["is_observed"]
    assert trace["payoff"]["value"].shape == (0,)
    assert float(trace["payoff"]["fn"].log_prob(trace["payoff"]["value"])) == pytest.approx(
        MEANS[trace["arm"]["value"]]
    )


def test_condition_substitute_replay_and_block() -> None:
    beta = 0.5
    expected = {arm: PRIOR[arm] + MEANS[arm] / beta for arm in range(3)}
    conditioned = handlers.condition(bayesrl.tilt(bandit, beta), {"arm": jnp.array(2)})
    assert float(numpyro_log_density(conditioned, (), {}, {})[0]) == pytest.approx(expected[2], rel=1e-5)
    with handlers.seed(rng_seed=0), handlers.substitute(data={"arm": jnp.array(1)}):
        assert int(bayesrl.tilt(bandit, beta)()) == 1
    guide_trace = handlers.trace(
        handlers.substitute(handlers.seed(bandit, rng_seed=3), {"arm": jnp.array(1)})
    ).get_trace()
    assert int(handlers.replay(handlers.seed(bayesrl.tilt(bandit, beta), rng_seed=4), guide_trace)()) == 1
    blocked = handlers.block(bayesrl.tilt(bandit, beta), hide=["payoff"])
    assert float(numpyro_log_density(blocked, (), {}, {"arm": jnp.array(1)})[0]) == pytest.approx(PRIOR[1], rel=1e-5)


def test_scale_and_mask() -> None:
    scaled = handlers.scale(bayesrl.tilt(bandit, 0.5), scale=3.0)
    assert float(tilted(0, 1.0, scaled)) == pytest.approx(3 * (PRIOR[0] + MEANS[0] / 0.5), rel=1e-5)

    def masked() -> None:
        arm = numpyro.sample("arm", dist.Categorical(logits=jnp.asarray(PRIOR)))
        with handlers.mask(mask=False):
            bayesrl.reward("payoff", jnp.asarray(MEANS)[arm])

    assert float(tilted(0, 0.5, masked)) == pytest.approx(PRIOR[0], rel=1e-5)
    assert float(bayesrl.log_density(masked, {"arm": jnp.array(0)}, beta=0.5).total_reward) == 0.0


def test_vmap_jit_and_gradient_in_beta() -> None:
    arms, betas = jnp.arange(3), jnp.array([0.2, 1.0, 4.0])
    values = jax.jit(jax.vmap(tilted))(arms, betas)
    assert np.allclose(values, PRIOR + MEANS / np.asarray(betas), rtol=1e-5)
    slope = jax.grad(lambda beta: tilted(1, beta))(0.5)
    assert float(slope) == pytest.approx(-MEANS[1] / 0.5**2, rel=1e-5)
    slope = jax.jit(jax.grad(lambda b: bayesrl.log_density(bandit, {"arm": jnp.array(1)}, beta=b).log_target))(0.5)
    assert float(slope) == pytest.approx(-MEANS[1] / 0.5**2, rel=1e-5)


@pytest.mark.parametrize("name", list(ORACLES))
def test_log_density_is_numpyros_of_the_tilted_program(name: str) -> None:
    """Per-context log_target, summed, is NumPyro's joint density of the tilted program (whole data)."""
    oracle = ORACLES[name]()
    args = jax.tree.map(jnp.asarray, oracle.args)
    program = bayesrl.full_data(oracle.policy)
    structure = inspect(jax.random.key(0), program, *args)
    names = structure.names("action", "environment")

    def both(key: Array) -> tuple[Array, Array, Array]:
        trace = handlers.trace(handlers.seed(program, rng_seed=key)).get_trace(*args)
        sites = {site: trace[site]["value"] for site in names}
        density = bayesrl.log_density(program, sites, *args, beta=oracle.beta)
        stepwise = sum(
            score.sum(-1)
            for part in ("log_prior", "log_nature", "log_likelihood")
            for score in density.steps[part].values()
        )
        stepwise = stepwise + sum(score.sum(-1) for score in density.steps["rewards"].values()) / oracle.beta
        reference, _ = numpyro_log_density(bayesrl.tilt(program, oracle.beta), args, {}, sites)
        return density.log_target, reference, stepwise

    target, reference, stepwise = jax.jit(jax.vmap(both))(jax.random.split(jax.random.key(1), 20))
    assert target.shape == (20, *structure.context_shape)
    assert np.allclose(target.reshape(20, -1).sum(-1), reference, rtol=1e-4, atol=1e-4)
    assert np.allclose(stepwise, target, rtol=1e-5, atol=1e-5)


def test_scores_by_step_are_those_of_each_step() -> None:
    prior, rewards = np.log([0.25, 0.75]), np.array([0.0, 2.0])

    def program() -> None:
        def step(last: Array, t: Array) -> tuple[Array, None]:
            bit = numpyro.sample("bit", dist.Categorical(logits=jnp.asarray(prior)))
            bayesrl.reward("gain", jnp.asarray(rewards)[bit] * (t + 1) + last)
            return bit, None

        scan(step, jnp.array(0), jnp.arange(4))

    bits = np.array([1, 0, 1, 1])
    density = jax.jit(lambda bit: bayesrl.log_density(program, {"bit": bit}, beta=2.0))(bits)
    gains = rewards[bits] * np.arange(1, 5) + np.array([0, *bits[:-1]])
    assert np.allclose(density.steps["log_prior"]["bit"], prior[bits])
    assert np.allclose(density.steps["rewards"]["gain"], gains)
    assert float(density.log_target) == pytest.approx(prior[bits].sum() + gains.sum() / 2, rel=1e-6)


def test_a_mini_batch_gives_one_entry_per_element() -> None:
    """Scores of a subsample are those of its elements, not blown up to the size of the data."""
    payoffs = np.arange(6.0)

    def program() -> None:
        with numpyro.plate("n", 6, subsample_size=2) as i:
            bit = numpyro.sample("bit", dist.Bernoulli(0.25))
            bayesrl.reward("payoff", jnp.asarray(payoffs)[i] * bit)

    sites = {"bit": jnp.array([1, 1]), "n": jnp.array([4, 1])}
    density = jax.jit(lambda sites: bayesrl.log_density(program, sites, beta=1.0))(sites)
    assert np.allclose(density.total_reward, [4.0, 1.0])
    assert np.allclose(density.log_prior, np.log(0.25))


def test_whole_runs_on_all_data() -> None:
    oracle = ORACLES["subsampled"]()
    structure = inspect(jax.random.key(0), bayesrl.full_data(oracle.policy), *oracle.args)
    assert structure.context_shape == (6,)
    assert structure.subsampled == ()


def test_environment_is_sampled_from_its_distribution() -> None:
    """Mean of 10,000 draws within 5 standard errors: false-alarm rate 6e-7."""

    def program() -> Array:
        return bayesrl.environment("rain", dist.Bernoulli(0.3), observable=True)

    draws = jax.jit(jax.vmap(lambda key: handlers.seed(program, rng_seed=key)()))(
        jax.random.split(jax.random.key(0), 10_000)
    )
    assert abs(float(draws.mean()) - 0.3) < 5 * (0.21 / 10_000) ** 0.5


def test_only_environment_needs_observable() -> None:
    with pytest.raises(TypeError, match="observable"):
        bayesrl.environment("rain", dist.Bernoulli(0.3))  # type: ignore[call-arg]


def run(program: Any) -> None:
    handlers.seed(program, rng_seed=0)()


@pytest.mark.usefixtures("unchecked")
def test_rewards_of_a_wrong_kind_are_refused() -> None:
    def given(value: Any, size: int | None = None) -> Any:
        def program() -> None:
            if size is None:
                bayesrl.reward("score", value)
            else:
                with numpyro.plate("n", size):
                    bayesrl.reward("score", value)

        return program

    cases = [
        (given("high"), ["'score'", "'high'", "JAX array"]),
        (given(jnp.array(1j)), ["'score'", "complex64", "value.real"]),
        (given(jnp.ones(3)), ["'score'", "(3,)", "value.sum()"]),
        (given(1.0, size=5), ["'score'", "'n' (size 5)", "count 5 times", "shape (5,)"]),
        (given(jnp.ones(4), size=5), ["'score'", "(4,)", "shape (5,)"]),
        (given(jnp.ones((5, 5)), size=5), ["'score'", "(5, 5)"]),
    ]
    for program, parts in cases:
        with pytest.raises(PolicyError) as caught:
            run(program)
        for part in parts:
            assert part in str(caught.value)


def test_integer_and_boolean_rewards_are_numbers() -> None:
    def program() -> None:
        bit = numpyro.sample("bit", dist.Bernoulli(0.5))
        bayesrl.reward("whole", 3 * bit)
        bayesrl.reward("true", bit > 0)

    density = jax.jit(lambda bit: bayesrl.log_density(program, {"bit": bit}, beta=1.0))(1)
    assert float(density.total_reward) == 4.0


@pytest.mark.usefixtures("unchecked")
def test_observable_must_be_a_bool() -> None:
    with pytest.raises(PolicyError, match=r"'rain' got observable='yes'.*say True"):
        run(lambda: bayesrl.environment("rain", dist.Bernoulli(0.3), observable="yes"))  # type: ignore[arg-type]


@pytest.mark.parametrize("beta", [0.0, -1.0, float("nan"), float("inf")])
def test_tilt_refuses_a_temperature_that_is_none(beta: float) -> None:
    with pytest.raises(PolicyError, match=rf"beta must be positive and finite, but holds {beta}"):
        bayesrl.tilt(bandit, beta)


def test_log_density_says_what_is_missing() -> None:
    with pytest.raises(PolicyError, match=r"no value was given for site 'arm'"):
        bayesrl.log_density(bandit, {}, beta=1.0)
    with pytest.raises(PolicyError, match=r"has rewards \('payoff'\).*pass beta"):
        bayesrl.log_density(bandit, {"arm": jnp.array(0)})
    with pytest.raises(PolicyError, match="no reward site"):
        bayesrl.log_density(lambda: numpyro.sample("y", dist.Normal(0.0, 1.0), obs=jnp.array(0.3)), {}, beta=1.0)


def test_two_sites_of_one_name_are_refused() -> None:
    def program() -> None:
        numpyro.sample("x", dist.Bernoulli(0.5))
        numpyro.sample("x", dist.Bernoulli(0.5))
        bayesrl.reward("payoff", 1.0)

    with pytest.raises(PolicyError, match=r"site 'x' appears 2 times.*its own name"):
        inspect(jax.random.key(0), program)


def test_parameters_and_subsamples_inside_scans_are_refused() -> None:
    def with_param() -> None:
        def step(c: Array, _: Any) -> tuple[Array, None]:
            numpyro.sample("x", dist.Bernoulli(logits=numpyro.param("w", jnp.array(0.0))))
            return c, None

        scan(step, jnp.array(0), jnp.arange(2))

    def with_plate() -> None:
        def step(c: Array, _: Any) -> tuple[Array, None]:
            with numpyro.plate("n", 4, subsample_size=2):
                numpyro.sample("x", dist.Bernoulli(0.5))
            return c, None

        scan(step, jnp.array(0), jnp.arange(2))

    with pytest.raises(PolicyError, match=r"param\('w'\) stands inside a scan.*declare it before"):
        inspect(jax.random.key(0), with_param)
    with pytest.raises(PolicyError, match=r"plate 'n' takes a new subsample.*before the scan"):
        inspect(jax.random.key(0), with_plate)

"""Exact answers against brute force in numpy, closed forms, and policies found by gradient ascent."""

import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from jax import Array
from numpyro.contrib.control_flow import scan
from oracles import ORACLES
from scipy.special import logsumexp

from bayesrl.core.handlers import full_data
from bayesrl.core.primitives import environment, reward
from bayesrl.core.programs import Programs
from bayesrl.core.structure import inspect
from bayesrl.errors import EngineError, PolicyError
from bayesrl.exact.enumeration import enumerate_posterior
from bayesrl.exact.evaluation import evaluate_exactly

RNG = np.random.default_rng(3)
LOGITS = RNG.normal(size=(7, 4)).astype("float32")
PAYOFF = RNG.normal(size=(7, 4)).astype("float32")


def log_softmax(x: np.ndarray) -> np.ndarray:
    x = np.asarray(x, float)
    return np.asarray(x - logsumexp(x, axis=-1, keepdims=True))


def sequence() -> None:
    x = numpyro.sample("x", dist.Categorical(probs=jnp.array([3.0, 2.0, 1.0]) / 6))
    reward("score", jnp.log(jnp.array([1.0, 2.0, 3.0]))[x])


def arms(logits: Array, payoff: Array) -> None:
    with numpyro.plate("context", len(logits)):
        arm = numpyro.sample("arm", dist.Categorical(logits=logits))
        value = jnp.take_along_axis(payoff, arm[..., None], -1)[..., 0]
        reward("payoff", value)
        numpyro.deterministic("chosen", arm * 1.0)
    numpyro.deterministic("mean", arm.mean())


def test_sequences() -> None:
    result = enumerate_posterior(sequence, beta=1.0)
    np.testing.assert_allclose(np.exp(result.log_weights), [0.3, 0.4, 0.3], rtol=1e-6)
    np.testing.assert_allclose(result.log_evidence.mean, np.log(10 / 6), rtol=1e-6)
    np.testing.assert_allclose(result.optimum, np.log(10 / 6), rtol=1e-6)
    expected = 0.4 * np.log(2) + 0.3 * np.log(3)
    np.testing.assert_allclose(result.estimates.reward.mean, expected, rtol=1e-6)
    np.testing.assert_allclose(result.estimates.kl.mean, expected - np.log(10 / 6), rtol=1e-5)
    assert result.log_marginal is None
    assert float(result.estimates.reward.se) == 0


def test_contexts_factor_and_beta_is_an_axis() -> None:
    betas = np.array([[0.3], [2.0]], "float32")
    args = jnp.asarray(LOGITS), jnp.asarray(PAYOFF)
    result = enumerate_posterior(arms, *args, beta=jnp.asarray(betas), max_count=4)
    target = log_softmax(LOGITS) + PAYOFF / betas[..., None].astype(float)
    log_z = logsumexp(target, axis=-1)
    np.testing.assert_allclose(result.log_evidence.mean[:, 0], log_z, rtol=1e-5)
    weights = np.exp(target - log_z[..., None])
    np.testing.assert_allclose(np.exp(result.log_weights[:, 0]), weights.swapaxes(1, 2), rtol=1e-4)
    np.testing.assert_allclose(result.estimates.reward.mean[:, 0], (weights * PAYOFF).sum(-1).mean(-1), rtol=1e-5)
    np.testing.assert_allclose(result.estimates.objective.mean[:, 0], (betas * log_z).mean(-1), rtol=1e-5)
    chosen = (weights * np.arange(4)).sum(-1).mean(-1)
    np.testing.assert_allclose(result.estimates.metrics["chosen"].mean[:, 0], chosen, rtol=1e-5)
    # A metric over all contexts is averaged over 1,024 draws: 4.5 standard errors, 2 × 7e-6 false alarms.
    mean = result.estimates.metrics["mean"]
    assert (np.abs(mean.mean[:, 0] - chosen) < 4.5 * mean.se[:, 0]).all()


def test_resample_draws_each_context_by_itself() -> None:
    result = enumerate_posterior(arms, jnp.asarray(LOGITS), jnp.asarray(PAYOFF), beta=0.7)
    draws = result.resample(jax.random.key(1), 4000)["arm"]
    assert draws.shape == (4000, 7)
    weights = np.exp(result.log_weights).T
    found = (np.asarray(draws)[..., None] == np.arange(4)).mean(0)
    # 28 frequencies within 5 standard errors: 2e-5 false alarms.
    assert (np.abs(found - weights) < 5 * np.sqrt(weights * (1 - weights) / 4000)).all()
    # Independent contexts: 21 correlations within 5/√4000, 1e-5 false alarms.
    correlation = np.corrcoef(np.asarray(draws).T)
    assert np.abs(correlation - np.eye(7)).max() < 5 / np.sqrt(4000)


def test_interacting_elements_are_enumerated_jointly() -> None:
    logits = np.array([0.3, -0.5, 1.1])

    def program() -> None:
        with numpyro.plate("unit", 3):
            x = numpyro.sample("x", dist.Bernoulli(logits=jnp.asarray(logits)))
        reward("agree", 1.0 * (x.sum() == 2) + x[0])

    result = enumerate_posterior(program, beta=0.5)
    prior = -np.log1p(np.exp(-logits))
    grid = np.array(list(itertools.product([0, 1], repeat=3)))
    log_prior = (grid * prior + (1 - grid) * (prior - logits)).sum(1)
    rewards = (grid.sum(1) == 2) + grid[:, 0]
    np.testing.assert_array_equal(result.sites["x"], grid)
    np.testing.assert_allclose(result.log_evidence.mean, logsumexp(log_prior + rewards / 0.5), rtol=1e-6)
    with pytest.raises(EngineError, match=r"8 assignments, more than max_count=7.*'x'"):
        enumerate_posterior(program, beta=0.5, max_count=7)


def test_observed_data_condition_the_prior() -> None:
    prior, likelihood = np.array([0.2, 0.5, 0.3]), np.array([0.9, 0.4, 0.1])

    def program() -> None:
        x = numpyro.sample("x", dist.Categorical(probs=jnp.asarray(prior)))
        numpyro.sample("y", dist.Bernoulli(probs=jnp.asarray(likelihood)[x]), obs=1)

    def rewarded() -> None:
        program()
        x = numpyro.sample("z", dist.Bernoulli(0.5))
        reward("r", 1.0 * x)

    plain, tilted = enumerate_posterior(program), enumerate_posterior(rewarded, beta=2.0)
    posterior = prior * likelihood / (prior @ likelihood)
    np.testing.assert_allclose(np.exp(plain.log_weights), posterior, rtol=1e-5)
    for value in (plain.log_marginal.mean, plain.log_evidence.mean, plain.optimum, tilted.log_marginal.mean):
        np.testing.assert_allclose(value, np.log(prior @ likelihood), rtol=1e-5)
    np.testing.assert_allclose(plain.estimates.kl.mean, (posterior * np.log(posterior / prior)).sum(), rtol=1e-5)
    np.testing.assert_allclose(tilted.log_evidence.mean, np.log((1 + np.exp(0.5)) / 2), rtol=1e-5)
    np.testing.assert_allclose(tilted.estimates.objective.mean, 2 * np.log((1 + np.exp(0.5)) / 2), rtol=1e-5)


def test_minus_infinity_means_never() -> None:
    def program(allowed: Array) -> None:
        with numpyro.plate("context", 2):
            x = numpyro.sample("x", dist.Categorical(logits=jnp.zeros((2, 3))))
            reward("r", jnp.where(jnp.take_along_axis(allowed, x[:, None], 1)[:, 0], 0.0, -jnp.inf))

    result = enumerate_posterior(program, jnp.array([[True, False, True], [False, True, False]]), beta=1.0)
    np.testing.assert_allclose(np.exp(result.log_weights), [[0.5, 0], [0, 1], [0.5, 0]], rtol=1e-6)
    np.testing.assert_allclose(result.estimates.kl.mean, (np.log(1.5) + np.log(3)) / 2, rtol=1e-5)
    with pytest.raises(EngineError, match=r"'context'\[1\]"):
        enumerate_posterior(program, jnp.array([[True, False, True], [False, False, False]]), beta=1.0)


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
def test_rewards_that_are_no_rewards(bad: float) -> None:
    def program() -> None:
        x = numpyro.sample("x", dist.Categorical(logits=jnp.zeros(3)))
        reward("score", jnp.array([0.0, bad, 1.0])[x])

    with pytest.raises(PolicyError, match="'score' returned"):
        enumerate_posterior(program, beta=1.0)


def refused() -> dict[str, tuple[Callable[[], None], str]]:
    def continuous() -> None:
        reward("r", numpyro.sample("level", dist.Normal(0, 1)))

    def infinite() -> None:
        reward("r", 1.0 * numpyro.sample("number", dist.Poisson(3.0)))

    def moving() -> None:
        n = numpyro.sample("n", dist.Categorical(probs=jnp.array([0.98, 0.01, 0.01])))
        reward("r", 1.0 * numpyro.sample("k", dist.Binomial(n + 1, 0.5)))

    def nature_and_data() -> None:
        x = environment("x", dist.Bernoulli(0.5), observable=True)
        a = numpyro.sample("a", dist.Bernoulli(0.5))
        numpyro.sample("y", dist.Bernoulli(0.2 + 0.5 * x), obs=1)
        reward("r", 1.0 * a)

    def mini_batch() -> None:
        with numpyro.plate("image", 10, subsample_size=5):
            reward("r", 1.0 * numpyro.sample("a", dist.Bernoulli(0.5)))

    def mixing() -> None:
        with numpyro.plate("unit", 3):
            x = numpyro.sample("x", dist.Bernoulli(0.5))
            reward("r", 1.0 * (x == jnp.roll(x, 1)))

    def peeking() -> None:
        coin = environment("coin", dist.Bernoulli(0.5), observable=False)
        a = numpyro.sample("a", dist.Bernoulli(0.2 + 0.6 * coin))
        reward("r", 1.0 * (a == coin))

    return {
        "continuous": (continuous, "'level' has continuous support"),
        "infinite": (infinite, "'number' has no finite"),
        "moving": (moving, "'k' add up to"),
        "nature_and_data": (nature_and_data, "'x' and observed site 'y'"),
        "mini_batch": (mini_batch, "'image' is subsampled.*bayesrl.full_data"),
        "mixing": (mixing, "plate .'unit'. read each other"),
        "peeking": (peeking, "prior of action site 'a' reads what nature drew unseen"),
    }


@pytest.mark.parametrize("name", refused())
def test_refusals_name_the_site(name: str) -> None:
    program, message = refused()[name]
    with pytest.raises((EngineError, PolicyError), match=message):
        enumerate_posterior(program, beta=1.0)


def test_whole_makes_a_mini_batch_enumerable() -> None:
    program = refused()["mini_batch"][0]
    result = enumerate_posterior(full_data(program), beta=1.0)
    np.testing.assert_allclose(result.log_evidence.mean, np.full(10, np.log((1 + np.e) / 2)), rtol=1e-6)


def best_by_ascent(objective: Callable[[Any], Array], tables: Any) -> float:
    """Maximise an objective over tables of logits by Adam."""
    num_steps = 4000
    optimizer = optax.adam(optax.cosine_decay_schedule(0.1, num_steps))

    def step(carry: Any, _: Any) -> tuple[Any, None]:
        tables, state = carry
        updates, state = optimizer.update(jax.grad(lambda t: -objective(t))(tables), state)
        return (optax.apply_updates(tables, updates), state), None

    (tables, _), _ = jax.lax.scan(step, (tables, optimizer.init(tables)), None, num_steps)
    return float(objective(tables))


def test_a_hidden_coin_is_not_peeked_at() -> None:
    def guess(observable: bool) -> Callable[[], None]:
        def program() -> None:
            coin = environment("coin", dist.Bernoulli(0.5), observable=observable)
            a = numpyro.sample("a", dist.Bernoulli(0.5))
            reward("right", 1.0 * (a == coin))

        return program

    unseen = enumerate_posterior(guess(observable=False), beta=0.2)
    seen = enumerate_posterior(guess(observable=True), beta=0.2)
    np.testing.assert_allclose(unseen.optimum, 0.5, rtol=1e-6)
    np.testing.assert_allclose(unseen.estimates.kl.mean, 0.0, atol=1e-6)
    np.testing.assert_allclose(seen.optimum, 0.2 * np.log((1 + np.exp(5)) / 2), rtol=1e-6)  # .863
    assert unseen.log_evidence is None


def test_control_optimum_is_what_gradient_ascent_finds() -> None:
    """Seen and unseen draws of nature, before, between and after two actions with a moving prior."""
    beta = 0.4
    payoff = jnp.asarray(RNG.normal(size=(2, 3, 2, 2, 2)), jnp.float32)  # hidden, a, seen, b, late
    seen_given = jnp.asarray(RNG.dirichlet([1, 1], size=(2, 3)), jnp.float32)
    late_given = jnp.asarray(RNG.dirichlet([1, 1], size=(2, 2)), jnp.float32)
    prior_a = jnp.asarray(RNG.normal(size=3), jnp.float32)
    prior_b = jnp.asarray(RNG.normal(size=(3, 2, 2)), jnp.float32)

    def program() -> None:
        hidden = environment("hidden", dist.Bernoulli(0.3), observable=False)
        a = numpyro.sample("a", dist.Categorical(logits=prior_a))
        seen = environment("seen", dist.Categorical(probs=seen_given[hidden, a]), observable=True)
        b = numpyro.sample("b", dist.Categorical(logits=prior_b[a, seen]))
        late = environment("late", dist.Categorical(probs=late_given[hidden, b]), observable=True)
        reward("r", payoff[hidden, a, seen, b, late])

    def joint(tables: Any) -> tuple[Array, Array]:
        log_a, log_b = jax.nn.log_softmax(tables[0]), jax.nn.log_softmax(tables[1])
        nature = jnp.array([0.7, 0.3])[:, None, None, None, None] * seen_given[:, :, :, None, None]
        nature = nature * late_given[:, None, None, :, :]
        policy = log_a[:, None, None] + log_b
        ratio = policy - jax.nn.log_softmax(prior_a)[:, None, None] - jax.nn.log_softmax(prior_b)
        return nature * jnp.exp(policy)[None, ..., None], ratio

    def objective(tables: Any) -> Array:
        probability, ratio = joint(tables)
        return (probability * (payoff - beta * ratio[None, ..., None])).sum()

    result = enumerate_posterior(program, beta=beta)
    best = best_by_ascent(objective, (prior_a, prior_b))
    np.testing.assert_allclose(result.optimum, best, atol=2e-6)
    np.testing.assert_allclose(np.exp(result.log_weights).sum(), 1, rtol=1e-6)
    est = result.estimates
    np.testing.assert_allclose(est.objective.mean, est.reward.mean - beta * est.kl.mean, rtol=1e-5)
    np.testing.assert_allclose(
        (np.exp(result.log_weights) * np.asarray(payoff).reshape(-1)).sum(), est.reward.mean, rtol=1e-5
    )


def test_evaluate_exactly_gives_the_gap_of_a_guide() -> None:
    guess = jnp.asarray(RNG.normal(size=(7, 4)), jnp.float32)

    def guide(logits: Array, payoff: Array) -> None:
        table = numpyro.param("table", jnp.zeros((7, 4)))
        with numpyro.plate("context", 7):
            numpyro.sample("arm", dist.Categorical(logits=table))

    args = jnp.asarray(LOGITS), jnp.asarray(PAYOFF)
    programs = Programs(arms, guide, inspect(jax.random.key(0), arms, *args), args, {})
    found = evaluate_exactly(programs, {"table": guess}, beta=0.5)
    log_q, log_prior = log_softmax(guess), log_softmax(LOGITS)
    kl = (np.exp(log_q) * (log_q - log_prior)).sum(-1)
    expected = (np.exp(log_q) * PAYOFF).sum(-1)
    np.testing.assert_allclose(found.kl, kl, rtol=1e-4)
    np.testing.assert_allclose(found.reward, expected, rtol=1e-4)
    np.testing.assert_allclose(found.objective, expected - 0.5 * kl, rtol=1e-4, atol=1e-6)
    optimum = enumerate_posterior(arms, *args, beta=0.5)
    best = {"table": jnp.asarray(optimum.log_weights.T, jnp.float32)}
    np.testing.assert_allclose(evaluate_exactly(programs, best, beta=0.5).objective, optimum.optimum, atol=1e-6)


def test_evaluate_exactly_averages_over_nature() -> None:
    def program() -> None:
        coin = environment("coin", dist.Bernoulli(0.25), observable=True)
        a = numpyro.sample("a", dist.Bernoulli(0.5))
        reward("right", 1.0 * (a == coin))

    def guide() -> None:
        coin = environment("coin", dist.Bernoulli(0.25), observable=True)
        numpyro.sample("a", dist.Bernoulli(jnp.where(coin == 1, 0.9, 0.2)))

    programs = Programs(program, guide, inspect(jax.random.key(0), program), (), {})
    found = evaluate_exactly(programs, {}, beta=0.3)
    kl = np.log(2) + 0.25 * (0.9 * np.log(0.9) + 0.1 * np.log(0.1)) + 0.75 * (0.2 * np.log(0.2) + 0.8 * np.log(0.8))
    np.testing.assert_allclose(found.reward, 0.25 * 0.9 + 0.75 * 0.8, rtol=1e-5)
    np.testing.assert_allclose(found.kl, kl, rtol=1e-5)
    np.testing.assert_allclose(found.objective, found.reward - 0.3 * found.kl, rtol=1e-6)


def test_a_site_that_is_masked_counts_once() -> None:
    def program() -> None:
        stop = numpyro.sample("stop", dist.Bernoulli(0.5))
        with numpyro.handlers.mask(mask=stop == 0):
            x = numpyro.sample("x", dist.Categorical(logits=jnp.zeros(5)))
        reward("r", jnp.where(stop == 1, 1.0, 1.0 * x))

    z = 0.5 * np.e + 0.5 * np.exp(np.arange(5)).mean()
    np.testing.assert_allclose(enumerate_posterior(program, beta=1.0).log_evidence.mean, np.log(z), rtol=1e-6)


def test_a_reversed_scan_is_refused() -> None:
    def program() -> None:
        def step(carry: Array, t: Array) -> tuple[Array, None]:
            reward("r", 1.0 * t * numpyro.sample("a", dist.Bernoulli(0.5)))
            return carry, None

        scan(step, jnp.zeros(()), jnp.arange(3), reverse=True)

    with pytest.raises(PolicyError, match=r"reverse=True.*flip xs"):
        enumerate_posterior(program, beta=1.0)


def test_contexts_that_share_the_weather_are_drawn_together() -> None:
    """Two context plates, and one draw of nature for all."""
    bonus = jnp.asarray(RNG.normal(size=(3, 4)), jnp.float32)

    def program() -> None:
        rain = environment("rain", dist.Bernoulli(0.3), observable=True)
        with numpyro.plate("row", 3, dim=-2), numpyro.plate("column", 4, dim=-1):
            a = numpyro.sample("a", dist.Bernoulli(0.5))
            reward("r", (a == rain) * bonus)

    result = enumerate_posterior(program, beta=0.5)
    expected = 0.5 * np.log((1 + np.exp(np.asarray(bonus, float) / 0.5)) / 2)
    assert result.optimum.shape == (3, 4)
    np.testing.assert_allclose(result.optimum, expected, rtol=1e-5)
    draws = result.resample(jax.random.key(4), 4000)
    assert draws["rain"].shape == (4000,)
    assert draws["a"].shape == (4000, 3, 4)
    agrees = np.asarray(draws["a"] == draws["rain"][:, None, None]).mean(0)
    share = 1 / (1 + np.exp(-np.asarray(bonus) / 0.5))
    # 13 frequencies within 5 standard errors: 7e-6 false alarms.
    assert (np.abs(agrees - share) < 5 * np.sqrt(share * (1 - share) / 4000)).all()
    assert abs(draws["rain"].mean() - 0.3) < 5 * np.sqrt(0.3 * 0.7 / 4000)


def test_interacting_elements_inside_contexts() -> None:
    logits = RNG.normal(size=(2, 3))

    def program() -> None:
        with numpyro.plate("context", 3, dim=-1):
            with numpyro.plate("unit", 2, dim=-2):
                x = numpyro.sample("x", dist.Bernoulli(logits=jnp.asarray(logits)))
            reward("both", 1.0 * x.prod(0))

    result = enumerate_posterior(program, beta=0.5, max_count=4)
    both = (1 / (1 + np.exp(-logits))).prod(0)
    np.testing.assert_allclose(result.log_evidence.mean, np.log(1 - both + both * np.exp(2)), rtol=1e-5)
    share = both * np.exp(2) / (1 - both + both * np.exp(2))
    found = np.asarray(result.resample(jax.random.key(5), 4000)["x"]).prod(1).mean(0)
    # 3 frequencies within 5 standard errors: 2e-6 false alarms.
    assert (np.abs(found - share) < 5 * np.sqrt(share * (1 - share) / 4000)).all()


FINITE = ("flat", "dependent", "chain", "chain_with_nature", "episode", "contexts", "subsampled", "nested")
FINITE += ("interacting", "observable", "hidden", "weathers", "observed")


@pytest.mark.parametrize("name", FINITE)
def test_oracles(name: str) -> None:
    oracle = ORACLES[name]()
    policy = full_data(oracle.policy)
    result = enumerate_posterior(policy, *oracle.args, beta=oracle.beta)
    programs = Programs(
        policy, full_data(oracle.guide), inspect(jax.random.key(0), policy, *oracle.args), oracle.args, {}
    )
    found = evaluate_exactly(programs, oracle.params, oracle.beta).objective
    # The objective of a fit holds β·log p(y), which neither the parameters nor the gap see.
    data = 0.0 if result.log_marginal is None else result.log_marginal.mean
    np.testing.assert_allclose((result.optimum + oracle.beta * data).mean(), oracle.optimum, rtol=2e-6, atol=1e-6)
    truth = np.asarray(oracle.objective(oracle.params)).mean()
    np.testing.assert_allclose((found + oracle.beta * data).mean(), truth, rtol=1e-5, atol=1e-6)
    if oracle.log_evidence is not None:
        np.testing.assert_allclose((result.log_evidence.mean + data).mean(), oracle.log_evidence, rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("beta", [1e2, 1e5, 1e8])
def test_high_temperatures(beta: float) -> None:
    """J* → E_π₀[R] + Var_π₀[R]/2β: rounding of the prior was multiplied by β (−1.8 at 10⁸, where .2 is right)."""

    def bandit() -> None:
        arm = numpyro.sample("arm", dist.Categorical(logits=jnp.zeros(3)))
        reward("payoff", jnp.array([0.1, 0.2, 0.3])[arm])

    found = enumerate_posterior(bandit, beta=beta)
    assert float(found.optimum) == pytest.approx(0.2 + 0.02 / 3 / (2 * beta), abs=3e-8)


def test_a_result_shows_itself_in_a_line() -> None:
    def bandit() -> None:
        with numpyro.plate("context", 2):
            arm = numpyro.sample("arm", dist.Categorical(logits=jnp.zeros(3)))
            reward("payoff", jnp.array([0.0, 1.0, 2.0])[arm])

    shown = repr(enumerate_posterior(bandit, beta=jnp.array([0.5, 1.0])))
    expected = "3 draws, 2 contexts, beta [0.5 1. ], log Z [3.0443 1.309 ], J* [1.5222 1.309 ], E[R] [1.8509 1.5752]"
    assert shown == f"WeightedDraws({expected}, KL [0.6576 0.2662])"

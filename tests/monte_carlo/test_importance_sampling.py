"""Importance sampling against closed forms and enumeration, in standard errors."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from jax import Array

from bayesrl.core.primitives import environment, reward
from bayesrl.core.programs import Programs
from bayesrl.core.structure import inspect
from bayesrl.errors import EngineError, PolicyError
from bayesrl.exact.enumeration import enumerate_posterior
from bayesrl.monte_carlo.importance_sampling import importance
from bayesrl.posterior import sampling
from bayesrl.svi.fitting import fit

RNG = np.random.default_rng(11)
LOGITS = jnp.asarray(RNG.normal(size=(5, 4)), jnp.float32)
PAYOFF = jnp.asarray(RNG.normal(size=(5, 4)), jnp.float32)


def count() -> None:
    x = numpyro.sample("x", dist.Poisson(10.0))
    reward("growth", x * jnp.log(1.1))
    numpyro.deterministic("number", x)


def arms(logits: Array, payoff: Array) -> None:
    with numpyro.plate("context", len(logits)):
        arm = numpyro.sample("arm", dist.Categorical(logits=logits))
        value = jnp.take_along_axis(payoff, arm[..., None], -1)[..., 0]
        reward("payoff", value)
        numpyro.deterministic("chosen", arm * 1.0)
    numpyro.deterministic("mean", arm.mean())


def test_poisson_tilts_to_poisson() -> None:
    """Poisson(10) → Poisson(11); β = 1, log Z = 1; 5 quantities within 4.5 standard errors: 4e-5 false alarms."""
    result = importance(jax.random.key(1), count, beta=1.0)
    assert abs(result.log_evidence.mean - 1) < 4.5 * result.log_evidence.se
    reward_, kl, objective = 11 * np.log(1.1), 11 * np.log(1.1) - 1, 1.0
    est = result.estimates
    for found, truth in ((est.reward, reward_), (est.kl, kl), (est.objective, objective), (est.metrics["number"], 11)):
        assert abs(found.mean - truth) < 4.5 * found.se
    # E[w²]/E[w]² = exp(10·(1.21 − 1.1·2 + 1)) = exp(.1): the share of effective draws is exp(−.1).
    np.testing.assert_allclose(result.ess / 10_000, np.exp(-0.1), rtol=0.02)
    np.testing.assert_allclose(result.log_evidence.se, np.sqrt((np.exp(0.1) - 1) / 10_000), rtol=0.1)
    draws = result.resample(jax.random.key(2), 2000)["x"]
    assert abs(draws.mean() - 11) < 4.5 * np.sqrt(11 / 2000 + 11 / 10_000)


def test_contexts_and_betas_agree_with_enumeration() -> None:
    """10 evidences and 10 averages within 4.5 standard errors: 2e-4 false alarms."""
    betas = jnp.array([0.4, 2.0])
    found = importance(jax.random.key(3), arms, LOGITS, PAYOFF, beta=betas)
    truth = enumerate_posterior(arms, LOGITS, PAYOFF, beta=betas)
    assert found.log_evidence.mean.shape == found.ess.shape == (2, 5)
    assert found.log_weights.shape == (2, 10_000, 5)
    assert (np.abs(found.log_evidence.mean - truth.log_evidence.mean) < 4.5 * found.log_evidence.se).all()
    for name in ("objective", "reward", "kl"):
        ours, exact = getattr(found.estimates, name), getattr(truth.estimates, name)
        assert (np.abs(ours.mean - exact.mean) < 4.5 * ours.se).all()
    chosen = found.estimates.metrics["chosen"]
    assert (np.abs(chosen.mean - truth.estimates.metrics["chosen"].mean) < 4.5 * chosen.se).all()
    mean = found.estimates.metrics["mean"]
    error = np.hypot(mean.se, chosen.se)
    assert (np.abs(mean.mean - truth.estimates.metrics["chosen"].mean) < 4.5 * error).all()


def test_standard_errors_are_those_of_repetition() -> None:
    """400 equal contexts are 400 repetitions; their spread, known to 1/√798, within 5 of that: 6e-7 false alarms."""
    args = jnp.broadcast_to(LOGITS[0], (400, 4)), jnp.broadcast_to(PAYOFF[0], (400, 4))
    result = importance(jax.random.key(9), arms, *args, beta=0.7, num_samples=2000)
    spread = result.log_evidence.mean.std(ddof=1)
    assert abs(spread / result.log_evidence.se.mean() - 1) < 5 / np.sqrt(2 * 399)


def test_the_posterior_itself_is_a_perfect_proposal() -> None:
    exact = enumerate_posterior(arms, LOGITS, PAYOFF, beta=0.5)

    def guide(logits: Array, payoff: Array) -> None:
        table = numpyro.param("table", jnp.zeros((5, 4)))
        with numpyro.plate("context", 5):
            numpyro.sample("arm", dist.Categorical(logits=table))

    args = LOGITS, PAYOFF
    programs = Programs(arms, guide, inspect(jax.random.key(0), arms, *args), args, {})
    proposal = (programs, {"table": jnp.asarray(exact.log_weights.T, jnp.float32)})
    found = importance(jax.random.key(1), arms, *args, beta=0.5, proposal=proposal, num_samples=100)
    np.testing.assert_allclose(found.log_evidence.mean, exact.log_evidence.mean, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(found.ess, 100, rtol=1e-5)
    assert found.log_evidence.se.max() < 1e-6


def test_a_fit_is_a_proposal_as_it_stands() -> None:
    """A fitted table has nearly equal weights; several temperatures are no proposal."""

    def bandit() -> None:
        arm = numpyro.sample("arm", dist.Categorical(logits=jnp.zeros(4)))
        reward("payoff", jnp.arange(4.0)[arm])

    fitted = fit(jax.random.key(0), bandit, beta=0.5, num_steps=500, progress=False)
    found = importance(jax.random.key(1), bandit, beta=0.5, proposal=fitted, num_samples=1000)
    exact = enumerate_posterior(bandit, beta=0.5)
    assert abs(found.log_evidence.mean - exact.log_evidence.mean) < 5 * found.log_evidence.se + 1e-5
    assert found.ess > 900
    several = fit(jax.random.key(0), bandit, beta=jnp.array([0.5, 1.0]), num_steps=2, progress=False)
    with pytest.raises(PolicyError, match="select"):
        importance(jax.random.key(1), bandit, beta=0.5, proposal=several)


def test_observed_data() -> None:
    """Normal prior and likelihood: p(y) = N(y; 0, 2); reward x tilts the posterior mean by σ²/β."""

    def program() -> None:
        x = numpyro.sample("x", dist.Normal(0, 1))
        numpyro.sample("y", dist.Normal(x, 1), obs=0.8)
        reward("r", x)

    result = importance(jax.random.key(4), program, beta=2.0)
    marginal = -0.5 * np.log(4 * np.pi) - 0.8**2 / 4
    evidence = 0.4 / 2 + 0.5 / 2**2 / 2  # x|y ~ N(.4, .5)
    # Four quantities within 4.5 standard errors: 3e-5 false alarms.
    assert abs(result.log_marginal.mean - marginal) < 4.5 * result.log_marginal.se
    assert abs(result.log_evidence.mean - evidence) < 4.5 * result.log_evidence.se
    assert abs(result.estimates.reward.mean - 0.65) < 4.5 * result.estimates.reward.se
    assert abs(result.estimates.kl.mean - (0.65 / 2 - evidence)) < 4.5 * result.estimates.kl.se


def test_events_are_resampled_by_context() -> None:
    def program() -> None:
        with numpyro.plate("context", 3):
            x = numpyro.sample("x", dist.MultivariateNormal(jnp.zeros(2), jnp.eye(2)))
            reward("r", x.sum(-1) * jnp.arange(3))

    result = importance(jax.random.key(5), program, beta=4.0, num_samples=4000)
    draws = np.asarray(result.resample(jax.random.key(6), 2000)["x"])
    assert draws.shape == (2000, 3, 2)
    # p* is N(c/4, 1) in both coordinates; 6 means within 4.5 standard errors: 4e-5 false alarms.
    error = np.sqrt(1 / 2000 + 1 / result.ess)
    assert (np.abs(draws.mean(0) - np.arange(3)[:, None] / 4) < 4.5 * error[:, None]).all()


def test_nature_is_tilted_too_and_no_optimum_is_claimed() -> None:
    def program() -> None:
        coin = environment("coin", dist.Bernoulli(0.5), observable=False)
        a = numpyro.sample("a", dist.Bernoulli(0.5))
        reward("right", 1.0 * (a == coin))

    result = importance(jax.random.key(7), program, beta=0.2)
    assert result.optimum is None
    optimistic = np.log((1 + np.exp(5)) / 2)
    assert abs(result.log_evidence.mean - optimistic) < 4.5 * result.log_evidence.se  # 7e-6 false alarms
    assert 0.2 * optimistic > enumerate_posterior(program, beta=0.2).optimum + 0.3


def test_batches_do_not_change_the_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling, "MOST_AT_ONCE", 900)
    result = importance(jax.random.key(1), count, beta=1.0, num_samples=2500)
    assert result.sites["x"].shape == (2500,)
    assert len(np.unique(result.sites["x"][:900])) > 5
    assert abs(result.log_evidence.mean - 1) < 4.5 * result.log_evidence.se  # 7e-6 false alarms


def test_refusals() -> None:
    def never() -> None:
        reward("never", jnp.where(numpyro.sample("x", dist.Normal(0, 1)) < 1e6, -jnp.inf, 0.0))

    def broken() -> None:
        reward("broken", jnp.log(numpyro.sample("x", dist.Normal(0, 1))))

    def mini_batch() -> None:
        with numpyro.plate("image", 10, subsample_size=5):
            reward("r", numpyro.sample("a", dist.Normal(0, 1)))

    key = jax.random.key(0)
    with pytest.raises(EngineError, match="'never'"):
        importance(key, never, beta=1.0)
    with pytest.raises(PolicyError, match="'broken' returned nan"):
        importance(key, broken, beta=1.0)
    with pytest.raises(EngineError, match="'image' is subsampled"):
        importance(key, mini_batch, beta=1.0)
    with pytest.raises(EngineError, match="num_samples=1"):
        importance(key, count, beta=1.0, num_samples=1)


def test_rewards_beyond_all_precision_leave_averages_right() -> None:
    """Two of three arms earn 1e30: E[R] is that, and KL log 3/2; within 5 standard errors, as in enumeration."""

    def rich() -> None:
        arm = numpyro.sample("arm", dist.Categorical(logits=jnp.zeros(3)))
        reward("payoff", 1e30 * jnp.minimum(arm, 1))

    found = importance(jax.random.key(0), rich, beta=1.0, num_samples=1000).estimates
    exact = enumerate_posterior(rich, beta=1.0)
    np.testing.assert_allclose(found.reward.mean, 1e30, rtol=1e-6)
    np.testing.assert_allclose(exact.estimates.reward.mean, 1e30, rtol=1e-6)
    np.testing.assert_allclose(np.exp(exact.log_weights), [0.0, 0.5, 0.5], atol=1e-9)
    assert abs(found.kl.mean - np.log(1.5)) < 5 * found.kl.se

"""Rejection against closed forms, enumeration and every oracle, in standard errors."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from jax import Array
from oracles import ORACLES
from scipy.stats import beta as beta_distribution
from scipy.stats import chisquare, kstest, norm

from bayesrl.core.primitives import environment, reward
from bayesrl.errors import EngineError, PolicyError
from bayesrl.exact.enumeration import enumerate_posterior
from bayesrl.monte_carlo import rejection_sampling as rejecting
from bayesrl.monte_carlo.rejection_sampling import rejection

RNG = np.random.default_rng(11)
LOGITS = jnp.asarray(RNG.normal(size=(5, 4)), jnp.float32)
PAYOFF = jnp.asarray(RNG.normal(size=(5, 4)), jnp.float32)


def arms(logits: Array, payoff: Array) -> None:
    with numpyro.plate("context", len(logits)):
        arm = numpyro.sample("arm", dist.Categorical(logits=logits))
        reward("payoff", jnp.take_along_axis(payoff, arm[..., None], -1)[..., 0])
        numpyro.deterministic("chosen", arm * 1.0)


def target() -> None:
    x = numpyro.sample("x", dist.Normal(0.0, 1.0))
    reward("near", -0.5 * (x - 2.0) ** 2)


@pytest.mark.parametrize("name", ["hidden", "weathers"])
def test_nature_is_tilted_and_no_optimum_is_claimed(name: str) -> None:
    """β·log Z is above the optimum of control, within 4.5 standard errors: 7e-6 false alarms."""
    oracle = ORACLES[name]()
    result = rejection(jax.random.key(1), oracle.policy, *oracle.args, beta=oracle.beta, num_samples=500)
    assert result.explanation.startswith("target")
    assert result.optimum is None
    assert oracle.beta * result.log_evidence.mean.mean() + 4.5 * result.estimates.objective.se > oracle.optimum


def test_contexts_and_betas_agree_with_enumeration() -> None:
    """10 evidences, 10 averages within 4.5 standard errors (2e-4); 10 chi-square tests at 1e-5 (1e-4)."""
    betas = jnp.array([0.4, 2.0])
    found = rejection(jax.random.key(3), arms, LOGITS, PAYOFF, beta=betas, num_samples=3000)
    truth = enumerate_posterior(arms, LOGITS, PAYOFF, beta=betas)
    assert found.log_weights.shape == (2, 6000, 5)
    assert (found.ess == 3000).all()
    assert (np.abs(found.log_evidence.mean - truth.log_evidence.mean) < 4.5 * found.log_evidence.se).all()
    for name in ("objective", "reward", "kl"):
        ours, exact = getattr(found.estimates, name), getattr(truth.estimates, name)
        assert (np.abs(ours.mean - exact.mean) < 4.5 * ours.se).all()
    chosen = found.estimates.metrics["chosen"]
    assert (np.abs(chosen.mean - truth.estimates.metrics["chosen"].mean) < 4.5 * chosen.se).all()
    arms_drawn = np.asarray(found.sites["arm"]).reshape(2, 3000, 5)
    for lane in range(2):
        for c in range(5):
            counts = np.bincount(arms_drawn[lane, :, c], minlength=4)
            expected = 3000 * np.exp(truth.log_weights[lane, :, c])
            assert chisquare(counts, expected / expected.sum() * 3000).pvalue > 1e-5
    again = np.asarray(found.resample(jax.random.key(0), 2000)["arm"])
    assert again.shape == (2, 2000, 5)
    mean = np.exp(truth.log_weights).transpose(0, 2, 1) @ np.arange(4)
    assert (np.abs(again.mean(1) - mean) < 4.5 * 1.5 * np.sqrt(1 / 2000 + 1 / 3000)).all()


def test_standard_errors_are_those_of_repetition() -> None:
    """400 equal contexts are 400 repetitions; their spread, known to 1/√798, within 5 of that: 6e-7 false alarms.

    Also 400 binomial intervals at 5%: at most 40 miss, where 20 or fewer are expected (3e-5).
    """
    args = jnp.broadcast_to(LOGITS[0], (400, 4)), jnp.broadcast_to(PAYOFF[0], (400, 4))
    result = rejection(jax.random.key(9), arms, *args, beta=0.7, num_samples=500)
    spread = result.log_evidence.mean.std(ddof=1)
    assert abs(spread / result.log_evidence.se.mean() - 1) < 5 / np.sqrt(2 * 399)
    reward_se = float(result.estimates.reward.se) * 20
    truth = enumerate_posterior(arms, *(a[:1] for a in args), beta=0.7)
    assert abs(result.estimates.reward.mean - truth.estimates.reward.mean) < 4.5 * reward_se / 20
    k, n = result.num_accepted, result.num_proposed
    low, high = beta_distribution.ppf(0.025, k, n - k + 1), beta_distribution.ppf(0.975, k + 1, n - k)
    chance = np.exp(truth.log_evidence.mean[0] - result.reward_bound / 0.7)
    assert ((chance < low) | (chance > high)).sum() <= 40


def test_normal_draws_are_exact() -> None:
    """p* = N(1, 1/2): a Kolmogorov–Smirnov test of 4,000 independent draws at 1e-5."""
    result = rejection(jax.random.key(4), target, beta=1.0, num_samples=4000)
    assert float(result.reward_bound) == 0.0
    assert kstest(np.asarray(result.sites["x"]), norm(1, np.sqrt(0.5)).cdf).pvalue > 1e-5
    assert abs(result.log_evidence.mean - (-1 - 0.5 * np.log(2))) < 4.5 * result.log_evidence.se
    assert abs(result.estimates.kl.mean - (0.5 + 0.25 - 0.5 + 0.5 * np.log(2))) < 4.5 * result.estimates.kl.se


def test_tolerance_and_budget_end_the_run() -> None:
    fine = rejection(jax.random.key(5), target, beta=0.5, num_samples=100, tolerance=0.005)
    assert fine.explanation.startswith("target")
    assert fine.log_evidence.se < 0.0055
    poor = rejection(jax.random.key(5), target, beta=0.5, num_samples=5000, max_proposals=4000)
    assert poor.explanation.startswith("budget: max_proposals=4,000")
    assert 100 < poor.ess < 5000
    assert np.isfinite(poor.log_weights).sum() == poor.ess == poor.sites["x"].shape[0]
    vague = rejection(jax.random.key(5), target, beta=0.5, num_samples=10, tolerance=1e-4, max_proposals=4000)
    assert "standard error" in vague.explanation


def test_events_and_small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """p* is N(c/2, 1/2) in both coordinates; 12 means within 4.5 standard errors: 8e-5 false alarms."""
    monkeypatch.setattr(rejecting, "_ELEMENTS", 2**12)

    def program() -> None:
        with numpyro.plate("outer", 2, dim=-2), numpyro.plate("inner", 3, dim=-1):
            x = numpyro.sample("x", dist.MultivariateNormal(jnp.zeros(2), jnp.eye(2)))
            reward("r", -((x - jnp.arange(3.0)[:, None]) ** 2).sum(-1) / 2)

    result = rejection(jax.random.key(6), program, beta=1.0, num_samples=600)
    draws = np.asarray(result.sites["x"])
    assert draws.shape == (600, 2, 3, 2)
    centre = np.arange(3)[:, None] / 2
    assert (np.abs(draws.mean(0) - centre) < 4.5 * np.sqrt(0.5 / 600)).all()


def test_a_declared_bound_is_used_and_checked() -> None:
    def growth() -> None:
        reward("growth", numpyro.sample("x", dist.Poisson(2.0)) * 0.1)

    with pytest.raises(EngineError, match=r"reward site 'growth' can be proven.*reward_bound="):
        rejection(jax.random.key(0), growth, beta=1.0)
    with pytest.raises(EngineError, match=r"the draw x=\d+ has total reward .*above reward_bound=0.3"):
        rejection(jax.random.key(0), growth, beta=1.0, reward_bound=0.3)
    found = rejection(jax.random.key(0), growth, beta=1.0, reward_bound=2.0)
    assert abs(found.log_evidence.mean - 2 * np.expm1(0.1)) < 4.5 * found.log_evidence.se  # 7e-6 false alarms
    with pytest.raises(EngineError, match="context \\(1,\\)"):
        rejection(jax.random.key(0), arms, LOGITS, PAYOFF, beta=1.0, reward_bound=np.array([9.0, -9.0, 9.0, 9.0, 9.0]))
    with pytest.raises(EngineError, match="shape \\(2,\\)"):
        rejection(jax.random.key(0), arms, LOGITS, PAYOFF, beta=1.0, reward_bound=np.ones(2))
    with pytest.raises(EngineError, match="reward_bound=inf; use a finite number"):
        rejection(jax.random.key(0), arms, LOGITS, PAYOFF, beta=1.0, reward_bound=np.inf)


def test_refusals() -> None:
    def observed() -> None:
        x = numpyro.sample("x", dist.Normal(0, 1))
        numpyro.sample("y", dist.Normal(x, 1), obs=0.3)
        reward("r", -(x**2))

    def shared() -> None:
        w = environment("weather", dist.Bernoulli(0.5), observable=True)
        with numpyro.plate("context", 2):
            reward("r", 1.0 * numpyro.sample("a", dist.Bernoulli(0.5)) * w)

    def never() -> None:
        numpyro.sample("x", dist.Normal(0, 1))
        reward("never", jnp.array(-jnp.inf))

    def broken() -> None:
        x = numpyro.sample("x", dist.Normal(0, 1))
        reward("broken", jnp.minimum(jnp.log(x), 0.0))

    key = jax.random.key(0)
    with pytest.raises(EngineError, match="observed site 'y'"):
        rejection(key, observed, beta=1.0)
    with pytest.raises(EngineError, match="share site 'weather'"):
        rejection(key, shared, beta=1.0)
    with pytest.raises(EngineError, match=r"none of .* draws was accepted"):
        rejection(key, never, beta=1.0, reward_bound=0.0, max_proposals=3000)
    with pytest.raises(PolicyError, match="'broken' returned nan"):
        rejection(key, broken, beta=1.0, reward_bound=0.0)
    with pytest.raises(PolicyError, match="needs a temperature"):
        rejection(key, target)
    for options in ({"num_samples": 0}, {"max_proposals": 1}, {"tolerance": -1.0}):
        with pytest.raises(EngineError, match=next(iter(options))):
            rejection(key, target, beta=1.0, **options)  # type: ignore[arg-type]


def test_one_draw_has_no_standard_error() -> None:
    result = rejection(jax.random.key(12), arms, LOGITS[:1], PAYOFF[:1], beta=1.0, num_samples=1)
    chosen = result.estimates.metrics["chosen"]
    assert np.isfinite(chosen.mean)
    assert np.isnan(chosen.se)
    assert 0 < result.estimates.objective.se < np.inf  # log Z rests on all proposals

"""Coverage of tilted fits: right where q = p*, too little after a collapse, too much where q is wide."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from oracles import Still

import bayesrl
from bayesrl.diagnostics.hpd_coverage import coverage
from bayesrl.errors import EngineError, PolicyError
from bayesrl.exact.enumeration import enumerate_posterior
from bayesrl.monte_carlo.importance_sampling import importance
from bayesrl.monte_carlo.rejection_sampling import rejection
from bayesrl.posterior.posterior import Posterior

KEY = jax.random.key(2)
BETAS = np.array([0.5, 1.0])
LEVELS = np.array([0.5, 0.8, 0.95])
PAYOFF = np.array([1.5, 0.0, 0.7, 0.0, 1.5, 0.2])


def bandit() -> None:
    arm = numpyro.sample("arm", dist.Categorical(logits=jnp.zeros(6)))
    bayesrl.reward("payoff", jnp.asarray(PAYOFF)[arm])


def guide() -> None:
    numpyro.sample("arm", dist.Categorical(logits=numpyro.param("logits", jnp.zeros(6))))


def near() -> None:
    """p* is N(1, β/(1 + β)) in each of three contexts."""
    with numpyro.plate("context", 3):
        x = numpyro.sample("x", dist.Normal(0.0, 1.0))
        bayesrl.reward("near", -0.5 * (x - jnp.array([0.0, 0.3, -0.3])) ** 2)


def by_hand(shift: float, scale: float) -> Any:
    def program() -> None:
        with numpyro.plate("context", 3):
            loc = numpyro.param("loc", 0.5 * jnp.array([0.0, 0.3, -0.3]) + shift)
            numpyro.sample("x", dist.Normal(loc, scale * jnp.sqrt(0.5)))

    return program


@pytest.fixture(scope="module")
def fitted() -> Posterior:
    return bayesrl.fit(
        KEY, bandit, beta=jnp.asarray(BETAS), guide=guide, objective=Still(), num_steps=1, progress=False
    )


def at(posterior: Posterior, logits: np.ndarray) -> Posterior:
    """The same fit with other logits, [beta, arm]."""
    return replace(posterior, params={"logits": jnp.asarray(logits, jnp.float32)[:, None]})


def test_the_optimum_covers_each_level(fitted: Posterior) -> None:
    """Among ties too; shares within 4.5 standard errors of 6 levels: false alarms 4e-5."""
    target = enumerate_posterior(bandit, beta=BETAS[::-1].copy())
    found = coverage(KEY, at(fitted, PAYOFF / BETAS[:, None]), target)
    assert found.verdict == "pass"
    assert found.share.mean.shape == found.error.shape == (2, 3)
    assert (np.abs(np.asarray(found.share.mean) - LEVELS) < 4.5 * found.error).all()
    assert np.asarray(found.share.se) == pytest.approx(found.error, rel=0.2)
    assert "as they should" in str(found)


def test_a_dropped_mode_covers_too_little(fitted: Posterior) -> None:
    one_mode = np.where(np.arange(6) == 4, -20.0, PAYOFF / BETAS[:, None])
    found = coverage(KEY, at(fitted, one_mode), enumerate_posterior(bandit, beta=BETAS))
    assert found.verdict == "fail"
    mass = np.exp(1.5 / BETAS) / np.exp(PAYOFF / BETAS[:, None]).sum(1)
    expected = (1 - mass)[:, None] * LEVELS  # what is left is covered as q covers itself
    assert (np.abs(np.asarray(found.share.mean) - expected) < 4.5 * found.error).all()
    assert "dropped a mode" in found.explanation
    assert "at β = 0.5" in found.explanation
    assert max(map(len, str(found).splitlines())) <= 80


@pytest.mark.parametrize(
    ("shift", "scale", "verdict"), [(0.0, 1.0, "pass"), (0.0, 2.0, "warn"), (0.0, 0.5, "fail"), (1.5, 1.0, "fail")]
)
def test_continuous_sites_in_contexts(shift: float, scale: float, verdict: str) -> None:
    """Exact draws by rejection; a region |z| ≤ c of a fit of another width holds what the error function says."""
    posterior = bayesrl.fit(
        KEY, near, beta=1.0, guide=by_hand(shift, scale), objective=Still(), num_steps=1, progress=False
    )
    target = rejection(KEY, near, beta=1.0, num_samples=4000)
    found = coverage(KEY, posterior, target)
    assert found.verdict == verdict
    half = np.array([0.6744898, 1.2815516, 1.959964])  # of a standard normal, at these levels
    low, high = shift / np.sqrt(0.5) - scale * half, shift / np.sqrt(0.5) + scale * half
    cdf = jax.scipy.stats.norm.cdf
    expected = np.asarray(cdf(high) - cdf(low))
    # Draws of the fit move the regions as well: by up to twice as much where it is narrow.
    assert (np.abs(np.asarray(found.share.mean) - expected) < 9 * found.error).all()


def test_nature_is_replayed_and_not_tilted() -> None:
    def program() -> None:
        coin = bayesrl.environment("coin", dist.Bernoulli(0.3), observable=True)
        arm = numpyro.sample("arm", dist.Categorical(logits=jnp.zeros(3)))
        bayesrl.reward("payoff", jnp.array([[0.0, 1.0, 2.0], [2.0, 0.0, 0.0]])[coin, arm])

    posterior = bayesrl.fit(KEY, program, beta=0.7, num_steps=400, progress=False)
    assert coverage(KEY, posterior, enumerate_posterior(program, beta=0.7)).verdict == "pass"
    with pytest.raises(EngineError, match="tilts environment site 'coin'"):
        coverage(KEY, posterior, rejection(KEY, program, beta=0.7))


def test_alarms_are_rare(fitted: Posterior) -> None:
    """50 keys where q = p*: the level is 1%, and 4 alarms would come of it once in 600 times."""
    target = enumerate_posterior(bandit, beta=BETAS)
    best = at(fitted, PAYOFF / BETAS[:, None])
    found = [coverage(jax.random.key(i), best, target, num_samples=300) for i in range(50)]
    assert sum(one.verdict != "pass" for one in found) < 4
    share = np.stack([np.asarray(one.share.mean) for one in found])
    assert share.std(0, ddof=1) == pytest.approx(found[0].error, rel=0.5)


def test_refusals(fitted: Posterior) -> None:
    target = enumerate_posterior(bandit, beta=BETAS)
    with pytest.raises(EngineError, match="weighted draws"):
        coverage(KEY, fitted, importance(KEY, bandit, beta=BETAS, num_samples=1000))
    with pytest.raises(PolicyError, match=r"no draws at β = 1; it has 0\.5"):
        coverage(KEY, fitted, enumerate_posterior(bandit, beta=np.array([0.5])))
    with pytest.raises(PolicyError, match=r"contexts \(\), the target \(3,\)"):
        coverage(KEY, fitted, rejection(KEY, near, beta=BETAS, num_samples=200))
    with pytest.raises(PolicyError, match=r"bayesrl\.load"):
        coverage(KEY, replace(fitted, programs=None), target)
    with pytest.raises(EngineError, match="a number above 0 and below 1"):
        coverage(KEY, fitted, target, levels=(0.5, 95.0))
    with pytest.raises(EngineError, match="num_samples=3"):
        coverage(KEY, fitted, target, num_samples=3)

    def legs() -> None:
        leg = numpyro.sample("leg", dist.Categorical(logits=jnp.zeros(6)))
        bayesrl.reward("payoff", jnp.asarray(PAYOFF)[leg])

    def fewer() -> None:
        arm = numpyro.sample("arm", dist.Categorical(logits=jnp.zeros(3)))
        bayesrl.reward("payoff", jnp.asarray(PAYOFF)[arm])

    with pytest.raises(PolicyError, match="different policies: only one has site 'arm'"):
        coverage(KEY, fitted, enumerate_posterior(legs, beta=BETAS))
    with pytest.raises(PolicyError, match=r"site 'arm' has support=.* in one and \(0, 1, 2\)"):
        coverage(KEY, fitted, enumerate_posterior(fewer, beta=BETAS))

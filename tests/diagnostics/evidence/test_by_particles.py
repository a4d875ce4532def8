"""Evidence by particles: both limits hold, exact draws and chains alike, and the gap is that of enumeration."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from jax import Array
from numpyro.contrib.control_flow import scan
from scipy import stats

from bayesrl.core.primitives import environment, reward
from bayesrl.diagnostics.evidence.bounds import evidence
from bayesrl.errors import EngineError
from bayesrl.exact.enumeration import enumerate_posterior
from bayesrl.exact.tabulation import freeze_program
from bayesrl.guides import AutoTilt
from bayesrl.monte_carlo.particles.bridging import bridge
from bayesrl.monte_carlo.particles.conditional_chains import have_met
from bayesrl.monte_carlo.particles.engines import ParticleOptions, SequentialParticles, TemperedParticles
from bayesrl.monte_carlo.particles.time_steps import TimeSteps, cut_by_time
from bayesrl.posterior.posterior import Posterior
from bayesrl.svi.fitting import fit

RNG = np.random.default_rng(3)
LOGITS = jnp.asarray(RNG.normal(size=(4, 3)), jnp.float32)
FARE = jnp.asarray(RNG.normal(size=(2, 4, 3)), jnp.float32)
FOLLOWING = jnp.array([[0, 1, 2], [1, 2, 3], [3, 0, 1], [2, 3, 0]])
NUM_RUNS = 64


def cities() -> None:
    with numpyro.plate("walker", 2):
        first = numpyro.sample("first", dist.Categorical(logits=jnp.zeros(4)))

    def step(place: Array, _: Any) -> tuple[Array, None]:
        with numpyro.plate("walker", 2):
            turn = numpyro.sample("turn", dist.Categorical(logits=LOGITS[place]))
            reward("fare", FARE[jnp.arange(2), place, turn])
        return FOLLOWING[place, turn], None

    place, _ = scan(step, first, None, length=5)
    with numpyro.plate("walker", 2):
        reward("home", 1.0 * (place == 2))


@pytest.fixture(scope="module")
def truth() -> Any:
    return enumerate_posterior(cities, beta=0.5)


def mean_of_inverse(log_weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean of Z/Ẑ over runs and its standard error, relative to the truth's log Z, [contexts]."""
    log_z = np.asarray(jax.scipy.special.logsumexp(jnp.asarray(log_weights), axis=1)) - np.log(log_weights.shape[1])
    inverse = np.exp(-log_z)
    return inverse.mean(0), inverse.std(0, ddof=1) / np.sqrt(len(inverse))


@pytest.mark.parametrize(("twist", "renewals"), [(None, 0), ("exact", 0), (None, 3)])
def test_runs_that_hold_a_draw_are_unbiased_for_the_inverse(truth: Any, twist: Any, renewals: int) -> None:
    """E[1/Ẑ] = 1/Z within 5 standard errors in 2 contexts (1e-5 false alarms); to rounding under the exact twist.

    So it is if the reference takes other pasts, of which each is as likely as under p*.
    """
    steps = cut_by_time(freeze_program(cities, (), 0.5))
    assert isinstance(steps, TimeSteps)
    engine = SequentialParticles(steps, {}, ParticleOptions(8, NUM_RUNS, 0.7, "systematic", twist, renewals))
    reference = truth.resample(jax.random.key(0), NUM_RUNS)
    draws, log_weights = engine.run(jax.random.key(1), 0.5, reference)
    relative = log_weights.reshape(NUM_RUNS, 8, 2) - truth.log_evidence.mean
    mean, se = mean_of_inverse(relative)
    assert (np.abs(mean - 1) < 5 * se + 1e-5).all()
    first, turns = (np.asarray(draws.sites[name]) for name in ("first", "turn"))
    held = {"first": first.reshape(NUM_RUNS, 8, 2)[:, 0], "turn": turns.reshape(NUM_RUNS, 8, 5, 2)[:, 0]}
    same = (held["first"] == np.asarray(reference["first"])).all()
    assert same == (renewals == 0)
    assert (held["turn"][:, -1] == np.asarray(reference["turn"])[:, -1]).all(), "the last step is the reference's"


def test_tempered_runs_that_hold_a_draw_are_unbiased_for_the_inverse() -> None:
    """As above, for a path of temperatures whose moves are reversed: Normal(0, 1) tilted to Normal(1.6, .2)."""

    def near() -> None:
        x = numpyro.sample("x", dist.Normal(0.0, 1.0))
        reward("near", -2.0 * (x - 2.0) ** 2)

    log_z = -0.5 * 4 / 1.25 - 0.5 * np.log(1.25) + 0.5 * np.log(0.25)
    options = ParticleOptions(8, NUM_RUNS, 0.5, "systematic", None)
    engine = TemperedParticles(freeze_program(near, (), 1.0), {}, options, [4.0, 2.0, 1.0], None, 1)
    exact = 1.6 + np.sqrt(0.2) * np.random.default_rng(0).normal(size=NUM_RUNS).astype(np.float32)
    _, log_weights = engine.run(jax.random.key(2), 1.0, {"x": exact})
    mean, se = mean_of_inverse(log_weights.reshape(NUM_RUNS, 8, 1) - log_z)
    assert (np.abs(mean - 1) < 5 * se).all()


@pytest.fixture(scope="module")
def posterior() -> Posterior:
    guide = AutoTilt(tilt="constant")
    return fit(jax.random.key(0), cities, beta=0.5, guide=guide, num_steps=400, progress=False)


def test_a_fit_is_bracketed_from_both_sides(truth: Any, posterior: Posterior) -> None:
    """Both limits hold by Markov's inequality (5%); a chain gives the upper one, and says so."""
    found = evidence(jax.random.key(1), posterior, method="smc", num_samples=2**14)
    exact = truth.log_evidence.mean.mean()
    assert found.method == "smc"
    assert found.log_evidence.conservative_lower < exact < found.log_evidence.conservative_upper
    assert found.log_evidence.conservative_upper - found.log_evidence.conservative_lower < 2.5
    assert abs(found.log_evidence.mean - exact) < 5 * found.log_evidence.se
    by_sums = evidence(jax.random.key(2), posterior, method="enumeration")
    assert abs(found.gap.mean - by_sums.gap.mean) < 5 * found.gap.se
    assert abs(found.kl_forward.mean - by_sums.kl_forward.mean) < 5 * found.kl_forward.se
    assert found.gap.conservative_lower <= by_sums.gap.mean <= found.gap.conservative_upper
    assert "chains of conditional particles" in found.caveat


def test_auto_takes_particles_where_draws_do_not_reach(posterior: Posterior) -> None:
    """Without enumeration, from the prior at a low temperature; at a high one, draws do reach and particles rest."""
    prior = jax.tree.map(np.zeros_like, posterior.params)
    found = evidence(jax.random.key(1), replace(posterior, params=prior, beta=0.05), num_samples=2**14, max_count=0)
    exact = enumerate_posterior(cities, beta=0.05).log_evidence.mean.mean()
    assert found.method == "smc"
    assert found.log_evidence.conservative_lower < exact < found.log_evidence.conservative_upper
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SequentialParticles, "run", lambda *_, **__: pytest.fail("particles ran"))
        patch.setattr(TemperedParticles, "run", lambda *_, **__: pytest.fail("particles ran"))
        found = evidence(jax.random.key(1), replace(posterior, params=prior, beta=5.0), num_samples=2**14, max_count=0)
    assert found.method != "smc"


def test_draws_that_made_the_data_are_exact() -> None:
    """A random walk seen through noise: log p(y) by Kalman's filter; the walk behind the data is a draw of p*."""
    rng = np.random.default_rng(5)
    walk = rng.normal(size=8).cumsum()
    seen = jnp.asarray(walk + 0.5 * rng.normal(size=8), jnp.float32)

    def walked() -> None:
        def step(x: Array, y: Array) -> tuple[Array, None]:
            x = x + numpyro.sample("step", dist.Normal(0.0, 1.0))
            numpyro.sample("y", dist.Normal(x, 0.5), obs=y)
            return x, None

        scan(step, jnp.asarray(0.0), seen)

    covariance = np.minimum.outer(np.arange(1, 9), np.arange(1, 9)) + 0.25 * np.eye(8)
    exact = stats.multivariate_normal(np.zeros(8), covariance).logpdf(np.asarray(seen))
    posterior = fit(jax.random.key(0), walked, num_steps=2, progress=False)
    draws = {"step": np.diff(walk, prepend=0.0)[None].astype(np.float32)}
    found = evidence(jax.random.key(1), posterior, method="smc", num_samples=2**14, exact_draws=draws)
    assert found.caveat == ""
    assert found.log_evidence.conservative_lower < exact < found.log_evidence.conservative_upper
    assert abs(found.log_evidence.mean - exact) < 5 * found.log_evidence.se
    # One draw is one independent number, so Markov's inequality costs log 40.
    assert found.log_evidence.conservative_upper - found.upper.mean == pytest.approx(np.log(40), abs=0.2)
    with pytest.raises(EngineError, match="exact_draws has shape"):
        evidence(jax.random.key(1), posterior, method="smc", exact_draws={"step": draws["step"][0]})
    with pytest.raises(EngineError, match=r"pass draws of \['step'\]"):
        evidence(jax.random.key(1), posterior, method="smc", exact_draws={"stride": draws["step"]})
    with pytest.raises(EngineError, match="only particles"):
        evidence(jax.random.key(1), posterior, method="nuts", exact_draws=draws)


def test_chains_that_differ_or_drift_have_not_met() -> None:
    noise = np.random.default_rng(0).normal(size=(24, 32, 3))
    assert have_met(noise)[1].all()
    assert not have_met(noise + 3 * np.arange(32)[:, None] / 32)[1].all()
    assert not have_met(noise + np.array([0.0, 0.0, 3.0]) * np.arange(32)[:, None] / 32)[1].all(), (
        "one of many contexts"
    )
    assert not have_met(noise + np.arange(24)[:, None, None] / 24)[1].all()
    assert have_met(np.ones((24, 32, 1)))[1].all()


def test_both_kinds_of_runs_make_one_estimate() -> None:
    """Log Ẑ ~ N(−s²/2, s²) freely, N(s²/2, s²) given a draw: log Z = 0 within 5 of its errors, which are right."""
    rng = np.random.default_rng(0)
    found = []
    for _ in range(200):
        free, held = rng.normal(-0.32, 0.8, size=(32, 2)), rng.normal(0.32, 0.8, size=(3, 32, 2))
        root, ours, theirs = bridge(free, held)
        found.append((root[0], np.hypot(*(x.std(0, ddof=1)[0] / np.sqrt(32) for x in (ours, theirs)))))
    values, errors = np.asarray(found).T
    assert abs(values.mean()) < 5 * values.std() / np.sqrt(200)
    # The spread of 200 numbers is known to 5%.
    assert np.sqrt((errors**2).mean()) == pytest.approx(values.std(), rel=0.25)


def test_nature_is_not_tilted() -> None:
    def coin() -> None:
        x = numpyro.sample("x", dist.Bernoulli(0.5))
        reward("r", 1.0 * x + environment("n", dist.Bernoulli(0.5), observable=True))

    posterior = fit(jax.random.key(0), coin, beta=1.0, num_steps=2, progress=False)
    with pytest.raises(EngineError, match="would tilt environment site 'n'"):
        evidence(jax.random.key(0), posterior, method="smc")

"""`smc` against closed forms and enumeration: both forms, twists, moves, contexts and temperatures; in standard errors."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from jax import Array
from numpyro.contrib.control_flow import scan
from oracles import ORACLES

from bayesrl.core.primitives import environment, reward
from bayesrl.errors import EngineError, PolicyError
from bayesrl.exact.enumeration import enumerate_posterior
from bayesrl.monte_carlo.sequential_monte_carlo import smc
from bayesrl.svi.fitting import fit

RNG = np.random.default_rng(5)
LOGITS = jnp.asarray(RNG.normal(size=(4, 3)), jnp.float32)
PAYOFF = jnp.asarray(RNG.normal(size=(3, 4, 3)), jnp.float32)
FOLLOWING = jnp.array([[0, 1, 2], [1, 2, 3], [3, 0, 1], [2, 3, 0]])


def cities(payoff: Array) -> None:
    """Walk over four places in as many contexts as there are payoffs; the carry holds them along three different axes."""
    contexts = jnp.arange(len(payoff))
    with numpyro.plate("walker", len(payoff)):
        first = numpyro.sample("first", dist.Categorical(logits=jnp.zeros(4)))

    def step(carry: tuple[Array, Array, Array], _: Any) -> tuple[tuple[Array, Array, Array], None]:
        place, visits, clock = carry
        with numpyro.plate("walker", len(payoff)):
            turn = numpyro.sample("turn", dist.Categorical(logits=LOGITS[place]))
            reward("fare", payoff[contexts, place, turn])
        place = FOLLOWING[place, turn]
        return (place, visits + jax.nn.one_hot(place, 4).T, clock + 1), None

    start = (first, jax.nn.one_hot(first, 4).T, jnp.array(0))
    (place, visits, _), _ = scan(step, start, None, length=6)
    with numpyro.plate("walker", len(payoff)):
        reward("home", 1.0 * (place == 2) + 0.1 * visits[0])
        numpyro.deterministic("home rate", 1.0 * (place == 2))


def log_z(found: Any) -> tuple[float, float]:
    return float(found.log_evidence.mean.mean()), float(
        np.linalg.norm(found.log_evidence.se) / found.log_evidence.se.size
    )


@pytest.fixture(scope="module")
def truth() -> Any:
    return enumerate_posterior(cities, PAYOFF, beta=jnp.array([0.4, 2.0]))


def no_twist(step: Array, carry: Any) -> Array:
    return jnp.zeros(3)


def to_home(step: Array, carry: Any) -> Array:
    return 0.5 * (carry[0] == 2)


@pytest.mark.parametrize(
    ("twist", "resampling"),
    [(None, "systematic"), (to_home, "systematic"), (None, "stratified"), (to_home, "multinomial")],
)
def test_resampling_and_twists_leave_the_truth(truth: Any, twist: Any, resampling: Any) -> None:
    """6 evidences, 6 averages and 2 metrics within 5 standard errors (2e-3 false alarms for each of 4 cases)."""
    found = smc(
        jax.random.key(2),
        cities,
        PAYOFF,
        beta=jnp.array([0.4, 2.0]),
        twist=twist,
        resampling=resampling,
        num_particles=128,
        resample_below=0.9,
    )
    assert found.log_evidence.mean.shape == (2, 3)
    assert (np.abs(found.log_evidence.mean - truth.log_evidence.mean) < 5 * found.log_evidence.se).all()
    for name in ("objective", "reward", "kl"):
        ours, exact = getattr(found.estimates, name), getattr(truth.estimates, name)
        assert (np.abs(ours.mean - exact.mean) < 5 * ours.se).all()
    ours, exact = found.estimates.metrics["home rate"], truth.estimates.metrics["home rate"]
    assert (np.abs(ours.mean - exact.mean) < 5 * ours.se).all()


def test_every_weight_is_z_under_the_exact_twist(truth: Any) -> None:
    """To single precision, whatever the draws: also of what stands before the scan, and with a reward behind it."""
    found = smc(jax.random.key(3), cities, PAYOFF, beta=jnp.array([0.4, 2.0]), twist="exact", num_particles=16)
    np.testing.assert_allclose(found.log_evidence.mean, truth.log_evidence.mean, rtol=2e-6, atol=2e-6)
    assert (found.log_evidence.se < 1e-6).all()
    np.testing.assert_allclose(found.ess, 16 * 16, rtol=1e-4)


def test_a_fit_proposes() -> None:
    """log Z within 5 standard errors, by both (3e-4 false alarms); a fit's particles are worth more than the prior's."""
    oracle = ORACLES["walk"]()
    posterior = fit(jax.random.key(0), oracle.policy, beta=oracle.beta, num_steps=300, progress=False)
    found, plain = (
        smc(jax.random.key(4), oracle.policy, beta=oracle.beta, proposal=proposal, num_particles=64)
        for proposal in (posterior, None)
    )
    for result in (found, plain):
        assert abs(result.log_evidence.mean - oracle.log_evidence) < 5 * result.log_evidence.se
    assert found.ess > 1.5 * plain.ess


def two_kinds() -> None:
    k = numpyro.sample("k", dist.Categorical(logits=jnp.zeros(4)))
    x = numpyro.sample("x", dist.Normal(3.0 * k, 1.0).expand([2]).to_event(1))
    numpyro.sample("y", dist.Normal(x.sum(), 0.5), obs=4.0)


LOG_P = float(jax.scipy.special.logsumexp(dist.Normal(6.0 * jnp.arange(4), 1.5).log_prob(4.0)) - np.log(4))


@pytest.mark.parametrize("moves", [None, ["independence"], ["gibbs", "hmc"]])
def test_moves_leave_the_truth(moves: Any) -> None:
    """log p(y) within 5 standard errors, by each choice of moves (1.6e-4 false alarms each)."""
    found = smc(jax.random.key(5), two_kinds, moves=moves, num_particles=256, form="tempered")
    mean, se = log_z(found)
    assert abs(mean - LOG_P) < 5 * se
    assert found.log_marginal is not None
    np.testing.assert_allclose(found.log_marginal.mean, found.log_evidence.mean)


@pytest.mark.parametrize("move", ["hmc", "nuts"])
def test_unconstrained_moves_know_the_volume(move: Any) -> None:
    """Gamma(2, 1) tilted by exp(−3x) has log Z = −2·log 4, and a mean of 1/2; both within 5 standard errors (3e-4)."""

    def wait() -> None:
        x = numpyro.sample("x", dist.Gamma(2.0, 1.0))
        reward("speed", -3.0 * x)
        numpyro.deterministic("mean", x)

    found = smc(jax.random.key(6), wait, beta=1.0, moves=[move], num_particles=256, num_moves=2)
    assert abs(found.log_evidence.mean + 2 * np.log(4)) < 5 * found.log_evidence.se
    metric = found.estimates.metrics["mean"]
    assert abs(metric.mean - 0.5) < 5 * metric.se


def test_data_beside_rewards() -> None:
    """log Z is that of p(x|y): both engines within 5 standard errors of enumeration (6e-4 false alarms)."""

    def walk() -> None:
        def step(x: Array, y: Array) -> tuple[Array, None]:
            x = numpyro.sample("x", dist.Categorical(logits=jnp.eye(3)[x]))
            numpyro.sample("y", dist.Bernoulli(logits=x - 1.0), obs=y)
            reward("high", 0.3 * x)
            return x, None

        scan(step, jnp.array(0), jnp.array([1.0, 0.0, 1.0, 1.0]))

    exact = enumerate_posterior(walk, beta=0.5)
    for form in ("sequential", "tempered"):
        found = smc(jax.random.key(7), walk, beta=0.5, form=form, num_particles=128)
        assert abs(found.log_evidence.mean - exact.log_evidence.mean) < 5 * found.log_evidence.se
        assert abs(found.log_marginal.mean - exact.log_marginal.mean) < 5 * found.log_marginal.se


def test_a_schedule_is_followed() -> None:
    """Given temperatures need no pilot; log Z within 5 standard errors (1.6e-4)."""
    oracle = ORACLES["flat"]()
    found = smc(jax.random.key(8), oracle.policy, beta=0.5, schedule=[4.0, 1.0, 0.5], num_particles=64)
    assert abs(found.log_evidence.mean - oracle.log_evidence) < 5 * found.log_evidence.se


def test_standard_errors_are_those_of_repetition() -> None:
    """Their mean square over 24 runs is the variance of log Z within a factor of 2.2 (chi-square of 23: 1e-3)."""
    runs = [smc(jax.random.key(i), cities, PAYOFF[:1], beta=0.5, num_particles=32) for i in range(24)]
    means = np.array([run.log_evidence.mean[0] for run in runs])
    se = np.array([run.log_evidence.se[0] for run in runs])
    assert 0.4 < means.var(ddof=1) / (se**2).mean() < 2.2


def never(payoff: Array) -> None:
    def step(x: Array, _: Any) -> tuple[Array, None]:
        x = x + numpyro.sample("x", dist.Bernoulli(0.5))
        reward("forbidden", jnp.where(x >= 0, -jnp.inf, 0.0))
        return x, None

    scan(step, jnp.array(0), None, length=4)


def natural() -> None:
    x = numpyro.sample("x", dist.Bernoulli(0.5))
    reward("r", 1.0 * x + environment("n", dist.Bernoulli(0.5), observable=True))


def mixing(payoff: Array) -> None:
    """Contexts that are carried without an axis of their own."""

    def step(carry: Array, _: Any) -> tuple[Array, None]:
        with numpyro.plate("walker", 3):
            x = numpyro.sample("x", dist.Bernoulli(0.5 * jnp.ones(3)))
            reward("r", x + carry.reshape(3, 2)[:, 0])
        return carry + jnp.repeat(x, 2), None

    scan(step, jnp.zeros(6), None, length=2)


@pytest.mark.parametrize(
    ("policy", "options", "error", "message"),
    [
        (cities, {"num_particles": 1}, EngineError, "at least 2"),
        (cities, {"twist": lambda step, carry: jnp.zeros(2)}, EngineError, r"returned shape \(2,\).*\(3,\)"),
        (
            cities,
            {"twist": lambda step, carry: jnp.where(step == 3, jnp.nan, 0.0) * jnp.ones(3)},
            EngineError,
            r"twist is nan after step 3 in context 'walker'\[0\]",
        ),
        (cities, {"twist": lambda step, carry: jnp.inf * jnp.ones(3)}, EngineError, "twist is inf after step -1"),
        (cities, {"twist": lambda step, carry: -1e30 * jnp.ones(3)}, EngineError, "single precision rounds it by"),
        (
            cities,
            {"twist": lambda step: jnp.zeros(3)},
            EngineError,
            r"twist could not be run: .* it gets \(step, carry\)",
        ),
        (cities, {"twist": lambda step, carry: None}, EngineError, "twist could not be run"),
        (cities, {"twist": "reward"}, EngineError, "reward of a text"),
        (cities, {"twist": 3.0}, EngineError, "'exact'"),
        (cities, {"schedule": [1.0, 0.7]}, EngineError, "ends at temperature 0.7"),
        (cities, {"schedule": [0.2, 0.4]}, EngineError, "falling temperatures"),
        (cities, {"form": "sequential", "moves": ["gibbs"]}, EngineError, "only form='tempered'"),
        (cities, {"form": "tempered", "twist": no_twist}, EngineError, "looks ahead in time"),
        (cities, {"moves": ["hmc"]}, EngineError, "moves continuous sites, and the program has none"),
        (cities, {"resample_below": 1.5}, EngineError, "resample_below"),
        (never, {}, EngineError, "no particle has a weight after step 0"),
        (mixing, {}, EngineError, "has no axis of its 3 elements"),
    ],
)
def test_bad_input_is_named(policy: Callable[..., Any], options: dict[str, Any], error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        smc(jax.random.key(0), policy, PAYOFF, beta=0.4, **options)


def steep() -> None:
    """A walk that must not fall below −1."""

    def step(x: Array, _: Any) -> tuple[Array, None]:
        x = x + numpyro.sample("move", dist.Normal(0.0, 1.0))
        reward("height", jnp.where(x < -1, -jnp.inf, 0.1 * x))
        return x, None

    scan(step, jnp.zeros(()), None, length=3)


def test_a_twist_of_minus_infinity_ends_a_path() -> None:
    """It says what the reward says too, so that nothing changes: within 5 standard errors of the difference."""
    options: dict[str, Any] = {"beta": 1.0, "num_particles": 256, "num_replications": 32}
    plain = smc(jax.random.key(0), steep, **options).log_evidence
    found = smc(
        jax.random.key(1), steep, twist=lambda step, x: jnp.where(x < -1, -jnp.inf, 0.1 * x), **options
    ).log_evidence
    assert plain is not None
    assert found is not None
    assert abs(plain.mean - found.mean) < 5 * np.hypot(plain.se, found.se)
    assert found.se < 0.05


def test_programs_that_particles_cannot_take() -> None:
    with pytest.raises(EngineError, match="tilt environment site 'n'"):
        smc(jax.random.key(0), natural, beta=1.0)
    with pytest.raises(EngineError, match="one scan, and it has no scan"):
        smc(jax.random.key(0), two_kinds, form="sequential")
    with pytest.raises(PolicyError, match="needs a temperature"):
        smc(jax.random.key(0), cities, PAYOFF)

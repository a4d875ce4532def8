"""Learned twists of programs with a scan: against exact soft values, log Z on the natural scale, and bad input."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from jax import Array
from jax.scipy.special import logsumexp
from numpyro.contrib.control_flow import scan

import bayesrl
from bayesrl import control
from bayesrl.errors import EngineError, ObjectiveError, PolicyError
from bayesrl.objectives import ContrastiveTwist, ReverseKL, SoftValueRegression

BETA, LENGTH = 0.25, 5
RNG = np.random.default_rng(3)
LOGITS = jnp.asarray(RNG.normal(size=(2, 3, 3)), jnp.float32)
PAYOFF = jnp.asarray(0.5 * RNG.normal(size=(2, 3)), jnp.float32)


def towns(payoff: Array) -> None:
    """Walk over three towns in two contexts; the last one visited pays most."""

    def step(place: Array, _: Any) -> tuple[Array, None]:
        with numpyro.plate("walker", 2):
            place = numpyro.sample("place", dist.Categorical(logits=LOGITS[jnp.arange(2), place]))
            bayesrl.reward("fare", payoff[jnp.arange(2), place])
        return place, None

    last, _ = scan(step, jnp.zeros(2, int), None, length=LENGTH)
    with numpyro.plate("walker", 2):
        bayesrl.reward("home", 2.0 * (last == 2))


def soft_values() -> np.ndarray:
    """V after step t in each town, [steps, contexts, towns], nats, by backward induction."""
    log_prior = jax.nn.log_softmax(LOGITS)
    value = jnp.broadcast_to(2.0 * (jnp.arange(3) == 2) / BETA, (2, 3))
    values = [value]
    for _ in range(LENGTH - 1):
        value = logsumexp(log_prior + (PAYOFF / BETA + value)[:, None, :], axis=-1)
        values.append(value)
    return np.asarray(values[::-1])


def learned_values(twist: Any) -> np.ndarray:
    programs, params = twist.unbatched()
    value_fn = programs.guide.twist_values(programs.constrain(params))
    every = [[value_fn(t, jnp.full(2, town)) for town in range(3)] for t in range(LENGTH)]
    return np.moveaxis(np.asarray(every), -1, 1) / BETA


def visits(exact: Any) -> np.ndarray:
    """How often p* is in each town after each step, [steps, contexts, towns]."""
    weights = np.exp(exact.log_weights - np.logaddexp.reduce(exact.log_weights, 0))
    there = np.asarray(exact.sites["place"])[..., None] == np.arange(3)
    return np.asarray((weights[:, None, :, None] * there).sum(0))


@pytest.fixture(scope="module")
def exact() -> Any:
    return bayesrl.enumerate_posterior(towns, PAYOFF, beta=BETA)


@pytest.fixture(scope="module")
def plain() -> Any:
    return bayesrl.smc(jax.random.key(1), towns, PAYOFF, beta=BETA, num_particles=32, num_replications=64)


@pytest.mark.parametrize("objective", [SoftValueRegression(64), ContrastiveTwist(128)])
def test_twists_approach_the_soft_value(exact: Any, plain: Any, objective: Any) -> None:
    """By regression within .01 nat everywhere (measured 1e-3), as its noise vanishes; by contrast up to a constant per
    step, where p* goes, within .1 (measured .02).

    The mean of Ẑ/Z over 64 runs is within 5 standard errors of 1 (1e-5 false alarms for each context), and nearly every
    particle is worth one; of the prior's a tenth.
    """
    options = {"beta": BETA, "objective": objective, "num_steps": 1000, "progress": False}
    twist = bayesrl.fit_twist(jax.random.key(0), towns, PAYOFF, **options)
    error = learned_values(twist) - soft_values()
    if isinstance(objective, ContrastiveTwist):
        share = visits(exact)
        error = np.sqrt((share * (error - (share * error).sum(-1, keepdims=True)) ** 2).sum(-1))
        assert error.max() < 0.1
    else:
        assert np.abs(error).max() < 0.01
    sizes = {"num_particles": 32, "num_replications": 64}
    found = bayesrl.smc(jax.random.key(1), towns, PAYOFF, beta=BETA, twist=twist, **sizes)
    assert (found.ess > 0.9 * 32 * 64).all()
    assert (found.ess > 3 * plain.ess).all()
    ratio = np.exp(found.log_evidence.mean - exact.log_evidence.mean)
    assert (np.abs(ratio - 1) < 5 * found.log_evidence.se + 1e-5).all()
    # q is p*: what the fit earns is the optimum.
    assert abs(twist.estimate(jax.random.key(2), 2000).objective.mean[0] - exact.estimates.objective.mean) < 0.01


def drift() -> None:
    def step(x: Array, _: Any) -> tuple[Array, None]:
        x = x + numpyro.sample("wind", dist.Normal(0.0, 0.5))
        return x, None

    x, _ = scan(step, jnp.array(0.0), None, length=4)
    bayesrl.reward("near", -((x - 4.0) ** 2))


def test_draws_that_cannot_be_listed_are_weighed() -> None:
    """log Z = log E exp(−(x − 4)²) = −log(3)/2 − 16/3 for x ~ N(0, 1), within 5 standard errors (1.6e-4).

    Particles under the network are worth over 1.5 times as many (measured 3).
    """
    objective = ContrastiveTwist(512)
    twist = bayesrl.fit_twist(
        jax.random.key(0), drift, beta=1.0, objective=objective, num_steps=300, progress=False, learning_rate=0.03
    )
    found = bayesrl.smc(jax.random.key(1), drift, beta=1.0, twist=twist, num_particles=128)
    plain = bayesrl.smc(jax.random.key(1), drift, beta=1.0, num_particles=128)
    assert abs(found.log_evidence.mean + np.log(3) / 2 + 16 / 3) < 5 * found.log_evidence.se
    assert found.ess > 1.5 * plain.ess
    with pytest.raises(ObjectiveError, match="cannot be listed \\('wind'\\); use ContrastiveTwist"):
        bayesrl.fit_twist(jax.random.key(0), drift, beta=1.0, objective=SoftValueRegression(), progress=False)


@dataclass(frozen=True)
class Ladder(control.Environment):
    """Climb or fall back to the ground; the top pays."""

    num_observations = 6

    def reset(self) -> Any:
        return jnp.array(0)

    def step(self, state: Any, action: Any) -> control.Transition:
        new = jnp.where(action == 1, state + 1, 0)
        return control.Transition(new, jnp.where(new == 5, 1.0, -0.05 * action), new == 5)

    def prior(self, observation: Any) -> dist.Distribution:
        return dist.Categorical(logits=jnp.zeros(2))


def test_a_critic_is_a_twist() -> None:
    """Its particles are worth more (measured 3 times); log Z is within 5 standard errors (1.6e-4)."""
    climb = control.Rollout(Ladder(), horizon=7)
    options = {"guide": control.TablePolicy(stationary=False), "objective": control.ActorCritic(trace=1.0)}
    posterior = bayesrl.fit(jax.random.key(0), climb, beta=0.2, num_steps=300, progress=False, **options)
    exact = bayesrl.enumerate_posterior(climb, beta=0.2)
    found = bayesrl.smc(jax.random.key(1), climb, beta=0.2, twist=posterior, num_particles=64)
    plain = bayesrl.smc(jax.random.key(1), climb, beta=0.2, num_particles=64)
    assert abs(found.log_evidence.mean - exact.log_evidence.mean) < 5 * found.log_evidence.se + 1e-5
    assert found.ess > 1.5 * plain.ess
    uncritical = {"guide": control.TablePolicy(critic=False), "objective": ReverseKL(16)}
    other = bayesrl.fit(jax.random.key(0), climb, beta=0.2, num_steps=1, progress=False, **uncritical)
    with pytest.raises(EngineError, match="without a critic"):
        bayesrl.smc(jax.random.key(1), climb, beta=0.2, twist=other, num_particles=64)


def fogged(*, observable: bool) -> Any:
    def program() -> None:
        def step(x: Array, _: Any) -> tuple[Array, None]:
            wind = bayesrl.environment("wind", dist.Bernoulli(0.5), observable=observable)
            x = x + numpyro.sample("row", dist.Bernoulli(0.5)) * wind
            return x, None

        x, _ = scan(step, jnp.array(0), None, length=3)
        bayesrl.reward("far", 1.0 * x)

    return program


def arm() -> None:
    bayesrl.reward("r", 1.0 * numpyro.sample("arm", dist.Bernoulli(0.5)))


def test_what_cannot_be_learned_is_named() -> None:
    key = jax.random.key(0)
    with pytest.raises(EngineError, match="does not see environment site 'wind'"):
        bayesrl.fit_twist(key, fogged(observable=False), beta=1.0)
    with pytest.raises(EngineError, match="tilt environment site 'wind'"):
        bayesrl.fit_twist(key, fogged(observable=True), beta=1.0)
    with pytest.raises(EngineError, match="looks at 'wind'"):
        bayesrl.smc(key, fogged(observable=False), beta=1.0, twist=lambda step, x: 1.0 * x)
    with pytest.raises(EngineError, match="it has no scan; write the steps as a scan"):
        bayesrl.fit_twist(key, arm, beta=1.0)
    with pytest.raises(PolicyError, match="one temperature"):
        bayesrl.fit_twist(key, towns, PAYOFF, beta=jnp.array([0.5, 1.0]))
    with pytest.raises(EngineError, match=r"objective=a ReverseKL; use .*ContrastiveTwist\(\)"):
        bayesrl.fit_twist(key, towns, PAYOFF, beta=1.0, objective=ReverseKL())
    with pytest.raises(EngineError, match="the policy is none"):
        bayesrl.fit_twist(key, towns, PAYOFF, beta=1.0, guide=bayesrl.guides.AutoTilt())
    with pytest.raises(ObjectiveError, match=r"call bayesrl\.fit_twist"):
        bayesrl.fit(key, towns, PAYOFF, beta=1.0, objective=ContrastiveTwist())
    posterior = bayesrl.fit(key, arm, beta=1.0, num_steps=1, progress=False)
    with pytest.raises(EngineError, match="values no states"):
        bayesrl.smc(key, towns, PAYOFF, beta=1.0, twist=posterior)
    with pytest.raises(EngineError, match="only method='smc' looks ahead"):
        bayesrl.evidence(key, posterior, twist="exact")

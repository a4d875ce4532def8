"""Optima under other regularisers than KL: published numbers, the conditions of the optimum, what is refused."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from jax import Array
from numpyro.contrib.control_flow import scan

import bayesrl
from bayesrl.errors import EngineError
from bayesrl.exact.weighted_draws import refuse_other_regularizer

ARMS = (0.1, 0.3, 0.5, 0.7, 0.9)
RNG = np.random.default_rng(5)
LOGITS = RNG.normal(size=(3, 4)).astype("float32")
PAYOFF = RNG.normal(size=(3, 4)).astype("float32")


def bandit(rewards: Any) -> None:
    arm = numpyro.sample("arm", dist.Categorical(logits=jnp.zeros(len(rewards))))
    bayesrl.reward("payoff", jnp.asarray(rewards)[arm])


def arms(logits: Array, payoff: Array) -> None:
    with numpyro.plate("context", len(logits)):
        arm = numpyro.sample("arm", dist.Categorical(logits=logits))
        bayesrl.reward("payoff", jnp.take_along_axis(payoff, arm[..., None], -1)[..., 0])
        numpyro.deterministic("chosen", arm * 1.0)


# Computed independently; J* at β = .1 and .3, q at β = .1.
KNOWN = {
    "kl": (0.753593, 0.622375, None),
    "chi_squared": (0.745, 0.629167, (0, 0, 0, 0.3, 0.7)),
    "chi_squared_kl": (0.666818, 0.565224, (0.00325, 0.02188, 0.10609, 0.29892, 0.56987)),
    "jensen_shannon_sum": (0.818179, 0.703841, None),
    "jensen_shannon": (0.857876, 0.782902, None),
    "forward_kl": (0.728712, 0.618120, None),
}


@pytest.mark.parametrize("name", KNOWN)
def test_the_five_armed_bandit(name: Any) -> None:
    cold, warm, best = KNOWN[name]
    result = bayesrl.enumerate_posterior(bandit, ARMS, beta=jnp.array([0.1, 0.3]), regularizer=name)
    np.testing.assert_allclose(result.optimum, [cold, warm], atol=1e-6)
    if best is not None:
        np.testing.assert_allclose(np.exp(result.log_weights[0]), best, atol=1e-5)
    assert result.regularizer == name
    assert (result.log_evidence is None) == (name != "kl")
    np.testing.assert_allclose(np.exp(result.log_weights).sum(1), 1.0, atol=1e-12)
    np.testing.assert_allclose(result.estimates.objective.mean, result.optimum, atol=1e-12)
    told = result.estimates
    divergence = told.kl if told.divergence is None else told.divergence
    np.testing.assert_allclose(told.reward.mean - np.array([0.1, 0.3]) * divergence.mean, result.optimum, atol=1e-6)


# Generators written anew, with finite differences for f′.
GENERATORS = {
    ("chi_squared", None): lambda t: (t - 1) ** 2 / 2,
    ("chi_squared_kl", None): lambda t: (t - 1) ** 2 / 2 + t * np.log(t),
    ("jensen_shannon", None): lambda t: 0.5 * (t * np.log(2 * t / (1 + t)) + np.log(2 / (1 + t))),
    ("jensen_shannon_sum", None): lambda t: t * np.log(2 * t / (1 + t)) + np.log(2 / (1 + t)),
    ("forward_kl", None): lambda t: -np.log(t),
    ("alpha", 0.5): lambda t: (t**0.5 - 1) / (0.5 * -0.5),
    ("alpha", 3.0): lambda t: (t**3 - 1) / (3 * 2),
    ("alpha", -1.0): lambda t: (1 / t - 1) / 2,
}


@pytest.mark.parametrize(("name", "alpha"), GENERATORS)
@pytest.mark.parametrize("beta", [0.02, 0.5])
def test_the_conditions_of_the_optimum_hold_in_each_context(name: Any, alpha: float | None, beta: float) -> None:
    """R − β·f′(q/π₀) is the same on the support of q, and no larger elsewhere; J* is E[R] − β·D."""
    generator = GENERATORS[name, alpha]
    result = bayesrl.enumerate_posterior(
        arms, jnp.asarray(LOGITS), jnp.asarray(PAYOFF), beta=beta, regularizer=name, alpha=alpha
    )
    prior = np.exp(LOGITS.astype(float))
    prior /= prior.sum(1, keepdims=True)
    q = np.exp(result.log_weights.T)
    np.testing.assert_allclose(q.sum(1), 1.0, atol=1e-12)
    t = q / prior
    kept = t > 1e-6  # finite differences know no slope below
    at = np.where(kept, t, 1.0)
    step = 1e-6 * at
    slope = (generator(at + step) - generator(at - step)) / (2 * step)
    multiplier = np.where(kept, PAYOFF - beta * slope, np.nan)
    level = np.nanmax(multiplier, 1, keepdims=True)
    # Far from t = 1, differences of f lose digits: a share of 1e-4 of β·f′ is theirs.
    assert (np.abs(multiplier - level) < 1e-3 + 1e-4 * beta * np.abs(slope))[kept].all()
    if name == "chi_squared":
        assert (PAYOFF - beta * -1.0 <= level + 1e-3)[t == 0].all()
    divergence = np.where(t > 0, prior * generator(np.where(t > 0, t, 1.0)), prior * _at_zero(name, alpha)).sum(1)
    np.testing.assert_allclose(result.optimum, (q * PAYOFF).sum(1) - beta * divergence, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(result.estimates.metrics["chosen"].mean, (q * np.arange(4)).sum(1).mean(), rtol=1e-5)
    kl = np.where(q > 0, q * np.log(np.where(t > 0, t, 1.0)), 0.0).sum(1).mean()
    np.testing.assert_allclose(result.estimates.kl.mean, kl, rtol=1e-5)


def _at_zero(name: str, alpha: float | None) -> float:
    known = {
        "chi_squared": 0.5,
        "chi_squared_kl": 0.5,
        "jensen_shannon": np.log(2) / 2,
        "jensen_shannon_sum": np.log(2),
    }
    if name == "alpha" and alpha is not None and alpha > 0:
        return -1 / (alpha * (alpha - 1))
    return float(known.get(name, np.inf))


def test_data_beside_rewards_move_the_reference() -> None:
    """With data, π₀ means p(x|y): the optimum is that of a bandit whose prior is p(x|y)."""

    def given_data() -> None:
        arm = numpyro.sample("arm", dist.Categorical(logits=jnp.zeros(3)))
        numpyro.sample("y", dist.Bernoulli(jnp.array([0.2, 0.3, 0.5])[arm]), obs=jnp.asarray(1))
        bayesrl.reward("payoff", jnp.array([1.0, 0.5, 0.0])[arm])

    def tilted() -> None:
        arm = numpyro.sample("arm", dist.Categorical(probs=jnp.array([0.2, 0.3, 0.5])))
        bayesrl.reward("payoff", jnp.array([1.0, 0.5, 0.0])[arm])

    one, other = (
        bayesrl.enumerate_posterior(policy, beta=0.4, regularizer="chi_squared_kl") for policy in (given_data, tilted)
    )
    np.testing.assert_allclose(one.optimum, other.optimum, rtol=1e-6)
    np.testing.assert_allclose(one.log_weights, other.log_weights, rtol=1e-5)
    np.testing.assert_allclose(one.estimates.kl.mean, other.estimates.kl.mean, rtol=1e-5)


def walk(num_steps: int) -> None:
    def step(state: Array, _: Any) -> tuple[Array, None]:
        move = numpyro.sample("move", dist.Bernoulli(0.3))
        bayesrl.reward("r", 1.0 * move * state)
        return state + move, None

    scan(step, jnp.asarray(0), jnp.arange(num_steps))


def test_programs_with_time_are_solved_by_whole_paths() -> None:
    """The walk's optimum is that of one choice among its eight paths, and not that of choices step by step."""
    result = bayesrl.enumerate_posterior(partial(walk, 3), beta=0.5, regularizer="chi_squared")
    moves = np.array([[i >> 2 & 1, i >> 1 & 1, i & 1] for i in range(8)])
    before = np.cumsum(moves, 1) - moves
    prior, reward = (0.3**moves * 0.7 ** (1 - moves)).prod(1), (moves * before).sum(1)

    def paths() -> None:
        path = numpyro.sample("path", dist.Categorical(probs=jnp.asarray(prior)))
        bayesrl.reward("r", jnp.asarray(reward, float)[path])

    whole = bayesrl.enumerate_posterior(paths, beta=0.5, regularizer="chi_squared")
    np.testing.assert_allclose(result.optimum, whole.optimum, rtol=1e-5)
    draws = result.resample(jax.random.key(0), 8)
    assert draws["move"].shape == (8, 3)
    with pytest.raises(EngineError, match=r"max_count=4 \(regularizer='chi_squared' is no sum over time steps"):
        bayesrl.enumerate_posterior(partial(walk, 3), beta=0.5, regularizer="chi_squared", max_count=4)


NEVER = np.array([[0.0, 1.0], [-np.inf, 1.0], [0.3, 0.2]], "float32")


def test_what_must_never_happen_is_left_out_where_the_divergence_allows_it() -> None:
    two = jnp.zeros((3, 2))
    for name in ("chi_squared", "chi_squared_kl", "jensen_shannon"):
        result = bayesrl.enumerate_posterior(arms, two, jnp.asarray(NEVER), beta=1.0, regularizer=name)
        np.testing.assert_allclose(np.exp(result.log_weights[:, 1]), [0, 1])
        assert np.isfinite(result.optimum).all()
    for given in ({"regularizer": "forward_kl"}, {"regularizer": "alpha", "alpha": -1.0}):
        with pytest.raises(EngineError, match=r"infinite of context 'context'\[1\].*-inf"):
            bayesrl.enumerate_posterior(arms, two, jnp.asarray(NEVER), beta=1.0, **given)
    with pytest.raises(EngineError, match=r"every assignment of context 'context'\[0\]"):
        bayesrl.enumerate_posterior(arms, two, jnp.full((3, 2), -jnp.inf), beta=1.0, regularizer="chi_squared")


def test_a_context_without_a_root_is_named() -> None:
    """Prior mass 1e-30 of the best arm, at an order where the ratio it needs overflows."""
    logits = jnp.array([[0.0, 0.0], [0.0, -70.0]])
    payoff = jnp.array([[0.0, 1.0], [0.0, 1.0]])
    with pytest.raises(EngineError, match=r"no root λ in double precision of context 'context'\[1\].*mass 3.98e-31"):
        bayesrl.enumerate_posterior(arms, logits, payoff, beta=1e-3, regularizer="alpha", alpha=20.0)


def windy() -> None:
    arm = numpyro.sample("arm", dist.Bernoulli(0.5))
    wind = bayesrl.environment("wind", dist.Bernoulli(0.5), observable=True)
    bayesrl.reward("payoff", 1.0 * arm * wind)


def only_data() -> None:
    numpyro.sample("y", dist.Bernoulli(jnp.array([0.2, 0.5])[numpyro.sample("x", dist.Bernoulli(0.5))]), obs=1)


@pytest.mark.parametrize(
    ("policy", "given", "says"),
    [
        (bandit, {"regularizer": "total_variation"}, "use 'kl', 'chi_squared', .* or 'alpha'"),
        (bandit, {"regularizer": "alpha"}, "pass alpha=0.5"),
        (bandit, {"regularizer": "alpha", "alpha": 1.0}, "alpha=1 is KL.*use regularizer='kl'"),
        (bandit, {"regularizer": "alpha", "alpha": 0}, "alpha=0 is KL.*use regularizer='forward_kl'"),
        (bandit, {"regularizer": "alpha", "alpha": float("nan")}, "alpha=nan"),
        (bandit, {"alpha": 0.5}, "only regularizer='alpha' has an order"),
        (windy, {"regularizer": "chi_squared"}, "'wind'.*soft Bellman"),
        (only_data, {"regularizer": "chi_squared", "beta": None}, "no reward"),
    ],
)
def test_bad_input(policy: Any, given: dict[str, Any], says: str) -> None:
    args = (ARMS,) if policy is bandit else ()
    with pytest.raises(EngineError, match=says):
        bayesrl.enumerate_posterior(policy, *args, **{"beta": 1.0} | given)


def test_an_optimum_of_another_regularizer_is_no_target_of_a_fit() -> None:
    target = bayesrl.enumerate_posterior(bandit, ARMS, beta=1.0, regularizer="chi_squared")
    with pytest.raises(
        EngineError, match="regularizer='chi_squared', and coverage asks for that with regularizer='kl'"
    ):
        refuse_other_regularizer(target, "coverage asks for")
    refuse_other_regularizer(bayesrl.enumerate_posterior(bandit, ARMS, beta=1.0), "coverage asks for")


def test_a_prior_mass_below_double_precision_is_no_mass_at_all_only_where_it_could_take_none() -> None:
    """At mass e^−800 the best arm takes nearly all under Jensen–Shannon, and next to nothing under χ²."""
    logits, payoff = jnp.array([[0.0, -800.0]]), jnp.array([[0.0, 1.0]])
    for name in ("jensen_shannon", "forward_kl"):
        with pytest.raises(EngineError, match=r"no root λ in double precision.*of prior mass 0;"):
            bayesrl.enumerate_posterior(arms, logits, payoff, beta=0.3, regularizer=name)
    result = bayesrl.enumerate_posterior(arms, logits, payoff, beta=0.3, regularizer="chi_squared")
    np.testing.assert_allclose(np.exp(result.log_weights[:, 0]), [1, 0])

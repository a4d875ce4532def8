"""Moment constraints against enumeration and closed forms; the path by draws in standard errors."""

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

from bayesrl import lm
from bayesrl.core.primitives import environment, reward
from bayesrl.core.structure import inspect
from bayesrl.diagnostics.evidence.bounds import evidence
from bayesrl.errors import EngineError, PolicyError
from bayesrl.exact.enumeration import enumerate_posterior
from bayesrl.moments.constraints import ConstrainedPolicy, constrain
from bayesrl.monte_carlo.importance_sampling import importance
from bayesrl.monte_carlo.rejection_sampling import rejection
from bayesrl.statistics.estimates import Estimate
from bayesrl.svi.fitting import fit

KEY = jax.random.key(0)
RNG = np.random.default_rng(5)
LOGITS = jnp.asarray(RNG.normal(size=(5, 4)), jnp.float32)
PAYOFF = jnp.asarray(RNG.uniform(size=(5, 4)), jnp.float32)
LOW, HIGH = np.asarray(PAYOFF).min(1), np.asarray(PAYOFF).max(1)


def number() -> None:
    x = numpyro.sample("x", dist.DiscreteUniform(0, 63))
    numpyro.deterministic("even", 1.0 * (x % 2 == 0))


def by_three(sites: dict[str, Array]) -> Array:
    return sites["x"] % 3 == 0


def normal(mean: Any = 1.0) -> None:
    numpyro.sample("x", dist.Normal(mean, 2.0))


def arms(logits: Array, payoff: Array) -> None:
    with numpyro.plate("context", len(logits)):
        arm = numpyro.sample("arm", dist.Categorical(logits=logits))
        reward("payoff", jnp.take_along_axis(payoff, arm[..., None], -1)[..., 0])


TARGETS: dict[Any, Any] = {"even": 0.8, by_three: 0.5}
TRUTH = {"even": 1.386294, "by_three": 0.646627}


@pytest.fixture(scope="module")
def exact() -> ConstrainedPolicy:
    return constrain(KEY, number, TARGETS)


def assert_within(found: Estimate, truth: Any, errors: float = 4.5) -> None:
    assert (np.abs(found.mean - truth) < errors * np.asarray(found.se)).all(), (found, truth)


# ---- exact -----------------------------------------------------------------------------------


def test_numbers_from_0_to_63(exact: ConstrainedPolicy) -> None:
    for name, value in TRUTH.items():
        np.testing.assert_allclose(exact.multipliers[name].mean, value, atol=1e-6)
        assert exact.multipliers[name].se == 0
    np.testing.assert_allclose(exact.log_evidence.mean, 1.188224, atol=1e-6)
    np.testing.assert_allclose(exact.kl.mean, 0.244125, atol=1e-6)
    assert exact.ess is None


def test_every_engine_takes_the_policy(exact: ConstrainedPolicy) -> None:
    """Three quantities by weights and by rejection within 4.5 standard errors: 4e-5 false alarms."""
    found = enumerate_posterior(exact.policy, beta=1.0)
    np.testing.assert_allclose(found.estimates.metrics["even"].mean, 0.8, atol=1e-6)
    np.testing.assert_allclose(found.estimates.metrics["by_three"].mean, 0.5, atol=1e-6)
    np.testing.assert_allclose(found.estimates.kl.mean, 0.244125, atol=1e-5)
    for draws in (importance(KEY, exact.policy, beta=1.0), rejection(KEY, exact.policy, beta=1.0)):
        assert draws.log_evidence is not None
        assert_within(draws.log_evidence, 1.188224)
        assert_within(draws.estimates.metrics["even"], 0.8)
        assert_within(draws.estimates.metrics["by_three"], 0.5)
    fitted = fit(KEY, exact.policy, beta=1.0, num_steps=300, progress=False)
    told = evidence(jax.random.key(1), fitted)
    assert told.method == "enumeration"
    assert 0 <= float(told.gap.mean) < 0.01


def test_the_target_of_a_reward_is_a_temperature() -> None:
    """Per context: λ = 1/β, and p* at that β has the mean that was asked for."""
    target = LOW + 0.7 * (HIGH - LOW)
    found = constrain(KEY, arms, {"payoff": target}, LOGITS, PAYOFF)
    np.testing.assert_allclose(found.moments["payoff"].mean, target, atol=1e-9)
    tilted = enumerate_posterior(found.policy, LOGITS, PAYOFF, beta=1.0)
    assert tilted.log_evidence is not None
    np.testing.assert_allclose((np.exp(tilted.log_weights).T * PAYOFF).sum(1), target, atol=1e-5)
    np.testing.assert_allclose(tilted.log_evidence.mean, found.log_evidence.mean, atol=1e-5)
    for context in range(5):
        beta = float(1 / found.multipliers["payoff"].mean[context])
        if beta > 0:
            own = enumerate_posterior(arms, LOGITS[context : context + 1], PAYOFF[context : context + 1], beta=beta)
            np.testing.assert_allclose(own.estimates.reward.mean, target[context], atol=1e-5)
            np.testing.assert_allclose(own.estimates.kl.mean, found.kl.mean[context], atol=1e-5)


def test_a_mean_over_contexts_has_one_multiplier() -> None:
    found = constrain(KEY, arms, {"payoff": 0.6}, LOGITS, PAYOFF, per_context=False)
    multiplier = found.multipliers["payoff"].mean
    assert multiplier.shape == ()
    tilted = enumerate_posterior(arms, LOGITS, PAYOFF, beta=float(1 / multiplier))
    np.testing.assert_allclose(tilted.estimates.reward.mean, 0.6, atol=1e-5)
    np.testing.assert_allclose(tilted.estimates.kl.mean, found.kl.mean.mean(), atol=1e-5)
    again = enumerate_posterior(found.policy, LOGITS, PAYOFF, beta=1.0)
    np.testing.assert_allclose(again.estimates.kl.mean, found.kl.mean.mean(), atol=1e-5)
    # One multiplier serves other contexts too.
    others = enumerate_posterior(found.policy, LOGITS[:2], PAYOFF[:2], beta=1.0)
    np.testing.assert_allclose(others.log_weights, again.log_weights[:, :2], atol=1e-5)


def test_data_make_the_prior_a_posterior() -> None:
    """Given y, P(x = 1) is .3·.9/(.3·.9 + .7·.2); E[x] = .9 needs the difference of log-odds."""

    def program() -> None:
        x = numpyro.sample("x", dist.Bernoulli(0.3))
        numpyro.sample("y", dist.Bernoulli(jnp.where(x == 1, 0.9, 0.2)), obs=1)

    found = constrain(KEY, program, {"x": 0.9})
    p = 0.27 / 0.41
    np.testing.assert_allclose(found.multipliers["x"].mean, np.log(9) - np.log(p / (1 - p)), rtol=1e-5)
    np.testing.assert_allclose(found.kl.mean, 0.9 * np.log(0.9 / p) + 0.1 * np.log(0.1 / (1 - p)), rtol=1e-5)
    by_draws = constrain(KEY, program, {"x": 0.9}, max_count=1)
    assert_within(
        by_draws.multipliers["x"], found.multipliers["x"].mean
    )  # 3 within 4.5 standard errors: 2e-5 false alarms
    assert_within(by_draws.log_evidence, found.log_evidence.mean)
    assert_within(by_draws.kl, found.kl.mean)


def coins(length: int, bias: Any = 0.5) -> None:
    def step(last: Array, _: Any) -> tuple[Array, None]:
        coin = numpyro.sample("coin", dist.Bernoulli(jnp.where(last == 1, bias, 0.5)))
        reward("heads", 1.0 * coin)
        numpyro.deterministic("same", 1.0 * (coin == last))
        return coin, None

    scan(step, jnp.zeros((), int), jnp.arange(length))


def test_rewards_along_time_are_summed() -> None:
    """Five coins, of which 4 are to be heads: each is, with probability .8; likewise of 50, state by state."""
    for length, heads in ((5, 4.0), (50, 40.0)):
        found = constrain(KEY, coins, {"heads": heads}, length)
        assert found.ess is None
        np.testing.assert_allclose(found.multipliers["heads"].mean, np.log(4), rtol=1e-6)
        np.testing.assert_allclose(found.moments["heads"].mean, heads, rtol=1e-8)
        again = enumerate_posterior(found.policy, length, beta=1.0)
        np.testing.assert_allclose(again.estimates.metrics["heads"].mean, 0.8, rtol=1e-5)  # per step
        np.testing.assert_allclose(again.estimates.kl.mean, found.kl.mean, rtol=1e-5)


def test_states_and_paths_agree() -> None:
    """Two features of a Markov chain, one summed and one averaged over time, by whole paths and state by state."""
    targets = {"heads": 7.0, "same": 0.7}
    paths = constrain(KEY, coins, targets, 12, jnp.array(0.3))
    states = constrain(KEY, coins, targets, 12, jnp.array(0.3), max_count=4095)
    assert states.ess is None
    for name, target in targets.items():
        np.testing.assert_allclose(states.multipliers[name].mean, paths.multipliers[name].mean, rtol=1e-6)
        np.testing.assert_allclose(states.moments[name].mean, target, rtol=1e-8)
    np.testing.assert_allclose(states.kl.mean, paths.kl.mean, rtol=1e-6)
    for target, message in ((50.5, "between 0 and 50"), (50.0, "on the edge")):
        with pytest.raises(EngineError, match=message):
            constrain(KEY, coins, {"heads": target}, 50)


def test_contexts_along_time() -> None:
    """30 coins in each of 3 contexts, state by state: log-odds per context; one λ for a mean over contexts."""
    bias = jnp.array([0.2, 0.5, 0.6])

    def program(bias: Array) -> None:
        def step(carry: Array, _: Any) -> tuple[Array, None]:
            with numpyro.plate("context", len(bias)):
                reward("heads", 1.0 * numpyro.sample("coin", dist.Bernoulli(bias)))
            return carry, None

        scan(step, jnp.zeros(()), jnp.arange(30))

    odds = np.log(np.asarray(bias) / (1 - np.asarray(bias)))
    found = constrain(KEY, program, {"heads": np.array([15.0, 24.0, 18.0])}, bias)
    assert found.ess is None
    np.testing.assert_allclose(found.multipliers["heads"].mean, np.log([1, 4, 1.5]) - odds, atol=1e-6)
    again = enumerate_posterior(found.policy, bias, beta=1.0)
    assert again.log_evidence is not None
    np.testing.assert_allclose(again.log_evidence.mean, found.log_evidence.mean, atol=1e-4)
    with pytest.raises(PolicyError, match=r"found for contexts of shape \(3,\), and the program has \(2,\) now"):
        enumerate_posterior(found.policy, bias[:2], beta=1.0)
    shared = constrain(KEY, program, {"heads": 21.0}, bias, per_context=False)
    heads = 30 / (1 + np.exp(-odds - shared.multipliers["heads"].mean))
    np.testing.assert_allclose(heads.mean(), 21.0, atol=1e-6)
    np.testing.assert_allclose(shared.moments["heads"].mean, 21.0, atol=1e-8)


def test_a_feature_of_all_elements_makes_them_one_problem() -> None:
    """Three dice whose sum is to be 13: each has the mean 13/3, by symmetry, so λ is that of one die (the Brandeis)."""

    def dice() -> None:
        with numpyro.plate("die", 3):
            numpyro.sample("eyes", dist.Categorical(logits=jnp.zeros(6)))

    def one_die() -> None:
        numpyro.sample("eyes", dist.Categorical(logits=jnp.zeros(6)))

    found = constrain(KEY, dice, {lambda sites: sites["eyes"].sum(): 10.0})
    single = constrain(KEY, one_die, {"eyes": 10.0 / 3})
    (multiplier,) = found.multipliers.values()
    np.testing.assert_allclose(multiplier.mean, single.multipliers["eyes"].mean, rtol=1e-6)
    np.testing.assert_allclose(found.kl.mean, 3 * single.kl.mean, rtol=1e-6)
    with pytest.raises(EngineError, match=r"'feature_0' has one value for all elements of plate \['die'\]"):
        constrain(KEY, dice, {lambda sites: sites["eyes"].sum(): 10.0, "eyes": 3.0})


def test_far_targets_converge() -> None:
    """λ = log(p/(1 − p)) of a coin, from which Newton's method starts far away."""

    def coin() -> None:
        numpyro.sample("x", dist.Bernoulli(0.5))

    for p in (1e-5, 0.999):
        found = constrain(KEY, coin, {"x": p})
        np.testing.assert_allclose(found.multipliers["x"].mean, np.log(p / (1 - p)), rtol=1e-6)


# ---- by draws --------------------------------------------------------------------------------


def test_draws_agree_with_enumeration(exact: ConstrainedPolicy) -> None:
    """Four numbers, and the true moments of what was found, within 4.5 standard errors: 4e-5 false alarms."""
    found = constrain(jax.random.key(3), number, TARGETS, max_count=1)
    for name, value in TRUTH.items():
        assert_within(found.multipliers[name], value)
    assert_within(found.log_evidence, 1.188224)
    assert_within(found.kl, 0.244125)
    assert found.ess is not None
    assert 1000 < found.ess < 10_000
    truly = enumerate_posterior(found.policy, beta=1.0).estimates.metrics
    for name, target in (("even", 0.8), ("by_three", 0.5)):
        np.testing.assert_allclose(found.moments[name].mean, target, atol=1e-8)
        assert_within(Estimate(truly[name].mean, found.moments[name].se), target)


def test_a_normal_is_shifted() -> None:
    """N(1, 2²) with mean 2 is N(2, 2²): λ = 1/4, log Z = 3/8, KL = 1/8; 2e-5 false alarms."""
    found = constrain(jax.random.key(4), normal, {"x": 2.0})
    assert_within(found.multipliers["x"], 0.25)
    assert_within(found.log_evidence, 0.375)
    assert_within(found.kl, 0.125)


def test_a_normal_is_shifted_far_by_fits() -> None:
    """To a mean 7 standard deviations away: λ = 3.5, log Z = 28, KL = 24.5. Prior draws alone end 4 away; 2e-5."""
    found = constrain(jax.random.key(5), normal, {"x": 15.0}, num_samples=4000)
    assert_within(found.multipliers["x"], 3.5)
    assert_within(found.log_evidence, 28.0)
    assert_within(found.kl, 24.5)
    assert found.multipliers["x"].se < 0.03
    assert found.ess is not None
    assert found.ess > 1500


def test_data_far_from_the_prior_are_fitted_first() -> None:
    """x ~ N(0, 1) and y = 6 with error .1: x given y is N(5.94, .0995²). A mean of 6: λ = .06·101 = 6; 1e-5 false alarms."""

    def program() -> None:
        x = numpyro.sample("x", dist.Normal(0.0, 1.0))
        numpyro.sample("y", dist.Normal(x, 0.1), obs=6.0)

    mean, variance = 600 / 101, 1 / 101
    found = constrain(jax.random.key(8), program, {"x": 6.0}, num_samples=2000)
    assert_within(found.multipliers["x"], (6 - mean) / variance)
    assert_within(found.kl, (6 - mean) ** 2 / (2 * variance))


def test_standard_errors_are_those_of_repetition() -> None:
    """400 equal contexts are 400 repetitions; three spreads, known to 1/√798 each, within 5 of that: 2e-6."""

    def contexts() -> None:
        with numpyro.plate("context", 400):
            x = numpyro.sample("x", dist.Exponential(1.0))
            numpyro.deterministic("late", 1.0 * (x > 1.5))

    found = constrain(jax.random.key(6), contexts, {"late": 0.5}, num_samples=2000)
    p = np.exp(-1.5)
    truth = np.log((1 - p) / p)
    spread = found.multipliers["late"].mean - truth
    for value in (found.multipliers["late"], found.log_evidence, found.kl):
        assert value.mean.shape == (400,)
        assert abs(value.mean.std(ddof=1) / value.se.mean() - 1) < 5 / np.sqrt(2 * 399) + 0.02
    assert abs(spread.mean()) < 4.5 * spread.std() / 20 + 0.002  # 7e-6; the rest is the bias of order 1/N


def test_draws_share_a_multiplier_too() -> None:
    """Contexts N(0, 2²) and N(4, 2²) with a mean over both of 3: both shift by 1, λ = 1/4; 1e-5 false alarms."""

    def contexts() -> None:
        with numpyro.plate("context", 2):
            numpyro.sample("x", dist.Normal(jnp.array([0.0, 4.0]), 2.0))

    found = constrain(jax.random.key(7), contexts, {"x": 3.0}, per_context=False)
    assert_within(found.multipliers["x"], 0.25)
    assert_within(found.log_evidence, np.array([0.125, 1.125]))
    assert_within(found.kl, 0.125)


# ---- bad input -------------------------------------------------------------------------------


def trips() -> None:
    x = numpyro.sample("x", dist.Categorical(logits=jnp.zeros(4)))
    numpyro.deterministic("a", 1.0 * (x <= 1))
    numpyro.deterministic("both", 1.0 * (x == 0))
    numpyro.deterministic("one", x * 0.0 + 1)
    numpyro.deterministic("ratio", 1.0 / x)
    numpyro.sample("y", dist.Normal(0.0, 1.0), obs=0.3)
    with numpyro.plate("n", 2):
        numpyro.deterministic("pair", jnp.zeros(2) + x)


def with_nature() -> None:
    environment("rain", dist.Bernoulli(0.3), observable=True)
    numpyro.sample("x", dist.Bernoulli(0.5))


BAD: list[tuple[Callable[..., Any], Any, str]] = [
    (number, {}, r"constrain got targets=\{\}; use a dictionary of at least one feature"),
    (number, [("even", 0.8)], r"targets=\[\('even', 0.8\)\]; use a dictionary"),
    (number, {3: 0.8}, r"targets=\{3: 0.8\}; use a dictionary of at least one feature \(the name of a site"),
    (number, {"odd": 0.8}, r"no site 'odd' whose mean could be constrained; its sites are \['even', 'x'\]"),
    (number, {"even": np.nan}, "the target of feature 'even' is nan; use a finite number"),
    (number, {"even": "most"}, "the target of feature 'even' is 'most'; use a finite number"),
    (number, {"even": np.ones(3)}, r"the target of feature 'even' has shape \(3,\); use a number"),
    (number, {"even": 1.2}, "the target 1.2 of feature 'even' is out of reach: its mean is between 0 and 1"),
    (number, {"even": 1.0}, r"the target 1 of feature 'even' is on the edge of its range \[0, 1\], which only an inf"),
    (
        trips,
        {"both": 0.6, "a": 0.5},
        r"'a' is out of reach: its mean, given the target of 'both', is between 0.6 and 1",
    ),
    (trips, {"a": 0.5, "both": 0.5}, r"target 0.5 of feature 'both' is on the edge of its range, given the target of"),
    (trips, {"one": 1.0}, "feature 'one' is 1 in every assignment, so no tilt moves its mean"),
    (
        trips,
        {"a": 0.5, lambda s: 1 - s["a"]: 0.5},
        r"'a', 'feature_1' are linearly dependent: 1·'a' \+1·'feature_1' is",
    ),
    (trips, {"ratio": 0.5}, "feature 'ratio' is inf for 1 of 4 assignments, so it has no mean"),
    (trips, {"y": 0.5}, "feature 'y' is an observed site, whose value is given"),
    (trips, {lambda s: s["pair"]: 0.5}, r"'feature_0' returned an array of shape \(2,\), and one number per draw"),
    (trips, {lambda s: s["z"]: 0.5}, "feature 'feature_0' failed: KeyError: 'z'; it gets a dictionary of the values"),
    (with_nature, {"x": 0.6}, "environment site 'rain', and a tilt by features would tilt nature too"),
]


@pytest.mark.parametrize(("policy", "targets", "message"), BAD)
def test_bad_input(policy: Callable[..., Any], targets: Any, message: str) -> None:
    with pytest.raises(EngineError, match=message):
        constrain(KEY, policy, targets)


def test_bad_input_of_draws() -> None:
    def positive() -> None:
        x = numpyro.sample("x", dist.Exponential(1.0))
        numpyro.deterministic("rare", 1.0 * (x > 30))
        numpyro.deterministic("twice", 2 * x)
        numpyro.deterministic("log", jnp.log(x - 0.1))

    def mini_batch() -> None:
        with numpyro.plate("image", 10, subsample_size=5):
            numpyro.sample("x", dist.Bernoulli(0.5))

    with pytest.raises(
        EngineError, match=r"the target -1 of feature 'x' is out of reach: its mean is between -?0 and inf"
    ):
        constrain(KEY, positive, {"x": -1.0})
    with pytest.raises(EngineError, match=r"target 1 of feature 'rare' is on the edge of its range \[0, 1\]"):
        constrain(KEY, positive, {"rare": 1.0})
    with pytest.raises(EngineError, match="feature 'rare' is 0 in all of 1,000 draws of the prior"):
        constrain(KEY, positive, {"rare": 0.5}, num_samples=1000)
    with pytest.raises(EngineError, match="features 'x', 'twice' are linearly dependent"):
        constrain(KEY, positive, {"x": 1.5, "twice": 4.0})
    with pytest.raises(EngineError, match=r"feature 'log' is nan for \d+ of 1,000 draws, so it has no mean"):
        constrain(KEY, positive, {"log": 1.5}, num_samples=1000)
    with pytest.raises(EngineError, match=r"would take .* GB of memory"):
        constrain(KEY, positive, {"x": 1.5}, num_samples=2 * 10**9)
    with pytest.raises(EngineError, match="plate 'image' is subsampled"):
        constrain(KEY, mini_batch, {"x": 0.6})
    with pytest.raises(EngineError, match="num_samples=10; use a whole number of at least 1000"):
        constrain(KEY, positive, {"x": 1.5}, num_samples=10)
    with pytest.raises(EngineError, match=r"cannot run inside of jax.jit"):
        jax.jit(lambda t: constrain(KEY, positive, {"x": t}))(1.0)


def test_one_tilt_at_a_time_and_for_its_own_contexts(exact: ConstrainedPolicy) -> None:
    with pytest.raises(EngineError, match="constrained already"):
        constrain(KEY, exact.policy, {"even": 0.7})
    found = constrain(KEY, arms, {"payoff": 0.9 * HIGH + 0.1 * LOW}, LOGITS, PAYOFF)
    with pytest.raises(PolicyError, match=r"found for contexts of shape \(5,\), and the program has \(3,\) now"):
        enumerate_posterior(found.policy, LOGITS[:3], PAYOFF[:3], beta=1.0)


def test_texts_have_a_mean_and_the_guides_of_their_model() -> None:
    """64 texts of three tokens, of which 2 are to be ones on average; all parameters of the model can learn it."""
    config = lm.GPT2Config(vocab_size=4, max_length=4, width=8, depth=1, heads=2)
    ones = lm.rewards.token_reward(lambda tokens, _: jnp.sum(tokens == 1))
    model = lm.GPT2.init(KEY, config)
    writer = lm.policy(model, jnp.zeros((1, 1), int), reward=ones, max_new_tokens=3)
    found = constrain(KEY, writer, {"reward": 2.0})
    np.testing.assert_allclose(found.moments["reward"].mean, [2.0], atol=1e-9)
    guide = lm.FullParameters().build(KEY, found.policy, inspect(KEY, found.policy), ())
    own = numpyro.handlers.trace(numpyro.handlers.seed(guide, KEY)).get_trace()
    assert sum(site["type"] == "param" for site in own.values()) == len(jax.tree.leaves(model))
    assert own["text"]["value"].shape == (1, 3)

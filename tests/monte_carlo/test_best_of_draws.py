"""Best of n against brute force over all tuples of draws, closed forms, and its own draws."""

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from refused_programs import observed, windy
from scipy.optimize import minimize
from scipy.stats import chisquare

import bayesrl
from bayesrl.errors import EngineError, PolicyError
from bayesrl.monte_carlo.best_of_draws import BestOfDraws, best_of
from bayesrl.report import frontier_figure
from bayesrl.statistics.best_of_n_law import estimated_law, rank_rewards, subset_shares

KEY = jax.random.key(0)
N = [2, 4, 8, 16]
PROBS = jnp.array([[0.1, 0.2, 0.3, 0.4], [0.7, 0.1, 0.1, 0.1]])
PAYOFF = jnp.array([[0.0, 1.0, 1.0, 0.5], [0.0, -1.0, 2.0, 2.0]])


def bandit() -> None:
    arm = numpyro.sample("arm", dist.Categorical(logits=jnp.zeros(5)))
    bayesrl.reward("payoff", jnp.array([0.1, 0.3, 0.5, 0.7, 0.9])[arm])


def tied() -> None:
    """Two contexts, in each of which two arms tie."""
    with numpyro.plate("context", 2):
        arm = numpyro.sample("arm", dist.Categorical(probs=PROBS))
        bayesrl.reward("payoff", jnp.take_along_axis(PAYOFF, arm[..., None], -1)[..., 0])
        numpyro.deterministic("first", 1.0 * (arm == 0))


def gaussian() -> None:
    x = numpyro.sample("x", dist.Normal(0.0, 1.0))
    bayesrl.reward("x_itself", x)


@pytest.fixture(scope="module")
def exact() -> BestOfDraws:
    return best_of(KEY, bandit, n=N, num_samples=4000)


def test_what_the_same_reward_costs(exact: BestOfDraws, drawn: BestOfDraws) -> None:
    """p* at `reward_beta` earns the same E[R] at `least_kl`; from draws within 5 errors."""
    target = bayesrl.enumerate_posterior(bandit, beta=jnp.asarray(exact.reward_beta))
    np.testing.assert_allclose(target.estimates.reward.mean, exact.reward.mean, atol=1e-6)
    np.testing.assert_allclose(target.estimates.kl.mean, exact.least_kl.mean, atol=1e-5)
    assert (exact.least_kl.mean < exact.kl.mean).all()
    assert (exact.reward_beta > exact.beta).all()
    assert (np.abs(drawn.least_kl.mean - exact.least_kl.mean) <= 5 * np.asarray(drawn.least_kl.se) + 1e-3).all()
    alone = best_of(KEY, bandit, n=1, num_samples=1)
    assert (alone.least_kl.mean, alone.reward_beta) == (0.0, np.inf)


@pytest.fixture(scope="module")
def drawn() -> BestOfDraws:
    return best_of(KEY, bandit, n=N, num_samples=4000, max_count=0)


def test_the_bandit(exact: BestOfDraws) -> None:
    """E[R] = .9 − .2·Σ (k/5)ⁿ; KL and its bound as computed elsewhere."""
    reward = [0.9 - 0.2 * sum((k / 5) ** n for k in range(1, 5)) for n in N]
    np.testing.assert_allclose(exact.reward.mean, reward, atol=1e-7)
    np.testing.assert_allclose(exact.kl.mean, [0.18014, 0.60669, 1.09974, 1.47961], atol=5e-6)
    np.testing.assert_allclose(exact.kl_bound, [0.19315, 0.63629, 1.20444, 1.83509], atol=5e-6)
    assert exact.reward.se.max() == exact.kl.se.max() == 0
    q = np.exp(exact.log_probs)
    np.testing.assert_allclose(5 * (q**2).sum(1) - 1, [0.32, 1.1918, 2.5783, 3.7264], atol=5e-5)


def brute(probs: np.ndarray, reward: np.ndarray, n: int) -> np.ndarray:
    """Sum over all n-tuples of draws, ties shared equally."""
    law = np.zeros(len(probs))
    for tuple_ in itertools.product(range(len(probs)), repeat=n):
        top = [x for x in tuple_ if reward[x] == max(reward[list(tuple_)])]
        for x in top:
            law[x] += np.prod(probs[list(tuple_)]) / len(top)
    return law


def test_ties_and_contexts_by_brute_force() -> None:
    found = best_of(KEY, tied, n=[1, 3], num_samples=2)
    probs, payoff = np.asarray(PROBS, float), np.asarray(PAYOFF)
    for i, n in enumerate((1, 3)):
        laws = np.stack([brute(p, r, n) for p, r in zip(probs, payoff, strict=True)])
        assert found.log_probs is not None
        np.testing.assert_allclose(np.exp(found.log_probs[i]).T, laws, atol=1e-6)
        assert abs(found.reward.mean[i] - (laws * payoff).sum(1).mean()) < 1e-6
        assert abs(found.kl.mean[i] - (laws * np.log(laws / probs)).sum(1).mean()) < 1e-6
        assert abs(found.metrics["first"].mean[i] - laws[:, 0].mean()) < 1e-6
    assert found.sites["arm"].shape == (2, 2, 2)


def test_the_frontier_at_the_same_kl(exact: BestOfDraws) -> None:
    """`best_reward` is E[R] of p* at `beta`, where KL is that of the best of n, and no policy has more at that KL."""
    optimal = bayesrl.enumerate_posterior(bandit, beta=exact.beta)
    np.testing.assert_allclose(optimal.estimates.kl.mean, exact.kl.mean, atol=1e-6)
    np.testing.assert_allclose(optimal.estimates.reward.mean, exact.best_reward.mean, atol=1e-6)
    assert (exact.reward.mean < exact.best_reward.mean).all()
    rewards = np.array([0.1, 0.3, 0.5, 0.7, 0.9])
    softmax = lambda x: np.exp(x - x.max()) / np.exp(x - x.max()).sum()  # noqa: E731
    kl = {"type": "ineq", "fun": lambda x: exact.kl.mean[0] - (softmax(x) * np.log(5 * softmax(x))).sum()}
    best = minimize(lambda x: -softmax(x) @ rewards, rewards, constraints=[kl], tol=1e-10)
    assert abs(-best.fun - exact.best_reward.mean[0]) < 1e-4


def test_draws_follow_the_law(exact: BestOfDraws, drawn: BestOfDraws) -> None:
    """8 chi-square tests at 1e-5: of the table's draws and of really kept ones, 8e-5 false alarms."""
    assert exact.log_probs is not None
    for found, lane in itertools.product((exact, drawn), range(len(N))):
        counts = np.bincount(np.asarray(found.sites["arm"][lane]), minlength=5)
        expected = np.exp(exact.log_probs[lane])
        kept = expected * 4000 > 5
        counts, expected = (
            np.append(counts[kept], counts[~kept].sum()),
            np.append(expected[kept], expected[~kept].sum()),
        )
        some = expected > 0
        assert counts[~some].sum() == 0
        assert chisquare(counts[some], 4000 * expected[some] / expected[some].sum()).pvalue > 1e-5


def test_estimates_agree_with_sums(exact: BestOfDraws, drawn: BestOfDraws) -> None:
    """12 numbers within 4.5 standard errors: 8e-5 false alarms."""
    assert drawn.log_probs is None
    assert not drawn.support
    for name in ("reward", "kl", "best_reward"):
        truth, found = getattr(exact, name), getattr(drawn, name)
        assert (found.se > 0).all()
        assert (np.abs(found.mean - truth.mean) < 4.5 * found.se).all(), name
    np.testing.assert_allclose(drawn.beta, exact.beta, rtol=0.05)
    assert drawn.kl.mean[3] < drawn.kl_bound[3]


def test_continuous_rewards_reach_the_bound() -> None:
    """The best of 3 normals has mean 3/(2√π), within 4.5 standard errors (7e-6), and KL log 3 − 2/3."""
    found = best_of(jax.random.key(2), gaussian, n=3, num_samples=3000)
    assert found.sites["x"].shape == (3000,)
    assert abs(found.reward.mean - 1.5 / np.sqrt(np.pi)) < 4.5 * found.reward.se
    assert found.kl_bound - 1e-3 < found.kl.mean <= found.kl_bound
    # Exact draws of their own, whose standard deviation is .748: within 4.5 standard errors (7e-6).
    assert abs(np.mean(found.sites["x"]) - 1.5 / np.sqrt(np.pi)) < 4.5 * 0.748 / np.sqrt(3000)


def test_standard_errors_are_those_of_repetition() -> None:
    """300 pools: their spread, known to 1/√598, within 5 of that of the claimed errors (6e-7 false alarms each)."""
    rng = np.random.default_rng(0)
    pools = rng.choice([0.0, 1.0, 2.0], p=[0.5, 0.3, 0.2], size=(400, 300))
    for part in estimated_law(rank_rewards(pools), 3):
        assert abs(part.mean.std(ddof=1) / part.se.mean() - 1) < 5 / np.sqrt(598)


def test_shares_of_subsets_are_counted() -> None:
    counts = [sum(max(s) < m for s in itertools.combinations(range(6), 3)) / 20 for m in range(7)]
    np.testing.assert_allclose(subset_shares(6, 3), counts, atol=1e-12)


def test_a_thousand_million_draws_of_a_finite_program() -> None:
    found = best_of(KEY, bandit, n=10**9, num_samples=1)
    assert found.sites["arm"].tolist() == [4]
    assert abs(found.kl.mean - np.log(5)) < 1e-6


def test_one_draw_is_the_prior() -> None:
    for count in (10, 0):
        found = best_of(KEY, bandit, n=1, num_samples=500, max_count=count)
        assert found.kl.mean == found.kl_bound == 0
        assert np.isinf(found.beta)
        assert abs(found.best_reward.mean - found.reward.mean) < 1e-6
        assert np.isnan(best_of(KEY, bandit, n=1, num_samples=1, max_count=count).reward.se) == (count == 0)
        assert abs(found.reward.mean - 0.5) <= 4.5 * found.reward.se + 1e-6  # 7e-6 false alarms


def test_it_displays_and_draws_itself_beside_the_frontier(exact: BestOfDraws) -> None:
    assert "best E[R] at this KL" in str(exact)
    sweep = bayesrl.fit(KEY, bandit, beta=jnp.array([0.1, 1.0]), num_steps=2, progress=False)
    figure = frontier_figure(bayesrl.evidence(KEY, sweep), best_of=exact)
    texts = [text.get_text() for text in figure.axes[0].texts]
    assert {"n = 2", "n = 16"} <= set(texts)
    assert "best of n" in [text.get_text() for text in figure.axes[0].get_legend().get_texts()]


def never() -> None:
    arm = numpyro.sample("arm", dist.Categorical(logits=jnp.zeros(3)))
    bayesrl.reward("r", jnp.array([-jnp.inf, 0.0, 1.0])[arm])


@pytest.mark.parametrize("max_count", [10, 0])
def test_rewards_of_minus_infinity(max_count: int) -> None:
    """Of 2 draws both are bad in 1 of 9 cases; leaving the bad arm out costs log 3/2 nats, which n = 8 alone pays."""
    found = best_of(KEY, never, n=[2, 8], num_samples=4000, max_count=max_count)
    assert (found.reward.mean == -np.inf).all()
    bad = np.mean(np.asarray(found.sites["arm"]) == 0, 1)
    # Within 4.5 standard errors: 7e-6 false alarms each.
    assert (np.abs(bad - np.array([1 / 9, 3.0**-8])) < 4.5 * np.sqrt([8 / 81 / 4000, 3.0**-8 / 4000])).all()
    assert found.kl.mean[0] < np.log(1.5) < found.kl.mean[1]
    assert found.best_reward.mean[0] == -np.inf
    assert 0.5 < found.best_reward.mean[1] < 1


@pytest.mark.parametrize("max_count", [10, 0])
def test_contexts_that_read_each_other_are_refused(max_count: int) -> None:
    def neighbours() -> None:
        with numpyro.plate("row", 3):
            x = numpyro.sample("x", dist.Bernoulli(0.5))
            bayesrl.reward("r", 1.0 * x * jnp.roll(x, 1))

    with pytest.raises((EngineError, PolicyError), match="'row'"):
        best_of(KEY, neighbours, n=2, num_samples=10, max_count=max_count)


def batched() -> None:
    with numpyro.plate("n", 4, subsample_size=2):
        bayesrl.reward("r", 1.0 * numpyro.sample("x", dist.Bernoulli(0.5)))


def lonely() -> None:
    numpyro.sample("x", dist.Bernoulli(0.5))


@pytest.mark.parametrize(
    ("policy", "options", "error", "message"),
    [
        (bandit, {"n": 0}, EngineError, "n=0; use a whole number of at least 1, or a sequence"),
        (bandit, {"n": [2, -1]}, EngineError, "a whole number of at least 1, or a sequence"),
        (bandit, {"n": 2.5}, EngineError, r"n=2\.5; use a whole number"),
        (bandit, {"n": []}, EngineError, "a whole number of at least 1"),
        (bandit, {"n": True}, EngineError, "n=True; use a whole number"),
        (windy, {"n": 2}, EngineError, "'wind', which is nature's"),
        (observed, {"n": 2}, EngineError, "'y' is observed"),
        (batched, {"n": 2}, EngineError, "'n' is subsampled"),
        (lonely, {"n": 2}, PolicyError, "no reward site to rank its draws by; add bayesrl.reward"),
        (lambda: bayesrl.reward("r", jnp.log(-1.0 + 0.0 * numpyro.sample("x", dist.Normal()))), {"n": 2}, PolicyError,
         "'r' returned nan"),
    ],
)  # fmt: skip
def test_bad_input(policy: Any, options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        best_of(KEY, policy, num_samples=10, **options)

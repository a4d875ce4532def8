"""Programs with time, solved state by state: against path enumeration, transfer matrices and own induction."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from jax import Array
from numpyro.contrib.control_flow import scan
from scipy.special import logsumexp

from bayesrl.core.primitives import environment, reward
from bayesrl.errors import EngineError
from bayesrl.exact import tabulation
from bayesrl.exact.enumeration import enumerate_posterior
from bayesrl.exact.weighted_draws import WeightedDraws
from bayesrl.typing import Program

RNG = np.random.default_rng(5)


def both_ways(monkeypatch: pytest.MonkeyPatch, program: Program, beta: float) -> tuple[WeightedDraws, WeightedDraws]:
    """Solve path by path, and state by state."""
    monkeypatch.setattr(tabulation, "MAX_EXPLICIT_PATHS", 10_000)
    paths = enumerate_posterior(program, beta=beta)
    monkeypatch.setattr(tabulation, "MAX_EXPLICIT_PATHS", 0)
    states = enumerate_posterior(program, beta=beta)
    assert paths.sites
    assert not states.sites
    return paths, states


def assert_same(a: WeightedDraws, b: WeightedDraws) -> None:
    np.testing.assert_allclose(a.optimum, b.optimum, rtol=1e-6)
    for left, right in zip(jax.tree.leaves(a.estimates), jax.tree.leaves(b.estimates), strict=True):
        np.testing.assert_allclose(left, right, rtol=2e-5, atol=1e-7)


def river_swim() -> tuple[np.ndarray, np.ndarray]:
    """RiverSwim, 6 states (Strehl & Littman 2008, as in Osband et al. 2013)."""
    move, pay = np.zeros((6, 2, 6)), np.zeros((6, 2))
    for s in range(6):
        move[s, 0, max(s - 1, 0)] = 1
    move[0, 1, :2] = 0.4, 0.6
    for s in range(1, 5):
        move[s, 1, s - 1 : s + 2] = 0.05, 0.6, 0.35
    move[5, 1, 4:] = 0.4, 0.6
    pay[0, 0], pay[5, 1] = 0.005, 1
    return move, pay


def walk(move: np.ndarray, pay: np.ndarray, prior: np.ndarray, horizon: int) -> Program:
    move_, pay_, prior_ = jnp.asarray(move), jnp.asarray(pay), jnp.asarray(prior)

    def program() -> None:
        def step(state: Array, _: Array) -> tuple[Array, None]:
            action = numpyro.sample("action", dist.Categorical(probs=prior_[state]))
            reward("r", pay_[state, action])
            return environment("state", dist.Categorical(probs=move_[state, action]), observable=True), None

        scan(step, 0, jnp.arange(horizon))

    return program


def soft_value(move: np.ndarray, pay: np.ndarray, prior: np.ndarray, horizon: int, beta: float) -> float:
    value = np.zeros(len(move))
    for _ in range(horizon):
        value = beta * logsumexp((pay + move @ value) / beta, b=prior, axis=1)
    return float(value[0])


def test_river_swim() -> None:
    move, pay = river_swim()
    program = walk(move, pay, np.full((6, 2), 0.5), 20)
    result = enumerate_posterior(program, beta=jnp.array([1.0, 0.1, 0.01]))
    np.testing.assert_allclose(result.optimum, [0.061668, 2.105631, 3.264429], atol=1.5e-6)
    assert result.log_evidence is None
    est = result.estimates
    np.testing.assert_allclose(est.reward.mean - jnp.array([1.0, 0.1, 0.01]) * est.kl.mean, result.optimum, rtol=1e-5)
    draws = result.resample(jax.random.key(0), 2000)
    assert draws["state"].shape == (3, 2000, 20)
    before = np.concatenate([np.zeros((3, 2000, 1), int), np.asarray(draws["state"])[..., :-1]], -1)
    total = pay[before, np.asarray(draws["action"])].sum(-1)
    # Three means within 4.5 standard errors: 2e-5 false alarms.
    assert (np.abs(total.mean(-1) - est.reward.mean) < 4.5 * total.std(-1) / np.sqrt(2000)).all()


def test_chain_of_ten_states() -> None:
    move, pay = RNG.dirichlet(np.ones(10), size=(10, 3)), RNG.normal(size=(10, 3))
    prior = RNG.dirichlet(np.ones(3), size=10)
    result = enumerate_posterior(walk(move, pay, prior, 20), beta=0.3)
    np.testing.assert_allclose(result.optimum, soft_value(move, pay, prior, 20, 0.3), rtol=1e-6)


def text(logits: Array, score: Array, horizon: int) -> Program:
    def program() -> None:
        def step(last: Array, _: None) -> tuple[Array, Array]:
            token = numpyro.sample("token", dist.Categorical(logits=logits[last]))
            reward("r", score[token])
            numpyro.deterministic("zero", token == 0)
            return token, token

        scan(step, 0, None, length=horizon)

    return program


def test_bigram_text_by_transfer_matrices() -> None:
    logits, score, beta = RNG.normal(size=(30, 30)), RNG.normal(size=30), 0.7
    program = text(jnp.asarray(logits, jnp.float32), jnp.asarray(score, jnp.float32), 16)
    result = enumerate_posterior(program, beta=beta)
    transfer = np.exp(logits - logsumexp(logits, axis=1, keepdims=True) + score / beta)
    ahead = [np.ones(30)]
    for _ in range(16):
        ahead.append(transfer @ ahead[-1])
    np.testing.assert_allclose(result.log_evidence.mean, np.log(ahead[-1][0]), rtol=1e-6)
    state, expected, zeros = np.eye(30)[0], 0.0, 0.0
    for t in range(16):
        state = state @ (transfer * ahead[15 - t] / ahead[16 - t][:, None])
        expected, zeros = expected + state @ score, zeros + state[0] / 16
    np.testing.assert_allclose(result.estimates.reward.mean, expected, rtol=1e-5)
    np.testing.assert_allclose(result.estimates.kl.mean, expected / beta - np.log(ahead[-1][0]), rtol=1e-5)
    np.testing.assert_allclose(result.estimates.metrics["zero"].mean, zeros, rtol=1e-5)


def before_and_behind() -> None:
    """A site before the scan, two inside, a visible and a hidden draw of nature behind it."""
    start = numpyro.sample("start", dist.Categorical(probs=jnp.array([0.2, 0.5, 0.3])))
    reward("fee", -0.3 * start)

    def step(state: Array, t: Array) -> tuple[Array, None]:
        a = numpyro.sample("a", dist.Bernoulli(0.3 + 0.1 * state))
        weather = environment("weather", dist.Bernoulli(0.2 + 0.5 * a), observable=True)
        b = numpyro.sample("b", dist.Bernoulli(0.5))
        reward("r", jnp.where(b == weather, 0.5, -0.1 * t) + 0.2 * start)
        return (state + a + b) % 3, None

    final, _ = scan(step, start, jnp.arange(3))
    last = numpyro.sample("last", dist.Categorical(logits=jnp.eye(3)[final]))
    unseen = environment("unseen", dist.Bernoulli(0.4), observable=False)
    reward("end", jnp.where(unseen == 1, 2.0, -1.0) * (last == final))
    numpyro.deterministic("end_state", final)


def in_contexts() -> None:
    """Three contexts inside the scan, each with its own dynamics and carry."""
    shift = jnp.array([0, 1, 2])

    def step(state: Array, t: Array) -> tuple[Array, None]:
        with numpyro.plate("context", 3):
            a = numpyro.sample("a", dist.Bernoulli(0.2 + 0.2 * state))
            reward("r", 1.0 * (a == (t + shift) % 2) * (1 + state))
        return (state + a + shift) % 3, None

    scan(step, jnp.zeros(3, int), jnp.arange(6))


def observed_inside() -> None:
    def step(state: Array, y: Array) -> tuple[Array, None]:
        x = numpyro.sample("x", dist.Bernoulli(0.3 + 0.4 * state))
        numpyro.sample("y", dist.Bernoulli(0.2 + 0.6 * x), obs=y)
        reward("r", 0.5 * x)
        return x, None

    scan(step, 0, jnp.array([1, 0, 0, 1, 1]))


@pytest.mark.parametrize("program", [before_and_behind, in_contexts, observed_inside])
def test_states_agree_with_paths(monkeypatch: pytest.MonkeyPatch, program: Callable[[], None]) -> None:
    paths, states = both_ways(monkeypatch, program, 0.4)
    assert_same(paths, states)
    if paths.log_marginal is not None:
        np.testing.assert_allclose(paths.log_marginal.mean, states.log_marginal.mean, rtol=1e-6)


def test_ancestral_draws_are_those_of_the_paths(monkeypatch: pytest.MonkeyPatch) -> None:
    paths, states = both_ways(monkeypatch, in_contexts, 0.4)
    draws = np.asarray(states.resample(jax.random.key(2), 3000)["a"])
    assert draws.shape == (3000, 6, 3)
    expected = np.einsum("nc,ntc->tc", np.exp(paths.log_weights), paths.sites["a"])
    # 18 frequencies within 5 standard errors: 1e-5 false alarms.
    assert (np.abs(draws.mean(0) - expected) < 5 * np.sqrt(expected * (1 - expected) / 3000)).all()


def outputs_read_behind(horizon: int) -> Program:
    def program() -> None:
        def step(count: Array, _: None) -> tuple[Array, Array]:
            a = numpyro.sample("a", dist.Bernoulli(0.5))
            return (count + a) % 2, a

        _, actions = scan(step, 0, None, length=horizon)
        reward("alternates", (actions[1:] != actions[:-1]).sum().astype(float))

    return program


def test_stacked_outputs_need_paths() -> None:
    result = enumerate_posterior(outputs_read_behind(13), beta=1.0)  # more than SMALL, fewer than max_count
    np.testing.assert_allclose(result.log_evidence.mean, 12 * np.log((1 + np.e) / 2), rtol=1e-6)
    with pytest.raises(EngineError, match=r"33,554,432 assignments.*reads its stacked outputs"):
        enumerate_posterior(outputs_read_behind(25), beta=1.0)


def hidden_inside(horizon: int) -> Program:
    def program() -> None:
        def step(coin: Array, _: None) -> tuple[Array, None]:
            a = numpyro.sample("a", dist.Bernoulli(0.5))
            reward("right", 1.0 * (a == coin))
            return environment("coin", dist.Bernoulli(0.5), observable=False), None

        scan(step, 0, None, length=horizon)

    return program


def test_hidden_nature_inside_a_scan() -> None:
    """Only the first coin is known; every later one is worth .5."""
    result = enumerate_posterior(hidden_inside(4), beta=0.2)
    np.testing.assert_allclose(result.optimum, 0.2 * np.log((1 + np.exp(5)) / 2) + 1.5, rtol=1e-6)
    with pytest.raises(EngineError, match=r"'coin' is hidden.*every path counts"):
        enumerate_posterior(hidden_inside(12), beta=0.2)


def test_too_many_states_are_refused_with_their_count() -> None:
    def program() -> None:
        def step(history: Array, t: Array) -> tuple[Array, None]:
            a = numpyro.sample("a", dist.Bernoulli(0.5))
            reward("r", 1.0 * a)
            return 2 * history + a, None

        scan(step, 0, jnp.arange(24))

    with pytest.raises(EngineError, match=r"at least 8,19\d reachable states × assignments \(by step 12 of 24\)"):
        enumerate_posterior(program, beta=1.0, max_count=5000)

"""Frontiers: converged sweeps obey what optima obey, others are told where they do not, and gold turns."""

import math
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from oracles import Still

import bayesrl
from bayesrl.diagnostics.evidence.bounds import evidence
from bayesrl.diagnostics.reward_kl_frontier import frontier, frontier_checks, turning_point
from bayesrl.errors import PolicyError
from bayesrl.posterior.from_params import with_draws
from bayesrl.posterior.posterior import Posterior
from bayesrl.statistics.estimates import Interval

KEY = jax.random.key(11)
BETAS = np.array([1.0, 0.1, 0.3, 3.0], np.float32).astype(float)
PAYOFF = np.linspace(0.0, 2.0, 6)
NAMES = (
    "dJ*/dβ = −KL",
    "J* non-increasing",
    "J* convex",
    "E[R] non-increasing",
    "KL non-increasing",
    "E[R] concave in KL",
)


def bandit() -> None:
    """Gold is the proxy less a penalty that only the last arm pays."""
    arm = numpyro.sample("arm", dist.Categorical(logits=jnp.zeros(6)))
    bayesrl.reward("payoff", jnp.asarray(PAYOFF)[arm])
    numpyro.deterministic("gold", jnp.asarray(PAYOFF)[arm] - 2.0 * (arm == 5))
    numpyro.deterministic("proxy", jnp.asarray(PAYOFF)[arm])


def guide() -> None:
    numpyro.sample("arm", dist.Categorical(logits=numpyro.param("logits", jnp.zeros(6))))


@pytest.fixture(scope="module")
def fitted() -> Posterior:
    """A sweep in no order, whose parameters are then set by hand."""
    return bayesrl.fit(
        KEY, bandit, beta=jnp.asarray(BETAS), guide=guide, objective=Still(), num_steps=2, progress=False
    )


def at(posterior: Posterior, logits: np.ndarray) -> Posterior:
    """The same fit with other logits, [beta, arm], and draws that belong to them."""
    return with_draws(KEY, replace(posterior, params={"logits": jnp.asarray(logits, jnp.float32)[:, None]}))


def optimum(beta: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """J*, E[R] and KL of p* in closed form, [beta]."""
    log_z = np.log(np.exp(PAYOFF / beta[:, None]).mean(1))
    target = np.exp(PAYOFF / beta[:, None] - log_z[:, None]) / 6
    reward = target @ PAYOFF
    return beta * log_z, reward, reward / beta - log_z


@pytest.mark.parametrize("method", ["auto", "rejection"])
def test_a_converged_sweep_passes(fitted: Posterior, method: str) -> None:
    best = at(fitted, PAYOFF / BETAS[:, None])
    found = frontier(KEY, best, gold="gold", method=method, num_samples=2**13)  # type: ignore[arg-type]
    assert tuple(check.name for check in found.checks) == NAMES
    assert {check.outcome for check in found.checks} == {"pass"}
    ascending = np.sort(BETAS)
    assert found.beta.tolist() == ascending.tolist() == found.evidence.betas
    objective, reward, kl = optimum(ascending)
    for told, truth in zip(
        (found.evidence.objective, found.evidence.reward, found.evidence.kl), (objective, reward, kl), strict=True
    ):
        assert (np.abs(told.mean - truth) < 5 * told.se + 1e-5).all()
    gold = [(np.exp(PAYOFF / b) / np.exp(PAYOFF / b).sum()) @ (PAYOFF - 2.0 * (np.arange(6) == 5)) for b in ascending]
    assert found.gold is not None
    assert (np.abs(found.gold.mean - gold) < 5 * found.gold.se).all()  # 4 numbers: false alarms 2e-6
    assert ascending[int(np.argmax(gold))] == 1.0
    assert found.turning_point == ascending[int(np.argmax(found.gold.mean))]
    assert found.turning_point in (1.0, 3.0), "these two differ by .0005, and their standard errors are .007"
    assert f"Gold is greatest at β = {found.turning_point:g}" in str(found)
    assert max(map(len, str(found).splitlines())) <= 80


def test_evidence_can_be_given(fitted: Posterior) -> None:
    best = at(fitted, PAYOFF / BETAS[:, None])
    made = evidence(KEY, best)
    found = frontier(KEY, best, gold="proxy", evidence=made)
    assert found.evidence.optimum.mean.tolist() == sorted(made.optimum.mean.tolist(), reverse=True)
    assert found.evidence.missed_mass.shape == (4,)
    assert found.turning_point is None, "the proxy itself does not turn"
    with pytest.raises(PolicyError, match="evidence of this fit"):
        frontier(KEY, best, evidence=replace(made, beta=BETAS * 2))


def test_an_unfinished_sweep_fails(fitted: Posterior) -> None:
    """Cold policies stop half-way, as after few steps, or at nothing."""
    for share in (0.0, 0.3):
        far = PAYOFF / BETAS[:, None] * np.where(BETAS < 0.2, share * BETAS / 0.3, 1.0)[:, None]
        found = frontier(KEY, at(fitted, far))
        broken = [check for check in found.checks if check.outcome == "fail"]
        assert "dJ*/dβ = −KL" in {check.name for check in broken}
        assert all("β = 0.1" in check.explanation for check in broken if check.name == "dJ*/dβ = −KL")
        assert "more than its own" in str(found).replace("\n    ", " ")


def test_a_sweep_of_few_steps_fails_and_one_of_many_passes() -> None:
    fit = partial(bayesrl.fit, KEY, bandit, beta=jnp.array([0.02, 0.1, 0.5, 2.0]), progress=False)
    assert "fail" in {check.outcome for check in frontier(KEY, fit(num_steps=3)).checks}
    assert {check.outcome for check in frontier(KEY, fit(num_steps=600)).checks} == {"pass"}


def exactly(mean: np.ndarray, se: float = 0.0) -> Interval:
    return Interval.exact(mean)._replace(se=np.full_like(mean, se))


@pytest.mark.parametrize("noise", [1e-4, 1e-2, 0.1])
@pytest.mark.parametrize("common", [0.0, 0.9])
def test_true_frontiers_seldom_fail(noise: float, common: float) -> None:
    """Noise on the true frontier, E[R] and KL correlated or not: at most 2% of 1,000 do not pass (level 1%)."""
    rng = np.random.default_rng(5)
    beta = np.geomspace(0.1, 3.0, 10)
    _, reward, kl = optimum(beta)
    alarms = 0
    for _ in range(1000):
        first, second = rng.normal(size=(2, 10))
        noisy_reward, noisy_kl = (
            reward + noise * first,
            kl + noise * (common * first + math.sqrt(1 - common**2) * second),
        )
        spread = noise * np.sqrt(1 + beta**2 - 2 * beta * common)
        objective = exactly(noisy_reward - beta * noisy_kl)._replace(se=spread)
        checks = frontier_checks(beta, objective, exactly(noisy_reward, noise), exactly(noisy_kl, noise))
        alarms += any(check.outcome in ("warn", "fail") for check in checks)
    assert alarms <= 20


def test_every_law_is_asked_about() -> None:
    """Numbers made by hand, each of which breaks one law most plainly."""
    beta = np.array([0.1, 0.3, 1.0, 3.0])
    objective, reward, kl = optimum(beta)

    def outcome(name: str, j: np.ndarray, r: np.ndarray, k: np.ndarray) -> str:
        checks = {c.name: c for c in frontier_checks(beta, exactly(j), exactly(r), exactly(k))}
        assert (checks[name].value > checks[name].threshold) == (checks[name].outcome in ("warn", "fail"))
        return checks[name].outcome

    bump = np.array([0.0, 0.0, 1.0, 0.0])
    assert outcome("dJ*/dβ = −KL", objective - 0.3 * bump, reward, kl) == "fail"
    assert outcome("J* non-increasing", objective + bump, reward, kl) == "fail"
    assert outcome("J* convex", objective + 0.3 * bump, reward, kl) == "fail"
    assert outcome("E[R] non-increasing", objective, reward + bump, kl) == "fail"
    assert outcome("KL non-increasing", objective, reward, kl + bump) == "fail"
    assert outcome("E[R] concave in KL", objective, reward - 0.3 * bump, kl) == "fail"
    # Breaches that no one would act on pass, and small ones warn.
    flat = np.ones(4)
    for size, expected in ((5e-4, "pass"), (5e-3, "warn"), (5e-2, "fail")):
        bent = np.array([2.0, 1.0, 1.0 + size, 1.0])
        assert outcome("E[R] non-increasing", flat, bent, flat) == expected


def test_two_temperatures_and_none_told_apart() -> None:
    beta = np.array([0.5, 1.0])
    checks = {c.name: c.outcome for c in frontier_checks(beta, *map(exactly, optimum(beta)))}
    assert checks["J* convex"] == checks["E[R] concave in KL"] == "unknown"
    assert checks["dJ*/dβ = −KL"] == checks["KL non-increasing"] == "pass"
    nothing = exactly(np.full(2, np.nan))
    assert {c.outcome for c in frontier_checks(beta, nothing, nothing, nothing)} == {"unknown"}


def test_turning_points_are_significant() -> None:
    beta = np.array([0.1, 0.3, 1.0, 3.0])
    gold, reward = np.array([0.2, 0.9, 1.0, 0.4]), np.array([2.0, 1.8, 1.2, 0.5])
    assert turning_point(beta, exactly(gold, 0.01), exactly(reward, 0.01)) == 1.0
    assert turning_point(beta, exactly(gold, 0.5), exactly(reward, 0.01)) is None
    assert turning_point(beta, exactly(gold, 0.01), exactly(np.ones(4), 0.01)) is None
    assert turning_point(beta, exactly(np.sort(gold)[::-1], 0.01), exactly(reward, 0.01)) is None
    rng = np.random.default_rng(6)
    level = [exactly(rng.normal(size=4), 1.0) for _ in range(1000)]
    falling = exactly(reward)
    assert sum(turning_point(beta, one, falling) is not None for one in level) <= 20  # a level gold: 1% at most


def test_refusals(fitted: Posterior) -> None:
    with pytest.raises(PolicyError, match=r"β = 0.1 alone.*at least two.*geomspace"):
        frontier(KEY, fitted.select(beta=0.1))
    with pytest.raises(PolicyError, match=r"gold='taste'.*it has 'gold', 'proxy'"):
        frontier(KEY, fitted, gold="taste")
    with pytest.raises(PolicyError, match=r"bayesrl\.load"):
        frontier(KEY, replace(fitted, programs=None))
    with pytest.raises(PolicyError, match="β = 1 was fitted twice"):
        frontier(KEY, replace(fitted, beta=np.array([1.0, 0.1, 1.0, 3.0])))

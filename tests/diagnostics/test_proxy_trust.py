"""How far to follow a reward that is not known: gains by enumeration, against sums written out here."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from scipy.special import softmax

import bayesrl
from bayesrl import rewards
from bayesrl.core.programs import Programs
from bayesrl.core.structure import inspect
from bayesrl.diagnostics.checks import Check
from bayesrl.diagnostics.drawn_rewards import beliefs_of
from bayesrl.diagnostics.proxy_gains import LikelyTurn, Overoptimisation, likely_turn_of, trust_check
from bayesrl.errors import EngineError

RNG = np.random.default_rng(0)
PRIOR = np.array([0.5, 0.2, 0.2, 0.1])
DRAWS = RNG.multivariate_normal([0.0, 0.3, 0.5, 0.7], np.diag([0.05, 0.05, 0.3, 1.5]), size=200)
GOLD = np.array([0.0, 0.4, 0.6, -0.5])
BETA = jnp.array([0.1, 1.0, 0.3])


def bandit(attitude: Any = "neutral", site: str | None = None, **options: Any) -> Any:
    reward = rewards.uncertain(DRAWS, attitude=attitude, **options)

    def program() -> None:
        item = numpyro.sample("item", dist.Categorical(probs=jnp.asarray(PRIOR)))
        bayesrl.reward("score", jnp.asarray(DRAWS.max(0))[item] if site else reward(item))
        if site:
            numpyro.deterministic(site, reward(item))
        numpyro.deterministic("gold", jnp.asarray(GOLD)[item])

    return program


def by_sums(policy: np.ndarray) -> dict[str, Any]:
    gain = DRAWS @ (policy - PRIOR)
    lower, upper = np.quantile(gain, [0.05, 0.95])
    away = DRAWS - (DRAWS @ PRIOR)[:, None]
    return {
        "predicted": gain.mean(),
        "lower": lower,
        "upper": upper,
        "p_worse": (gain < -1e-9).mean(),
        "bought": gain.var() / (policy @ away.var(0)),
        "gold": GOLD @ (policy - PRIOR),
        "kl": policy @ np.log(policy / PRIOR),
    }


def compare(found: Overoptimisation, policies: list[np.ndarray], atol: float = 1e-4) -> None:
    for i, policy in enumerate(policies):
        for name, value in by_sums(policy).items():
            part = getattr(found, name)
            own = part.mean if isinstance(part, bayesrl.Estimate) else part
            np.testing.assert_allclose(own[i], value, atol=atol, err_msg=name)


def test_a_sweep_over_beta_by_sums() -> None:
    found = bayesrl.overoptimisation(jax.random.key(0), bandit(), beta=BETA, gold="gold")
    assert found.exact
    assert found.strength.round(3).tolist() == [1.0, 0.3, 0.1]
    policies = [softmax(np.log(PRIOR) + DRAWS.mean(0) / b) for b in (1.0, 0.3, 0.1)]
    compare(found, policies)
    gains = np.stack([DRAWS @ (policy - PRIOR) for policy in policies])
    np.testing.assert_allclose(found.p_best, np.bincount(gains.argmax(0), minlength=3) / 200)
    np.testing.assert_allclose(found.proxy.mean, found.predicted.mean, atol=1e-5)
    assert found.turning_point == found.strength[found.lower.argmax()]
    assert found.gold_turning_point == found.strength[found.gold.mean.argmax()]  # type: ignore[union-attr]
    assert "bought" in repr(found)
    assert "The lower end of the predicted gain is greatest at β = " in found.explanation


def test_the_best_of_n_by_sums_and_from_draws() -> None:
    """A proxy that trusts the best draw of each item, and beside it the belief."""
    program, options = bandit(site="belief"), {"belief": "belief", "gold": "gold"}
    found = bayesrl.overoptimisation(jax.random.key(0), program, n=[8, 1, 2], **options)
    order = np.argsort(DRAWS.max(0))
    above = np.cumsum(PRIOR[order])
    laws = []
    for n in (1, 2, 8):
        law = np.empty(4)
        law[order] = above**n - np.concatenate([[0.0], above[:-1]]) ** n
        laws.append(law)
    compare(found, laws)
    drawn = bayesrl.overoptimisation(jax.random.key(1), program, n=[1, 2, 8], num_samples=4000, max_count=0, **options)
    assert not drawn.exact
    far = abs(drawn.predicted.mean - found.predicted.mean)[1:] / drawn.predicted.se[1:]
    assert far.max() < 4
    np.testing.assert_allclose(drawn.bought, found.bought, atol=0.03)


def test_a_fit_by_sums_and_from_draws(tmp_path: Path) -> None:
    fitted = bayesrl.fit(jax.random.key(0), bandit(), beta=BETA, num_steps=200, progress=False)
    found = bayesrl.overoptimisation(jax.random.key(0), fitted, gold="gold")
    log_q = fitted.log_prob({"item": jnp.arange(4)})[:, 0]
    compare(found, [np.exp(np.asarray(log_q[i], float)) for i in (1, 2, 0)], atol=1e-3)
    drawn = bayesrl.overoptimisation(jax.random.key(0), fitted, gold="gold", max_count=0, num_samples=2000)
    for name in ("predicted", "kl", "gold", "proxy"):
        own, exact = getattr(drawn, name), getattr(found, name)
        assert (abs(own.mean - exact.mean) < 4 * own.se + 1e-3).all(), name
    np.testing.assert_allclose(drawn.bought, found.bought, atol=0.05)
    diagnosis = bayesrl.diagnose(jax.random.key(1), fitted)
    assert diagnosis["trust"].outcome == "warn"
    assert diagnosis.trust is not None
    assert diagnosis.verdict == "pass"
    assert "trust" in diagnosis.explanation
    path = bayesrl.write_report(
        jax.random.key(2), tmp_path / "report.html", fitted, diagnoses={"fit": diagnosis},
        overoptimisation={"fit": found}, gold="gold",
    )  # fmt: skip
    text = path.read_text(encoding="utf-8")
    assert "How far to follow the reward" in text
    assert found.explanation.partition(" is greatest")[0] in text


def test_the_likely_turn() -> None:
    """Of ten draws three do not turn; of the others four are greatest at 1, two at 2, one at 0."""
    greatest = np.array([1, 1, 1, 1, 2, 2, 0, 4, 4, 4])
    turn = likely_turn_of(np.eye(5)[:, greatest])
    assert turn == pytest.approx((1, 1.0, 0.7))
    assert likely_turn_of(np.eye(3)[:, [2, 2]]).p_turns == 0


@pytest.mark.parametrize(
    ("lower", "mean", "outcome"),
    [([0.1, 0.3, 0.2], 0.5, "warn"), ([0.1, 0.2, 0.3], 0.5, "pass"), ([0.1, 0.2, -0.3], -0.1, "fail")],
)
def test_the_check_of_trust(lower: list[float], mean: float, outcome: str) -> None:
    kl, low = np.arange(3.0), np.array(lower)
    known = bayesrl.Estimate(np.full(3, mean), np.zeros(3))
    turning = None if low.argmax() == 2 else 1.0
    found = Overoptimisation(
        "beta", np.array([4.0, 2.0, 1.0]), bayesrl.Estimate(kl, 0 * kl), known, known, low, low + 1, (low < 0) * 0.6,
        np.full(3, 1 / 3), kl / 2, None, 0.9, turning, LikelyTurn(0, 1.0, 0.0), None, True, 100,
    )  # fmt: skip
    check: Check = trust_check(found)
    assert (check.outcome, check.value) == (outcome, found.p_worse[-1])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: bayesrl.overoptimisation(jax.random.key(0), bandit()), "give a program either beta=, temperatures, or n="),
        (lambda: bayesrl.overoptimisation(jax.random.key(0), bandit(), beta=1.0, gold="silver"), "gold='silver' is not"),
        (lambda: bayesrl.overoptimisation(jax.random.key(0), bandit(site="belief"), beta=1.0), "pass belief="),
        (lambda: bayesrl.overoptimisation(jax.random.key(0), bandit(), beta=1.0, max_count=2), "max_count=2 assignments"),
        (lambda: bayesrl.overoptimisation(jax.random.key(0), known, beta=1.0), "are all known"),
    ],
)  # fmt: skip
def test_bad_input_is_refused(call: Any, message: str) -> None:
    with pytest.raises(EngineError, match=message):
        call()


def test_programs_on_mini_batches_are_asked_too() -> None:
    unsure = rewards.uncertain(DRAWS)

    def batched() -> None:
        with numpyro.plate("row", 6, subsample_size=2):
            bayesrl.reward("r", unsure(numpyro.sample("item", dist.Categorical(logits=jnp.zeros(DRAWS.shape[1])))))

    programs = Programs(batched, None, inspect(jax.random.key(0), batched), ())
    assert list(beliefs_of(programs)) == [id(unsure.belief.origin)]


def test_what_cannot_be_told_is_unknown() -> None:
    """The belief stands beside another proxy, and nobody said where."""
    fitted = bayesrl.fit(jax.random.key(0), bandit(site="belief"), beta=1.0, num_steps=2, progress=False)
    check = bayesrl.diagnose(jax.random.key(1), fitted)["trust"]
    assert (check.outcome, "pass belief=" in check.explanation) == ("unknown", True)


def known() -> None:
    bayesrl.reward("r", 1.0 * numpyro.sample("x", dist.Bernoulli(0.5)))

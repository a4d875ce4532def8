"""Verdicts: good fits pass, bad ones fail, each for its own reason; and each check on numbers made by hand."""

import math
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from oracles import ORACLES, standing

import bayesrl
from bayesrl.diagnostics.checks import (
    GOOD_SHARE,
    Check,
    coverage_check,
    entropy_check,
    gap_check,
    restarts_check,
    skipped_check,
    weights_check,
)
from bayesrl.diagnostics.diagnosis import diagnose
from bayesrl.diagnostics.evidence.bounds import evidence
from bayesrl.diagnostics.evidence.tempered_sample import worth_of
from bayesrl.errors import PolicyError
from bayesrl.posterior.posterior import Posterior
from bayesrl.statistics.estimates import Interval

KEY = jax.random.key(3)


def two_modes() -> None:
    """Two arms of ten are good, and equally so."""
    arm = numpyro.sample("arm", dist.Categorical(logits=jnp.zeros(10)))
    bayesrl.reward("payoff", jnp.zeros(10).at[jnp.array([2, 7])].set(1.0)[arm])


def guide() -> None:
    numpyro.sample("arm", dist.Categorical(logits=numpyro.param("logits", jnp.zeros(10))))


@pytest.fixture(scope="module")
def fitted() -> Posterior:
    return bayesrl.fit(KEY, two_modes, beta=0.1, guide=guide, num_steps=60, progress=False)


def at(posterior: Posterior, logits: jax.Array) -> Posterior:
    """The same fit with other parameters, and draws that belong to them."""
    from bayesrl.posterior.from_params import with_draws

    return with_draws(KEY, Posterior(**{**vars(posterior), "params": {"logits": logits[None]}}))


@pytest.mark.parametrize("method", ["auto", "rejection"])
def test_verdicts(fitted: Posterior, method: str) -> None:
    options = {"method": method, "num_samples": 2**14}
    best = jnp.zeros(10).at[jnp.array([2, 7])].set(9.95)  # p* itself has 10
    good = diagnose(KEY, at(fitted, best), **options)  # type: ignore[arg-type]
    assert good.verdict == "pass"
    assert good["gap"].value < 0.01
    assert good["mode coverage"].outcome == "pass"
    early = diagnose(KEY, at(fitted, jnp.zeros(10)), **options)  # type: ignore[arg-type]
    assert early.verdict == "fail"
    # The untrained prior: J* = .1·log((8 + 2e¹⁰)/10), J(π₀) = .2, so that all of the gain is left.
    assert early["gap"].value == pytest.approx(1.0, abs=0.02)
    dropped = diagnose(KEY, at(fitted, jnp.full(10, -9.0).at[2].set(6.0)), **options)  # type: ignore[arg-type]
    assert dropped.verdict == "fail"
    assert dropped["mode coverage"].outcome == "fail"
    assert dropped["mode coverage"].value == pytest.approx(0.5, abs=0.05)
    assert dropped["weights"].outcome == "pass", "k̂ is blind to what is never drawn"


def test_unknown_where_nothing_reaches_the_target() -> None:
    """A needle among 10⁹: no bound is proven of a reward without one, and a half-trained guide leaves room for it."""

    def haystack() -> None:
        bits = numpyro.sample("bits", dist.Bernoulli(0.5 * jnp.ones(30)).to_event(1))
        bayesrl.reward("needle", jnp.exp(bits.sum() / 3.0))

    posterior = bayesrl.fit(KEY, haystack, beta=1.0, num_steps=20, progress=False)
    found = diagnose(KEY, posterior, num_samples=2**12)
    assert found.verdict in ("unknown", "fail")
    assert found["gap"].outcome in ("unknown", "fail")
    if found.verdict == "unknown":
        assert "would settle it" in found.explanation or "reward_bound" in found.explanation


def test_held_out_and_bad_input(fitted: Posterior) -> None:
    def program(payoffs: jax.Array) -> None:
        with numpyro.plate("row", len(payoffs)):
            arm = numpyro.sample("arm", dist.Categorical(logits=jnp.zeros(3)))
            bayesrl.reward("payoff", payoffs[jnp.arange(len(payoffs)), arm])

    seen, other = jnp.eye(3)[jnp.array([0, 1, 2, 0])], jnp.eye(3)[jnp.array([1, 2, 0, 1])]
    posterior = bayesrl.fit(KEY, program, seen, beta=0.2, num_steps=300, progress=False)
    found = diagnose(KEY, posterior, held_out=(other,))
    assert found.verdict == "pass"
    assert found["held out"].outcome == "warn", "the guide learned each row by heart"
    with pytest.raises(PolicyError, match="load"):
        diagnose(KEY, Posterior(**{**vars(fitted), "programs": None}))


def test_weights_of_a_heavy_tail_and_of_none() -> None:
    rng = np.random.default_rng(0)
    light = weights_check(*worth_of(rng.normal(scale=0.1, size=(1000, 1))), 1000)
    assert light.outcome == "pass"
    assert light.value < light.threshold
    heavy = weights_check(*worth_of(rng.exponential(scale=1.5, size=(1000, 1))), 1000)
    assert heavy.outcome == "warn"
    assert heavy.value > 0.7, "weights are Pareto of index 1/1.5"
    tied = weights_check(*worth_of(np.zeros((1000, 1))), 1000)
    assert tied.outcome == "pass"
    assert math.isnan(tied.value)


def test_restarts_agree_or_not() -> None:
    rng = np.random.default_rng(1)
    same = rng.normal(size=(1, 4, 500))
    apart = same + np.array([0.0, 0.0, 0.0, 3.0])[:, None]
    level = np.zeros((1, 4))
    assert restarts_check({"total_reward": same, "log_ratio": same}, level, 1.0).outcome == "pass"
    found = restarts_check({"total_reward": apart, "log_ratio": same}, np.array([[0, 0, 0, 0.4]]), 1.0)
    assert found.outcome == "warn"
    assert "40% of the gain apart" in found.explanation
    assert restarts_check({"total_reward": apart, "log_ratio": same}, level, 1.0).outcome == "pass"
    alone = restarts_check({"total_reward": same[:, :1], "log_ratio": same[:, :1]}, level[:, :1], 1.0)
    assert alone.outcome == "unknown"


def test_entropy_and_skipped_steps() -> None:
    assert entropy_check(1.0, 2.0, reached=False).outcome == "pass"
    assert entropy_check(0.001, 2.0, reached=False).outcome == "warn"
    assert entropy_check(0.001, 2.0, reached=True).outcome == "pass"
    assert [skipped_check(n, 100).outcome for n in (0, 2, 8)] == ["pass", "warn", "fail"]
    assert 0.01 < GOOD_SHARE < 0.05


def test_the_gap_is_told_as_exactly_as_it_is_known(fitted: Posterior) -> None:
    found = evidence(KEY, fitted)

    def told(share: Interval, *, gain: float = 1.0) -> Check:
        """Of a fit whose J(π₀) is 0 and whose J* is `gain`."""
        known = replace(found, beta=np.ones(()), optimum=Interval.exact(gain), prior_objective=Interval.exact(0.0))
        return gap_check(replace(known, gap=share))

    assert told(Interval.exact(0.014)).explanation == "1.4% of what there was to gain is left at β = 1."
    drawn = Interval(*(np.asarray(x) for x in (0.012, 0.001, 0.010, 0.014, 0.0, 0.1)))
    assert told(drawn).explanation == "at most 1.4% of what there was to gain is left at β = 1."
    assert told(Interval.exact(0.0004)).explanation.startswith("less than 0.1%")
    worse = told(Interval.exact(1.5))
    assert worse.outcome == "fail"
    assert worse.explanation.startswith("the fit is worse than the policy that it began with, by 50.0%")
    kept = told(Interval.exact(0.0), gain=0.0)
    assert (kept.outcome, kept.explanation) == ("pass", "there was nothing to gain at β = 1, and nothing was lost.")
    left = told(Interval.exact(0.3), gain=0.0)
    assert left.outcome == "fail"
    assert "but the fit left it" in left.explanation
    ruined = told(Interval.exact(np.inf))
    assert ruined.outcome == "fail"
    assert "draws what earns −∞" in ruined.explanation
    assert "nan" not in "".join(one.explanation for one in (kept, left, ruined))


@pytest.mark.parametrize("method", ["auto", "rejection", "importance"])
def test_a_fit_that_draws_what_must_never_happen_fails(fitted: Posterior, method: str) -> None:
    def forbidding() -> None:
        arm = numpyro.sample("arm", dist.Categorical(logits=jnp.zeros(10)))
        bayesrl.reward("payoff", jnp.zeros(10).at[3].set(-jnp.inf)[arm])

    assert fitted.programs is not None
    programs = replace(fitted.programs, policy=forbidding)
    found = diagnose(KEY, at(replace(fitted, programs=programs), jnp.zeros(10)), method=method)  # type: ignore[arg-type]
    assert found.verdict == "fail"
    assert found.evidence is not None
    assert found.evidence.gap is not None
    assert (float(found.evidence.objective.mean), float(found.evidence.gap.mean)) == (-math.inf, math.inf)
    assert "nan" not in str(found)


def test_a_known_optimum_is_not_taken_for_nature() -> None:
    """Nothing is drawn from p* then, so nobody knows of its modes; nature has no part in it."""
    oracle = ORACLES["gaussian"]()
    posterior = standing(jax.random.key(0), oracle)
    found = evidence(jax.random.key(1), posterior, optimum=lambda beta: oracle.optimum, num_samples=1024)
    check = coverage_check(found)
    assert check.outcome == "unknown"
    assert "the optimum is known" in check.explanation

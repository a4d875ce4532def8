"""Brackets against truths written out by hand: every oracle, enumerated and from draws."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from jax import Array
from oracles import ORACLES, Still, standing

import bayesrl
from bayesrl.diagnostics.evidence.bounds import evidence
from bayesrl.diagnostics.evidence.result import Evidence
from bayesrl.errors import EngineError, PolicyError
from bayesrl.posterior.from_params import with_draws
from bayesrl.posterior.posterior import Posterior
from bayesrl.statistics.estimates import Interval

KEY = jax.random.key(5)


def near(interval: Interval | None, truth: Any, exact: bool) -> None:
    """Within 4.5 standard errors (one false alarm in 10⁵) and the conservative interval, or equal."""
    assert interval is not None
    if exact:
        assert float(interval.mean) == pytest.approx(float(truth), abs=2e-5)
        return
    assert abs(float(interval.mean) - float(truth)) < 4.5 * float(interval.se) + 1e-4
    assert float(interval.conservative_lower) <= float(truth) <= float(interval.conservative_upper)


@pytest.mark.parametrize("name", sorted(ORACLES))
def test_oracles(name: str) -> None:
    """What the fit does is estimated right, and the optimum lies inside the bracket."""
    oracle = ORACLES[name]()
    found = evidence(KEY, standing(KEY, oracle), num_samples=2**15)
    exact = found.num_samples == 0
    # The oracle's π₀ of data is p(x, y); the bracket's is p(x|y).
    log_y = 0.0 if found.log_marginal is None else float(found.log_marginal.mean)
    truth = oracle.value(oracle.params)
    near(found.objective, truth - oracle.beta * log_y, exact)
    optimum = oracle.optimum - oracle.beta * log_y
    assert float(found.optimum.conservative_lower) - 1e-4 <= optimum <= float(found.optimum.conservative_upper) + 1e-4
    if found.kl_reverse is not None and oracle.log_evidence is not None:
        assert found.log_evidence is not None
        evidence_of_x = oracle.log_evidence - log_y
        assert found.log_evidence is not None
        assert float(found.log_evidence.conservative_lower) - 1e-4 <= evidence_of_x
        if found.upper is not None:
            assert evidence_of_x <= float(found.log_evidence.conservative_upper) + 1e-4
        if np.isfinite(found.kl_reverse.upper):
            truth = evidence_of_x - float(found.objective.mean) / oracle.beta
            assert (
                float(found.kl_reverse.conservative_lower) - 0.02
                <= truth
                <= float(found.kl_reverse.conservative_upper) + 0.02
            )


@pytest.mark.parametrize("name", ["flat", "dependent", "contexts", "nested", "chain", "episode"])
def test_draws_agree_with_enumeration(name: str) -> None:
    """Every number of the bracket, once exactly and once from draws that may not enumerate."""
    oracle = ORACLES[name]()
    posterior = standing(KEY, oracle)
    exact = evidence(KEY, posterior, method="enumeration")
    drawn = evidence(KEY, posterior, method="rejection", num_samples=2**15)
    assert exact.num_samples == 0
    assert drawn.upper is not None
    assert drawn.method in ("rejection", "importance")
    for field in ("objective", "reward", "kl", "prior_objective"):
        near(getattr(drawn, field), getattr(exact, field).mean, exact=False)
    assert exact.log_evidence is not None
    assert drawn.log_evidence is not None
    truth = float(exact.log_evidence.mean)
    assert float(drawn.log_evidence.conservative_lower) <= truth <= float(drawn.log_evidence.conservative_upper)
    assert float(drawn.lower.mean) - 4 * float(drawn.lower.se) <= truth
    assert truth <= float(drawn.upper.mean) + 4 * float(drawn.upper.se)
    if drawn.caveat == "":
        for field in ("log_evidence", "gap", "kl_reverse", "kl_forward"):
            near(getattr(drawn, field), getattr(exact, field).mean, exact=False)
        assert float(drawn.missed_mass) == pytest.approx(float(exact.missed_mass), abs=0.05)
    assert drawn.by_context is not None
    assert exact.by_context is not None
    assert drawn.by_context.mean.shape == exact.by_context.mean.shape
    np.testing.assert_allclose(drawn.by_context.mean, exact.by_context.mean, atol=0.1)


def unbounded() -> None:
    """Rewards grow without bound: log Z = 1/2 at β = 1, and no rejection."""
    x = numpyro.sample("x", dist.Normal(0.0, 1.0))
    bayesrl.reward("height", x)


@pytest.fixture(scope="module")
def climber() -> Posterior:
    return bayesrl.fit(KEY, unbounded, beta=1.0, num_steps=300, progress=False)


def test_without_a_bound_only_the_lower_side_is_honest(climber: Posterior) -> None:
    found = evidence(KEY, climber, method="importance", num_samples=2**14)
    assert found.upper is None
    assert "bound" in found.caveat
    assert found.log_evidence is not None
    assert float(found.log_evidence.conservative_lower) <= 0.5
    assert found.gap is not None
    assert math.isnan(float(found.gap.mean))
    assert float(found.gap.conservative_upper) == math.inf
    with pytest.raises(EngineError, match="reward_bound="):
        evidence(KEY, climber, method="rejection")


def test_chains_give_the_upper_side(climber: Posterior) -> None:
    found = evidence(KEY, climber, num_samples=2**14)
    assert found.method == "nuts"
    assert "asymptotic" in found.caveat
    assert found.upper is not None
    # EUBO = log Z + KL(p*‖q), and q is all but p*: 5 standard errors.
    assert abs(float(found.upper.mean) - 0.5) < 5 * float(found.upper.se) + 5e-3
    assert found.log_evidence is not None
    assert float(found.log_evidence.conservative_lower) <= 0.5 <= float(found.log_evidence.conservative_upper) + 1e-3
    for told in (found.log_evidence, found.gap):
        assert told is not None
        assert told.conservative_lower <= told.lower <= told.mean <= told.upper <= told.conservative_upper
        # What single precision cannot tell: some units in the last place of summands of a nat.
        assert float(told.upper - told.mean) > 1e-7


def test_data_give_both_evidences() -> None:
    """x ~ N(0, 1), y = 1 with variance 1, reward x: log p(y) and log Z in closed form."""

    def program() -> None:
        x = numpyro.sample("x", dist.Normal(0.0, 1.0))
        numpyro.sample("y", dist.Normal(x, 1.0), obs=1.0)
        bayesrl.reward("height", x)

    posterior = bayesrl.fit(KEY, program, beta=2.0, num_steps=300, progress=False)
    found = evidence(KEY, posterior, num_samples=2**15)
    assert found.log_marginal is not None
    assert found.log_evidence is not None
    log_y = -0.25 - 0.5 * math.log(4 * math.pi)
    # p(x|y) = N(1/2, 1/2), so that log E[exp(x/2)] = 1/4 + 1/16.
    assert abs(float(found.log_marginal.mean) - log_y) < 5 * float(found.log_marginal.se) + 1e-4
    assert abs(float(found.log_evidence.mean) - 0.3125) < 5 * float(found.log_evidence.se) + 1e-4


def test_temperatures_are_an_axis() -> None:
    oracle = ORACLES["flat"]()
    betas = jnp.array([0.5, 1.0, 2.0])
    sweep = bayesrl.fit(KEY, oracle.policy, beta=betas, num_steps=200, num_restarts=2, progress=False)
    found = evidence(KEY, sweep)
    assert isinstance(found, Evidence)
    exact = bayesrl.enumerate_posterior(oracle.policy, beta=betas)
    np.testing.assert_allclose(found.optimum.mean, exact.optimum, rtol=1e-5)
    assert found.gap is not None
    assert found.gap.mean.shape == (3,)
    assert (found.gap.mean >= 0).all()


def test_a_mixture_of_restarts_reaches_both_modes() -> None:
    """Two restarts hold one mode each: alone KL = log 2, mixed 0."""

    def program() -> None:
        arm = numpyro.sample("arm", dist.Categorical(logits=jnp.zeros(4)))
        bayesrl.reward("payoff", jnp.array([0.0, 5.0, 0.0, 5.0])[arm])

    posterior = bayesrl.fit(KEY, program, beta=1.0, objective=Still(), num_steps=2, num_restarts=2, progress=False)
    one_each = jnp.array([[-4.3, 5.0, -4.3, -20.0], [-4.3, -20.0, -4.3, 5.0]])
    apart = with_draws(KEY, Posterior(**{**vars(posterior), "params": {"arm$table": one_each}}))
    alone = evidence(KEY, apart, method="rejection", num_samples=2**14)
    mixed = evidence(KEY, apart.select(restart="mixture"), method="rejection", num_samples=2**14)
    assert alone.kl_reverse is not None
    assert mixed.kl_reverse is not None
    assert float(alone.kl_reverse.mean) == pytest.approx(math.log(2), abs=0.05)
    assert float(mixed.kl_reverse.mean) < 0.02
    with pytest.raises(EngineError, match="mixture of restarts cannot be bracketed"):
        evidence(KEY, apart.select(restart="mixture"), method="enumeration")


def test_hindsight_lies_above_the_optimum_of_control() -> None:
    """Nature's coin is seen after the choice pays: with a rough value the bound is tight, and never below."""
    odds = jnp.array([[0.8, 0.2], [0.4, 0.6], [0.1, 0.9]])

    def program() -> None:
        first = numpyro.sample("first", dist.Categorical(logits=jnp.zeros(3)))
        coin = bayesrl.environment("coin", dist.Categorical(probs=odds[first]), observable=True)
        second = numpyro.sample("second", dist.Categorical(logits=jnp.zeros(2)))
        bayesrl.reward("pay", 2.0 * coin + 1.0 * (second == coin) - 0.3 * first)

    posterior = bayesrl.fit(KEY, program, beta=0.5, num_steps=400, progress=False)
    exact = evidence(KEY, posterior)
    above = evidence(KEY, posterior, method="hindsight", num_samples=2**14)
    assert above.upper is not None
    assert above.log_evidence is None
    truth = float(exact.optimum.mean)
    start = float(exact.prior_objective.mean) if exact.prior_objective is not None else 0.0
    assert float(above.optimum.conservative_lower) <= truth <= float(above.optimum.conservative_upper)
    assert float(above.upper.mean) * 0.5 - truth < 0.1 * (truth - start), "the martingale tightens the bound"
    with pytest.raises(EngineError, match="would tilt environment site 'coin'"):
        evidence(KEY, posterior, method="importance")


@pytest.mark.usefixtures("unchecked")
def test_bad_input_is_refused() -> None:
    def program(payoffs: Array) -> None:
        arm = numpyro.sample("arm", dist.Categorical(logits=jnp.zeros(3)))
        bayesrl.reward("payoff", payoffs[arm])

    posterior = bayesrl.fit(KEY, program, jnp.arange(3.0), beta=1.0, objective=Still(), num_steps=2, progress=False)
    with pytest.raises(EngineError, match="method='guess'; use 'auto', 'enumeration'"):
        evidence(KEY, posterior, method="guess")  # type: ignore[arg-type]
    with pytest.raises(EngineError, match=r"earned 2, more than reward_bound=1"):
        evidence(KEY, posterior, method="rejection", reward_bound=1.0)
    with pytest.raises(EngineError, match="num_samples=10"):
        evidence(KEY, posterior, num_samples=10)
    with pytest.raises(EngineError, match="reward_bound=nan; use a finite number"):
        evidence(KEY, posterior, method="rejection", reward_bound=float("nan"))
    with pytest.raises(EngineError, match=r"optimum gave 'high' for beta=1\.0; give J\*"):
        evidence(KEY, posterior, optimum=lambda beta: "high")  # type: ignore[arg-type,return-value]
    never = jnp.full(3, -jnp.inf)
    for method in ("auto", "rejection"):
        with pytest.raises(EngineError, match="-inf"):
            evidence(KEY, posterior, never, method=method)  # type: ignore[arg-type]
    loaded = Posterior(**{**vars(posterior), "programs": None})
    with pytest.raises(PolicyError, match="load"):
        evidence(KEY, loaded)

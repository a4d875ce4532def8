"""Comparisons on common draws: numbers and errors against exact ones, equal fits, mixtures, mini-batches, refusals."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from jax import Array
from oracles import ORACLES, Oracle, Still, standing

import bayesrl
from bayesrl.diagnostics.comparison import compare
from bayesrl.errors import EngineError, PolicyError
from bayesrl.exact.evaluation import evaluate_exactly
from bayesrl.posterior.from_params import with_draws
from bayesrl.posterior.posterior import Posterior

KEY = jax.random.key(8)


def pair_of_fits(oracle: Oracle, size: float) -> dict[str, Posterior]:
    """Two fits that stand near each other, the second moved by noise of that size."""
    made = standing(KEY, oracle)
    rng = np.random.default_rng(4)
    here = made.params
    there = {name: np.asarray(x + size * rng.normal(size=x.shape), np.float32) for name, x in here.items()}
    return {"here": replace(made, params=here), "there": replace(made, params=there)}


@pytest.mark.parametrize("name", ["contexts", "chain_with_nature"])
def test_every_number_against_enumeration(name: str) -> None:
    """10 numbers of 2 problems within 4.5 standard errors: 1e-4 false alarms in all.

    Both intervals may miss each at 5% at most; only the conservative ones are asked to hold.
    """
    oracle = ORACLES[name]()
    fits = pair_of_fits(oracle, 0.1)
    found = compare(jax.random.key(1), fits)
    exact = [evaluate_exactly(*fit.unbatched(), oracle.beta) for fit in fits.values()]
    for field in ("objective", "reward", "kl"):
        truth = np.array([float(getattr(one, field).mean()) for one in exact])
        both = getattr(found, field), getattr(found, f"delta_{field}")
        for told, right in zip(both, (truth, truth - truth[0]), strict=True):
            assert told.mean.shape == (2,)
            assert (np.abs(told.mean - right) <= 4.5 * told.se).all()
            assert ((told.conservative_lower <= told.lower) & (told.lower <= told.mean)).all()
            assert ((told.mean <= told.upper) & (told.upper <= told.conservative_upper)).all()
            assert ((told.conservative_lower <= right) & (right <= told.conservative_upper)).all()
        # What near fits share has no noise in their difference.
        assert both[1].se[1] < 0.4 * np.hypot(*both[0].se)
    balance = found.delta_reward.mean - oracle.beta * found.delta_kl.mean
    np.testing.assert_allclose(balance, found.delta_objective.mean, atol=1e-5)


def test_a_fit_against_itself_differs_by_nothing() -> None:
    one, other = pair_of_fits(ORACLES["flat"](), 0.3).values()
    found = compare(KEY, {"a": one, "b": other, "c": one}, num_samples=600)
    for told in (found.delta_objective, found.delta_reward, found.delta_kl):
        for i in (0, 2):
            assert all(float(part[i]) == 0 for part in told)
        assert float(told.se[1]) > 0
    assert found.names == ("a", "b", "c")
    assert "c" in str(found)


def test_mini_batches_give_way_to_all_data() -> None:
    """Four numbers within 4.5 standard errors of the truth over all contexts: 3e-5 false alarms."""
    oracle = ORACLES["subsampled"]()
    fits = pair_of_fits(oracle, 0.1)
    truth = [oracle.value({k: v[0] for k, v in fit.params.items()}) for fit in fits.values()]
    found = compare(KEY, fits, num_samples=4096)
    assert (np.abs(found.objective.mean - truth) < 4.5 * found.objective.se).all()
    assert abs(found.delta_objective.mean[1] - (truth[1] - truth[0])) < 4.5 * found.delta_objective.se[1]


def test_the_best_restart_is_compared() -> None:
    fits = pair_of_fits(ORACLES["flat"](), 1.0)
    joined: Any = jax.tree.map(lambda *xs: np.concatenate(xs), *(fit.params for fit in fits.values()))
    made = with_draws(KEY, fits["here"])
    stacked = {n: np.concatenate([np.full_like(v, -9.0), v]) for n, v in made.statistics.items()}
    history = {n: v if n == "step" else np.concatenate([v, v], -1) for n, v in made.history.items()}
    draws = {n: np.concatenate([v, v]) for n, v in made.draws.items()}
    both = replace(made, params=joined, statistics=stacked, history=history, draws=draws)
    found = compare(KEY, {"there": fits["there"], "both": both}, num_samples=400)
    assert float(found.delta_objective.se[1]) == 0  # the second restart has the greater J on the draws kept


def moved(oracle: Oracle, seed: int, size: float) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    return {name: np.asarray(v + size * rng.normal(size=np.shape(v)), np.float32) for name, v in oracle.params.items()}


@pytest.mark.parametrize("name", ["gaussian", "observed"])
def test_oracles(name: str) -> None:
    """ΔJ of two other fits, one near and one far: 10 within 4.5 standard errors, 7e-5 false alarms; and both intervals."""
    oracle = ORACLES[name]()
    points = [oracle.params, moved(oracle, 1, 0.05), moved(oracle, 2, 0.5)]
    truth = np.array([oracle.value(p) for p in points])
    if name == "observed":  # J is told of p(x|y), the oracle's up to β·log p(y)
        given = bayesrl.enumerate_posterior(oracle.policy, *oracle.args, beta=oracle.beta).log_marginal.mean
        truth = truth - oracle.beta * float(np.asarray(given).mean())
    fits = {f"fit {i}": standing(KEY, oracle, p) for i, p in enumerate(points)}
    found = compare(jax.random.key(1), fits, num_samples=2**14)
    delta = found.delta_objective
    assert delta.mean[0] == delta.se[0] == 0
    assert (np.abs(delta.mean - (truth - truth[0]))[1:] < 4.5 * delta.se[1:] + 1e-6).all()
    assert (np.abs(found.objective.mean - truth) < 4.5 * found.objective.se + 1e-6).all()
    assert (
        (delta.conservative_lower <= truth - truth[0] + 1e-6) & (truth - truth[0] - 1e-6 <= delta.conservative_upper)
    ).all()
    combined = found.delta_reward.mean - oracle.beta * found.delta_kl.mean
    np.testing.assert_allclose(combined, delta.mean, atol=1e-5)
    # Near fits: pairing takes away most of what two separate estimates would be off by.
    apart = [fit.estimate(jax.random.key(2), 2**13).objective.se for fit in list(fits.values())[:2]]
    assert delta.se[1] < 0.5 * np.hypot(*(float(se[0]) for se in apart))


def test_standard_errors_are_those_of_repetition() -> None:
    """40 comparisons: z has a root mean square in .62 to 1.42 (χ² with 40 degrees, 5e-4 on each side)."""
    oracle = ORACLES["contexts"]()
    points = [oracle.params, moved(oracle, 1, 0.1)]
    truth = [oracle.value(p) for p in points]
    fits = {str(i): standing(KEY, oracle, p) for i, p in enumerate(points)}
    z = []
    for seed in range(40):
        delta = compare(jax.random.key(100 + seed), fits, num_samples=1024).delta_objective
        z.append((delta.mean[1] - (truth[1] - truth[0])) / delta.se[1])
    assert 0.62 < np.sqrt(np.mean(np.square(z))) < 1.42


def test_restarts_and_mixtures() -> None:
    """Two modes: a mixture of restarts beats the best of them by β·log 2, which single precision leaves to 1e-3."""

    def policy() -> None:
        a = numpyro.sample("a", dist.Bernoulli(0.5))
        b = numpyro.sample("b", dist.Bernoulli(0.5))
        bayesrl.reward("same", 20.0 * (a == b))

    def guide() -> None:
        logit = numpyro.param("logit", jnp.array(0.0))
        numpyro.sample("a", dist.Bernoulli(logits=logit))
        numpyro.sample("b", dist.Bernoulli(logits=logit))

    made = bayesrl.fit(
        KEY, policy, beta=1.0, guide=guide, objective=Still(), num_steps=1, num_restarts=2, progress=False
    )
    fit = Posterior(**{**vars(made), "params": {"logit": jnp.array([-12.0, 12.0])}})
    equal = Posterior(**{**vars(fit), "mixture": np.array([0.5, 0.5])})
    found = compare(KEY, {"best": fit, "both": equal}, num_samples=4096)
    assert abs(found.delta_objective.mean[1] - np.log(2)) < 4.5 * found.delta_objective.se[1] + 1e-3
    assert "both" in str(found)
    assert max(map(len, str(found).splitlines())) <= 80


def test_what_cannot_be_compared_is_refused() -> None:
    def program(data: Array) -> None:
        x = numpyro.sample("x", dist.Normal(0.0, 1.0))
        bayesrl.reward("near", -((x - data.mean()) ** 2))

    def walled(data: Array) -> None:
        x = numpyro.sample("x", dist.Normal(0.0, 1.0))
        bayesrl.reward("near", jnp.where(x > 1.0, -jnp.inf, -((x - data.mean()) ** 2)))

    data = jnp.arange(3.0)
    one = bayesrl.fit(KEY, program, data, beta=1.0, objective=Still(), num_steps=1, progress=False)
    assert one.programs is not None

    def changed(**changes: Any) -> dict[str, Posterior]:
        assert one.programs is not None
        return {"a": one, "b": replace(one, programs=replace(one.programs, **changes))}

    with pytest.raises(PolicyError, match=r"compare got 0 fits; pass at least two"):
        compare(KEY, {})
    with pytest.raises(PolicyError, match=r"posterior 'b' was loaded without its policy.*bayesrl\.load"):
        compare(KEY, {"a": one, "b": replace(one, programs=None)})
    with pytest.raises(PolicyError, match="argument 0 of the program differs"):
        compare(KEY, changed(args=(data + 1,)))
    with pytest.raises(PolicyError, match="1 and 2 arguments"):
        compare(KEY, changed(args=(data, data)))
    with pytest.raises(PolicyError, match=r"holds 2 temperatures \(1, 2\).*select\(beta"):
        compare(KEY, {"a": one, "b": replace(one, beta=np.array([1.0, 2.0]))})
    longer = replace(one.programs.structure, sites=tuple(replace(s, length=2) for s in one.programs.structure.sites))
    with pytest.raises(PolicyError, match="site 'x' has length=1 in one and 2"):
        compare(KEY, changed(structure=longer))
    with pytest.raises(PolicyError, match=r"rewards \['near'\] of the policy of 'b' are not finite"):
        compare(KEY, changed(policy=walled))
    with pytest.raises(EngineError, match="num_samples=100 are too few for 2 fits; draw at least 128"):
        compare(KEY, {"a": one, "b": one}, num_samples=100)


def test_policies_that_were_trained_are_weighed_by_their_own_densities() -> None:
    """Fits that trained the policy differ in log π₀ too: each ELBO as by its own draws, within 4.5 standard errors (3e-5)."""

    def model() -> None:
        centre = numpyro.param("centre", jnp.array(0.0))
        x = numpyro.sample("x", dist.Normal(centre, 1.0))
        numpyro.sample("y", dist.Normal(x, 1.0), obs=3.0)

    near, far = (
        bayesrl.fit(jax.random.key(0), model, num_steps=steps, learning_rate=0.05, progress=False)
        for steps in (120, 20)
    )
    assert near.programs is not None
    assert near.programs.learned
    found = compare(jax.random.key(1), {"near": near, "far": far}, num_samples=20_000)
    for k, fit in enumerate((near, far)):
        own = fit.estimate(jax.random.key(2 + k), 20_000).objective
        error = np.hypot(float(found.objective.se[k]), float(np.asarray(own.se).reshape(-1)[0]))
        assert abs(float(found.objective.mean[k]) - float(np.asarray(own.mean).reshape(-1)[0])) < 4.5 * error

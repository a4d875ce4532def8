"""J, E[R], KL and log Z mean one thing, whoever tells them: history, estimates, evidence, scores, comparison, report.

The guide is a table that was disturbed and is then held (a learning rate of 0), so that all places speak of one policy,
of which everything is known by going through all assignments. Sampled numbers are compared within 5 of their own standard
errors (a false alarm in two million each), exact ones to single precision.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from jax import Array
from numpyro import handlers
from numpyro.contrib.control_flow import scan
from scipy.special import logsumexp

import bayesrl
from bayesrl.diagnostics.diagnosed_fit import full_data_fit
from bayesrl.diagnostics.evidence.bounds import evaluate_fit
from bayesrl.display.formatting import format_distance
from bayesrl.exact.evaluation import evaluate_exactly
from bayesrl.guides import AutoTilt
from bayesrl.objectives import ReverseKL
from bayesrl.statistics.estimates import Interval

BETA, GAMMA = 0.7, 0.8


def table(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@dataclass(frozen=True)
class Case:
    """A program of finite sites, the sizes of their supports with the shape of a value each, and how to fit it."""

    program: Callable[..., None]
    sites: dict[str, tuple[int, tuple[int, ...]]]
    contexts: tuple[int, ...] = ()
    beta: float | None = BETA
    options: tuple[tuple[str, Any], ...] = ()
    subsampled: bool = False
    nature: tuple[str, ...] = ()


def flat(seed: int, *, observed: bool, rewarded: bool = True, plate: int = 0, batch: int = 0) -> Case:
    """Two sites, the second seeing the first; data that depend on both."""
    n = max(plate, 1)
    first, second, payoff, centre = (
        table(seed, 3),
        table(seed + 1, 3, 2),
        table(seed + 2, n, 3, 2),
        table(seed + 3, 3, 2),
    )
    data = table(seed + 4, n)

    def body(i: Any) -> None:
        a = numpyro.sample("a", dist.Categorical(logits=jnp.asarray(first)))
        b = numpyro.sample("b", dist.Categorical(logits=jnp.asarray(second)[a]))
        if observed:
            numpyro.sample("y", dist.Normal(jnp.asarray(centre)[a, b], 0.8), obs=jnp.asarray(data)[i])
        if rewarded:
            bayesrl.reward("r", jnp.asarray(payoff)[i, a, b])
        numpyro.deterministic("even", 1.0 * (a == 2 * b))

    def program() -> None:
        if plate:
            with numpyro.plate("n", plate, subsample_size=batch or None) as i:
                body(i)
        else:
            body(0)

    shape = (plate,) if plate else ()
    sites = {"a": (3, shape), "b": (2, shape)}
    return Case(program, sites, shape, BETA if rewarded else None, subsampled=bool(batch))


def chain(seed: int) -> Case:
    """Three steps with data and rewards at each."""
    payoff, data = table(seed, 3, 2, 2), table(seed + 1, 3)

    def program() -> None:
        def step(state: Any, x: Any) -> Any:
            row, y = x
            action = numpyro.sample("a", dist.Bernoulli(0.3 + 0.4 * state))
            bayesrl.reward("r", row[state, action])
            numpyro.sample("y", dist.Normal(1.0 * action, 1.0), obs=y)
            return action, None

        scan(step, jnp.array(0), (jnp.asarray(payoff), jnp.asarray(data)))

    return Case(program, {"a": (2, (3,))})


def shared(seed: int) -> Case:
    """One unknown behind a plate of data, rewarded once: a single problem."""
    data, payoff = table(seed, 5), table(seed + 1, 4)

    def program() -> None:
        a = numpyro.sample("a", dist.Categorical(logits=jnp.zeros(4)))
        with numpyro.plate("data", 5):
            numpyro.sample("y", dist.Normal(0.5 * a, 1.5), obs=jnp.asarray(data))
        bayesrl.reward("r", jnp.asarray(payoff)[a])

    return Case(program, {"a": (4, ())})


def weather(seed: int) -> Case:
    """Nature speaks before the choice, seen, and after it, unseen."""
    prior, payoff = table(seed, 2, 3), table(seed + 1, 2, 3, 2)

    def program() -> None:
        w = bayesrl.environment("w", dist.Bernoulli(0.3), observable=True)
        a = numpyro.sample("a", dist.Categorical(logits=jnp.asarray(prior)[w]))
        h = bayesrl.environment("h", dist.Bernoulli(jnp.array([0.2, 0.5, 0.9])[a]), observable=False)
        bayesrl.reward("r", jnp.asarray(payoff)[w, a, h])

    return Case(program, {"w": (2, ()), "a": (3, ()), "h": (2, ())}, nature=("w", "h"))


SAMPLED = ("objective", ReverseKL(32, enumerated=()))
CASES: dict[str, Case] = {
    "data and rewards": flat(0, observed=True),
    "contexts with data": Case(**{**flat(10, observed=True, plate=3).__dict__, "options": (SAMPLED,)}),
    "rewards alone": Case(**{**flat(20, observed=False, plate=2).__dict__, "options": (SAMPLED,)}),
    "data alone": flat(30, observed=True, rewarded=False),
    "mini-batches with data": flat(40, observed=True, plate=4, batch=2),
    "annealed, with data": Case(**{**flat(50, observed=True).__dict__, "options": (("start_beta", 4.0),)}),
    "steps with data": Case(**{**chain(60).__dict__, "options": (SAMPLED,)}),
    "a plate of data": shared(70),
    "nature": Case(**{**weather(80).__dict__, "options": (SAMPLED,)}),
}


@cache
def fitted(name: str) -> bayesrl.Posterior:
    """Give the disturbed guide: restart 1 of a fit that learns nothing."""
    case = CASES[name]
    options = {"optimizer": optax.sgd(0.0), "num_steps": 60, "num_restarts": 2, "progress": False}
    both = bayesrl.fit(jax.random.key(3), case.program, beta=case.beta, **options, **dict(case.options))
    return both.select(restart=1)


@dataclass(frozen=True)
class Truth:
    """What is so, per context, averaged."""

    objective: float
    reward: float
    kl: float
    log_evidence: float
    log_marginal: float
    start: float


@cache
def truth(name: str) -> Truth:
    """Go through all assignments, in double precision; q is what `log_prob` says of each."""
    case = CASES[name]
    names = list(case.sites)
    sizes = [case.sites[site][0] for site in names]
    steps = [case.sites[site][1][0] if not case.contexts and case.sites[site][1] else 1 for site in names]
    grid = np.array(
        list(product(*(range(size) for size, count in zip(sizes, steps, strict=True) for _ in range(count))))
    )
    sites: dict[str, Array] = {}
    column = 0
    for site, count in zip(names, steps, strict=True):
        shape = case.sites[site][1]
        own = grid[:, column : column + count].reshape(len(grid), *((count,) if shape else ()))
        own = own.reshape(len(grid), *(1,) * len(shape)) if case.contexts else own
        sites[site] = jnp.asarray(np.broadcast_to(own, (len(grid), *shape)))
        column += count
    program = bayesrl.full_data(case.program)
    found = jax.jit(jax.vmap(lambda values: bayesrl.log_density(program, values, beta=case.beta)[:5]))(sites)
    prior, nature, likelihood, reward, _ = (np.asarray(x, float).reshape(len(grid), -1) for x in found)
    posterior = fitted(name)
    held = posterior if not case.subsampled else over_all(posterior)
    log_q = np.asarray(held.log_prob(sites), float).reshape(len(grid), -1)
    log_q = log_q - logsumexp(log_q + nature, axis=0)
    weight = np.exp(log_q + nature)
    marginal = logsumexp(prior + nature + likelihood, axis=0)
    given = 0.0 if case.beta is None else likelihood - marginal
    kl = (weight * (log_q - prior - given)).sum(0).mean()
    mean = (weight * reward).sum(0).mean()
    if case.beta is None:
        objective = (weight * likelihood).sum(0).mean() - kl
        return Truth(objective, 0.0, kl, marginal.mean(), marginal.mean(), (np.exp(prior) * likelihood).sum(0).mean())
    log_z = (logsumexp(prior + nature + likelihood + reward / case.beta, axis=0) - marginal).mean()
    start = (np.exp(prior + nature + given) * reward).sum(0).mean()
    return Truth(mean - case.beta * kl, mean, kl, log_z, marginal.mean(), start)


def over_all(posterior: bayesrl.Posterior) -> bayesrl.Posterior:
    return full_data_fit(posterior)


def near(told: Any, value: float, what: str) -> None:
    mean, se = float(np.ravel(told.mean)[0]), float(np.ravel(told.se)[0])
    assert abs(mean - value) < 5 * se + 2e-5, f"{what}: {mean} ± {se}, truly {value}"


@pytest.mark.parametrize("name", list(CASES))
def test_every_place_tells_the_truth(name: str) -> None:
    case, posterior, true = CASES[name], fitted(name), truth(name)
    conditioned = case.beta is not None and "data" in name
    places = {"estimate": posterior.estimate(jax.random.key(1), 1000), "kept": posterior.estimates}
    if name in ("data and rewards", "mini-batches with data"):
        places["scores"] = evaluate_fit(jax.random.key(2), posterior)
    for place, told in places.items():
        if place == "kept" and case.subsampled:
            continue  # of the mini-batches of its draws, whose errors count them as one
        near(told.objective, true.objective, f"J of {place}")
        near(told.reward, true.reward, f"E[R] of {place}")
        near(told.kl, true.kl, f"KL of {place}")
        assert float(np.ravel(told.kl.mean)[0]) > -5 * float(np.ravel(told.kl.se)[0]) - 1e-5
    for column, value in (("objective", true.objective), ("reward", true.reward), ("kl", true.kl)):
        rows = np.asarray(posterior.history[column], float).reshape(len(posterior.history["step"]))
        near(bayesrl.Estimate(rows.mean(), rows.std(ddof=1) / np.sqrt(len(rows))), value, f"{column} of the history")
    methods = ["enumeration", "importance"] if name in ("contexts with data", "steps with data") else ["enumeration"]
    for method in methods:
        found = bayesrl.evidence(jax.random.key(4), posterior, method=method, num_samples=4096)  # type: ignore[arg-type]
        near(found.objective, true.objective, f"J of evidence by {method}")
        near(found.reward, true.reward, f"E[R] of evidence by {method}")
        near(found.kl, true.kl, f"KL of evidence by {method}")
        assert found.prior_objective is not None
        near(found.prior_objective, true.start, f"J(π₀) of evidence by {method}")
        if not case.nature:
            assert found.log_evidence is not None
            near(found.log_evidence, true.log_evidence, f"log Z of evidence by {method}")
        if conditioned:
            assert found.log_marginal is not None
            near(found.log_marginal, true.log_marginal, f"log p(y) of evidence by {method}")
    if conditioned:
        told = posterior.estimate(jax.random.key(1), 100).log_marginal
        assert told is not None
        near(told, true.log_marginal, "log p(y) of estimate")


@pytest.mark.parametrize("name", ["data and rewards", "contexts with data", "steps with data"])
def test_engines_agree(name: str) -> None:
    case, true = CASES[name], truth(name)
    exact = bayesrl.enumerate_posterior(case.program, beta=case.beta)
    assert float(np.mean(np.asarray(exact.log_evidence.mean))) == pytest.approx(true.log_evidence, abs=1e-5)
    assert float(np.mean(np.asarray(exact.log_marginal.mean))) == pytest.approx(true.log_marginal, abs=1e-5)
    assert float(exact.estimates.reward.mean - BETA * exact.estimates.kl.mean) == pytest.approx(
        float(exact.estimates.objective.mean), abs=1e-5
    )
    weighted = bayesrl.importance(jax.random.key(0), case.program, beta=case.beta, num_samples=4000)
    for told in ("objective", "reward", "kl"):
        near(getattr(weighted.estimates, told), float(getattr(exact.estimates, told).mean), told)
    programs, params = fitted(name).unbatched()
    found = evaluate_exactly(programs, params, BETA)
    for value, value_true in (
        (found.objective, true.objective),
        (found.kl, true.kl),
        (found.prior_objective, true.start),
    ):
        assert float(value.mean()) == pytest.approx(value_true, abs=1e-5)


def test_comparison_and_mixture(tmp_path: Path) -> None:
    """A mixture of restarts is a policy like others, its KL at most the mean of theirs; ΔJ lacks what is common."""
    case = CASES["data and rewards"]
    options = {"optimizer": optax.sgd(0.0), "num_steps": 2, "num_restarts": 3, "progress": False}
    posterior = bayesrl.fit(jax.random.key(5), case.program, beta=BETA, **options)
    mixed = posterior.select(restart="mixture")
    exact = [evaluate_exactly(*posterior.select(restart=i).unbatched(), BETA) for i in range(3)]
    objective, kl, reward = ([float(getattr(x, name).mean()) for x in exact] for name in ("objective", "kl", "reward"))
    weights = np.ravel(mixed.mixture)
    told = mixed.estimate(jax.random.key(1), 4000)
    near(told.reward, float(weights @ reward), "E[R] of the mixture")
    assert float(told.kl.mean[0]) < weights @ kl + 5 * float(told.kl.se[0])
    assert float(told.objective.mean[0]) > weights @ objective - 5 * float(told.objective.se[0])
    assert float(told.objective.mean[0]) == pytest.approx(float(told.reward.mean[0] - BETA * told.kl.mean[0]), abs=1e-4)
    found = bayesrl.evidence(jax.random.key(2), mixed, num_samples=4096)
    near(found.objective, float(told.objective.mean[0]), "J of the mixture's evidence")
    fits = {"0": posterior.select(restart=0), "1": posterior.select(restart=1), "mixed": mixed}
    compared = bayesrl.compare(jax.random.key(3), fits, num_samples=3000)
    for i in range(2):
        assert abs(float(compared.objective.mean[i]) - objective[i]) < 5 * float(compared.objective.se[i]) + 2e-5
        assert abs(float(compared.kl.mean[i]) - kl[i]) < 5 * float(compared.kl.se[i]) + 2e-5
    apart = objective[1] - objective[0]
    assert abs(float(compared.delta_objective.mean[1]) - apart) < 5 * float(compared.delta_objective.se[1]) + 2e-5
    # The best restart's J, as the report prints it.
    best = posterior.select(restart="best")
    bayesrl.write_report(jax.random.key(0), tmp_path / "report.html", best)
    assert f"{max(objective):.3g}" in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_a_discount_counts_in_rewards_and_kl() -> None:
    """KL = Σ γᵗ·KLₜ and E[R] = Σ γᵗ·E[rₜ], in the history, in estimates and where no optimum is known."""
    prior, payoff = np.array([0.2, 0.5, 0.7]), np.array([1.0, -0.5, 2.0])

    def program() -> None:
        for t in range(3):
            with handlers.scale(scale=GAMMA**t):
                action = numpyro.sample(f"a{t}", dist.Bernoulli(float(prior[t])))
            bayesrl.reward(f"r{t}", GAMMA**t * float(payoff[t]) * action)

    options = {"optimizer": optax.sgd(0.0), "num_steps": 60, "num_restarts": 2, "progress": False}
    guide, objective = AutoTilt(tilt="constant"), ReverseKL(64, enumerated=())
    both = bayesrl.fit(jax.random.key(3), program, beta=BETA, guide=guide, objective=objective, **options)
    posterior = both.select(restart=1)
    tilts = np.array([float(np.ravel(posterior.params[f"a{t}$table"])[0]) for t in range(3)])
    chance = 1 / (1 + (1 - prior) / prior * np.exp(-tilts))
    weights = GAMMA ** np.arange(3)
    reward = float(weights @ (chance * payoff))
    kl = float(weights @ (chance * np.log(chance / prior) + (1 - chance) * np.log((1 - chance) / (1 - prior))))
    found = bayesrl.evidence(jax.random.key(2), posterior)
    assert found.log_evidence is None
    for told in (posterior.estimate(jax.random.key(1), 4000), posterior.estimates, found):
        near(told.reward, reward, "E[R]")
        near(told.kl, kl, "KL")
        near(told.objective, reward - BETA * kl, "J")
    for column, value in (("objective", reward - BETA * kl), ("reward", reward), ("kl", kl)):
        rows = np.asarray(posterior.history[column], float).reshape(-1)
        near(bayesrl.Estimate(rows.mean(), rows.std(ddof=1) / np.sqrt(len(rows))), value, column)


def test_data_on_a_line_have_a_marginal_with_an_error() -> None:
    """x ~ N(0, 1), y ~ N(x, s²), reward c·x: p(x|y), log Z and log p(y) in closed form; where weights fail, nan."""
    slope, noise = 0.8, 0.7

    def program(y: Array) -> None:
        x = numpyro.sample("x", dist.Normal(0.0, 1.0))
        numpyro.sample("y", dist.Normal(x, noise), obs=y)
        bayesrl.reward("r", slope * x)

    def closed(y: float) -> tuple[float, float]:
        variance = 1 / (1 + 1 / noise**2)
        log_y = -0.5 * np.log(2 * np.pi * (1 + noise**2)) - 0.5 * y**2 / (1 + noise**2)
        return log_y, slope / BETA * variance * y / noise**2 + 0.5 * (slope / BETA) ** 2 * variance

    posterior = bayesrl.fit(jax.random.key(0), program, jnp.array(0.5), beta=BETA, num_steps=300, progress=False)
    log_y, log_z = closed(0.5)
    told = posterior.estimate(jax.random.key(1), 2000)
    assert told.log_marginal is not None
    assert 0 < float(np.ravel(told.log_marginal.se)[0]) < 0.02
    near(told.log_marginal, log_y, "log p(y)")
    near(told.objective, BETA * log_z, "J")  # the guide holds p*
    assert float(told.objective.mean[0]) == pytest.approx(float(told.reward.mean[0] - BETA * told.kl.mean[0]), abs=1e-4)
    found = bayesrl.evidence(jax.random.key(2), posterior)
    assert found.log_evidence is not None
    near(found.log_evidence, log_z, "log Z")
    assert float(posterior.history["objective"][-1, 0]) == pytest.approx(BETA * log_z, abs=0.03)
    # Data of which no draw of prior or fit knows anything.
    far = posterior.estimate(jax.random.key(3), 500, jnp.array(40.0))
    assert np.isnan(np.asarray(far.objective.mean)).all()
    assert np.isnan(np.asarray(far.kl.mean)).all()
    assert np.isfinite(np.asarray(far.reward.mean)).all()


@pytest.mark.parametrize(
    ("ends", "told"),
    [
        ((7.1, 9.0, 0.0, 20.0), "8.06 ± 0.50"),
        ((math.nan, math.nan, 0.0, math.inf), "—"),
        ((math.nan, math.nan, 4.0, math.inf), "≥ 4.00 ± 0.50"),
        ((math.nan, math.nan, 4.0, 135.0), "8 [4, 135]"),
    ],
)
def test_a_distance_that_rests_on_worthless_weights_is_not_told(ends: tuple[float, ...], told: str) -> None:
    """Weights worth 2 draws gave KL(p*‖q) as 7.1 ± 1.1 where only ends are known."""
    assert format_distance(Interval(*map(np.asarray, (8.06, 0.5, *ends)))) == told

"""Fits with another regulariser than KL: gradients against sums, optima against roots, and who refuses them."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from jax import Array

import bayesrl
from bayesrl.core.programs import Programs
from bayesrl.core.structure import inspect
from bayesrl.errors import EngineError, FitError, ObjectiveError, PolicyError
from bayesrl.objectives import RegularizedReward, ReverseKL
from bayesrl.objectives.generators import estimand_of, regularizer_generator

KEY = jax.random.key(0)
K_SIGMA = 6.0
BETA = 0.4
RNG = np.random.default_rng(12)
PRIOR, PAYOFF, TABLE = (RNG.normal(size=(2, 4)).astype("float32") for _ in range(3))
KINDS: list[Any] = [
    ("chi_squared", None),
    ("chi_squared_kl", None),
    ("jensen_shannon", None),
    ("jensen_shannon_sum", None),
    ("forward_kl", None),
    ("alpha", 0.5),
]


def policy() -> None:
    with numpyro.plate("context", 2):
        arm = numpyro.sample("arm", dist.Categorical(logits=jnp.asarray(PRIOR)))
        bayesrl.reward("payoff", jnp.take_along_axis(jnp.asarray(PAYOFF), arm[..., None], -1)[..., 0])


def guide() -> None:
    table = numpyro.param("table", jnp.asarray(PRIOR))
    with numpyro.plate("context", 2):
        numpyro.sample("arm", dist.Categorical(logits=table))


def exact_j(name: str, table: Array) -> Array:
    """J over β, averaged over contexts, from the textbook forms of each divergence."""
    p, q = jax.nn.softmax(PRIOR), jax.nn.softmax(table)
    kl = jnp.where(q > 0, q * jnp.log(q / p), 0.0)
    chi = (q - p) ** 2 / p / 2
    js = kl - q * jnp.log((p + q) / (2 * p)) + p * jnp.log(2 * p / (p + q))
    found = {
        "chi_squared": chi,
        "chi_squared_kl": chi + kl,
        "jensen_shannon": js / 2,
        "jensen_shannon_sum": js,
        "forward_kl": p * jnp.log(p / q),
        "alpha": 4 * (p - jnp.sqrt(p * q)),
    }[name]
    return (q * PAYOFF / BETA - found).sum(-1).mean()


def test_gradients_by_sums_and_by_draws() -> None:
    """By sums to rounding; by 16 draws within 6 standard errors: 48 coordinates, false alarms below 1e-7."""
    programs = Programs(policy, guide, inspect(KEY, policy), (), {})
    params, num = {"table": jnp.asarray(TABLE)}, 2**13
    made = [RegularizedReward(name, alpha=alpha) for name, alpha in KINDS]
    drawn = [RegularizedReward(name, 16, alpha=alpha, enumerated=()) for name, alpha in KINDS]
    summed, sampled = ([one.prepare(KEY, programs, params) for one in some] for some in (made, drawn))

    def losses(params: Any, key: Array, ready: Any) -> Array:
        draws = ready[0].draw(key, params, programs)
        return jnp.stack([one.surrogate(params, draws, programs, BETA)[0] for one in ready])

    def truths(params: Any) -> Array:
        return jnp.stack([exact_j(name, params["table"]) for name, _ in KINDS])

    @jax.jit
    def run(params: Any, keys: Array) -> Any:
        noisy = jax.lax.map(lambda key: jax.jacrev(losses)(params, key, sampled), keys, batch_size=512)["table"]
        return (
            (losses(params, KEY, summed), jax.jacrev(losses)(params, KEY, summed)["table"]),
            (noisy.mean(0), noisy.std(0) / num**0.5),
            (truths(params), jax.jacrev(truths)(params)["table"]),
        )

    (value, gradient), (mean, error), (truth, slope) = jax.tree.map(np.asarray, run(params, jax.random.split(KEY, num)))
    np.testing.assert_allclose(value, -truth, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(gradient, -slope, rtol=1e-4, atol=1e-5)
    assert (np.abs(mean + slope) <= K_SIGMA * error + 1e-5).all()


@pytest.fixture(scope="module")
def fits() -> dict[str, bayesrl.Posterior]:
    return {
        name: bayesrl.fit(
            KEY, policy, beta=BETA, regularizer=name, alpha=alpha, num_steps=1500, num_restarts=2, progress=False
        )
        for name, alpha in (KINDS[1], KINDS[3], KINDS[5])
    }


@pytest.mark.parametrize("name", ["chi_squared_kl", "jensen_shannon_sum", "alpha"])
def test_fits_reach_the_optimum_of_their_regularizer(name: Any, fits: Any) -> None:
    """J of the history, of kept and of fresh draws, against J* by a root; KL stays KL."""
    alpha = dict(KINDS)[name]
    exact = bayesrl.enumerate_posterior(policy, beta=BETA, regularizer=name, alpha=alpha)
    optimum = float(exact.optimum.mean())
    posterior = fits[name]
    assert np.allclose(posterior.history["objective"][-1], optimum, atol=1e-3)
    for told in (posterior.estimates, posterior.estimate(KEY, 20_000)):
        assert told.divergence is not None
        mean, se = np.asarray(told.objective.mean), np.asarray(told.objective.se)
        assert (np.abs(mean - optimum) <= 5 * se + 1e-3).all()
        off = np.abs(np.asarray(told.kl.mean) - exact.estimates.kl.mean)
        assert (off <= 5 * np.asarray(told.kl.se) + 5e-3).all()
        off = np.abs(np.asarray(told.divergence.mean) - exact.estimates.divergence.mean)  # type: ignore[union-attr]
        assert (off <= 5 * np.asarray(told.divergence.se) + 5e-3).all()
    assert posterior.settings["regularizer"] == name
    assert posterior.select(restart="best").estimates.divergence is not None


def test_what_speaks_of_kl_refuses_them(fits: Any, tmp_path: Any) -> None:
    posterior = fits["chi_squared_kl"]
    says = "fitted with regularizer='chi_squared_kl', whose optimum is not p"
    target = bayesrl.enumerate_posterior(policy, beta=BETA)
    for ask in (
        lambda: bayesrl.evidence(KEY, posterior),
        lambda: bayesrl.diagnose(KEY, posterior),
        lambda: bayesrl.compare(KEY, {"a": posterior, "b": posterior}),
        lambda: bayesrl.coverage(KEY, posterior, target),
        lambda: bayesrl.write_report(KEY, tmp_path / "report.html", posterior),
    ):
        with pytest.raises(PolicyError, match=says):
            ask()
    sweep = bayesrl.fit(KEY, policy, beta=jnp.array([0.5, 1.0]), regularizer="chi_squared", num_steps=2, progress=False)
    with pytest.raises(PolicyError, match="regularizer='chi_squared'"):
        bayesrl.frontier(KEY, sweep)
    shown = bayesrl.enumerate_posterior(policy, beta=BETA, regularizer="chi_squared")
    kl = bayesrl.fit(KEY, policy, beta=BETA, num_steps=2, progress=False)
    with pytest.raises(EngineError, match="optimum with regularizer='chi_squared'"):
        bayesrl.coverage(KEY, kl, shown)


def test_a_run_folder_keeps_the_regularizer(tmp_path: Any) -> None:
    options: dict[str, Any] = {"beta": BETA, "regularizer": "alpha", "alpha": 0.5, "progress": False}
    made = bayesrl.fit(KEY, policy, num_steps=20, directory=tmp_path, **options)
    for again in (bayesrl.load(tmp_path), bayesrl.load(tmp_path, policy), bayesrl.resume(tmp_path, policy)):
        assert (again.settings["regularizer"], again.settings["alpha"]) == ("alpha", 0.5)
        np.testing.assert_allclose(again.estimates.objective.mean, made.estimates.objective.mean, rtol=1e-6)


def windy() -> None:
    arm = numpyro.sample("arm", dist.Bernoulli(0.5))
    wind = bayesrl.environment("wind", dist.Bernoulli(0.5), observable=True)
    bayesrl.reward("payoff", 1.0 * arm * wind)


def with_data() -> None:
    arm = numpyro.sample("arm", dist.Bernoulli(0.5))
    numpyro.sample("y", dist.Bernoulli(0.2 + 0.5 * arm), obs=jnp.asarray(1))
    bayesrl.reward("payoff", 1.0 * arm)


def never() -> None:
    arm = numpyro.sample("arm", dist.Bernoulli(0.5))
    bayesrl.reward("payoff", jnp.where(arm == 1, 1.0, -jnp.inf))


@pytest.mark.parametrize(
    ("program", "options", "error", "says"),
    [
        (policy, {"objective": ReverseKL()}, FitError, "regularizer= stands for"),
        (policy, {"regularizer": "kl", "alpha": 0.5}, FitError, "only regularizer='alpha' has an order"),
        (policy, {"regularizer": "alpha"}, ObjectiveError, "pass alpha=0.5"),
        (policy, {"regularizer": "alpha", "alpha": 1}, ObjectiveError, "use regularizer='kl'"),
        (policy, {"tolerance": 0.1}, FitError, "tolerance= works with J of KL alone"),
        (policy, {"start_beta": 3.0}, FitError, "start_beta= works with J of KL alone"),
        (windy, {}, ObjectiveError, "environment site 'wind': nature cancels from KL alone"),
        (with_data, {}, ObjectiveError, "observed site 'y'"),
        (never, {}, ObjectiveError, "'payoff' returned -inf"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_bad_input(program: Any, options: dict[str, Any], error: Any, says: str) -> None:
    given = {"beta": 1.0, "regularizer": "chi_squared", "num_steps": 1, "progress": False} | options
    with pytest.raises(error, match=says):
        bayesrl.fit(KEY, program, **given)


def test_kl_is_no_other_regularizer() -> None:
    with pytest.raises(ObjectiveError, match=r"use that"):
        RegularizedReward("kl")


def test_means_of_draws_see_what_a_fit_has_left() -> None:
    """Σ q·estimand(log t) is D_f, also where q is nearly 0: such arms count through f(0), not through draws."""
    p, q = jnp.full(3, 1 / 3), jnp.array([1 - 2e-9, 1e-9, 1e-9])
    for name, alpha in KINDS[:4] + KINDS[5:]:
        estimand = estimand_of(name, alpha)
        f = regularizer_generator(name, alpha)
        assert estimand is not None
        assert f is not None
        x = jnp.log(q / p)
        seen = (q * estimand(x))[0]  # the only arm that draws show
        np.testing.assert_allclose(seen, f.value(x, p, q).sum(), rtol=1e-3)

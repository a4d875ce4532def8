"""Fits with another regulariser than KL: gradients against sums, optima against roots, and what is told of them."""

import html
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
from bayesrl.report import frontier_figure

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


@pytest.mark.parametrize("name", ["chi_squared_kl", "jensen_shannon_sum", "alpha"])
def test_evidence_is_of_the_regularizer(name: Any, fits: Any) -> None:
    """J by its formula, J* by a root, and both again from draws: 5 numbers a fit, false alarms below 1e-5."""
    posterior, alpha = fits[name], dict(KINDS)[name]
    exact = bayesrl.enumerate_posterior(policy, beta=BETA, regularizer=name, alpha=alpha)
    found = bayesrl.evidence(KEY, posterior)
    logits = np.asarray(posterior.select(restart="best").log_prob({"arm": jnp.arange(4)[:, None] * jnp.ones(2, int)}))
    truth = BETA * float(exact_j(name, jnp.asarray(logits[0].T)))
    assert (found.method, found.regularizer, found.alpha) == ("enumeration", name, alpha)
    assert found.divergence is not None
    assert found.gap is not None
    np.testing.assert_allclose(found.objective.mean, truth, atol=2e-6)
    np.testing.assert_allclose(found.optimum.mean, exact.optimum.mean(), rtol=1e-9)
    np.testing.assert_allclose(found.objective.mean + found.gap.mean, found.optimum.mean, rtol=1e-12)
    np.testing.assert_allclose(found.objective.mean, found.reward.mean - BETA * found.divergence.mean, atol=1e-9)
    assert found.log_evidence is None
    assert found.kl_reverse is None
    assert 900 < found.ess <= 1000
    drawn = bayesrl.evidence(KEY, posterior, method="dual", num_samples=2**13)
    assert drawn.upper is not None
    assert drawn.gap is not None
    for told, known in ((drawn.optimum, found.optimum), (drawn.objective, found.objective), (drawn.kl, found.kl)):
        assert abs(told.mean - known.mean) <= 5 * told.se + 1e-6
        assert told.conservative_lower <= known.mean <= told.conservative_upper
    assert drawn.gap.conservative_lower <= found.gap.mean <= drawn.gap.conservative_upper
    assert abs(drawn.divergence.mean - found.divergence.mean) <= 5 * drawn.divergence.se + 1e-6  # type: ignore[union-attr]
    again = type(found).from_json(found.to_json())
    assert (again.regularizer, again.alpha, str(again)) == (name, alpha, str(found))


def test_everything_that_is_told_names_the_regularizer(fits: Any, tmp_path: Any) -> None:
    """No place shows a formula with KL; a mixture of restarts, a comparison and a region have their own J and p*."""
    posterior = fits["chi_squared_kl"]
    verdict = bayesrl.diagnose(KEY, posterior)
    assert verdict.verdict == "pass"
    assert "those with χ²+KL in the place of KL" in verdict.explanation
    assert verdict["gap"].reference == "J* − J(q), where J = E[R] − β·χ²+KL"
    assert verdict.evidence is not None
    assert "The optimum with χ²+KL in the place of KL" in verdict.evidence.explanation
    target = bayesrl.enumerate_posterior(policy, beta=BETA, regularizer="chi_squared_kl")
    assert "χ²+KL in the place of KL" in repr(target)
    assert bayesrl.coverage(KEY, posterior, target).verdict == "pass"
    pair = {"one": posterior.select(restart=0), "other": posterior.select(restart=1)}
    compared = bayesrl.compare(KEY, pair)
    assert compared.divergence is not None
    each = [bayesrl.evidence(KEY, one) for one in pair.values()]
    for told, known in ((compared.objective, "objective"), (compared.divergence, "divergence"), (compared.kl, "kl")):
        apart = told.mean - [getattr(one, known).mean for one in each]
        assert (np.abs(apart) <= 5 * told.se + 1e-5).all()
    mixed = bayesrl.evidence(KEY, posterior.select(restart="mixture"), num_samples=2**13)
    assert (mixed.method, mixed.regularizer) == ("dual", "chi_squared_kl")
    assert mixed.optimum.conservative_lower <= target.optimum.mean() <= mixed.optimum.conservative_upper  # type: ignore[union-attr]
    page = bayesrl.write_report(KEY, tmp_path / "report.html", posterior, diagnoses={"fit": verdict})
    shown = [str(verdict), str(posterior), str(compared), html.unescape(page.read_text(encoding="utf-8"))]
    for text in shown:
        assert "χ²+KL" in text
        for of_kl in ("β·KL", "KL(q‖p*)", "log Z", "−KL"):
            assert of_kl not in text.replace("χ²+KL", "D")
    stored = bayesrl.to_datatree(posterior)
    assert stored.attrs["regularizer"] == "chi_squared_kl"
    assert "another optimum" in stored["sample_stats"]["log_weight"].attrs["description"]


def test_a_frontier_follows_the_regularizer(tmp_path: Any) -> None:
    options: dict[str, Any] = {"regularizer": "chi_squared", "num_steps": 1000, "progress": False}
    sweep = bayesrl.fit(KEY, policy, beta=jnp.array([1.0, 0.5, 2.0]), **options)
    found = bayesrl.evidence(KEY, sweep)
    line = bayesrl.frontier(KEY, sweep, evidence=found)
    assert [check.name for check in line.checks][::4] == ["dJ*/dβ = −χ²", "χ² non-increasing"]
    assert {check.outcome for check in line.checks} == {"pass"}
    assert frontier_figure(found, found.target).axes[0].get_xlabel() == "χ² to prior"
    page = bayesrl.write_report(KEY, tmp_path / "sweep.html", sweep).read_text(encoding="utf-8")
    assert "What reward costs in χ², over" in page
    kl = bayesrl.fit(KEY, policy, beta=jnp.array([1.0, 0.5, 2.0]), num_steps=2, progress=False)
    with pytest.raises(PolicyError, match="fit with regularizer='chi_squared', the posterior has regularizer='kl'"):
        bayesrl.frontier(KEY, kl, evidence=found)
    with pytest.raises(PolicyError, match="best_of is drawn by its KL"):
        frontier_figure(found, best_of=bayesrl.best_of(KEY, policy, n=2, num_samples=2))


def test_what_is_of_another_optimum_is_refused(fits: Any) -> None:
    posterior = fits["chi_squared_kl"]
    for method in ("smc", "importance", "rejection", "nuts", "hindsight"):
        with pytest.raises(EngineError, match=f"method='{method}' finds log Z.*use method='auto', 'enumeration' or"):
            bayesrl.evidence(KEY, posterior, method=method)
    kl = bayesrl.fit(KEY, policy, beta=BETA, num_steps=2, progress=False)
    with pytest.raises(EngineError, match="is of fits with another regulariser"):
        bayesrl.evidence(KEY, kl, method="dual")
    with pytest.raises(PolicyError, match=r"'a' and 'b' maximise E.R. − β·χ².KL and E.R. − β·KL"):
        bayesrl.compare(KEY, {"a": posterior, "b": kl})
    shown = bayesrl.enumerate_posterior(policy, beta=BETA, regularizer="chi_squared")
    for fit, own in ((kl, "kl"), (posterior, "chi_squared_kl")):
        with pytest.raises(EngineError, match=f"optimum with regularizer='chi_squared', .*with regularizer='{own}'"):
            bayesrl.coverage(KEY, fit, shown)


def test_a_known_optimum_of_another_regularizer(fits: Any) -> None:
    exact = bayesrl.enumerate_posterior(policy, beta=BETA, regularizer="alpha", alpha=0.5)
    assert exact.optimum is not None
    optimum = float(exact.optimum.mean())
    found = bayesrl.evidence(KEY, fits["alpha"], optimum=lambda beta: optimum, num_samples=2**12)
    assert (found.regularizer, found.method, found.kl_reverse) == ("alpha", "known", None)
    assert found.gap is not None
    assert 0 <= found.gap.mean <= 5 * found.objective.se + 1e-3

    class Planned:
        def __call__(self, beta: float) -> float:
            return optimum

        def evaluate(self, posterior: Any) -> tuple[float, float, float]:
            return 0.0, 0.0, 0.0

    with pytest.raises(EngineError, match=r"optimum.evaluate gives J with KL"):
        bayesrl.evidence(KEY, fits["alpha"], optimum=Planned())


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

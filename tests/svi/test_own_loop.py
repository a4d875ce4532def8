"""A loop of one's own over `init` and `step`, and posteriors of policies that were trained anywhere."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from numpyro.infer import SVI, Trace_ELBO
from numpyro.infer.autoguide import AutoNormal

import bayesrl
from bayesrl.errors import EngineError, FitError, GuideError, PolicyError
from bayesrl.objectives import ReverseKL
from bayesrl.svi.step import lane_keys, step_key

KEY, BETA = jax.random.key(0), 0.5
MEANS = jnp.array([0.1, 0.3, 0.5, 0.9])


def bandit() -> None:
    arm = numpyro.sample("arm", dist.Categorical(logits=jnp.zeros(4)))
    bayesrl.reward("payoff", MEANS[arm])


def table_guide() -> None:
    """A guide by hand, with a constrained parameter."""
    probs = numpyro.param("probs", jnp.ones(4) / 4, constraint=dist.constraints.simplex)
    numpyro.sample("arm", dist.Categorical(probs))


def throw(distance: Any) -> None:
    """A continuous policy whose tilted posterior is normal: mean (0 + d/β) / (1 + 1/β), variance 1 / (1 + 1/β)."""
    x = numpyro.sample("x", dist.Normal(0.0, 1.0))
    bayesrl.reward("near", -0.5 * (x - distance) ** 2)


def own_keys(num_steps: int) -> jax.Array:
    return jax.vmap(lambda i: step_key(lane_keys(KEY, 1)[0], i))(jnp.arange(num_steps))


def probabilities() -> dict[str, np.ndarray]:
    """Give a policy near the optimum, as `table_guide` declares it."""
    return {"probs": np.asarray(jax.nn.softmax(0.8 * MEANS / BETA))}


def exact_values(probs: Any) -> tuple[float, float, float]:
    """J, E[R] and KL of a policy of the bandit."""
    probs = np.asarray(probs, float)
    reward, kl = float(probs @ np.asarray(MEANS, float)), float(np.sum(probs * np.log(probs * 4)))
    return reward - BETA * kl, reward, kl


def check_all(posterior: bayesrl.Posterior, probs: Any, tmp_path: Path) -> None:
    """Everything that asks a posterior runs, and J, E[R], KL and the gap are those of the enumeration."""
    objective, reward, kl = exact_values(probs)
    evidence = bayesrl.evidence(jax.random.key(1), posterior)
    np.testing.assert_allclose(np.ravel(evidence.objective.mean), objective, atol=2e-5)
    optimum = BETA * np.log(np.mean(np.exp(np.asarray(MEANS, float) / BETA)))
    np.testing.assert_allclose(np.ravel(evidence.optimum.mean), optimum, atol=2e-5)
    estimates = posterior.estimate(jax.random.key(2), 20_000)
    for found, exact in ((estimates.objective, objective), (estimates.reward, reward), (estimates.kl, kl)):
        assert abs(float(found.mean[0]) - exact) < 5 * float(found.se[0]) + 1e-5
    assert bayesrl.diagnose(jax.random.key(3), posterior).verdict in ("pass", "fail", "unknown")
    fitted = bayesrl.fit(jax.random.key(4), bandit, beta=BETA, num_steps=50, progress=False)
    assert np.isfinite(bayesrl.compare(jax.random.key(5), {"at": posterior, "fit": fitted}).objective.mean).all()
    bayesrl.write_report(jax.random.key(6), tmp_path / "report.html", posterior)
    assert (tmp_path / "report.html").stat().st_size > 1000


@pytest.mark.parametrize("guide", [None, table_guide], ids=["automatic", "by hand"])
def test_a_loop_of_ones_own_gives_the_parameters_of_a_fit(guide: Any) -> None:
    options: dict[str, Any] = {"objective": ReverseKL(num_particles=8, enumerated=()), "optimizer": optax.adam(0.05)}
    posterior = bayesrl.fit(KEY, bandit, beta=BETA, guide=guide, num_steps=60, progress=False, **options)
    state = bayesrl.init(KEY, bandit, beta=BETA, guide=guide, **options)
    scanned, info = jax.lax.scan(lambda state, key: bayesrl.step(key, state), state, own_keys(60))
    assert info.objective.shape == (60,)
    assert int(scanned.train.step) == 60
    step = jax.jit(bayesrl.step)
    before = step._cache_size()
    for key in own_keys(60):
        state, _ = step(key, state)
    for name, values in posterior.params.items():
        np.testing.assert_allclose(scanned.train.average[name], values[0], rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(state.train.average[name], values[0], rtol=1e-5, atol=1e-6)
    assert step._cache_size() == before + 1, "one trace serves every step"


def test_the_default_optimizer_is_that_of_a_fit() -> None:
    posterior = bayesrl.fit(KEY, bandit, beta=BETA, num_steps=80, progress=False)
    state = bayesrl.init(KEY, bandit, beta=BETA, num_steps=80)
    state, _ = jax.lax.scan(lambda state, key: bayesrl.step(key, state), state, own_keys(80))
    np.testing.assert_allclose(state.train.average["arm$table"], posterior.params["arm$table"][0], rtol=1e-5, atol=1e-6)


def test_states_are_stacked_over_seeds_and_temperatures() -> None:
    state = bayesrl.init(KEY, bandit, beta=BETA, optimizer=optax.adam(0.1))
    betas = jnp.array([0.2, 0.5, 2.0])
    stacked = jax.vmap(lambda beta: replace(state, beta=beta))(betas)

    @jax.jit
    def run(stacked: Any) -> Any:
        def body(states: Any, key: Any) -> Any:
            return jax.vmap(bayesrl.step, in_axes=(None, 0))(key, states)

        return jax.lax.scan(body, stacked, jax.random.split(KEY, 400))[0]

    last = run(stacked)
    for beta, params in zip(betas, last.train.average["arm$table"], strict=True):
        np.testing.assert_allclose(jax.nn.softmax(params), jax.nn.softmax(MEANS / beta), atol=5e-3)


def test_an_array_of_temperatures_is_refused() -> None:
    with pytest.raises(FitError, match=r"beta has shape \(2,\); pass one number, and spread"):
        bayesrl.init(KEY, bandit, beta=jnp.array([0.1, 0.2]))


def test_a_state_becomes_a_posterior(tmp_path: Path) -> None:
    state = bayesrl.init(KEY, bandit, beta=BETA, guide=table_guide, num_steps=50)
    state, _ = jax.lax.scan(lambda state, key: bayesrl.step(key, state), state, jax.random.split(KEY, 50))
    np.testing.assert_allclose(state.params["probs"].sum(), 1.0, rtol=1e-6)
    posterior = bayesrl.Posterior.at(bandit, state.guide, state.params, beta=BETA)
    check_all(posterior, state.params["probs"], tmp_path)
    raw = bayesrl.Posterior.at(bandit, state.guide, state.train.average, beta=BETA, unconstrained=True)
    np.testing.assert_allclose(raw.params["probs"], posterior.params["probs"], atol=1e-5)


def test_parameters_of_numpyros_svi(tmp_path: Path) -> None:
    svi = SVI(bayesrl.tilt(bandit, BETA), table_guide, numpyro.optim.Adam(0.05), ReverseKL(16))
    params = svi.run(KEY, 100, progress_bar=False).params
    check_all(bayesrl.Posterior.at(bandit, table_guide, params, beta=BETA), params["probs"], tmp_path)


def test_parameters_of_an_autoguide_of_numpyro() -> None:
    guide = AutoNormal(throw)
    svi = SVI(bayesrl.tilt(throw, BETA), guide, numpyro.optim.Adam(0.03), Trace_ELBO(16))
    params = svi.run(KEY, 1500, 1.5, progress_bar=False).params
    posterior = bayesrl.Posterior.at(throw, guide, params, 1.5, beta=BETA)
    mean, scale = float(params["x_auto_loc"]), float(params["x_auto_scale"])
    reward = -0.5 * ((mean - 1.5) ** 2 + scale**2)
    kl = 0.5 * (scale**2 + mean**2 - 1) - np.log(scale)
    estimates = posterior.estimate(jax.random.key(2), 20_000)
    for found, exact in ((estimates.reward, reward), (estimates.kl, kl), (estimates.objective, reward - BETA * kl)):
        assert abs(float(found.mean[0]) - exact) < 5 * float(found.se[0]) + 1e-5
    optimum = BETA * (-0.5 * np.log1p(1 / BETA) - 0.5 * 1.5**2 / (1 + BETA))
    evidence = bayesrl.evidence(jax.random.key(3), posterior, num_samples=20_000)
    assert evidence.optimum.conservative_lower - 1e-3 <= optimum <= evidence.optimum.conservative_upper + 1e-3


def test_a_loop_over_an_objective_and_a_saved_file(tmp_path: Path) -> None:
    """What an Optax loop on `ReverseKL` trained is saved and read by NumPy, and is a posterior again."""
    objective, optimizer = ReverseKL(16), optax.adam(0.05)
    params = {"table": jnp.zeros(4)}

    def guide() -> None:
        numpyro.sample("arm", dist.Categorical(logits=numpyro.param("table", jnp.zeros(4))))

    @jax.jit
    def step(params: Any, state: Any, key: Any) -> Any:
        loss, gradient = jax.value_and_grad(
            lambda params: objective.loss(key, params, bayesrl.tilt(bandit, BETA), guide)
        )(params)
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state, loss

    state = optimizer.init(params)
    for key in jax.random.split(KEY, 100):
        params, state, _ = step(params, state, key)
    np.savez(tmp_path / "params.npz", **params)
    with np.load(tmp_path / "params.npz") as saved:
        posterior = bayesrl.Posterior.at(bandit, guide, dict(saved), beta=BETA)
    check_all(posterior, jax.nn.softmax(params["table"]), tmp_path)


def test_parameters_of_the_policy_are_its_prior() -> None:
    """NumPyro's SVI trains the policy's own parameters too: J is then of the policy as it was trained."""

    def policy() -> None:
        bias = numpyro.param("bias", jnp.zeros(4))
        arm = numpyro.sample("arm", dist.Categorical(logits=bias))
        bayesrl.reward("payoff", MEANS[arm])

    bias = jnp.array([1.0, 0.0, 0.0, 0.0])
    posterior = bayesrl.Posterior.at(policy, table_guide, probabilities() | {"bias": bias}, beta=BETA)
    prior = np.asarray(jax.nn.softmax(bias), float)
    optimum = BETA * np.log(prior @ np.exp(np.asarray(MEANS, float) / BETA))
    np.testing.assert_allclose(
        np.ravel(bayesrl.evidence(jax.random.key(1), posterior).optimum.mean), optimum, atol=2e-5
    )


def trained(policy: Any, guide: Any = None) -> bayesrl.State:
    state = bayesrl.init(jax.random.key(3), policy, beta=BETA, guide=guide, num_steps=50)
    keys = jax.random.split(jax.random.key(4), 50)
    return jax.lax.scan(lambda state, key: (bayesrl.step(key, state)[0], None), state, keys)[0]


def own_prior(initial: Any) -> Any:
    def policy() -> None:
        arm = numpyro.sample("arm", dist.Categorical(logits=numpyro.param("bias", initial)))
        bayesrl.reward("payoff", MEANS[arm])

    return policy


def test_a_guide_may_declare_the_names_of_the_policy() -> None:
    """The automatic guide is a copy of the policy: its "bias" is its own, and the prior's stays where it was."""
    policy = own_prior(jnp.array([1.0, 0.0, 0.0, 0.0]))
    state = trained(policy)
    evidence = bayesrl.evidence(jax.random.key(1), bayesrl.Posterior.at(policy, state.guide, state.params, beta=BETA))
    prior = np.asarray(jax.nn.softmax(jnp.array([1.0, 0.0, 0.0, 0.0])), float)
    optimum = BETA * np.log(prior @ np.exp(np.asarray(MEANS, float) / BETA))
    np.testing.assert_allclose(np.ravel(evidence.optimum.mean), optimum, atol=2e-5)
    assert float(np.ravel(evidence.objective.mean)[0]) <= optimum + 2e-5


def test_a_random_prior_is_that_of_the_run() -> None:
    policy = own_prior(lambda key: 2 * jax.random.normal(key, (4,)))
    state = trained(policy, table_guide)
    with pytest.raises(GuideError, match=r"'bias' of the policy has a random first value.*state\.policy"):
        bayesrl.Posterior.at(policy, table_guide, state.params, beta=BETA)
    evidence = bayesrl.evidence(
        jax.random.key(1), bayesrl.Posterior.at(state.policy, table_guide, state.params, beta=BETA)
    )
    exact = bayesrl.enumerate_posterior(state.policy, beta=BETA)
    np.testing.assert_allclose(np.ravel(evidence.optimum.mean), np.ravel(exact.optimum), atol=2e-5)


def test_parameters_of_the_policy_are_checked_as_those_of_the_guide() -> None:
    def policy() -> None:
        scale = numpyro.param("scale", 2.0, constraint=dist.constraints.positive)
        arm = numpyro.sample("arm", dist.Categorical(logits=scale * jnp.arange(4.0)))
        bayesrl.reward("payoff", MEANS[arm])

    guide_params = probabilities()
    one = bayesrl.Posterior.at(policy, table_guide, guide_params | {"scale": 0.5}, beta=BETA)
    unbound = {name: dist.transforms.biject_to(dist.constraints.simplex).inv(x) for name, x in guide_params.items()}
    other = bayesrl.Posterior.at(policy, table_guide, unbound | {"scale": jnp.log(0.5)}, beta=BETA, unconstrained=True)
    kls = [np.ravel(bayesrl.evidence(jax.random.key(1), x).kl.mean)[0] for x in (one, other)]
    np.testing.assert_allclose(kls[0], kls[1], rtol=1e-5)
    for value, message in (
        (-2.0, "outside of its constraint"),
        (jnp.zeros(3), "shape"),
        (jnp.nan, "finite"),
        ("x", "numbers"),
    ):
        with pytest.raises(GuideError, match=f"parameter 'scale' .*{message}"):
            bayesrl.Posterior.at(policy, table_guide, guide_params | {"scale": value}, beta=BETA)


def test_missing_arguments_are_named() -> None:
    def policy(means: Any) -> None:
        bayesrl.reward("payoff", means[numpyro.sample("arm", dist.Categorical(logits=jnp.zeros(4)))])

    with pytest.raises(PolicyError, match="means"):
        bayesrl.Posterior.at(policy, table_guide, probabilities(), beta=BETA)


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "missing": ({}, "params lack 'probs', and the guide declares \\['probs'\\]; pass"),
    "unknown": (probabilities() | {"other": jnp.zeros(2)}, "params hold 'other', and the guide declares"),
    "shape": ({"probs": jnp.ones(3) / 3}, r"parameter 'probs' has shape \(3,\), and the guide declares \(4,\); pass"),
    "nan": ({"probs": jnp.full(4, jnp.nan)}, "parameter 'probs' is not finite everywhere; pass"),
    "constraint": ({"probs": jnp.array([0.5, 0.9, -0.2, -0.2])}, "'probs' lies outside of its constraint .*unconstr"),
    "text": ({"probs": "abc"}, "parameter 'probs' is not made of numbers"),
    "complex": (
        {"probs": jnp.ones(4) / 4 + 1j},
        "'probs' is complex, and the guide declares real numbers; pass its real",
    ),
    "edge": ({"probs": np.array([1, 0, 0, 0])}, "'probs' lies on the edge of its constraint .*move it inside"),
}


@pytest.mark.parametrize(("params", "message"), WRONG.values(), ids=WRONG)
def test_wrong_parameters_are_refused_by_name(params: dict[str, Any], message: str) -> None:
    with pytest.raises(GuideError, match=message):
        bayesrl.Posterior.at(bandit, table_guide, params, beta=BETA)


@pytest.mark.parametrize("value", [[1, 0, 2, 3], np.array([1, 0, 2, 3]), np.array([1, 0, 2, 3], np.float64)], ids=type)
def test_numbers_of_any_type_become_those_of_the_guide(value: Any) -> None:
    posterior = bayesrl.Posterior.at(bandit, table_guide, {"probs": value[:3]}, beta=BETA, unconstrained=True)
    assert posterior.params["probs"].dtype == np.float32
    np.testing.assert_array_equal(posterior.params["probs"][0], [1, 0, 2])


def test_integers_of_a_simplex_are_read() -> None:
    def certain() -> None:
        ones = numpyro.param("ones", jnp.ones(4), constraint=dist.constraints.positive)
        numpyro.sample("arm", dist.Categorical(ones / ones.sum()))

    posterior = bayesrl.Posterior.at(bandit, certain, {"ones": np.array([1, 2, 3, 4])}, beta=BETA)
    np.testing.assert_allclose(posterior.params["ones"][0], np.log([1, 2, 3, 4]), rtol=1e-6)


@pytest.mark.parametrize("around", [jax.jit, jax.vmap, jax.grad], ids=lambda fn: fn.__name__)
def test_set_up_is_refused_where_numbers_are_not_known(around: Any) -> None:
    beta = jnp.ones(2) if around is jax.vmap else 1.0

    def at(scale: Any) -> Any:
        return bayesrl.Posterior.at(bandit, table_guide, {"probs": jnp.ones(4) / 4}, beta=scale).params["probs"].sum()

    with pytest.raises(FitError, match=r"init cannot run inside of jax\.jit, vmap or grad.*put bayesrl\.step under"):
        around(lambda beta: bayesrl.init(KEY, bandit, beta=beta).beta)(beta)
    with pytest.raises(FitError, match=r"fit cannot run inside of jax\.jit, vmap or grad.*call it outside"):
        around(lambda beta: bayesrl.fit(KEY, bandit, beta=beta).beta)(beta)
    with pytest.raises(
        PolicyError, match=r"Posterior\.at cannot run inside of jax\.jit, vmap or grad.*call it outside"
    ):
        around(at)(beta)
    engines: list[Any] = [
        lambda beta: bayesrl.enumerate_posterior(bandit, beta=beta).optimum,
        lambda beta: bayesrl.importance(KEY, bandit, beta=beta).log_evidence.mean,
        lambda beta: bayesrl.rejection(KEY, bandit, beta=beta).log_evidence.mean,
        lambda beta: bayesrl.smc(KEY, bandit, beta=beta).log_evidence.mean,
    ]
    for engine in engines:
        with pytest.raises(EngineError, match=r"cannot run inside of jax\.jit, vmap or grad.*call it outside"):
            around(engine)(beta)


@pytest.mark.parametrize("around", [jax.jit, jax.vmap], ids=lambda fn: fn.__name__)
def test_what_judges_a_fit_is_refused_where_its_key_is_not_known(around: Any, tmp_path: Any) -> None:
    posterior = bayesrl.Posterior.at(bandit, table_guide, probabilities(), beta=BETA)
    key = jax.random.split(KEY, 2) if around is jax.vmap else KEY
    target = bayesrl.enumerate_posterior(bandit, beta=BETA)
    judges: dict[str, Any] = {
        "evidence": lambda key: bayesrl.evidence(key, posterior),
        "diagnose": lambda key: bayesrl.diagnose(key, posterior),
        "compare": lambda key: bayesrl.compare(key, {"a": posterior, "b": posterior}),
        "frontier": lambda key: bayesrl.frontier(key, posterior),
        "coverage": lambda key: bayesrl.coverage(key, posterior, target),
        "calibrate": lambda key: bayesrl.calibrate(key, bandit),
        "write_report": lambda key: bayesrl.write_report(key, tmp_path / "report.html", posterior),
    }
    for name, judge in judges.items():
        with pytest.raises((EngineError, PolicyError), match=f"{name} cannot run inside of jax.jit.*call it outside"):
            around(judge)(key)


def test_a_posterior_scores_inside_of_jit() -> None:
    posterior = bayesrl.Posterior.at(bandit, table_guide, probabilities(), beta=BETA)
    arms = jnp.arange(4)
    scores = jax.jit(lambda arms: posterior.log_prob({"arm": arms}))(arms)
    np.testing.assert_allclose(scores, posterior.log_prob({"arm": arms}), rtol=1e-6)
    np.testing.assert_allclose(np.exp(scores[0]), probabilities()["probs"], rtol=1e-5)


def test_set_up_is_refused_under_jit_without_a_traced_argument() -> None:
    params = probabilities()
    with pytest.raises(PolicyError, match=r"Posterior\.at cannot run inside of jax\.jit"):
        jax.jit(lambda: bayesrl.Posterior.at(bandit, table_guide, params, beta=BETA).params["probs"])()


@pytest.mark.parametrize(
    "beta", [-1.0, 0.0, jnp.array(-1.0), jnp.inf, jnp.nan, None, "cold", 1j, jnp.ones(3)], ids=repr
)
def test_a_temperature_of_a_state_is_checked(beta: Any) -> None:
    state = bayesrl.init(KEY, bandit, beta=BETA)
    with pytest.raises(FitError, match=r"the state has beta=.*; replace it by one number above 0"):
        bayesrl.step(KEY, replace(state, beta=beta))


def test_a_step_at_a_traced_temperature_that_is_none_is_skipped() -> None:
    state = bayesrl.init(KEY, bandit, beta=BETA, optimizer=optax.sgd(1.0))
    states = jax.vmap(lambda beta: replace(state, beta=beta))(jnp.array([-1.0, 0.0, 1.0]))
    stepped, info = jax.jit(jax.vmap(bayesrl.step, in_axes=(None, 0)))(KEY, states)
    np.testing.assert_array_equal(info.taken, [0, 0, 1])
    np.testing.assert_array_equal(stepped.train.skipped, [1, 1, 0])
    np.testing.assert_array_equal(stepped.train.params["arm$table"][:2], 0.0)


def test_families_and_foreign_guides_are_refused() -> None:
    for family in (bayesrl.guides.AutoTilt(), bayesrl.guides.AutoTilt):
        with pytest.raises(GuideError, match=r"guide=AutoTilt is a family.*state\.guide"):
            bayesrl.Posterior.at(bandit, family, {"arm$table": jnp.zeros(4)}, beta=BETA)
    with pytest.raises(GuideError, match=r"guide=None, and the policy draws \['arm'\]; pass .*state\.guide"):
        bayesrl.Posterior.at(bandit, None, {"arm$table": jnp.zeros(4)}, beta=BETA)
    normal: Any = dist.Normal(jnp.zeros(100), 1.0)  # callable, but no program
    with pytest.raises(GuideError, match=r"guide=a Normal is not a program; pass the guide .*: state\.guide"):
        bayesrl.Posterior.at(bandit, normal, {"arm$table": jnp.zeros(4)}, beta=BETA)
    with pytest.raises(GuideError, match=r"guide=a Normal is neither a NumPyro program nor a family"):
        bayesrl.init(KEY, bandit, beta=BETA, guide=normal)

    def other() -> None:
        numpyro.sample("leg", dist.Categorical(logits=numpyro.param("table", jnp.zeros(4))))

    with pytest.raises(GuideError, match="misses action site 'arm'"):
        bayesrl.Posterior.at(bandit, other, {"table": jnp.zeros(4)}, beta=BETA)
    with pytest.raises(PolicyError, match="needs a temperature"):
        bayesrl.Posterior.at(bandit, table_guide, probabilities())


def test_a_guide_of_another_policy_is_refused() -> None:
    def shaped(scale: Any) -> None:
        bayesrl.reward("payoff", scale * numpyro.sample("arm", dist.Categorical(logits=jnp.zeros(4))))

    def real() -> None:
        bayesrl.reward("payoff", numpyro.sample("arm", dist.Normal(0.0, 1.0)))

    own, other = bayesrl.init(KEY, real, beta=BETA), bayesrl.init(KEY, shaped, 1.0, beta=BETA)
    with pytest.raises(GuideError, match="only one of guide and policy draws site 'arm' from a discrete distribution"):
        bayesrl.Posterior.at(bandit, own.guide, own.params, beta=BETA)
    with pytest.raises(GuideError, match=r"the guide is called with 0 arguments, and takes PolicyGuide\(scale"):
        bayesrl.Posterior.at(bandit, other.guide, other.params, beta=BETA)


def test_draws_of_the_prior_are_of_ones_own_policy() -> None:
    def fewer() -> None:
        bayesrl.reward("payoff", 1.0 * numpyro.sample("arm", dist.Categorical(logits=jnp.zeros(2))))

    state = bayesrl.init(KEY, fewer, beta=BETA)
    posterior = bayesrl.Posterior.at(bandit, state.guide, state.params, beta=BETA)
    assert set(np.unique(posterior.prior_draws["arm"])) == {0, 1, 2, 3}
    assert set(np.unique(posterior.draws["arm"])) == {0, 1}


def test_advice_fits_parameters_that_no_fit_found(tmp_path: Path) -> None:
    posterior = bayesrl.Posterior.at(bandit, table_guide, {"probs": np.array([0.97, 0.01, 0.01, 0.01])}, beta=BETA)
    diagnosis = bayesrl.diagnose(jax.random.key(1), posterior)
    assert diagnosis.verdict == "fail"
    bayesrl.write_report(jax.random.key(2), tmp_path / "report.html", posterior)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    for text in (str(diagnosis), page, str(posterior)):
        assert not any(option in text for option in ("num_steps=", "num_restarts=", "learning_rate=", "bayesrl.fit("))
    assert "bayesrl.Posterior.at(policy, guide, params, *args, beta=0.5)" in page
    assert "trained elsewhere" in str(posterior)


def test_errors_say_where_a_posterior_comes_from() -> None:
    wrong: Any = 1
    with pytest.raises(EngineError, match=r"use a Posterior, as bayesrl\.fit, bayesrl\.load or Posterior\.at gives it"):
        bayesrl.evidence(KEY, wrong)


def test_an_optimum_that_the_fit_exceeds_is_refused() -> None:
    posterior = bayesrl.Posterior.at(bandit, table_guide, probabilities(), beta=BETA)
    number: Any = 0.2
    with pytest.raises(EngineError, match=r"optimum=0\.2; use a function that returns J\* .* such as lambda beta:"):
        bayesrl.evidence(KEY, posterior, optimum=number)
    with pytest.raises(EngineError, match=r"optimum gave J\* = 0\.2 for beta=0\.5, but the fit has J ≥ 0\.5.*give J\*"):
        bayesrl.evidence(KEY, posterior, optimum=lambda beta: 0.2)

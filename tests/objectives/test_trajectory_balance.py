"""Trajectory balance: on-policy the gradient of reverse KL; off-policy its fixed point is p*, without any draw of q."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from jax import Array
from numpyro import handlers
from numpyro.contrib.control_flow import scan
from numpyro.infer import SVI
from oracles import ORACLES, Oracle, Params

import bayesrl
from bayesrl.compilation.jit import closure_jit
from bayesrl.core.draws import Draws
from bayesrl.core.programs import Programs
from bayesrl.core.structure import inspect
from bayesrl.errors import FitError, ObjectiveError
from bayesrl.objectives import TrajectoryBalance
from bayesrl.objectives.trajectory_balance import LOG_Z

K_SIGMA = 6.0
OFF_POLICY = {"num_particles": 64, "prior_fraction": 1.0}


def pair_of(oracle: Oracle) -> tuple[Programs, Params]:
    structure = inspect(jax.random.key(0), oracle.policy, *oracle.args)
    args = jax.tree.map(jnp.asarray, oracle.args)
    return Programs(oracle.policy, oracle.guide, structure, args, {}), jax.tree.map(jnp.asarray, oracle.params)


def fitted(oracle: Oracle, objective: TrajectoryBalance, steps: int = 800, **options: Any) -> bayesrl.Posterior:
    return bayesrl.fit(
        jax.random.key(3),
        oracle.policy,
        *oracle.args,
        beta=oracle.beta,
        guide=oracle.guide,
        objective=objective,
        learning_rate=0.1,
        num_steps=steps,
        progress=False,
        **options,
    )


@pytest.mark.parametrize("form", ["learned", "variance", "pairs"])
def test_on_policy_its_mean_gradient_is_that_of_reverse_kl(form: Any) -> None:
    """5 coordinates within K_SIGMA = 6 standard errors of means over 4,000 gradients: 1e-8 false alarms."""
    oracle = ORACLES["flat"]()
    programs, params = pair_of(oracle)
    objective = TrajectoryBalance(16, form=form)
    own = {LOG_Z: jnp.asarray(0.7)} if form == "learned" else {}  # log Z is a baseline, so any will do

    @jax.jit
    @jax.vmap
    def one(key: Array) -> Params:
        return jax.grad(lambda p: -oracle.beta * objective.evaluate(key, p | own, programs, oracle.beta)[0])(params)

    found = jax.tree.map(np.asarray, one(jax.random.split(jax.random.key(2), 4000)))
    wanted = jax.jit(jax.grad(oracle.objective))(params)
    for site, value in wanted.items():
        mean, error = found[site].mean(0), found[site].std(0) / 4000**0.5
        assert np.abs(value).max() > 20 * error.max(), "the test would see another gradient"
        assert (np.abs(mean - value) <= K_SIGMA * error + 1e-5).all()


@pytest.mark.parametrize("name", ["flat", "dependent", "chain", "contexts"])
def test_draws_of_the_prior_leave_p_star_where_it_is(name: str) -> None:
    """At p* every draw has w = log Z: loss and gradient are rounding, wherever the draws come from."""
    oracle = ORACLES[name]()
    programs, params = pair_of(oracle)
    assert oracle.best is not None
    best = {site: jnp.asarray(value, params[site].dtype) for site, value in oracle.best.items()}
    exact = bayesrl.enumerate_posterior(oracle.policy, *oracle.args, beta=oracle.beta)
    best[LOG_Z] = jnp.asarray(exact.log_evidence.mean, float)  # read by the learned form alone
    objectives = [TrajectoryBalance(form=form, **OFF_POLICY) for form in ("learned", "variance", "pairs")]

    def losses(params: Params) -> tuple[Array, Array]:
        # The forms differ in what they make of the same draws.
        draws = objectives[0].draw(jax.random.key(5), params, programs)
        found = jnp.stack([one.surrogate(params, draws, programs, oracle.beta)[0] for one in objectives])
        return found, found

    look = jax.jit(jax.jacrev(losses, has_aux=True))
    (slope, there), (other, elsewhere) = look(best), look(best | params)
    for i, objective in enumerate(objectives):
        assert float(there[i]) < 1e-9, objective
        assert float(elsewhere[i]) > 1e-3, objective
        for site in params:
            assert np.abs(slope[site][i]).max() < 1e-4 * np.abs(other[site][i]).max(), objective


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("flat", {"form": "learned"}),
        ("contexts", {"form": "learned"}),
        ("dependent", {"form": "pairs"}),
        ("chain", {"form": "variance"}),
        ("chain", {"form": "subtrajectory"}),
        ("episode", {"form": "subtrajectory"}),  # an action before the scan, and a reward after it
    ],
)
def test_from_draws_of_the_prior_alone_it_finds_p_star(name: str, options: dict[str, Any]) -> None:
    """The exact gap of the fit, against J* by sums written out by hand; log Z too where it is learnt."""
    oracle = ORACLES[name]()
    posterior = fitted(oracle, TrajectoryBalance(**OFF_POLICY, **options))
    start = oracle.value(oracle.params)
    gap = oracle.optimum - oracle.value({site: value[0] for site, value in posterior.params.items()})
    bound = 1e-2 if options["form"] == "subtrajectory" else 1e-4  # its network of log F is only nearly right
    assert -1e-5 < gap < bound * (oracle.optimum - start)
    log_z = float(posterior.history["metrics/log_z"][-1, 0])
    assert log_z == pytest.approx(oracle.log_evidence, abs=0.02)
    assert set(posterior.params) == set(oracle.params), "log Z belongs to the objective, not to the posterior"


def run_two_chains(table: Array) -> None:
    """Draw by logits [T, 2 contexts, 3 states, 3 arms]."""
    plate = numpyro.plate("n", 2)

    def step(state: Array, logits: Array) -> tuple[Array, None]:
        with plate as i:
            arm = numpyro.sample("arm", dist.Categorical(logits=logits[i, state]))
            bayesrl.reward("payoff", jnp.array([[0.0, 1.0, 0.5], [1.0, -1.0, 0.0]])[i, (arm + state) % 3])
        return (state + arm) % 3, None

    scan(step, jnp.zeros(2, int), table)


def two_chains() -> None:
    run_two_chains(jnp.zeros((3, 2, 3, 3)))


@bayesrl.guides.PolicyGuide
def tilted_chains() -> None:
    run_two_chains(numpyro.param("table", jnp.zeros((3, 2, 3, 3))))


def test_sub_trajectories_of_several_contexts() -> None:
    """Contexts are worth other things after the same steps; the gap is by enumeration, as a share of J* − J(π₀)."""
    posterior = bayesrl.fit(
        jax.random.key(0),
        two_chains,
        beta=0.5,
        guide=tilted_chains,
        objective=TrajectoryBalance(form="subtrajectory"),
        learning_rate=0.1,
        num_steps=800,
        progress=False,
    )
    best = float(np.mean(np.asarray(bayesrl.enumerate_posterior(two_chains, beta=0.5).optimum)))
    gained = best - float(posterior.history["objective"][0, 0])
    assert float(bayesrl.evidence(jax.random.key(1), posterior).gap.mean) < 0.01 * gained
    assert float(posterior.history["metrics/log_z"][-1, 0]) == pytest.approx(best / 0.5, abs=0.03)


def test_mini_batches_learn_log_z_of_their_own_elements() -> None:
    oracle = ORACLES["subsampled"]()
    posterior = fitted(oracle, TrajectoryBalance(**OFF_POLICY))
    found = oracle.value({site: value[0] for site, value in posterior.params.items()})
    assert oracle.optimum - found < 1e-3


def test_the_history_of_draws_of_the_prior_is_of_the_fit() -> None:
    """J, E[R] and KL of q from 64 batches of 1,024 draws of π₀, within 6 standard errors: 1e-8 false alarms."""
    oracle = ORACLES["dependent"]()
    programs, params = pair_of(oracle)
    objective = TrajectoryBalance(1024, form="variance", prior_fraction=1.0)

    @jax.jit
    @jax.vmap
    def one(key: Array) -> Any:
        info = objective.evaluate(key, params, programs, oracle.beta)[1]
        return info.objective, info.reward - oracle.beta * info.kl, info.metrics["ess"]

    of_q, parts, ess = map(np.asarray, one(jax.random.split(jax.random.key(7), 64)))
    np.testing.assert_allclose(of_q, parts, rtol=1e-4, atol=1e-4)
    error = of_q.std(ddof=1) / 8
    assert abs(of_q.mean() - oracle.value(params)) < K_SIGMA * error + 2e-3  # the bias of self-normalising is 1/1,024
    assert (ess < 0.999).all()


def test_several_temperatures_and_restarts_learn_their_own_log_z() -> None:
    oracle = ORACLES["flat"]()
    betas = np.array([0.3, 1.0])
    many = replace(oracle, beta=betas)
    posterior = fitted(many, TrajectoryBalance(**OFF_POLICY), num_restarts=2)
    exact = bayesrl.enumerate_posterior(oracle.policy, beta=betas).log_evidence.mean
    np.testing.assert_allclose(posterior.history["metrics/log_z"][-1], np.tile(np.reshape(exact, (2, 1)), 2), atol=1e-2)


def counts() -> None:
    x = numpyro.sample("x", dist.Poisson(200.0))
    bayesrl.reward("payoff", -0.5 * jnp.log(x / 220.0) ** 2)


def test_large_counts_from_the_prior() -> None:
    """log Z by summing the counts, 200 or so, whose densities are sums of huge terms."""
    x = np.arange(100, 320)
    log_prior = x * np.log(200.0) - 200.0 - np.array([np.sum(np.log(np.arange(1, n + 1))) for n in x])
    log_z = np.log(np.sum(np.exp(log_prior - 0.5 * np.log(x / 220.0) ** 2 / 0.01)))
    posterior = bayesrl.fit(
        jax.random.key(0),
        counts,
        beta=0.01,
        objective=TrajectoryBalance(256, prior_fraction=0.5),
        num_steps=400,
        progress=False,
    )
    assert float(posterior.history["metrics/log_z"][-1, 0]) == pytest.approx(log_z, abs=0.02)
    assert float(posterior.estimate(jax.random.key(1), 2000).objective.mean[0]) == pytest.approx(0.01 * log_z, abs=3e-4)


def never() -> None:
    arm = numpyro.sample("arm", dist.Categorical(logits=jnp.zeros(3)))
    bayesrl.reward("payoff", jnp.array([0.0, 1.0, -jnp.inf])[arm])


def test_rewards_of_minus_infinity_are_refused_or_clipped() -> None:
    options: dict[str, Any] = {"beta": 1.0, "progress": False, "num_steps": 400}
    with pytest.raises(ObjectiveError, match=r"'payoff' returned -inf .* TrajectoryBalance\(least_log_reward=-20"):
        bayesrl.fit(jax.random.key(0), never, objective=TrajectoryBalance(), **options)
    clipped = TrajectoryBalance(least_log_reward=-6.0, prior_fraction=1.0)
    posterior = bayesrl.fit(jax.random.key(0), never, objective=clipped, **options)
    weights = np.exp([0.0, 1.0, -6.0])
    found = np.exp(np.asarray(posterior.log_prob({"arm": jnp.arange(3)})[0], float))
    np.testing.assert_allclose(found, weights / weights.sum(), atol=1e-4)


def test_a_run_with_its_own_parameters_goes_on_and_is_loaded(tmp_path: Path) -> None:
    def bandit() -> None:
        bayesrl.reward("payoff", 1.0 * numpyro.sample("arm", dist.Categorical(logits=jnp.zeros(3))))

    options: dict[str, Any] = {"beta": 1.0, "objective": TrajectoryBalance(8), "progress": False}
    whole = bayesrl.fit(jax.random.key(0), bandit, num_steps=60, directory=tmp_path / "whole", **options)
    stop = {"callback": lambda row: int(row["step"]) >= 30}
    bayesrl.fit(jax.random.key(0), bandit, num_steps=60, directory=tmp_path / "cut", **options, **stop)
    resumed = bayesrl.resume(tmp_path / "cut", bandit, progress=False)
    loaded = bayesrl.load(tmp_path / "whole", bandit)
    for other in (resumed, loaded):
        assert set(other.params) == set(whole.params)
        for name, value in whole.params.items():
            np.testing.assert_array_equal(other.params[name], value)
    state = bayesrl.init(jax.random.key(0), bandit, beta=1.0, objective=TrajectoryBalance(8))
    assert LOG_Z in state.train.params
    bayesrl.Posterior.at(bandit, state.guide, state.params, beta=1.0)


def test_numpyros_svi_takes_the_variance_and_not_a_log_z_of_its_own() -> None:
    oracle = ORACLES["flat"]()
    target = bayesrl.tilt(oracle.policy, oracle.beta)
    svi = SVI(target, oracle.guide, numpyro.optim.Adam(0.1), TrajectoryBalance(form="variance"))
    result = svi.run(jax.random.key(0), 300, progress_bar=False)
    assert oracle.optimum - oracle.value(result.params) < 1e-2
    with pytest.raises(ObjectiveError, match="form='variance'"):
        SVI(target, oracle.guide, numpyro.optim.Adam(0.1), TrajectoryBalance()).run(
            jax.random.key(0), 1, progress_bar=False
        )


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"form": "variance", "num_particles": 1}, "compares draws with each other, and has 1; use at least 2"),
        ({"form": "pairs", "num_particles": 1}, "use at least 2"),
        ({"form": "detailed"}, "got form='detailed'"),
        ({"prior_fraction": 1.5}, "got prior_fraction=1.5"),
        ({"decay": 0.5}, "only form='subtrajectory' weighs"),
        ({"form": "variance", "log_z_rate": 2.0}, "no log Z to learn"),
        ({"form": "subtrajectory", "decay": 0.0}, "got decay=0.0"),
        ({"least_log_reward": -np.inf}, "got least_log_reward=-inf"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ObjectiveError, match=message):
        TrajectoryBalance(**options)


def no_scan() -> None:
    bayesrl.reward("payoff", 1.0 * numpyro.sample("arm", dist.Bernoulli(0.5)))


def discounted() -> None:
    with handlers.scale(scale=0.5):
        arm = numpyro.sample("arm", dist.Bernoulli(0.5))
    bayesrl.reward("payoff", 0.5 * arm)


def narrow() -> None:
    numpyro.sample("x", dist.Uniform(0.0, numpyro.param("width", jnp.asarray(0.5))))


def wide() -> None:
    bayesrl.reward("payoff", numpyro.sample("x", dist.Uniform(0.0, 1.0)))


def learned_model() -> None:
    x = numpyro.sample("x", dist.Normal(numpyro.param("mean", jnp.asarray(0.0)), 1.0))
    numpyro.sample("y", dist.Normal(x, 1.0), obs=1.0)


@pytest.mark.parametrize(
    ("program", "guide", "objective", "message"),
    [
        (
            no_scan,
            None,
            TrajectoryBalance(form="subtrajectory"),
            r"needs the steps of one scan, and \['arm'\] are drawn",
        ),
        (discounted, None, TrajectoryBalance(), "site 'arm' is discounted"),
        (wide, narrow, TrajectoryBalance(prior_fraction=0.5), "draws of the prior probability 0 at site 'x'"),
        (learned_model, None, TrajectoryBalance(), "has parameters of its own to learn; use ReverseKL"),
        ("chain_with_nature", None, TrajectoryBalance(), "would tilt environment site 'state'"),
    ],
)
def test_programs_whose_fixed_point_would_not_be_p_star_are_refused(
    program: Any, guide: Any, objective: TrajectoryBalance, message: str
) -> None:
    policy = ORACLES[program]().policy if isinstance(program, str) else program
    beta = None if program is learned_model else 1.0
    with pytest.raises(ObjectiveError, match=message):
        bayesrl.fit(jax.random.key(0), policy, beta=beta, guide=guide, objective=objective, num_steps=1, progress=False)


def test_one_draw_of_a_source_has_no_variance() -> None:
    def single(key: Array, params: Any, programs: Programs) -> Draws:
        return programs.draw(key, params, 1)

    with pytest.raises(ObjectiveError, match="compares draws with each other, and has 1"):
        bayesrl.fit(
            jax.random.key(0),
            no_scan,
            beta=1.0,
            objective=TrajectoryBalance(form="variance"),
            source=single,
            num_steps=1,
            progress=False,
        )


def test_a_source_of_draws_that_the_guide_cannot_make_is_told() -> None:
    def program() -> None:
        bayesrl.reward("payoff", 1.0 * numpyro.sample("arm", dist.Categorical(logits=jnp.zeros(2))))

    def one_armed() -> None:
        numpyro.sample("arm", dist.Categorical(logits=numpyro.param("logits", jnp.array([0.0, -jnp.inf]))))

    def of_prior(key: Array, params: Any, programs: Programs) -> Draws:
        return closure_jit(lambda key: replace(programs, guide=None).draw(key, {}, 8))(key)

    with pytest.raises(FitError, match="policy or guide give draws of the source probability 0"):
        bayesrl.fit(
            jax.random.key(0),
            program,
            beta=1.0,
            guide=one_armed,
            objective=TrajectoryBalance(),
            source=of_prior,
            num_steps=20,
            progress=False,
        )


def test_a_source_of_another_policy_is_refused() -> None:
    oracle = ORACLES["flat"]()
    programs, params = pair_of(oracle)
    foreign = programs.draw(jax.random.key(0), params, 4)

    def other() -> None:
        bayesrl.reward("payoff", 1.0 * numpyro.sample("other", dist.Bernoulli(0.5)))

    with pytest.raises(FitError, match=r"draws of \['arm'\] without site 'other': they are of another policy"):
        bayesrl.fit(
            jax.random.key(0),
            other,
            beta=1.0,
            objective=TrajectoryBalance(),
            source=lambda key, params, programs: foreign,
            num_steps=1,
            progress=False,
        )

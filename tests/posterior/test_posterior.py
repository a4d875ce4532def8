"""What a posterior says of itself, against exact values."""

from dataclasses import replace
from functools import cache
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
from numpyro.infer.util import log_density as numpyro_log_density
from oracles import ORACLES, Still, standing
from scipy.special import log_softmax, softmax

import bayesrl
from bayesrl.errors import PolicyError
from bayesrl.posterior.from_params import with_draws

KEY = jax.random.key(12)
K_SIGMA = 5.0  # fewer than 100 comparisons with an estimate: false-alarm rate below 100 × 6e-7 = 6e-5


@cache
def stands(name: str) -> bayesrl.Posterior:
    """A posterior away from the prior and from the optimum: its estimates have noise."""
    return with_draws(KEY, standing(KEY, ORACLES[name]()))


def short_fit(name: str, num_steps: int = 3, **options: Any) -> bayesrl.Posterior:
    """A fit that has not converged."""
    oracle = ORACLES[name]()
    given = {"beta": oracle.beta, "guide": oracle.guide, "optimizer": optax.adam(0.3), "progress": False}
    return bayesrl.fit(KEY, oracle.policy, *oracle.args, num_steps=num_steps, **given | options)


def lane(params: Any, *index: int) -> Any:
    return jax.tree.map(lambda x: x[index], params)


@pytest.fixture(scope="module")
def sweep() -> bayesrl.Posterior:
    return short_fit("flat", beta=jnp.array([0.3, 1.0]), num_restarts=3)


@pytest.mark.parametrize("name", ["flat", "chain", "chain_with_nature", "contexts", "subsampled", "hidden", "gaussian"])
def test_estimates_are_right(name: str) -> None:
    oracle = ORACLES[name]()
    posterior = stands(name)
    estimates = posterior.estimate(KEY, 20_000)
    exact = oracle.value(lane(posterior.params, 0))
    objective = estimates.objective
    assert objective.mean.shape == (1,)
    assert 0 < float(objective.se[0]) < 0.05
    assert abs(float(objective.mean[0]) - exact) < K_SIGMA * float(objective.se[0])
    assert float(objective.mean[0]) == pytest.approx(
        float(estimates.reward.mean[0] - oracle.beta * estimates.kl.mean[0]), abs=1e-4
    )


def test_the_standard_error_is_that_of_repetitions() -> None:
    """Over 60 repetitions the spread of the mean is the reported error, within 40% (5 sd of a spread of 60)."""
    posterior = stands("chain")
    means, errors = jax.jit(jax.vmap(lambda key: posterior.estimate(key, 200).objective))(jax.random.split(KEY, 60))
    assert float(means.std() / errors.mean()) == pytest.approx(1.0, abs=0.46)


def test_shapes(sweep: bayesrl.Posterior) -> None:
    assert sweep.batch_shape == (2, 3)
    assert sweep.sample(KEY, 11)["arm"].shape == (2, 3, 11)
    assert sweep.estimate(KEY, 11).kl.mean.shape == (2, 3)
    assert sweep.draws["arm"].shape == (2, 3, 1000)
    assert sweep.statistics["log_weight"].shape == (2, 3, 1000)
    assert sweep.prior_draws["arm"].shape == (1000,)
    assert sweep.log_prob({"arm": jnp.arange(5)}).shape == (2, 3, 5)
    one = stands("subsampled")
    assert one.sample(KEY, 7)["arm"].shape == (1, 7, 2)
    assert stands("chain_with_nature").sample(KEY, 7)["state"].shape == (1, 7, 4)


def test_prior_draws_are_of_the_prior_and_not_of_the_fit() -> None:
    """They are of the guide at its start. At 1,000 draws each mean lies within five standard errors."""

    def two() -> None:
        arm = numpyro.sample("arm", dist.Categorical(probs=jnp.array([0.7, 0.2, 0.1])))
        size = numpyro.sample("size", dist.Gamma(2.0, 1.0 + arm))
        bayesrl.reward("both", arm + size)

    fit = bayesrl.fit(KEY, two, beta=2.0, num_steps=300, progress=False)
    arms, sizes = np.asarray(fit.prior_draws["arm"]), np.asarray(fit.prior_draws["size"], float)
    for arm, share in enumerate((0.7, 0.2, 0.1)):
        assert (arms == arm).mean() == pytest.approx(share, abs=5 * np.sqrt(share * (1 - share) / 1000))
    scaled = sizes * (1.0 + arms)
    assert scaled.mean() == pytest.approx(2.0, abs=5 * np.sqrt(2 / 1000))
    assert np.log(scaled).mean() == pytest.approx(1 - np.euler_gamma, abs=5 * np.sqrt((np.pi**2 / 6 - 1) / 1000))
    assert np.asarray(fit.draws["size"]).mean() > sizes.mean() + 0.5

    def other() -> None:
        arm = numpyro.sample("arm", dist.Categorical(probs=jnp.array([0.1, 0.2, 0.7])))
        size = numpyro.sample("size", dist.Gamma(2.0, 1.0 + arm))
        bayesrl.reward("both", arm + size)

    assert fit.programs is not None
    again = bayesrl.fit(KEY, other, beta=2.0, guide=fit.programs.guide, num_steps=2, progress=False)
    arms = np.asarray(again.prior_draws["arm"])
    assert (arms == 2).mean() == pytest.approx(0.7, abs=5 * np.sqrt(0.21 / 1000)), "and not of the guide's own policy"


def test_metrics_are_estimated() -> None:
    def policy() -> None:
        arm = numpyro.sample("arm", dist.Categorical(logits=jnp.zeros(4)))
        numpyro.deterministic("even", arm % 2 == 0)
        bayesrl.reward("payoff", 0.0)

    def guide() -> None:
        numpyro.sample(
            "arm", dist.Categorical(logits=numpyro.param("logits", jnp.log(jnp.array([0.4, 0.3, 0.2, 0.1]))))
        )

    posterior = bayesrl.fit(KEY, policy, beta=1.0, guide=guide, objective=Still(), num_steps=1, progress=False)
    mean, error = posterior.estimate(KEY, 5000).metrics["even"]
    assert abs(float(mean[0]) - 0.6) < K_SIGMA * float(error[0])
    assert float(error[0]) == pytest.approx((0.24 / 5000) ** 0.5, rel=0.05)


def test_log_prob(sweep: bayesrl.Posterior) -> None:
    exact = jax.nn.log_softmax(sweep.params["arm_logits"])
    assert np.allclose(sweep.log_prob({"arm": jnp.arange(5)}), exact, atol=1e-5)
    chain = stands("chain_with_nature")
    table = jax.nn.log_softmax(chain.params["table"][0])
    actions, states = np.array([[0, 1, 1, 0]]), np.array([[2, 0, 1, 1]])
    before = [0, 2, 0, 1]
    expected = sum(float(table[t, before[t], actions[0, t]]) for t in range(4))
    found = chain.log_prob({"action": jnp.asarray(actions), "state": jnp.asarray(states)})
    assert float(found[0, 0]) == pytest.approx(expected, abs=1e-4)
    with pytest.raises(PolicyError, match="no value for site 'state'"):
        chain.log_prob({"action": jnp.asarray(actions)})


def test_new_arguments() -> None:
    """The fitted policy on other payoffs: rewards change as they should, the policy does not."""
    posterior = stands("contexts")
    other = jnp.arange(12.0).reshape(4, 3)
    q = jax.nn.softmax(posterior.params["table"][0])
    mean, error = posterior.estimate(KEY, 20_000, other).reward
    assert abs(float(mean[0]) - float((q * other).sum(-1).mean())) < K_SIGMA * float(error[0])


def test_select(sweep: bayesrl.Posterior) -> None:
    one = sweep.select(beta=1.0, restart=2)
    assert one.beta == 1.0
    assert one.batch_shape == (1,)
    np.testing.assert_array_equal(one.params["arm_logits"][0], sweep.params["arm_logits"][1, 2])
    np.testing.assert_array_equal(one.draws["arm"][0], sweep.draws["arm"][1, 2])
    np.testing.assert_array_equal(one.history["loss"][:, 0], sweep.history["loss"][:, 1, 2])
    best = sweep.select(restart="best")
    index = np.argmax(sweep.objective_by_restart(), -1)
    assert best.batch_shape == (2, 1)
    for i in range(2):
        np.testing.assert_array_equal(best.params["arm_logits"][i, 0], sweep.params["arm_logits"][i, index[i]])
    for wrong, part in (({"beta": 0.5}, "choose from 0.3, 1"), ({"restart": 3}, "0 to 2"), ({"restart": -1}, "0 to 2")):
        with pytest.raises(PolicyError, match=part):
            sweep.select(**wrong)  # type: ignore[arg-type]
    with pytest.raises(PolicyError, match=r"choose one with posterior\.select"):
        _ = sweep.policy


@pytest.fixture(scope="module", params=[False, True], ids=["one-beta", "two-betas"])
def split_modes(request: pytest.FixtureRequest) -> bayesrl.Posterior:
    """Two restarts that hold one of two equal modes each."""

    def policy() -> None:
        arm = numpyro.sample("arm", dist.Categorical(logits=jnp.zeros(4)))
        bayesrl.reward("payoff", jnp.array([0.0, -40.0, -40.0, 0.0])[arm])

    def guide() -> None:
        numpyro.sample("arm", dist.Categorical(logits=numpyro.param("logits", jnp.zeros(4))))

    betas = jnp.array([1.0, 2.0]) if request.param else 1.0
    posterior = bayesrl.fit(
        KEY, policy, beta=betas, guide=guide, objective=Still(), num_steps=1, num_restarts=2, progress=False
    )
    logits = jnp.array([[0.0, -40.0, -40.0, -30.0], [-30.0, -40.0, -40.0, 0.0]])
    params = {"logits": jnp.broadcast_to(logits, posterior.params["logits"].shape)}
    return with_draws(KEY, replace(posterior, params=params))


def test_a_mixture_holds_both_modes(split_modes: bayesrl.Posterior) -> None:
    """KL(q‖p*) is log 2 for each restart and 0 for their mixture, to float precision."""
    beta = np.asarray(split_modes.beta)
    optimum = beta * np.log(0.5)
    apart = split_modes.estimate(KEY, 500).objective
    assert np.allclose((optimum[..., None] - apart.mean) / beta[..., None], np.log(2), atol=1e-4)
    mixture = split_modes.select(restart="mixture")
    together = mixture.estimate(KEY, 500).objective
    assert together.mean.shape == (*beta.shape, 1)
    assert np.allclose(together.mean[..., 0], optimum, atol=1e-4)
    assert np.allclose(together.se, 0, atol=1e-4)
    shares = (mixture.sample(KEY, 4000)["arm"] == 0).mean(-1)
    assert np.allclose(shares, 0.5, atol=K_SIGMA * 0.5 / 4000**0.5)
    assert np.allclose(jnp.exp(mixture.log_prob({"arm": jnp.array([0, 3])})), 0.5, atol=1e-4)


def test_a_mixture_is_weighted_by_the_objective() -> None:
    """A restart that is worse by β·log 3 gets a third of the weight of the better one."""
    posterior = short_fit("flat", num_restarts=2)
    beta = float(posterior.beta)  # type: ignore[arg-type]
    weight = jnp.zeros((1000,))
    posterior = replace(
        posterior, statistics={**posterior.statistics, "log_weight": jnp.stack([weight, weight - jnp.log(3.0)])}
    )
    assert np.allclose(posterior.select(restart="mixture").mixture, [0.75, 0.25])
    assert beta > 0


@pytest.mark.parametrize("name", ["flat", "dependent", "chain", "chain_with_nature", "contexts", "observable", "mixed"])
def test_the_fitted_policy_is_a_program(name: str) -> None:
    """Its log-density is log q plus nature's; its rewards are the policy's."""
    oracle = ORACLES[name]()
    posterior = stands(name)
    args = tuple(map(jnp.asarray, oracle.args))
    program = posterior.policy
    sites = {site: value[0] for site, value in posterior.sample(KEY, 8).items()}
    latent = {site: sites[site] for site in posterior.programs.structure.names("action", "environment")}  # type: ignore[union-attr]

    def both(values: dict[str, Array]) -> tuple[Array, Array, Array]:
        fitted = bayesrl.log_density(program, values, *args, beta=oracle.beta)
        original = bayesrl.log_density(oracle.policy, values, *args, beta=oracle.beta)
        reference, _ = numpyro_log_density(bayesrl.tilt(program, oracle.beta), args, {}, values)
        return fitted, original, reference  # type: ignore[return-value]

    fitted, original, reference = jax.jit(jax.vmap(both))(latent)
    assert np.allclose(fitted.log_prior, posterior.log_prob(latent, *args)[0], atol=1e-4)
    assert np.allclose(fitted.log_nature, original.log_nature, atol=1e-5)
    assert np.allclose(fitted.total_reward, original.total_reward, atol=1e-5)
    assert np.allclose(fitted.log_target.reshape(8, -1).sum(-1), reference, atol=1e-3)


def test_the_fitted_policy_is_the_next_prior() -> None:
    """Tilting twice by R/β is tilting once by 2R/β: within a KL of 1e-3 nats."""
    oracle = ORACLES["flat"]()
    options = {"optimizer": optax.adam(optax.cosine_decay_schedule(0.1, 2000)), "num_steps": 2000}
    first = short_fit("flat", **options)
    second = bayesrl.fit(KEY, first.policy, beta=oracle.beta, guide=oracle.guide, progress=False, **options)
    expected = log_softmax(2 * np.asarray(oracle.best["arm_logits"]) - np.asarray(handlers_prior()))  # type: ignore[index]
    log_q = log_softmax(np.asarray(second.params["arm_logits"][0], float))
    assert (np.exp(log_q) * (log_q - expected)).sum() < 1e-3


def handlers_prior() -> Array:
    """The prior logits of the flat problem, read off its program."""
    trace = handlers.trace(handlers.seed(ORACLES["flat"]().policy, rng_seed=0)).get_trace()
    return trace["arm"]["fn"].logits


def test_act_draws_from_the_fitted_policy() -> None:
    posterior = stands("flat")
    arms = np.asarray(jax.jit(jax.vmap(posterior.act))(jax.random.split(KEY, 4000)))
    q = softmax(np.asarray(posterior.params["arm_logits"][0], float))
    for arm in range(5):
        error = float((q[arm] * (1 - q[arm]) / 4000) ** 0.5)
        assert abs((arms == arm).mean() - q[arm]) < K_SIGMA * error
    several = stands("dependent").act(KEY)
    assert set(several) == {"a", "b"}
    assert stands("contexts").act(KEY, jnp.ones((4, 3))).shape == (4,)


def test_datatree_holds_what_the_posterior_holds(sweep: bayesrl.Posterior) -> None:
    tree = bayesrl.to_datatree(sweep)
    for group, values in (("posterior", sweep.draws), ("sample_stats", sweep.statistics)):
        for name, array in values.items():
            np.testing.assert_array_equal(tree[group][name].transpose("beta", "chain", "draw", ...).values, array)
    np.testing.assert_array_equal(
        tree["training"]["loss"].transpose("step", "beta", "chain").values, sweep.history["loss"]
    )
    assert tree["posterior"].coords["beta"].values.tolist() == pytest.approx([0.3, 1.0])


def test_too_few_samples_are_refused(sweep: bayesrl.Posterior) -> None:
    with pytest.raises(PolicyError, match=r"num_samples=1.*at least 2"):
        sweep.estimate(KEY, 1)

"""Models of the unknown: exact posteriors against the programs themselves, planning against exact planning."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
import scipy.stats
from numpyro import handlers
from numpyro.infer.util import log_density

import bayesrl
from bayesrl import control
from bayesrl.control import ArmsModel, EnsembleValues, LastLayerValues, LinearValues, TabularModel, bandits
from bayesrl.control.bandits.arms import Bandit
from bayesrl.control.environments.tabular_examples import n_chain
from bayesrl.control.exploration.beliefs import sample_dirichlet
from bayesrl.control.learning.adapters import adapt_environment
from bayesrl.control.learning.env_adapter import EpisodePolicy
from bayesrl.control.learning.models.base import conjugate_inference
from bayesrl.control.learning.replay_memory import Experience, ReplayMemory
from bayesrl.errors import ControlError

KEY = jax.random.key(0)


def lived(mdp: control.TabularMDP, *, episodes: int = 6, seed: int = 0) -> tuple[Experience, Any]:
    """Play at random, and give the experience with its world."""
    world = adapt_environment(mdp)
    rng = np.random.default_rng(seed)
    memory = ReplayMemory(world.shape, world.dtype, episodes * world.max_steps + 5)
    for k in range(episodes):
        act = EpisodePolicy(lambda t, s, allowed: (int(rng.integers(mdp.num_actions)), np.nan))
        memory.add(world.play(jax.random.fold_in(KEY, k), act), mdp.discount)
    return memory.experience(), world


def rows(observation: Any, action: Any, reward: Any, *, returns: Any = None) -> Experience:
    """Give experience of single steps."""
    count = len(action)
    return Experience(
        jnp.asarray(observation),
        jnp.asarray(action),
        jnp.asarray(reward, float),
        jnp.asarray(observation),
        jnp.ones(count, bool),
        jnp.asarray(reward if returns is None else returns, float),
        jnp.zeros(count, int),
        jnp.ones(count, bool),
    )


def joint(model: Any, experience: Experience, sites: dict[str, Any]) -> Any:
    seeded = handlers.seed(handlers.block(model, hide_fn=lambda m: m["type"] == "deterministic"), rng_seed=0)
    return log_density(seeded, (experience,), {}, sites)[0]


def each(ratio: Any, draws: Any) -> np.ndarray:
    """Apply to every draw, by one program."""
    return np.asarray(jax.jit(lambda draws: jax.lax.map(ratio, draws))(draws))


def quick(method: Any, *args: Any) -> Any:
    """Call by one program, and not by one for each operation; whole numbers are static."""
    return jax.jit(method, static_argnums=[i for i, arg in enumerate(args) if isinstance(arg, int)])(*args)


def absorbed(model: Any, experience: Experience, world: Any) -> Any:
    return quick(model.condition, model.init(KEY, world), experience)


@pytest.mark.parametrize("paid_at_end", [False, True])
def test_tabular_posterior_is_that_of_the_program(paid_at_end: bool) -> None:
    """Where posterior ∝ joint, their log-ratio is the same for every θ: here to 1e-3 nats, in single precision."""
    mdp = control.deep_sea(size=3)
    experience, world = lived(mdp)
    options = {"noise": 0.7, "reward_scale": 1.3, "reward_mean": 0.2, "concentration": np.full((1, 1, 1), 0.8)}
    model = TabularModel.of(mdp, paid_at_end=paid_at_end, **options)
    state = absorbed(model, experience, world)
    concentration, mean, scale = quick(model.posterior, state)

    def ratio(sites: dict[str, Any]) -> Any:
        exact = dist.Dirichlet(concentration).log_prob(sites["transitions"]).sum()
        exact += dist.Normal(mean, scale).log_prob(sites["rewards"]).sum()
        return joint(model, experience, sites) - exact

    assert np.ptp(each(ratio, quick(model.sample, KEY, state, experience, 5))) < 1e-3


@pytest.mark.parametrize(
    "bandit",
    [bandits.BernoulliArms(3, prior_a=2.0), bandits.GaussianArms(3, noise=0.5), bandits.LinearArms(3, num_features=2)],
    ids=["bernoulli", "gaussian", "linear"],
)
def test_posterior_of_arms_is_that_of_the_program(bandit: Bandit) -> None:
    model, rng = ArmsModel(bandit), np.random.default_rng(1)
    world = adapt_environment(bandit)
    seen = rng.normal(size=(20, *world.shape)) if world.shape else np.zeros(20, int)
    experience = rows(seen, rng.integers(3, size=20), rng.integers(2, size=20))
    state = absorbed(model, experience, world)

    def ratio(drawn: Any) -> Any:
        if isinstance(bandit, bandits.BernoulliArms):
            exact = dist.Beta(state.a[0], state.b[0]).log_prob(drawn).sum()
        elif isinstance(bandit, bandits.GaussianArms):
            exact = dist.Normal(state.mean[0], state.variance[0] ** 0.5).log_prob(drawn).sum()
        else:
            exact = dist.MultivariateNormal(state[0][0], precision_matrix=state[1][0]).log_prob(drawn)
        return joint(model, experience, {"instance": drawn}) - exact

    assert np.ptp(each(ratio, quick(model.sample, KEY, state, experience, 6)["instance"])) < 1e-3


def linear_data(num: int = 60) -> tuple[Experience, np.ndarray]:
    rng = np.random.default_rng(2)
    seen = rng.normal(size=(num, 2)).astype(np.float32)
    action = rng.integers(2, size=num)
    truth = np.array([[1.0, -0.5, 0.3], [0.2, 0.8, -0.4]])
    read = np.concatenate([seen, np.ones((num, 1))], 1)
    returns = (read * truth[action]).sum(1) + 0.3 * rng.normal(size=num)
    return rows(seen, action, np.zeros(num), returns=returns), read


def test_the_likeliest_values_are_least_squares_and_the_most_probable_ones_ridge() -> None:
    """The gradient of the program's log density vanishes at the ridge fit, whose penalty is noise²/prior_scale²."""
    experience, read = linear_data()
    action, returns = np.asarray(experience.action), np.asarray(experience.returns, float)
    for prior_scale, tolerance in ((0.7, 1e-3), (1e4, 1e-3)):
        model = LinearValues(num_actions=2, prior_scale=prior_scale, noise=0.3)
        penalty = 0.3**2 / prior_scale**2
        ridge = np.stack(
            [
                np.linalg.solve(
                    read[action == a].T @ read[action == a] + penalty * np.eye(3),
                    read[action == a].T @ returns[action == a],
                )
                for a in (0, 1)
            ]
        )
        state = quick(model.condition, model.empty(experience), experience)
        np.testing.assert_allclose(quick(model.posterior, state)[0], ridge, atol=tolerance)

        def density(weights: Any, model: LinearValues = model) -> Any:
            return joint(model, experience, {"weights": weights})

        slope = jax.jit(jax.grad(density))(jnp.asarray(ridge, float))
        assert np.abs(np.asarray(slope)).max() < 2e-2  # of sums of some hundreds, in single precision
        if prior_scale > 1:
            squares = np.stack(
                [np.linalg.lstsq(read[action == a], returns[action == a], rcond=None)[0] for a in (0, 1)]
            )
            np.testing.assert_allclose(ridge, squares, atol=1e-6)


def test_maximum_likelihood_by_fit_is_the_fit_of_least_squares() -> None:
    experience, read = linear_data()

    def model() -> None:
        weights = numpyro.param("weights", jnp.zeros((2, 3)))
        value = jnp.take_along_axis(jnp.asarray(read, float) @ weights.T, experience.action[:, None], -1)[:, 0]
        numpyro.sample("return", dist.Normal(value, 1.0).to_event(1), obs=experience.returns)

    import optax

    found = bayesrl.fit(KEY, model, optimizer=optax.adam(0.05), num_steps=800, progress=False)
    action, returns = np.asarray(experience.action), np.asarray(experience.returns, float)
    squares = np.stack([np.linalg.lstsq(read[action == a], returns[action == a], rcond=None)[0] for a in (0, 1)])
    np.testing.assert_allclose(found.params["weights"][0], squares, atol=2e-3)


def test_linear_ensembles_are_draws_of_the_posterior() -> None:
    """Lemma 3 of Osband et al. (2018): means within 4.5 standard errors, spreads within 25%, 5 of their own (200 members, fixed keys)."""
    experience, _ = linear_data(num=24)
    ensemble = EnsembleValues(
        num_actions=2, depth=0, prior_scale=1.0, noise=0.5, num_members=200, num_steps=300, learning_rate=0.05
    )
    world = adapt_environment(bandits.LinearArms(2, num_features=2))
    world.shape = (2,)
    state = quick(ensemble.refit, KEY, ensemble.init(KEY, world), experience)
    exact = LinearValues(num_actions=2, prior_scale=1 / 3**0.5, noise=0.5)
    mean, factor = quick(exact.posterior, quick(exact.condition, exact.empty(experience), experience))
    spread = np.sqrt(np.stack([np.diag(np.linalg.inv(f @ f.T)) for f in np.asarray(factor)]))
    members = np.asarray(state.params["layer0"])
    assert (np.abs(members.mean(0) - np.asarray(mean)) < 4.5 * spread / 200**0.5 + 0.03).all()
    np.testing.assert_allclose(members.std(0), spread, rtol=0.25)


def test_the_last_layer_has_the_posterior_of_regression_on_what_lies_below() -> None:
    experience, _ = linear_data()
    model = LastLayerValues(num_actions=2, hidden=8, depth=1, noise=0.3)
    world = adapt_environment(bandits.LinearArms(2, num_features=2))
    world.shape = (2,)
    state = quick(model.refit, KEY, model.init(KEY, world), experience)
    draws = np.asarray(quick(model.sample, KEY, state, experience, 4000)["layer1"], float)
    told = quick(model.values, {**state.params, "layer1": draws[0].astype(np.float32)}, experience)
    assert told.shape == (1, 2)
    read = np.asarray(quick(partial(model.apply, head=False), state.params, experience.observation), float)
    for a in (0, 1):
        mine = read[np.asarray(experience.action) == a]
        precision = mine.T @ mine / 0.3**2 + 8 * np.eye(8)
        center = np.linalg.solve(precision, mine.T @ np.asarray(experience.returns)[np.asarray(experience.action) == a])
        spread = np.sqrt(np.diag(np.linalg.inv(precision)))
        # 16 means within 4.5 standard errors: 1 false alarm in 9,000 keys.
        assert (np.abs(draws[:, a].mean(0) - center / 0.3**2) < 4.5 * spread / 4000**0.5 + 1e-3).all()


@pytest.mark.parametrize("mdp", [control.river_swim(), control.deep_sea(size=4), n_chain(discount=0.9)])
def test_values_are_those_of_exact_planning(mdp: control.TabularMDP) -> None:
    experience, world = lived(mdp)
    model = TabularModel.of(mdp, noise=0.1)
    state = absorbed(model, experience, world)
    exact = control.soft_value_iteration(model.expected(state), 0.0)
    told = np.asarray(quick(model.mean_values, state, experience))
    reached = told != 0
    np.testing.assert_allclose(told[reached], exact.action_value[:, :-1][reached], atol=2e-4)


def test_layers_change_nothing() -> None:
    """A deep sea is solved layer by layer; with an unknown start it is not, and the values agree where one can be."""
    mdp = control.deep_sea(size=4)
    experience, world = lived(mdp)
    narrow = TabularModel.of(mdp)
    wide = TabularModel.of(mdp, start=np.full(mdp.num_states, 1 / mdp.num_states))
    state = absorbed(narrow, experience, world)
    few, all_of_them = (np.asarray(quick(model.mean_values, state, experience)) for model in (narrow, wide))
    assert (few == 0).sum() > (all_of_them == 0).sum()
    np.testing.assert_allclose(few[few != 0], all_of_them[few != 0], rtol=1e-5)


def test_k_learning_bounds_the_expected_optimum() -> None:
    """The bound of the first state is above E[V*] under the posterior, and near it once much is known."""
    mdp = control.river_swim(horizon=10)
    gaps = []
    for episodes in (2, 400):
        experience, world = lived(mdp, episodes=episodes)
        model = TabularModel.of(mdp, noise=0.1)
        state = absorbed(model, experience, world)
        draws = quick(model.sample, KEY, state, experience, 400)
        values = jax.jit(jax.vmap(lambda one, m=model, e=experience: m.values(one, e)))(draws)
        best = np.asarray(values, float)[:, 0, 0].max(-1)
        bound = float(quick(model.cumulants, state).bound)
        assert bound > best.mean() - 4 * best.std() / 20
        gaps.append(bound - best.mean())
    assert gaps[1] < 0.5 * gaps[0]


def test_dirichlets_of_small_concentrations() -> None:
    """Means of 4 coordinates within 4.5 standard errors (false alarm 3e-5), and the spread by Kolmogorov–Smirnov."""
    alpha = jnp.array([0.05, 0.2, 1.0, 4.0])
    drawn = np.asarray(quick(sample_dirichlet, KEY, jnp.broadcast_to(alpha, (20_000, 4))), float)
    assert np.isfinite(drawn).all()
    np.testing.assert_allclose(drawn.sum(-1), 1.0, atol=1e-5)
    total, a = 5.25, np.asarray(alpha, float)
    variance = a * (total - a) / (total**2 * (total + 1))
    assert (np.abs(drawn.mean(0) - a / total) < 4.5 * np.sqrt(variance / 20_000)).all()
    assert scipy.stats.kstest(drawn[:, 3], scipy.stats.beta(4.0, 1.25).cdf).pvalue > 1e-4


def test_simulation_based_calibration() -> None:
    """Ranks of every number of θ, and of log p(y|θ), are uniform."""
    mdp = control.river_swim(num_states=3, horizon=8)
    experience, _ = lived(mdp, episodes=3)
    model = TabularModel(num_states=3, num_actions=2, horizon=8, noise=0.5)
    small = jax.tree.map(lambda x: x[:24], experience)
    told = bayesrl.calibrate(KEY, model, small, infer=conjugate_inference(model), num_replications=100)
    assert told.verdict == "pass"
    arms = ArmsModel(bandits.BernoulliArms(2))
    pulls = rows(np.zeros(12, int), np.arange(12) % 2, np.zeros(12))
    assert bayesrl.calibrate(KEY, arms, pulls, infer=conjugate_inference(arms), num_replications=100).verdict == "pass"


def test_a_table_that_is_told_no_start_can_start_anywhere() -> None:
    """Two corridors of four states each, of which one is not reached from the other."""
    right = np.arange(8) // 4 * 4 + np.minimum(np.arange(8) % 4 + 1, 3)
    left = np.arange(8) // 4 * 4 + np.maximum(np.arange(8) % 4 - 1, 0)
    pairs = np.stack([right, left], 1)[..., None]
    paid = np.zeros((8, 2))
    paid[7] = 1.0
    model = control.TabularModel(num_states=8, num_actions=2, horizon=6, successors=pairs, reward_mean=paid)
    experience = ReplayMemory((), np.int32, 1).experience()
    values = quick(model.mean_values, model.empty(), experience)
    assert values[0, 4].tolist() == [3.0, 2.0]


def test_a_table_refuses_shapes_that_do_not_fit() -> None:
    for options in ({"concentration": np.ones((3, 3))}, {"reward_mean": np.ones((3, 3))}, {"start": [1.0, 0.0]}):
        with pytest.raises(ControlError):
            control.TabularModel(num_states=6, num_actions=2, horizon=2, **options)

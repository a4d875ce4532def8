"""Rollouts as programs: discounting, termination, gradients and fits against exact planning."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest

import bayesrl
from bayesrl.control import (
    ActorCritic,
    CartPole,
    LinearPolicy,
    NetworkPolicy,
    Rollout,
    TablePolicy,
    TabularMDP,
    TabularOptimum,
    evaluate_policy,
    soft_value_iteration,
    tabular_rollout,
)
from bayesrl.control.environments.tabular_rollout import TabularEnvironment, action_probs
from bayesrl.errors import ControlError, EngineError, GuideError, ObjectiveError
from bayesrl.objectives import ReverseKL
from bayesrl.svi.problem_setup import set_up

BETA = 0.5


def small(**options: Any) -> TabularMDP:
    """Three states, the last terminal; two actions; random steps."""
    transitions = np.array(
        [
            [[0.5, 0.4, 0.1], [0.1, 0.6, 0.3]],
            [[0.7, 0.3, 0.0], [0.2, 0.2, 0.6]],
            [[0.0, 0.0, 1.0], [0.0, 0.0, 1.0]],
        ]
    )
    rewards = np.array([[0.0, 0.2], [-0.3, 1.0], [0.0, 0.0]])
    told: dict[str, Any] = {
        "start": np.array([0.6, 0.4, 0.0]),
        "terminal": np.array([False, False, True]),
        "prior": np.array([[0.5, 0.5], [0.7, 0.3], [0.5, 0.5]]),
        "horizon": 4,
        "discount": 0.8,
    }
    return TabularMDP.from_dense(transitions, rewards, **told | options)


def table_of(probs: np.ndarray, mdp: TabularMDP) -> jax.Array:
    return jnp.asarray(np.log(probs) - np.log(mdp.prior), jnp.float32)


def setup_of(mdp: TabularMDP, objective: Any, **options: Any) -> Any:
    guide = TablePolicy(stationary=False)
    return set_up(jax.random.key(0), tabular_rollout(mdp, **options), (), BETA, guide, objective, 1)


def test_draws_are_those_of_the_process() -> None:
    """J, E[R] and KL of a given policy from draws within 4 standard errors of exact planning (false alarm 2e-4)."""
    mdp = small()
    rng = np.random.default_rng(0)
    probs = rng.dirichlet(np.ones(2), (4, 3))
    programs = setup_of(mdp, ActorCritic()).programs
    draws = jax.jit(partial(programs.draw, num_draws=20_000, share=False))(
        jax.random.key(1), {"action$table": table_of(probs, mdp), "critic$table": jnp.zeros((4, 3, 1))}
    )
    totals = draws.totals((20_000,))
    exact = evaluate_policy(mdp, probs, BETA)
    for drawn, truth in (
        (totals.reward, exact.reward),
        (totals.log_q - totals.log_prior, exact.kl),
        (BETA * totals.log_weight(BETA), exact.objective),
    ):
        values = np.asarray(drawn, float)
        assert abs(values.mean() - float(truth)) < 4 * values.std() / np.sqrt(len(values))


def test_nothing_counts_after_the_end() -> None:
    programs = setup_of(small(), ActorCritic()).programs
    draws = jax.jit(partial(programs.draw, num_draws=500))(
        jax.random.key(1), {"action$table": jnp.ones((4, 3, 2)), "critic$table": jnp.zeros((4, 3, 1))}
    )
    states = np.asarray(draws.sites["state"])
    ended = np.concatenate([np.zeros((500, 1), bool), np.cumsum(states == 2, 1)[:, :-1] > 0], 1)
    assert ended.any()
    for scores in (
        draws.log_prior["action"],
        draws.scores["action"],
        draws.rewards["reward"],
        draws.log_nature["state"],
    ):
        assert (np.asarray(scores)[ended] == 0).all()
    np.testing.assert_array_equal(np.asarray(draws.metrics["length"]), (~ended).sum(1))
    weights = np.asarray(draws.guide_metrics["weight$"])
    np.testing.assert_allclose(weights, np.where(ended, 0, 0.8 ** np.arange(4)), rtol=1e-6)


@pytest.mark.parametrize(
    "objective",
    [
        ActorCritic(32, trace=1.0, clip=None),
        ActorCritic(32, trace=1.0, clip=None, step_weights="equal"),
        ReverseKL(32),
        ReverseKL(32, baseline="to_go"),
    ],
    ids=["critic", "equal", "regression", "to_go"],
)
def test_gradients_are_unbiased(objective: Any) -> None:
    """Mean gradient of 400 batches against a derivative of exact J, in standard errors: 24 numbers under 4.5 (2e-4)."""
    mdp = small()
    setup = setup_of(mdp, objective)
    programs, ready = setup.programs, setup.objective
    rng = np.random.default_rng(1)
    table = jnp.asarray(rng.normal(size=(4, 3, 2)), jnp.float32)
    critic = jnp.asarray(rng.normal(size=(4, 3, 1)), jnp.float32)

    def loss(table: jax.Array, key: jax.Array) -> jax.Array:
        value, _ = ready.evaluate(key, {"action$table": table, "critic$table": critic}, programs, BETA)
        return value

    keys = jax.random.split(jax.random.key(2), 400)
    found = np.asarray(jax.jit(jax.vmap(jax.grad(loss), in_axes=(None, 0)))(table, keys), float)
    exact = np.zeros((4, 3, 2))
    for place in np.ndindex(exact.shape):
        ends = []
        for sign in (1, -1):
            moved = np.asarray(table, float)
            moved[place] += sign * 1e-4
            probs = mdp.prior * np.exp(moved)
            ends.append(float(evaluate_policy(mdp, probs / probs.sum(-1, keepdims=True), BETA).objective))
        exact[place] = -(ends[0] - ends[1]) / 2e-4 / BETA
        if getattr(objective, "step_weights", "discounted") == "equal":
            exact[place] /= mdp.discount ** place[0]
    se = found.std(0) / np.sqrt(len(found))
    apart = np.abs(found.mean(0) - exact) / np.maximum(se, 1e-7)
    assert apart.max() < 4.5


def test_a_fit_reaches_the_exact_optimum() -> None:
    mdp = small()
    exact = TabularOptimum(mdp)
    fitted = bayesrl.fit(
        jax.random.key(3),
        tabular_rollout(mdp),
        beta=BETA,
        guide=TablePolicy(stationary=False),
        objective=ActorCritic(trace=1.0),
        num_steps=600,
        progress=False,
    )
    found = bayesrl.evidence(jax.random.key(4), fitted, optimum=exact)
    assert found.relative_gap is not None
    assert float(found.relative_gap.mean) < 0.01
    assert float(found.optimum.mean) == pytest.approx(float(soft_value_iteration(mdp, BETA).objective))
    diagnosis = bayesrl.diagnose(jax.random.key(4), fitted, optimum=exact)
    assert diagnosis.verdict == "pass", str(diagnosis)
    probs = action_probs(fitted.select(restart=0))
    assert probs is not None
    assert np.abs(probs - soft_value_iteration(mdp, BETA).policy)[0, :2].max() < 0.1
    assert fitted.act(jax.random.key(5), jnp.asarray(1)).shape == ()
    for other in ({"horizon": 2}, {"horizon": 9}, {"horizon": None, "discount": 0.5}, {"discount": 0.5}):
        elsewhere = TabularOptimum(mdp.replace(**other))
        message = (
            rf"fitted with horizon={mdp.horizon}, .* and the problem has horizon={elsewhere.mdp.horizon}, discount="
        )
        with pytest.raises(ControlError, match=message):
            bayesrl.evidence(jax.random.key(4), fitted, optimum=elsewhere)


def test_without_a_known_optimum_a_discounted_fit_is_not_judged() -> None:
    fitted = bayesrl.fit(
        jax.random.key(3), tabular_rollout(small()), beta=BETA, guide=TablePolicy(), num_steps=5, progress=False
    )
    found = bayesrl.evidence(jax.random.key(4), fitted)
    assert (found.upper, found.gap) == (None, None)
    assert "'action' is discounted" in found.caveat
    exact = evaluate_policy(small(), small().prior, BETA)
    assert found.prior_objective is not None
    assert abs(float(found.prior_objective.mean) - float(exact.objective)) < 4 * float(found.prior_objective.se)
    with pytest.raises(EngineError, match="'action' is discounted"):
        bayesrl.importance(jax.random.key(4), tabular_rollout(small()), beta=BETA, num_samples=10)
    assert bayesrl.diagnose(jax.random.key(4), fitted).verdict == "unknown"


def test_without_discount_soft_induction_agrees_with_planning() -> None:
    mdp = small(discount=1.0)
    found = bayesrl.enumerate_posterior(tabular_rollout(mdp), beta=BETA)
    assert float(found.optimum) == pytest.approx(float(soft_value_iteration(mdp, BETA).objective), abs=1e-5)


def test_bootstrapping_aims_at_the_endless_problem() -> None:
    """Episodes cut after 8 steps, valued by the critic, come within 2% of the optimum of the problem without end."""
    mdp = small(horizon=None, terminal=np.zeros(3, bool), discount=0.9)
    exact = TabularOptimum(mdp)
    program = tabular_rollout(mdp, horizon=8)
    assert isinstance(program, Rollout)
    assert program.unbounded
    fitted = bayesrl.fit(
        jax.random.key(6),
        program,
        beta=BETA,
        guide=TablePolicy(),
        objective=ActorCritic(trace=0.9),
        num_steps=800,
        progress=False,
    )
    share = bayesrl.evidence(jax.random.key(7), fitted, optimum=exact).relative_gap
    assert share is not None
    assert float(share.mean) < 0.02


class Gauge(bayesrl.control.Environment):
    """One number to be guessed: the reward is −(action − 1)² for a Normal prior; p* is known."""

    def reset(self) -> Any:
        return jnp.zeros(1)

    def step(self, state: Any, action: Any) -> Any:
        return bayesrl.control.Transition(state, -((action - 1.0) ** 2), jnp.asarray(True))

    def prior(self, observation: Any) -> dist.Distribution:
        return dist.Normal(0.0, 1.0)


@pytest.mark.parametrize("guide", [LinearPolicy(), NetworkPolicy(hidden=8, depth=1)], ids=["linear", "network"])
def test_continuous_actions_reach_the_known_posterior(guide: Any) -> None:
    """Prior N(0, 1) tilted by −(x − 1)²/β at β = 2 is N(1/2, 1/2)."""
    fitted = bayesrl.fit(
        jax.random.key(8),
        Rollout(Gauge(), 3),
        beta=2.0,
        guide=guide,
        objective=ActorCritic(64, trace=1.0),
        num_steps=1500,
        progress=False,
    )
    first = np.asarray(fitted.sample(jax.random.key(9), 20_000)["action"])[0, :, 0]
    assert abs(first.mean() - 0.5) < 0.05
    assert abs(first.var() - 0.5) < 0.06


def test_starts_at_the_prior() -> None:
    for guide in (LinearPolicy(), NetworkPolicy(), LinearPolicy(stationary=False)):
        setup = set_up(jax.random.key(0), Rollout(CartPole(), 10), (), 1.0, guide, ActorCritic(), 1)
        draw = jax.jit(partial(setup.programs.draw, num_draws=20))
        draws = draw(jax.random.key(1), jax.tree.map(lambda x: x[0], setup.params))
        np.testing.assert_allclose(draws.log_q["action"], draws.log_prior["action"], atol=1e-6)


def test_a_fitted_policy_is_the_next_prior() -> None:
    mdp = small()
    options: dict[str, Any] = {"guide": TablePolicy(stationary=False), "objective": ActorCritic(), "progress": False}
    first = bayesrl.fit(jax.random.key(0), tabular_rollout(mdp), beta=BETA, num_steps=100, **options)
    probs = action_probs(first.select(restart=0))
    assert probs is not None
    program = Rollout(TabularEnvironment(mdp), 4, 0.8, prior=bayesrl.control.as_prior(first))
    second = bayesrl.fit(jax.random.key(1), program, beta=BETA, num_steps=1, **options)
    held = float(evaluate_policy(mdp, probs, 0.0).reward)
    rewards = np.asarray(second.prior_draws["return"], float)
    assert np.isfinite(held)
    assert abs(
        rewards.mean() - float(evaluate_policy(mdp.replace(discount=1.0), probs, 0.0).reward)
    ) < 4 * rewards.std() / np.sqrt(len(rewards))


BAD: list[tuple[Any, type[Exception], str]] = [
    (lambda: Rollout(3, 5), ControlError, "environment=3; use an Environment"),  # type: ignore[arg-type]
    (lambda: Rollout(CartPole(), 5, prior=3), ControlError, "prior=3; use a function"),  # type: ignore[arg-type]
    (lambda: soft_value_iteration(3, 1.0), ControlError, "mdp=3; use a TabularMDP"),  # type: ignore[arg-type]
    (lambda: Rollout(CartPole(), 0), ControlError, "horizon=0; use a whole number of at least 1"),
    (lambda: Rollout(CartPole(), 5, 0.0), ControlError, r"discount=0.0; use a number.*above 0"),
    (lambda: Rollout(CartPole(), 5, 1.01), ControlError, "discount=1.01"),
    (lambda: ActorCritic(trace=2.0), ObjectiveError, r"trace=2.0; use a number from 0 to 1"),
    (lambda: ActorCritic(clip=-1.0), ObjectiveError, "clip=-1.0"),
    (lambda: ActorCritic(0), ObjectiveError, "num_particles=0"),
    (lambda: NetworkPolicy(hidden=0), GuideError, "hidden=0"),
    (
        lambda: bayesrl.fit(jax.random.key(0), Rollout(CartPole(), 5), beta=1.0, guide=TablePolicy(), num_steps=1),
        GuideError,
        "TablePolicy needs finitely many observations",
    ),
    (
        lambda: bayesrl.fit(
            jax.random.key(0), Rollout(CartPole(), 5), beta=1.0, guide=NetworkPolicy(critic=False),
            objective=ActorCritic(), num_steps=1,
        ),
        ObjectiveError,
        "a guide that values its states",
    ),
    (
        lambda: bayesrl.fit(jax.random.key(0), lambda: None, beta=1.0, guide=TablePolicy()),
        bayesrl.errors.PolicyError,
        "neither a reward nor an observed site",
    ),
    (lambda: tabular_rollout(small(horizon=None)), ControlError, "has no horizon; pass horizon="),
    (lambda: tabular_rollout("FrozenLake-v1"), ControlError, "mdp='FrozenLake-v1'; use a TabularMDP, .*control.from_gymnasium"),  # type: ignore[arg-type]
    (lambda: TabularEnvironment(None), ControlError, "mdp=None; use a TabularMDP"),  # type: ignore[arg-type]
]  # fmt: skip


@pytest.mark.parametrize(("act", "kind", "message"), BAD)
def test_bad_input(act: Any, kind: type[Exception], message: str, unchecked: None) -> None:
    with pytest.raises(kind, match=message):
        act()


@pytest.mark.usefixtures("unchecked")
def test_numbers_of_numpy_are_discounts() -> None:
    """NumPy's single precision is no subclass of float."""
    assert tabular_rollout(small(discount=np.float32(0.5))).discount == 0.5

"""Exact planning: known values, enumeration of all trajectories, and identities that the optimum obeys."""

import itertools

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bayesrl.control import TabularMDP, evaluate_policy, from_gymnasium, grid_world, river_swim, soft_value_iteration
from bayesrl.control.environments.tabular_examples import mdp_from_name
from bayesrl.errors import ControlError

BETAS = [0.0, 1.0, 0.1, 0.01]
KNOWN = {
    "FrozenLake-v1": [0.542026, 0.013029, 0.019292, 0.152841],
    "CliffWalking-v1": [-12.247898, -27.628944, -13.945802, -12.417690],
    "river_swim": [3.397264, 0.061668, 2.105631, 3.264429],
}


def problem(name: str) -> TabularMDP:
    return mdp_from_name(name) if name == "river_swim" else from_gymnasium(name, discount=0.99)


def random_mdp(seed: int, states: int = 4, actions: int = 3, **options: object) -> TabularMDP:
    rng = np.random.default_rng(seed)
    transitions = rng.dirichlet(np.full(states, 0.5), (states, actions))
    rewards = rng.normal(size=(states, actions, states))
    start, prior = rng.dirichlet(np.ones(states)), rng.dirichlet(np.ones(actions), states)
    return TabularMDP.from_dense(transitions, rewards, start=start, prior=prior, **options)


@pytest.mark.parametrize("name", KNOWN)
def test_known_optima_to_five_digits(name: str) -> None:
    found = soft_value_iteration(problem(name), BETAS)
    np.testing.assert_allclose(found.objective, KNOWN[name], atol=6e-7)


@pytest.mark.parametrize("beta", [0.3, 2.0])
def test_all_trajectories(beta: float) -> None:
    """With known nature J* = β·log Z over action sequences; with random nature V is the nested sum of both."""
    mdp = random_mdp(0, states=3, actions=2, horizon=3, discount=0.9)
    dense, earned = mdp.dense(), np.zeros((3, 2, 3))
    np.add.at(earned, (*np.indices(mdp.probabilities.shape)[:2], mdp.successors), mdp.probabilities * mdp.rewards)
    earned = earned / dense

    def best(state: int, left: int) -> float:
        if left == 0:
            return 0.0
        q = [
            sum(dense[state, a, s] * (earned[state, a, s] + 0.9 * best(s, left - 1)) for s in range(3))
            for a in range(2)
        ]
        return float(beta * np.log(sum(mdp.prior[state, a] * np.exp(q[a] / beta) for a in range(2))))

    wanted = sum(mdp.start[s] * best(s, 3) for s in range(3))
    found = soft_value_iteration(mdp, beta)
    assert float(found.objective) == pytest.approx(wanted, abs=1e-12)
    total = apart = 0.0
    for path in itertools.product(range(3), range(2), range(3), range(2), range(3), range(2), range(3)):
        probability, reward, kl = mdp.start[path[0]], 0.0, 0.0
        for t in range(3):
            s, a, after = path[2 * t : 2 * t + 3]
            policy = found.policy[t, s, a]
            probability *= policy * dense[s, a, after]
            reward += 0.9**t * earned[s, a, after]
            kl += 0.9**t * np.log(policy / mdp.prior[s, a])
        total, apart = total + probability * reward, apart + probability * kl
    assert (float(found.reward), float(found.kl)) == (pytest.approx(total, abs=1e-12), pytest.approx(apart, abs=1e-12))


@pytest.mark.parametrize("name", KNOWN)
@pytest.mark.parametrize("beta", [1.0, 0.05])
def test_the_optimum_is_a_fixed_point(name: str, beta: float) -> None:
    mdp = problem(name)
    found = soft_value_iteration(mdp, beta)
    again = evaluate_policy(mdp, found.policy, beta)
    assert float(again.objective) == pytest.approx(float(found.objective), abs=1e-9)
    assert float(found.reward - beta * found.kl) == pytest.approx(float(found.objective), abs=1e-9)
    soft = beta * np.log((mdp.prior * np.exp((found.action_value - found.value[..., None]) / beta)).sum(-1))
    np.testing.assert_allclose(soft[..., ~mdp.terminal], 0, atol=1e-7)


@given(seed=st.integers(0, 10_000), beta=st.floats(0.05, 5), horizon=st.sampled_from([None, 1, 7]))
def test_no_policy_beats_the_optimum(seed: int, beta: float, horizon: int | None) -> None:
    mdp = random_mdp(seed, horizon=horizon, discount=0.9)
    optimum = float(soft_value_iteration(mdp, beta).objective)
    rng = np.random.default_rng(seed + 1)
    for _ in range(5):
        other = rng.dirichlet(np.ones(mdp.num_actions), mdp.num_states)
        assert float(evaluate_policy(mdp, other, beta).objective) <= optimum + 1e-9


@given(seed=st.integers(0, 10_000))
def test_an_array_of_temperatures_is_one_by_one(seed: int) -> None:
    mdp = random_mdp(seed, discount=0.8)
    betas = np.array([[0.0, 0.2], [1.0, 3.0]])
    both = soft_value_iteration(mdp, betas)
    assert both.policy.shape == (2, 2, 4, 3)
    for place, beta in np.ndenumerate(betas):
        alone = soft_value_iteration(mdp, float(beta))
        np.testing.assert_allclose(both.value[place], alone.value, atol=1e-12)
        np.testing.assert_allclose(both.policy[place], alone.policy, atol=1e-12)


def test_the_envelope_theorem() -> None:
    """dJ*/dβ = −KL, by central differences."""
    mdp = problem("FrozenLake-v1")
    for beta in (1.0, 0.05):
        low, high = (float(soft_value_iteration(mdp, beta * f).objective) for f in (0.999, 1.001))
        slope = (high - low) / (0.002 * beta)
        assert slope == pytest.approx(-float(soft_value_iteration(mdp, beta).kl), rel=1e-4)


@pytest.mark.parametrize("horizon", [None, 13])
def test_occupancy_adds_up(horizon: int | None) -> None:
    mdp = random_mdp(3, horizon=horizon, discount=0.9)
    found = evaluate_policy(mdp, mdp.prior, 1.0)
    total = 10.0 if horizon is None else (1 - 0.9**horizon) / 0.1
    assert found.occupancy.sum() == pytest.approx(total)
    assert (found.occupancy * mdp.expected_rewards()).sum() == pytest.approx(float(found.reward))
    assert float(found.kl) == pytest.approx(0, abs=1e-12)


def test_what_the_prior_never_does_costs_infinitely() -> None:
    prior = np.tile([1.0, 0.0, 0.0], (4, 1))
    mdp = random_mdp(5, discount=0.9).replace(prior=prior)
    other = np.tile([0.5, 0.5, 0.0], (4, 1))
    found = evaluate_policy(mdp, other, [0.0, 1.0])
    assert np.isinf(found.kl).all()
    assert np.isfinite(found.reward).all()
    assert found.objective.tolist() == [pytest.approx(float(found.reward[0])), -np.inf]
    np.testing.assert_allclose(soft_value_iteration(mdp, 1.0).policy, prior)


def test_infinite_kl_spreads_where_it_can_be_reached() -> None:
    """A line of 30 states: the last one does what its prior never does, however little γ leaves of that."""
    states = 30
    table = np.zeros((states, 2, states))
    table[np.arange(states), 0, np.minimum(np.arange(states) + 1, states - 1)] = 1
    table[np.arange(states), 1, np.arange(states)] = 1
    prior = np.full((states, 2), 0.5)
    prior[-1] = [1.0, 0.0]
    for horizon, gamma in itertools.product((None, 40), (0.1, 0.0)):
        mdp = TabularMDP.from_dense(table, np.ones((states, 2)), prior=prior, discount=gamma, horizon=horizon)
        even = evaluate_policy(mdp, np.full((states, 2), 0.5), 1.0)
        stay = np.tile([0.0, 1.0], (states, 1))
        stay[-1] = [0.5, 0.5]
        still = evaluate_policy(mdp, stay, 1.0)
        assert float(even.kl) == (np.inf if gamma > 0 else 0.0)
        assert float(even.reward) == pytest.approx(1 / (1 - gamma))
        assert float(still.kl) == pytest.approx(np.log(2) / (1 - gamma))
        first = still.action_value if horizon is None else still.action_value[0]
        assert np.isneginf(first[-2]).tolist() == [gamma > 0, False]


@pytest.mark.parametrize("beta", [1e6, 1e9, 1e12])
def test_high_temperatures_keep_their_digits(beta: float) -> None:
    """J* − J(π₀) = Var/(2β) + O(1/β²) over one step, and is never negative."""
    mdp = random_mdp(7, horizon=1, discount=0.9)
    rewards = mdp.expected_rewards()
    mean = (mdp.prior * rewards).sum(-1)
    variance = mdp.start @ (mdp.prior * (rewards - mean[:, None]) ** 2).sum(-1)
    found = soft_value_iteration(mdp, beta)
    assert beta * float(found.kl) == pytest.approx(variance / (2 * beta), rel=1e-3)
    longer = random_mdp(7, discount=0.99)
    gain = float(soft_value_iteration(longer, beta).objective - evaluate_policy(longer, longer.prior).objective)
    assert -1e-12 < gain < 1e3 / beta + 1e-12


def test_rewards_for_going_on_for_ever_have_no_bound() -> None:
    mdp = grid_world(["S..G"], step_reward=1.0, discount=1.0)
    for beta in (0.0, 0.1):
        with pytest.raises(ControlError, match="has no bound: going on for ever pays"):
            soft_value_iteration(mdp, beta)
    assert np.isfinite(soft_value_iteration(mdp, 100.0).objective)
    paid = grid_world(["S..G"], goal_reward=-1.0, discount=1.0)
    assert soft_value_iteration(paid, [0.0, 0.01]).objective.tolist() == pytest.approx([-1.0, -1.0])


def test_a_cheap_loop_far_away_is_no_trap() -> None:
    """Whoever sweeps 200 times from zero stays in the loop, at .01 a step, rather than pay 5 to leave it."""
    table = np.zeros((3, 2, 3))
    table[0, 0, 0] = table[0, 1, 1] = table[1, :, 2] = table[2, :, 2] = 1
    rewards = np.array([[-0.01, -5.0], [0.0, 0.0], [0.0, 0.0]])
    mdp = TabularMDP.from_dense(table, rewards, terminal=np.array([False, False, True]))
    for beta in (0.0, 1e-5):
        assert float(soft_value_iteration(mdp, beta).objective) == pytest.approx(-5.0, abs=1e-4)


def test_states_that_lead_anywhere_are_no_burden() -> None:
    """Factors of such a system fill up; Krylov steps agree with sweeps carried on until nothing moves."""
    rng = np.random.default_rng(0)
    states = 5_000
    mdp = TabularMDP(
        successors=rng.integers(0, states, (states, 2, 3)),
        probabilities=rng.dirichlet(np.ones(3), (states, 2)),
        rewards=rng.normal(size=(states, 2, 3)),
        discount=0.9,
    )
    found, value = soft_value_iteration(mdp, 0.5), np.zeros(states)
    for _ in range(300):
        q = mdp.expected_rewards() + 0.9 * (mdp.transitions() @ value).reshape(states, 2)
        value = 0.5 * np.log(np.exp(q / 0.5).mean(-1))
    np.testing.assert_allclose(found.value, value, atol=1e-10)
    assert found.occupancy.sum() == pytest.approx(10.0, abs=1e-9)


def test_an_endless_policy_is_refused() -> None:
    mdp = grid_world(["S.G"], discount=1.0)
    left = np.tile([0.0, 0.0, 0.0, 1.0], (3, 1))
    with pytest.raises(ControlError, match="go on for ever"):
        evaluate_policy(mdp, left)
    assert float(soft_value_iteration(mdp, 0.0).objective) == pytest.approx(1.0)


@pytest.mark.usefixtures("unchecked")
def test_what_was_planned_is_a_policy_and_a_name_is_none() -> None:
    swim = river_swim()
    plan = soft_value_iteration(swim, 0.1)
    assert float(evaluate_policy(swim, plan, 0.1).objective) == pytest.approx(float(plan.objective), abs=1e-12)
    with pytest.raises(
        ControlError, match=r"policy='optimal'; use a PlanResult, as control\.soft_value_iteration gives it or a number"
    ):
        evaluate_policy(swim, "optimal")


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    "beta",
    [
        *(-1.0, float("nan"), [], "warm", 1e308, 1e-320, -np.inf, [0.1, -0.1], [[1.0], [1.0, 2.0]], True, None, 1j),
        *(10**400, jax.random.key(0), jax.random.PRNGKey(0), np.zeros(2, np.uint32), np.array([0.1, 1e39])),
    ],
    ids=repr,
)
def test_temperatures_are_checked(beta: object) -> None:
    swim = river_swim()
    for call in (lambda: soft_value_iteration(swim, beta), lambda: evaluate_policy(swim, swim.prior, beta)):
        with pytest.raises(ControlError, match=r"got beta=.*; use a temperature in reward units per nat: a number "):
            call()


def test_temperatures_may_be_zero_and_come_in_lists() -> None:
    swim = river_swim()
    listed = soft_value_iteration(swim, [0.0, 0.5])
    assert listed.objective.tolist() == [soft_value_iteration(swim, b).objective for b in (0, np.float32(0.5))]


@pytest.mark.parametrize("tolerance", [0.0, float("nan"), -1.0])
def test_tolerances_are_checked(tolerance: float) -> None:
    with pytest.raises(ControlError, match="use a number above 0 and below 1"):
        soft_value_iteration(river_swim(), 1.0, tolerance=tolerance)


def test_policies_are_checked() -> None:
    with pytest.raises(ControlError, match=r"policy has shape \(2, 2\); use \(6, 2\) or \(20, 6, 2\)"):
        evaluate_policy(river_swim(), np.ones((2, 2)) / 2)
    with pytest.raises(ControlError, match="not a distribution"):
        evaluate_policy(river_swim(), np.ones((6, 2)))

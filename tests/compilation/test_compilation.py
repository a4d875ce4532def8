"""How many programs are compiled: the exact measure of what a user waits for. Times are in benchmarks/compilation.py."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from counting import compilations
from numpyro.contrib.control_flow import scan

import bayesrl
from bayesrl.compilation.jit import clear_programs

STEPS = 40


def arms(means: Any, logits: Any = 0.0) -> Callable[[], None]:
    """Define a bandit anew, with its numbers in a closure."""

    def bandit() -> None:
        arm = numpyro.sample("arm", dist.Categorical(logits=logits + jnp.zeros(len(means))))
        bayesrl.reward("payoff", means[arm])

    return bandit


def fit(policy: Any, *args: Any, seed: int = 0, **options: Any) -> bayesrl.Posterior:
    return bayesrl.fit(jax.random.key(seed), policy, *args, **{"num_steps": STEPS, "progress": False} | options)


@pytest.fixture(autouse=True)
def nothing_is_compiled() -> None:
    """Start as a process does. Making keys and tables compiles programs of JAX's own, which are the caller's."""
    clear_programs()
    jax.block_until_ready([jax.random.key(0), jnp.array([0.1, 0.3, 0.5, 0.7, 0.9])])


MEANS = np.array([0.1, 0.3, 0.5, 0.7, 0.9], np.float32)


def test_a_fit_and_what_is_asked_of_it(tmp_path: Path) -> None:
    """First fit 3, then nothing but tables of enumeration: the guide beside the policy, the policy alone, metrics."""
    policy, means = arms(jnp.asarray(MEANS)), jnp.asarray(MEANS[::-1].copy())
    with compilations() as names:
        posterior = fit(policy, beta=0.1)
    assert sorted(names) == ["draw", "fit_step", "initial_state"]
    for change in ({"seed": 1}, {"beta": 0.2}, {"num_steps": STEPS + 30}, {"start_beta": 0.7}):
        with compilations() as names:
            fit(policy, **{"beta": 0.1} | change)
        assert names == [], change
    redefined = arms(means)
    with compilations() as names:
        again = fit(redefined, beta=0.1)
    assert names == []
    assert int(np.argmax(np.asarray(again.params["arm$table"]))) == 0
    assert int(np.argmax(np.asarray(posterior.params["arm$table"]))) == 4
    with compilations() as names:
        posterior.estimate(jax.random.key(1), 1000)
        posterior.estimate(jax.random.key(2), 3000)
        posterior.sample(jax.random.key(2), 7)
        bayesrl.evidence(jax.random.key(3), posterior)
        bayesrl.diagnose(jax.random.key(4), posterior)
        bayesrl.write_report(jax.random.key(0), tmp_path / "report.html", posterior)
    assert set(names) <= {"evaluate", "check"}
    assert len(names) <= 3
    with compilations() as names:
        bayesrl.enumerate_posterior(policy, beta=0.1)
    assert names == ["evaluate"]
    with compilations() as names:
        bayesrl.evidence(jax.random.key(3), again)
        bayesrl.diagnose(jax.random.key(4), again)
        bayesrl.enumerate_posterior(redefined, beta=0.3)
        bayesrl.write_report(jax.random.key(0), tmp_path / "report.html", again)
    assert names == []


def test_a_sweep_with_restarts_needs_its_own_step_only() -> None:
    policy = arms(jnp.asarray(MEANS))
    fit(policy, beta=0.1)
    with compilations() as names:
        sweep = fit(policy, beta=np.array([0.1, 0.5, 1.0]), num_restarts=2)
    assert sorted(names) == ["fit_step", "initial_state", "overdispersed_init"]
    with compilations() as names:
        fit(policy, beta=np.array([0.2, 0.4, 1.0]), num_restarts=2, seed=3)
        sweep.estimate(jax.random.key(1), 100)
    assert names == []
    with compilations() as names:
        bayesrl.frontier(jax.random.key(2), sweep)
        bayesrl.frontier(jax.random.key(3), sweep)
    assert set(names) <= {"evaluate"}, "tables of the enumeration, by policy, guide and metrics"
    assert len(names) <= 3


def test_data_of_a_subsampled_plate() -> None:
    def labels(inputs: Any, targets: Any) -> None:
        with numpyro.plate("row", len(targets), subsample_size=4) as i:
            guess = numpyro.sample("guess", dist.Categorical(logits=inputs[i]))
            bayesrl.reward("right", (guess == targets[i]).astype(float))

    rng = np.random.default_rng(0)
    inputs, targets = rng.normal(size=(2, 12, 3)).astype(np.float32), rng.integers(0, 3, size=(2, 12))
    with compilations() as names:
        fit(labels, inputs[0], targets[0], beta=0.5)
    assert len(names) <= 7
    with compilations() as names:
        fit(labels, inputs[1], targets[1], beta=0.5, seed=1)
    assert names == [], "other data of the same shapes"


def test_a_network_on_mini_batches_is_judged_on_all_data_and_held_out(tmp_path: Path) -> None:
    """Ten in all, four of them for what was held out, which has a shape of its own."""

    def labels(inputs: Any, targets: Any) -> None:
        with numpyro.plate("row", len(targets), subsample_size=4) as i:
            guess = numpyro.sample("guess", dist.Categorical(logits=inputs[i]))
            bayesrl.reward("right", (guess == targets[i]).astype(float))
            numpyro.deterministic("accuracy", (guess == targets[i]).astype(float))

    def guide(inputs: Any, targets: Any) -> None:
        weights = numpyro.param("weights", np.eye(3, dtype=np.float32))
        with numpyro.plate("row", len(targets), subsample_size=4) as i:
            numpyro.sample("guess", dist.Categorical(logits=inputs[i] @ weights))

    rng = np.random.default_rng(0)
    inputs, targets = rng.normal(size=(20, 3)).astype(np.float32), rng.integers(0, 3, size=20)
    with compilations() as names:
        posterior = fit(labels, inputs[:12], targets[:12], beta=0.5, guide=guide)
        bayesrl.diagnose(jax.random.key(1), posterior)
        bayesrl.write_report(
            jax.random.key(0), tmp_path / "report.html", posterior, held_out=(inputs[12:], targets[12:])
        )
    assert len(names) <= 10, names


def test_time_and_nature() -> None:
    probs = jnp.array([[0.9, 0.1], [0.3, 0.7]])

    def chain() -> None:
        def step(state: Any, _: Any) -> Any:
            action = numpyro.sample("action", dist.Bernoulli(0.5))
            bayesrl.reward("r", 1.0 * state)
            state = bayesrl.environment("state", dist.Bernoulli(probs[state, action]), observable=True)
            return state, None

        scan(step, 0, None, length=4)

    with compilations() as names:
        posterior = fit(chain, beta=0.3)
    assert len(names) <= 6
    with compilations() as names:
        fit(chain, beta=0.3, seed=1)
        posterior.estimate(jax.random.key(0), 50)
    assert names == []


def test_what_is_on_disk(tmp_path: Path) -> None:
    """A run that is loaded or resumed, by functions defined anew, compiles nothing; it goes on as it would have."""
    whole = fit(arms(jnp.asarray(MEANS)), beta=0.1, num_steps=2 * STEPS, directory=tmp_path / "whole")
    fit(arms(jnp.asarray(MEANS)), beta=0.1, num_steps=2 * STEPS, directory=tmp_path / "cut", callback=lambda _: True)
    policy = arms(jnp.asarray(MEANS))
    with compilations() as names:
        loaded = bayesrl.load(tmp_path / "whole", policy)
        loaded.estimate(jax.random.key(0), 100)
        resumed = bayesrl.resume(tmp_path / "cut", policy, progress=False)
    assert names == []
    for posterior in (loaded, resumed):
        np.testing.assert_array_equal(posterior.params["arm$table"], whole.params["arm$table"])
        np.testing.assert_array_equal(posterior.draws["arm"], whole.draws["arm"])


def test_caches_change_no_bit() -> None:
    """A first call, a second one, and one after all programs were forgotten give the same numbers."""
    policy = arms(jnp.asarray(MEANS))
    fits = [fit(policy, beta=0.1, seed=5), fit(arms(jnp.asarray(MEANS)), beta=0.1, seed=5)]
    clear_programs()
    fits.append(fit(policy, beta=0.1, seed=5))
    draws = [one.sample(jax.random.key(3), 100)["arm"] for one in fits]
    for one, drawn in zip(fits[1:], draws[1:], strict=True):
        np.testing.assert_array_equal(one.params["arm$table"], fits[0].params["arm$table"])
        np.testing.assert_array_equal(one.history["objective"], fits[0].history["objective"])
        np.testing.assert_array_equal(drawn, draws[0])


def test_draws_do_not_depend_on_how_many_are_asked_for() -> None:
    posterior = fit(arms(jnp.asarray(MEANS)), beta=0.1)
    few, many = (posterior.sample(jax.random.key(3), n)["arm"] for n in (10, 2500))
    np.testing.assert_array_equal(few, many[:, :10])
    assert posterior.sample(jax.random.key(3), 0)["arm"].shape == (1, 0)


def test_a_prior_that_changed_in_place_is_read_anew() -> None:
    """Arrays of NumPy, numbers, flags: fits, draws and enumeration are of what the program reads now."""
    table, scale, flags = MEANS.copy(), [1.0], {"reverse": False}

    def bandit() -> None:
        arm = numpyro.sample("arm", dist.Categorical(logits=jnp.zeros(5)))
        values = jnp.asarray(table)[::-1] if flags["reverse"] else jnp.asarray(table)
        bayesrl.reward("payoff", scale[0] * values[arm])

    def optimum() -> float:
        values = scale[0] * (table[::-1] if flags["reverse"] else table)
        return float(0.1 * np.log(np.mean(np.exp(values.astype(float) / 0.1))))

    for change in (
        lambda: None,
        lambda: table.__setitem__(0, 3.0),
        lambda: scale.__setitem__(0, 0.3),
        lambda: flags.update(reverse=True),
    ):
        change()
        exact = float(np.asarray(bayesrl.enumerate_posterior(bandit, beta=0.1).optimum).mean())
        assert exact == pytest.approx(optimum(), abs=1e-5)
        posterior = fit(bandit, beta=0.1, num_steps=400)
        assert float(posterior.estimate(jax.random.key(0), 2000).objective.mean[0]) == pytest.approx(exact, abs=0.01)
        assert float(bayesrl.evidence(jax.random.key(1), posterior).optimum.mean) == pytest.approx(exact, abs=1e-4)

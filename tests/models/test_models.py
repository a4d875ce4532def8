"""The ready models: their optima against closed forms, brute force and enumeration."""

import itertools
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bayesrl
from bayesrl.errors import BayesRLError, PolicyError
from bayesrl.exact.enumeration import enumerate_posterior
from bayesrl.problem import LearningProblem, Problem
from bayesrl.ready_models import model_names, model_options, model_uses


@pytest.mark.parametrize("name", model_names())
def test_every_model_says_what_it_is(name: str) -> None:
    assert len(model_names()[name]) > 20
    uses = model_uses(name)
    assert uses
    if "problem" in uses:
        # Models that are trained on the spot are trained for a moment here, whatever they make of it.
        small = {"training_steps": 2, "comparisons": 12}
        quick = {option: value for option, value in small.items() if option in model_options(name)}
        problem = bayesrl.load_problem(name, **quick)
        assert isinstance(problem, Problem)
        assert problem.beta is not None
        assert bayesrl.load_problem(name, **model_options(name) | quick).beta == problem.beta
    if "learning" in uses:
        learning = bayesrl.load_learning_problem(name)
        assert isinstance(learning, LearningProblem)
        assert bayesrl.load_learning_problem(name, **model_options(name, "learning")).num_runs == learning.num_runs


@pytest.mark.parametrize("name", [name for name in model_names() if "learning" in model_uses(name)])
def test_every_model_is_learned(name: str) -> None:
    """Five episodes of each, by both agents where there are two."""
    agents = ["bayesian", "kl_control"] if "agent" in model_options(name, "learning") else [None]
    for agent in agents:
        options = {} if agent is None else {"agent": agent}
        problem = bayesrl.load_learning_problem(name, **options)
        learned = bayesrl.control.learn(
            jax.random.key(0), problem.environment, problem.agent, num_episodes=5, progress=False
        )
        assert learned.num_episodes == 5
        assert all("missing" not in section.title for section in problem.sections_of(jax.random.key(0), learned))


def test_a_model_that_is_only_learned_says_so() -> None:
    with pytest.raises(BayesRLError, match="use `bayesrl learn clinical_trial`"):
        bayesrl.load_problem("clinical_trial")
    with pytest.raises(BayesRLError, match="use `bayesrl fit cartpole`"):
        bayesrl.load_learning_problem("cartpole")


@pytest.mark.parametrize("beta", [0.05, 0.1, 1.0])
def test_bandit_is_a_softmax(beta: float) -> None:
    problem = bayesrl.load_problem("bernoulli_bandit", arms=4, best=0.8, worst=0.2)
    found = enumerate_posterior(problem.policy, beta=beta)
    tilted = np.exp(np.array([0.2, 0.4, 0.6, 0.8]) / beta)
    np.testing.assert_allclose(np.exp(found.log_weights), tilted / tilted.sum(), rtol=1e-4)
    np.testing.assert_allclose(found.optimum, beta * math.log(tilted.mean()), rtol=1e-5)


@pytest.mark.parametrize(("beta", "sharpness", "scale"), [(0.5, 1.0, 1.0), (0.1, 2.0, 0.5), (3.0, 0.3, 2.0)])
def test_gaussian_optimum_by_quadrature(beta: float, sharpness: float, scale: float) -> None:
    options = {"prior_mean": 0.3, "prior_scale": scale, "target": 1.7, "sharpness": sharpness}
    problem = bayesrl.load_problem("gaussian_target", **options)
    x = np.linspace(-40, 40, 400_001)
    log_prior = -0.5 * ((x - 0.3) / scale) ** 2 - math.log(scale * math.sqrt(2 * math.pi))
    density = np.exp(log_prior - 0.5 * sharpness * (x - 1.7) ** 2 / beta)
    assert problem.optimum is not None
    np.testing.assert_allclose(problem.optimum(beta), beta * math.log(np.trapezoid(density, x)), rtol=1e-6)
    found = bayesrl.log_density(problem.policy, {"action": jnp.asarray(0.9)}, beta=beta)
    at = -0.5 * ((0.9 - 0.3) / scale) ** 2 - math.log(scale * math.sqrt(2 * math.pi))
    np.testing.assert_allclose(found.log_target, at - 0.5 * sharpness * 0.8**2 / beta, rtol=1e-5)


@pytest.mark.parametrize("beta", [0.4, 1.0])
def test_transfer_matrices_against_every_string(beta: float, tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("a cab, a bad cad! " * 20)
    problem = bayesrl.load_problem("bigram_text", text=str(path), letters="ab", length=3)
    index = " abcdefghijklmnopqrstuvwxyz"
    counts = np.ones((27, 27))
    clean = " ".join(("a cab  a bad cad  " * 20).split())
    for first, second in itertools.pairwise(clean):
        counts[index.index(first), index.index(second)] += 1
    chain = counts / counts.sum(1, keepdims=True)
    gain = np.array([character in "ab" for character in index], float)
    total = 0.0
    for a, b, c in itertools.product(range(27), repeat=3):
        total += chain[0, a] * chain[a, b] * chain[b, c] * math.exp((gain[a] + gain[b] + gain[c]) / beta)
    assert problem.optimum is not None
    np.testing.assert_allclose(problem.optimum(beta), beta * math.log(total), rtol=1e-6)
    found = enumerate_posterior(problem.policy, beta=beta)
    np.testing.assert_allclose(found.optimum, beta * math.log(total), rtol=1e-4)


def test_bigram_offsets_hold_the_optimum() -> None:
    import jax

    problem = bayesrl.load_problem("bigram_text", length=5)
    options: dict[str, Any] = {**problem.fit_options, "num_steps": 600}
    posterior = bayesrl.fit(jax.random.key(0), problem.policy, beta=1.0, progress=False, **options)
    objective = posterior.estimate(jax.random.key(1), 4000).objective
    assert problem.optimum is not None
    # The noise of J vanishes with the gap, so the bound is on the gap itself: 1% of what there is to gain.
    gain = problem.optimum(1.0) - problem.optimum(1e6)  # as β → ∞, J* → J(π₀)
    assert abs(problem.optimum(1.0) - float(objective.mean[0])) < 0.01 * gain


def test_digits_holds_out_what_it_did_not_see() -> None:
    pytest.importorskip("sklearn")
    problem = bayesrl.load_problem("digits_bandit", hidden=4, num_steps=10)
    assert problem.held_out is not None
    (train, _), (test, labels) = problem.args, problem.held_out
    assert (len(train), len(test)) == (1131, 566)
    assert not {row.tobytes() for row in np.asarray(train)} & {row.tobytes() for row in np.asarray(test)}
    found = enumerate_posterior(bayesrl.full_data(problem.policy), test[:6], labels[:6], beta=0.1)
    best = np.asarray(found.log_weights).argmax(0)
    np.testing.assert_array_equal(best, labels[:6])


def test_models_refuse_what_they_cannot_use(tmp_path: Path) -> None:
    with pytest.raises(PolicyError, match="name at least one"):
        bayesrl.load_problem("bigram_text", letters="123")
    with pytest.raises(PolicyError, match="cannot be read"):
        bayesrl.load_problem("bigram_text", text=str(tmp_path / "none.txt"))
    with pytest.raises(BayesRLError, match="option arms must be an integer, such as 5, got 'two'"):
        bayesrl.load_problem("bernoulli_bandit", arms="two")


def test_preferences_of_a_file_tilt_the_answers_to_each_prompt(tmp_path: Path) -> None:
    """The optimum is the tilt by −β·log E e^{−r/β} = μ − s²/2β, within each prompt."""
    rows = ['{"prompt": "a?", "chosen": "yes", "rejected": "no"}'] * 5
    rows += [f'{{"prompt": "b?", "chosen": "{one}", "rejected": "{other}"}}' for one, other in ("xy", "xz", "yz")]
    path = tmp_path / "judged.jsonl"
    path.write_text("\n".join(rows))
    problem = bayesrl.load_problem("preference_bandit", preferences=str(path), beta=0.5)
    exact = enumerate_posterior(problem.policy, *problem.args, beta=0.5)
    data = bayesrl.preferences.read(str(path))
    known = bayesrl.preferences.infer(jax.random.key(0), bayesrl.preferences.bradley_terry(data))
    wary = known.mean.mean - known.sd**2 / (2 * 0.5)
    optima = [0.5 * np.log(np.mean(np.exp(wary[members] / 0.5))) for members in ([0, 1], [2, 3, 4])]
    np.testing.assert_allclose(exact.optimum, optima, rtol=1e-4)
    with pytest.raises(BayesRLError, match="two items"):
        bayesrl.load_problem("preference_bandit", preferences=_ratings(tmp_path))


def _ratings(folder: Path) -> str:
    (folder / "rated.jsonl").write_text('{"prompt": "a", "completion": "b", "score": 3}\n' * 2)
    return str(folder / "rated.jsonl")

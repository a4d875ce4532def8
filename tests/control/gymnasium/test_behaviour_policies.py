"""Who plays: the log-probability that a behaviour tells is that of its draws."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest

from bayesrl.control import epsilon_greedy, prior_mixture
from bayesrl.control.gymnasium.behaviour_policies import play_guide
from bayesrl.errors import ControlError

NUM = 20_000


def drawn(behaviour: Any, fitted: Any, prior: Any) -> tuple[np.ndarray, np.ndarray]:
    keys = jax.random.split(jax.random.key(3), NUM)
    actions, scores = jax.jit(jax.vmap(lambda key: behaviour(key, fitted, prior)))(keys)
    return np.asarray(actions), np.asarray(scores)


@pytest.mark.parametrize(
    ("behaviour", "truth"),
    [
        (play_guide, [0.1, 0.2, 0.7]),
        (prior_mixture(0.0), [0.1, 0.2, 0.7]),
        (prior_mixture(1.0), [0.5, 0.3, 0.2]),
        (prior_mixture(0.25), [0.2, 0.225, 0.575]),
        (epsilon_greedy(0.4).behave, [0.2, 0.12, 0.68]),
    ],
    ids=["fitted", "mixture0", "prior", "mixture", "greedy"],
)
def test_frequencies_and_scores_are_those_of_the_mixture(behaviour: Any, truth: list[float]) -> None:
    """Scores exactly; 15 frequencies within 4.5 standard errors (false alarm 1e-4)."""
    fitted, prior = (
        dist.Categorical(probs=jnp.array([0.1, 0.2, 0.7])),
        dist.Categorical(probs=jnp.array([0.5, 0.3, 0.2])),
    )
    actions, scores = drawn(behaviour, fitted, prior)
    probs = np.array(truth)
    np.testing.assert_allclose(np.exp(scores), probs[actions], rtol=1e-4)
    found = np.bincount(actions, minlength=3) / NUM
    assert (np.abs(found - probs) < 4.5 * np.sqrt(probs * (1 - probs) / NUM)).all()


def test_a_mixture_of_densities() -> None:
    actions, scores = drawn(prior_mixture(0.3), dist.Normal(2.0, 0.5), dist.Normal(0.0, 1.0))

    def density(mean: float, sd: float) -> np.ndarray:
        return np.exp(-0.5 * ((actions - mean) / sd) ** 2) / (sd * np.sqrt(2 * np.pi))

    np.testing.assert_allclose(np.exp(scores), 0.7 * density(2.0, 0.5) + 0.3 * density(0.0, 1.0), rtol=1e-3, atol=1e-6)


def test_the_likeliest_of_two_values() -> None:
    """A Bernoulli has logits too, but no axis of them."""
    actions, scores = drawn(epsilon_greedy(0.2).behave, dist.Bernoulli(0.9), dist.Bernoulli(0.5))
    np.testing.assert_allclose(np.exp(scores), np.where(actions == 1, 0.9, 0.1), rtol=1e-5)


def test_densities_have_no_likeliest_action() -> None:
    with pytest.raises(ControlError, match=r"Normal has no likeliest one; use prior_mixture"):
        epsilon_greedy(0.1).behave(jax.random.key(0), dist.Normal(0.0, 1.0), dist.Normal(0.0, 1.0))

"""The posterior and the policies of the preference bandits: against exact values and what holds by theorem."""

import numpy as np
import pytest

from benchmarks import preference_bandits as bandits


def test_the_posterior_is_that_of_three_items_by_quadrature() -> None:
    first, second = np.repeat([0, 1, 0], 10), np.repeat([1, 2, 2], 10)
    won = np.concatenate([np.arange(10) < wins for wins in (7, 6, 9)])
    three = bandits.Bandit(np.zeros(3), np.log(np.full(3, 1 / 3)), first, second, won)
    draws = bandits.posterior_draws(np.random.default_rng(0), three)
    # 1,000 draws of Gibbs sampling are worth some 300.
    assert np.abs(draws.mean(0) - [0.82800, -0.13925, -0.68875]).max() < 4 * 0.67 / 300**0.5
    assert np.abs(draws.std(0) - [0.66686, 0.65318, 0.66167]).max() < 4 * 0.67 / 600**0.5
    scores = bandits.mode(three, 1.0)
    chance = 1 / (1 + np.exp(scores[second] - scores[first]))
    np.testing.assert_allclose(bandits.slope(three, won - chance), scores, atol=1e-8)


def test_what_holds_by_theorem_holds_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tilt by the mean is best at its β and at its KL, under the mean; all is told of every policy and β."""
    monkeypatch.setattr(bandits, "KEPT", 50)
    rng = np.random.default_rng(1)
    found = bandits.examine(rng)
    assert found.gain.shape == found.kl.shape == found.covered.shape == (3, len(bandits.BETA))
    assert found.weak.shape == (2, len(bandits.BETA))
    objective = found.predicted - bandits.BETA * found.kl
    assert (objective[0] >= objective[1:] - 1e-9).all()
    log_prior, mean = np.log([0.2, 0.3, 0.5]), np.array([1.0, 0.0, 0.5])
    law = bandits.at_kl(log_prior, mean, 0.3)
    np.testing.assert_allclose(bandits.kl(law, log_prior), 0.3, rtol=1e-6)
    moved = found._replace(
        **{name: getattr(found, name) + rng.normal() for name in ("gain", "weak", "said", "same_kl")}
    )
    moved = moved._replace(gain=moved.gain + rng.normal(size=moved.gain.shape))
    both = [one._replace(turning=dict.fromkeys(bandits.POLICIES, (3, 4, 8, 3, 0.9, 0.5))) for one in (found, moved)]
    told = [*bandits.covered(both), *bandits.earned(both), *bandits.weakly(both), *bandits.turned(both)]
    assert sum(part.count("Target:") for part in told) == 6

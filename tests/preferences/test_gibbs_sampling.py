"""Conjugate updates: the moments of Pólya–Gamma variables, and posteriors beside exact ones."""

import jax
import numpy as np
import pytest

from bayesrl.errors import PreferenceError
from bayesrl.preferences import PreferenceData, bradley_terry, infer, plackett_luce, thurstone
from bayesrl.preferences.engines.gibbs_sampling import polya_gamma

GAMES = PreferenceData.of_pairs(
    [0] * 10 + [1] * 10, [1] * 10 + [0] * 10, [1] * 7 + [0] * 3 + [1] * 6 + [0] * 4, shown=True
)


def test_polya_gamma_moments() -> None:
    rng = np.random.default_rng(0)
    for tilt in (0.0, 0.5, 2.0, 8.0, -8.0, 40.0):
        z, count = abs(tilt), 20_000
        draws = polya_gamma(rng, np.full(count, tilt))
        mean = np.tanh(z / 2) / (2 * z) if z else 0.25
        variance = (np.sinh(z) - z) / (4 * z**3 * np.cosh(z / 2) ** 2) if z else 1 / 24
        # Five standard errors: a false alarm in 6e-7 of draws.
        assert abs(draws.mean() - mean) < 5 * np.sqrt(variance / count)
        assert abs(draws.var() / variance - 1) < 0.15
        assert (draws > 0).all()


@pytest.mark.parametrize("make", [bradley_terry, thurstone])
def test_gibbs_agrees_with_quadrature(make: object) -> None:
    assert callable(make)
    model = make(GAMES, position=True, scale=1.5)
    exact = infer(jax.random.key(0), model, method="quadrature", num_samples=10)
    drawn = infer(jax.random.key(1), model, method="gibbs", num_samples=4000, num_warmup=200)
    assert drawn.draws["position"].shape == (4000,)
    # Two means and a chance, within 4.5 standard errors: a false alarm in 2e-5 of keys.
    assert (np.abs(drawn.mean.mean - exact.mean.mean) < 4.5 * drawn.mean.se).all()
    assert (np.abs(drawn.p_best.mean - exact.p_best.mean) < 4.5 * drawn.p_best.se).all()
    np.testing.assert_allclose(drawn.covariance, exact.covariance, rtol=0.15, atol=0.05)
    assert drawn.log_evidence is not None
    assert exact.log_evidence is not None
    assert abs(drawn.log_evidence.mean - exact.log_evidence.mean) < 4.5 * drawn.log_evidence.se
    assert exact.exact is not None
    sd = np.sqrt(exact.exact.covariance[2, 2])
    assert abs(drawn.draws["position"].mean() - exact.exact.mean[2]) < 0.15 * sd


def test_labels_too() -> None:
    data = PreferenceData.of_labels([0] * 6 + [1] * 6, [1] * 5 + [0] * 5 + [1, 0])
    exact = infer(jax.random.key(0), bradley_terry(data), method="quadrature", num_samples=10)
    drawn = infer(jax.random.key(1), bradley_terry(data), method="gibbs", num_samples=4000, num_warmup=200)
    assert (np.abs(drawn.mean.mean - exact.mean.mean) < 4.5 * drawn.mean.se).all()


def test_other_models_are_refused() -> None:
    tied = PreferenceData.of_pairs([0, 1], [1, 0], [1, 0.5])
    for model, message in (
        (bradley_terry(tied, ties="davidson"), "needs pairs, labels or ratings, without ties"),
        (plackett_luce(PreferenceData.of_rankings([[0, 1]])), "takes Bradley–Terry or Thurstone"),
    ):
        with pytest.raises(PreferenceError, match=f"method='gibbs' {message}.*; use method='nuts'"):
            infer(jax.random.key(0), model, method="gibbs")

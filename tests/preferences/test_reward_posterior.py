"""Posteriors of scores against quadrature of the published numbers, against one another, and their checks."""

from typing import Any

import jax
import numpy as np
import pytest
from scipy.special import log_expit
from scipy.stats import multivariate_normal

import bayesrl
from bayesrl.errors import PreferenceError
from bayesrl.preferences import (
    PreferenceData,
    RewardPosterior,
    bradley_terry,
    gaussian_ratings,
    infer,
    plackett_luce,
    score_inference,
    thurstone,
)
from bayesrl.preferences.preference_program import PreferenceModel

WINS, GAMES, PAIRS = (7, 6, 9), 10, ((0, 1), (1, 2), (0, 2))
THREE = PreferenceData.of_pairs(
    np.repeat([a for a, _ in PAIRS], GAMES),
    np.repeat([b for _, b in PAIRS], GAMES),
    np.concatenate([np.arange(GAMES) < wins for wins in WINS]).astype(int),
)
MEANS, SDS = (0.82800, -0.13925, -0.68875), (0.66686, 0.65318, 0.66167)
LOG_EVIDENCE, P_BEST = -18.86209, (0.963, 0.035, 0.002)


@pytest.fixture(scope="module")
def three() -> PreferenceModel:
    return bradley_terry(THREE)


@pytest.fixture(scope="module")
def exact(three: PreferenceModel) -> RewardPosterior:
    return infer(jax.random.key(0), three, method="quadrature", num_samples=500)


@pytest.fixture(scope="module")
def normal(three: PreferenceModel) -> RewardPosterior:
    return infer(jax.random.key(1), three, num_samples=2000)


def test_quadrature_has_five_digits(exact: RewardPosterior) -> None:
    np.testing.assert_allclose(exact.mean.mean, MEANS, atol=6e-6)
    np.testing.assert_allclose(exact.sd, SDS, atol=6e-6)
    assert exact.log_evidence is not None
    np.testing.assert_allclose(exact.log_evidence.mean, LOG_EVIDENCE, atol=6e-6)
    np.testing.assert_allclose(exact.p_best.mean, P_BEST, atol=6e-4)
    np.testing.assert_allclose(exact.p_best.mean.sum(), 1, atol=1e-9)
    assert exact.mean.se.tolist() == [0, 0, 0]
    # The draws that it keeps are of the same posterior: 5 standard errors.
    assert (np.abs(exact.scores.mean(0) - MEANS) < 5 * np.asarray(SDS) / 500**0.5).all()


def test_laplace_states_its_error(exact: RewardPosterior, normal: RewardPosterior) -> None:
    assert normal.log_evidence is not None
    assert normal.divergence is not None
    # The mode lies nearer to the prior's than the mean does, by a few hundredths.
    assert 0.02 < np.abs(normal.mean.mean - exact.mean.mean).max() < 0.05
    own = normal.diagnostics["laplace_log_evidence"]
    assert 0.01 < LOG_EVIDENCE - own < 0.05
    # Weighted draws know the evidence, and the divergence: E_q[log q − log p] by Gauss–Hermite nodes.
    assert abs(normal.log_evidence.mean - LOG_EVIDENCE) < 4.5 * normal.log_evidence.se
    assert normal.log_evidence.se < 0.01
    assert normal.diagnostics["khat"] < 0.7
    assert abs(normal.divergence.mean - kl_of(normal)) < 4.5 * normal.divergence.se
    assert normal.divergence.se < 0.2 * normal.divergence.mean


def kl_of(posterior: RewardPosterior) -> float:
    """KL(q‖p) of a normal q and the posterior of three items, written out in NumPy."""
    assert posterior.gaussian is not None
    nodes, weights = np.polynomial.hermite_e.hermegauss(24)
    z = np.stack(np.meshgrid(nodes, nodes, nodes), -1).reshape(-1, 3)
    w = np.prod(np.stack(np.meshgrid(weights, weights, weights), -1).reshape(-1, 3), -1) / (2 * np.pi) ** 1.5
    theta = posterior.gaussian.mean + z @ posterior.gaussian.root.T
    log_p = -0.5 * (theta**2).sum(-1) - 1.5 * np.log(2 * np.pi)
    for (a, b), wins in zip(PAIRS, WINS, strict=True):
        d = theta[:, a] - theta[:, b]
        log_p += wins * log_expit(d) + (GAMES - wins) * log_expit(-d)
    log_q = -0.5 * (z**2).sum(-1) - 1.5 * np.log(2 * np.pi) - np.log(np.diag(posterior.gaussian.root)).sum()
    return float(w @ (log_q - log_p) + LOG_EVIDENCE)


def test_nuts_agrees_within_its_error(exact: RewardPosterior, three: PreferenceModel) -> None:
    drawn = infer(jax.random.key(2), three, method="nuts", num_samples=4000, num_warmup=300)
    assert drawn.diagnostics["rhat"] < 1.05
    assert drawn.scores.shape == (4000, 3)
    # Three means and three shares, each within 4 standard errors: a false alarm in 4e-4 of keys.
    assert (np.abs(drawn.mean.mean - exact.mean.mean) < 4 * drawn.mean.se).all()
    assert (drawn.mean.se < 0.03).all()
    assert (np.abs(drawn.p_best.mean - exact.p_best.mean) < 4 * drawn.p_best.se + 1e-3).all()
    np.testing.assert_allclose(drawn.sd, SDS, rtol=0.1)
    assert drawn.log_evidence is not None
    assert abs(drawn.log_evidence.mean - LOG_EVIDENCE) < 4.5 * drawn.log_evidence.se


def test_the_fit_is_the_best_normal_posterior(exact: RewardPosterior, three: PreferenceModel) -> None:
    fitted = infer(jax.random.key(3), three, method="fit", num_steps=800)
    assert fitted.gaussian is not None
    assert fitted.divergence is not None
    assert fitted.fit is not None
    np.testing.assert_allclose(fitted.mean.mean, exact.mean.mean, atol=0.03)
    np.testing.assert_allclose(fitted.covariance, exact.covariance, atol=0.03)
    assert kl_of(fitted) < 0.012
    assert abs(fitted.divergence.mean - kl_of(fitted)) < 4.5 * fitted.divergence.se
    # It is an ordinary fit: its evidence has the known log Z between its sides.
    found = bayesrl.evidence(jax.random.key(4), fitted.fit, method="importance")
    assert found.log_evidence is not None
    assert found.log_evidence.conservative_lower < LOG_EVIDENCE < found.log_evidence.conservative_upper


def test_repr_has_one_row_per_item(normal: RewardPosterior) -> None:
    shown = str(normal)
    assert "RewardPosterior by laplace: bradley_terry(30 pairs, 3 items), 2,000 draws" in shown
    assert "P(best)" in shown
    assert "KL from this normal approximation to the posterior" in shown


def test_log_score_and_calibration(normal: RewardPosterior) -> None:
    score = normal.log_score()
    chances = 1 / (1 + np.exp(-(normal.scores[:, [a for a, _ in PAIRS]] - normal.scores[:, [b for _, b in PAIRS]])))
    p = chances.mean(0)
    by_hand = sum(w * np.log(q) + (GAMES - w) * np.log(1 - q) for w, q in zip(WINS, p, strict=True)) / 30
    np.testing.assert_allclose(score.mean, by_hand, rtol=1e-4)
    curve = normal.calibration_curve(bins=3)
    order = np.argsort(p)
    np.testing.assert_allclose(curve.predicted, p[order], rtol=1e-4)
    np.testing.assert_allclose(curve.observed.mean, np.asarray(WINS)[order] / GAMES)
    # A pair that lists the winner first says the same.
    turned = PreferenceData.of_pairs(
        np.where(THREE.outcomes == 1, THREE.members[:, 0], THREE.members[:, 1]),
        np.where(THREE.outcomes == 1, THREE.members[:, 1], THREE.members[:, 0]),
    )
    again = normal.calibration_curve(turned, bins=3)
    np.testing.assert_allclose(again.observed.mean, curve.observed.mean)
    np.testing.assert_allclose(normal.log_score(turned).mean, score.mean, rtol=1e-4)


def test_predictive_p_values_see_a_wrong_model(normal: RewardPosterior) -> None:
    fine = normal.predictive_p_values(jax.random.key(5))
    assert set(fine) == {"log-likelihood", "spread of wins"}
    assert all(0.02 < p < 0.98 for p in fine.values())
    # A circle: each item always beats the next, which no scores can say.
    circle = PreferenceData.of_pairs([0] * 10 + [1] * 10 + [2] * 10, [1] * 10 + [2] * 10 + [0] * 10)
    wrong = infer(jax.random.key(6), bradley_terry(circle), num_samples=400)
    assert wrong.predictive_p_values(jax.random.key(7))["spread of wins"] > 0.95


def test_ratings_have_a_closed_form() -> None:
    rng = np.random.default_rng(0)
    features, item = rng.normal(size=(4, 2)), rng.integers(0, 4, 12)
    ratings = 3 + features[item] @ [1.0, -0.5] + 0.7 * rng.normal(size=12)
    data = PreferenceData.of_ratings(item, ratings, num_items=4)
    model = gaussian_ratings(data, features=features, scale=2.0, noise=0.7)
    found = infer(jax.random.key(0), model, method="conjugate", num_samples=2000)
    # Without the closed form: y is normal, and so is (weights, offset) given y.
    design = np.concatenate([features[item], np.ones((12, 1))], 1)
    prior = np.diag([4.0, 4.0, 100.0])
    cross = prior @ design.T
    covariance = design @ cross + 0.49 * np.eye(12)
    assert found.log_evidence is not None
    assert found.gaussian is not None
    wanted = multivariate_normal(cov=covariance).logpdf(ratings)
    np.testing.assert_allclose((found.log_evidence.mean, found.log_evidence.se), (wanted, 0), rtol=1e-9)
    np.testing.assert_allclose(found.gaussian.mean, cross @ np.linalg.solve(covariance, ratings), rtol=1e-8)
    given = prior - cross @ np.linalg.solve(covariance, cross.T)
    np.testing.assert_allclose(found.gaussian.covariance, given, rtol=1e-7)
    # The program has the same density: that of Laplace, whose normal approximation is exact here.
    normal = infer(jax.random.key(1), model)
    np.testing.assert_allclose(normal.diagnostics["laplace_log_evidence"], wanted, rtol=1e-6)
    np.testing.assert_allclose(normal.mean.mean, found.mean.mean, rtol=1e-5)
    assert np.isfinite(found.log_score(data.take([0, 1])).mean)
    assert all(0 < p < 1 for p in found.predictive_p_values(jax.random.key(2)).values())
    with pytest.raises(PreferenceError, match="ratings are numbers and no events"):
        found.calibration_curve()
    with pytest.raises(PreferenceError, match="use method='conjugate'"):
        infer(jax.random.key(3), model, method="gibbs")
    with pytest.raises(PreferenceError, match=r"takes gaussian_ratings, and got .* no conjugate prior; method='gibbs'"):
        infer(jax.random.key(3), bradley_terry(THREE), method="conjugate")


FEW = PreferenceData.of_pairs([0, 0, 1, 0, 1], [1, 2, 2, 1, 2])
RANKED = PreferenceData.of_rankings([[0, 1, 2]] * 4)


@pytest.mark.parametrize(
    ("model", "options"),
    [
        (plackett_luce(RANKED, ties="davidson_luce"), {"method": "laplace"}),
        (thurstone(PreferenceData.of_labels([0, 1, 0], [1, 0, 1])), {"method": "gibbs", "num_warmup": 30}),
        (gaussian_ratings(PreferenceData.of_ratings([0, 1, 0], [1, 0, 1])), {"method": "conjugate"}),
        (bradley_terry(FEW), {"method": "nuts", "num_warmup": 100}),
        (bradley_terry(FEW), {"method": "fit", "num_steps": 200}),
    ],
)
def test_inference_is_calibrated(model: PreferenceModel, options: dict[str, Any]) -> None:
    found = bayesrl.calibrate(
        jax.random.key(8), model, infer=score_inference(model, **options), num_replications=60, num_samples=39
    )
    assert found.verdict == "pass"
    assert set(found.names) >= {"log p(y|θ)"}


def test_another_prior_is_not_calibrated() -> None:
    data = PreferenceData.of_ratings([0, 1, 0], [1, 0, 1])
    wrong = score_inference(gaussian_ratings(data, scale=0.2), method="conjugate")
    found = bayesrl.calibrate(jax.random.key(8), gaussian_ratings(data), infer=wrong, num_replications=60)
    assert found.verdict == "fail"
    with pytest.raises(PreferenceError, match="takes gaussian_ratings, and got"):
        bayesrl.calibrate(
            jax.random.key(8), bradley_terry(FEW), infer=score_inference(bradley_terry(FEW), method="conjugate")
        )
    with pytest.raises(PreferenceError, match="num_steps=3, which nothing would read: only method='fit'"):
        score_inference(bradley_terry(FEW), num_steps=3)


def test_scores_linear_in_features_reach_new_items() -> None:
    rng = np.random.default_rng(0)
    features, weights = rng.normal(size=(12, 3)), np.array([1.0, -1.0, 0.5])
    first, second = rng.integers(0, 12, 300), rng.integers(0, 11, 300)
    second = second + (second >= first)
    truth = features @ weights
    outcome = (rng.random(300) < 1 / (1 + np.exp(truth[second] - truth[first]))).astype(int)
    data = PreferenceData.of_pairs(first, second, outcome, num_items=12)
    posterior = infer(jax.random.key(9), bradley_terry(data.take(range(200)), features=features))
    assert posterior.gaussian is not None
    # The weights lie within 4 posterior standard deviations, the scores follow from them.
    assert (np.abs(posterior.gaussian.mean - weights) < 4 * np.sqrt(np.diag(posterior.gaussian.covariance))).all()
    np.testing.assert_allclose(posterior.mean.mean, features @ posterior.gaussian.mean, rtol=1e-6)
    held_out = posterior.log_score(data.take(range(200, 300)))
    assert held_out.mean > np.log(0.5) + 2 * held_out.se
    new = PreferenceData.of_pairs([0], [1])
    assert np.isfinite(posterior.log_score(new, features=np.eye(2, 3)).mean)
    drawn = posterior.scores_of(new.items, features=np.eye(2, 3))
    np.testing.assert_allclose(drawn, posterior.draws["weights"][:, :2], rtol=1e-6)
    # Items with the same texts are the model's own.
    np.testing.assert_allclose(posterior.scores_of(new.items), posterior.scores[:, :2])
    with pytest.raises(PreferenceError, match="features of its own 12 items, and these 13 are others; pass features="):
        posterior.scores_of(PreferenceData.of_pairs([0], [12]).items)


def test_plackett_luce_recovers_what_drew_the_rankings() -> None:
    rng = np.random.default_rng(1)
    truth = np.array([1.0, 0.3, -0.4, -0.9])
    full = [np.argsort(-(truth + rng.gumbel(size=4))) for _ in range(150)]
    posterior = infer(jax.random.key(10), plackett_luce(PreferenceData.of_rankings([row.tolist() for row in full])))
    centred = posterior.mean.mean - posterior.mean.mean.mean()
    assert (np.abs(centred - (truth - truth.mean())) < 4 * posterior.sd).all()
    assert posterior.calibration_curve(bins=5).counts.sum() == 900


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "laplace", "num_chains": 2}, "num_chains=2, which nothing would read: only 'nuts' and 'gibbs'"),
        ({"method": "nuts", "num_steps": 3}, "only method='fit' takes steps"),
        ({"method": "hmc"}, "use 'laplace', 'nuts', 'gibbs', 'fit', 'quadrature' or 'conjugate'"),
        ({"num_samples": 1}, "num_samples=1; use a whole number of at least 2"),
    ],
)
def test_bad_options_are_refused(three: PreferenceModel, options: dict[str, Any], message: str) -> None:
    with pytest.raises(PreferenceError, match=message):
        infer(jax.random.key(0), three, **options)


def test_quadrature_is_for_few_numbers(normal: RewardPosterior) -> None:
    five = bradley_terry(PreferenceData.of_pairs([0, 1, 2, 3], [1, 2, 3, 4]))
    with pytest.raises(PreferenceError, match="at most 4 latent numbers, and there are 5; use method='laplace'"):
        infer(jax.random.key(0), five, method="quadrature")
    with pytest.raises(PreferenceError, match="bins=31 for 30 judgements; use fewer bins"):
        normal.calibration_curve(bins=31)

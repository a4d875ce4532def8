"""`RewardPosterior`: what the scores of items may be, given judgements of them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar

import jax
import numpy as np

from bayesrl.arguments import Count, FiniteNumbersOrNone, checked
from bayesrl.display.formatting import format_estimate, pluralize
from bayesrl.display.tables import Displayable, DisplayBlock, Line, Table
from bayesrl.errors import PreferenceError
from bayesrl.posterior.posterior import Posterior
from bayesrl.preferences.engines.cone_quadrature import ExactPosterior
from bayesrl.preferences.engines.laplace_approximation import FlatDensity, Gaussian
from bayesrl.preferences.held_out_checks import (
    CalibrationCurve,
    calibration_curve,
    log_score,
    predictive_p_values_of,
)
from bayesrl.preferences.preference_program import PreferenceModel
from bayesrl.preferences.records.preference_data import PreferenceData, numbers_among
from bayesrl.preferences.records.record_formats import Item
from bayesrl.preferences.score_models import LinearScores, as_whole, check_features
from bayesrl.statistics.estimates import Estimate
from bayesrl.typing import PRNGKey

_SHOWN = 20


@checked(PreferenceError)
@dataclass(frozen=True, repr=False, eq=False)
class RewardPosterior(Displayable):
    """Scores of items given judgements of them: draws, moments, evidence, and how well it predicts.

    Attributes:
        model: the program, with its data.
        method: how it was made; see `infer`.
        draws: {site: [draw, ...]}, NumPy arrays; chains of NUTS one after another.
        gaussian: mean and covariance of all latent numbers, where the posterior was approximated by a normal one.
        log_evidence: log p(y), nats; from weighted draws of a normal approximation, or exact.
        divergence: KL(q‖p) of the normal approximation, nats.
        diagnostics: by method: Laplace's own log evidence; the shape k̂ of the weights; R̂ of chains.
        exact: what quadrature gave.
        num_chains: chains of NUTS, else 1.
        fit: the `Posterior` of `bayesrl.fit`, for `diagnose` and `evidence`.

    Example:
        >>> import jax
        >>> from bayesrl import preferences
        >>> data = preferences.PreferenceData.of_pairs([0] * 10, [1] * 10, [1] * 7 + [0] * 3)
        >>> posterior = preferences.infer(jax.random.key(0), preferences.bradley_terry(data), method="quadrature")
        >>> posterior.p_best.mean.round(3).tolist()
        [0.885, 0.115]
    """

    GIVEN_BY: ClassVar[str] = "as preferences.infer gives it"

    model: PreferenceModel
    method: str
    draws: Mapping[str, np.ndarray]
    gaussian: Gaussian | None
    log_evidence: Estimate | None
    divergence: Estimate | None
    diagnostics: Mapping[str, float] = field(default_factory=dict)
    exact: ExactPosterior | None = None
    num_chains: int = 1
    fit: Posterior | None = None

    @cached_property
    def scores(self) -> np.ndarray:
        """Draws of the scores, [draw, item], in the units of the model."""
        return self._scores_by(self.model)

    def _scores_by(self, model: PreferenceModel) -> np.ndarray:
        own = model.score_model
        run = jax.jit(jax.vmap(lambda latent: own.scores(latent, as_whole(np.arange(model.data.num_items)))))
        return np.asarray(run(np.asarray(self.draws[own.site], np.float32)), float)

    def scores_of(self, items: Sequence[Item], *, features: FiniteNumbersOrNone = None) -> np.ndarray:
        """Return draws of the scores of items, [draw, item], which may be others than the model's.

        Args:
            items: records with `completion` and perhaps `prompt`; those of the model are found again by their texts.
            features: of them, [items, features], for a model that is linear in features.

        Raises:
            PreferenceError: the model has a free score for each of its own items, and none for others.
        """
        own, known = self.model.score_model, numbers_among(self.model.data.items, items)
        if features is None and (known >= 0).all():
            return self.scores[:, known]
        empty = PreferenceData("labels", tuple(items), np.zeros((0, 1), int), np.zeros((0, 1), int))
        if isinstance(own, LinearScores) and features is not None:
            return np.asarray(self.draws[own.site] @ check_features(features, empty).T)
        moved = own.for_items(tuple(items))
        run = jax.jit(jax.vmap(lambda latent: moved.scores(latent, as_whole(np.arange(len(items))))))
        return np.asarray(run(np.asarray(self.draws[own.site], np.float32)), float)

    @cached_property
    def mean(self) -> Estimate:
        """Posterior means of the scores, [items]; the error is 0 where the posterior is exact or normal."""
        if self._moments is not None:
            return Estimate(self._moments[0], np.zeros(self.model.data.num_items))
        return _mean_of(self.scores, self.num_chains)

    @cached_property
    def sd(self) -> np.ndarray:
        """Posterior standard deviations of the scores, [items]."""
        return np.sqrt(np.diag(self.covariance))

    @cached_property
    def covariance(self) -> np.ndarray:
        """Posterior covariance of the scores, [items, items]."""
        return (
            self._moments[1]
            if self._moments is not None
            else np.cov(self.scores.T, ddof=1).reshape(2 * (self.model.data.num_items,))
        )

    @cached_property
    def _moments(self) -> tuple[np.ndarray, np.ndarray] | None:
        """Mean and covariance of the scores in closed form, if there are such."""
        known: Any = self.exact if self.exact is not None else self.gaussian
        if known is None:
            return None
        part, _ = FlatDensity.of(self.model).slices[self.model.score_model.site]
        mean, covariance = known.mean[part], known.covariance[part, part]
        if isinstance(self.model.score_model, LinearScores):
            map_ = self.model.score_model.features
            return map_ @ mean, map_ @ covariance @ map_.T
        return mean, covariance

    @cached_property
    def p_best(self) -> Estimate:
        """P(the item has the greatest score), [items]."""
        if self.exact is not None:
            return Estimate(self.exact.p_best, np.zeros_like(self.exact.p_best))
        best = np.eye(self.scores.shape[1])[self.scores.argmax(-1)]
        return _mean_of(best, self.num_chains)

    def log_score(self, data: PreferenceData | None = None, *, features: FiniteNumbersOrNone = None) -> Estimate:
        """Return the mean log P of judgements, nats per row, with its standard error over rows.

        Args:
            data: held-out judgements; by default those that the posterior was made from, which it fits too well.
            features: of their items, for a model that is linear in features.

        Raises:
            PreferenceError: the data are of another kind, or of items or annotators that the model does not know.
        """
        return log_score(self._model_of(data, features), self.draws)

    def calibration_curve(
        self, data: PreferenceData | None = None, *, bins: Count = 10, features: FiniteNumbersOrNone = None
    ) -> CalibrationCurve:
        """Compare predicted chances with what happened, by bins of equal counts.

        Args:
            data: held-out judgements; by default those that the posterior was made from.
            bins: how many.
            features: of the items, for a model that is linear in features.

        Raises:
            PreferenceError: as `log_score`; or there are fewer judgements than bins.
        """
        return calibration_curve(self._model_of(data, features), self.draws, bins)

    def predictive_p_values(self, key: PRNGKey) -> dict[str, float]:
        """Compare replicated judgements with those seen: P(T(replicated) > T(seen)), which is near 0 or 1 if wrong."""
        return predictive_p_values_of(key, self.model.over_all_data(), self.draws)

    def _model_of(self, data: PreferenceData | None, features: Any) -> PreferenceModel:
        return self.model.over_all_data() if data is None else self.model.with_data(data, features)

    def _blocks(self) -> Sequence[DisplayBlock]:
        told = f"RewardPosterior by {self.method}: {self.model!r}, {pluralize(len(self.scores), 'draw')}"
        blocks: list[DisplayBlock] = [Line(told)]
        order = np.argsort(-self.mean.mean, kind="stable")[:_SHOWN]
        rows = [
            [
                self.model.data.names[at][:40],
                f"{self.mean.mean[at]:.3f}",
                f"{self.sd[at]:.3f}",
                f"{self.p_best.mean[at]:.3f}",
            ]
            for at in order
        ]
        blocks.append(Table(["item", "mean", "sd", "P(best)"], rows, "lrrr"))
        if self.model.data.num_items > _SHOWN:
            blocks.append(Line(f"({self.model.data.num_items - _SHOWN} further items)"))
        if self.log_evidence is not None:
            blocks.append(Line(f"log evidence {_shown(self.log_evidence)} nats"))
        if self.divergence is not None:
            blocks.append(Line(f"KL from this normal approximation to the posterior: {_shown(self.divergence)} nats"))
        return blocks


def _shown(estimate: Estimate) -> str:
    return format_estimate(Estimate(np.asarray(estimate.mean), np.asarray(estimate.se)))


def _mean_of(values: np.ndarray, num_chains: int) -> Estimate:
    """Average draws, [draws, ...], with the error that chains of correlated draws have."""
    if num_chains == 1:
        return Estimate(values.mean(0), values.std(0, ddof=1) / np.sqrt(len(values)))
    from numpyro.diagnostics import effective_sample_size

    chains = values.reshape(num_chains, -1, *values.shape[1:])
    with np.errstate(all="ignore"):
        ess = np.asarray(effective_sample_size(chains))
    # What is the same in all draws has no error, and no effective number.
    ess = np.where(np.isfinite(ess), np.minimum(ess, len(values)), len(values))
    return Estimate(values.mean(0), values.std(0, ddof=1) / np.sqrt(np.maximum(ess, 1.0)))

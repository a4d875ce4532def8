"""Averages over draws of several policies in fixed, equal shares, which each number of a fit is estimated from.

With draws of the mixture m = Σₖ qₖ/K, E_qₖ[f] = E_m[(qₖ/m)·f], and no ratio exceeds K, so no average rests on a few
heavy draws. The mean of qₖ/m is known to be 1, so it is a control variate: if f is constant over qₖ, its average has no
noise at all (Owen & Zhou 2000, "Safe and effective importance sampling", section 4).
"""

import numpy as np

from bayesrl.diagnostics.evidence.confidence_limits import skewed_limits, stratified_interval
from bayesrl.statistics.estimates import InfluenceEstimate, Interval


class StratifiedEstimator:
    """Averages over draws [draws, contexts], ordered by the policy they come from, each with its influence function.

    Args:
        controls: functions of the draws whose means are known to be 0, [controls, draws, contexts].
        num_strata: number of policies.
    """

    def __init__(self, controls: np.ndarray, num_strata: int) -> None:
        self.controls, self.num_strata = controls, num_strata
        self._centred = np.stack([self._centre(control) for control in controls])
        # Controls may be equal, add up to 0, or be 0: the pseudo-inverse drops those directions.
        gram = np.einsum("knc,lnc->ckl", self._centred, self._centred)
        self._solve = np.linalg.pinv(gram, rcond=1e-9, hermitian=True)

    def regress(self, terms: np.ndarray) -> tuple[InfluenceEstimate, np.ndarray]:
        """Average terms, less what the controls explain of them within the strata; also return the slopes."""
        # The strata's sizes are fixed, so differences between strata are no noise for the controls to explain.
        covariance = np.einsum("knc,nc->kc", self._centred, self._centre(terms))
        slopes = np.einsum("ckl,lc->ck", self._solve, covariance)
        return self.plain(terms - np.einsum("ck,knc->nc", slopes, self.controls)), slopes

    def plain(self, terms: np.ndarray) -> InfluenceEstimate:
        """Average without controls, so that averages of non-negative terms are not negative."""
        mean = terms.mean(0)
        return InfluenceEstimate(mean, terms - mean)

    def interval(self, found: InfluenceEstimate, rounding: float, *, calibrated: bool = True) -> Interval:
        """Return the 95% intervals of an average over contexts; see `stratified_interval`."""
        by_stratum = found.influence.reshape(self.num_strata, -1, found.mean.size).mean(2)
        return stratified_interval(float(found.mean.mean()), by_stratum, rounding, calibrated=calibrated)

    def by_context(self, found: InfluenceEstimate, rounding: float) -> Interval:
        """Return mean, standard error and calibrated interval of each context, [contexts]; no conservative one."""
        n, by_stratum = len(found.influence), self._by_stratum(found.influence)
        se = np.sqrt(by_stratum.shape[1] * by_stratum.var(1, ddof=1).sum(0)) / n
        skewness = (found.influence**3).mean(0) / np.maximum((found.influence**2).mean(0), 1e-200) ** 1.5
        ends = np.array([skewed_limits(*x, n) for x in zip(found.mean, se, skewness, strict=True)])
        nothing = np.full(se.shape, np.inf)
        return Interval(found.mean, se, ends[:, 0] - rounding, ends[:, 1] + rounding, -nothing, nothing)

    def _by_stratum(self, values: np.ndarray) -> np.ndarray:
        return values.reshape(self.num_strata, -1, values.shape[-1])

    def _centre(self, values: np.ndarray) -> np.ndarray:
        by_stratum = self._by_stratum(values)
        return (by_stratum - by_stratum.mean(1, keepdims=True)).reshape(values.shape)

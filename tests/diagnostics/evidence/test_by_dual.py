"""The dual problem of other regularisers than KL: conjugates, intervals and limits against sums, without a program."""

import math
from typing import Any

import numpy as np
import pytest

from bayesrl.diagnostics.evidence.by_dual import Chosen, DualSample
from bayesrl.diagnostics.evidence.mixture_sample import MixtureSample
from bayesrl.diagnostics.evidence.result import Evidence
from bayesrl.diagnostics.evidence.tempered_sample import Bounds
from bayesrl.errors import EngineError
from bayesrl.exact.regularizers import find_multiplier, make_regularizer

KINDS: list[Any] = [
    ("chi_squared", None),
    ("chi_squared_kl", None),
    ("jensen_shannon", None),
    ("jensen_shannon_sum", None),
    ("forward_kl", None),
    ("alpha", 0.5),
    ("alpha", -1.0),
    ("alpha", 3.0),
]
REWARD = np.linspace(0.1, 0.9, 5)
PRIOR = np.full(5, 0.2)
REPEATS = 120


@pytest.mark.parametrize(("name", "alpha"), KINDS)
def test_conjugates_are_the_greatest_value_of_a_line_less_f(name: Any, alpha: Any) -> None:
    f = make_regularizer(name, alpha)
    assert f is not None
    v = np.array([0.02, 0.1, 0.4, 0.9]) * (f.limit if f.bounded else 1.0) - (0.0 if f.bounded else 0.5)
    t = np.concatenate([np.geomspace(1e-6, 1e4, 200_001), f.ratio(v)])[:, None]
    on_a_line = t * (f.origin - v) - f.value(t)
    np.testing.assert_allclose(f.conjugate(v), on_a_line.max(0), rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(f.conjugate(v), np.diag(on_a_line[-len(v) :]), rtol=1e-9, atol=1e-12)
    # What q has where the prior has nothing costs the limit of f′.
    assert f.divergence(np.array(np.inf), np.array(0.0), np.array(0.3)) == pytest.approx(0.3 * f.limit)


def sample(rng: np.random.Generator, q: np.ndarray, num: int) -> MixtureSample:
    x = np.concatenate([rng.choice(5, num, p=q), rng.choice(5, num, p=PRIOR)])[:, None]
    with np.errstate(divide="ignore"):
        log_prior, log_q = np.log(PRIOR)[x], np.log(q)[x]
    none, code = np.zeros(x.shape), np.stack([x, x], -1).astype(np.uint32)
    return MixtureSample(log_prior, log_q, none, REWARD[x], log_prior - log_q, none, code, num)


def bracket(rng: np.random.Generator, q: np.ndarray, chosen: Chosen, beta: float, num: int, top: float) -> Evidence:
    return DualSample(sample(rng, q, num), beta, chosen, Bounds(np.array([top]))).evidence()


@pytest.mark.parametrize(
    ("name", "alpha", "beta"), [("chi_squared", None, 0.5), ("jensen_shannon", None, 0.1), ("forward_kl", None, 0.5)]
)
def test_intervals_cover_and_limits_hold(name: Any, alpha: Any, beta: float) -> None:
    """Calibrated intervals cover 95%, within 4 errors of 120 repeats; limits always; upper estimates are not below."""
    f = make_regularizer(name, alpha)
    assert f is not None
    root = find_multiplier(REWARD[:, None], beta, PRIOR[:, None], f, name)
    best = PRIOR * f.ratio(f.origin - (REWARD - root) / beta)
    q = 0.9 * best / best.sum() + 0.1 * PRIOR

    def objective(policy: np.ndarray) -> float:
        return float(policy @ REWARD - beta * (PRIOR @ f.value(policy / PRIOR)))

    optimum, own = objective(best), objective(q)
    rng, found = np.random.default_rng(3), []
    for _ in range(REPEATS):
        found.append(bracket(rng, q, Chosen(name, alpha, f), beta, 400, 0.9))
    for told, truth in (("optimum", optimum), ("objective", own), ("gap", optimum - own)):
        interval = [getattr(one, told) for one in found]
        inside = np.mean([one.lower <= truth <= one.upper for one in interval])
        assert inside >= 0.95 - 4 * math.sqrt(0.95 * 0.05 / REPEATS), told
        assert all(one.conservative_lower <= truth <= one.conservative_upper for one in interval), told
    upper = beta * np.array([one.upper.mean for one in found if one.upper is not None])
    assert len(upper) == REPEATS
    assert upper.mean() - optimum >= -4 * upper.std() / math.sqrt(REPEATS)
    assert {one.caveat for one in found} == {""}


def test_at_the_optimum_the_gap_has_no_noise() -> None:
    for name, alpha in KINDS:
        f = make_regularizer(name, alpha)
        assert f is not None
        root = find_multiplier(REWARD[:, None], 0.5, PRIOR[:, None], f, name)
        best = PRIOR * f.ratio(f.origin - (REWARD - root) / 0.5)
        found = bracket(np.random.default_rng(4), best / best.sum(), Chosen(name, alpha, f), 0.5, 400, 0.9)
        assert found.gap is not None
        assert found.gap.upper < 1e-5
        assert found.missed_mass == 0


def test_without_a_bound_or_with_what_is_lost_only_one_side_is_told() -> None:
    f = make_regularizer("chi_squared", None)
    assert f is not None
    chosen, rng = Chosen("chi_squared", None, f), np.random.default_rng(5)
    found = bracket(rng, PRIOR, chosen, 0.1, 400, math.inf)
    assert found.upper is None
    assert found.optimum.conservative_upper == math.inf
    assert "no upper bound of the rewards" in found.caveat
    assert found.gap is not None
    assert math.isnan(found.gap.mean)
    # A bound far above what is ever earned leaves conservative limits alone, and they are wide.
    loose = bracket(rng, PRIOR, chosen, 0.1, 400, 50.0)
    assert "too much of the prior" not in loose.caveat  # all five values were seen
    unseen = bracket(rng, np.array([0.9999, 0, 0, 0, 0.0001]), chosen, 0.01, 40, 0.9)
    assert "worth only" in unseen.caveat
    lost = sample(rng, PRIOR, 400)
    lost.reward[3] = -np.inf
    minus = DualSample(lost, 0.1, chosen, Bounds(np.array([0.9]))).evidence()
    assert (minus.objective.mean, minus.reward.mean) == (-math.inf, -math.inf)
    assert minus.gap is not None
    assert minus.gap.mean == math.inf
    nothing = make_regularizer("forward_kl", None)
    assert nothing is not None
    narrow = bracket(rng, np.array([0, 0.25, 0.25, 0.25, 0.25]), Chosen("forward_kl", None, nothing), 0.5, 400, 0.9)
    assert narrow.objective.mean == -math.inf


def test_a_regularizer_without_a_root_is_refused_by_name() -> None:
    f = make_regularizer("alpha", 2000.0)
    assert f is not None
    with pytest.raises(EngineError, match=r"regularizer='alpha' has no root λ in double precision at β = 0.001"):
        bracket(np.random.default_rng(6), PRIOR, Chosen("alpha", 2000.0, f), 1e-3, 400, 0.9)

"""Laplace's approximation by Newton's method with exact Hessians, and its error by weighted draws."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import numpy as np
from numpyro import handlers
from numpyro.infer.util import log_density
from scipy.linalg import solve_triangular
from scipy.special import gammaln, logsumexp

from bayesrl.compilation.jit import trace_once
from bayesrl.diagnostics.tail_behaviour import pareto_shape
from bayesrl.errors import PreferenceError
from bayesrl.preferences.preference_program import OUTCOME, PreferenceModel
from bayesrl.statistics.estimates import Estimate

type _OfVector = Callable[[Any], Any]

_MAX_STEPS, _MAX_HALVINGS, _TOLERANCE = 200, 40, 1e-10
_NUMBERS_AT_ONCE, _LEAST_AT_ONCE, _MOST_AT_ONCE = 2**20, 64, 2048


@dataclass(frozen=True)
class FlatDensity:
    """log p(θ, y) of a model as a function of one vector, in double precision.

    Attributes:
        model: the program.
        slices: where each site lies in the vector, and its shape.
        programs: compiled functions of it, by name, which serve other outcomes of the same judgements too.
    """

    model: PreferenceModel
    slices: Mapping[str, tuple[slice, tuple[int, ...]]]
    programs: dict[str, Callable[..., Any]] = field(default_factory=dict)

    @classmethod
    def of(cls, model: PreferenceModel) -> "FlatDensity":
        """Lay out the sites of a model."""
        slices, end = {}, 0
        for name, (_, shape) in model.priors.items():
            slices[name] = (slice(end, end + math.prod(shape)), shape)
            end += math.prod(shape)
        return cls(model.over_all_data(), slices)

    @property
    def size(self) -> int:
        """Length of the vector."""
        return max(part.stop for part, _ in self.slices.values())

    def split(self, vectors: Any) -> dict[str, Any]:
        """Return the sites in vectors, [..., size]."""
        return {
            name: vectors[..., part].reshape(*vectors.shape[:-1], *shape) for name, (part, shape) in self.slices.items()
        }

    def given(self, outcomes: Any) -> "FlatDensity":
        """Return that of other outcomes of the same judgements."""
        return replace(self, model=self.model.with_outcomes(outcomes))

    def program(self, name: str, change: Callable[[_OfVector], _OfVector]) -> _OfVector:
        """Compile a change of the function from a vector to log p(θ, y), nats, such as its slope."""
        if name not in self.programs:
            model = self.model

            def run(vector: Any, outcomes: Any) -> Any:
                seen = handlers.condition(model, {OUTCOME: outcomes})
                return change(lambda at: log_density(seen, (), {}, self.split(at))[0])(vector)

            self.programs[name] = trace_once(run, name=name)
        return lambda vector: self.programs[name](vector, self.model.outcomes)

    def many(self, vectors: np.ndarray) -> np.ndarray:
        """Return log p(θ, y) of many vectors, [n, size] → [n]."""
        # Parts of one size, so that one program serves all calls, whatever their number of vectors.
        size = max(_LEAST_AT_ONCE, min(_MOST_AT_ONCE, _NUMBERS_AT_ONCE // len(self.model.data)))
        padded = np.concatenate([vectors, np.zeros((-len(vectors) % size, self.size))])
        with jax.enable_x64(True):
            run = self.program("log_densities", jax.vmap)
            parts = [np.asarray(run(part)) for part in np.split(padded, len(padded) // size)]
        return np.concatenate(parts)[: len(vectors)]


@dataclass(frozen=True)
class Gaussian:
    """A normal approximation of a posterior.

    Attributes:
        mean: [size].
        covariance: [size, size].
    """

    mean: np.ndarray
    covariance: np.ndarray

    @property
    def root(self) -> np.ndarray:
        """The lower Cholesky factor of the covariance."""
        return np.asarray(np.linalg.cholesky(self.covariance))

    def draw(self, rng: np.random.Generator, num_samples: int) -> np.ndarray:
        """Draw, [num_samples, size]."""
        return self.mean + rng.standard_normal((num_samples, len(self.mean))) @ self.root.T

    def log_prob(self, vectors: np.ndarray) -> np.ndarray:
        """Return log densities, [n]."""
        root = self.root
        whitened = solve_triangular(root, (vectors - self.mean).T, lower=True)
        log_det = float(np.log(np.diag(root)).sum())
        return np.asarray(-0.5 * (whitened**2).sum(0) - log_det - 0.5 * len(self.mean) * math.log(2 * math.pi))


def laplace(density: FlatDensity) -> tuple[Gaussian, float]:
    """Find the mode, and return N(mode, −Hessian⁻¹) with Laplace's own log evidence, nats.

    Raises:
        PreferenceError: Newton's method does not settle, or its end is no maximum.
    """
    with jax.enable_x64(True):
        value_and_slope = density.program("value_and_slope", jax.value_and_grad)
        curvature = density.program("curvature", jax.hessian)
        mode = _maximise(value_and_slope, curvature, density.size)
        value, _ = value_and_slope(mode)
        precision = -np.asarray(curvature(mode))
    try:
        root = np.linalg.cholesky(precision)
    except np.linalg.LinAlgError as error:
        raise PreferenceError(
            "the log posterior is not curved downwards in all directions at its mode, so Laplace's approximation does "
            "not exist there; use method='nuts', or a smaller scale"
        ) from error
    inverse = solve_triangular(root, np.eye(len(root)), lower=True)
    log_det = 2 * float(np.log(np.diag(root)).sum())
    evidence = float(value) + 0.5 * density.size * math.log(2 * math.pi) - 0.5 * log_det
    return Gaussian(mode, inverse.T @ inverse), evidence


def _maximise(value_and_slope: Callable[..., Any], curvature: Callable[..., Any], size: int) -> np.ndarray:
    """Climb by Newton steps, halved until they rise; where the curvature is wrong, by steps along |eigenvalues|."""
    at = np.zeros(size)
    value, slope = (np.asarray(part) for part in value_and_slope(at))
    for _ in range(_MAX_STEPS):
        eigenvalues, vectors = np.linalg.eigh(-np.asarray(curvature(at)))
        step = vectors @ ((vectors.T @ slope) / np.maximum(np.abs(eigenvalues), 1e-8))
        promise = float(slope @ step)
        if promise < _TOLERANCE:
            return at
        length = 1.0
        for _ in range(_MAX_HALVINGS):
            trial, new_slope = (np.asarray(part) for part in value_and_slope(at + length * step))
            if trial >= value + 1e-4 * length * promise - 1e-12 * abs(value):
                break
            length /= 2
        else:
            break
        at, value, slope = at + length * step, trial, new_slope
    raise PreferenceError(
        "Newton's method did not find the mode of the posterior; use method='nuts', or a smaller prior scale"
    )


@dataclass(frozen=True)
class WeightedCheck:
    """What weighted draws say of a normal approximation q of a posterior p.

    Attributes:
        log_evidence: log p(y), nats.
        divergence: KL(q‖p), nats.
        khat: the shape of the weights' tail; above 0.7, neither number can be trusted.
    """

    log_evidence: Estimate
    divergence: Estimate
    khat: float


def weighted_check(
    density: FlatDensity, gaussian: Gaussian, rng: np.random.Generator, num_samples: int
) -> WeightedCheck:
    """Weigh draws around a normal approximation by the posterior; those for the evidence have heavier tails."""
    proposed, log_q = heavy_draws(gaussian, rng, num_samples)
    log_w = density.many(proposed) - log_q
    evidence = float(logsumexp(log_w) - math.log(num_samples))
    se = float(np.exp(log_w - evidence).std(ddof=1)) / math.sqrt(num_samples)
    own = gaussian.draw(rng, num_samples)
    # KL(q‖p) = E_q[w − 1 − log w] for w = p/q: no term is negative, and an error of the evidence counts only squared.
    log_ratio = density.many(own) - gaussian.log_prob(own) - evidence
    terms = np.expm1(log_ratio) - log_ratio
    divergence = Estimate(np.asarray(terms.mean()), np.asarray(terms.std(ddof=1) / math.sqrt(num_samples)))
    return WeightedCheck(Estimate(np.asarray(evidence), np.asarray(se)), divergence, pareto_shape(log_w))


def heavy_draws(gaussian: Gaussian, rng: np.random.Generator, num_samples: int) -> tuple[np.ndarray, np.ndarray]:
    """Draw from Student's t with the mean and the scale of a normal one; return draws, [n, size], and log densities.

    The tails of a posterior are at most normal where the prior is, so that its weights are bounded.
    """
    size = len(gaussian.mean)
    freedom = 5.0 + 2 * size  # with fewer, most draws of many numbers would lie too far out
    shrink = np.sqrt(rng.chisquare(freedom, num_samples) / freedom)
    draws = gaussian.mean + (gaussian.draw(rng, num_samples) - gaussian.mean) / shrink[:, None]
    root = gaussian.root
    squared = (solve_triangular(root, (draws - gaussian.mean).T, lower=True) ** 2).sum(0)
    constant = gammaln((freedom + size) / 2) - gammaln(freedom / 2) - 0.5 * size * math.log(freedom * math.pi)
    log_det = float(np.log(np.diag(root)).sum())
    return draws, constant - log_det - 0.5 * (freedom + size) * np.log1p(squared / freedom)


def as_vectors(density: FlatDensity, draws: Mapping[str, Any]) -> np.ndarray:
    """Lay draws of sites out as vectors, [n, size]."""
    count = len(next(iter(draws.values())))
    return np.concatenate([np.asarray(draws[name], float).reshape(count, -1) for name in density.slices], -1)

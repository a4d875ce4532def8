"""Values of one site, from the prior, the fit and the target, laid out alike so that they can be compared."""

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Shaped

from bayesrl.compilation.keys import key_from_seed
from bayesrl.core.density import log_density
from bayesrl.core.structure import Structure
from bayesrl.errors import PolicyError
from bayesrl.exact.weighted_draws import WeightedDraws, context_axes
from bayesrl.posterior.posterior import Posterior

MAX_FINITE = 200
"""Whole numbers with at most this many different values are shown value by value."""

_TARGET_DRAWS = 1000
_GRID = 400

type SupportKind = Literal["finite", "integers", "reals"]


class SiteValues(NamedTuple):
    """Values of one site with weights.

    Attributes:
        values: [draws, contexts, positions]; positions are time steps, elements, or both.
        weights: [draws, contexts], adding up to 1 over draws.
    """

    values: Shaped[np.ndarray, "draws contexts positions"]
    weights: Float[np.ndarray, "draws contexts"]


class SiteComparison(NamedTuple):
    """One site at one temperature: what the prior, the fit and the target do.

    Attributes:
        site: its name.
        beta: temperature, reward units per nat; None without rewards.
        support: finite, integers or reals.
        categories: values to show one by one; empty for reals.
        steps: what a position is: `time step`, `element`, or empty where there is only one.
        prior: draws of the policy before the fit.
        fitted: draws of the fit.
        target: the posterior p*, or None where it is not known.
        density: points and density of p* on the real line, or None.
    """

    site: str
    beta: float | None
    support: SupportKind
    categories: np.ndarray
    steps: str
    prior: SiteValues
    fitted: SiteValues
    target: SiteValues | None
    density: tuple[np.ndarray, np.ndarray] | None


def compare_site(posterior: Posterior, target: WeightedDraws | None, site: str) -> SiteComparison:
    """Lay out one site of a posterior that holds one β and one restart.

    Args:
        posterior: of one β and restart, over all its data where contexts are to be compared.
        target: p* of the same β, or None.
        site: an action or environment site.

    Raises:
        PolicyError: there is no such site among the draws.
    """
    if site not in posterior.draws:
        raise PolicyError(f"there are no draws of site {site!r}; choose from {', '.join(posterior.draws) or 'none'}")
    structure = posterior.programs.structure if posterior.programs is not None else None
    contexts = posterior.statistics["log_weight"].shape[2:]
    fitted = np.asarray(posterior.draws[site][0])
    axes = _context_axes(posterior, site, fitted.shape[1:], contexts)
    prior = _values(np.asarray(posterior.prior_draws[site]), axes, contexts)
    laid = _values(fitted, axes, contexts)
    known = _target(target, site, axes, contexts) if target is not None else None
    support, categories = _support(structure, site, [prior, laid] + ([known] if known else []))
    return SiteComparison(
        site,
        None if posterior.beta is None else float(posterior.beta),
        support,
        categories,
        _positions(structure, site, laid.values.shape[2]),
        prior,
        laid,
        known,
        _density(posterior, site, prior, laid) if support == "reals" else None,
    )


def value_text(posterior: Posterior, site: str, value: Any) -> str | None:
    """Give the text of a value of a site, where the program has a method `read(site, value)` that knows one."""
    program: Any = None if posterior.programs is None else posterior.programs.policy
    while program is not None and not hasattr(program, "read"):
        program = getattr(program, "fn", None)  # handlers stand around it
    return None if program is None else program.read(site, value)


def site_values(posterior: Posterior, site: str) -> SiteValues:
    """Lay out the draws of one site of a posterior that holds one β and one restart."""
    contexts = posterior.statistics["log_weight"].shape[2:]
    draws = np.asarray(posterior.draws[site][0])
    return _values(draws, _context_axes(posterior, site, draws.shape[1:], contexts), contexts)


def frequencies(values: SiteValues, categories: np.ndarray) -> Float[np.ndarray, "contexts positions values"]:
    """Give the weighted frequency of each category, by context and position."""
    hits = values.values[..., None] == categories
    result: np.ndarray = np.einsum("dc,dcpk->cpk", values.weights, hits.astype(float))
    return result


def quantiles(values: SiteValues, levels: tuple[float, ...]) -> Float[np.ndarray, "levels positions"]:
    """Give weighted quantiles at each position, contexts pooled."""
    draws, contexts, positions = values.values.shape
    flat = values.values.reshape(draws * contexts, positions).astype(float)
    weights = np.broadcast_to(values.weights / contexts, (draws, contexts)).reshape(-1)
    result = np.empty((len(levels), positions))
    for position in range(positions):
        order = np.argsort(flat[:, position])
        reached = np.cumsum(weights[order])
        index = np.searchsorted(reached, np.asarray(levels) * reached[-1])
        result[:, position] = flat[order, position][np.minimum(index, len(order) - 1)]
    return result


def _context_axes(
    posterior: Posterior, site: str, shape: tuple[int, ...], contexts: tuple[int, ...]
) -> tuple[int | None, ...]:
    """Tell which axes of a site's value are contexts; None for a plate that it stands outside of."""
    programs = posterior.programs
    if programs is not None:
        return context_axes(programs.structure)[site]
    start = next((i for i in range(len(shape)) if shape[i : i + len(contexts)] == contexts), None)
    return tuple(None if start is None else start + i for i in range(len(contexts)))


def _values(draws: np.ndarray, axes: tuple[int | None, ...], contexts: tuple[int, ...]) -> SiteValues:
    """Bring draws [draws, ...] into the form of `Values`, all of the same weight."""
    own = [1 + axis for axis in axes if axis is not None]
    sizes = [draws.shape[axis] for axis in own]
    moved = np.moveaxis(draws, own, range(1, 1 + len(own)))
    aligned = moved.reshape(
        len(draws), *(1 if axis is None else sizes.pop(0) for axis in axes), int(np.prod(moved.shape[1 + len(own) :]))
    )
    full = np.broadcast_to(aligned, (len(draws), *contexts, aligned.shape[-1]))
    flat = full.reshape(len(draws), int(np.prod(contexts, dtype=int)), aligned.shape[-1])
    return SiteValues(flat, np.full(flat.shape[:2], 1 / len(draws)))


def _target(
    target: WeightedDraws, site: str, axes: tuple[int | None, ...], contexts: tuple[int, ...]
) -> SiteValues | None:
    """Lay out p*: its weighted assignments, or draws from it where none are held."""
    log_weights = np.asarray(target.log_weights)
    if log_weights.shape[log_weights.ndim - len(contexts) :] != contexts:
        return None
    if site in target.sites and log_weights.ndim == 1 + len(contexts):
        laid = _values(np.asarray(target.sites[site]), axes, contexts)
        return laid._replace(weights=np.exp(log_weights).reshape(len(log_weights), -1))
    draws = target.resample(key_from_seed(0), _TARGET_DRAWS)[site]
    return _values(np.asarray(draws), axes, contexts)


def _support(structure: Structure | None, site: str, sources: list[SiteValues]) -> tuple[SupportKind, np.ndarray]:
    declared = structure[site].support if structure is not None and not structure[site].event_dim else None
    if declared is not None and len(declared) <= MAX_FINITE:
        return "finite", np.asarray(declared)
    if not all(np.issubdtype(source.values.dtype, np.integer) or source.values.dtype == bool for source in sources):
        return "reals", np.zeros(0)
    seen = np.unique(np.concatenate([np.unique(source.values).astype(int) for source in sources]))
    low = min(int(quantiles(s, (0.001,)).min()) for s in sources)
    high = max(int(quantiles(s, (0.999,)).max()) for s in sources)
    if len(seen) > MAX_FINITE and high - low >= MAX_FINITE:
        return "reals", np.zeros(0)
    return "integers", np.arange(low, high + 1)


def _positions(structure: Structure | None, site: str, count: int) -> str:
    if count == 1:
        return ""
    if structure is not None and structure[site].scan is None:
        return "time step" if structure[site].length == count else "element"
    if structure is not None and structure[site].length < count:
        return "time step and element"
    return "time step"


def _density(
    posterior: Posterior, site: str, prior: SiteValues, fitted: SiteValues
) -> tuple[np.ndarray, np.ndarray] | None:
    """Integrate p* on a grid where the site is the program's only draw and a single number."""
    programs = posterior.programs
    if programs is None or prior.values.shape[1:] != (1, 1) or posterior.draws[site].ndim != 2:
        return None
    if programs.structure.names("action", "environment") != (site,):
        return None
    both = np.concatenate([prior.values.ravel(), fitted.values.ravel()])
    grid = np.linspace(both.min(), both.max(), _GRID)
    policy, args = programs.policy, programs.args
    beta = None if posterior.beta is None else float(posterior.beta)

    def score(value: Array) -> Array:
        return log_density(policy, {site: value}, *args, beta=beta).log_target.sum()

    log_target = np.asarray(jax.vmap(score)(jnp.asarray(grid, jnp.float32)), float)
    density = np.exp(log_target - log_target.max())
    return grid, density / np.trapezoid(density, grid)


def shown_sites(posterior: Posterior) -> Mapping[str, Any]:
    """Give the draws of the sites to show: actions, or whatever was drawn where that is not known."""
    if posterior.programs is None:
        return posterior.draws
    return {name: posterior.draws[name] for name in posterior.programs.structure.actions}

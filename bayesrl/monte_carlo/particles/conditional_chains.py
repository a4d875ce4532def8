"""Runs of particles and chains of conditional ones: paths that runs hold and renew until they are draws of p*."""

import math
from collections.abc import Mapping
from typing import Annotated, Any, NamedTuple

import numpy as np
from scipy import special
from scipy.special import logsumexp

from bayesrl.argument_types import Requirement
from bayesrl.compilation.random_keys import fold_in
from bayesrl.core.structure import Structure
from bayesrl.errors import EngineError
from bayesrl.exact.weighted_draws import context_axes, gather_by_context, numpy_generator
from bayesrl.monte_carlo.particles.engines import ParticleEngine
from bayesrl.typing import PRNGKey

SWEEPS = (8, 16, 32)
"""After so many conditional runs a chain is judged; the last is the most that it goes on for."""

_MAX_RHAT = 1.1
_FALSE_ALARMS = 1e-3
_NOTHING = 1e-8


type ExactDraws = Annotated[
    Mapping[str, Any],
    Requirement("draws of p*, {site: [draws, ...]}", lambda value: isinstance(value, Mapping), any_type=True),
]


def check_exact_draws(structure: Structure, draws: Mapping[str, Any]) -> None:
    """Refuse draws that are not of all action sites of a program, equally many of each.

    Raises:
        EngineError: naming the site.
    """
    if set(draws) != set(structure.actions):
        raise EngineError(f"exact_draws has sites {sorted(draws)}; pass draws of {sorted(structure.actions)}")
    count = np.shape(draws[structure.actions[0]])[:1]
    for name in structure.actions:
        shape, wanted = np.shape(draws[name]), (*count, *structure[name].shape)
        if count in ((), (0,)) or shape != wanted:
            raise EngineError(
                f"exact_draws has shape {shape} at site {name!r}; pass [draws, ...], here {['draws', *wanted[1:]]}"
            )


class Runs(NamedTuple):
    """Replications of particles: paths [replications, particles, ...], and numbers with contexts last, nats.

    Attributes:
        sites: latent sites.
        log_weights: of Ẑ's terms.
        w: log π₀/q + R/β + log p(y|x) of each path.
    """

    sites: dict[str, np.ndarray]
    log_weights: np.ndarray
    w: np.ndarray

    @property
    def log_z(self) -> np.ndarray:
        """Log Ẑ of each replication, [replications, contexts], nats."""
        return np.asarray(logsumexp(self.log_weights, axis=1) - math.log(self.log_weights.shape[1]))


class Chains(NamedTuple):
    """Chains of conditional runs.

    Attributes:
        log_z: log Ẑ of the later half of their runs, [sweeps, chains, contexts], nats.
        rhat: the greatest R-hat, over contexts, of log Ẑ and of w of the paths.
        met: whether chains agree and their mean does not drift, [contexts].
        num_sweeps: how many runs each chain went through.
    """

    log_z: np.ndarray
    rhat: float
    met: np.ndarray
    num_sweeps: int


def run_particles(
    key: PRNGKey, engine: ParticleEngine, beta: float | None, num_particles: int, reference: dict[str, Any] | None
) -> Runs:
    """Run all replications of an engine; see `ParticleEngine.run`."""
    draws, log_weights = engine.run(key, beta, reference)
    w = draws.log_base if beta is None else draws.log_base + draws.reward / beta
    sites = {name: np.asarray(x).reshape(-1, num_particles, *np.shape(x)[1:]) for name, x in draws.sites.items()}
    weights, w = (x.reshape(-1, num_particles, x.shape[-1]) for x in (log_weights, w))
    return Runs(sites, weights, w)


def walk_chains(
    key: PRNGKey,
    engine: ParticleEngine,
    beta: float | None,
    num_particles: int,
    forward: Runs,
    structure: Structure,
    num_sweeps: tuple[int, ...] = SWEEPS,
) -> Chains:
    """Walk one chain per forward run towards p* by conditional particles, until chains have met.

    The first quarter of the runs warms up and is not judged. Where that many have not met, the engine may renew the
    pasts of its references from then on, which takes longer and mixes better.

    References:
        Andrieu, Doucet & Holenstein (2010), "Particle Markov chain Monte Carlo methods", section 4.5.
    """
    # Sweeps take the numbers from 0.
    rng = numpy_generator(fold_in(key, 2**20))
    (paths, _), trail = one_of_each(rng, forward, structure), []
    for sweep in range(num_sweeps[-1]):
        runs = run_particles(fold_in(key, sweep), engine, beta, num_particles, paths)
        paths, w = one_of_each(rng, runs, structure)
        trail.append((runs.log_z, w))
        if sweep + 1 in num_sweeps:
            log_z, own = (np.stack(values) for values in zip(*trail, strict=True))
            first = len(trail) // 4
            rhat, agree = have_met(np.concatenate([log_z[first:], own[first:]], -1))
            if agree.all():
                break
            if sweep + 1 == num_sweeps[0] < num_sweeps[-1] and (other := engine.renewing()) is not engine:
                # What was before the change of kernel is no longer judged.
                engine, trail = other, []
    # Both numbers of a context must agree.
    met = agree.reshape(2, -1).all(0)
    return Chains(log_z[len(trail) // 2 :], float(rhat.max()), met, sweep + 1)


def have_met(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Judge numbers of chains, [sweeps, chains, numbers]: agreement (R-hat) and drift of the mean (a t-test).

    Returns:
        R-hat, and whether the chains have met, of each number.
    """
    sweeps, chains, count = values.shape
    with np.errstate(invalid="ignore", divide="ignore"):
        within, between = values.var(0, ddof=1).mean(0), values.mean(0).var(0, ddof=1)
        rhat = np.sqrt((sweeps - 1) / sweeps + between / within)
        drift = values[sweeps // 2 :].mean(0) - values[: sweeps // 2].mean(0)
        t = np.abs(drift.mean(0)) / (drift.std(0, ddof=1) / math.sqrt(chains))
    # Without any spread R-hat is undefined: the chains agree or they do not.
    still = within < _NOTHING
    rhat = np.where(still, np.where(between < _NOTHING, 1.0, np.inf), np.where(np.isnan(rhat), np.inf, rhat))
    steady = still | (t < special.stdtrit(chains - 1, 1 - _FALSE_ALARMS / 2 / count))
    # A comparison with nan is False: numbers that are not finite have not met.
    return rhat, (rhat < _MAX_RHAT) & steady


def one_of_each(rng: np.random.Generator, runs: Runs, structure: Structure) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Choose one path of each run in proportion to its weight, in each context on its own; also return its w."""
    gumbel = rng.gumbel(size=runs.log_weights.shape)
    # Gumbel's trick: one array of noise draws for all runs and contexts, and never takes a weight of 0.
    index = (runs.log_weights + gumbel).argmax(1)  # [replications, contexts]
    axes, shape = context_axes(structure), structure.context_shape
    paths = {
        name: np.concatenate([gather_by_context(x[r], index[r : r + 1], axes[name], shape) for r in range(len(x))])
        for name, x in runs.sites.items()
    }
    return paths, np.take_along_axis(runs.w, index[:, None], 1)[:, 0]

"""Particles on a path of temperatures: from the law they are drawn from to the tilted posterior."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from scipy.special import logsumexp

from bayesrl.compilation.jit import ClosureJit
from bayesrl.compilation.random_keys import as_hash_key, fold_in, split
from bayesrl.core.programs import Programs
from bayesrl.errors import EngineError
from bayesrl.monte_carlo.particles.kernels import (
    FiniteSite,
    KernelName,
    Scales,
    Scored,
    SmoothSite,
    Target,
    finite_sites,
    gibbs,
    hamiltonian,
    independence,
    smooth_sites,
    spread_of,
)
from bayesrl.monte_carlo.particles.resampling import Scheme, ancestors, effective_size, gather, log_mean
from bayesrl.monte_carlo.particles.twists import Axes
from bayesrl.typing import Params, PRNGKey

_CONSTANCY = 0.9
"""The pilot run chooses steps of temperature that leave this share of the particles effective, in every context."""

_MOST_STEPS = 400
_ACCEPTANCE = 0.8


class _Population(NamedTuple):
    """Particles of all runs, [runs, particles, ...], with log-weights since their last resampling."""

    particles: Scored
    log_weights: Array
    log_z: Array


class TemperedRun(NamedTuple):
    """What all runs gave.

    Attributes:
        sites: [runs, particles, ...].
        log_weights: with the factors that resampling divided out, [runs, particles, contexts], nats.
        powers: λ of each step; the last is 1.
        acceptance: of independent proposals at each step, [steps, contexts].
        sizes: least effective share of the particles at each step, before any resampling.
    """

    sites: dict[str, Any]
    log_weights: np.ndarray
    powers: np.ndarray
    acceptance: np.ndarray
    sizes: np.ndarray


class _Moves(NamedTuple):
    """The static choice of moves: their names, and the sites that each can move."""

    names: tuple[KernelName, ...]
    finite: tuple[FiniteSite, ...]
    smooth: tuple[SmoothSite, ...]


def run_tempered(
    key: PRNGKey,
    programs: Programs,
    params: Params,
    beta: float | None,
    axes: dict[str, Axes],
    *,
    num_runs: int,
    num_particles: int,
    powers: Sequence[float] | None,
    moves: Sequence[KernelName] | None,
    num_moves: int,
    threshold: float,
    scheme: Scheme,
) -> TemperedRun:
    """Run particles from q to the target.

    Without `powers` a pilot run chooses them, and the lengths of steps, which then stay fixed: so the estimate of Z is
    unbiased.
    """
    finite, smooth = finite_sites(programs, axes), smooth_sites(programs, axes)
    names: tuple[KernelName, ...] = tuple(moves) if moves is not None else _usual_moves(finite, smooth)
    for name, sites, what in (("gibbs", finite, "sites with few values"), ("hmc", smooth, "continuous sites")):
        if name in names and not sites:
            raise EngineError(
                f"moves={list(names)} includes {name!r}, which moves {what}, and the program has none; leave it out"
            )
    static = (programs, axes, _Moves(names, finite, smooth), num_runs, num_particles, threshold, scheme, num_moves)
    steps = _Steps(static, as_hash_key(key), params, beta)
    fixed = None if powers is None else np.asarray(powers, float)
    fixed, scales = steps.pilot(fixed)
    return steps.run(fixed, scales)


def _usual_moves(finite: tuple[FiniteSite, ...], smooth: tuple[SmoothSite, ...]) -> tuple[KernelName, ...]:
    own: list[KernelName] = []
    if finite:
        own.append("gibbs")
    if smooth:
        own.append("hmc")
    return ("independence", *own)


class _Steps:
    """One compiled program each for the start and for a step, driven from the host."""

    def __init__(self, static: tuple[Any, ...], key: PRNGKey, params: Params, beta: float | None) -> None:
        self.static, self.key, self.params = static, key, params
        self.beta = None if beta is None else np.asarray(beta, np.float32)
        self._run_start: Callable[..., Any] | None = None
        self._run_step: Callable[..., Any] | None = None

    def start(self, number: int) -> _Population:
        given = (self.params, self.beta, self.key, np.asarray(number, np.int32))
        self._run_start = self._run_start or _start.prepare(self.static, *given)
        population: _Population = self._run_start(*given)
        return population

    def step(self, population: _Population, number: int, pair: tuple[float, float], scales: Scales) -> tuple[Any, ...]:
        powers = tuple(np.asarray(p, np.float32) for p in pair)
        given = (self.params, self.beta, self.key, np.asarray(number, np.int32), powers, scales, population)
        self._run_step = self._run_step or _step.prepare(self.static, *given)
        found: tuple[Any, ...] = self._run_step(*given)
        return found

    def pilot(self, powers: np.ndarray | None) -> tuple[np.ndarray, list[Scales]]:
        """Choose the steps of temperature, unless they are given, and the scales of Hamiltonian moves at each."""
        smooth = self.static[2].smooth if "hmc" in self.static[2].names else ()
        if powers is not None and not smooth:
            contexts = int(np.prod(self.static[0].structure.context_shape))
            return powers, [Scales({}, np.ones(contexts, np.float32))] * len(powers)
        population = self.start(0)
        length = np.full(population.log_weights.shape[-1], 0.3, np.float32)
        chosen: list[float] = []
        scales, now = [], 0.0
        while now < 1.0 and (powers is None or len(chosen) < len(powers)):
            if len(chosen) == _MOST_STEPS:
                raise EngineError(
                    f"after {_MOST_STEPS} steps of temperature the pilot run is only at {now:.3g} of 1/β; raise "
                    "num_particles or num_moves, pass a proposal that is nearer, or a schedule"
                )
            following = self._next(population, now) if powers is None else float(powers[len(chosen)])
            here = Scales(jax.device_get(spread_of(smooth, population.particles.sites)), length)
            population, _, rates, _ = self.step(population, len(chosen) + 1, (now, following), here)
            # Robbins and Monro's rule: longer steps where more is accepted than wanted.
            length = np.clip(length * np.exp(np.asarray(rates) - _ACCEPTANCE), 1e-4, 2.0).astype(np.float32)
            chosen.append(following)
            scales.append(here)
            now = following
        return np.asarray(chosen), scales

    def _next(self, population: _Population, now: float) -> float:
        """Find how far λ may go so that the particles stay effective, by bisection."""
        w = np.asarray(population.particles.w, float)
        weights = np.asarray(population.log_weights, float)
        contexts = w.shape[-1]
        w, weights = w.reshape(-1, contexts), weights.reshape(-1, contexts)
        possible = np.isfinite(weights) & np.isfinite(w)
        old = np.where(possible, weights, -np.inf)
        if not possible.any(0).all():
            return 1.0
        old = old - logsumexp(old, axis=0)
        gain = np.where(possible, w, 0.0)

        def share(power: float) -> float:
            own = (power - now) * gain
            return float(np.exp(2 * logsumexp(old + own, axis=0) - logsumexp(old + 2 * own, axis=0)).min())

        if share(1.0) >= _CONSTANCY:
            return 1.0
        low, high = now, 1.0
        for _ in range(40):
            middle = 0.5 * (low + high)
            low, high = (middle, high) if share(middle) >= _CONSTANCY else (low, middle)
        return float(max(low, now + 1e-6))

    def run(self, powers: np.ndarray, scales: list[Scales]) -> TemperedRun:
        population = self.start(_MOST_STEPS + 1)
        acceptances, sizes, now = [], [], 0.0
        for i, (power, here) in enumerate(zip(powers, scales, strict=True)):
            population, acceptance, _, size = self.step(population, _MOST_STEPS + 2 + i, (now, float(power)), here)
            acceptances.append(np.asarray(acceptance))
            sizes.append(float(size))
            now = float(power)
        host = jax.device_get(population)
        weights = np.asarray(host.log_weights, float) + np.asarray(host.log_z, float)[:, None]
        return TemperedRun(host.particles.sites, weights, powers, np.stack(acceptances), np.asarray(sizes))


def _target(static: tuple[Any, ...], params: Params, beta: Any) -> Target:
    return Target(static[0], params, beta, static[1])


@partial(ClosureJit, name="temper_start")
def _start(static: Any, params: Params, beta: Any, key: PRNGKey, number: Array) -> _Population:
    _, _, _, num_runs, num_particles, *_ = static
    keys = split(fold_in(key, number), num_runs, None)
    particles = jax.vmap(lambda k: _target(static, params, beta).draw(k, num_particles))(keys)
    zero = jnp.zeros_like(particles.w)
    return _Population(particles, zero, zero[:, 0])


@partial(ClosureJit, name="temper_step")
def _step(
    static: Any,
    params: Params,
    beta: Any,
    key: PRNGKey,
    number: Array,
    powers: tuple[Array, Array],
    scales: Scales,
    population: _Population,
) -> tuple[_Population, Array, Array, Array]:
    _, axes, moves, num_runs, num_particles, threshold, scheme, num_moves = static
    target = _target(static, params, beta)
    old, new = powers

    def one(key: PRNGKey, population: _Population) -> tuple[_Population, Array, Array, Array]:
        particles, log_weights, log_z = population
        # The first step leaves λ = 0, where a weight of 0 has no say yet.
        gain = jnp.where(particles.w == -jnp.inf, -jnp.inf, (new - old) * particles.w)
        log_weights = log_weights + gain
        size = effective_size(log_weights)
        poor = size < threshold * num_particles
        everyone = jnp.broadcast_to(jnp.arange(num_particles, dtype=jnp.int32)[:, None], log_weights.shape)
        parents = jnp.where(poor, ancestors(fold_in(key, 0), log_weights, scheme), everyone)
        log_z = jnp.where(poor, log_z + log_mean(log_weights), log_z)
        log_weights = jnp.where(poor, 0.0, log_weights)
        sites = {name: gather(x, parents, axes[name], target.shape) for name, x in particles.sites.items()}
        particles = Scored(sites, *(jnp.take_along_axis(x, parents, 0) for x in (particles.log_q, particles.w)))
        acceptance = rates = jnp.ones(log_weights.shape[-1])
        for i in range(num_moves):
            own = fold_in(key, 1 + i)
            if "independence" in moves.names:
                particles, acceptance = independence(fold_in(own, 0), target, particles, new)
            if "gibbs" in moves.names:
                particles = gibbs(fold_in(own, 1), target, moves.finite, particles, new)
            if "hmc" in moves.names:
                particles, rates = hamiltonian(fold_in(own, 2), target, moves.smooth, particles, new, scales)
        return _Population(particles, log_weights, log_z), acceptance, rates, size.min()

    keys = split(fold_in(key, number), num_runs, None)
    population, acceptance, rates, size = jax.vmap(one)(keys, population)
    return population, acceptance.mean(0), rates.mean(0), size.min()

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
    evaluations_of_moves,
    finite_sites,
    gibbs,
    hamiltonian,
    independence,
    no_u_turn,
    smooth_sites,
    spread_of,
)
from bayesrl.monte_carlo.particles.resampling import Scheme, ancestors, effective_size, gather, log_mean
from bayesrl.monte_carlo.particles.twists import Axes
from bayesrl.typing import Params, PRNGKey

_CONSTANCY = 0.9
"""The pilot run chooses steps of temperature that leave this share of the particles effective, in every context."""

MOST_TEMPERATURES = 400
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
    """

    sites: dict[str, Any]
    log_weights: np.ndarray


class _Moves(NamedTuple):
    """The static choice of moves: their names, and the sites that each can move."""

    names: tuple[KernelName, ...]
    finite: tuple[FiniteSite, ...]
    smooth: tuple[SmoothSite, ...]


def tempered_path(
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
    most_steps: int = MOST_TEMPERATURES,
) -> "TemperedPath":
    """Choose the path from q to the target, for any number of runs.

    Without `powers` a pilot run chooses them, and the lengths of steps, which then stay fixed: so the estimates of Z
    are unbiased.
    """
    finite, smooth = finite_sites(programs, axes), smooth_sites(programs, axes)
    names: tuple[KernelName, ...] = tuple(moves) if moves is not None else _usual_moves(finite, smooth)
    for name, sites, what in (
        ("gibbs", finite, "sites with few values"),
        ("hmc", smooth, "continuous sites"),
        ("nuts", smooth, "continuous sites"),
    ):
        if name in names and not sites:
            raise EngineError(
                f"moves={list(names)} includes {name!r}, which moves {what}, and the program has none; leave it out"
            )
    static = (programs, axes, _Moves(names, finite, smooth), num_runs, num_particles, threshold, scheme, num_moves)
    path = TemperedPath(static, as_hash_key(key), params, beta)
    path.pilot(None if powers is None else np.asarray(powers, float), most_steps)
    return path


def evaluations_of_sweep(programs: Programs, axes: dict[str, Axes]) -> int:
    """Return how often all moves that apply evaluate a program, once each, for one particle."""
    finite, smooth = finite_sites(programs, axes), smooth_sites(programs, axes)
    return evaluations_of_moves(_usual_moves(finite, smooth), finite, smooth)


def _usual_moves(finite: tuple[FiniteSite, ...], smooth: tuple[SmoothSite, ...]) -> tuple[KernelName, ...]:
    own: list[KernelName] = []
    if finite:
        own.append("gibbs")
    if smooth:
        own.append("hmc")
    return ("independence", *own)


class TemperedPath:
    """The steps of temperature and the scales of moves; one compiled program each for the start and for a step."""

    def __init__(self, static: tuple[Any, ...], key: PRNGKey, params: Params, beta: float | None) -> None:
        self.static, self.key, self.params = static, key, params
        self.beta = None if beta is None else np.asarray(beta, np.float32)
        self._run_start: Callable[..., Any] | None = None
        self._run_step: dict[bool, Callable[..., Any]] = {}
        self._run_back: Callable[..., Any] | None = None
        self.powers: np.ndarray = np.ones(0)
        self.scales: list[Scales] = []
        self.piloted = False

    def evaluations(self, *, conditional: bool) -> int:
        """Return how often a run evaluates the program: at its start, for every move, and at its end."""
        _, _, moves, num_runs, num_particles, *_, num_moves = self.static
        each = num_moves * evaluations_of_moves(moves.names, moves.finite, moves.smooth) * len(self.powers)
        # A reference is scored, and walks back along the path.
        back = num_runs * (1 + each) if conditional else 0
        return num_runs * num_particles * (2 + each) + back

    def _begin(self, number: int) -> _Population:
        given = (self.params, self.beta, self.key, np.asarray(number, np.int32))
        self._run_start = self._run_start or _start.prepare(self.static, *given)
        population: _Population = self._run_start(*given)
        return population

    def _advance(
        self,
        population: _Population,
        number: int,
        pair: tuple[float, float],
        scales: Scales,
        first: Scored | None = None,
    ) -> tuple[Any, ...]:
        # As arrays, λ is traced, and one program serves all steps.
        powers = tuple(np.asarray(p, np.float32) for p in pair)
        given = (self.params, self.beta, self.key, np.asarray(number, np.int32), powers, scales, population, first)
        kind = first is not None
        self._run_step[kind] = self._run_step.get(kind) or _step.prepare(self.static, *given)
        found: tuple[Any, ...] = self._run_step[kind](*given)
        return found

    def _path_back(self, reference: dict[str, Any]) -> list[Scored]:
        """Return where a reference was before each step of temperature and after the last, [runs, 1, ...]."""
        sites = {name: np.asarray(x)[:, None] for name, x in reference.items()}
        path: list[Scored] = [_scores(self.static, self.params, self.beta, sites)]
        for i in reversed(range(len(self.powers))):
            # Keys: the pilot counts from 0, the run from MOST_TEMPERATURES + 1, and the way back follows.
            power, number = np.asarray(self.powers[i], np.float32), np.asarray(2 * MOST_TEMPERATURES + 3 + i, np.int32)
            given = (self.params, self.beta, self.key, number, power, self.scales[i], path[-1])
            self._run_back = self._run_back or _step_back.prepare(self.static, *given)
            path.append(self._run_back(*given))
        return path[::-1]

    def pilot(self, powers: np.ndarray | None, most_steps: int = MOST_TEMPERATURES) -> None:
        """Choose the steps of temperature, unless they are given, and the scales of Hamiltonian moves at each."""
        smooth = self.static[2].smooth if {"hmc", "nuts"} & set(self.static[2].names) else ()
        if powers is not None and not smooth:
            contexts = int(np.prod(self.static[0].structure.context_shape))
            self.powers, self.scales = powers, [Scales({}, np.ones(contexts, np.float32))] * len(powers)
            return
        self.piloted = True
        population = self._begin(0)
        length = np.full(population.log_weights.shape[-1], 0.3, np.float32)
        chosen: list[float] = []
        scales, now = [], 0.0
        while now < 1.0 and (powers is None or len(chosen) < len(powers)):
            if len(chosen) == most_steps:
                raise EngineError(
                    f"after {most_steps} steps of temperature the pilot run is only at {now:.3g} of 1/β; raise "
                    "num_particles or num_moves, pass a proposal that is nearer, or a schedule"
                )
            following = self._next(population, now) if powers is None else float(powers[len(chosen)])
            here = Scales(jax.device_get(spread_of(smooth, population.particles.sites)), length)
            population, rates = self._advance(population, len(chosen) + 1, (now, following), here)
            # Robbins and Monro's rule: longer steps where more is accepted than wanted.
            length = np.clip(length * np.exp(np.asarray(rates) - _ACCEPTANCE), 1e-4, 2.0).astype(np.float32)
            chosen.append(following)
            scales.append(here)
            now = following
        self.powers, self.scales = np.asarray(chosen), scales

    def _next(self, population: _Population, now: float) -> float:
        """Find how far λ may go so that the particles stay effective, by bisection."""
        w = np.asarray(population.particles.w, float)
        weights = np.asarray(population.log_weights, float)
        contexts = w.shape[-1]
        # All runs choose together, as one schedule serves them.
        w, weights = w.reshape(-1, contexts), weights.reshape(-1, contexts)
        possible = np.isfinite(weights) & np.isfinite(w)
        old = np.where(possible, weights, -np.inf)
        # Without a possible particle there is no size to hold; whoever reads the last particles refuses them.
        if not possible.any(0).all():
            return 1.0
        old = old - logsumexp(old, axis=0)
        gain = np.where(possible, w, 0.0)

        def share(power: float) -> float:
            # The effective size of this step alone: weights that were uneven before do not shorten the step.
            own = (power - now) * gain
            return float(np.exp(2 * logsumexp(old + own, axis=0) - logsumexp(old + 2 * own, axis=0)).min())

        if share(1.0) >= _CONSTANCY:
            return 1.0
        low, high = now, 1.0
        # 40 halvings end below the last digit of single precision, in which the step is taken.
        for _ in range(40):
            middle = 0.5 * (low + high)
            low, high = (middle, high) if share(middle) >= _CONSTANCY else (low, middle)
        # A smaller step could round to none in single precision, and the pilot would not end.
        return float(max(low, now + 1e-6))

    def run(self, key: PRNGKey, reference: dict[str, Any] | None = None) -> TemperedRun:
        """Run particles along the path.

        With a reference, [runs, ...], the runs are conditional on it: the moves, reversed, lead from it back to q, and
        particle 0 retraces that path.

        References:
            Grosse, Ghahramani & Adams (2015), "Sandwiching the marginal likelihood using bidirectional Monte Carlo".
        """
        self.key = as_hash_key(key)
        path = None if reference is None else self._path_back(reference)
        population = self._begin(MOST_TEMPERATURES + 1)
        if path is not None:
            population = population._replace(particles=_with_first(population.particles, path[0], 1))
        now = 0.0
        for i, (power, here) in enumerate(zip(self.powers, self.scales, strict=True)):
            first = None if path is None else path[i + 1]
            population, _ = self._advance(population, MOST_TEMPERATURES + 2 + i, (now, float(power)), here, first)
            now = float(power)
        host = jax.device_get(population)
        weights = np.asarray(host.log_weights, float) + np.asarray(host.log_z, float)[:, None]
        return TemperedRun(host.particles.sites, weights)


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
    first: Scored | None,
) -> tuple[_Population, Array]:
    _, axes, moves, num_runs, num_particles, threshold, scheme, num_moves = static
    target = _target(static, params, beta)
    old, new = powers

    def one(key: PRNGKey, population: _Population, first: Scored | None) -> tuple[_Population, Array]:
        particles, log_weights, log_z = population
        # The first step leaves λ = 0, where a weight of 0 has no say yet.
        gain = jnp.where(particles.w == -jnp.inf, -jnp.inf, (new - old) * particles.w)
        log_weights = log_weights + gain
        poor = effective_size(log_weights) < threshold * num_particles
        everyone = jnp.broadcast_to(jnp.arange(num_particles, dtype=jnp.int32)[:, None], log_weights.shape)
        # Under vmap both branches of a cond would run, so `where` costs no more.
        parents = jnp.where(poor, ancestors(fold_in(key, 0), log_weights, scheme), everyone)
        parents = parents if first is None else parents.at[0].set(0)
        log_z = jnp.where(poor, log_z + log_mean(log_weights), log_z)
        log_weights = jnp.where(poor, 0.0, log_weights)
        sites = {name: gather(x, parents, axes[name], target.shape) for name, x in particles.sites.items()}
        particles = Scored(sites, *(jnp.take_along_axis(x, parents, 0) for x in (particles.log_q, particles.w)))
        particles, rates = _moved(key, target, particles, new, scales, moves, num_moves)
        if first is not None:
            particles = _with_first(particles, first, 0)
        return _Population(particles, log_weights, log_z), rates

    keys = split(fold_in(key, number), num_runs, None)
    population, rates = jax.vmap(one)(keys, population, first)
    return population, rates.mean(0)


def _moved(
    key: PRNGKey,
    target: Target,
    particles: Scored,
    power: Array,
    scales: Scales,
    moves: _Moves,
    num_moves: int,
    *,
    backward: bool = False,
) -> tuple[Scored, Array]:
    """Apply all moves, or backward their reversal: each is reversible, so only their order changes.

    Returns:
        The particles, and the acceptance rates of Hamiltonian moves, [contexts].
    """
    rates = jnp.ones(particles.w.shape[-1])
    every: tuple[KernelName, ...] = ("independence", "gibbs", "hmc", "nuts")
    order = [(i, name) for i in range(num_moves) for name in every if name in moves.names]
    for i, name in reversed(order) if backward else order:
        own = fold_in(fold_in(key, 1 + i), every.index(name))
        if name == "independence":
            particles = independence(own, target, particles, power)
        elif name == "gibbs":
            particles = gibbs(own, target, moves.finite[::-1] if backward else moves.finite, particles, power)
        else:
            move = hamiltonian if name == "hmc" else no_u_turn
            particles, rates = move(own, target, moves.smooth, particles, power, scales)
    return particles, rates


@partial(ClosureJit, name="temper_back")
def _step_back(
    static: Any, params: Params, beta: Any, key: PRNGKey, number: Array, power: Array, scales: Scales, reference: Scored
) -> Scored:
    _, _, moves, num_runs, *_, num_moves = static
    target = _target(static, params, beta)

    def one(key: PRNGKey, particles: Scored) -> Scored:
        return _moved(key, target, particles, power, scales, moves, num_moves, backward=True)[0]

    moved: Scored = jax.vmap(one)(split(fold_in(key, number), num_runs, None), reference)
    return moved


@partial(ClosureJit, name="temper_scores")
def _scores(static: Any, params: Params, beta: Any, sites: dict[str, Array]) -> Scored:
    return Scored(sites, *jax.vmap(jax.vmap(_target(static, params, beta).score))(sites))


def _with_first(particles: Scored, first: Scored, axis: int) -> Scored:
    """Put a reference in the place of particle 0 along an axis."""
    index = (slice(None),) * axis + (slice(0, 1),)
    replaced: Scored = jax.tree.map(lambda x, y: jnp.asarray(x).at[index].set(y), particles, first)
    return replaced

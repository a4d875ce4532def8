"""Moves that leave a tempered target q·exp(λ·w) invariant, in each context on its own.

q is the law that particles start from, the prior or a fit, and w = log π₀/q + R/β + log p(y|x).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.flatten_util import ravel_pytree
from numpyro.distributions import biject_to
from numpyro.infer.hmc_util import build_tree, euclidean_kinetic_energy, velocity_verlet

from bayesrl.compilation.random_keys import dummy_key, fold_in, split
from bayesrl.core.programs import Programs
from bayesrl.core.trace import abstract_trace
from bayesrl.monte_carlo.particles.twists import Axes
from bayesrl.typing import Params, PRNGKey

type KernelName = Literal["independence", "gibbs", "hmc", "nuts"]

_MOST_VALUES = 256
"""Sites with more values than this are not moved one element at a time."""

_MOST_ELEMENTS = 16
"""This many elements of a site are moved in one sweep, drawn at random."""

_LEAPFROGS = 8

_TREE_DEPTH = 6
"""No-U-turn paths have at most 2 to this many steps."""


class Scored(NamedTuple):
    """Particles with their scores: sites [particles, ...], log q and w [particles, contexts], nats."""

    sites: dict[str, Array]
    log_q: Array
    w: Array

    def where(self, accept: Array, other: "Scored", axes: dict[str, Axes], shape: tuple[int, ...]) -> "Scored":
        """Take another's values and scores in the contexts that accept, [particles, contexts]."""
        sites = {
            name: jnp.where(_spread(accept, x, axes[name], shape), other.sites[name], x)
            for name, x in self.sites.items()
        }
        pairs = ((other.log_q, self.log_q), (other.w, self.w))
        return Scored(sites, *(jnp.where(accept, new, old) for new, old in pairs))


def _spread(accept: Array, value: Array, axes: Axes, shape: tuple[int, ...]) -> Array:
    """Lay flags [particles, contexts] along the context axes of a value [particles, ...]."""
    flags = accept.reshape(-1, *shape)
    own = [(1 + axis, 1 + i) for i, axis in enumerate(axes) if axis is not None]
    flags = flags[(slice(None), *(slice(None) if axis is not None else 0 for axis in axes))]
    # The flags' axes follow the plates; the value may hold them in another order.
    order = np.argsort([at for at, _ in own])
    flags = flags.transpose(0, *(1 + int(i) for i in order))
    places = {at for at, _ in own}
    return flags.reshape(-1, *(value.shape[i] if i in places else 1 for i in range(1, value.ndim)))


@dataclass(frozen=True)
class Target:
    """The tempered target of one program.

    Attributes:
        programs: policy and guide.
        params: of the guide.
        beta: reward units per nat, traced; None without rewards.
        axes: where the contexts lie in each site's value.
    """

    programs: Programs
    params: Params
    beta: Any
    axes: dict[str, Axes]

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes of the context plates."""
        return self.programs.structure.context_shape

    def score(self, sites: dict[str, Array]) -> tuple[Array, Array]:
        """Score the sites of one particle: log q and w, [contexts], nats."""
        return self._totals(None, sites)[1:]

    def draw(self, key: PRNGKey, num: int) -> Scored:
        """Draw particles from q."""
        return Scored(*jax.vmap(lambda k: self._totals(k, {}))(split(key, num, None)))

    def _totals(self, key: PRNGKey | None, sites: dict[str, Array]) -> tuple[dict[str, Array], Array, Array]:
        draws = self.programs.run_both(key, self.params, sites)
        totals = draws.totals(self.shape)
        w = totals.log_likelihood + totals.ratio
        w = w if self.beta is None else w + totals.reward / self.beta
        return draws.sites, totals.log_q.reshape(-1), w.reshape(-1)


def independence(key: PRNGKey, target: Target, particles: Scored, power: Array) -> Scored:
    """Propose a fresh draw of q; accept with probability min(1, exp(λ(w′ − w)))."""
    num = len(particles.w)
    proposed = target.draw(fold_in(key, 0), num)
    log_accept = _difference(power * proposed.w, power * particles.w)
    accept = jnp.log(jax.random.uniform(fold_in(key, 1), log_accept.shape)) < log_accept
    return particles.where(accept, proposed, target.axes, target.shape)


def _difference(new: Array, old: Array) -> Array:
    """Subtract log-densities; from −inf every move is accepted that leads to a finite one."""
    return jnp.where(old == -jnp.inf, jnp.where(new == -jnp.inf, -jnp.inf, jnp.inf), new - old)


@dataclass(frozen=True)
class FiniteSite:
    """A site with few values, moved one element at a time.

    Attributes:
        name: of the site.
        values: of one element.
        axes: where the contexts lie in its value.
        cell: shape of the part of its value that belongs to one context.
    """

    name: str
    values: tuple[int, ...]
    axes: Axes
    cell: tuple[int, ...]

    def with_element(self, value: Array, element: Array, new: Array) -> Array:
        """Set one element of every context of a value to `new`."""
        mask = jnp.arange(math.prod(self.cell)).reshape(self.cell) == element
        return jnp.where(mask, new.astype(value.dtype), value)


def finite_sites(programs: Programs, axes: dict[str, Axes]) -> tuple[FiniteSite, ...]:
    """Return the action sites that Gibbs moves can take."""
    found = []
    for name in programs.structure.actions:
        site = programs.structure[name]
        if site.support is not None and len(site.support) <= _MOST_VALUES and site.event_dim == 0:
            cell = tuple(1 if i in axes[name] else n for i, n in enumerate(site.shape))
            found.append(FiniteSite(name, tuple(int(v) for v in site.support), axes[name], cell))
    return tuple(found)


def gibbs(key: PRNGKey, target: Target, sites: tuple[FiniteSite, ...], particles: Scored, power: Array) -> Scored:
    """Redraw single elements of finite sites from their conditional laws; a random choice of elements per sweep."""
    num = len(particles.w)
    for at, site in enumerate(sites):
        values = jnp.asarray(site.values)
        size = math.prod(site.cell)

        def sweep(
            particles: Scored, own_key: PRNGKey, site: FiniteSite = site, values: Array = values, size: int = size
        ) -> tuple[Scored, None]:
            # Contexts do not interact, so one element is tried in all of them at once, and each redraws its own.
            element = jax.random.randint(fold_in(own_key, 0), (num,), 0, size)

            def tried(particle: dict[str, Array], element: Array) -> tuple[Array, Array]:
                def one(new: Array) -> tuple[Array, Array]:
                    return target.score(particle | {site.name: site.with_element(particle[site.name], element, new)})

                return jax.vmap(one)(values)

            log_q, w = jax.vmap(tried)(particles.sites, element)  # [particles, values, contexts]
            # What q never draws stays impossible, even where its reward is inf or nan.
            scores = jnp.where(log_q == -jnp.inf, -jnp.inf, log_q + power * w)
            # A particle without a possible value keeps its own: there is no conditional law to draw from.
            present = jnp.where(jnp.isfinite(scores).any(1, keepdims=True), scores, 0.0)
            index = jax.random.categorical(fold_in(own_key, 1), present, axis=1)  # [particles, contexts]
            stuck = ~jnp.isfinite(scores).any(1)
            chosen = jax.vmap(lambda v, e, i: _set(site, v, e, values[i], target.shape))(
                particles.sites[site.name], element, index
            )
            take = lambda x: jnp.take_along_axis(x, index[:, None], 1)[:, 0]  # noqa: E731
            new = Scored(particles.sites | {site.name: chosen}, take(log_q), take(w))
            return particles.where(~stuck, new, target.axes, target.shape), None

        keys = split(fold_in(key, at), min(size, _MOST_ELEMENTS), None)
        # A scan compiles one sweep, however many elements there are.
        particles, _ = lax.scan(sweep, particles, keys)
    return particles


def _set(site: FiniteSite, value: Array, element: Array, new: Array, shape: tuple[int, ...]) -> Array:
    """Set one element of each context of a value to that context's own number, [contexts]."""
    return site.with_element(value, element, _spread(new[None], value[None], site.axes, shape)[0])


@dataclass(frozen=True)
class SmoothSite:
    """A continuous site, moved along gradients in unconstrained coordinates."""

    name: str
    transform: Any
    event_dim: int
    axes: Axes


def smooth_sites(programs: Programs, axes: dict[str, Axes]) -> tuple[SmoothSite, ...]:
    """Return the continuous action sites whose support is the same in every run."""
    trace = abstract_trace(dummy_key(), programs.policy, programs.args).trace
    found = []
    for name in programs.structure.actions:
        site = programs.structure[name]
        if site.discrete:
            continue
        # A support that reads other draws is a tracer here, and its transform would change as they move.
        support = trace.sites[name].fn.support
        if not any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(support)):
            found.append(SmoothSite(name, biject_to(support), site.event_dim, axes[name]))
    return tuple(found)


def evaluations_of_moves(
    names: Sequence[KernelName], finite: tuple[FiniteSite, ...], smooth: tuple[SmoothSite, ...]
) -> int:
    """Return how often one sweep of all moves evaluates the program for each particle, at most."""
    tried = sum(min(math.prod(site.cell), _MOST_ELEMENTS) * len(site.values) for site in finite)
    # A path takes a gradient at its start and after each step, and its energy at both ends.
    counts = {"independence": 1, "gibbs": tried, "hmc": _LEAPFROGS + 3, "nuts": 2**_TREE_DEPTH + 1}
    return sum(counts[name] for name in names)


class Scales(NamedTuple):
    """Of Hamiltonian moves: the spread of each coordinate, and the length of a step, [contexts]."""

    spread: dict[str, Any]
    step: Any


@dataclass(frozen=True)
class _Energies:
    """Energies of one particle in unconstrained coordinates: of place, of momentum, and of their sum per context."""

    target: Target
    sites: tuple[SmoothSite, ...]
    particle: dict[str, Array]
    power: Array
    inverse: dict[str, Array]  # variances of coordinates: inverse masses

    @classmethod
    def of(
        cls, target: Target, sites: tuple[SmoothSite, ...], particle: dict[str, Array], power: Array, scales: Scales
    ) -> "_Energies":
        inverse = {}
        for site in sites:
            u = site.transform.inv(particle[site.name])
            step = _spread(scales.step[None], u[None], site.axes, target.shape)[0]
            # A step of length ε with variances s² is a step of length 1 with variances (ε·s)².
            inverse[site.name] = (scales.spread[site.name] * step) ** 2
        return cls(target, sites, particle, power, inverse)

    def start(self, key: PRNGKey) -> tuple[dict[str, Array], dict[str, Array]]:
        """Return the particle's place, and draw a momentum."""
        u = {site.name: site.transform.inv(self.particle[site.name]) for site in self.sites}
        momentum = {
            site.name: jax.random.normal(fold_in(key, i), u[site.name].shape) / jnp.sqrt(self.inverse[site.name])
            for i, site in enumerate(self.sites)
        }
        return u, momentum

    def potential(self, u: dict[str, Array]) -> tuple[Array, tuple[Any, ...]]:
        """Return −log of the target with volumes, [contexts], beside the values, log q and w."""
        shape = self.target.shape
        values, volume = dict(self.particle), jnp.zeros(math.prod(shape))
        for site in self.sites:
            x = site.transform(u[site.name])
            values[site.name] = x
            volume += _per_context(site.transform.log_abs_det_jacobian(u[site.name], x), site.axes, shape)
        log_q, w = self.target.score(values)
        return -(log_q + self.power * w + volume), (values, log_q, w)

    def total_potential(self, u: dict[str, Array]) -> Array:
        """Sum over contexts: they do not interact, so its gradient is that of each."""
        return self.potential(u)[0].sum()

    def kinetic(self, inverse: dict[str, Array], r: dict[str, Array]) -> Array:
        """Return the energy of a momentum, as NumPyro's integrator asks for it."""
        return sum(((0.5 * inverse[name] * r[name] ** 2).sum() for name in r), jnp.zeros(()))

    def kinetic_by_context(self, r: dict[str, Array]) -> Array:
        """Return the energy of a momentum, [contexts]."""
        shape = self.target.shape
        parts = (_per_context(0.5 * self.inverse[s.name] * r[s.name] ** 2, s.axes, shape) for s in self.sites)
        return sum(parts, jnp.zeros(math.prod(shape)))


def hamiltonian(
    key: PRNGKey,
    target: Target,
    sites: tuple[SmoothSite, ...],
    particles: Scored,
    power: Array,
    scales: Scales,
) -> tuple[Scored, Array]:
    """Move continuous sites by Hamiltonian Monte Carlo, accepted in each context; also return acceptance rates."""

    def one(key: PRNGKey, particle: dict[str, Array]) -> tuple[Any, ...]:
        energies = _Energies.of(target, sites, particle, power, scales)
        u, momentum = energies.start(key)
        start, update = velocity_verlet(energies.total_potential, energies.kinetic)
        state = start(u, momentum)
        state = lax.fori_loop(0, _LEAPFROGS, lambda _, s: update(1.0, energies.inverse, s), state)
        # The integrator's energy is summed over contexts, and acceptance needs each.
        before = energies.potential(u)[0] + energies.kinetic_by_context(momentum)
        after, (values, log_q, w) = energies.potential(state.z)
        change = before - after - energies.kinetic_by_context(state.r)
        # Where a path diverges, the change is inf − inf.
        return values, log_q, w, jnp.where(jnp.isnan(change), -jnp.inf, change)

    values, log_q, w, change = jax.vmap(one)(split(fold_in(key, 0), len(particles.w), None), particles.sites)
    accept = jnp.log(jax.random.uniform(fold_in(key, 1), change.shape)) < change
    moved = particles.where(accept, Scored(values, log_q, w), target.axes, target.shape)
    # The mean chance of acceptance has less noise than the share of moves that were accepted.
    return moved, jnp.exp(jnp.minimum(change, 0.0)).mean(0)


def no_u_turn(
    key: PRNGKey,
    target: Target,
    sites: tuple[SmoothSite, ...],
    particles: Scored,
    power: Array,
    scales: Scales,
) -> tuple[Scored, Array]:
    """Move continuous sites by the no-U-turn sampler, all contexts together; also return acceptance rates.

    References:
        Hoffman & Gelman (2014), "The No-U-Turn sampler", here NumPyro's; its choice of a place on the path is in
        detailed balance, so the move can be reversed.
    """

    def one(key: PRNGKey, particle: dict[str, Array]) -> tuple[Any, ...]:
        energies = _Energies.of(target, sites, particle, power, scales)
        u, momentum = energies.start(fold_in(key, 0))
        inverse = ravel_pytree(energies.inverse)[0]
        start, update = velocity_verlet(energies.total_potential, euclidean_kinetic_energy)
        begun, tree_key = start(u, momentum), fold_in(key, 1)
        tree = build_tree(update, euclidean_kinetic_energy, begun, inverse, 1.0, tree_key, max_tree_depth=_TREE_DEPTH)
        _, (values, log_q, w) = energies.potential(tree.z_proposal)
        return values, log_q, w, tree.sum_accept_probs / tree.num_proposals

    values, log_q, w, rates = jax.vmap(one)(split(key, len(particles.w), None), particles.sites)
    # A particle that cannot be scored stays where it is: no path leads from there.
    accept = jnp.isfinite(power * particles.w + particles.log_q) & jnp.isfinite(power * w + log_q)
    moved = particles.where(accept, Scored(values, log_q, w), target.axes, target.shape)
    return moved, jnp.broadcast_to(rates.mean(), w.shape[1:])


def _per_context(values: Array, axes: Axes, shape: tuple[int, ...]) -> Array:
    """Sum a value over all axes that are no contexts, [contexts]; a value outside a plate counts in each context."""
    own = [axis for axis in axes if axis is not None]
    total = values.sum([i for i in range(values.ndim) if i not in own])
    # The axes that are left are in the value's order; the result has them in the order of the plates.
    total = total.transpose([sorted(own).index(axis) for axis in own])
    sizes = [n if axis is not None else 1 for n, axis in zip(shape, axes, strict=True)]
    return jnp.broadcast_to(total.reshape(sizes), shape).reshape(-1)


def spread_of(sites: tuple[SmoothSite, ...], particles: dict[str, Array]) -> dict[str, Array]:
    """Return the standard deviation of each unconstrained coordinate over particles [runs, particles, ...]."""
    found = {}
    for site in sites:
        u = site.transform.inv(particles[site.name])
        # A coordinate on the edge of its support lies at ±∞ and has no spread.
        found[site.name] = jnp.maximum(jnp.nan_to_num(u.std((0, 1)), nan=1.0), 1e-3)
    return found

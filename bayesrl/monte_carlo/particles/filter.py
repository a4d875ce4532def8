"""A particle filter along the time of a program: draw a step, weigh, resample each context where weights degenerate."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.scipy.special import logsumexp

from bayesrl.compilation.random_keys import fold_in, split
from bayesrl.core.draws import Draws
from bayesrl.exact.grid import Axis, decode_assignment, num_assignments
from bayesrl.monte_carlo.particles.resampling import Scheme, ancestors, effective_size, gather, lineages, log_mean
from bayesrl.monte_carlo.particles.time_steps import Carries, TimeSteps
from bayesrl.monte_carlo.particles.twists import Axes, Twist, by_context, finite_twist, size_of_twist
from bayesrl.typing import Params, PRNGKey


@dataclass(frozen=True)
class FilterPlan:
    """What stays fixed from run to run.

    Attributes:
        steps: the program, cut along time.
        num_particles: particles of one run.
        threshold: resample where fewer than this share of the particles is effective.
        scheme: of resampling.
        twist: value of what is still to come; None means 0.
        look_ahead: whether to try every joint value of a step under the twist, instead of drawing from the guide.
        site_axes: of each latent site's value, without time.
        carry_axes: of the leaves of the policy's carry, and of the guide's.
        renewals: how many times a conditional run may give its reference another past.
    """

    steps: TimeSteps
    num_particles: int
    threshold: float
    scheme: Scheme
    twist: Twist | None
    look_ahead: bool
    site_axes: Mapping[str, Axes]
    carry_axes: tuple[tuple[Axes, ...], tuple[Axes, ...]]
    renewals: int = 0


class FilterRun(NamedTuple):
    """One run of the filter.

    Attributes:
        sites: latent sites of the surviving paths before and inside the scan, [particles, ...].
        log_weights: since each context's last resampling, with the last twist, [particles, contexts], nats.
        log_z: log of the factors that earlier resampling divided out, [contexts], nats.
        total: log π₀/q + R/β + log p(y|x) of each path, as weighed along time, [particles, contexts], nats.
        twisted: the last twist, [particles, contexts], nats.
        twists: mean |twist| over particles, [1 + steps, contexts], nats; nan shows a twist that is nan.
        sizes: effective number of particles after each step, [1 + steps, contexts].
    """

    sites: dict[str, Array]
    log_weights: Array
    log_z: Array
    total: Array
    twisted: Array
    twists: Array
    sizes: Array


class _Particles(NamedTuple):
    """The particles between two steps, [particles, ...]; weights as in `FilterRun`.

    `joint` is log π₀ + R/β + log p(y|x) so far, nats; `history` has the sites of every step, those to come unset.
    Both serve only renewals of a reference's past.
    """

    before: dict[str, Array]
    carries: Carries
    log_weights: Array
    total: Array
    twisted: Array
    joint: Array
    history: dict[str, Array]


class _Move(NamedTuple):
    """What one part of the program did to every particle: values, carries, and scores [particles, contexts], nats."""

    sites: dict[str, Array]
    carries: Carries
    gain: Array  # log π₀/q + R/β + log p(y|x) of this part
    increment: Array  # of the weight, with the twists
    twisted: Array
    joint: Array  # log π₀ + R/β + log p(y|x) of this part


def run_filter(
    key: PRNGKey, plan: FilterPlan, params: Params, beta: Any, reference: dict[str, Array] | None = None
) -> FilterRun:
    """Run the filter once.

    With a reference the run is conditional on it: particle 0 follows it and survives every resampling. If the
    reference is a draw of p*, then E[1/Ẑ] = 1/Z, which bounds log Z from above. A renewal lets the reference take the
    past of another particle, in proportion to what that particle's past and the reference's future are worth together.

    Args:
        key: consumed whole.
        plan: what stays fixed.
        params: of the guide.
        beta: temperature, traced; None without rewards.
        reference: values of all latent sites, one path in each context; needs multinomial resampling.

    References:
        Andrieu, Doucet & Holenstein (2010), "Particle Markov chain Monte Carlo methods", section 4.3; Lindsten, Jordan
        & Schön (2014), "Particle Gibbs with ancestor sampling".
    """
    num, steps = plan.num_particles, plan.steps
    contexts = math.prod(steps.programs.structure.context_shape)
    filter_ = _Filter(plan, params, beta, reference)
    everyone = jnp.broadcast_to(jnp.arange(num, dtype=jnp.int32)[:, None], (num, contexts))
    zero = jnp.zeros((num, contexts))
    move = filter_.enter(fold_in(key, 0))
    history = {}
    if reference is not None and plan.renewals:
        history = {
            name: jnp.zeros((num, *value.shape), value.dtype)
            for name, value in reference.items()
            if name in steps.inside
        }
    start = _Particles(move.sites, move.carries, move.increment, move.gain, move.twisted, move.joint, history)

    def advance(carry: tuple[_Particles, Array], t: Array) -> tuple[tuple[_Particles, Array], tuple[Any, ...]]:
        old, log_z = carry
        own_key = fold_in(fold_in(key, 1), t)
        size = effective_size(old.log_weights)
        poor = size < plan.threshold * num
        parents = jnp.where(poor, ancestors(fold_in(own_key, 0), old.log_weights, plan.scheme), everyone)
        if reference is not None:
            parents = parents.at[0].set(jnp.where(poor, filter_.past_of_reference(fold_in(own_key, 2), t, old), 0))
        log_z = jnp.where(poor, log_z + log_mean(old.log_weights), log_z)
        log_weights = jnp.where(poor, zero, old.log_weights)
        before = filter_.inherit_sites(old.before, parents)
        carries = filter_.inherit_carries(old.carries, parents)
        total, twisted, joint = (jnp.take_along_axis(x, parents, 0) for x in (old.total, old.twisted, old.joint))
        past = filter_.inherit_sites(old.history, parents)
        move = filter_.step(fold_in(own_key, 1), t, before, carries, twisted)
        past = {k: lax.dynamic_update_slice_in_dim(x, move.sites[k].astype(x.dtype), t, 1) for k, x in past.items()}
        log_weights = log_weights + move.increment
        new = _Particles(before, move.carries, log_weights, total + move.gain, move.twisted, joint + move.joint, past)
        return (new, log_z), (parents, move.sites, size, size_of_twist(move.twisted))

    first = (start, jnp.zeros(contexts))
    (last, log_z), (parents, inside, sizes, twists) = lax.scan(advance, first, jnp.arange(steps.length))
    # Moving whole paths at every resampling would cost steps²: each step stays, and the survivors are traced back once.
    lines, _ = lineages(parents)  # sites before the scan moved along with their particles
    paths = jax.vmap(filter_.inherit_sites)(inside, lines)
    sites = last.before | {name: jnp.moveaxis(value[:, :, 0], 0, 1) for name, value in paths.items()}
    twists = jnp.concatenate([size_of_twist(start.twisted)[None], twists])
    sizes = jnp.concatenate([sizes, effective_size(last.log_weights)[None]])
    return FilterRun(sites, last.log_weights, log_z, last.total, last.twisted, twists, sizes)


def _with_first(particles: Any, first: Any) -> Any:
    """Put the reference in the place of particle 0."""
    return jax.tree.map(lambda x, y: x.at[0].set(y), particles, first)


class _Filter:
    """The two parts of a program's run, for all particles at once."""

    def __init__(self, plan: FilterPlan, params: Params, beta: Any, reference: dict[str, Array] | None = None) -> None:
        self.reference = reference
        self.plan, self.params, self.beta, self.num = plan, params, beta, plan.num_particles
        self.shape = plan.steps.programs.structure.context_shape
        self.contexts = math.prod(self.shape)

    def enter(self, key: PRNGKey) -> _Move:
        """Run what stands before the scan."""
        steps, zero = self.plan.steps, jnp.zeros((self.num, self.contexts))
        if self.plan.look_ahead:
            axes = steps.axes(steps.before)
            return self._best(key, axes, lambda v: steps.enter(None, self.params, v), -1, {}, zero, ())
        drawn = jax.vmap(lambda k: steps.enter(k, self.params, {}))(split(key, self.num, None))
        if self.reference is not None:
            drawn = _with_first(drawn, steps.enter(None, self.params, self._referred(steps.before, None)))
        draws, carries = drawn
        return self._weighed(draws, carries, -1, draws.sites, zero)

    def step(self, key: PRNGKey, t: Array, before: dict[str, Array], carries: Carries, twisted: Array) -> _Move:
        """Run one step of the scan."""
        steps = self.plan.steps
        if self.plan.look_ahead:
            axes = steps.axes(steps.inside)

            def run(values: dict[str, Array], before: dict[str, Array], carries: Carries) -> tuple[Draws, Carries]:
                return steps.step(None, self.params, t, before | values, carries)

            return self._best(key, axes, run, t, before, twisted, (before, carries))
        keys = split(key, self.num, None)
        drawn = jax.vmap(lambda k, b, c: steps.step(k, self.params, t, b, c))(keys, before, carries)
        if self.reference is not None:
            first = jax.tree.map(lambda x: x[0], (before, carries))
            values = first[0] | self._referred(steps.inside, t)
            drawn = _with_first(drawn, steps.step(None, self.params, t, values, first[1]))
        draws, carries = drawn
        return self._weighed(draws, carries, t, before, twisted)

    def _weighed(self, draws: Draws, carries: Carries, t: Any, before: dict[str, Array], twisted: Array) -> _Move:
        gain = self._gain(draws, (self.num,))
        later = self._value(t, carries.policy, before, (self.num,))
        # Twists telescope: each part adds its own and takes back the one before.
        return _Move(
            draws.sites, carries, gain, gain + later - finite_twist(twisted), later, self._joint(draws, (self.num,))
        )

    def _best(
        self,
        key: PRNGKey,
        axes: tuple[Axis, ...],
        run: Any,
        t: Any,
        before: dict[str, Array],
        twisted: Array,
        given: Any,
    ) -> _Move:
        """Try every assignment of the axes, and choose each with its share of prior × exp((R + twist)/β)."""
        number, num = num_assignments(axes), self.num
        values = jax.vmap(lambda k: decode_assignment(axes, k))(jnp.arange(number))
        # [assignments, particles, ...]; without particles' own states there is one row to try for all of them.
        each = jax.vmap(lambda *own: jax.vmap(lambda v: run(v, *own), axis_size=number)(values), axis_size=num)(*given)
        draws, carries = jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), each)
        lead = (number, num)
        prior = draws.totals((*lead, *self.shape)).log_prior.reshape(*lead, -1) - self._masked_mass(draws, axes)
        # Every value is tried here, none is proposed: there is no guide, so the gain is reward and likelihood alone.
        gain = self._gain(draws, lead)
        tried = jax.tree.map(lambda x: jnp.broadcast_to(x, (number, *x.shape)), before) if given else draws.sites
        later = self._value(t, carries.policy, tried, lead)
        # What the prior never draws stays impossible, even where its reward is inf or nan.
        scores = jnp.where(prior == -jnp.inf, -jnp.inf, prior + gain + later)
        best = logsumexp(scores, axis=0)
        # Where no value is possible the weight is 0, and any choice serves.
        chosen = jax.random.categorical(key, jnp.where(jnp.isfinite(best), scores, prior), axis=0)
        if self.reference is not None:
            chosen = chosen.at[0].set(self._assignment_of_reference(values, t if given else None))

        def of_chosen(x: Array) -> Array:
            return jnp.take_along_axis(x, chosen[None], 0)[0]

        sites = {name: self._pick(x, chosen, self.plan.site_axes[name]) for name, x in draws.sites.items()}
        # The weight is the sum over all values, whichever was chosen, so the choice adds no noise to it.
        picked = self._map_carries(self._pick, carries, chosen)
        return _Move(
            sites,
            picked,
            of_chosen(gain),
            best - finite_twist(twisted),
            of_chosen(later),
            of_chosen(self._joint(draws, lead)),
        )

    def _masked_mass(self, draws: Draws, axes: tuple[Axis, ...]) -> Array:
        """Return what the priors of masked sites add up to, the log of their number of values, as in enumeration.

        A masked site scores 0 for every value, so that nothing depends on it, and a uniform distribution serves.
        """
        sizes, found = [axis.size for axis in axes], jnp.zeros((1, 1, 1))
        for place, axis in enumerate(axes):
            scores = draws.log_prior[axis.site].sum(-1)
            grid = scores.reshape(*sizes, self.num, -1)
            masked = (grid == 0).all(place, keepdims=True) & (axis.size > 1)
            mass = jnp.where(jnp.broadcast_to(masked, grid.shape), math.log(axis.size), 0.0)
            found = found + mass.reshape(math.prod(sizes), self.num, -1)
        return found

    def past_of_reference(self, key: PRNGKey, t: Array, old: _Particles) -> Array:
        """Draw whose past the reference goes on from at step t, [contexts]; its own where there is no renewal."""
        own, length = jnp.zeros(self.contexts, jnp.int32), self.plan.steps.length
        if not self.plan.renewals:
            return own
        stride = -(-length // self.plan.renewals)

        def renew() -> Array:
            assert self.reference is not None
            follows = jnp.arange(length) >= t
            programs = replace(self.plan.steps.programs, guide=None)

            def composed(before: dict[str, Array], history: dict[str, Array]) -> dict[str, Array]:
                assert self.reference is not None
                inside = {
                    name: jnp.where(follows.reshape(-1, *(1,) * (x.ndim - 1)), self.reference[name], x)
                    for name, x in history.items()
                }
                return self.reference | before | inside

            whole = jax.vmap(lambda b, h: programs.run_both(None, {}, composed(b, h)))(old.before, old.history)
            # What the future adds to the past's own target, twist and all, which the weight already holds.
            worth = old.log_weights - old.twisted + self._joint(whole, (self.num,)) - old.joint
            # An impossible past is as far from possible whatever follows: inf − inf.
            return jax.random.categorical(key, jnp.where(jnp.isnan(worth), -jnp.inf, worth), axis=0).astype(jnp.int32)

        # `t` is the same in all runs, so that other steps do not pay.
        return lax.cond(t % stride == 0, renew, lambda: own)

    def _referred(self, names: tuple[str, ...], t: Any) -> dict[str, Array]:
        """Return the reference's values of the named sites, of one step if `t` tells which."""
        assert self.reference is not None
        values = {name: self.reference[name] for name in names if name in self.reference}
        return values if t is None else {k: lax.dynamic_slice_in_dim(x, t, 1) for k, x in values.items()}

    def _assignment_of_reference(self, values: dict[str, Array], t: Any) -> Array:
        """Find the reference among assignments [assignments, ...], [contexts]."""
        found = jnp.ones((len(next(iter(values.values()), jnp.zeros(1))), self.contexts), bool)
        for name, own in self._referred(tuple(values), t).items():
            same = jnp.broadcast_to(values[name] == own, (len(values[name]), *own.shape))
            found &= by_context(same, self.plan.site_axes[name], self.shape).all(-1)
        return jnp.argmax(found, 0)

    def inherit_sites(self, sites: dict[str, Array], parents: Array) -> dict[str, Array]:
        """Let each context of each particle take the values of its parent."""
        return {name: gather(x, parents, self.plan.site_axes[name], self.shape) for name, x in sites.items()}

    def inherit_carries(self, carries: Carries, parents: Array) -> Carries:
        """Let each context of each particle take its part of its parent's carries."""
        return self._map_carries(lambda x, at, axes: gather(x, at, axes, self.shape), carries, parents)

    def _map_carries(self, take: Any, carries: Carries, at: Array) -> Carries:
        taken = []
        for carry, axes in zip(carries, self.plan.carry_axes, strict=True):
            leaves, form = jax.tree.flatten(carry)
            taken.append(jax.tree.unflatten(form, [take(x, at, own) for x, own in zip(leaves, axes, strict=True)]))
        return Carries(*taken)

    def _pick(self, value: Array, chosen: Array, axes: Axes) -> Array:
        """Take the chosen assignment of each particle and context, of [assignments, particles, ...]."""
        return jax.vmap(lambda x, at: gather(x, at[None], axes, self.shape)[0], (1, 0))(value, chosen)

    def _gain(self, draws: Draws, lead: tuple[int, ...]) -> Array:
        totals = draws.totals((*lead, *self.shape))
        gain = totals.log_likelihood + totals.ratio
        return (gain if self.beta is None else gain + totals.reward / self.beta).reshape(*lead, self.contexts)

    def _joint(self, draws: Draws, lead: tuple[int, ...]) -> Array:
        """Return log π₀ + R/β + log p(y|x), nats; 0 where nothing will ask for it."""
        if self.reference is None or not self.plan.renewals:
            return jnp.zeros((*lead, self.contexts))
        totals = draws.totals((*lead, *self.shape))
        joint = totals.log_prior + totals.log_likelihood
        return (joint if self.beta is None else joint + totals.reward / self.beta).reshape(*lead, self.contexts)

    def _value(self, t: Any, carry: Any, before: dict[str, Array], lead: tuple[int, ...]) -> Array:
        if self.plan.twist is None:
            return jnp.zeros((*lead, self.contexts))
        run = self.plan.twist
        for _ in lead:
            run = jax.vmap(run, (None, 0, 0))
        found = run(jnp.asarray(t), carry, before)
        scale = 1.0 if self.beta is None else self.beta
        return jnp.broadcast_to(found, (*lead, *self.shape)).reshape(*lead, self.contexts) / scale

"""The guide of a program with a scan whose steps are drawn under a learned value of the carry."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpyro
from jax import Array
from jax.scipy.special import logsumexp
from numpyro import handlers

from bayesrl.arguments import Count, Positive
from bayesrl.compilation.random_keys import fold_in
from bayesrl.core.handlers import IntoScans, SiteHooks, scan_length
from bayesrl.core.primitives import is_hidden, site_kind
from bayesrl.core.programs import Programs
from bayesrl.core.structure import FiniteSupport, Structure
from bayesrl.core.trace import TraceSite, per_context, site_log_prob
from bayesrl.errors import EngineError
from bayesrl.guides import AutoGuide, PolicyGuide
from bayesrl.guides.policy_analysis import analyze_policy
from bayesrl.guides.tilts.families import tilt_distribution, tilt_shape
from bayesrl.monte_carlo.particles.time_steps import cut_by_time
from bayesrl.objectives.twist_learning import START, TWIST
from bayesrl.twists.carry_values import CarryValues
from bayesrl.typing import Params, PRNGKey, Program

_MOST_TRIED = 64
_LOWEST = -1e30

type ValueFn = Callable[[Any, Any], Array]
"""From the step just taken and the carry after it to ψ, [*contexts], nats."""


class _StepSite(NamedTuple):
    """An action that every step draws once for each context, from finitely many values."""

    name: str
    support: FiniteSupport


@dataclass(frozen=True, eq=False)
class _Plan:
    """What a guide does at each step.

    Attributes:
        structure: of the policy.
        listed: the actions of a step; empty if they cannot be listed, and the prior then draws.
        beta: temperature, reward units per nat.
        ends: whether nothing is scored behind the scan, so that the last twist is 0.
    """

    structure: Structure
    listed: tuple[_StepSite, ...]
    beta: float
    ends: bool


class CarryGuide(PolicyGuide):
    """The policy with each step drawn from π₀·exp(r/β + ψ), where ψ is a learned value of the carry after it.

    Where the draws of a step cannot be listed they are those of the prior, and ψ only weighs them.
    """

    def __init__(self, policy: Program, plan: _Plan, values: CarryValues, key: PRNGKey) -> None:
        def twisted(*args: Any) -> Any:
            params = values.declare(key)
            return _TwistedScan(policy, plan, _value_fn(plan, values, params))(*args)

        twisted.__wrapped__ = policy  # type: ignore[attr-defined]  # it takes the policy's arguments, and no others
        super().__init__(twisted, within_prior=True)
        self.proposes, self._plan, self._values = bool(plan.listed), plan, values

    def twist_values(self, params: Params) -> ValueFn:
        """Return the learned twist as `smc` takes it: from (step, carry) to [*contexts], reward units."""
        value_fn = _value_fn(self._plan, self._values, self._values.given(params))
        return lambda step, carry: self._plan.beta * value_fn(step, carry)


def _value_fn(plan: _Plan, values: CarryValues, params: Params) -> ValueFn:
    def value(step: Any, carry: Any) -> Array:
        found = values(params, step, carry)
        return jnp.where(jnp.asarray(step) == values.length - 1, 0.0, found) if plan.ends else found

    return value


class _TwistedScan(IntoScans):
    """Draws each step under the twist, and tells the twist after it."""

    def __init__(self, fn: Program, plan: _Plan, value_fn: ValueFn) -> None:
        super().__init__(fn)
        self.plan, self.value_fn = plan, value_fn

    def enter_scan(self, msg: dict[str, Any]) -> None:
        body, init, xs, *rest = msg["args"]
        length = scan_length(msg)
        numpyro.deterministic(START, self.value_fn(-1, init))

        def twisted(carry: Any, x_and_step: tuple[Any, Array]) -> Any:
            x, step = x_and_step
            tilts = _Tilts(self.plan, self._look(body, carry, x, step)) if self.plan.listed else None
            if tilts is None:
                new, y = body(carry, x)
            else:
                with SiteHooks(tilts.before, tilts.after):
                    new, y = body(carry, x)
            numpyro.deterministic(TWIST, self.value_fn(step, new))
            return new, y

        msg["args"] = (twisted, init, (xs, jnp.arange(length)), *rest)

    def _look(self, body: Any, carry: Any, x: Any, step: Array) -> tuple[list[Array], Array]:
        """Try all draws of a step: log π₀ of each site, and r/β + log p(y) + ψ, [*counts, *contexts]."""
        plan = self.plan
        counts = [len(site.support) for site in plan.listed]

        def one(indices: Array) -> tuple[list[Array], Array]:
            values = {site.name: self._filled(site, index) for site, index in zip(plan.listed, indices, strict=True)}
            with handlers.block(), handlers.trace() as seen, handlers.substitute(data=values):
                new, _ = body(carry, x)
            gain = self.value_fn(step, new)
            for name, msg in seen.items():
                kind = site_kind(msg) if msg["type"] == "sample" else None
                if kind in ("reward", "observed"):
                    scale = plan.beta if kind == "reward" else 1.0
                    gain = gain + self._score(name, msg) / scale
            return [self._score(site.name, seen[site.name]) for site in plan.listed], gain

        every = jnp.stack(jnp.meshgrid(*(jnp.arange(n) for n in counts), indexing="ij"), -1)
        lead = every.shape[:-1]
        found = jax.vmap(one)(every.reshape(-1, len(counts)))
        unflat: tuple[list[Array], Array] = jax.tree.map(lambda z: z.reshape(*lead, *z.shape[1:]), found)
        return unflat

    def _filled(self, site: _StepSite, index: Array) -> Array:
        """Give every context the value of this index."""
        own = self.plan.structure[site.name]
        return jnp.broadcast_to(jnp.asarray(site.support)[index].astype(_dtype(own)), own.shape[1:])

    def _score(self, name: str, msg: dict[str, Any]) -> Array:
        """Return the log-probability of a site of one step, [*contexts]."""
        structure = self.plan.structure
        own = structure[name]
        site = TraceSite(
            name, own.kind, is_hidden(msg), msg["fn"], msg["value"], msg["scale"], own.frames, None, None, 1
        )
        return per_context(site_log_prob(site), site, structure.contexts)[..., 0]


def _dtype(site: Any) -> Any:
    return jnp.int32 if site.discrete else float


class _Tilts:
    """Tilts the sites of one step one after another, so that together they follow the law of all of them."""

    def __init__(self, plan: _Plan, found: tuple[list[Array], Array]) -> None:
        self.plan, (self.scores, self.gain) = plan, found
        self.sites = {site.name: place for place, site in enumerate(plan.listed)}

    def before(self, msg: dict[str, Any]) -> None:
        """Tilt the distribution of a listed site."""
        if msg["type"] != "sample" or msg["name"] not in self.sites or site_kind(msg) != "action":
            return
        place = self.sites[msg["name"]]
        others = [score for at, score in enumerate(self.scores) if at != place]
        total = self.gain + sum(others, jnp.zeros(()))
        # Earlier sites are settled, so that this one has the first axis, and later ones follow it.
        later = tuple(range(1, total.ndim - len(self.plan.structure.context_shape)))
        offset = jnp.maximum(logsumexp(total, later) if later else total, _LOWEST)
        offset = offset - offset.max(0)
        offset = jnp.moveaxis(offset, 0, -1).reshape(*msg["fn"].batch_shape, len(offset))
        support = self.plan.listed[place].support
        binary = tilt_shape(msg["name"], msg["fn"], support)[-1] == 1
        theta = offset[..., 1:] - offset[..., :1] if binary else offset
        msg["fn"] = tilt_distribution(msg["fn"], jnp.maximum(theta, _LOWEST), support)

    def after(self, msg: dict[str, Any]) -> None:
        """Settle a listed site at its value."""
        if msg["type"] != "sample" or msg["name"] not in self.sites:
            return
        shape = self.plan.structure.context_shape
        support = jnp.asarray(self.plan.listed[self.sites[msg["name"]]].support)
        chosen = (jnp.asarray(msg["value"]).reshape(shape)[..., None] == support).argmax(-1)

        def settle(x: Array) -> Array:
            at = chosen.reshape((1,) * (x.ndim - len(shape)) + shape)
            return jnp.take_along_axis(x, at, 0)[0]

        self.scores, self.gain = [settle(x) for x in self.scores], settle(self.gain)


@dataclass(frozen=True, kw_only=True)
class CarryTwist(AutoGuide):
    """A twist of a program with one scan: a value of the step and the carry, as a table or a small network.

    Args:
        beta: temperature, reward units per nat; 1 without rewards.
        hidden: width of the network.
    """

    beta: Positive = 1.0
    hidden: Count = 32

    def build(self, key: PRNGKey, policy: Program, structure: Structure, args: tuple[Any, ...]) -> Program:
        """Build the guide; see `AutoGuide.build`.

        Raises:
            EngineError: the program has no single scan, or the contexts cannot be told apart in the carry.
        """
        programs = Programs(policy, None, structure, args)
        steps = cut_by_time(programs)
        if isinstance(steps, str):
            raise EngineError(
                f"a twist looks ahead along the steps of one scan, and {steps}; write the steps as a scan, or use "
                "bayesrl.fit(..., objective=bayesrl.objectives.ForwardKL())"
            )
        values = CarryValues.of(fold_in(key, 0), steps, self.hidden)
        ends = all(structure[name].kind == "metric" for name in steps.after)
        listed = _listed(fold_in(key, 1), policy, structure, args, steps.inside)
        return CarryGuide(policy, _Plan(structure, listed, self.beta, ends), values, fold_in(key, 2))

    def learning_rate_for(self, params: Params) -> float:
        """Suggest an Adam rate."""
        return 0.1

    def overdispersed_init(self, key: PRNGKey, params: Params) -> Params:
        """Add noise of about one to the values; see `AutoGuide.overdispersed_init`."""
        return {
            name: value + jax.random.normal(fold_in(key, i), value.shape, value.dtype)
            for i, (name, value) in enumerate(sorted(params.items()))
        }


def _listed(
    key: PRNGKey, policy: Program, structure: Structure, args: tuple[Any, ...], inside: tuple[str, ...]
) -> tuple[_StepSite, ...]:
    """List the actions of a step, if each has finitely many values, and one of them for each context."""
    facts, found = analyze_policy(key, policy, structure, args, {}).sites, []
    for name in inside:
        site = structure[name]
        if site.kind != "action":
            continue
        support, count = site.support, math.prod(site.shape[1:])
        if support is None or site.event_dim or count != structure.num_contexts:
            return ()
        # A tilt with fewer numbers than values cannot follow every law over them.
        if facts[name].tilt != len(support) and not (facts[name].tilt == 1 and len(support) == 2):
            return ()
        found.append(_StepSite(name, support))
    return tuple(found) if math.prod(len(site.support) for site in found) <= _MOST_TRIED else ()

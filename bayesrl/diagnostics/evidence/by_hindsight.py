"""Bound the optimum of control from above: what could an agent earn that knows nature's draws beforehand?

No policy can foresee nature, so J(π) = E_u[J(π | u)] ≤ E_u[β·log Z(u)], with nature's noise u fixed. The
martingale Σ V(s′) − E[V(s′)|s, a] has mean 0 under every such policy. Subtracting it from the reward
before log Z(u) tightens the bound, to equality for the exact value V.
Rogers (2007), "Pathwise stochastic optimal control"; Brown, Smith & Sun (2010), "Information
relaxations and duality in stochastic dynamic programs", section 2.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array
from numpyro.primitives import Messenger

from bayesrl.compilation.jit import ClosureJit
from bayesrl.compilation.random_keys import fold_in, key_data, split, split_keys, wrap_key_data
from bayesrl.core.draws import Draws
from bayesrl.core.handlers import SiteHooks, scan_length
from bayesrl.core.primitives import reward, site_kind
from bayesrl.core.programs import Programs
from bayesrl.core.structure import Site, Structure
from bayesrl.diagnostics.evidence.by_sampling import draw_until
from bayesrl.diagnostics.evidence.mixture_sample import draw_mixture_sample
from bayesrl.diagnostics.evidence.result import Evidence
from bayesrl.diagnostics.evidence.tempered_sample import TemperedSample
from bayesrl.errors import EngineError
from bayesrl.exact.enumeration import enumerate_posterior
from bayesrl.statistics.estimates import Estimate, Interval, mean_of_draws
from bayesrl.statistics.evaluations import Evaluations
from bayesrl.typing import Numbers, Params, PRNGKey, Program

NUM_NOISES = 24
_VALUE_DRAWS = 4096

type Values = dict[str, Array]
"""Value of each draw of nature, reward units: {site: [T, *plates, values]}."""


class FixedNature(Messenger):
    """Run a program with nature's noise, the key, fixed: her draws become functions of the actions.

    The reward loses the martingale of the values of her draws, if these are given.
    """

    def __init__(self, policy: Program, key: PRNGKey, structure: Structure, values: Values | None = None) -> None:
        super().__init__(policy)
        self.structure = structure
        self.keys = {
            name: split(fold_in(key, i), structure[name].length)
            for i, name in enumerate(structure.names("environment"))
        }
        self.values = values or {}

    def process_message(self, msg: dict[str, Any]) -> None:
        """Fix nature's draws outside scans, and reach into the bodies of scans."""
        if msg["type"] == "control_flow":
            self._enter_scan(msg)
        elif not msg.get("_control_flow_done"):
            now = {name: keys[0] for name, keys in self.keys.items()}
            self._fix(msg, now, {name: value[0] for name, value in self.values.items()})

    def _enter_scan(self, msg: dict[str, Any]) -> None:
        body, init, xs, _, *rest = msg["args"]
        # A scan knows its length from `length` or from its inputs, as in `jax.lax.scan`.
        steps = scan_length(msg)
        inside = [name for name, keys in self.keys.items() if len(keys) == steps]
        data = {name: key_data(self.keys[name]) for name in inside}
        values = {name: value for name, value in self.values.items() if name in data}

        def fixed(carry: Any, x: Any) -> Any:
            own, noise, worth = x
            now = {name: wrap_key_data(value) for name, value in noise.items()}
            with SiteHooks(lambda inner: self._fix(inner, now, worth)):
                return body(carry, own)

        msg["args"] = (fixed, init, (xs, data, values), steps, *rest)

    def _fix(self, msg: dict[str, Any], keys: dict[str, Any], values: dict[str, Array]) -> None:
        name = msg.get("name")
        if msg["type"] != "sample" or site_kind(msg) != "environment" or name not in keys:
            return
        site = self.structure[name]
        shape = site.shape[1:] if site.scan is not None else site.shape
        batch = shape[: len(shape) - site.event_dim]
        fn = msg["fn"] if tuple(msg["fn"].batch_shape) == batch else msg["fn"].expand(batch)
        drawn = fn.sample(keys[name])
        # Stopped here: whoever enumerates the actions must not see a site of nature.
        msg["value"], msg["stop"] = drawn, True
        if name in values:
            reward(f"{name}$martingale", -_surprise(site, fn, drawn, values[name]))


def _surprise(site: Site, fn: Any, drawn: Array, values: Array) -> Array:
    """V(s′) − E[V(s′)|s, a] over a finite support, per plate element."""
    support = jnp.asarray(site.support)
    index = jnp.searchsorted(support, drawn)
    grid = support.reshape(-1, *(1,) * drawn.ndim) * jnp.ones_like(drawn)
    probability = jnp.moveaxis(jnp.exp(fn.log_prob(grid)), 0, -1)
    values = jnp.broadcast_to(values, (*drawn.shape, len(support)))
    return jnp.take_along_axis(values, index[..., None], -1)[..., 0] - (probability * values).sum(-1)


def estimate_values(key: PRNGKey, programs: Programs, params: Params, beta: float) -> Values:
    """Estimate from the fit's own draws what it earns after each draw of nature: means by step and value.

    The bound is valid for any numbers; good ones make it tight.
    """
    structure = programs.structure
    contexts = {frame.name for frame in structure.contexts}
    sites = [structure[name] for name in structure.names("environment")]
    known = tuple(s.name for s in sites if s.support is not None and {frame.name for frame in s.frames} == contexts)
    if not known:
        return {}
    static = (programs.policy, programs.guide, structure, known, _num_value_draws(structure))
    given = (dict(programs.transforms), programs.args, key, params, np.asarray(beta, np.float32))
    values: Values = _values(static, *given)
    return values


@partial(ClosureJit, name="values_of_nature")
def _values(static: Any, transforms: Any, args: Any, key: PRNGKey, params: Params, beta: Array) -> Values:
    policy, guide, structure, known, num = static
    draws = Programs(policy, guide, structure, args, transforms).draw(key, params, num, share=False)
    return {name: _values_of(structure[name], structure, draws, beta) for name in known}


def _values_of(site: Site, structure: Structure, draws: Draws, beta: Array) -> Array:
    """Average what the fit earns after a draw of nature, by step and value, [T, *contexts, values]."""
    names = structure.names("action", "environment", "reward")
    parts = {name: beta * (draws.log_prior[name] - draws.log_q[name]) for name in structure.actions}
    costs = structure.in_order(parts | draws.rewards, names)
    after = jnp.flip(jnp.cumsum(jnp.flip(costs, -1), -1), -1)
    to_go = jnp.moveaxis(after[..., _places(structure, site, names)], -1, 1)  # [draws, T, *contexts]
    drawn = draws.sites[site.name].reshape(to_go.shape)
    hits = drawn[..., None] == jnp.asarray(site.support)
    count = hits.sum(0)
    sums = jnp.where(hits, to_go[..., None], 0.0).sum(0)
    rest = to_go.mean(0)[..., None]
    # One pseudo-draw at the overall mean steadies values that were seldom drawn.
    return jnp.where(count > 0, (sums + rest) / (count + 1), rest)


def _places(structure: Structure, site: Site, names: Sequence[str]) -> np.ndarray:
    """Find the steps of a site among those of the named sites, in the layout of `Structure.in_order`."""
    start = 0
    for group in structure.groups():
        members = [member for member in group if member.name in names]
        if site in members:
            return start + members.index(site) + len(members) * np.arange(site.length)
        start += sum(member.length for member in members)
    raise AssertionError(site.name)


@dataclass(frozen=True)
class _Foreseen:
    """A program of nature's noise and its own arguments; one serves all noises, so it is compiled once."""

    policy: Program
    structure: Structure

    def __call__(self, noise: Numbers, values: Values, *args: Any) -> Any:
        return FixedNature(self.policy, wrap_key_data(noise), self.structure, values)(*args)


def hindsight_bounds(
    key: PRNGKey, programs: Programs, beta: float, values: Values, num_noises: int, max_count: int
) -> tuple[np.ndarray, Evaluations]:
    """Return β·log Z(u), mean over contexts, for independent draws of nature's noise u, [num_noises], reward units.

    Also return what that cost.

    Raises:
        EngineError: the actions cannot be enumerated with nature fixed.
    """
    policy = _Foreseen(programs.policy, programs.structure)
    found, spent = [], Evaluations()
    # Iterate over rows on the host: taking a JAX array apart would compile a program for it.
    for noise in np.asarray(key_data(split(wrap_key_data(np.asarray(key_data(key))[..., :2]), num_noises))):
        target = enumerate_posterior(policy, noise, values, *programs.args, beta=beta, max_count=max_count)
        assert target.optimum is not None
        found.append(float(target.optimum.mean()))
        spent = spent.plus(target.evaluations)
    return np.asarray(found), spent


def bracket_by_hindsight(
    key: PRNGKey, programs: Programs, params: Params, beta: float | None, num_samples: int, max_count: int
) -> Evidence:
    """Bracket the optimum of control: from below by what the fit earns, from above by hindsight.

    Raises:
        EngineError: there are no rewards, so no control.
    """
    if beta is None:
        raise EngineError("the policy has environment sites and no rewards, so there is no control to bracket")
    sample_key, value_key, noise_key = split_keys(key, 3)

    def find(num: int) -> Evidence:
        sample = draw_mixture_sample(sample_key, programs, params, num)
        return TemperedSample(sample, beta, observed=False).evidence(programs.structure.context_shape, "hindsight")

    found = draw_until(find, _is_known, num_samples)
    bound = _bound(value_key, noise_key, programs, params, beta, max_count)
    upper, limit, reason = bound.upper, bound.limit, bound.reason
    nothing, objective = np.asarray(np.nan), found.objective
    # Only ends are known: J* lies between J(q) and the hindsight bound; the gap is as uncertain as J.
    optimum = Interval.between(objective.conservative_lower, limit)
    most = np.maximum(optimum.conservative_upper - objective.mean, 0.0)
    return replace(
        found.without_divergences(),
        lower=Estimate(objective.mean / beta, objective.se / beta),
        upper=upper,
        caveat=reason,
        optimum=optimum,
        gap=Interval(nothing, objective.se, nothing, nothing, np.zeros(()), most),
    )


class HindsightBound(NamedTuple):
    """An upper bound of the optimum of control.

    Attributes:
        upper: an estimate of it over β, nats; None if it cannot be computed.
        limit: its 97.5% limit, reward units.
        reason: what it leaves open, or why there is none.
        evaluations: what it cost.
    """

    upper: Estimate | None
    limit: float
    reason: str
    evaluations: Evaluations


def bound_by_hindsight(key: PRNGKey, programs: Programs, params: Params, beta: float, budget: int) -> HindsightBound:
    """Bound the optimum of control from above within a number of evaluations."""
    _, value_key, noise_key = split_keys(key, 3)
    return _bound(value_key, noise_key, programs, params, beta, max(budget // NUM_NOISES, 1))


def _bound(
    value_key: PRNGKey, noise_key: PRNGKey, programs: Programs, params: Params, beta: float, max_count: int
) -> HindsightBound:
    try:
        values = estimate_values(value_key, programs, params, beta)
        bounds, spent = hindsight_bounds(noise_key, programs, beta, values, NUM_NOISES, max_count)
    except EngineError as error:
        reason = f"with nature fixed the actions cannot be enumerated either: {error}"
        return HindsightBound(None, math.inf, reason, Evaluations())
    upper = mean_of_draws(bounds / beta)
    limit = float(upper.mean + 2.07 * upper.se) * beta  # Student's t of 23 degrees of freedom
    reason = "the optimum of control lies below the hindsight bound, by how much is not known"
    drawn = Evaluations.of_both(_num_value_draws(programs.structure) if values else 0)
    return HindsightBound(upper, limit, reason, spent.plus(drawn))


def _num_value_draws(structure: Structure) -> int:
    return max(64, min(_VALUE_DRAWS, 2**21 // structure.width))


def _is_known(found: Evidence) -> bool:
    """Whether J is known to a hundredth of what the fit gained."""
    assert found.prior_objective is not None
    return bool(
        found.objective.upper - found.objective.lower <= 0.01 * (found.objective.mean - found.prior_objective.mean)
    )

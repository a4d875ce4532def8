"""Analyse a policy, so that a guide can decide what each tilt reads."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from numpyro import handlers

from bayesrl.compilation.jit import closure_jit
from bayesrl.compilation.random_keys import split
from bayesrl.core.handlers import IntoScans, SiteHooks
from bayesrl.core.primitives import site_kind
from bayesrl.core.rng import FoldedKeys
from bayesrl.core.structure import FiniteSupport, Structure
from bayesrl.core.trace import TraceSite, trace_abstractly, trace_program
from bayesrl.guides.plate_alignment import Dims, align, num_components, plate_dims
from bayesrl.guides.tilts.families import PriorRange, describe_prior, tilt_shape, to_unconstrained
from bayesrl.jaxprs.dataflow import input_dependencies
from bayesrl.typing import PRNGKey, Program

_MAX_INITIAL = 64
"""A carry leaf with more distinct initial values than this has no finite range."""


class SiteInfo(NamedTuple):
    """The facts of a latent site that tilts depend on; shapes are of one time step.

    `width`, `tilt` and `description` count the components per plate element of its value, of its tilt (0 for nature)
    and of what describes its prior (0 if nothing does).
    """

    name: str
    frames: frozenset[str]
    dims: Dims
    event_ndim: int
    width: int
    tilt: int
    description: int
    support: FiniteSupport | None


class CarryLeafInfo(NamedTuple):
    """The facts of one leaf of a scan's carry.

    Attributes:
        source: the site of the same step, or the leaf of the previous step, that it copies.
        range: all values that it can take, or None.
        reached: names of the latent sites that it depends on.
    """

    source: str | int | None
    range: FiniteSupport | None
    reached: frozenset[str]
    shape: tuple[int, ...]
    numeric: bool


class PriorMoments(NamedTuple):
    """Centre and scale of each component under the prior."""

    centre: np.ndarray
    scale: np.ndarray


@dataclass(frozen=True)
class PolicyAnalysis:
    """The facts of the latent sites, by name, and of the leaves of the carries, by scan."""

    sites: dict[str, SiteInfo]
    carries: list[list[CarryLeafInfo]]


class _AnalysisHandler(IntoScans):
    """Records the facts of sites and scans while a program runs, and the carries of its scans."""

    def __init__(self, fn: Program, structure: Structure, reaches: dict[str, PriorRange] | None = None) -> None:
        super().__init__(fn)
        self.structure, self.reaches = structure, reaches or {}
        self.sites: dict[str, SiteInfo] = {}
        self.values: dict[str, Any] = {}
        self.sources: list[list[str | int | None]] = []
        self.ranges: list[list[FiniteSupport | None]] = []
        self.carries: list[list[Any]] = []
        self.starts: list[list[Any]] = []

    def process_site(self, msg: dict[str, Any]) -> None:
        if msg["type"] != "sample" or site_kind(msg) not in ("action", "environment"):
            return
        name, fn = msg["name"], msg["fn"]
        support = self.structure[name].support
        dims = plate_dims(msg["cond_indep_stack"])
        action = site_kind(msg) == "action"
        tail = tilt_shape(name, fn, support, self.reaches.get(name)) if action else ()
        described = describe_prior(fn, support) if action else None
        elements = described.shape[len(fn.batch_shape) :] if described is not None else ()
        self.sites[name] = SiteInfo(
            name,
            frozenset(frame.name for frame in msg["cond_indep_stack"]),
            dims,
            len(fn.event_shape),
            num_components(fn.batch_shape, dims, fn.event_shape),
            num_components(fn.batch_shape, dims, tail) if action else 0,
            num_components(fn.batch_shape, dims, elements) if described is not None else 0,
            support,
        )

    def finish_site(self, msg: dict[str, Any]) -> None:
        if msg["type"] == "sample":
            self.values[msg["name"]] = msg["value"]

    def enter_scan(self, msg: dict[str, Any]) -> None:
        body, init, *rest = msg["args"]
        index = len(self.sources)
        self.sources.append([])
        self.starts.append(jax.tree.leaves(init))
        self.ranges.append([self._initial_range(leaf) for leaf in jax.tree.leaves(init)])

        def wrapped(carry: Any, x: Any) -> Any:
            with SiteHooks(self.process_site, self.finish_site):
                new, y = body(carry, x)
            old = jax.tree.leaves(carry)
            # Assigned and not appended, because JAX may trace the body more than once.
            self.sources[index] = [self._source(leaf, old) for leaf in jax.tree.leaves(new)]
            return new, (y, old)

        msg["args"] = (wrapped, init, *rest)

    def postprocess_message(self, msg: dict[str, Any]) -> None:
        super().postprocess_message(msg)
        if msg["type"] == "control_flow":
            last, (trace, (ys, carries)) = msg["value"]
            msg["value"] = last, (trace, ys)
            self.carries.append(carries)

    def _source(self, leaf: Any, old: list[Any]) -> str | int | None:
        """Find what a leaf copies, by Python identity, since a computed value is a new object."""
        for name, value in self.values.items():
            if leaf is value and name in self.sites:
                return name
        return next((i for i, before in enumerate(old) if leaf is before), None)

    def _initial_range(self, leaf: Any) -> FiniteSupport | None:
        for name, value in self.values.items():
            if leaf is value and name in self.sites:
                return self.sites[name].support
        return None if isinstance(leaf, jax.core.Tracer) or not _is(leaf, jnp.number, jnp.bool_) else _values_of(leaf)


def _values_of(leaf: Any) -> FiniteSupport | None:
    """Return the distinct values of an integer leaf if there are few, else None."""
    values = np.unique(np.asarray(leaf))
    whole = np.issubdtype(values.dtype, np.integer) or values.dtype == bool
    return tuple(float(v) for v in values) if whole and values.size <= _MAX_INITIAL else None


def _is(leaf: Any, *kinds: Any) -> bool:
    """Whether a leaf's dtype is of one of these kinds."""
    return any(jnp.issubdtype(jnp.result_type(leaf), kind) for kind in kinds)


def analyze_policy(
    key: PRNGKey, policy: Program, structure: Structure, args: tuple[Any, ...], reaches: dict[str, PriorRange]
) -> PolicyAnalysis:
    """Analyse a policy by running it; `key` is consumed whole, `reaches` has the range of each action site's draws.

    Raises:
        GuideError: an action site cannot be tilted.
    """
    probe = _AnalysisHandler(policy, structure, reaches)
    trace = trace_abstractly(lambda: trace_program(FoldedKeys(probe, key), *args))
    values = {site.name: trace.sites[site.name].value for site in structure.sites if site.latent}
    # The values are tracers of a trace that has ended; only their shapes and dtypes may be read.
    latent = {name: jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x)) for name, x in values.items()}

    def leaves(values: dict[str, Array]) -> Any:
        again, _ = _run(key, handlers.substitute(policy, data=values), structure, args)
        return again.starts, again.carries

    tree = jax.tree.structure((probe.starts, probe.carries))
    starts, reached = jax.tree.unflatten(tree, input_dependencies(leaves, latent) if probe.carries else [])
    # A carry may start at integers that the program computes without drawing. They are the same in every run, so one
    # run shows their values.
    fixed = [
        (scan, index)
        for scan, names in enumerate(starts)
        for index, leaf in enumerate(probe.starts[scan])
        if probe.ranges[scan][index] is None and isinstance(leaf, jax.core.Tracer)
        if _is(leaf, jnp.integer, jnp.bool_) and not names[index]
    ]

    def computed() -> list[Any]:
        again, _ = _run(key, policy, structure, args)
        return [again.starts[scan][index] for scan, index in fixed]

    for (scan, index), leaf in zip(fixed, closure_jit(computed, name="starts")() if fixed else (), strict=True):
        probe.ranges[scan][index] = _values_of(leaf)
    carries = [
        [
            CarryLeafInfo(source, values, names, tuple(jnp.shape(leaf))[1:], _is(leaf, jnp.number, jnp.bool_))
            for source, values, names, leaf in zip(*parts, strict=True)
        ]
        for parts in zip(probe.sources, _all_ranges(probe), reached, probe.carries, strict=True)
    ]
    return PolicyAnalysis(probe.sites, carries)


def _all_ranges(probe: _AnalysisHandler) -> list[list[FiniteSupport | None]]:
    """Extend the initial ranges of the carries by the values that steps copy into them, until nothing changes."""
    results = []
    for sources, initial, leaves in zip(probe.sources, probe.ranges, probe.carries, strict=True):
        flags = [_is(leaf, jnp.bool_) for leaf in leaves]
        new = [(0.0, 1.0) if flag else start for flag, start in zip(flags, initial, strict=True)]
        ranges: list[FiniteSupport | None] = []
        # This ends: ranges only grow, and within the finitely many values of starts and supports.
        while new != ranges:
            ranges, new = new, []
            for source, own, flag in zip(sources, ranges, flags, strict=True):
                known = ranges[source] if isinstance(source, int) else source and probe.sites[source].support
                both = None if own is None or not known else tuple(sorted({float(v) for v in (*own, *known)}))
                new.append(own if flag else both)
        results.append(ranges)
    return results


def _run(
    key: PRNGKey, policy: Program, structure: Structure, args: tuple[Any, ...]
) -> tuple[_AnalysisHandler, dict[str, TraceSite]]:
    probe = _AnalysisHandler(policy, structure)
    return probe, trace_program(FoldedKeys(probe, key), *args).sites


def prior_moments(
    key: PRNGKey, policy: Program, structure: Structure, args: tuple[Any, ...], facts: PolicyAnalysis, num_draws: int
) -> dict[str, PriorMoments]:
    """Compute centre and scale of network inputs from draws of the prior; `key` is consumed whole.

    They are constants, because the prior's own mean at a site might reveal what the agent does not see.

    Returns:
        Moments of unconstrained values, of descriptions of priors and of leaves of carries; the keys
        are `value NAME`, `prior NAME` and `carry SCAN LEAF`.
    """

    def one(key: PRNGKey) -> dict[str, Array]:
        probe, sites = _run(key, policy, structure, args)
        found: dict[str, Array] = {}
        for name, fact in facts.sites.items():
            site = sites[name]
            if fact.support is None:
                found[f"value {name}"] = _components(site, fact, to_unconstrained(site.fn, site.value))
            described = describe_prior(site.fn, fact.support) if fact.description else None
            if described is not None:
                found[f"prior {name}"] = described.reshape((-1, described.shape[-1]))
        for scan, leaves in enumerate(probe.carries):
            for index, leaf in enumerate(leaves):
                if _is(leaf, jnp.number, jnp.bool_):
                    found[f"carry {scan} {index}"] = jnp.asarray(leaf, float).reshape((-1, 1))
        return found

    def pooled() -> dict[str, tuple[Array, Array]]:
        draws = jax.vmap(one)(split(key, num_draws))
        return {name: _centre_and_scale(values) for name, values in draws.items()}

    measured = closure_jit(pooled, name="moments")()
    return {name: PriorMoments(np.asarray(a), np.asarray(b)) for name, (a, b) in measured.items()}


def _components(site: TraceSite, fact: SiteInfo, value: Array) -> Array:
    """Pool all axes except the components, [pooled, components]."""

    def one(value: Array) -> Array:
        return align(value, fact.dims, fact.event_ndim)

    aligned = jax.vmap(one)(value) if site.scan is not None else one(value)
    return jnp.asarray(aligned, float).reshape((-1, aligned.shape[-1]))


def _centre_and_scale(values: Array) -> tuple[Array, Array]:
    """Median and scaled interquartile range, which stay finite under heavy tails."""
    flat = values.reshape((-1, values.shape[-1]))
    low, centre, high = jnp.quantile(flat, jnp.array([0.25, 0.5, 0.75]), axis=0)
    scale = (high - low) / 1.349  # the standard deviation, if the distribution is normal
    deviation = jnp.std(flat, axis=0)
    return centre, jnp.where(scale > 1e-6, scale, jnp.where(deviation > 1e-6, deviation, 1.0))

"""Inputs of a tilt at the moment its site is drawn: codes for tables, features for networks."""

import math
from dataclasses import dataclass, field
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import Array

from bayesrl.core.structure import FiniteSupport, Site, Structure
from bayesrl.guides.plate_alignment import Dims, align, num_components
from bayesrl.guides.policy_analysis import CarryLeafInfo, PolicyAnalysis, PriorMoments, SiteInfo
from bayesrl.guides.tilts.families import describe_prior, to_unconstrained

_MAX_ONE_HOT = 512
_MAX_FEATURES = 256
_LINEAR_UP_TO = 10.0
"""Standardised values beyond this grow logarithmically, so that heavy tails do not swamp a network."""


@dataclass
class VisibleState:
    """Raw values that the agent can see at one moment of a run.

    Attributes:
        sites: values of sites, with their distributions; those of earlier scans are stacked over time.
        carry: leaves of the carry at the start of the step.
        prior: of the site to tilt.
        moments: of the inputs without a finite range, by name.
    """

    sites: dict[str, tuple[Array, Any]] = field(default_factory=dict)
    carry: list[Any] = field(default_factory=list)
    prior: Any = None
    moments: dict[str, PriorMoments] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class GuideInput:
    """One input of a tilt.

    Attributes:
        kind: a site of this moment, a site of an earlier scan (all steps), a leaf of the carry, or
            the description of the current prior.
        key: name of the site, or index of the leaf.
        dims: axes of plates in it.
        event_ndim: number of last axes that are not batch axes.
        width: number of components, time included.
        range: all values that a component can take, or None.
        moments: the name of its centre and scale.
        support: for the description of a prior, the values of its finite support, or None.
    """

    kind: Literal["site", "past", "carry", "prior"]
    key: str | int
    dims: Dims
    event_ndim: int
    width: int
    range: FiniteSupport | None
    moments: str
    support: FiniteSupport | None = None

    @property
    def num_codes(self) -> int:
        """Number of joint values; infinite ranges count as 0."""
        # No table holds the values of more than 64 components; do not compute so huge a power.
        return len(self.range) ** self.width if self.range is not None and self.width <= 64 else 0

    @property
    def num_features(self) -> int:
        """Length of `features`."""
        return self.width * len(self.range or ()) if self._one_hot else self.width

    @property
    def _one_hot(self) -> bool:
        return self.range is not None and self.width * len(self.range) <= _MAX_ONE_HOT

    def codes(self, view: VisibleState) -> Array:
        """Encode the joint value as an integer below `num_codes`, [*plates]."""
        index = _index(self._read(view), self.range or ())
        strides = jnp.asarray([len(self.range or ()) ** k for k in range(self.width)])
        return (index * strides).sum(-1)

    def features(self, view: VisibleState) -> Array:
        """Return numbers of moderate size, [*plates, num_features]."""
        values = self._read(view)
        if self._one_hot:
            hot = jax.nn.one_hot(_index(values, self.range or ()), len(self.range or ()))
            return hot.reshape((*values.shape[:-1], -1))
        if self.range is not None:
            low, high = self.range[0], self.range[-1]
            return 2.0 * (values - low) / max(high - low, 1.0) - 1.0
        moments = view.moments[self.moments]
        # Moments pool the time steps, and an input of all steps has one group of components for each.
        repeat = self.width // len(moments.centre)
        centre, scale = jnp.tile(moments.centre, repeat), jnp.tile(moments.scale, repeat)
        return _soft_clip((values - centre) / scale)

    def _read(self, view: VisibleState) -> Array:
        if self.kind == "carry":
            return align(view.carry[int(self.key)], self.dims, self.event_ndim)
        if self.kind == "prior":
            described = describe_prior(view.prior, self.support)
            assert described is not None
            return align(described, self.dims, described.ndim - len(view.prior.batch_shape))
        value, fn = view.sites[str(self.key)]
        if self.range is None:
            value = to_unconstrained(fn, value)
        if self.kind == "site":
            return align(value, self.dims, self.event_ndim)
        steps = jax.vmap(lambda v: align(v, self.dims, self.event_ndim))(value)
        return jnp.moveaxis(steps, 0, -2).reshape((*steps.shape[1:-1], -1))


def _index(values: Array, known: FiniteSupport) -> Array:
    """Find the index of each value in an ascending list of all values."""
    low = known[0]
    if known == tuple(low + k for k in range(len(known))):
        return jnp.clip(values - low, 0, len(known) - 1).astype(jnp.int32)
    return (jnp.asarray(values)[..., None] == jnp.asarray(known)).argmax(-1).astype(jnp.int32)


def _soft_clip(x: Array) -> Array:
    size = jnp.abs(x)
    # The inner maximum keeps the logarithm of 0, whose gradient is infinite, out of the discarded branch.
    beyond = _LINEAR_UP_TO * (1 + jnp.log(jnp.maximum(size, _LINEAR_UP_TO) / _LINEAR_UP_TO))
    return jnp.where(size <= _LINEAR_UP_TO, x, jnp.sign(x) * beyond)


def list_inputs(name: str, structure: Structure, facts: PolicyAnalysis) -> list[GuideInput]:
    """List the inputs of an action site's tilt: what the agent has seen so far, in the site's own plate elements."""
    own, mine = structure[name], facts.sites[name]
    found = []
    for site in structure.sites:
        if site.name == name:
            break
        other = facts.sites.get(site.name)
        if other is None or site.hidden or not other.frames <= mine.frames:
            continue
        stacked = site.scan is not None and site.scan != own.scan
        found.append(site_input(other, site, stacked=stacked))
    if own.scan is not None:
        found += _from_carry(own.scan, mine, structure, facts)
    return [source for source in found if source.range is None or len(source.range) > 1]


def site_input(fact: SiteInfo, site: Site, *, stacked: bool) -> GuideInput:
    """Make the input that reads a site: its current value, or all steps of an earlier scan."""
    width = fact.width * (site.length if stacked else 1)
    return GuideInput(
        "past" if stacked else "site", fact.name, fact.dims, fact.event_ndim, width, fact.support, f"value {fact.name}"
    )


def _from_carry(scan: int, mine: SiteInfo, structure: Structure, facts: PolicyAnalysis) -> list[GuideInput]:
    leaves = facts.carries[scan]
    found = []
    for index, leaf in enumerate(leaves):
        hidden = any(structure[name].hidden for name in leaf.reached)
        # A leaf that depends on no draw is the same in every run: time step and plates already determine it.
        if hidden or not leaf.numeric or not leaf.reached:
            continue
        origin = _origin(index, leaves, facts)
        if origin is not None:
            dims, event_ndim, frames = origin.dims, origin.event_ndim, origin.frames
        else:
            layout = _layout(leaf, mine, structure)
            if layout is None:
                continue
            dims, event_ndim, frames = layout
        # A leaf may depend only on sites in its own plates or outside plates: other elements are separate problems.
        own = mine.frames if dims else frozenset()
        apart = any(not {frame.name for frame in structure[name].frames} <= own for name in leaf.reached)
        if apart or not frames <= mine.frames:
            continue
        num_batch = len(leaf.shape) - event_ndim
        width = num_components(leaf.shape[:num_batch], dims, leaf.shape[num_batch:])
        found.append(GuideInput("carry", index, dims, event_ndim, width, leaf.range, f"carry {scan} {index}"))
    return found


def _origin(index: int, leaves: list[CarryLeafInfo], facts: PolicyAnalysis) -> SiteInfo | None:
    """Find the site that a leaf copies, through any number of steps."""
    seen: set[int] = set()
    source: str | int | None = index
    while isinstance(source, int) and source not in seen:
        seen.add(source)
        source = leaves[source].source
    return facts.sites.get(source) if isinstance(source, str) else None


def _layout(leaf: CarryLeafInfo, mine: SiteInfo, structure: Structure) -> tuple[Dims, int, frozenset[str]] | None:
    """Guess which axes of a computed leaf are plates: the first ones, if their sizes are those of the plates."""
    sizes = {frame.dim: frame.size for frame in structure[mine.name].frames}
    expected = tuple(sizes.get(dim, 1) for dim in range(min(sizes, default=0), 0))
    if not sizes:
        return (), len(leaf.shape), frozenset()
    if leaf.shape[: len(expected)] == expected:
        return mine.dims, len(leaf.shape) - len(expected), mine.frames
    return ((), len(leaf.shape), frozenset()) if math.prod(leaf.shape) == 1 else None


def prior_input(name: str, structure: Structure, facts: PolicyAnalysis) -> GuideInput | None:
    """Let a network read the site's own prior, unless nature hides something that the prior could reveal."""
    fact = facts.sites[name]
    if not 0 < fact.description <= _MAX_FEATURES or any(site.hidden for site in structure.sites):
        return None
    return GuideInput("prior", name, fact.dims, 0, fact.description, None, f"prior {name}", fact.support)


def readable_inputs(sources: list[GuideInput]) -> list[GuideInput]:
    """Keep the inputs that are small enough for a network."""
    return [source for source in sources if source.num_features <= _MAX_ONE_HOT]

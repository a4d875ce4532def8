"""Decide, site by site, what a tilt reads and whether it is a table or a network."""

import math
from dataclasses import dataclass, field
from typing import Literal

from bayesrl.core.structure import Site, Structure
from bayesrl.core.trace import Frame
from bayesrl.errors import GuideError
from bayesrl.guides.network_inputs import GuideInput, list_inputs, prior_input, readable_inputs, site_input
from bayesrl.guides.networks import time_features
from bayesrl.guides.plate_alignment import Dims
from bayesrl.guides.policy_analysis import PolicyAnalysis
from bayesrl.guides.tilts.families import PriorRange

type Tilt = Literal["auto", "table", "network", "constant"]


@dataclass(frozen=True, eq=False)
class TableSpec:
    """A table of shape [T?, *full plate sizes, *ranges of the sources, outputs], with its plates ascending by axis."""

    timed: bool
    frames: tuple[Frame, ...]
    sources: tuple[GuideInput, ...]
    num_outputs: int
    length: int

    @property
    def radices(self) -> tuple[int, ...]:
        """Number of joint values of each source."""
        return tuple(source.num_codes for source in self.sources)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the parameter."""
        time = (self.length,) if self.timed else ()
        return (*time, *(frame.full_size for frame in self.frames), *self.radices, self.num_outputs)


@dataclass(frozen=True, eq=False)
class SiteSpec:
    """The parts of one action site's tilt: a table, a network that reads time, `sources` and a `summary`, or both.

    `cut` says that the table of all finite inputs did not fit.
    """

    site: Site
    dims: Dims
    table: TableSpec | None
    sources: tuple[GuideInput, ...]
    network: bool
    num_features: int
    num_outputs: int
    summary: str | None
    cut: bool = False


@dataclass(frozen=True, eq=False)
class SummarySpec:
    """A recurrent summary of a scan, for the sites in these plates."""

    scan: int
    frames: tuple[Frame, ...]
    dims: Dims
    sources: tuple[GuideInput, ...]
    num_features: int


@dataclass(frozen=True, eq=False)
class Parameterization:
    """The plans of all action sites and of all summaries, and the ranges of the prior's draws, by name."""

    sites: dict[str, SiteSpec]
    summaries: dict[str, SummarySpec]
    reaches: dict[str, PriorRange] = field(default_factory=dict)

    @property
    def has_networks(self) -> bool:
        """Whether the guide has parameters other than tables."""
        return bool(self.summaries) or any(site.network for site in self.sites.values())


def choose_parameterization(
    structure: Structure,
    facts: PolicyAnalysis,
    *,
    tilt: Tilt,
    hidden: int,
    recurrent: bool | Literal["auto"],
    max_table: int,
) -> Parameterization:
    """Decide for all action sites; the options are those of `AutoTilt`.

    Raises:
        GuideError: `tilt` forces a table that does not fit.
    """
    sites: dict[str, SiteSpec] = {}
    summaries: dict[str, SummarySpec] = {}
    for name in structure.actions:
        site = structure[name]
        summary = None
        if needs_summary(site, structure, recurrent, tilt):
            made = _summary(site, structure, facts)
            summary = f"{'/'.join(sorted(facts.sites[name].frames))}scan{site.scan}$summary"
            summaries[summary] = made
        sites[name] = _site_plan(site, structure, facts, tilt, max_table, summary, hidden)
    return Parameterization(sites, summaries)


def needs_summary(site: Site, structure: Structure, recurrent: bool | Literal["auto"], tilt: Tilt) -> bool:
    """Whether the past of a scan matters beyond its carry: something is scored later, or nature hides something."""
    if site.scan is None or site.length == 1 or recurrent is False:
        return False
    if recurrent is True:
        return True
    if tilt == "constant":
        return False
    last = max(i for i, other in enumerate(structure.sites) if other.scan == site.scan)
    scored_later = any(other.kind in ("reward", "observed") for other in structure.sites[last + 1 :])
    return scored_later or any(other.hidden for other in structure.sites[: last + 1])


def _site_plan(
    site: Site,
    structure: Structure,
    facts: PolicyAnalysis,
    tilt: Tilt,
    max_table: int,
    summary: str | None,
    hidden: int,
) -> SiteSpec:
    fact = facts.sites[site.name]
    if fact.tilt == 0:
        return SiteSpec(site, fact.dims, None, (), network=False, num_features=0, num_outputs=0, summary=None)
    sources = [] if tilt == "constant" else list_inputs(site.name, structure, facts)
    finite = [source for source in sources if source.num_codes]
    exact = len(finite) == len(sources)
    table, all_of_it = _table(site, fact.tilt, finite, tilt, max_table)
    if tilt in ("table", "constant") and not all_of_it:
        size = math.prod(_table_plan(site, fact.tilt, finite).shape)
        raise GuideError(
            f"the table of site {site.name!r} would have {size:,} entries, more than max_table={max_table:,}; "
            "raise max_table, or use tilt='network'"
        )
    network = tilt == "network" or summary is not None or (tilt == "auto" and not (exact and all_of_it))
    prior = prior_input(site.name, structure, facts) if tilt in ("auto", "network") else None
    inputs = readable_inputs(sources + [prior] * (prior is not None)) if network else []  # type: ignore[list-item]
    num_features = sum(source.num_features for source in inputs) + time_features(site.length).shape[-1]
    num_features += hidden if summary is not None else 0
    if num_features == 0:
        network = False
    return SiteSpec(site, fact.dims, table, tuple(inputs), network, num_features, fact.tilt, summary, not all_of_it)


def _table_plan(
    site: Site, num_outputs: int, sources: list[GuideInput], *, timed: bool = True, plates: bool = True
) -> TableSpec:
    frames = tuple(sorted(site.frames, key=lambda frame: frame.dim)) if plates else ()
    timed = timed and site.scan is not None
    return TableSpec(timed, frames, tuple(sources), num_outputs, site.length)


def _table(
    site: Site, num_outputs: int, finite: list[GuideInput], tilt: Tilt, max_table: int
) -> tuple[TableSpec | None, bool]:
    """Return the richest table that fits, and whether it is indexed by all finite inputs."""
    carried = [source for source in finite if source.kind == "carry"]
    if tilt == "network":
        # Without plate axes, the guide carries over to other contexts.
        candidates = [_table_plan(site, num_outputs, [], plates=False)]
    else:
        # From rich to poor: all finite inputs, the carry alone, time and plates alone, and at last time alone.
        candidates = [_table_plan(site, num_outputs, sources) for sources in (finite, carried, [])]
        candidates += [_table_plan(site, num_outputs, [], plates=False)]
    for index, plan in enumerate(candidates):
        if math.prod(plan.shape) <= max_table:
            return plan, index == 0
    return None, False


def _summary(site: Site, structure: Structure, facts: PolicyAnalysis) -> SummarySpec:
    """Plan a summary that reads everything visible in one step, in the plates of the site."""
    mine = facts.sites[site.name]
    visible = []
    for other in structure.sites:
        if other.scan == site.scan and other.latent and not other.hidden:
            fact = facts.sites[other.name]
            if fact.frames <= mine.frames:
                visible.append(site_input(fact, other, stacked=False))
    inputs = tuple(readable_inputs(visible))
    num_features = sum(source.num_features for source in inputs) + time_features(site.length).shape[-1]
    frames = tuple(sorted(site.frames, key=lambda frame: frame.dim))
    assert site.scan is not None
    return SummarySpec(site.scan, frames, mine.dims, inputs, num_features)

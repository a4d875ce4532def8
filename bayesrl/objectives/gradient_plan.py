"""Decide once, from the programs, which gradient estimator each site gets."""

import math
from dataclasses import dataclass
from itertools import product
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import Array
from numpyro import handlers

from bayesrl.compilation.random_keys import dummy_key
from bayesrl.core.draws import Draws
from bayesrl.core.programs import Programs
from bayesrl.core.rng import FoldedKeys
from bayesrl.core.structure import Structure
from bayesrl.core.trace import TraceSite, abstract_trace, site_log_prob, trace_program
from bayesrl.errors import ObjectiveError
from bayesrl.jaxprs.dataflow import count_dependent_numbers, discontinuous_inputs
from bayesrl.typing import Params, PRNGKey

FEWEST_PARTICLES = 64
"""With fewer particles than this, we assume that the user wants cheap steps."""

MOST_BRANCHES, MOST_NUMBERS = 2048, 1_000_000
"""When there are more joint values than particles: the most values to enumerate, and the most numbers to compute."""


@dataclass(frozen=True)
class GradientPlan:
    """Names of the sites by gradient estimator.

    The enumerated action sites, which have an exact expectation, are the last ones of the program; `num_particles`
    counts the draws of those before. `nature` are environment sites that need a score term because pathwise actions
    move them.
    """

    pathwise: tuple[str, ...]
    score: tuple[str, ...]
    nature: tuple[str, ...]
    enumerated: tuple[str, ...]
    num_particles: int

    def branches(self, structure: Structure) -> dict[str, Array]:
        """Return all joint values of the enumerated sites, {site: [branches, *site shape]}."""
        supports = [structure[name].support or () for name in self.enumerated]
        grid = jnp.asarray(list(product(*supports)))
        return {
            name: jnp.broadcast_to(
                grid[:, i].reshape((-1,) + (1,) * len(structure[name].shape)), (len(grid), *structure[name].shape)
            )
            for i, name in enumerate(self.enumerated)
        }

    def draw_branches(self, key: PRNGKey, params: Params, programs: Programs) -> Draws:
        """Draw once at every joint value of the enumerated sites, [1, branches, ...]."""
        branches = self.branches(programs.structure)
        return jax.vmap(lambda values: programs.draw(key, params, 1, values=values), out_axes=1)(branches)

    def check_all_or_none(self, structure: Structure, objective: str) -> None:
        """Refuse a plan that enumerates some action sites and draws others, for objectives that cannot."""
        if self.enumerated and self.enumerated != structure.actions:
            raise ObjectiveError(
                f"{objective} enumerates all action sites or none, and enumerated={self.enumerated!r} leaves out some "
                f"of {structure.actions!r}; use enumerated=() or 'auto'"
            )


def make_gradient_plan(
    key: PRNGKey,
    programs: Programs,
    params: Params,
    num_particles: int,
    estimator: str,
    baseline: str,
    enumerated: tuple[str, ...] | Literal["auto"],
) -> GradientPlan:
    """Choose an estimator for each site, and refuse options that would be silently biased.

    Raises:
        ObjectiveError: naming the site and the remedy.
    """
    guide = programs.trace_guide(params)
    actions = programs.structure.actions
    for name in actions:
        if name not in guide.sites:
            raise ObjectiveError(f"the guide misses action site {name!r}; add numpyro.sample({name!r}, ...) to it")
    # Whoever forces pathwise gradients would get none if all sites were enumerated.
    if estimator == "pathwise" and enumerated == "auto":
        enumerated = ()
    chosen = _enumerated(programs, params, num_particles, enumerated)
    sampled = [name for name in actions if name not in chosen]
    pathwise = _pathwise(key, programs, guide.sites, sampled, estimator)
    score = tuple(name for name in sampled if name not in pathwise)
    if score and num_particles < 2 and baseline != "none":
        raise ObjectiveError(
            f"ReverseKL(num_particles=1) has no other particle to make a baseline of for site {score[0]!r}; "
            "use num_particles >= 2, or baseline='none'"
        )
    nature = tuple(
        name
        for name in programs.structure.names("environment")
        if pathwise and not site_distribution(programs, guide.sites, name).has_rsample
    )
    # If everything is enumerated, all draws would be the same: one is enough.
    particles = num_particles if sampled or programs.structure.names("environment") else 1
    if chosen and sampled:
        joint = math.prod(len(programs.structure[name].support or ()) for name in chosen)
        # Each particle runs all branches; from 8 particles on, the regression baseline works.
        particles = max(num_particles // joint, 8)
    return GradientPlan(pathwise, score, nature, chosen, particles)


def site_distribution(programs: Programs, guide: dict[str, TraceSite], name: str) -> Any:
    """Return the distribution of an environment site, from the guide if it has the site, else from the policy."""
    if name in guide:
        return guide[name].fn
    return abstract_trace(dummy_key(), programs.policy, programs.args).trace.sites[name].fn


def _pathwise(
    key: PRNGKey, programs: Programs, guide: dict[str, TraceSite], names: list[str], estimator: str
) -> tuple[str, ...]:
    if estimator == "score":
        return ()
    able = [name for name in names if guide[name].fn.has_rsample and not programs.structure[name].discrete]
    if estimator == "pathwise":
        unable = [name for name in names if name not in able]
        if unable:
            raise ObjectiveError(
                f"estimator='pathwise' cannot differentiate through site {unable[0]!r} "
                f"({type(guide[unable[0]].fn).__name__} has no reparameterised sampler); use estimator='auto'"
            )
    jumps = discontinuous_sites(key, programs, guide, able) if able else set()
    if estimator == "pathwise":
        refuse_jumps(jumps, "estimator='pathwise'", "estimator='auto'")
    return tuple(name for name in able if name not in jumps)


def refuse_jumps(sites: set[str], who: str, remedy: str) -> None:
    """Refuse a pathwise gradient at sites where a reward or density is discontinuous."""
    if sites:
        raise ObjectiveError(
            f"{who} would be biased at site {min(sites)!r}: a reward or a density jumps in it "
            f"(a comparison, rounding, arg-max or cast to integers); use {remedy}"
        )


def discontinuous_sites(key: PRNGKey, programs: Programs, guide: dict[str, TraceSite], names: list[str]) -> set[str]:
    """Return the sites in whose values a reward, or another site's density, is discontinuous."""
    # Only the path from inputs to outputs matters, so any numbers of the right shape will do.
    policy = abstract_trace(key, programs.policy, programs.args).trace.sites
    drawn = {
        name: jnp.zeros(jnp.shape(site.value), jnp.result_type(site.value))
        for name, site in {**policy, **guide}.items()
        if site.kind in ("action", "environment")
    }
    held = {name: drawn.pop(name) for name in names}

    def scores(values: dict[str, Array]) -> list[Array]:
        program = handlers.substitute(programs.policy, data={**drawn, **values})
        sites = trace_program(FoldedKeys(program, key), *programs.args).sites
        own = {
            name: site._replace(value=held[name], intermediates=None) for name, site in sites.items() if name in held
        }
        return [site_log_prob(site) for site in {**sites, **own}.values() if site.kind != "metric"]

    return discontinuous_inputs(scores, held)[1]


def _enumerated(
    programs: Programs, params: Params, num_particles: int, wanted: tuple[str, ...] | Literal["auto"]
) -> tuple[str, ...]:
    structure = programs.structure
    actions = structure.actions
    if wanted == "auto":
        return actions if actions and _pays_to_enumerate(programs, params, num_particles) else ()
    for name in wanted:
        if name not in actions:
            raise ObjectiveError(
                f"enumerated={wanted!r} names {name!r}, which is not an action site; choose from {list(actions)}"
            )
        if not _has_branches(structure, name):
            raise ObjectiveError(
                f"site {name!r} cannot be enumerated: it needs a finite support known beforehand, outside scans, and "
                "plates whose elements are separate problems; leave it out of enumerated="
            )
    chosen = tuple(name for name in actions if name in wanted)
    if chosen and chosen != actions[len(actions) - len(chosen) :]:
        raise ObjectiveError(
            f"enumerated={wanted!r} must be the last action sites of the program, whose order is {list(actions)}"
        )
    latent = structure.names("action", "environment")
    if chosen and any(structure[name].kind == "environment" for name in latent[latent.index(chosen[0]) :]):
        raise ObjectiveError(
            f"nature draws after site {chosen[0]!r}, so its cost cannot be enumerated; use enumerated=()"
        )
    return chosen


def _pays_to_enumerate(programs: Programs, params: Params, num_particles: int) -> bool:
    """Whether to enumerate all values: there are no more than particles, or the computation is negligible.

    An exact expectation has no noise; with noise, a fit may fail to learn rare values.
    """
    size = joint_size(programs.structure)
    if size is None or size <= num_particles:
        return size is not None
    if num_particles < FEWEST_PARTICLES or size > MOST_BRANCHES:
        return False
    values = {name: jnp.zeros(programs.structure[name].shape, int) for name in programs.structure.actions}
    once = count_dependent_numbers(lambda values: programs.draw(dummy_key(), params, 1, values=values), values)
    return once is not None and size * once <= MOST_NUMBERS


def joint_size(structure: Structure) -> int | None:
    """Count the joint values of all latent sites; None if they cannot be listed."""
    size = 1
    for name in structure.names("action", "environment"):
        site = structure[name]
        if site.kind == "environment" or not _has_branches(structure, name):
            return None
        size *= len(site.support or ())
    return size


def _has_branches(structure: Structure, name: str) -> bool:
    """Whether the program can run once for each value of a site, with all elements of the site at that value."""
    site = structure[name]
    if site.support is None or site.event_dim or site.scan is not None:
        return False
    # Its elements must be exactly the contexts, because only those do not interact.
    return set(site.frames) <= set(structure.contexts) and math.prod(site.shape) == math.prod(
        frame.size for frame in site.frames
    )

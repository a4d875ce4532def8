"""Check that policy and guide fit together: the same sites, support and nature, and separate contexts."""

from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from numpyro import handlers

from bayesrl.compilation.jit import closure_jit
from bayesrl.compilation.random_keys import split_keys
from bayesrl.core.draws import Draws, Totals
from bayesrl.core.programs import Programs
from bayesrl.core.rng import FoldedKeys
from bayesrl.core.structure import FiniteSupport, finite_support, is_discrete
from bayesrl.core.trace import Frame, site_log_prob, trace_program
from bayesrl.errors import GuideError, PolicyError
from bayesrl.typing import Params, PRNGKey

type _Looked = tuple[dict[str, Array], dict[str, Array], dict[str, Array]]


def check_sites(programs: Programs, params: Params) -> None:
    """Refuse a guide whose sites are not those of its policy, without drawing.

    Raises:
        GuideError: the guide misses an action site, adds a site, draws another shape, or may leave the prior's support.
    """
    if programs.guide is None:
        return
    structure, drawn = programs.structure, programs.trace_guide(params)
    for name in structure.actions:
        if name not in drawn.sites:
            raise GuideError(
                f"the guide misses action site {name!r} (it draws {sorted(drawn.sites) or 'nothing'}); "
                f"add numpyro.sample({name!r}, ...) to the guide"
            )
    for name, site in drawn.sites.items():
        if site.kind != "metric" and all(name != known.name for known in structure.sites):
            raise GuideError(
                f"the guide adds site {name!r}, which the policy does not have "
                f"(its action sites are {list(structure.actions)}); remove it or rename it"
            )
        if name not in structure.actions:
            continue
        if site.kind == "observed":
            raise GuideError(
                f"the guide holds action site {name!r} at a value (obs=...) instead of drawing it; leave obs out"
            )
        if is_discrete(site.fn) != structure[name].discrete:
            raise GuideError(
                f"only one of guide and policy draws site {name!r} from a discrete distribution; draw from "
                "distributions with the same support in both"
            )
        _check_support(name, structure[name].support, finite_support(site.fn))
        shape = tuple(jnp.shape(site.value))
        if shape != structure[name].shape:
            raise GuideError(
                f"the guide draws site {name!r} with shape {shape}, the policy with {structure[name].shape}; "
                "use the same plates and event shape in both"
            )


def check_draws(
    key: PRNGKey, programs: Programs, params: Params, draws: Draws, totals: Totals, *, separate: bool = False
) -> None:
    """Refuse programs that do not fit together, as their draws show.

    A guide that declares itself `within_prior` is checked only if some draw has prior probability 0.

    Args:
        key: consumed whole.
        programs: policy and guide.
        params: unconstrained parameters of the guide.
        draws: of the guide, [num_draws, ...].
        totals: their scores.
        separate: whether the elements of context plates are already known not to read one another.

    Raises:
        GuideError: draws leave the prior's support, the guide's nature is not the policy's, or the guide's choice for
            one element of a context plate reads another element.
        PolicyError: the policy's own density is nan, or a reward, a likelihood or a prior of one element of a context
            plate reads another element.
    """
    possible = bool((np.asarray(totals.log_prior) > -np.inf).all())
    looks = programs.guide is not None and not (getattr(programs.guide, "within_prior", False) and possible)
    mixes = not separate and any(frame.size > 1 for frame in programs.structure.contexts)
    if not looks and not mixes:
        return

    def check(keys: tuple[PRNGKey, PRNGKey], params: Params, values: dict[str, Array]) -> Any:
        look = _look(keys[0], programs, params, values) if looks else ({}, {}, {})
        return *look, find_interacting(keys[1], programs, params) if mixes else {}

    values = {**draws.sites, **draws.plates} if looks else {}
    broken, outside, other_nature, mixed = closure_jit(check, name="check")(split_keys(key, 2), params, values)
    num_draws = len(totals.log_prior)
    # First the nan densities, because a nan counts as outside of the support too.
    for name, bad in _counted(broken):
        raise PolicyError(
            f"site {name!r} of the policy has a parameter or density that is nan in {bad} of {num_draws} draws; "
            "look at what its distribution is computed from, such as weights of a network"
        )
    for name, bad in _counted(outside):
        raise GuideError(
            f"the guide leaves the prior's support at site {name!r}: {bad} of {num_draws} draws have prior "
            "probability 0, so the KL would be infinite; draw from a distribution with the same support"
        )
    for name, _ in _counted(other_nature):
        raise GuideError(
            f"the guide draws environment site {name!r} from another distribution than the policy; "
            "nature cannot be tilted: copy the policy's environment(...) line, or leave the site out of the guide"
        )
    refuse_interacting(mixed)


def _counted(found: dict[str, Array]) -> Iterator[tuple[str, int]]:
    """Count the bad draws of each site that has any."""
    counts = {name: int(np.asarray(bad).sum()) for name, bad in found.items()}
    return ((name, count) for name, count in counts.items() if count)


def _check_support(name: str, prior: FiniteSupport | None, guide: FiniteSupport | None) -> None:
    """Refuse values outside the prior's support, however rarely the guide draws them."""
    if not isinstance(prior, tuple) or not isinstance(guide, tuple):
        return
    strange = sorted(set(guide) - set(prior))
    if strange:
        raise GuideError(
            f"the guide leaves the prior's support at site {name!r}: it may draw {strange[0]}, which the prior, with "
            f"values {prior[0]} to {prior[-1]}, cannot; draw from a distribution with the same support"
        )


def _numbers(fn: Any) -> list[Any]:
    """Return the floating-point parameters of a distribution."""
    leaves = [leaf for leaf in jax.tree.leaves(fn) if isinstance(leaf, Array | np.ndarray)]
    return [leaf for leaf in leaves if jnp.issubdtype(leaf.dtype, jnp.floating)]


def _look(key: PRNGKey, programs: Programs, params: Params, values: dict[str, Array]) -> _Looked:
    """Report by site which draws have a nan density, leave the support, or come from another nature."""

    def one(values: dict[str, Array]) -> _Looked:
        policy = handlers.substitute(
            programs.policy, data={**(programs.constrain(params) if programs.learned else {}), **values}
        )
        # All sites have values, so the key draws nothing and may be the same for all draws.
        scored = trace_program(FoldedKeys(policy, key), *programs.args).sites
        broken, outside = {}, {}
        for name in programs.structure.actions:
            site = scored[name]
            log_prob = site_log_prob(site)
            # A nan parameter need not make the density nan, so look at the parameters too.
            broken[name] = jnp.stack([jnp.isnan(x).any() for x in (log_prob, *_numbers(site.fn))]).any()
            outside[name] = ~(jnp.all(site.fn.support(site.value)) & jnp.all(log_prob > -jnp.inf))
        if programs.guide is None or not programs.structure.names("environment"):
            return broken, outside, {}
        drawn = programs.run_guide(key, None, params, values, ()).sites
        other = {}
        for name in programs.structure.names("environment"):
            if name in drawn:
                ours, theirs = site_log_prob(drawn[name]), site_log_prob(scored[name])
                same = ours.shape == theirs.shape and jnp.allclose(ours, theirs, rtol=1e-3, atol=1e-3)
                other[name] = ~jnp.asarray(same)
        return broken, outside, other

    found: _Looked = jax.vmap(one)(values)
    return found


# ---- whether the elements of context plates really are separate problems ----------------------

NUM_SWAPS = 8


type Interacting = dict[str, dict[str, Array]]
"""Whether an element's score changes with the other elements: by score and site."""


def find_interacting(key: PRNGKey, programs: Programs, params: Params) -> dict[str, Interacting]:
    """Mix two draws element by element, and report by plate which scores do not follow their own element."""
    frames = enumerate(sorted(programs.structure.contexts, key=lambda frame: frame.dim))
    return {frame.name: _interacting(axis, frame, programs, key, params) for axis, frame in frames if frame.size > 1}


def refuse_interacting(plates: Mapping[str, Interacting]) -> None:
    """Refuse context plates whose elements are not separate problems.

    Raises:
        PolicyError: a reward, a likelihood or a prior of one element reads another element.
        GuideError: the guide's choice for one element reads another element.
    """
    for plate, parts in plates.items():
        for part, sites in parts.items():
            for name in (name for name, found in sites.items() if bool(found)):
                if part == "log_q":
                    raise GuideError(
                        f"at site {name!r} of the guide, elements of plate {plate!r} read one another, but in the "
                        "policy they are separate problems; let each element read itself alone"
                    )
                raise PolicyError(
                    f"at site {name!r}, elements of plate {plate!r} read one another, so they are not separate "
                    "problems; put one reward, summed over the elements, outside the plate"
                )


def _interacting(axis: int, plate: Frame, programs: Programs, key: PRNGKey, params: Params) -> Interacting:
    """Do `find_interacting` for one plate, whose elements lie along one axis of the contexts."""
    contexts = len(programs.structure.contexts)
    batch_key, draws_key, mask_key = split_keys(key, 3)
    batch = {name: indices[0] for name, indices in programs.draw(batch_key, params, 1).plates.items()}
    draws = programs.draw(draws_key, params, 2 * NUM_SWAPS, share=False, values=batch)
    chosen = jax.random.bernoulli(mask_key, shape=(NUM_SWAPS, plate.size))
    sites = {}
    for name, values in draws.sites.items():
        one, other = values[:NUM_SWAPS], values[NUM_SWAPS:]
        site = programs.structure[name]
        dims = [frame.dim for frame in site.frames if frame.name == plate.name]
        place = values.ndim - site.event_dim + dims[0] if dims else None
        mixed = one if place is None else jnp.where(_along(chosen, place, values.ndim), one, other)
        # A site outside the plate belongs to all of its elements, so both draws have it from the first.
        sites[name] = jnp.concatenate([one, other if dims else one, mixed])
    plates = {name: jnp.concatenate([indices, indices[:NUM_SWAPS]]) for name, indices in draws.plates.items()}
    scored = programs.score(params, draws._replace(sites=sites, plates=plates))
    ours, theirs, both = (jax.tree.map(lambda x, i=i: x[i * NUM_SWAPS : (i + 1) * NUM_SWAPS], scored) for i in range(3))
    found: Interacting = {}
    for part in ("log_q", "log_prior", "log_likelihood", "log_nature", "rewards"):
        found[part] = {}
        for name, values in getattr(both, part).items():
            lead = _along(chosen, 1 + axis, 2 + contexts)
            expected = jnp.where(lead, getattr(ours, part)[name], getattr(theirs, part)[name])
            # Compiled sums round differently per draw, so the tolerance is relative to the largest score.
            rounding = 1e-3 * jnp.max(jnp.abs(expected), where=jnp.isfinite(expected), initial=1e-3)
            found[part][name] = ~jnp.allclose(values, expected, rtol=0.0, atol=rounding, equal_nan=True)
    return found


def _along(chosen: Array, place: int, ndim: int) -> Array:
    """Lay [swap, element] along axes 0 and `place` of `ndim`."""
    return chosen.reshape(len(chosen), *(chosen.shape[1] if i == place else 1 for i in range(1, ndim)))

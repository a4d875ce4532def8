"""Whether the elements of context plates really are separate problems."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax import Array

from bayesrl.compilation.keys import split_keys
from bayesrl.core.programs import Programs
from bayesrl.core.trace import Frame
from bayesrl.errors import GuideError, PolicyError
from bayesrl.typing import Params, PRNGKey

NUM_SWAPS = 8


type Interacting = dict[str, dict[str, Array]]
"""Whether an element's score changes with the other elements: by score and site."""


def interacting(key: PRNGKey, programs: Programs, params: Params) -> dict[str, Interacting]:
    """Mix two draws element by element, and tell by plate which scores are not those of the elements.

    Args:
        key: consumed whole.
        programs: policy and guide.
        params: unconstrained parameters of the guide.
    """
    frames = enumerate(sorted(programs.structure.contexts, key=lambda frame: frame.dim))
    return {frame.name: _interacting(axis, frame, programs, key, params) for axis, frame in frames if frame.size > 1}


def refuse_interacting(plates: Mapping[str, Interacting]) -> None:
    """Refuse context plates whose elements are no separate problems.

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
    """Do as `interacting` does, for one plate, whose elements lie along an axis of the contexts."""
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
            rounding = 1e-3 * jnp.max(jnp.abs(expected), where=jnp.isfinite(expected), initial=1e-3)
            found[part][name] = ~jnp.allclose(values, expected, rtol=0.0, atol=rounding, equal_nan=True)
    return found


def _along(chosen: Array, place: int, ndim: int) -> Array:
    """Lay [swap, element] along axes 0 and `place` of `ndim`."""
    return chosen.reshape(len(chosen), *(chosen.shape[1] if i == place else 1 for i in range(1, ndim)))

"""Put a policy and a guide together, and check them before computing anything."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bayesrl.compilation.random_keys import fold_in
from bayesrl.core.draws import Draws, Totals
from bayesrl.core.handlers import check_beta
from bayesrl.core.programs import Programs, declared_params, freeze
from bayesrl.core.structure import Structure, as_arrays, check_policy, inspect
from bayesrl.core.support_edges import NUM_DRAWS, edges_of
from bayesrl.core.unsupported import check_arguments, explain_errors
from bayesrl.core.validation import check_draws, check_sites
from bayesrl.errors import FitError, GuideError, PolicyError
from bayesrl.guides import AutoGuide, AutoTilt
from bayesrl.guides.numpyro_guides import set_up_autoguide
from bayesrl.posterior.sampling import batch_of, draw_fit
from bayesrl.typing import Params, PRNGKey, Program
from bayesrl.value_checks import format_value, is_function

NUM_CHECKED, LEAST_CHECKED = 64, 8


class Bound(NamedTuple):
    """A policy and a guide that belong together, with all parameters that are trained, unconstrained.

    `family` built the guide, and is None if it was written by hand; `betas` are () or [number of β], 1 without rewards.
    """

    programs: Programs
    params: Params
    family: AutoGuide | None
    betas: np.ndarray


def bind_programs(
    key: PRNGKey,
    policy: Program,
    args: tuple[Any, ...],
    beta: Any,
    guide: Program | AutoGuide | None,
    source: Any = None,
) -> Bound:
    """Put a policy and a guide together, and refuse pairs that do not fit, without drawing.

    Raises:
        PolicyError, GuideError: naming the site, the value and the remedy.
    """
    if not callable(policy):
        raise PolicyError(
            f"policy={format_value(policy)} is not a program; pass a function that calls numpyro.sample and "
            "bayesrl.reward"
        )
    betas = _betas(beta)
    args = as_arrays(args)
    structure = inspect(fold_in(key, 0), policy, *args)
    if source is None:
        structure.check_complete("it cannot be fitted alone")
    check_policy(structure, has_beta=beta is not None)
    # Beside rewards the policy is the prior, so its parameters are frozen; with data alone they are learned.
    learned = beta is None
    frozen, own = policy, declared_params(key, policy, *args) if learned else ({}, {})
    if not learned:
        frozen, _ = freeze(key, policy, *args)
    program, family = _built(key, policy, guide, structure, args, learned=learned)
    if program is not None and family is None:
        check_arguments(program, args, "the guide", GuideError)
        set_up_autoguide(fold_in(key, 7), program, structure, args)
    bare = Programs(frozen, program, structure, args, {}, learned, getattr(source, "episodes", None))
    first, transforms = own if learned and program is None else declared_by(key, bare, *own)
    if not first:
        raise FitError(
            "there is nothing to fit: neither the guide nor the policy declares a parameter; "
            "draw an action in the policy, or declare numpyro.param in the guide"
        )
    programs = replace(bare, transforms=transforms)
    check_sites(programs, first)
    return Bound(programs, first, family, betas)


def _betas(beta: Any) -> np.ndarray:
    if beta is None:
        return np.asarray(1.0)
    check_beta(beta)
    betas = np.asarray(beta, float)
    if betas.ndim > 1:
        raise PolicyError(f"beta has shape {betas.shape}; pass a number or a one-dimensional array")
    return betas


def _built(
    key: PRNGKey,
    policy: Program,
    guide: Program | AutoGuide | None,
    structure: Structure,
    args: tuple[Any, ...],
    *,
    learned: bool,
) -> tuple[Program | None, AutoGuide | None]:
    """Return the guide program and its family."""
    if not structure.actions:
        if guide is not None:
            raise GuideError(f"the policy draws nothing, so guide={format_value(guide)} has no use; leave it out")
        return None, None
    family = AutoTilt() if guide is None else guide
    if isinstance(family, AutoGuide):
        return family.build(key, policy, structure, args), family
    if isinstance(family, type):
        raise GuideError(
            f"guide={family.__name__} is a class; pass an instance of it: {family.__name__}"
            + ("()" if issubclass(family, AutoGuide) else "(policy)")
        )
    if not is_function(family):
        raise GuideError(
            f"guide={format_value(guide)} is neither a NumPyro program nor a family of bayesrl.guides; "
            "pass a function of the policy's arguments, or AutoTilt()"
        )
    return family, None


def declared_by(
    key: PRNGKey, programs: Programs, own: Params, own_transforms: Mapping[str, Any] | None = None
) -> tuple[Params, dict[str, Any]]:
    """Return the parameters of the guide, plus `own` of a learned policy, with their transforms."""
    if programs.guide is None:
        return declared_params(key, programs.policy, *programs.args)
    with explain_errors("the guide", GuideError):
        params, transforms = declared_params(key, programs.guide, *programs.args)
    return {**own, **params}, {**(own_transforms or {}), **transforms}


def draw_and_check(key: PRNGKey, programs: Programs, params: Params, *, by_hand: bool) -> tuple[Draws, Totals]:
    """Draw from the guide, and refuse programs whose draws show that they do not fit together.

    Raises:
        PolicyError, GuideError: naming the site, the value and the remedy.
    """
    if by_hand:
        _refuse_edges(fold_in(key, 7), programs)
    # At most a few batches: 64 copies of a long recording of pictures would fill memory.
    number = min(NUM_CHECKED, max(4 * batch_of(programs.structure), LEAST_CHECKED))
    draws, totals = draw_fit(fold_in(key, 1), programs, params, number)
    sampler = getattr(programs.guide, "sampler", None)
    separate = sampler is not None and sampler.contexts_are_independent(programs)
    check_draws(fold_in(key, 3), programs, params, draws, totals, separate=separate)
    return draws, totals


def _refuse_edges(key: PRNGKey, programs: Programs) -> None:
    """Refuse a hand-written guide for a site whose prior often draws at the edge of single precision."""
    for name, edge in edges_of(key, programs.policy, programs.structure, programs.args).items():
        raise GuideError(
            f"{edge.num} of {NUM_DRAWS} draws of the prior of site {name!r} lie at the edge of what single precision "
            "tells of its support, where no density says how likely they are, so J and KL would be wrong; leave "
            "guide= out (the automatic guide leaves such draws where they are), use bayesrl.importance, or choose a "
            "prior that piles up less"
        )


def bind_params(
    whose: str,
    declared: Params,
    transforms: Mapping[str, Any],
    given: Mapping[str, Any],
    *,
    unconstrained: bool,
) -> Params:
    """Check parameters that were trained elsewhere, and return them unconstrained, as `declared` are.

    Raises:
        GuideError: a parameter is missing, unknown, of the wrong shape, not finite, or outside its constraint.
    """
    missing, unknown = [n for n in declared if n not in given], [n for n in given if n not in declared]
    if missing or unknown:
        what = f"lack {missing[0]!r}" if missing else f"hold {unknown[0]!r}"
        raise GuideError(
            f"params {what}, and the {whose} declares {sorted(declared)}; pass those of this {whose}, as "
            "svi.get_params(state) of NumPyro or state.params give them"
        )
    return {
        name: _bind(name, whose, own, None if unconstrained else transforms.get(name), given[name])
        for name, own in declared.items()
    }


def _bind(name: str, whose: str, own: Any, transform: Any, given: Any) -> Any:
    """Do `bind_params` for one parameter, whose value is unconstrained if `transform` is None."""
    # A transform may change the shape, as that of a simplex does.
    declared = own if transform is None else jax.eval_shape(transform, own)
    try:
        value = np.asarray(given) if hasattr(own, "shape") else jax.tree.map(np.asarray, given)
    except (TypeError, ValueError):
        value = np.asarray(None)
    dtypes = [leaf.dtype for leaf in jax.tree.leaves(value)]
    if not all(jnp.issubdtype(dtype, jnp.number) or dtype.kind == "b" for dtype in dtypes):
        raise GuideError(f"parameter {name!r} is not made of numbers; pass arrays of the {whose}'s shapes")
    if _shapes(declared) != _shapes(value):
        raise GuideError(
            f"parameter {name!r} has shape {_shapes(value)[0]}, and the {whose} declares {_shapes(declared)[0]}; "
            f"pass the {whose} and the arguments that it was trained with"
        )
    for dtype, like in zip(dtypes, jax.tree.leaves(declared), strict=True):
        if jnp.issubdtype(dtype, jnp.complexfloating) and not jnp.issubdtype(like.dtype, jnp.complexfloating):
            raise GuideError(
                f"parameter {name!r} is complex, and the {whose} declares real numbers; pass its real part if nothing "
                "is lost with the other"
            )
    value = jax.tree.map(lambda x, like: jnp.asarray(x, like.dtype), value, declared)
    if not _is_finite(value):
        raise GuideError(f"parameter {name!r} is not finite everywhere; pass parameters from before it diverged")
    if transform is not None:
        if not bool(jnp.all(transform.codomain(value))):
            raise GuideError(
                f"parameter {name!r} lies outside of its constraint {transform.codomain}; pass it as the {whose} "
                "declares it, or unconstrained=True where it is the unconstrained value"
            )
        value = transform.inv(value)
        if not _is_finite(value):
            raise GuideError(
                f"parameter {name!r} lies on the edge of its constraint {transform.codomain}, where no unconstrained "
                "value lies; move it inside, such as from 0 to 1e-6"
            )
    return jax.tree.map(lambda x, like: np.asarray(x, like.dtype), value, own)


def _is_finite(tree: Any) -> bool:
    return all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(tree))


def _shapes(tree: Any) -> list[Any]:
    """Return the shape of a parameter, or for a pytree the shapes of its leaves and its structure."""
    if hasattr(tree, "shape"):
        return [tuple(tree.shape)]
    leaves, treedef = jax.tree.flatten(tree)
    return [[tuple(leaf.shape) for leaf in leaves], treedef]

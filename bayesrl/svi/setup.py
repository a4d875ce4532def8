"""Getting ready to fit: programs bound to guides, starting points, and what identifies the problem."""

import dataclasses
import hashlib
from dataclasses import dataclass
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from bayesrl.compilation.jit import closure_jit, to_host
from bayesrl.compilation.keys import fold_in, split
from bayesrl.core.draws import Draws, Totals
from bayesrl.core.handlers import check_beta
from bayesrl.core.programs import Programs, declared_params, freeze
from bayesrl.core.refusals import check_arguments, explain_errors
from bayesrl.core.structure import Structure, as_arrays, check_policy, inspect
from bayesrl.core.support_edges import NUM_DRAWS, edges_of
from bayesrl.core.validation import check_draws, check_sites
from bayesrl.errors import FitError, GuideError, ObjectiveError, PolicyError
from bayesrl.guides import AutoGuide, AutoTilt
from bayesrl.guides.numpyro_guides import set_up_autoguide
from bayesrl.objectives import ForwardKL, Objective
from bayesrl.posterior.marginal import log_marginal
from bayesrl.posterior.sampling import Source, batch_of, draw_fit
from bayesrl.typing import Params, PRNGKey, Program
from bayesrl.values import is_function

NUM_CHECKED, LEAST_CHECKED = 64, 8


@dataclass(frozen=True)
class Setup:
    """A problem ready to be fitted.

    Attributes:
        programs: policy and guide.
        params: starting parameters, [lanes, ...], unconstrained.
        betas: [lanes]; 1 without rewards.
        beta_shape: () or (number of β,).
        objective: prepared for these programs.
        learning_rate: for the default optimiser; None where nobody suggests one.
        identity: JSON-able; two fits of the same identity are the same problem.
        log_marginal: log p(y), nats, where data stand beside rewards; nan where it is not known.
    """

    programs: Programs
    params: Params
    betas: np.ndarray
    beta_shape: tuple[int, ...]
    objective: Objective
    learning_rate: float | None
    identity: dict[str, Any]
    log_marginal: float = 0.0


def set_up(
    key: PRNGKey,
    policy: Program,
    args: tuple[Any, ...],
    beta: Any,
    guide: Program | AutoGuide | None,
    objective: Objective,
    num_restarts: int,
    source: Source | None = None,
    *,
    drawn: bool = True,
) -> Setup:
    """Check everything that can be checked before the first step, and give a `Setup`.

    With `drawn=False` nothing is drawn, for programs that are trained by the library itself.

    Raises:
        PolicyError, GuideError, ObjectiveError: naming the site, the value and the remedy.
    """
    if not callable(policy):
        raise PolicyError(
            f"policy={policy!r} is not a program; pass a function that calls numpyro.sample and bayesrl.reward"
        )
    betas = _betas(beta)
    args = as_arrays(args)
    structure = inspect(fold_in(key, 0), policy, *args)
    if source is None:
        structure.check_complete("it cannot be fitted alone")
    check_policy(structure, has_beta=beta is not None)
    told = [getattr(drawing, "num_particles", 1) for drawing in (objective, source)]
    particles = max(number for number in (*told, 1) if isinstance(number, int))
    structure.check_memory(particles * num_restarts * max(np.size(betas), 1), FitError)
    learned = beta is None
    own, _ = declared_params(key, policy, *args)
    frozen = policy if learned else freeze(key, policy, *args)[0]
    program, family = _bind(key, policy, guide, structure, args, learned=learned)
    if program is not None and family is None:
        check_arguments(program, args, "the guide", GuideError)
        set_up_autoguide(fold_in(key, 7), program, structure, args)
    episodes = getattr(source, "episodes", None)
    programs_pair = Programs(frozen, program, structure, args, {}, learned, episodes)
    first, transforms = _declare(key, programs_pair, own if learned else {})
    programs = dataclasses.replace(programs_pair, transforms=transforms)
    if not first:
        raise FitError(
            "there is nothing to fit: neither the guide nor the policy declares a parameter; "
            "draw an action in the policy, or declare numpyro.param in the guide"
        )
    rate = None if family is None else family.learning_rate_for(first)
    check_sites(programs, first)
    if family is None and drawn:
        _refuse_edges(fold_in(key, 7), programs)
    drawings = _checked_draws(key, programs, first) if drawn else None
    ready = objective.prepare(fold_in(key, 2), programs, first)
    if drawings is not None:
        _check_rewards(drawings[0], ready)
    starts = _restarts(fold_in(key, 4), programs, family, first, num_restarts)
    count = max(int(np.prod(np.shape(betas))), 1)
    params = jax.tree.map(lambda x: np.tile(x, (count, *(1,) * (x.ndim - 1))), starts)
    lanes = np.repeat(np.asarray(betas, np.float32).reshape(-1), num_restarts)
    identity = _identity(key, programs, guide, objective, betas if beta is not None else None, num_restarts, first)
    identity["first draws"] = None if drawings is None else _sketch(*drawings)
    marginal = log_marginal(fold_in(key, 8), programs, first) if drawn else None
    known = 0.0 if marginal is None else float(marginal.mean)
    return Setup(programs, params, lanes, np.shape(betas), ready, rate, identity, known)


def _checked_draws(key: PRNGKey, programs: Programs, first: Params) -> tuple[Draws, Totals]:
    """Draw from the guide as it starts, and refuse programs that do not fit together."""
    # A few batches, lest long recordings of pictures be held so many times.
    number = min(NUM_CHECKED, max(4 * batch_of(programs.structure), LEAST_CHECKED))
    draws, totals = draw_fit(fold_in(key, 1), programs, first, number)
    sampler = getattr(programs.guide, "sampler", None)
    separate = sampler is not None and sampler.contexts_are_independent(programs)
    check_draws(fold_in(key, 3), programs, first, draws, totals, separate=separate)
    return draws, totals


def _refuse_edges(key: PRNGKey, programs: Programs) -> None:
    """Refuse a guide by hand for a site whose prior often draws what single precision cannot tell from its ends.

    Raises:
        GuideError: naming the site, and how many draws of the prior lie there.
    """
    for name, edge in edges_of(key, programs.policy, programs.structure, programs.args).items():
        raise GuideError(
            f"{edge.num} of {NUM_DRAWS} draws of the prior of site {name!r} lie at the edge of what single precision "
            "tells of its support, where no density says how likely they are, so J and KL would be wrong; leave "
            "guide= out (the automatic guide leaves such draws where they are), use bayesrl.importance, or choose a "
            "prior that piles up less"
        )


def _betas(beta: Any) -> np.ndarray:
    if beta is None:
        return np.asarray(1.0)
    check_beta(beta)
    betas = np.asarray(beta, float)
    if betas.ndim > 1:
        raise PolicyError(f"beta has shape {betas.shape}; pass a number or a one-dimensional array")
    return betas


def _bind(
    key: PRNGKey,
    policy: Program,
    guide: Program | AutoGuide | None,
    structure: Structure,
    args: tuple[Any, ...],
    *,
    learned: bool,
) -> tuple[Program | None, AutoGuide | None]:
    """Give the guide program and its family."""
    if not structure.actions:
        if guide is not None:
            raise GuideError(f"the policy draws nothing, so guide={guide!r} has no use; leave it out")
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
            f"guide={guide!r} is neither a NumPyro program nor a family of bayesrl.guides; "
            "pass a function of the policy's arguments, or AutoTilt()"
        )
    return family, None


def _declare(key: PRNGKey, programs: Programs, own: Params) -> tuple[Params, dict[str, Any]]:
    """Give the parameters of guide and, where learned, policy, with their transforms."""
    if programs.guide is None:
        return declared_params(key, programs.policy, *programs.args)
    with explain_errors("the guide", GuideError):
        params, transforms = declared_params(key, programs.guide, *programs.args)
    if programs.learned:
        _, policy_transforms = declared_params(key, programs.policy, *programs.args)
        return {**own, **params}, {**policy_transforms, **transforms}
    return params, transforms


def _check_rewards(draws: Draws, objective: Objective) -> None:
    """Refuse rewards that no gradient survives.

    Raises:
        PolicyError: a reward is NaN or +inf.
        ObjectiveError: a reward is −inf under an objective that takes its expectation.
    """
    for name, values in draws.rewards.items():
        num = values.shape[0]
        by_draw = values.reshape(num, -1)
        for bad, text in ((np.isnan(by_draw), "nan"), (by_draw == np.inf, "inf")):
            if count := int(bad.any(-1).sum()):
                raise PolicyError(
                    f"reward site {name!r} returned {text} for {count} of {num} particles; "
                    "make the reward finite for every draw of the policy"
                )
        count = int((by_draw == -np.inf).any(-1).sum())
        if count and not isinstance(objective, ForwardKL):
            raise ObjectiveError(
                f"reward site {name!r} returned -inf for {count} of {num} particles, and the expectation that "
                f"{type(objective).__name__} takes is then -inf; use ForwardKL(), enumerate_posterior or importance, "
                "or a large finite penalty"
            )


def _restarts(key: PRNGKey, programs: Programs, family: AutoGuide | None, first: Params, num_restarts: int) -> Params:
    """Stack starting points, [restart, ...]: the first as declared, the others overdispersed around it."""
    starts = [to_host(first)]
    overdispersed_init = closure_jit(
        _spread if family is None else family.overdispersed_init, name="overdispersed_init"
    )
    for restart in range(1, num_restarts):
        own = fold_in(key, restart)
        declared = first if family is not None else _declare(own, programs, first)[0]
        starts.append(to_host(overdispersed_init(own, jax.device_put(declared))))
    return jax.tree.map(lambda *leaves: np.stack(leaves), *starts)


def _spread(key: PRNGKey, params: Params) -> Params:
    """Add to every parameter noise of about its own size."""
    leaves, treedef = jax.tree.flatten(params)
    keys = split(key, len(leaves))
    noisy = [
        leaf + jnp.maximum(jnp.sqrt(jnp.mean(leaf**2)), 0.5) * jax.random.normal(k, leaf.shape, leaf.dtype)
        for leaf, k in zip(leaves, keys, strict=True)
    ]
    return jax.tree.unflatten(treedef, noisy)


def _identity(
    key: PRNGKey,
    programs: Programs,
    guide: Program | AutoGuide | None,
    objective: Objective,
    betas: np.ndarray | None,
    num_restarts: int,
    params: Params,
) -> dict[str, Any]:
    return {
        "sites": [f"{s.kind} {s.name} {list(s.shape)}" for s in programs.structure.sites],
        "arguments": digest(programs.args),
        "beta": None if betas is None else np.asarray(betas).tolist(),
        "restarts": num_restarts,
        "seed": np.asarray(jax.random.key_data(key)).tolist(),
        "guide": describe_component(AutoTilt() if guide is None and programs.guide is not None else guide),
        "objective": describe_component(objective),
        "parameters": {
            jax.tree_util.keystr(path): f"{leaf.dtype}{list(leaf.shape)}"
            for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]
        },
    }


def _sketch(draws: Draws, totals: Totals) -> dict[str, list[float]]:
    """Tell two programs apart that have the same sites: two means of what they gave for draws of one key."""

    def means(values: Any) -> list[float]:
        array = np.asarray(values, float)
        by_draw = np.where(np.isfinite(array), array, -1.0).reshape(len(array), -1).mean(-1)
        weights = np.linspace(0.0, 2.0, len(by_draw))
        return [float(by_draw.mean()), float((weights * by_draw).mean())]

    told = {**draws.sites, **draws.rewards, "log π₀": totals.log_prior, "log-likelihood": totals.log_likelihood}
    return {name: means(values) for name, values in told.items()}


def describe_component(thing: Any) -> Any:
    """Describe a guide, objective or optimiser for the run folder: dataclasses by their fields."""
    if thing is None:
        return None
    if dataclasses.is_dataclass(thing) and not isinstance(thing, type):
        fields = {f.name: getattr(thing, f.name) for f in dataclasses.fields(thing) if f.compare}
        if all(isinstance(value, str | int | float | bool | None | tuple) for value in fields.values()):
            return {"type": type(thing).__name__, **fields}
        return {"type": type(thing).__name__, "elbo": type(next(iter(fields.values()))).__name__}
    return getattr(thing, "__qualname__", type(thing).__name__)


def digest(tree: Any) -> str:
    """Give a short fingerprint of a pytree: its arrays by content, all else by its text."""
    fingerprint = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        fingerprint.update(jax.tree_util.keystr(path).encode())
        if eqx.is_array_like(leaf):
            array = np.asarray(leaf)
            fingerprint.update(f"{array.dtype}{array.shape}".encode())
            fingerprint.update(array.tobytes())
        else:
            fingerprint.update(getattr(leaf, "__qualname__", type(leaf).__name__).encode())
    return fingerprint.hexdigest()[:16]

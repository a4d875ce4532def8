"""Prepare a fit: bind the programs, choose the starting points, and identify the problem."""

import dataclasses
import hashlib
from dataclasses import dataclass
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from bayesrl.compilation.jit import closure_jit, to_host
from bayesrl.compilation.random_keys import fold_in, split
from bayesrl.core.draws import Draws, Totals
from bayesrl.core.programs import Programs
from bayesrl.errors import FitError, ObjectiveError, PolicyError
from bayesrl.guides import AutoGuide, AutoTilt
from bayesrl.objectives import Objective
from bayesrl.posterior.marginal import log_marginal
from bayesrl.posterior.policy_and_guide import bind_programs, declared_by, draw_and_check
from bayesrl.posterior.sampling import Source
from bayesrl.typing import Params, PRNGKey, Program


@dataclass(frozen=True)
class Setup:
    """A problem that is ready to fit.

    Attributes:
        programs: policy and guide.
        params: starting parameters, [lanes, ...], unconstrained.
        betas: [lanes]; 1 without rewards.
        beta_shape: () or (number of β,).
        objective: prepared for these programs.
        learning_rate: suggested rate of the default optimiser, or None.
        identity: JSON-able; two fits with the same identity fit the same problem.
        log_marginal: log p(y), nats, if there are both data and rewards, nan if it is unknown; 0 otherwise.
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
    """Check everything that can be checked before the first step, and return a `Setup`.

    With `drawn=False` it draws nothing; that is for programs that the library itself trains.

    Raises:
        PolicyError, GuideError, ObjectiveError: naming the site, the value and the remedy.
    """
    # Numbers that a fit folds its key with: 0, 1, 3 and 7 to bind and check, 2, 4, 8 and 9 here, 5 to step, 6 to draw.
    programs, first, family, betas = bind_programs(key, policy, args, beta, guide, source)
    numbers = [getattr(drawing, "num_particles", 1) for drawing in (objective, source)]
    particles = max(1, *(number for number in numbers if isinstance(number, int)))
    programs.structure.check_memory(particles * num_restarts * betas.size, FitError)
    rate = None if family is None else family.learning_rate_for(first)
    drawings = draw_and_check(key, programs, first, by_hand=family is None) if drawn else None
    own = objective.init_params(fold_in(key, 9), programs)
    suited = objective if source is None else objective.for_source(source)
    ready = suited.prepare(fold_in(key, 2), programs, {**first, **own})
    if drawings is not None:
        _check_rewards(drawings[0], ready)
    starts = _restarts(fold_in(key, 4), programs, family, first, num_restarts)
    starts |= {name: np.stack([to_host(value)] * num_restarts) for name, value in own.items()}
    count = max(int(np.prod(np.shape(betas))), 1)
    # Lanes are ordered by β, then by restart: starting points are tiled, temperatures repeated.
    params = jax.tree.map(lambda x: np.tile(x, (count, *(1,) * (x.ndim - 1))), starts)
    lanes = np.repeat(np.asarray(betas, np.float32).reshape(-1), num_restarts)
    identity = _identity(key, programs, guide, objective, None if beta is None else betas, num_restarts, first)
    identity["first draws"] = None if drawings is None else _sketch(*drawings)
    marginal = log_marginal(fold_in(key, 8), programs, first) if drawn else None
    known = 0.0 if marginal is None else float(marginal.mean)
    return Setup(programs, params, lanes, np.shape(betas), ready, rate, identity, known)


def _check_rewards(draws: Draws, objective: Objective) -> None:
    """Refuse rewards that would make every gradient nan or infinite.

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
        if count and objective.refuses_impossible:
            raise ObjectiveError(
                f"reward site {name!r} returned -inf for {count} of {num} particles, and "
                f"{objective.refuses_impossible}; use ForwardKL(), enumerate_posterior or importance, "
                "or a large finite penalty"
            )


def _restarts(key: PRNGKey, programs: Programs, family: AutoGuide | None, first: Params, num_restarts: int) -> Params:
    """Stack starting points, [restart, ...]: the first is as declared, the others are overdispersed around it."""
    starts = [to_host(first)]
    overdispersed_init = closure_jit(
        _spread if family is None else family.overdispersed_init, name="overdispersed_init"
    )
    for restart in range(1, num_restarts):
        own = fold_in(key, restart)
        declared = first if family is not None else declared_by(own, programs, first)[0]
        starts.append(to_host(overdispersed_init(own, jax.device_put(declared))))
    return jax.tree.map(lambda *leaves: np.stack(leaves), *starts)


def _spread(key: PRNGKey, params: Params) -> Params:
    """Add noise of about its own size to every parameter."""
    leaves, treedef = jax.tree.flatten(params)
    keys = split(key, len(leaves))
    noisy = [
        # At least 0.5, because parameters often start at 0.
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
    """Fingerprint a program by two means of each quantity, to tell apart two programs with the same sites.

    The second mean weights the draws by their order, so that it also notices a permutation.
    """

    def means(values: Any) -> list[float]:
        array = np.asarray(values, float)
        # One −inf or nan would hide all the other values in the means.
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
        # Fields that do not compare, such as the plan of an objective, follow from the programs.
        fields = {f.name: getattr(thing, f.name) for f in dataclasses.fields(thing) if f.compare}
        if all(isinstance(value, str | int | float | bool | None | tuple) for value in fields.values()):
            return {"type": type(thing).__name__, **fields}
        return {"type": type(thing).__name__, "elbo": type(next(iter(fields.values()))).__name__}
    return getattr(thing, "__qualname__", type(thing).__name__)


def digest(tree: Any) -> str:
    """Return a short fingerprint of a pytree: of arrays by their content, of all else by its name or type."""
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

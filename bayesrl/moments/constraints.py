"""`constrain`: the policy nearest to the prior whose expectations are as asked."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, NamedTuple

import numpy as np

from bayesrl.argument_types import Requirement
from bayesrl.arguments import Count, Untraced, checked, integer_range
from bayesrl.compilation.jit import trace_cache
from bayesrl.compilation.random_keys import key_from_seed, split_keys
from bayesrl.core.programs import Programs, freeze
from bayesrl.core.structure import Structure, as_arrays, inspect
from bayesrl.errors import EngineError
from bayesrl.exact.backward_induction import build_stage
from bayesrl.exact.enumeration import exact_metrics
from bayesrl.exact.grid import assignments, num_assignments, path_axes
from bayesrl.exact.tabulation import check_grid_size, freeze_program, score_by_context
from bayesrl.guides.base import Guide
from bayesrl.moments.adaptive_sample import SampleSolution, refuse_not_finite, solve_by_draws
from bayesrl.moments.convex_dual import (
    MomentTable,
    refuse_contradictions,
    refuse_dependent,
    refuse_outside,
    refuse_unsolved,
    solve_dual,
)
from bayesrl.moments.features import (
    Feature,
    MeasuredPolicy,
    RewardsAsMetrics,
    SteppedPolicy,
    TiltedPolicy,
    arise_in_steps,
    measured_site,
)
from bayesrl.moments.stages import StagedTable, staged_table
from bayesrl.posterior.posterior import Posterior
from bayesrl.statistics.estimates import Estimate
from bayesrl.svi.fitting import fit
from bayesrl.typing import PRNGKey, Program
from bayesrl.value_checks import are_finite, array_of, format_value, is_function

_FIT_STEPS = 1000


def _are_targets(value: Any) -> bool:
    return isinstance(value, Mapping) and bool(value) and all(isinstance(x, str) or is_function(x) for x in value)


type Targets = Annotated[
    Any,
    Requirement(
        "a dictionary of at least one feature (the name of a site, or a function of a dictionary of the sites) and its "
        "target",
        _are_targets,
        any_type=True,
    ),
]
"""{feature: target}."""


@checked(EngineError)
@dataclass(frozen=True)
class ConstrainedPolicy:
    """A policy with the moments that were asked for, and its multipliers; features are named as in `multipliers`.

    Attributes:
        policy: the program q in the form of a prior with the reward Σ λᵢ·fᵢ at site "moment_constraints", for every
            engine at beta=1. Rewards of the prior are deterministic sites in it, and so are computed features. Sites
            of a `scan` are rewarded at each step, at sites "moment_constraints …".
        multipliers: λ of each feature, [*contexts], or () if contexts share it; nats per unit of the feature.
        moments: E_q[f] of each feature, of the same shape, in units of the feature. Its standard error is what the
            error of λ leaves uncertain.
        log_evidence: log Z(λ) = log E_π₀[exp(Σ λᵢ·fᵢ)], [*contexts], nats. π₀ means p(x|y) if there are data.
        kl: KL(q‖π₀), [*contexts], nats: the least of all policies with these moments.
        ess: effective number of draws behind λ, [*contexts]; None if it is exact.

    Example:
        >>> import jax, jax.numpy as jnp, numpyro, numpyro.distributions as dist, bayesrl
        >>> def bandit():
        ...     arm = numpyro.sample("arm", dist.Categorical(logits=jnp.zeros(2)))
        ...     bayesrl.reward("payoff", 1.0 * arm)
        >>> found = bayesrl.constrain(jax.random.key(0), bandit, {"payoff": 0.8})
        >>> round(float(found.multipliers["payoff"].mean), 4), round(float(found.kl.mean), 4)  # log 4
        (1.3863, 0.1927)
    """

    policy: Program = field(repr=False)
    multipliers: dict[str, Estimate]
    moments: dict[str, Estimate]
    log_evidence: Estimate
    kl: Estimate
    ess: np.ndarray | None


@checked(EngineError, Untraced("call it outside: it compiles its own programs"))
@trace_cache()
def constrain(
    key: PRNGKey,
    policy: Program,
    targets: Targets,
    *args: Any,
    per_context: bool = True,
    guide: Guide | None = None,
    num_samples: Annotated[int, integer_range(1000)] = 10_000,
    max_count: Count = 2**20,
) -> ConstrainedPolicy:
    """Find the policy nearest to the prior under which features have given means.

    q = argmin KL(q‖π₀) with E_q[fᵢ] = tᵢ is q(x) = π₀(x)·exp(Σ λᵢ·fᵢ(x))/Z(λ), where λ minimises the convex
    log Z(λ) − Σ λᵢ·tᵢ. So q is the tilted posterior of the reward Σ λᵢ·fᵢ at β = 1. Finite programs are solved exactly,
    in double precision: over all assignments, or state by state along a `scan` if the features are its sites. Others
    are solved from self-normalised weighted draws. Where the draws of the prior are too few near the target, the policy
    is fitted to the present tilt and draws of the fit join them, until 10% of all draws, or 1,000, are effective.

    A plate of contexts holds separate distributions, so a target holds in each of them, with its own λ. With
    `per_context=False` it holds for the mean over contexts, and they share λ.

    Rewards of the policy do not count by themselves. The target of a reward determines its temperature: λ = 1/β.

    Args:
        key: consumed whole; unused if the program is finite.
        policy: the program.
        targets: {feature: target}. A feature is the name of a site (deterministic sites are averaged over time and
            other axes, rewards are summed) or a function of {site: value} of one draw that returns a number (or
            one per context). A target is a number or an array [*contexts], in units of its feature.
        *args: arguments of the program.
        per_context: whether targets hold in each context; if not, for the mean over contexts.
        guide: what these fits train, as in `fit`.
        num_samples: number of draws of the prior, and of each fit.
        max_count: largest number of assignments to visit; larger programs are solved by draws.

    Returns:
        `ConstrainedPolicy`. Standard errors are 0 if it is exact, and by the delta method otherwise.

    Raises:
        EngineError: there are no targets, or one is not a finite number, is out of reach, on the edge of what is
            possible (λ is infinite there), or contradicts the others; features are constant or linearly dependent, not
            finite, or no sites; nature draws too; a plate is subsampled; or draws do not get to the target.
        PolicyError, GuideError: the policy cannot be used, as for any engine, or not fitted without a `guide`.

    Example:
        >>> import jax, jax.numpy as jnp, numpyro, numpyro.distributions as dist, bayesrl
        >>> def number():
        ...     x = numpyro.sample("x", dist.DiscreteUniform(0, 63))
        ...     numpyro.deterministic("even", 1.0 * (x % 2 == 0))
        >>> targets = {"even": 0.8, lambda sites: sites["x"] % 3 == 0: 0.5}
        >>> found = bayesrl.constrain(jax.random.key(0), number, targets)
        >>> {name: round(float(value.mean), 4) for name, value in found.multipliers.items()}
        {'even': 1.3863, 'feature_1': 0.6466}
        >>> exact = bayesrl.enumerate_posterior(found.policy, beta=1.0)
        >>> round(float(exact.estimates.metrics["even"].mean), 4)
        0.8

    References:
        Khalifa, Elsahar & Dymetman (2021), "A distributional approach to controlled text generation", section 2;
        Csiszár (1975), "I-divergence geometry of probability distributions and minimization problems";
        Hesterberg (1995), "Weighted average importance sampling and defensive mixture distributions".
    """
    problem = _prepared(policy, as_arrays(args), targets, per_context=per_context)
    contexts = problem.program.structure.context_shape
    table = problem.table(max_count)
    if table is not None:
        return _exactly(table, problem, contexts)

    def fit_tilt(fit_key: PRNGKey, multipliers: np.ndarray) -> Posterior:
        tilted = problem.tilted(multipliers)
        return fit(fit_key, tilted, *args, beta=1.0, guide=guide, num_steps=_FIT_STEPS, progress=False)

    (draw_key,) = split_keys(key, 1)
    labels, shared = tuple(problem.features), not per_context
    solution = solve_by_draws(draw_key, problem.program, labels, problem.targets, num_samples, fit_tilt, shared=shared)
    return _from_draws(solution, problem, contexts)


class _Problem(NamedTuple):
    """What is to be solved.

    Attributes:
        policy: the prior, with its parameters frozen.
        program: the prior with its features as rewards, and the arguments.
        features: the features by name.
        targets: their targets, [features, groups].
        shape: of the multipliers: [*contexts], or () if contexts share them.
        shared: whether they do.
        rewards: which features are the policy's rewards (or computed).
        by_step: whether the features are sites of a scan that can be rewarded where they arise.
    """

    policy: Program
    program: Programs
    features: dict[str, Feature]
    targets: np.ndarray
    shape: tuple[int, ...]
    shared: bool
    rewards: set[str]
    by_step: bool

    def tilted(self, multipliers: np.ndarray) -> Program:
        """Return the policy with its features rewarded by λ, [features, groups]."""
        factors = multipliers.reshape(len(self.features), *self.shape)
        if not self.by_step:
            return TiltedPolicy(self.policy, self.features, factors)
        dims = tuple(frame.dim for frame in self.program.structure.contexts)
        each = {label: np.asarray(factor) for label, factor in zip(self.features, factors, strict=True)}
        return SteppedPolicy(self.policy, each, dims)

    def table(self, max_count: int) -> MomentTable | StagedTable | None:
        """Tabulate the features of a finite program; None if it is not finite, or too large."""
        labels, shared = tuple(self.features), self.shared
        if _is_enumerable(self.program.structure, max_count):
            return _table(self.program, labels, self.targets, shared=shared)
        if not self.by_step:
            return None
        # λ = 1 only marks the features: the table takes their values and sets all rewards to 0.
        shown = SteppedPolicy(self.policy, dict.fromkeys(labels, np.ones(())))
        program = freeze_program(shown, self.program.args, 1.0)
        return staged_table(program, labels, self.rewards, self.targets, max_count, shared=shared)


def _prepared(policy: Program, args: tuple[Any, ...], targets: Mapping[Feature, Any], *, per_context: bool) -> _Problem:
    frozen, _ = freeze(key_from_seed(0), policy, *args)
    structure = inspect(key_from_seed(0), RewardsAsMetrics(frozen), *args)
    _refuse_unsuitable(structure)
    features, values = _read(targets, structure)
    program = freeze_program(MeasuredPolicy(frozen, features), args, 1.0)
    _refuse_mixed(program.structure, features, structure)
    shown = _shown_by_step(frozen, features, structure, args)
    rewards = set(features) - {site.name for site in structure.sites}
    return _Problem(
        frozen,
        program,
        features,
        _laid_out(values, program.structure, per_context=per_context),
        program.structure.context_shape if per_context else (),
        not per_context,
        rewards,
        shown is not None and arise_in_steps(features, rewards, shown),
    )


def _shown_by_step(
    policy: Program, features: Mapping[str, Feature], structure: Structure, args: tuple[Any, ...]
) -> Structure | None:
    """Return the structure of a policy with a scan, with its rewards as deterministic sites; None without a scan."""
    if all(site.scan is None for site in structure.sites) or not all(isinstance(x, str) for x in features.values()):
        return None
    return inspect(key_from_seed(0), SteppedPolicy(policy, {}), *args)


def _refuse_unsuitable(structure: Structure) -> None:
    nature = structure.names("environment")
    if nature:
        raise EngineError(
            f"the policy has environment site {nature[0]!r}, and a tilt by features would tilt nature too, which "
            "no policy can; fit a policy with the features as rewards, or make it an ordinary site if it may be chosen"
        )
    if structure.subsampled:
        raise EngineError(
            f"plate {structure.subsampled[0]!r} is subsampled, and λ of a subsample is that of another problem; "
            "use bayesrl.full_data(policy), or subsample_size=None"
        )


def _read(targets: Mapping[Feature, Any], structure: Structure) -> tuple[dict[str, Feature], dict[str, np.ndarray]]:
    """Name the features, and read their targets."""
    features: dict[str, Feature] = {}
    values: dict[str, np.ndarray] = {}
    taken = {site.name for site in structure.sites} | {name for name in targets if isinstance(name, str)}
    for index, (feature, target) in enumerate(targets.items()):
        label = feature if isinstance(feature, str) else getattr(feature, "__name__", "")
        if not isinstance(feature, str) and (not label.isidentifier() or label in taken):
            label = f"feature_{index}"
        if not are_finite(target):
            raise EngineError(
                f"the target of feature {label!r} is {format_value(target)}; use a finite number, or an array of one "
                "for each context"
            )
        taken.add(label)
        features[label], values[label] = feature, array_of(target).astype(float)
    return features, values


def _refuse_mixed(measured: Structure, features: Mapping[str, Feature], structure: Structure) -> None:
    """Refuse features of which some have a value per context and some have one for all."""
    inside = {label: set(structure.contexts) <= set(measured[measured_site(label)].frames) for label in features}
    apart = [label for label, own in inside.items() if not own]
    if apart and len(apart) < len(inside):
        other = next(label for label, own in inside.items() if own)
        plates = [frame.name for frame in structure.contexts]
        raise EngineError(
            f"feature {apart[0]!r} has one value for all elements of plate {plates}, and {other!r} has one for each; "
            "give both one for each (and per_context=False for a target of their mean), or both one for all"
        )


def _laid_out(values: Mapping[str, np.ndarray], structure: Structure, *, per_context: bool) -> np.ndarray:
    """Return targets, [features, groups]."""
    shape = structure.context_shape if per_context else ()
    rows = []
    for label, value in values.items():
        if value.shape not in ((), shape):
            wanted = f"a number, or an array of shape {shape} with one for each context" if shape else "a number"
            why = "" if per_context else ", for per_context=False asks for the mean over contexts"
            raise EngineError(f"the target of feature {label!r} has shape {value.shape}; use {wanted}{why}")
        rows.append(np.broadcast_to(value, shape).reshape(-1))
    return np.stack(rows)


def _is_enumerable(structure: Structure, max_count: int) -> bool:
    if any(site.latent and site.support is None for site in structure.sites):
        return False
    number = num_assignments(path_axes(structure))
    # The bound of `check_grid_size`, which raises an error where this goes on with draws.
    return number <= max_count and number * math.prod(structure.context_shape) <= 64 * max_count


def _table(program: Programs, labels: tuple[str, ...], targets: np.ndarray, *, shared: bool) -> MomentTable:
    """Tabulate the features of all assignments with their prior probabilities."""
    structure = program.structure
    axes = path_axes(structure)
    check_grid_size(axes, structure, num_assignments(axes))
    found = score_by_context(program, {}, assignments(axes, np.arange(num_assignments(axes))))
    reached = np.ones((1, math.prod(structure.context_shape)), bool)
    # `build_stage` would refuse features in the words of rewards; `refuse_not_finite` below names them.
    only_prior = found._replace(rewards={name: np.zeros_like(value) for name, value in found.rewards.items()})
    prior = build_stage(axes, only_prior, reached, structure)
    log_base = (prior.log_prob("action") + prior.likelihood)[0]
    possible = log_base > -np.inf
    if not possible.any(0).all():
        raise EngineError("the data are impossible under every assignment of the prior; check the observed sites")
    values = [found.rewards[measured_site(label)] for label in labels]
    for label, value in zip(labels, values, strict=True):
        refuse_not_finite(label, value, possible, "assignments")
    exact_metrics(program, {}, [build_stage(axes, found, reached, structure)])  # refuses contexts that interact
    features = np.stack([np.where(possible, value, 0.0) for value in values])
    return MomentTable(log_base, features, targets, labels, shared)


def _exactly(table: MomentTable | StagedTable, problem: _Problem, contexts: tuple[int, ...]) -> ConstrainedPolicy:
    refuse_dependent(table, "in every assignment")
    refuse_outside(table, *table.limits())
    multipliers, solved = solve_dual(table)
    if isinstance(table, MomentTable):
        refuse_contradictions(table, multipliers, solved)
    refuse_unsolved(table, solved)
    found = table.tilt(multipliers)
    kl = np.einsum("kc,kc->c", table.spread(multipliers), found.each) - found.log_z

    def known(value: np.ndarray, to: tuple[int, ...]) -> Estimate:
        return Estimate(value.reshape(to), np.zeros(to))

    return ConstrainedPolicy(
        problem.tilted(multipliers),
        {label: known(value, problem.shape) for label, value in zip(table.labels, multipliers, strict=True)},
        {label: known(value, problem.shape) for label, value in zip(table.labels, found.means, strict=True)},
        known(found.log_z, contexts),
        # Rounding may put a KL of 0 a little below it.
        known(np.maximum(kl, 0.0), contexts),
        None,
    )


def _from_draws(found: SampleSolution, problem: _Problem, contexts: tuple[int, ...]) -> ConstrainedPolicy:
    num = len(found.influence)

    def estimates(means: np.ndarray, influence: np.ndarray) -> dict[str, Estimate]:
        errors = influence.std(0, ddof=1) / math.sqrt(num)
        rows = zip(found.table.labels, means, errors, strict=True)
        return {label: Estimate(mean.reshape(problem.shape), se.reshape(problem.shape)) for label, mean, se in rows}

    return ConstrainedPolicy(
        problem.tilted(found.multipliers),
        estimates(found.multipliers, found.influence),
        estimates(found.tilted.means, found.pull),
        Estimate(found.log_z.mean.reshape(contexts), found.log_z.se.reshape(contexts)),
        Estimate(found.kl.mean.reshape(contexts), found.kl.se.reshape(contexts)),
        found.ess.reshape(contexts),
    )

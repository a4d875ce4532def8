"""The exact answer for finite programs, by visiting every assignment or every reachable state."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import jax
import numpy as np

from bayesrl.arguments import Count, Untraced, UnusedOption, checked
from bayesrl.compilation.jit import trace_cache
from bayesrl.compilation.random_keys import key_from_seed
from bayesrl.core.programs import Programs
from bayesrl.errors import EngineError
from bayesrl.exact.backward_induction import (
    ProgramStage,
    Solution,
    axes_and_digits,
    expectation,
    marginals,
    sample_rows,
    solve,
)
from bayesrl.exact.grid import digits, path_axes, scatter
from bayesrl.exact.regularizers import (
    Regularizer,
    make_regularizer,
    refuse_unregularized,
    solve_regularized,
)
from bayesrl.exact.tabulation import (
    check_grid_size,
    enumerate_paths,
    freeze_program,
    name_context,
    score_by_context,
    tabulate_stages,
)
from bayesrl.exact.weighted_draws import WeightedDraws, context_axes, metrics_from_draws, shared_sites
from bayesrl.statistics.best_of_n_law import best_of_n_law, rank_rewards
from bayesrl.statistics.definitions import RegularizerName
from bayesrl.statistics.estimates import Estimate, Estimates
from bayesrl.statistics.evaluations import Evaluations
from bayesrl.typing import Beta, Numbers, Params, Program


@checked(
    EngineError,
    Untraced("call it outside: it compiles its own programs"),
    UnusedOption("alpha", lambda given: given["regularizer"] != "alpha", "only regularizer='alpha' has an order"),
)
@trace_cache()
def enumerate_posterior(
    policy: Program,
    *args: Any,
    beta: Beta | None = None,
    max_count: Count = 2**20,
    regularizer: RegularizerName = "kl",
    alpha: float | None = None,
) -> WeightedDraws:
    """Compute the tilted posterior of a finite program exactly.

    p*(x) = π₀(x)·exp(R(x)/β)/Z and J* = β·log Z, per context. With environment sites J* is the
    optimum of control, max_π E[R] − β·KL, by soft backward induction in program order, where no
    action reads a draw with observable=False. Programs with a `scan` are solved state by state.
    Parameters inside the policy are frozen: the policy is the prior.

    Another `regularizer` gives another optimum: max_q E[R] − β·D_f(q‖π₀), D_f = E_π₀[f(t)], t = q/π₀, is attained
    at q = π₀·max(0, (f′)⁻¹((R − λ)/β)), with λ per context such that q adds up to 1. It keeps inside the prior's
    support, enumerates whole paths, and has no log Z.

    Args:
        policy: the program; every latent site has a finite support.
        *args: arguments of the program.
        beta: temperature, reward units per nat, [*beta]; required with rewards, refused without.
        max_count: largest number of assignments, or of reachable states × assignments, to visit.
            Elements of context plates share assignments; other elements multiply them.
        regularizer: f, up to a multiple of t − 1, which changes nothing. `kl`: t·log t. `chi_squared`: (t − 1)²/2.
            `chi_squared_kl`: their sum. `jensen_shannon_sum`: KL(q‖m) + KL(π₀‖m), with m halfway between q and π₀;
            `jensen_shannon`: half of it, at most log 2. `forward_kl`: −log t, which is KL(π₀‖q). `alpha`:
            (tᵅ − 1)/(α(α − 1)), χ²/2 at α = 2, four times the squared Hellinger distance 1 − Σ√(q·π₀) at α = ½.
        alpha: α, not 0 or 1, where it is a KL.

    Returns:
        `WeightedDraws` with exact weights, evidence and optimum. Metrics that mix contexts, or that
        read the stacked outputs of a scan, are averaged over 1,024 exact draws and carry their
        standard error.

    Raises:
        EngineError: there are too many assignments, a support is not finite, a plate is subsampled,
            environment sites are mixed with observed ones, or the reward is −inf everywhere. With another
            regularizer also: there are environment sites or no rewards, a reward of −inf makes it infinite, or a
            context (named) has no λ in double precision.
        PolicyError: beta does not fit the program; a reward is NaN or +inf; or the prior reads
            draws that the agent does not see.

    Example:
        >>> import jax.numpy as jnp, numpyro, numpyro.distributions as dist, bayesrl
        >>> def sequence():
        ...     x = numpyro.sample("x", dist.Categorical(probs=jnp.array([3.0, 2.0, 1.0]) / 6))
        ...     bayesrl.reward("score", jnp.log(jnp.array([1.0, 2.0, 3.0]))[x])
        >>> result = bayesrl.enumerate_posterior(sequence, beta=1.0)
        >>> np.exp(result.log_weights).round(3).tolist(), float(np.exp(result.log_evidence.mean).round(4))
        ([0.3, 0.4, 0.3], 1.6667)
        >>> other = bayesrl.enumerate_posterior(sequence, beta=1.0, regularizer="chi_squared")
        >>> np.exp(other.log_weights).round(3).tolist(), other.regularizer
        ([0.293, 0.426, 0.281], 'chi_squared')

    References:
        Levine (2018), "Reinforcement Learning and Control as Probabilistic Inference", sections 2.2
        and 2.4: the soft Bellman equations, here with nature's draws averaged and not tilted.
        Huang et al. (2024), "Correcting the Mythos of KL-Regularization", for χ² + KL; Wang, Jiang, Yang, Liu & Chen
        (2023), "Beyond Reverse KL", for f-divergences from the prior.
    """
    chosen = make_regularizer(regularizer, alpha)
    program = freeze_program(policy, args, beta)
    if chosen is None:
        return _solved(program, {}, beta, max_count)
    return _regularized(program, {}, beta, max_count, chosen, regularizer, alpha)


def enumerate_target(
    programs: Programs,
    params: Params,
    beta: Beta | None = None,
    max_count: Count = 2**20,
    *,
    regularizer: RegularizerName = "kl",
    alpha: float | None = None,
    best_of: int | None = None,
) -> WeightedDraws:
    """Like `enumerate_posterior`, but with the compiled program that `evaluate_exactly` uses for the fit.

    With `best_of` = n, p* is the law of the best of n draws, at every temperature, and J* and log Z are None.
    """
    chosen = make_regularizer(regularizer, alpha)
    program, params = beside_guide(freeze_program(programs.policy, programs.args, beta), programs, params)
    if best_of is not None:
        return _best_of_n(program, params, beta, max_count, best_of)
    if chosen is None:
        return _solved(program, params, beta, max_count)
    return _regularized(program, params, beta, max_count, chosen, regularizer, alpha)


def beside_guide(program: Programs, fit: Programs, params: Params) -> tuple[Programs, Params]:
    """Score a guide beside a frozen policy, in the same compiled program."""
    if fit.guide is None and not fit.learned:
        return program, {}
    both = replace(program, guide=fit.guide, transforms=fit.transforms, learned=fit.learned)
    return both, jax.device_put(params)


def _solved(program: Programs, params: Params, beta: Beta | None, max_count: int) -> WeightedDraws:
    stages, scan = tabulate_stages(program, params, max_count)
    exact = exact_metrics(program, params, stages)
    betas = np.asarray(1.0 if beta is None else beta, float)
    solutions = [solve(stages, float(b)) for b in betas.reshape(-1)]
    _refuse_impossible(program, solutions)
    return _result(program, stages, solutions, exact, None if beta is None else betas, whole=scan is None)


def _regularized(
    program: Programs,
    params: Params,
    beta: Beta | None,
    max_count: int,
    chosen: Regularizer,
    name: RegularizerName,
    alpha: float | None,
) -> WeightedDraws:
    """Solve with another regulariser than KL, over whole paths."""
    structure = program.structure
    refuse_unregularized(structure, name)
    axes = path_axes(structure)
    scanned = any(site.scan is not None for site in structure.sites)
    check_grid_size(axes, structure, max_count, f"regularizer={name!r} is no sum over time steps" if scanned else None)
    stages = [enumerate_paths(program, params, axes).stage]
    betas = np.asarray(beta, float)
    solutions = [solve_regularized(stages[0], float(b), chosen, name, structure) for b in betas.reshape(-1)]
    _refuse_impossible(program, solutions)
    result = _result(program, stages, solutions, exact_metrics(program, params, stages), betas, whole=True)
    roots = [np.asarray(solution.multiplier).reshape(structure.context_shape) for solution in solutions]
    multiplier = np.stack(roots).reshape((*betas.shape, *structure.context_shape))
    return replace(result, regularizer=name, alpha=alpha, multiplier=multiplier)


def _best_of_n(program: Programs, params: Params, beta: Beta | None, max_count: int, n: int) -> WeightedDraws:
    """Tabulate the law of the best of n draws, as p* of β·log pₙ/π₀ in the place of the reward."""
    axes = path_axes(program.structure)
    check_grid_size(axes, program.structure, max_count, None)
    stage = enumerate_paths(program, params, axes).stage
    law = best_of_n_law(stage.log_prob("action")[0], rank_rewards(stage.reward[0]), n)
    betas = np.asarray(beta, float)
    stages = [[replace(stage, reward=float(b) * law.log_ratio[None])] for b in betas.reshape(-1)]
    solutions = [solve(one, float(b)) for one, b in zip(stages, betas.reshape(-1), strict=True)]
    result = _result(program, stages[0], solutions, exact_metrics(program, params, [stage]), betas, whole=True)
    same = np.ones(betas.shape)
    reward, kl, unknown = (Estimate(value * same, 0 * same) for value in (law.reward.mean(), law.kl.mean(), np.nan))
    estimates = result.estimates._replace(reward=reward, kl=kl, objective=unknown)
    return replace(result, estimates=estimates, log_evidence=None, optimum=None)


def exact_metrics(program: Programs, params: Params, stages: Sequence[ProgramStage]) -> set[str]:
    """Run the program on draws that differ between contexts, and compare with the stages' scores of each context.

    Returns:
        Names of the metrics that are known exactly.

    Raises:
        EngineError: elements of context plates interact.
    """
    structure = program.structure
    # A fixed seed: any draws show whether contexts interact.
    rng = np.random.default_rng(0)
    prior = [stage.log_prob("action") + stage.log_prob("environment") for stage in stages]
    states, rows = sample_rows(stages, prior, rng, 16, alike=bool(shared_sites(structure)))
    scores = score_by_context(program, params, scatter(*axes_and_digits(stages, rows), structure.context_shape))
    contexts = np.arange(math.prod(structure.context_shape))

    def along_paths(parts: Sequence[np.ndarray]) -> np.ndarray:
        return np.sum([v[s, r, contexts] for v, s, r in zip(parts, states, rows, strict=True)], 0)

    pairs = [
        (sum(scores.rewards.values()), along_paths([s.reward for s in stages])),
        (sum(scores.likelihood.values()), along_paths([s.likelihood for s in stages])),
    ]
    # A masked site scores 0, but its stage holds a uniform distribution: these cannot be compared.
    if not any(stage.masked for stage in stages):
        pairs.append((sum(v.sum(-1) for v in scores.latent.values()), along_paths(prior)))
    if not all(_same(*pair) for pair in pairs):
        plates = [frame.name for frame in structure.contexts]
        raise EngineError(
            f"the elements of plate {plates} read each other's draws, so they are not separate problems; "
            "write what interacts without the plate (a batched distribution with .to_event)"
            if plates
            else "the program does not repeat itself: the same draws gave other rewards or densities; "
            "it must not depend on anything but its arguments and its sites"
        )
    exact = set()
    for name in structure.names("metric"):
        parts = [stage.metrics.get(name, np.zeros_like(stage.reward)) for stage in stages]
        if name in scores.metrics and _same(scores.metrics[name], along_paths(parts)):
            exact.add(name)
    return exact


def _same(one: Any, other: np.ndarray) -> bool:
    # Scores are single precision, and stages add them along time in another order than a whole run.
    return bool(np.isclose(one, other, rtol=1e-3, atol=1e-3).all())


def _refuse_impossible(program: Programs, solutions: Sequence[Solution]) -> None:
    structure = program.structure
    never = np.flatnonzero(~np.isfinite(np.stack([s.value for s in solutions])).all(0))
    if never.size:
        raise EngineError(
            f"every assignment{name_context(structure, int(never[0]))} has reward or likelihood -inf "
            f"({never.size} of {max(structure.num_contexts, 1)} contexts), so nothing is possible under p*; "
            "allow at least one action there"
        )


def _expect(
    stages: Sequence[ProgramStage], solution: Solution, beta: float | None, marginal: np.ndarray, exact: set[str]
) -> tuple[np.ndarray, Estimates]:
    """Return log Z and the averages under the optimum at one temperature, [contexts]."""
    weights = marginals(stages, solution)
    other: Any = solution.divergence

    def mean(read: Callable[[ProgramStage], np.ndarray]) -> Any:
        return expectation(weights, [read(stage) for stage in stages])

    reward = mean(lambda stage: stage.reward)
    evidence = solution.value if beta is None else solution.value / beta - marginal
    kl = (mean(lambda stage: stage.likelihood) if beta is None else reward / beta) - evidence
    if other is not None:
        with np.errstate(invalid="ignore"):  # −inf less −inf is nan where p* has no mass, and counts nothing
            kl = mean(lambda stage: solution.joint[0] - stage.log_prob("action") - stage.likelihood) + marginal
    metrics: dict[str, Any] = {
        name: expectation(weights, [stage.metrics.get(name, np.zeros_like(stage.reward)) for stage in stages])
        for name in sorted(exact)
    }
    optimum: Any = evidence if beta is None else solution.value if other is not None else beta * evidence
    # Rounding may put a KL of 0 a little below it.
    return evidence, Estimates(optimum, reward, np.maximum(kl, 0.0), metrics, None, other)


def _result(
    program: Programs,
    stages: list[ProgramStage],
    solutions: list[Solution],
    exact: set[str],
    beta: np.ndarray | None,
    *,
    whole: bool,
) -> WeightedDraws:
    structure, shape = program.structure, program.structure.context_shape
    lead = () if beta is None else beta.shape
    observed = bool(structure.names("observed"))
    marginal = solve(stages, 1.0, rewarded=False).value if observed else np.zeros(math.prod(shape))
    temperatures = [None] if beta is None else [float(b) for b in beta.reshape(-1)]
    lanes = [_expect(stages, solution, b, marginal, exact) for solution, b in zip(solutions, temperatures, strict=True)]

    def sampler(rng: np.random.Generator, lane: int, num_draws: int) -> dict[str, Numbers]:
        alike = bool(shared_sites(structure))
        if alike and math.prod(shape) > 1:
            raise EngineError(
                f"contexts share site {shared_sites(structure)[0]!r}, and whole paths are not held, so contexts "
                "cannot be drawn apart; put the site inside the context plate"
            )
        _, rows = sample_rows(stages, solutions[lane].joint, rng, num_draws, alike=False)
        return scatter(*axes_and_digits(stages, rows), shape)

    contexts = math.prod(shape)
    log_weights = [s.joint[0][0] if whole else np.zeros((0, contexts)) for s in solutions]
    axes, num = stages[0].axes, stages[0].reward.shape[1]
    joint = (
        [np.broadcast_to(digit[:, None], (num, contexts)) for digit in digits(axes, np.arange(num))] if whole else []
    )
    sites = scatter(axes, joint, shape) if whole else {}

    def stacked(values: Sequence[Any]) -> np.ndarray:
        return np.stack(values).reshape((*lead, *shape))

    def mean(*values: np.ndarray) -> Estimate:
        array = np.stack([value.mean() for value in values]).reshape(lead)
        return Estimate(array, np.zeros_like(array))

    unknown = structure.names("environment") or solutions[0].divergence is not None
    evidence = None if unknown else stacked([log_z for log_z, _ in lanes])
    result = WeightedDraws(
        sites=sites,
        log_weights=np.stack(log_weights).reshape((*lead, -1 if whole else 0, *shape)),
        log_evidence=None if evidence is None else Estimate(evidence, np.zeros_like(evidence)),
        log_marginal=Estimate(marginal.reshape(shape), np.zeros(shape)) if observed else None,
        optimum=stacked([averages.objective for _, averages in lanes]),
        ess=None,
        estimates=jax.tree.map(mean, *(averages for _, averages in lanes)),
        beta=beta,
        structure=structure,
        axes=context_axes(structure),
        sampler=None if whole else sampler,
        evaluations=Evaluations.of_both(sum(math.prod(stage.reward.shape[:2]) for stage in stages)),
    )
    rest = [name for name in structure.names("metric") if name not in exact]
    if not rest:
        return result
    found = metrics_from_draws(key_from_seed(0), result, program, rest)
    metrics = {**result.estimates.metrics, **found}
    return replace(result, estimates=result.estimates._replace(metrics=metrics))

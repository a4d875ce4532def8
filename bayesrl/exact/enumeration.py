"""The exact answer for finite programs, by visiting every assignment or every reachable state."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Float
from numpyro import handlers
from scipy.special import logsumexp

from bayesrl.arguments import Count, Untraced, checked
from bayesrl.compilation.jit import trace_cache
from bayesrl.compilation.random_keys import key_from_seed
from bayesrl.core.programs import Programs
from bayesrl.errors import EngineError
from bayesrl.exact.backward_induction import (
    LOG_ZERO,
    MASS_TOLERANCE,
    ProgramStage,
    Solution,
    axes_and_digits,
    expectation,
    marginals,
    sample_rows,
    solve,
)
from bayesrl.exact.grid import digits, path_axes, scatter
from bayesrl.exact.tabulation import (
    check_grid_size,
    enumerate_paths,
    freeze_program,
    score_by_context,
    tabulate_stages,
)
from bayesrl.exact.weighted_draws import WeightedDraws, context_axes, metrics_from_draws, shared_sites
from bayesrl.statistics.estimates import Estimate, Estimates
from bayesrl.typing import Beta, Numbers, Params, Program


@checked(EngineError, Untraced("call it outside: it compiles its own programs"))
@trace_cache()
def enumerate_posterior(
    policy: Program, *args: Any, beta: Beta | None = None, max_count: Count = 2**20
) -> WeightedDraws:
    """Compute the tilted posterior of a finite program exactly.

    p*(x) = π₀(x)·exp(R(x)/β)/Z and J* = β·log Z, per context. With environment sites J* is the
    optimum of control, max_π E[R] − β·KL, by soft backward induction in program order, where no
    action reads a draw with observable=False. Programs with a `scan` are solved state by state.
    Parameters inside the policy are frozen: the policy is the prior.

    Args:
        policy: the program; every latent site has a finite support.
        *args: arguments of the program.
        beta: temperature, reward units per nat, [*beta]; required with rewards, refused without.
        max_count: largest number of assignments, or of reachable states × assignments, to visit.
            Elements of context plates share assignments; other elements multiply them.

    Returns:
        `WeightedDraws` with exact weights, evidence and optimum. Metrics that mix contexts, or that
        read the stacked outputs of a scan, are averaged over 1,024 exact draws and carry their
        standard error.

    Raises:
        EngineError: there are too many assignments, a support is not finite, a plate is subsampled,
            environment sites are mixed with observed ones, or the reward is −inf everywhere.
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

    References:
        Levine (2018), "Reinforcement Learning and Control as Probabilistic Inference", sections 2.2
        and 2.4: the soft Bellman equations, here with nature's draws averaged and not tilted.
    """
    return _solved(freeze_program(policy, args, beta), {}, beta, max_count)


def enumerate_target(
    programs: Programs, params: Params, beta: Beta | None = None, max_count: Count = 2**20
) -> WeightedDraws:
    """Like `enumerate_posterior`, but with the compiled program that `evaluate_exactly` uses for the fit."""
    program, params = _beside_guide(freeze_program(programs.policy, programs.args, beta), programs, params)
    return _solved(program, params, beta, max_count)


def _beside_guide(program: Programs, fit: Programs, params: Params) -> tuple[Programs, Params]:
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


def exact_metrics(program: Programs, params: Params, stages: Sequence[ProgramStage]) -> set[str]:
    """Run the program on draws that differ between contexts, and compare with the stages' scores of each context.

    Returns:
        Names of the metrics that are known exactly.

    Raises:
        EngineError: elements of context plates interact.
    """
    structure = program.structure
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
    return bool(np.isclose(one, other, rtol=1e-3, atol=1e-3).all())


def _refuse_impossible(program: Programs, solutions: Sequence[Solution]) -> None:
    structure = program.structure
    never = np.flatnonzero(~np.isfinite(np.stack([s.value for s in solutions])).all(0))
    if never.size:
        where = [int(i) for i in np.unravel_index(int(never[0]), structure.context_shape)]
        plates = [frame.name for frame in sorted(structure.contexts, key=lambda frame: frame.dim)]
        named = ", ".join(f"{plate!r}[{i}]" for plate, i in zip(plates, where, strict=True))
        raise EngineError(
            f"every assignment{f' of context {named}' if named else ''} has reward or likelihood -inf "
            f"({never.size} of {max(structure.num_contexts, 1)} contexts), so nothing is possible under p*; "
            "allow at least one action there"
        )


def _expect(
    stages: Sequence[ProgramStage], solution: Solution, beta: float | None, marginal: np.ndarray, exact: set[str]
) -> tuple[np.ndarray, Estimates]:
    """Return log Z and the averages under the optimum at one temperature, [contexts]."""
    weights = marginals(stages, solution)

    def mean(read: Callable[[ProgramStage], np.ndarray]) -> Any:
        return expectation(weights, [read(stage) for stage in stages])

    reward = mean(lambda stage: stage.reward)
    evidence = solution.value if beta is None else solution.value / beta - marginal
    kl = (mean(lambda stage: stage.likelihood) if beta is None else reward / beta) - evidence
    metrics: dict[str, Any] = {
        name: expectation(weights, [stage.metrics.get(name, np.zeros_like(stage.reward)) for stage in stages])
        for name in sorted(exact)
    }
    optimum: Any = evidence if beta is None else beta * evidence
    return evidence, Estimates(optimum, reward, np.maximum(kl, 0.0), metrics)


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

    evidence = None if structure.names("environment") else stacked([log_z for log_z, _ in lanes])
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
    )
    rest = [name for name in structure.names("metric") if name not in exact]
    if not rest:
        return result
    found = metrics_from_draws(key_from_seed(0), result, program, rest)
    metrics = {**result.estimates.metrics, **found}
    return replace(result, estimates=result.estimates._replace(metrics=metrics))


class Evaluation(NamedTuple):
    """What a guide achieves, exactly, [*contexts].

    Attributes:
        objective: J(q), reward units (the ELBO, nats, without rewards).
        reward: E_q[R], reward units.
        kl: KL(q‖π₀), nats; with observed data and rewards KL(q‖p(x|y)).
        kl_forward: KL(p*‖q), nats; nan with environment sites, where p* is not the target.
        missed_mass: mass of p* where q puts less than a tenth of it; nan in the same case.
        prior_objective: J(π₀), which the policy itself achieves; that of p(x|y) with observed data and rewards.
    """

    objective: Float[np.ndarray, "*contexts"]
    reward: Float[np.ndarray, "*contexts"]
    kl: Float[np.ndarray, "*contexts"]
    kl_forward: Float[np.ndarray, "*contexts"]
    missed_mass: Float[np.ndarray, "*contexts"]
    prior_objective: Float[np.ndarray, "*contexts"]


def evaluate_exactly(
    programs: Programs, params: Params, beta: float | None = None, max_count: Count = 2**20
) -> Evaluation:
    """Compute what a guide achieves, exactly, over the grid of a finite program.

    J(q) = Σ_x q(x)·(R(x) − β·log q(x)/π₀(x)), with nature's draws averaged by their own probabilities. A `scan` is
    enumerated path by path.

    Raises:
        EngineError: the program cannot be enumerated, or the guide's probabilities do not add up to 1.

    Example:
        >>> import jax, jax.numpy as jnp, numpyro, numpyro.distributions as dist, bayesrl
        >>> from bayesrl.core.programs import Programs
        >>> from bayesrl.core.structure import inspect
        >>> from bayesrl.exact.enumeration import evaluate_exactly
        >>> def bandit():
        ...     arm = numpyro.sample("arm", dist.Categorical(logits=jnp.zeros(2)))
        ...     bayesrl.reward("payoff", 3.0 * arm)
        >>> programs = Programs(bandit, None, inspect(jax.random.key(0), bandit), (), {})
        >>> round(float(evaluate_exactly(programs, {}, beta=1.0).objective), 6)  # the prior itself
        1.5
    """
    own = programs.constrain(params) if programs.learned else {}
    policy = handlers.substitute(programs.policy, data=own) if own else programs.policy
    program, params = _beside_guide(freeze_program(policy, programs.args, beta), programs, params)
    structure, shape = program.structure, program.structure.context_shape
    axes = path_axes(structure)
    check_grid_size(axes, structure, max_count)
    stage, raw_prior, raw_q = enumerate_paths(program, params, axes)
    log_prior, log_nature = stage.log_prob("action")[0], stage.log_prob("environment")[0]
    # If a handler masks a site, both programs score it 0 for every value: give q the prior's uniform.
    counted = np.where(np.isfinite(log_prior), log_prior - raw_prior.astype(float), 0.0) if stage.masked else 0.0
    log_q = np.where(raw_q <= LOG_ZERO, -np.inf, raw_q.astype(float)) + counted
    weight = np.exp(log_q + log_nature)
    mass = weight.sum(0)
    if np.abs(mass - 1).max() > MASS_TOLERANCE:
        raise EngineError(
            f"the guide's probabilities add up to {mass[np.abs(mass - 1).argmax()]:.4g} over the policy's values; "
            "its support must be the policy's, and contexts must not read each other's draws"
        )
    log_ratio = log_q - np.log(mass) - log_prior  # the prior adds up to 1 in double precision too
    given = stage.likelihood[0] if beta is not None else np.zeros_like(log_prior)
    log_start = log_prior + log_nature + given
    log_start = log_start - (logsumexp(log_start, axis=0) if beta is not None else 0.0)
    start, *_ = _achieved(np.exp(log_start), log_start - log_prior - log_nature, stage, beta, shape)
    return Evaluation(
        *_achieved(weight / mass, log_ratio, stage, beta, shape),
        *_against_target(log_ratio, stage, beta, shape),
        start,
    )


def _achieved(
    weight: np.ndarray, log_ratio: np.ndarray, stage: ProgramStage, beta: float | None, shape: tuple[int, ...]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Average J, R and KL over assignments [assignments, contexts]; assignments of probability zero do not count."""

    def mean(values: np.ndarray) -> np.ndarray:
        return np.asarray((np.where(weight > 0, values, 0.0) * weight).sum(0)).reshape(shape)

    with np.errstate(invalid="ignore"):
        reward, likelihood, kl = mean(stage.reward[0]), mean(stage.likelihood[0]), mean(log_ratio)
    if beta is None:
        return np.asarray(likelihood - kl), reward, kl
    # With observed data the reference is p(x|y), whose log is log π₀ + log p(y|x) − log p(y).
    kl = kl - likelihood + solve([stage], 1.0, rewarded=False).value.reshape(shape)
    return np.asarray(reward - beta * kl), reward, np.asarray(kl)


def _against_target(
    log_ratio: np.ndarray, stage: ProgramStage, beta: float | None, shape: tuple[int, ...]
) -> tuple[np.ndarray, np.ndarray]:
    """Return KL(p*‖q), and the mass of p* where q puts less than a tenth of it."""
    if any(axis.kind == "environment" for axis in stage.axes):
        return np.full(shape, np.nan), np.full(shape, np.nan)
    # log q/π₀ is nan where both are 0, but p* is 0 there too.
    tilt = stage.likelihood[0] + (0.0 if beta is None else stage.reward[0] / beta)
    log_target = stage.log_prob("action")[0] + tilt
    log_target = log_target - logsumexp(log_target, axis=0)
    target = np.exp(log_target)
    with np.errstate(invalid="ignore"):
        apart = log_target - stage.log_prob("action")[0] - log_ratio
    apart = np.where(target > 0, apart, 0.0)
    forward = (target * apart).sum(0)
    return forward.reshape(shape), (target * (apart > np.log(10))).sum(0).reshape(shape)

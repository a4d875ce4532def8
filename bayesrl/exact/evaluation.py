"""What a guide achieves on a finite program, exactly."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from numpyro import handlers
from scipy.special import logsumexp

from bayesrl.arguments import Count
from bayesrl.core.programs import Programs
from bayesrl.errors import EngineError
from bayesrl.exact.backward_induction import LOG_ZERO, MASS_TOLERANCE, ProgramStage, Solution, solve
from bayesrl.exact.enumeration import beside_guide
from bayesrl.exact.grid import path_axes
from bayesrl.exact.regularizers import Regularizer, make_regularizer, refuse_unregularized, solve_regularized
from bayesrl.exact.tabulation import check_grid_size, enumerate_paths, freeze_program
from bayesrl.statistics.best_of_n_law import BestOfLaw, best_of_n_law, rank_rewards
from bayesrl.statistics.definitions import RegularizerName
from bayesrl.typing import Params


class Evaluation(NamedTuple):
    """What a guide achieves, exactly, [*contexts].

    Attributes:
        objective: J(q), reward units (the ELBO, nats, without rewards).
        reward: E_q[R], reward units.
        kl: KL(q‖π₀), nats; with observed data and rewards KL(q‖p(x|y)).
        kl_forward: KL(p*‖q), nats; nan with environment sites, where p* is not the target.
        missed_mass: mass of p* where q puts less than a tenth of it; nan in the same case.
        prior_objective: J(π₀), which the policy itself achieves; that of p(x|y) with observed data and rewards.
        divergence: D_f(q‖π₀), if another regulariser takes the place of KL in J, whose optimum is then p*.
        multiplier: λ of that optimum, reward units; see `Solution`.
        best_of: the law of the best of n, if that is the target instead of p*.
        kl_reverse: KL(q‖pₙ) in that case, nats.
    """

    objective: Float[np.ndarray, "*contexts"]
    reward: Float[np.ndarray, "*contexts"]
    kl: Float[np.ndarray, "*contexts"]
    kl_forward: Float[np.ndarray, "*contexts"]
    missed_mass: Float[np.ndarray, "*contexts"]
    prior_objective: Float[np.ndarray, "*contexts"]
    divergence: Float[np.ndarray, "*contexts"] | None = None
    multiplier: Float[np.ndarray, "*contexts"] | None = None
    best_of: BestOfLaw | None = None
    kl_reverse: Float[np.ndarray, "*contexts"] | None = None


def evaluate_exactly(
    programs: Programs,
    params: Params,
    beta: float | None = None,
    max_count: Count = 2**20,
    *,
    regularizer: RegularizerName = "kl",
    alpha: float | None = None,
    best_of: int | None = None,
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
        >>> from bayesrl.exact.evaluation import evaluate_exactly
        >>> def bandit():
        ...     arm = numpyro.sample("arm", dist.Categorical(logits=jnp.zeros(2)))
        ...     bayesrl.reward("payoff", 3.0 * arm)
        >>> programs = Programs(bandit, None, inspect(jax.random.key(0), bandit), (), {})
        >>> round(float(evaluate_exactly(programs, {}, beta=1.0).objective), 6)  # the prior itself
        1.5
    """
    # Parameters that the fit trained belong to the policy, so the prior is the policy with them.
    own = programs.constrain(params) if programs.learned else {}
    policy = handlers.substitute(programs.policy, data=own) if own else programs.policy
    program, params = beside_guide(freeze_program(policy, programs.args, beta), programs, params)
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
    with np.errstate(invalid="ignore"):  # nan where both are 0, which counts nowhere
        log_ratio = log_q - np.log(mass) - log_prior  # the prior adds up to 1 in double precision too
    given = stage.likelihood[0] if beta is not None else np.zeros_like(log_prior)
    log_start = log_prior + log_nature + given
    log_start = log_start - (logsumexp(log_start, axis=0) if beta is not None else 0.0)
    with np.errstate(invalid="ignore"):  # likewise
        start_ratio = log_start - log_prior - log_nature
    start, *_ = _achieved(np.exp(log_start), start_ratio, stage, beta, shape)
    chosen = make_regularizer(regularizer, alpha)
    achieved = _achieved(weight / mass, log_ratio, stage, beta, shape)
    if chosen is not None and beta is not None:
        refuse_unregularized(structure, regularizer)
        solution = solve_regularized(stage, beta, chosen, regularizer, structure)
        return _regularized(achieved, start, log_q - np.log(mass), log_start, solution, beta, chosen)
    if best_of is not None:
        law = best_of_n_law(log_prior, rank_rewards(stage.reward[0]), best_of)
        q, log_target = weight / mass, log_prior + law.log_ratio
        apart = _apart(log_target, log_prior + log_ratio, shape)
        with np.errstate(invalid="ignore"):
            reverse = np.where(q > 0, q * (log_ratio - law.log_ratio), 0.0).sum(0).reshape(shape)
        return Evaluation(*achieved, *apart, start, best_of=law, kl_reverse=np.asarray(reverse))
    return Evaluation(
        *achieved,
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


def _regularized(
    achieved: tuple[np.ndarray, np.ndarray, np.ndarray],
    start: np.ndarray,
    log_q: np.ndarray,
    log_reference: np.ndarray,
    solution: Solution,
    beta: float,
    chosen: Regularizer,
) -> Evaluation:
    """Put D_f in the place of KL; densities are [assignments, contexts]."""
    _, reward, kl = achieved
    shape = reward.shape
    with np.errstate(invalid="ignore"):  # nan where both are 0, which counts nowhere
        ratio = log_q - log_reference
    divergence = chosen.divergence(ratio, np.exp(log_reference), np.exp(log_q)).sum(0).reshape(shape)
    forward, missed = _apart(solution.joint[0][0], log_q, shape)
    return Evaluation(
        objective=np.asarray(reward - beta * divergence),
        reward=reward,
        kl=kl,
        kl_forward=forward,
        missed_mass=missed,
        prior_objective=start,
        divergence=divergence,
        multiplier=None if solution.multiplier is None else solution.multiplier.reshape(shape),
    )


def _against_target(
    log_ratio: np.ndarray, stage: ProgramStage, beta: float | None, shape: tuple[int, ...]
) -> tuple[np.ndarray, np.ndarray]:
    """Return KL(p*‖q), and the mass of p* where q puts less than a tenth of it."""
    if any(axis.kind == "environment" for axis in stage.axes):
        return np.full(shape, np.nan), np.full(shape, np.nan)
    # log q/π₀ is nan where both are 0, but p* is 0 there too.
    tilt = stage.likelihood[0] + (0.0 if beta is None else stage.reward[0] / beta)
    log_target = stage.log_prob("action")[0] + tilt
    # Relative to the best first: beside 1e20 the log of a sum has no digits left for its terms.
    log_target = log_target - log_target.max(0)
    log_target = log_target - logsumexp(log_target, axis=0)
    return _apart(log_target, stage.log_prob("action")[0] + log_ratio, shape)


def _apart(log_target: np.ndarray, log_q: np.ndarray, shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Return KL(p*‖q) and the missed mass from densities [assignments, contexts]."""
    target = np.exp(log_target)
    with np.errstate(invalid="ignore"):
        apart = np.where(target > 0, log_target - log_q, 0.0)
    return (target * apart).sum(0).reshape(shape), (target * (apart > np.log(10))).sum(0).reshape(shape)

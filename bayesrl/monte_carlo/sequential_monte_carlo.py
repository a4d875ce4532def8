"""`smc`: particles that are resampled on their way from the prior to the tilted posterior."""

from collections.abc import Sequence
from dataclasses import replace
from functools import reduce
from typing import Annotated, Any, Literal

import jax
import numpy as np

from bayesrl.argument_types import Requirement
from bayesrl.arguments import Count, CountAboveOne, UnitInterval, Untraced, UnusedOption, checked
from bayesrl.compilation.jit import trace_cache
from bayesrl.compilation.random_keys import fold_in, split_keys
from bayesrl.core.programs import Programs
from bayesrl.errors import EngineError
from bayesrl.exact.tabulation import freeze_program
from bayesrl.exact.weighted_draws import WeightedDraws
from bayesrl.monte_carlo.importance_sampling import Proposal
from bayesrl.monte_carlo.particles.engines import (
    ParticleEngine,
    ParticleOptions,
    SequentialParticles,
    TemperedParticles,
    own_engine,
)
from bayesrl.monte_carlo.particles.kernels import KernelName
from bayesrl.monte_carlo.particles.resampling import Scheme
from bayesrl.monte_carlo.particles.time_steps import TimeSteps, cut_by_time
from bayesrl.monte_carlo.particles.twists import refuse_peeking
from bayesrl.monte_carlo.weighting import ScoredDraws, WeightedLane, log_mean_weight, weigh, weighted_draws
from bayesrl.posterior.posterior import Posterior
from bayesrl.statistics.evaluations import Evaluations
from bayesrl.typing import Beta, PRNGKey, Program

type Form = Literal["auto", "sequential", "tempered"]
"""How particles come from the prior to the posterior: along the time of the program, or along temperatures."""

type TwistOption = Annotated[
    Any,
    Requirement(
        "None, 'exact', 'reward', what bayesrl.fit_twist returned, or a function of (step, carry), or of a text, that "
        "returns a value in reward units",
        lambda value: (
            value is None
            or callable(value)
            or isinstance(value, Posterior)
            or (isinstance(value, str) and value in ("exact", "reward"))
        ),
        any_type=True,
    ),
]


def _is_schedule(value: Any) -> bool:
    numbers = np.asarray(value if value is not None else [1.0])
    return (
        numbers.ndim == 1
        and numbers.size > 0
        and numbers.dtype.kind in "if"
        and bool((numbers > 0).all() and np.isfinite(numbers).all() and (np.diff(numbers) < 0).all())
    )


_OF_DATA = 2**30
"""The number to fold the key with for the particles of p(y), far from those of temperatures."""

_ONLY_TEMPERED = "only form='tempered' follows temperatures"
_ONLY_SEQUENTIAL = "only form='sequential' looks ahead in time"


@checked(
    EngineError,
    *(
        UnusedOption(name, lambda given: given["form"] == "sequential", _ONLY_TEMPERED)
        for name in ("schedule", "moves", "num_moves")
    ),
    UnusedOption("twist", lambda given: given["form"] == "tempered", _ONLY_SEQUENTIAL),
    Untraced("call it outside: it compiles its own programs"),
)
@trace_cache()
def smc(
    key: PRNGKey,
    policy: Program,
    *args: Any,
    beta: Beta | None = None,
    num_particles: CountAboveOne = 512,
    num_replications: CountAboveOne = 16,
    form: Form = "auto",
    proposal: Proposal = None,
    twist: TwistOption = None,
    schedule: Annotated[
        Sequence[float] | None,
        Requirement("falling temperatures above 0, the last of them beta", _is_schedule, any_type=True),
    ] = None,
    moves: Sequence[KernelName] | None = None,
    num_moves: Count = 1,
    resample_below: UnitInterval = 0.5,
    resampling: Scheme = "systematic",
) -> WeightedDraws:
    """Estimate the tilted posterior by sequential Monte Carlo: weighted particles that are resampled on their way.

    *Sequential*, for programs with one `scan`: particles take one step of time together. Weights multiply by
    π₀/q·exp(r/β), and where they degenerate, in each context on its own, particles are drawn anew in proportion to
    them. A twist V weighs by exp(V/β), V being a value of what is still to come: with the exact one all weights are Z.

    *Tempered*, for any program: particles start from q, the prior or a proposal, and follow q^(1−λ)·(π₀·exp(R/β))^λ
    from λ = 0 to 1. After every step they move by kernels that leave it invariant: independent proposals from q, Gibbs
    updates of sites with few values, Hamiltonian moves or NUTS (both NumPyro's) for continuous sites. A pilot run
    chooses λ and the lengths of steps; they then stay fixed, so that Ẑ is unbiased.

    Ẑ is unbiased in both, and averaged over independent replications, whose spread is its standard error.

    Args:
        key: consumed whole.
        policy: the program, without environment sites: particles would tilt nature.
        *args: arguments of the program.
        beta: temperature, reward units per nat, [*beta]; required with rewards, refused without. Each has its own
            particles.
        num_particles: particles of one replication.
        num_replications: number of independent replications.
        form: `sequential` or `tempered`; `auto` takes the former if the program has one `scan`.
        proposal: what draws particles: a posterior with one temperature and restart, or None for the prior.
        twist: a function of (step, carry) that returns V, reward units, [*contexts], after each step of a `scan`, from
            0; the carry at step −1 is the first. Or "exact": the soft value of every state of a finite program. Or a
            learned one: a posterior from `bayesrl.fit_twist`, or a fit of a rollout by `bayesrl.control.ActorCritic`,
            whose critic it takes.
            If the sites of a step are finite and there is no proposal, every value of a step is tried under the twist.
        schedule: temperatures to follow, falling to beta; None lets a pilot run choose.
        moves: kernels, of `independence`, `gibbs`, `hmc` and `nuts`; None takes all that apply but for `nuts`, which
            takes longer to compile, and moves all contexts together.
        num_moves: how often each kernel moves the particles at each temperature.
        resample_below: resample where a smaller share of the particles is effective.
        resampling: how uniform numbers are spread.

    Returns:
        `WeightedDraws` of all replications together.

    Raises:
        EngineError: environment sites; a form that does not fit the program; a twist of another shape, or with nan; a
            schedule that does not end at beta; a step at which no particle of a context has a weight.
        PolicyError: beta does not fit the program, or a reward is nan or inf.

    Example:
        >>> import jax, jax.numpy as jnp, numpyro, numpyro.distributions as dist, bayesrl
        >>> from numpyro.contrib.control_flow import scan
        >>> def walk():
        ...     def step(x, _):
        ...         x = x + numpyro.sample("step", dist.Bernoulli(0.5))
        ...         bayesrl.reward("height", 0.1 * x)
        ...         return x, None
        ...     scan(step, 0, None, length=5)
        >>> found = bayesrl.smc(jax.random.key(0), walk, beta=1.0, twist="exact")
        >>> exact = bayesrl.enumerate_posterior(walk, beta=1.0)
        >>> bool(abs(found.log_evidence.mean - exact.log_evidence.mean) < 1e-5)
        True

    References:
        Del Moral, Doucet & Jasra (2006), "Sequential Monte Carlo samplers"; Whiteley & Lee (2014), "Twisted particle
        filters"; Zhao, Brekelmans, Makhzani & Grosse (2024), "Probabilistic inference in language models via twisted
        sequential Monte Carlo".
    """
    program = freeze_program(policy, args, beta)
    options = ParticleOptions(num_particles, num_replications, resample_below, resampling, twist)
    engine = choose_engine(program, proposal, form, options, (schedule, moves, num_moves))
    return _run(key, program, engine, beta, num_replications)


def choose_engine(
    program: Programs,
    proposal: Any,
    form: Form,
    options: ParticleOptions,
    tempering: tuple[Sequence[float] | None, Sequence[KernelName] | None, int] = (None, None, 1),
) -> ParticleEngine:
    """Choose what runs the particles, or say why nothing can.

    Args:
        program: the frozen policy.
        proposal: what draws particles; see `smc`, as for all that follows.
        form: along time or temperatures.
        options: of both forms.
        tempering: the schedule, the moves and their number.
    """
    structure = program.structure
    if callable(options.twist):
        refuse_peeking(program, options.twist)
    if nature := structure.names("environment"):
        raise EngineError(
            f"particles would tilt environment site {nature[0]!r}, which is nature's; use "
            "bayesrl.enumerate_posterior(...), or bayesrl.fit(...) with bayesrl.evidence(..., method='hindsight')"
        )
    structure.check_memory(options.num_particles * options.num_replications, EngineError)
    programs, params = program, dict[str, Any]()
    if proposal is not None:
        other, params = proposal.unbatched() if isinstance(proposal, Posterior) else proposal
        programs = replace(program, guide=other.guide, transforms=other.transforms)
    own, steps = own_engine(programs.policy), cut_by_time(programs)
    if form == "sequential" and own is None and isinstance(steps, str):
        raise EngineError(f"form='sequential' needs a program with one scan, and {steps}; use form='tempered'")
    follows = tempering[0] is not None or tempering[1] is not None
    if form == "tempered" or (form == "auto" and (follows or (own is None and isinstance(steps, str)))):
        if options.twist is not None:
            why = steps if isinstance(steps, str) else "schedule= and moves= follow temperatures"
            raise EngineError(f"a twist looks ahead in time, and {why}; leave twist= out")
        return TemperedParticles(programs, params, options, *tempering)
    if own is not None:
        return own(programs, params, options)
    assert isinstance(steps, TimeSteps)
    return SequentialParticles(steps, params, options)


def _run(key: PRNGKey, program: Programs, engine: ParticleEngine, beta: Any, num_replications: int) -> WeightedDraws:
    """Run the particles of every temperature, and of p(y) if there are both data and rewards."""
    betas = None if beta is None else np.asarray(beta, float)
    observed = bool(program.structure.names("observed"))
    run_key, metric_key = split_keys(key)
    marginal, spent = None, Evaluations()
    if observed and betas is not None:
        given_data, log_weights = engine.run(fold_in(run_key, _OF_DATA), None)
        marginal, spent = log_mean_weight(log_weights, num_replications), given_data.evaluations
    lanes = []
    for i, b in enumerate([None] if betas is None else [float(b) for b in betas.reshape(-1)]):
        draws, log_weights = engine.run(fold_in(run_key, i), b)
        # Particles of one replication depend on one another; only replications are independent.
        lanes.append((draws, weigh(draws, log_weights, b, marginal=marginal, num_groups=num_replications)))
    if observed and betas is None:
        marginal = lanes[0][1].evidence
    draws, weighed = _joined(lanes)
    draws = draws._replace(evaluations=draws.evaluations.plus(spent))
    return weighted_draws(metric_key, program, draws, weighed, betas, marginal)


def _joined(lanes: list[tuple[ScoredDraws, WeightedLane]]) -> tuple[ScoredDraws, list[WeightedLane]]:
    """Put the draws of all temperatures behind one another; those of other temperatures have weight 0."""
    if len(lanes) == 1:
        return lanes[0][0], [lanes[0][1]]
    spent = reduce(Evaluations.plus, (draws.evaluations for draws, _ in lanes))
    arrays = [draws._asdict() | {"evaluations": None} for draws, _ in lanes]
    joined_arrays = jax.tree.map(lambda *xs: np.concatenate(xs), *arrays)
    draws = ScoredDraws(**joined_arrays | {"evaluations": spent})
    joined = []
    for i, (_, lane) in enumerate(lanes):
        blocks = [
            np.full_like(other.log_weights, -np.inf) if j != i else lane.log_weights
            for j, (_, other) in enumerate(lanes)
        ]
        joined.append(lane._replace(log_weights=np.concatenate(blocks)))
    return draws, joined

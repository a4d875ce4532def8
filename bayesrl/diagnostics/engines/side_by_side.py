"""`compare_engines`: every engine of one posterior side by side, with the same number of evaluations."""

from collections.abc import Sequence
from typing import Annotated, Any

import numpy as np

from bayesrl.arguments import Untraced, UnusedOption, checked, integer_range
from bayesrl.compilation.jit import trace_cache
from bayesrl.compilation.random_keys import fold_in
from bayesrl.compilation.stopwatch import stopwatch
from bayesrl.diagnostics.diagnosed_fit import PolicyOrPosterior
from bayesrl.diagnostics.engines.engine_answers import (
    Answer,
    Engine,
    from_enumeration,
    from_fit,
    from_hindsight,
    from_known_optimum,
    from_nuts,
    from_rejection,
    from_weighted_fit,
    from_weighted_prior,
    gap_to,
    objective_of_fit,
    stacked,
)
from bayesrl.diagnostics.engines.engine_table import ENGINES, EngineComparison, EngineName, EngineRow
from bayesrl.diagnostics.engines.particle_answers import ParticleAnswer
from bayesrl.diagnostics.engines.problem_lanes import EngineProblem, problem_of_fit, problem_of_policy
from bayesrl.diagnostics.evidence.by_known_optimum import KnownOptimum
from bayesrl.errors import BayesRLError, EngineError
from bayesrl.monte_carlo.sequential_monte_carlo import TwistOption
from bayesrl.posterior.posterior import Posterior
from bayesrl.statistics.estimates import Interval
from bayesrl.typing import Beta, PRNGKey

_ANSWERS: dict[EngineName, Engine] = {
    "known_optimum": from_known_optimum,
    "enumeration": from_enumeration,
    "importance": from_weighted_prior,
    "importance_from_fit": from_weighted_fit,
    "rejection": from_rejection,
    "smc_tempered": ParticleAnswer("tempered"),
    "smc_sequential": ParticleAnswer("sequential"),
    "smc_exact_twist": ParticleAnswer("sequential", "exact"),
    "smc_reward_twist": ParticleAnswer("sequential", "reward"),
    "smc_given_twist": ParticleAnswer("sequential", asked=True),
    "nuts": from_nuts,
    "hindsight": from_hindsight,
    "fit": from_fit,
}
DEFAULT_BUDGET = 2**16


@checked(
    EngineError,
    Untraced("call it outside: it compiles its own programs"),
    UnusedOption("beta", lambda given: isinstance(given["policy"], Posterior), "the posterior has its own temperature"),
)
@trace_cache()
def compare_engines(
    key: PRNGKey,
    policy: PolicyOrPosterior,
    *args: Any,
    beta: Beta | None = None,
    budget: Annotated[int, integer_range(256)] = DEFAULT_BUDGET,
    engines: Sequence[EngineName] | None = None,
    optimum: KnownOptimum | None = None,
    reward_bound: float | None = None,
    twist: TwistOption = None,
) -> EngineComparison:
    """Let every engine estimate the same log Z with the same number of evaluations of the program.

    An evaluation makes or scores one draw of all contexts, with its reward; it is what a model's forward pass or a
    simulator costs, on any machine. Engines that share draws between temperatures need only one budget for all of
    them; others divide it. Each row has both sides of log Z = log E_π₀[exp(R/β)] as far as the engine knows them: an
    interval where its standard error can be trusted, and limits that hold without one.

    The engines: the known `optimum`; enumeration, of whole draws or of the states of a `scan`; importance sampling,
    from the prior and half from the fit; rejection; particles along temperatures and along time, with twists that look
    ahead ("exact" for finite programs, "reward" for texts, or yours); NUTS; hindsight against nature; and J of the
    fit, which is never above J*. Quasi-rejection has no row: its log Z is that of weighted draws of the prior.

    If a posterior takes the place of the policy, its fit is one of the engines, proposes for others, and every row
    tells its gap J* − J. Its training is not counted. Without one, the default fit is trained with three quarters of
    the budget, and then proposes for importance sampling and NUTS.

    Args:
        key: consumed whole.
        policy: a program, or a posterior with its programs.
        *args: arguments of the program; of a posterior, other ones than those of the fit.
        beta: temperature, reward units per nat, [*beta]; only with a program that has rewards.
        budget: evaluations of the program that every engine has. Particles learn only on their way how many steps of
            temperature they need, and may take more.
        engines: names of engines to compare; None tries all.
        optimum: returns the known optimum J* per context, reward units, at a temperature, as in `evidence`.
        reward_bound: greatest total reward of a context, reward units, if it cannot be proven.
        twist: for particles along time, as in `smc`.

    Returns:
        A table that prints itself. `comparison["smc_tempered"]` is the row of one engine: `log_evidence`, `optimum` and
        `gap` ([*beta], means over contexts), `by_context`, `ess`, `evaluations`, `seconds`, `compile_seconds`.
        `rows` are all of them, `refusals` say why other engines do not apply, `tightest` names the engine with the
        narrowest interval, and `to_json()` describes everything.

    Raises:
        PolicyError: beta does not fit the program, or a posterior was loaded without its policy.
        EngineError: fewer than 2 evaluations, an unknown engine, or a policy to which no engine applies.

    Example:
        >>> import jax, jax.numpy as jnp, numpyro, numpyro.distributions as dist, bayesrl
        >>> def bandit():
        ...     arm = numpyro.sample("arm", dist.Categorical(logits=jnp.zeros(3)))
        ...     bayesrl.reward("payoff", jnp.array([0.0, 1.0, 2.0])[arm])
        >>> engines = ["enumeration", "importance", "nuts"]  # all by default
        >>> found = bayesrl.compare_engines(jax.random.key(0), bandit, beta=1.0, budget=4096, engines=engines)
        >>> found["enumeration"].log_evidence.mean.round(3).item()  # log((1 + e + e²) / 3)
        1.309
        >>> [row.engine for row in found.rows], found.tightest, found["importance"].evaluations.reward
        (['enumeration', 'importance'], 'enumeration', 4096)
        >>> found.refusals["nuts"]
        "NUTS cannot draw discrete site 'arm'"
    """
    wanted = ENGINES if engines is None else tuple(dict.fromkeys(engines))
    if not wanted:
        raise EngineError(f"engines={list(engines or ())} names none; choose from {', '.join(ENGINES)}")
    given = {"optimum": optimum, "reward_bound": reward_bound, "twist": twist}
    if isinstance(policy, Posterior):
        problem = problem_of_fit(policy, args, budget, given)
    else:
        problem = problem_of_policy(fold_in(key, 0), policy, args, beta, budget, given, wanted=wanted)
    return compare_on(key, problem, wanted)


@trace_cache()
def compare_engines_of_fit(
    key: PRNGKey,
    posterior: Posterior,
    objective: Interval | None,
    *,
    budget: int = DEFAULT_BUDGET,
    engines: Sequence[EngineName] | None = None,
    optimum: KnownOptimum | None = None,
    reward_bound: float | None = None,
    twist: Any = None,
) -> EngineComparison:
    """Compare engines on a fit whose J, [*beta], may be known already, as `compare_engines` does."""
    given = {"optimum": optimum, "reward_bound": reward_bound, "twist": twist}
    return compare_on(key, problem_of_fit(posterior, (), budget, given), tuple(engines or ENGINES), objective)


def compare_on(
    key: PRNGKey, problem: EngineProblem, wanted: Sequence[EngineName], objective: Interval | None = None
) -> EngineComparison:
    """Compare engines on a problem; `objective` is J of the given fit, [*beta], if it is known already."""
    if problem.is_given and objective is None:
        found = [
            objective_of_fit(fold_in(fold_in(key, 1), i), problem, lane)[0] for i, lane in enumerate(problem.lanes)
        ]
        objective = stacked(found, problem.shape)
    rows: list[EngineRow] = []
    refusals: dict[str, str] = {}
    for name in wanted:
        # Each engine has a key of its own, whichever others are asked for.
        own_key = fold_in(key, 2 + ENGINES.index(name))
        with stopwatch() as watch:
            try:
                answer = _ANSWERS[name](own_key, problem)
            except BayesRLError as error:
                refusals[name] = str(error).partition(";")[0]
                continue
        # The fit that was trained here is a part of its row.
        trained = problem.trained.watch if name == "fit" and problem.trained is not None else None
        seconds = (
            watch.running + (trained.running if trained else 0.0),
            watch.making + (trained.making if trained else 0.0),
        )
        rows.append(_row(name, answer, problem, objective, seconds))
    if not rows:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in refusals.items())
        raise EngineError(f"no engine applies to this policy. {reasons}")
    return EngineComparison(
        beta=None if problem.beta is None else np.asarray(problem.beta, float),
        rows=tuple(rows),
        refusals=refusals,
        budget=problem.budget,
        objective=objective if problem.is_given else None,
        num_contexts=problem.structure.num_contexts,
    )


def _row(
    name: EngineName,
    answer: Answer,
    problem: EngineProblem,
    objective: Interval | None,
    seconds: tuple[float, float],
) -> EngineRow:
    lead, findings = problem.shape, answer.findings
    optimum = stacked([one.optimum for one in findings], lead)
    of_z = [one.log_evidence for one in findings if one.log_evidence is not None]
    contexts = [one.by_context for one in findings if one.by_context is not None]
    # The fit's own J is no optimum to measure it by.
    gap = None if objective is None or name == "fit" else gap_to(objective, optimum)
    return EngineRow(
        engine=name,
        log_evidence=stacked(of_z, lead) if of_z else None,
        optimum=optimum,
        gap=gap,
        by_context=stacked(contexts, lead) if contexts else None,
        ess=np.asarray([one.ess for one in findings], float).reshape(lead),
        num_draws=answer.num_draws,
        evaluations=answer.evaluations,
        seconds=seconds[0],
        compile_seconds=seconds[1],
        note="; ".join(dict.fromkeys(one.note for one in findings if one.note)),
    )

"""`evidence`: log Z from both sides, and how far a fit is from the optimum."""

import dataclasses
import math
from collections.abc import Callable
from typing import Annotated, Any, Literal

import jax
import numpy as np

from bayesrl.arguments import CountOrZero, Untraced, UnusedOption, checked, integer_range
from bayesrl.compilation.jit import trace_cache
from bayesrl.compilation.random_keys import fold_in, split_keys
from bayesrl.core.programs import Programs
from bayesrl.diagnostics.diagnosed_fit import frozen_fit, full_data_fit, out_of_reach
from bayesrl.diagnostics.evidence.by_dual import (
    Chosen,
    bracket_by_dual,
    bracket_regularized_exactly,
    known_optimum,
    weigh_own_draws,
)
from bayesrl.diagnostics.evidence.by_enumeration import MAX_COUNT, bracket_best_of_n, bracket_by_enumeration
from bayesrl.diagnostics.evidence.by_hindsight import bracket_by_hindsight
from bayesrl.diagnostics.evidence.by_known_optimum import (
    DRAWS_PER_BATCH,
    KnownOptimum,
    bracket_by_known_optimum,
    estimate_evidence,
)
from bayesrl.diagnostics.evidence.by_nuts import bracket_by_nuts
from bayesrl.diagnostics.evidence.by_particles import FEW_TEMPERATURES, bracket_by_particles
from bayesrl.diagnostics.evidence.by_sampling import (
    FIRST_DRAWS,
    MOST_DRAWS,
    bracket_by_sampling,
    estimate_best_of_n,
    find_bounds,
    is_sharp,
    most_draws,
    needs_particles,
)
from bayesrl.diagnostics.evidence.mixture_sample import MixtureSample, draw_mixture_sample, draw_restart_mixture_sample
from bayesrl.diagnostics.evidence.result import Evidence
from bayesrl.diagnostics.evidence.tempered_sample import Bounds, TemperedSample
from bayesrl.errors import EngineError
from bayesrl.exact.enumeration import enumerate_target
from bayesrl.exact.weighted_draws import WeightedDraws
from bayesrl.monte_carlo.particles.conditional_chains import ExactDraws, check_exact_draws
from bayesrl.monte_carlo.particles.tempering import MOST_TEMPERATURES
from bayesrl.monte_carlo.sequential_monte_carlo import TwistOption
from bayesrl.posterior.from_params import LEAST_DRAWS
from bayesrl.posterior.posterior import Posterior
from bayesrl.statistics.definitions import is_conditioned
from bayesrl.statistics.estimates import Estimate
from bayesrl.statistics.regularizer_names import distils
from bayesrl.typing import Params, PRNGKey

type RequestedMethod = Literal["auto", "enumeration", "rejection", "importance", "nuts", "smc", "hindsight", "dual"]

_DRAWN_NUMBERS = 4_000_000
_OF_BEST = 2**15


_TOLD = "optimum= tells the optimum, and nothing is searched for"

KNOWN = tuple(
    UnusedOption(name, lambda given: given["optimum"] is not None, _TOLD)
    for name in ("method", "reward_bound", "max_count")
)
"""Options that are unused if the optimum is known."""

_OF_PARTICLES = (
    UnusedOption("exact_draws", lambda given: given["optimum"] is not None, _TOLD),
    UnusedOption(
        "exact_draws",
        lambda given: given["method"] not in ("auto", "smc"),
        "only particles (method='smc', or 'auto') hold draws of p*",
    ),
)


@checked(
    EngineError,
    *KNOWN,
    *_OF_PARTICLES,
    Untraced("call it outside: it compiles its own programs"),
    UnusedOption("twist", lambda given: given["method"] != "smc", "only method='smc' looks ahead"),
)
@trace_cache()
def evidence(
    key: PRNGKey,
    posterior: Posterior,
    *new_args: Any,
    method: RequestedMethod = "auto",
    optimum: KnownOptimum | None = None,
    reward_bound: float | None = None,
    num_samples: Annotated[int, integer_range(256)] | None = None,
    max_count: CountOrZero = MAX_COUNT,
    twist: TwistOption = None,
    exact_draws: ExactDraws | None = None,
) -> Evidence:
    """Bracket log Z, and with it the gap J* − J(q) = β·KL(q‖p*), from both sides.

    For each β the best restart is used, or the mixture if you selected one. If the program is finite and
    small, everything is exact. Otherwise draws of the fit and of the prior are pooled, and more are drawn
    until the answer is sharp or `num_samples` is reached. Markov's inequality then bounds log Z from below;
    the bound from above comes from a proven or given bound on the rewards, or from NUTS if all sites are
    continuous. Particles (`method="smc"`) reach posteriors that neither draws of the fit nor of the prior do, and bound
    log Z from above by runs that hold a draw of p*; `auto` takes them where the first draws say that draws will not
    do. With environment sites the optimum is that of control: exact if finite, else bounded from above by an agent
    that knows nature's draws beforehand. A fit with another regulariser than KL is compared with the optimum of its
    own J: exact if finite, else from draws in the dual problem, where J* ≤ λ + β·E_π₀[f*((R − λ)/β)] for any λ.

    Args:
        key: consumed whole.
        posterior: posterior with its programs.
        *new_args: other arguments for the program, such as held-out data.
        method: `auto` picks the tightest method; the others insist on one. `dual` is of fits with another regulariser.
        optimum: returns the known optimum J* per context, reward units, at a temperature; see `KnownOptimum`.
        reward_bound: greatest total reward of a context, reward units, if it cannot be proven.
        num_samples: greatest number of draws; by default 2¹⁷, or of texts 2¹⁵ over all prompts, but 2¹⁰ of each.
        max_count: largest number of assignments to enumerate.
        twist: by which the particles of `method="smc"` look ahead; see `bayesrl.smc`.
        exact_draws: independent draws of p* for particles to hold, {site: [draws, ...]}, where you have some: of the
            latents that data were simulated from, for example, one for each simulation of the same data. The upper
            side then is not asymptotic.

    Returns:
        `Evidence`, [*beta].

    Raises:
        PolicyError: `posterior` is not a posterior, or was loaded without its policy; or a reward is nan or inf.
        EngineError: the method does not apply; a draw earned more than `reward_bound`; or a number is out of range.

    Example:
        >>> import jax, jax.numpy as jnp, numpyro, numpyro.distributions as dist, bayesrl
        >>> def bandit():
        ...     arm = numpyro.sample("arm", dist.Categorical(logits=jnp.zeros(3)))
        ...     bayesrl.reward("payoff", jnp.array([0.0, 1.0, 2.0])[arm])
        >>> posterior = bayesrl.fit(jax.random.key(0), bandit, beta=1.0, num_steps=500, progress=False)
        >>> found = bayesrl.evidence(jax.random.key(1), posterior, method="rejection")
        >>> truth = math.log((1 + math.e + math.e**2) / 3)
        >>> bool(found.log_evidence.conservative_lower < truth < found.log_evidence.conservative_upper)
        True

    References:
        Grosse, Ghahramani & Adams (2015), "Sandwiching the marginal likelihood using bidirectional
        Monte Carlo"; Burda, Grosse & Salakhutdinov (2016), equation 8, for the bound from below.
    """
    fit = full_data_fit(posterior, *new_args)
    chosen = Chosen.of(fit.settings)
    if chosen is not None:
        chosen.refuse(fit._programs_for().structure, method)
    elif method == "dual":
        raise EngineError("method='dual' is of fits with another regulariser than KL; use method='auto'")
    best_of = fit.settings.get("best_of_n")
    if best_of is not None and (optimum is not None or method not in ("auto", "enumeration")):
        option = "optimum=" if optimum is not None else f"method={method!r}"
        raise EngineError(f"{option} is of p*. {distils(best_of)} Leave it out")
    search = _Search(method, reward_bound, num_samples, max_count, fit.beta, chosen, twist, best_of, exact_draws)
    rows = []
    for i, (beta, one) in enumerate(_by_beta(fit)):
        own_key = fold_in(key, i)
        if optimum is not None:
            rows.append(bracket_by_known_optimum(own_key, one, beta, optimum, num_samples or MOST_DRAWS))
        elif caveat := out_of_reach(one):
            rows.append(estimate_evidence(own_key, one, beta, min(num_samples or MOST_DRAWS, DRAWS_PER_BATCH), caveat))
        elif fit.mixture is not None:
            rows.append(search.mixed(own_key, one, beta))
        else:
            rows.append(search.one(own_key, *frozen_fit(one), beta))
    # A fit's own draws belong to its own data, so they say nothing about other arguments.
    if not new_args:
        rows = [weigh_own_draws(row, posterior, i, chosen, search.target) for i, row in enumerate(rows)]
    return dataclasses.replace(
        Evidence.stack(rows, np.shape(fit.beta) if fit.beta is not None else ()),
        num_contexts=fit._programs_for().structure.num_contexts,
        target=search.target,
    )


@trace_cache()
def evaluate_fit(key: PRNGKey, posterior: Posterior, *new_args: Any, max_count: int = MAX_COUNT) -> Evidence:
    """Evaluate a fit without a search for its optimum: exactly if it can be enumerated, else J alone, from draws."""
    fit = full_data_fit(posterior, *new_args)
    structure, betas = fit._programs_for().structure, _by_beta(fit)
    own_key, metrics_key = split_keys(key)
    try:
        method: RequestedMethod = "enumeration" if "best_of_n" not in posterior.settings else "auto"
        found = evidence(own_key, posterior, *new_args, method=method, max_count=max_count)
    except EngineError as error:
        caveat = str(error).partition(";")[0]
        num = int(np.clip(_DRAWN_NUMBERS // (structure.width * len(betas)), LEAST_DRAWS, 20_000))
        num = min(num, most_draws(None, fit._programs_for()) // 2)
        rows = [estimate_evidence(fold_in(own_key, i), one, beta, num, caveat) for i, (beta, one) in enumerate(betas)]
        found = Evidence.stack(rows, np.shape(fit.beta) if fit.beta is not None else ())
    return dataclasses.replace(found, num_contexts=structure.num_contexts, metrics=estimate_metrics(metrics_key, fit))


def estimate_metrics(key: PRNGKey, posterior: Posterior) -> dict[str, Estimate]:
    """Estimate the deterministic sites of a fit with nothing left to select, [*beta]; empty if it has none."""
    structure = posterior._programs_for().structure
    if not structure.names("metric"):
        return {}
    shape = np.shape(posterior.beta) if posterior.beta is not None else ()
    num = int(np.clip(_DRAWN_NUMBERS // (4 * structure.width * max(math.prod(shape), 1)), LEAST_DRAWS, 4_000))
    num = min(num, most_draws(None, posterior._programs_for()) // 4)
    found = posterior.estimate(key, num).metrics
    return jax.tree.map(lambda x: np.asarray(x, float).reshape(shape), found)


def _by_beta(fit: Posterior) -> list[tuple[float | None, Posterior]]:
    """Return the fit at each temperature."""
    if fit.beta is None:
        return [(None, fit)]
    return [(float(beta), fit.select(beta=float(beta))) for beta in np.atleast_1d(fit.beta)]


class _Search:
    """How hard to search for the optimum, and with which methods.

    Attributes:
        target: p* at every β, once enumerated; stays None for trained policies, which have one p* each.
    """

    def __init__(
        self,
        method: RequestedMethod,
        reward_bound: float | None,
        num_samples: int | None,
        max_count: int,
        beta: Any,
        chosen: Chosen | None = None,
        twist: Any = None,
        best_of: int | None = None,
        exact_draws: ExactDraws | None = None,
    ) -> None:
        if exact_draws is not None and (np.size(beta) > 1 or chosen is not None):
            raise EngineError("exact_draws are of one p*: that of KL, at one temperature; use select(beta=...)")
        self.method, self.reward_bound, self.beta, self.chosen, self.twist = method, reward_bound, beta, chosen, twist
        self.best_of = best_of
        self.exact_draws = exact_draws
        self.num_samples, self.max_count = num_samples, max_count
        self.target: WeightedDraws | None = None
        self._unreachable = ""

    def one(self, key: PRNGKey, programs: Programs, params: Params, trained: bool, beta: float | None) -> Evidence:
        """Bracket one fit."""
        structure = programs.structure
        if self.chosen is not None and beta is not None:
            return self._regularized(key, programs, params, beta, self.chosen)
        if self.best_of is not None and beta is not None:
            return self._best_of_n(key, programs, params, beta, self.best_of)
        if self.exact_draws is not None:
            check_exact_draws(structure, self.exact_draws)
        nature = structure.names("environment")
        if nature and self.method in ("rejection", "importance", "nuts", "smc"):
            raise EngineError(
                f"method={self.method!r} would tilt environment site {nature[0]!r}, which is nature's; "
                "use method='auto', 'enumeration' or 'hindsight'"
            )
        if nature and is_conditioned(structure):
            raise EngineError(
                f"environment site {nature[0]!r} stands beside data {structure.names('observed')[0]!r}, of which no "
                "p(y) is defined, so J is not either; put what the data say into the prior, or make nature an "
                "ordinary site"
            )
        if self.method in ("auto", "enumeration"):
            try:
                target = self._enumerate(programs, params, beta, trained=trained)
            except EngineError:
                if self.method == "enumeration":
                    raise
            else:
                num = most_draws(self.num_samples, programs)
                return bracket_by_enumeration(key, programs, params, beta, target, self.max_count, num)
        if nature:
            return bracket_by_hindsight(
                key, programs, params, beta, most_draws(self.num_samples, programs), self.max_count
            )
        return self._without_sums(key, programs, params, beta)

    def _without_sums(self, key: PRNGKey, programs: Programs, params: Params, beta: float | None) -> Evidence:
        """Bracket one fit by draws, by particles or by NUTS.

        The first draws decide for particles or for more draws; see `needs_particles`. The bracket is then of draws
        that played no part in the choice, so nothing of its level is lost. NUTS is right only asymptotically, so it
        comes last: it confirms good weights.
        """
        structure = programs.structure
        num = most_draws(self.num_samples, programs)

        def draw(own_key: PRNGKey) -> Callable[[int], MixtureSample]:
            return lambda count: draw_mixture_sample(own_key, programs, params, count)

        continuous = not any(structure[name].discrete for name in structure.actions)
        undecided = self.method in ("auto", "smc")
        found, sampled = self._sampled(programs, beta, draw(key), min(num, FIRST_DRAWS) if undecided else num)
        ready = needs_particles(found, sampled, num, continuous=continuous, has_draws=self.exact_draws is not None)
        if self.method == "smc" or (self.method == "auto" and ready):
            bounds = find_bounds(programs, beta, self.reward_bound)
            try:
                own, steps = fold_in(key, 2), MOST_TEMPERATURES if self.method == "smc" else FEW_TEMPERATURES
                most = self.num_samples
                return bracket_by_particles(
                    own, programs, params, beta, found, sampled, bounds, most, self.twist, self.exact_draws, steps
                )
            except EngineError:
                if self.method == "smc":
                    raise
        if self.method == "auto" and not is_sharp(found) and num > FIRST_DRAWS:
            # Fresh draws: those that decided for this method would not judge it fairly.
            found, sampled = self._sampled(programs, beta, draw(fold_in(key, 3)), num)
        if self.method == "nuts" or (self.method == "auto" and found.upper is None and continuous):
            found, _ = bracket_by_nuts(fold_in(key, 1), programs, params, beta, found, sampled)
        return found

    def _regularized(self, key: PRNGKey, programs: Programs, params: Params, beta: float, chosen: Chosen) -> Evidence:
        """Bracket one fit with another regulariser than KL."""
        target = None
        if self.method != "dual":
            try:
                target = self._enumerate(programs, params, beta, trained=False)
                return bracket_regularized_exactly(programs, params, beta, target, self.max_count, chosen)
            except EngineError:
                if target is None and self.method == "enumeration":
                    raise
        found = self._dual(programs, beta, lambda num: draw_mixture_sample(key, programs, params, num), chosen)
        return found if target is None else known_optimum(found, target)

    def _best_of_n(self, key: PRNGKey, programs: Programs, params: Params, beta: float, n: int) -> Evidence:
        """Tell how far one fit is from the law of the best of n draws."""
        try:
            found = bracket_best_of_n(programs, params, beta, self.max_count, n)
            if self.target is None:
                self.target = enumerate_target(programs, params, self.beta, self.max_count, best_of=n)
        except EngineError:
            if self.method == "enumeration":
                raise
            num = min(most_draws(self.num_samples, programs), _OF_BEST)
            return estimate_best_of_n(draw_mixture_sample(key, programs, params, num), beta, n)
        return found

    def _dual(self, programs: Programs, beta: float, draw: Callable[[int], MixtureSample], chosen: Chosen) -> Evidence:
        bounds = find_bounds(programs, beta, self.reward_bound)
        num = most_draws(self.num_samples, programs)
        return bracket_by_dual(programs.structure, beta, draw, num, bounds, chosen)

    def _enumerate(self, programs: Programs, params: Params, beta: float | None, *, trained: bool) -> WeightedDraws:
        """Enumerate p*: at all temperatures at once, or at one if the policy was trained at each."""
        if trained:
            return enumerate_target(programs, params, beta, self.max_count)
        # One attempt covers all β, so a failed one need not be repeated at the next.
        if self._unreachable:
            raise EngineError(self._unreachable)
        if self.target is None:
            try:
                other = {} if self.chosen is None else self.chosen.told
                self.target = enumerate_target(programs, params, self.beta, self.max_count, **other)
            except EngineError as error:
                self._unreachable = str(error)
                raise
        target = self.target if beta is None else self.target.select(beta)
        assert target is not None
        return target

    def mixed(self, key: PRNGKey, one: Posterior, beta: float | None) -> Evidence:
        """Bracket a mixture of restarts, from its draws."""
        programs = one._programs_for()
        if self.best_of is not None and beta is not None:
            num = min(most_draws(self.num_samples, programs), _OF_BEST)
            return estimate_best_of_n(draw_restart_mixture_sample(key, one, num), beta, self.best_of)
        nature = programs.structure.names("environment")
        if nature or self.method in ("enumeration", "nuts", "smc", "hindsight"):
            what = f"with environment site {nature[0]!r}" if nature else f"by method={self.method!r}"
            raise EngineError(
                f"a mixture of restarts cannot be bracketed {what}; use select(restart='best'), or method='rejection'"
            )
        if self.chosen is not None and beta is not None:
            return self._dual(programs, beta, lambda num: draw_restart_mixture_sample(key, one, num), self.chosen)
        num = most_draws(self.num_samples, programs)
        return self._sampled(programs, beta, lambda count: draw_restart_mixture_sample(key, one, count), num)[0]

    def _sampled(
        self, programs: Programs, beta: float | None, draw: Callable[[int], MixtureSample], num: int
    ) -> tuple[Evidence, TemperedSample]:
        """Bracket from draws; importance sampling and NUTS do not bound log Z from above here."""
        bounds = Bounds() if self.method in ("importance", "nuts") else find_bounds(programs, beta, self.reward_bound)
        found, sampled = bracket_by_sampling(programs, beta, draw, num, bounds)
        if self.method == "rejection" and found.upper is None:
            rewards = list(programs.structure.names("reward"))
            raise EngineError(
                f"rejection needs an upper bound of the rewards {rewards}, and none is proven; pass reward_bound=..."
            )
        return found, sampled

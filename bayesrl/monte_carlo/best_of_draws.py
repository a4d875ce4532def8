"""Best of n: draws, law, reward and KL of the policy that keeps the best of n draws of the prior."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from bayesrl.argument_types import Requirement
from bayesrl.arguments import MOST, Count, CountOrZero, Untraced, check_memory, checked
from bayesrl.compilation.jit import closure_jit, trace_cache
from bayesrl.compilation.random_keys import fold_in, split_keys
from bayesrl.core.programs import Programs
from bayesrl.core.structure import Structure
from bayesrl.core.validation import find_interacting, refuse_interacting
from bayesrl.display.formatting import estimate_at, format_estimate, format_number
from bayesrl.display.tables import Displayable, DisplayBlock, Line, Table
from bayesrl.errors import EngineError
from bayesrl.exact.backward_induction import ProgramStage, inverse_cdf
from bayesrl.exact.enumeration import exact_metrics
from bayesrl.exact.grid import Axis, digits, path_axes, scatter
from bayesrl.exact.tabulation import check_grid_size, enumerate_paths, freeze_program
from bayesrl.exact.weighted_draws import (
    context_axes,
    evaluate_metrics,
    gather_by_context,
    mean_estimate,
    numpy_generator,
    shared_sites,
)
from bayesrl.monte_carlo.proposals import refuse_bad_rewards
from bayesrl.posterior.sampling import draw_fit
from bayesrl.statistics.best_of_n_law import (
    best_of_n_kl_bound,
    best_of_n_law,
    estimated_law,
    kl_at_reward,
    rank_rewards,
    reward_at_kl,
)
from bayesrl.statistics.estimates import Estimate, InfluenceEstimate
from bayesrl.typing import Numbers, PRNGKey, Program

_ELEMENTS = 2**22


def _are_counts(value: Any) -> bool:
    try:
        array = np.asarray(value)
    except (TypeError, ValueError):
        return False
    whole = array.ndim <= 1 and array.size > 0 and np.issubdtype(array.dtype, np.integer)
    return bool(whole and (array >= 1).all() and (array <= MOST).all())


type Counts = Annotated[
    Any, Requirement("a whole number of at least 1, or a sequence of such numbers", _are_counts, any_type=True)
]
"""One count, or several."""


@checked(EngineError)
@dataclass(frozen=True, repr=False)
class BestOfDraws(Displayable):
    """The policy that draws n times from the prior and keeps the best by reward, per context: see `best_of`.

    Attributes:
        n: numbers of draws to choose from, [*n].
        sites: exact, independent draws of the policy, [*n, num_samples, ...].
        reward: E[R], averaged over contexts, [*n], reward units.
        kl: KL to the prior, averaged over contexts, [*n], nats; exact if `log_probs` is there.
        kl_bound: log n − (n − 1)/n, [*n], nats, which KL never exceeds.
        best_reward: the greatest E[R] at this KL, [*n], reward units: that of p* at `beta`.
        beta: the temperature at which p* has this KL, [*n], reward units per nat; inf where KL is 0.
        least_kl: the least KL at this E[R], [*n], nats: that of p* at `reward_beta`.
        reward_beta: the temperature at which p* has this E[R], [*n], reward units per nat; inf for E[R] of the prior.
        metrics: means of the deterministic sites, by name, [*n].
        support: every value of the latent sites of a finite program, [assignments, ...]; otherwise empty.
        log_probs: log-probability of each of them, [*n, assignments, *contexts], nats; None if not finite.
        structure: structure of the policy.

    Example:
        >>> import jax, jax.numpy as jnp, numpyro, numpyro.distributions as dist, bayesrl
        >>> def coin():
        ...     bayesrl.reward("heads", 1.0 * numpyro.sample("side", dist.Bernoulli(0.5)))
        >>> found = bayesrl.best_of(jax.random.key(0), coin, n=[1, 2, 3])
        >>> found.reward.mean.tolist(), found.kl_bound.round(3).tolist()
        ([0.5, 0.75, 0.875], [0.0, 0.193, 0.432])
    """

    n: Int[np.ndarray, "*n"]
    sites: dict[str, Numbers]
    reward: Estimate
    kl: Estimate
    kl_bound: Float[np.ndarray, "*n"]
    best_reward: Estimate
    beta: Float[np.ndarray, "*n"]
    least_kl: Estimate
    reward_beta: Float[np.ndarray, "*n"]
    metrics: dict[str, Estimate]
    support: dict[str, Numbers]
    log_probs: Float[np.ndarray, "..."] | None
    structure: Structure = field(repr=False)

    def table(self) -> Table:
        """One row per n: E[R], KL and its bound; the best E[R] at that KL, the least KL at that E[R], and their β."""
        parts = (self.reward, self.kl, self.best_reward, self.least_kl)
        rows = []
        for i, n in enumerate(self.n.reshape(-1)):
            flat = [estimate_at(Estimate(*(np.reshape(x, -1) for x in part)), i) for part in parts]
            reward, kl, best, least = map(format_estimate, flat)
            known = (self.kl_bound, self.beta, self.reward_beta)
            bound, beta, other = (format_number(float(part.reshape(-1)[i])) for part in known)
            rows.append((str(n), reward, kl, bound, best, beta, least, other))
        own = ("best E[R] at this KL", "β of this KL", "least KL at this E[R]", "β of this E[R]")
        return Table(("n", "its E[R]", "its KL", "KL at most", *own), rows)

    def _blocks(self) -> Sequence[DisplayBlock]:
        made = "by sums over all values" if self.log_probs is not None else "from draws"
        return (Line(f"The best of n draws of the prior, {made}:"), self.table())


@checked(EngineError, Untraced("call it outside: it compiles its own programs"))
@trace_cache()
def best_of(
    key: PRNGKey,
    policy: Program,
    *args: Any,
    n: Counts,
    num_samples: Count = 1000,
    max_count: CountOrZero = 2**20,
) -> BestOfDraws:
    """Draw from the policy that keeps the best of n draws of the prior by total reward, per context.

    With F(r) = π₀(R ≤ r), its law is exact:

        pₙ(x) = π₀(x)·(F(R(x))ⁿ − F(R(x)⁻)ⁿ) / (F(R(x)) − F(R(x)⁻)),

    as equally good draws are chosen among at random. KL(pₙ‖π₀) ≤ log n − (n − 1)/n, with equality where no two
    draws have the same reward. `best_reward` and `beta` compare with the frontier of p* over β: what the best
    policy earns at the same KL. Rewards are equally good if the program's own arithmetic makes them equal.

    Args:
        key: consumed whole.
        policy: the program; a fitted `posterior.policy` is one too.
        *args: arguments of the program.
        n: number of draws to choose from, or a sequence of numbers, [*n]. All share the same draws of the prior.
        num_samples: number of draws of pₙ to make in each context.
        max_count: largest number of assignments to sum over. A finite program with at most as many has exact numbers,
            and its draws cost the same at every n. Otherwise num_samples × max(n) draws of the prior are made, and all
            of them serve the estimates: E[R] is unbiased, KL and `best_reward` have biases of order n/draws.

    Returns:
        `BestOfDraws`.

    Raises:
        EngineError: n is not a whole number of at least 1; there are environment or observed sites; a plate is
            subsampled; or contexts share a site.
        PolicyError: the program has no rewards, a reward is NaN or +inf, or contexts read each other's draws.

    Example:
        >>> import jax, jax.numpy as jnp, numpyro, numpyro.distributions as dist, bayesrl
        >>> def bandit():
        ...     arm = numpyro.sample("arm", dist.Categorical(logits=jnp.zeros(5)))
        ...     bayesrl.reward("payoff", jnp.array([0.1, 0.3, 0.5, 0.7, 0.9])[arm])
        >>> found = bayesrl.best_of(jax.random.key(0), bandit, n=[2, 4], num_samples=3)
        >>> found.reward.mean.round(4).tolist(), found.kl.mean.round(4).tolist(), found.sites["arm"].shape
        ([0.66, 0.7867], [0.1801, 0.6067], (2, 3))

    References:
        Beirami et al. (2024), "Theoretical guarantees on the best-of-n alignment policy", theorems 1 and 2;
        Chen et al. (2021), "Evaluating large language models trained on code", equation 1, for unbiased estimates.
    """
    program = freeze_program(policy, args, None, ranks_by_reward=True)
    _refuse(program)
    numbers = np.asarray(n, int)
    table = _tabulate(program, max_count)
    draw_key, choose_key = split_keys(key)
    if table is not None:
        return _from_table(choose_key, program, table, numbers, num_samples)
    return _from_draws(draw_key, program, numbers, num_samples)


def _refuse(program: Programs) -> None:
    structure = program.structure
    nature, observed, shared = structure.names("environment"), structure.names("observed"), shared_sites(structure)
    if nature:
        raise EngineError(
            f"the best of n draws would choose among draws of environment site {nature[0]!r}, which is nature's, so no "
            "policy earns what it earns; use bayesrl.fit(...), or make the site an ordinary one if it can be chosen"
        )
    if observed:
        raise EngineError(
            f"site {observed[0]!r} is observed, and the best of n needs draws of the prior given the data; "
            "fit the data first and pass posterior.policy"
        )
    if shared:
        raise EngineError(
            f"contexts share site {shared[0]!r}, so they cannot choose each for itself; "
            "put the site inside the context plate"
        )


# ---- finite programs -------------------------------------------------------------------------


class _Table(NamedTuple):
    axes: tuple[Axis, ...]
    stage: ProgramStage


def _tabulate(program: Programs, max_count: int) -> _Table | None:
    """Tabulate all assignments; None if there are too many or infinitely many."""
    try:
        axes = path_axes(program.structure)
        check_grid_size(axes, program.structure, max_count)
    except EngineError:
        return None
    return _Table(axes, enumerate_paths(program, {}, axes).stage)


def _from_table(key: PRNGKey, program: Programs, table: _Table, n: np.ndarray, num_samples: int) -> BestOfDraws:
    structure, (axes, stage) = program.structure, table
    exact = exact_metrics(program, {}, [stage])
    log_prior, reward = stage.log_prob("action")[0], stage.reward[0]
    num, contexts = reward.shape
    shape = structure.context_shape
    ranks = rank_rewards(reward)
    rng = numpy_generator(key)
    laws = [best_of_n_law(log_prior, ranks, int(k)) for k in n.reshape(-1)]
    log_probs = [log_prior + law.log_ratio for law in laws]
    chosen = []
    for log_prob in log_probs:
        index = np.stack([inverse_cdf(log_prob[:, c], rng.random(num_samples)) for c in range(contexts)], 1)
        chosen.append(scatter(axes, digits(axes, index), shape))
    known = {
        name: [(np.exp(p) * stage.metrics.get(name, np.zeros_like(stage.reward))[0]).sum(0).mean() for p in log_probs]
        for name in exact
    }
    rows = [np.broadcast_to(digit[:, None], (num, contexts)) for digit in digits(axes, np.arange(num))]
    return _result(
        program,
        n,
        chosen,
        [(_known(law.reward), _known(law.kl)) for law in laws],
        (log_prior, reward),
        {name: Estimate(np.reshape(v, n.shape), np.zeros(n.shape)) for name, v in known.items()},
        support=scatter(axes, rows, shape),
        log_probs=np.stack(log_probs).reshape(*n.shape, num, *shape),
    )


def _known(mean: np.ndarray) -> InfluenceEstimate:
    """Make an estimate that no draw moves."""
    return InfluenceEstimate(mean, np.zeros((0, len(mean))))


# ---- draws -----------------------------------------------------------------------------------


def _from_draws(key: PRNGKey, program: Programs, n: np.ndarray, num_samples: int) -> BestOfDraws:
    structure, most = program.structure, int(n.max())
    if structure.num_contexts > 1:
        mixing = closure_jit(lambda key: find_interacting(key, program, {}))
        # Batches count from 0 and never come to this number.
        refuse_interacting(mixing(fold_in(key, MOST)))
    contexts = int(np.prod(structure.context_shape, dtype=int))
    structure.check_memory(num_samples * n.size + most, EngineError)
    pooled = num_samples * most
    what = f"the rewards of {num_samples:,} × {most:,} draws in {contexts:,} contexts"
    check_memory(24.0 * pooled * contexts, what, "ask for fewer draws, or a smaller n", EngineError)
    groups = max(1, min(num_samples, _ELEMENTS // (structure.width * most)))
    axes = context_axes(structure)
    pool, chosen = [], list[list[dict[str, Numbers]]]()
    for part, start in enumerate(range(0, num_samples, groups)):
        count = min(groups, num_samples - start)
        draws, totals = draw_fit(fold_in(key, part), program, {}, count * most)
        refuse_bad_rewards(draws.rewards)
        reward = np.asarray(totals.reward, float).reshape(count, most, contexts)
        pool.append(reward.reshape(-1, contexts))
        starts = most * np.arange(count)[:, None]
        # Draws are exchangeable, so the first of those that are equally good is one of them at random.
        best = [starts + reward[:, :k].argmax(1) for k in n.reshape(-1)]
        chosen.append(
            [
                {
                    name: gather_by_context(value, index, axes[name], structure.context_shape)
                    for name, value in draws.sites.items()
                }
                for index in best
            ]
        )
    rewards = np.concatenate(pool)
    ranks = rank_rewards(rewards)
    sites = [jax.tree.map(lambda *parts: np.concatenate(parts), *lane) for lane in zip(*chosen, strict=True)]
    found = []
    for k in n.reshape(-1).tolist():
        mean, kl = estimated_law(ranks, k)
        # Where no rewards are equal KL is at its bound, and the estimate a little above.
        found.append((mean, InfluenceEstimate(np.minimum(kl.mean, best_of_n_kl_bound(np.asarray(k))), kl.influence)))
    # The pool stands for the prior: each of its draws has the same mass.
    return _result(program, n, sites, found, (np.full_like(rewards, -np.log(pooled)), rewards), {})


# ---- the result ------------------------------------------------------------------------------


def _result(
    program: Programs,
    n: np.ndarray,
    chosen: Sequence[dict[str, Any]],
    found: Sequence[tuple[InfluenceEstimate, InfluenceEstimate]],
    prior: tuple[np.ndarray, np.ndarray],
    metrics: dict[str, Estimate],
    *,
    support: dict[str, Numbers] | None = None,
    log_probs: np.ndarray | None = None,
) -> BestOfDraws:
    means = [(reward.over_contexts(), kl.over_contexts()) for reward, kl in found]
    best = [reward_at_kl(*prior, kl) for _, kl in means]
    least = [kl_at_reward(*prior, reward) for reward, _ in means]

    def stacked(values: Sequence[InfluenceEstimate]) -> Estimate:
        with np.errstate(invalid="ignore"):  # a reward of −∞ has a mean and no standard error
            # Sums over all values have no draws, and one draw has no spread.
            few = {0: np.zeros(()), 1: np.full((), np.nan)}
            errors = [few[num] if (num := len(value.influence)) in few else value.se for value in values]
        return Estimate(np.stack([value.mean for value in values]).reshape(n.shape), np.stack(errors).reshape(n.shape))

    rest = [name for name in program.structure.names("metric") if name not in metrics]
    drawn = [evaluate_metrics(program, rest, lane) for lane in chosen] if rest else []
    return BestOfDraws(
        n=n,
        sites={
            name: jnp.stack([jnp.asarray(lane[name]) for lane in chosen]).reshape(*n.shape, *chosen[0][name].shape)
            for name in chosen[0]
        },
        reward=stacked([reward for reward, _ in means]),
        kl=stacked([kl for _, kl in means]),
        kl_bound=best_of_n_kl_bound(n),
        best_reward=stacked([reward for _, reward in best]),
        beta=np.stack([np.asarray(beta) for beta, _ in best]).reshape(n.shape),
        least_kl=stacked([kl for _, kl in least]),
        reward_beta=np.stack([np.asarray(beta) for beta, _ in least]).reshape(n.shape),
        metrics=metrics | {name: mean_estimate([lane[name] for lane in drawn], n.shape) for name in rest},
        support=support or {},
        log_probs=log_probs,
        structure=program.structure,
    )

"""Distillation of the best of n: forward KL to the law of the best of n draws of the prior."""

from dataclasses import dataclass, replace
from typing import Any, Never

import jax
import jax.numpy as jnp
from jax import Array, lax

from bayesrl.arguments import Count, checked
from bayesrl.core.draws import Draws, total
from bayesrl.core.handlers import stop_gradient
from bayesrl.core.programs import Programs
from bayesrl.errors import ObjectiveError
from bayesrl.objectives.base import Info, Objective, draws_of_its_own, info_from_draws
from bayesrl.statistics.best_of_n_law import subset_shares
from bayesrl.typing import Params, PRNGKey


@checked(ObjectiveError)
@dataclass(frozen=True)
class BestOfN(Objective):
    """Fit the policy to the best of n draws of the prior: minimise KL(pₙ‖q) = E_pₙ[log pₙ − log q].

    Every draw x of the prior is weighted by the chance w(x) that it is the best of n, ties at random, among all
    subsets of n of this step's draws. So each step learns from all subsets, and Σ w·∇log q is an unbiased estimate of
    E_pₙ[∇log q]. As E_q[∇log q] = 0, the mean of q/π₀·∇log q is taken off as a control variate: with
    N = `num_particles`, the gradient is −Σ (w − (1/N)·q/π₀)·∇log q.

    The target does not depend on β, which only enters the J that the fit reports. `bayesrl.best_of` tells the β at
    which p* has the same KL as pₙ, and what pₙ loses to it.

    Args:
        n: number of draws to choose from.
        num_particles: draws of the prior per step and context, at least n.

    Raises:
        ObjectiveError: num_particles is below n; on use, if the policy has environment sites, observed sites or no
            rewards.

    Example:
        >>> import jax, jax.numpy as jnp, numpyro, numpyro.distributions as dist, bayesrl
        >>> def bandit():
        ...     arm = numpyro.sample("arm", dist.Categorical(logits=jnp.zeros(5)))
        ...     bayesrl.reward("payoff", jnp.array([0.1, 0.3, 0.5, 0.7, 0.9])[arm])
        >>> posterior = bayesrl.fit(
        ...     jax.random.key(0), bandit, beta=0.1, objective=bayesrl.objectives.BestOfN(n=4), progress=False
        ... )
        >>> bool(abs(posterior.estimate(jax.random.key(1), 10_000).reward.mean - 0.78672) < 0.02)
        True

    References:
        Gui, Gârbacea & Veitch (2024), "BoNBoN alignment for large language models and the sweetness of best-of-n
        sampling", section 4.
    """

    n: Count = 4
    num_particles: Count = 256

    def __post_init__(self) -> None:
        if self.num_particles < self.n:
            raise ObjectiveError(
                f"BestOfN got num_particles={self.num_particles}, from which no {self.n} can be drawn; "
                f"use num_particles of at least n={self.n}"
            )

    def for_source(self, source: Any) -> Never:
        """Refuse draws of a source; see `Objective.for_source`."""
        raise draws_of_its_own("BestOfN", "ranks draws of the prior")

    @property
    def told(self) -> dict[str, Any]:
        """Settings of a fit that say what it aims at."""
        return {"best_of_n": self.n}

    def prepare(self, key: PRNGKey, programs: Programs, params: Params) -> "BestOfN":
        """Refuse programs without a best draw; see `Objective.prepare`."""
        structure = programs.structure
        nature, observed = structure.names("environment"), structure.names("observed")
        if nature:
            raise ObjectiveError(
                f"BestOfN would choose among draws of environment site {nature[0]!r}, which is nature's; "
                "use ReverseKL()"
            )
        if observed:
            raise ObjectiveError(
                f"site {observed[0]!r} is observed, and BestOfN needs draws of the prior given the data; "
                "fit the data first and pass posterior.policy"
            )
        if not structure.names("reward"):
            raise ObjectiveError(
                "the policy has no reward site to rank its draws by; "
                "add bayesrl.reward(name, value), or use ReverseKL()"
            )
        return self

    def draw(self, key: PRNGKey, params: Params, programs: Programs) -> Draws:
        """Draw from the prior, and score under the guide too, [particles, ...]; no gradients."""
        return stop_gradient(programs.score(params, replace(programs, guide=None).draw(key, {}, self.num_particles)))

    def surrogate(self, params: Params, draws: Draws, programs: Programs, beta: Any) -> tuple[Array, Info]:
        """Estimate KL(pₙ‖q) per context; see `Objective.surrogate`."""
        shape = (self.num_particles, *programs.structure.context_shape)
        totals = lax.stop_gradient(draws.totals(shape))
        weight = self._chances(totals.reward)
        log_q = total(programs.log_q(params, draws), shape)
        moved = log_q - lax.stop_gradient(log_q)
        gap = jnp.where(weight > 0, jnp.log(self.num_particles * weight) + totals.ratio - moved, 0.0)
        # 0 with the gradient E_q[∇log q], whose mean is 0: a control variate.
        share = jnp.exp(-totals.ratio)
        control = jnp.where(share > 0, share * moved, 0.0).mean(0)
        loss = (weight * gap).sum(0) + control
        # J, E[R] and KL of q, from the same draws.
        own = jax.nn.softmax(-totals.ratio, axis=0)
        by_branch = jax.tree.map(lambda x: x[None], draws)
        return loss.mean(), info_from_draws(by_branch, programs, beta, (1, *shape), own[None])

    def _chances(self, reward: Array) -> Array:
        """Return the chance of each draw to be the best of a random subset of n, [particles, *contexts]."""
        shares = jnp.asarray(subset_shares(self.num_particles, self.n), float)
        flat = reward.reshape(self.num_particles, -1)

        def one(values: Array) -> Array:
            ordered = jnp.sort(values)
            # Draws of equal reward share the chance that one of them is the best.
            below, upto = (jnp.searchsorted(ordered, values, side=side) for side in ("left", "right"))
            return (shares[upto] - shares[below]) / (upto - below)

        return jax.vmap(one, 1, 1)(flat).reshape(reward.shape)

"""Forward KL by self-normalised weights: it covers modes, allows rewards of −inf, and has no noise at the optimum."""

from dataclasses import dataclass, replace
from typing import Annotated, Any, Never

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.scipy.special import logsumexp

from bayesrl.arguments import CountAboveOne, checked, real_range
from bayesrl.core.draws import Draws, total
from bayesrl.core.handlers import stop_gradient
from bayesrl.core.programs import Programs
from bayesrl.errors import ObjectiveError
from bayesrl.objectives.base import Info, Objective, count_nonfinite, draws_of_its_own, info_from_draws
from bayesrl.typing import Params, PRNGKey


@checked(ObjectiveError)
@dataclass(frozen=True)
class ForwardKL(Objective):
    """Minimise KL(p*‖q) = E_p*[log p* − log q] by self-normalised importance weights.

    Draws come from a mixture of the guide and the prior, weighted by p̂ / mixture and normalised per
    context (wake-phase φ update, Bornschein & Bengio 2015, eq. 13). With w̄ those weights and ū the
    weights q / mixture, normalised in the same way, the gradient is −Σ (w̄ − ū) ∇log q: E_q[∇log q] = 0
    makes Σ ū ∇log q a control variate, and at q = p* both noise and bias vanish, because w̄ = ū there.
    Away from it, the estimate is biased at small `num_particles`; the metric `ess` in the history
    is the effective share of draws.

    Args:
        num_particles: draws per step and context.
        prior_fraction: share of the draws that come from the prior, so that the fit still finds modes
            which the guide has left.

    Raises:
        ObjectiveError: on use, if the policy has environment sites, because the weights would tilt their draws.

    Example:
        >>> import bayesrl
        >>> bayesrl.objectives.ForwardKL(num_particles=512).prior_fraction
        0.5
    """

    num_particles: CountAboveOne = 256
    prior_fraction: Annotated[float, real_range(0, below=1)] = 0.5

    @property
    def _split(self) -> tuple[int, int]:
        from_prior = min(round(self.prior_fraction * self.num_particles), self.num_particles - 1)
        return self.num_particles - from_prior, from_prior

    @property
    def refuses_impossible(self) -> str:
        """Why rewards of −inf are refused: they are not."""
        return ""

    def for_source(self, source: Any) -> Never:
        """Refuse draws of a source; see `Objective.for_source`."""
        raise draws_of_its_own("ForwardKL", "weighs draws of a mixture of guide and prior")

    def prepare(self, key: PRNGKey, programs: Programs, params: Params) -> "ForwardKL":
        """Refuse environment sites; see `Objective.prepare`."""
        nature = programs.structure.names("environment")
        if nature:
            raise ObjectiveError(
                f"ForwardKL would tilt environment site {nature[0]!r}, which is nature's; use ReverseKL()"
            )
        return self

    def draw(self, key: PRNGKey, params: Params, programs: Programs) -> Draws:
        """Draw from the guide first, then from the prior, [particles, ...]; no gradients."""
        return draw_with_prior(key, params, programs, *self._split)

    def surrogate(self, params: Params, draws: Draws, programs: Programs, beta: Any) -> tuple[Array, Info]:
        """Estimate KL(p*‖q) per context; see `Objective.surrogate`."""
        from_guide, _ = self._split
        shape = (self.num_particles, *programs.structure.context_shape)
        totals = lax.stop_gradient(draws.totals(shape))
        tempered = totals.reward / beta + totals.log_likelihood
        of_prior, of_guide = relative_to_mixture(totals.ratio, *self._split)
        log_weight = tempered + of_prior
        weight = lax.stop_gradient(jax.nn.softmax(log_weight, axis=0))
        log_evidence = logsumexp(log_weight, axis=0) - jnp.log(self.num_particles)
        log_q = total(programs.log_q(params, draws), shape)
        moved = log_q - lax.stop_gradient(log_q)
        # A draw of weight 0 may have a reward of −inf, and 0 · inf would be nan.
        gap = jnp.where(weight > 0, tempered + totals.ratio - moved, 0.0)
        # 0 with the gradient Σ ū ∇log q, whose mean is 0: a control variate.
        share = lax.stop_gradient(jax.nn.softmax(of_guide, axis=0))
        control = (share * jnp.where(share > 0, moved, 0.0)).sum(0)
        loss = (weight * gap).sum(0) - log_evidence + control
        info = info_from_draws(jax.tree.map(lambda x: x[:from_guide], draws), programs, beta, (from_guide, *shape[1:]))
        ess = 1 / (weight**2).sum(0).mean() / self.num_particles
        return loss.mean(), info._replace(
            metrics={**info.metrics, "ess": ess}, nonfinite=count_nonfinite(draws, never=True)
        )


def draw_with_prior(key: PRNGKey, params: Params, programs: Programs, from_guide: int, from_prior: int) -> Draws:
    """Draw from the guide first, then from the prior, [particles, ...]; no gradients."""
    # Both parts use one key, so that they share their mini-batch.
    draws = programs.draw(key, params, from_guide)
    if from_prior:
        prior = replace(programs, guide=None).draw(key, {}, from_prior)
        prior = programs.score(params, prior) if draws.log_ratio else prior.scored(programs.log_q(params, prior))
        draws = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), draws, prior)
    return stop_gradient(draws)


def relative_to_mixture(ratio: Array, from_guide: int, from_prior: int) -> tuple[Array, Array]:
    """Return the logs of prior and guide, each relative to their mixture, nats.

    They come from the ratio log π₀ − log q alone: the two densities may be sums of huge terms that cancel.
    """
    shares = jnp.log(jnp.array([from_guide, from_prior]) / (from_guide + from_prior))
    return -jnp.logaddexp(shares[0] - ratio, shares[1]), -jnp.logaddexp(shares[0], shares[1] + ratio)

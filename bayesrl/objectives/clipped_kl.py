"""Reverse KL from draws of an earlier policy, with clipped ratios."""

from dataclasses import dataclass, replace
from typing import Any, Literal

import jax.numpy as jnp
from jax import Array, lax

from bayesrl.arguments import Positive, checked
from bayesrl.core.draws import Draws
from bayesrl.core.programs import Programs
from bayesrl.errors import ObjectiveError
from bayesrl.objectives.base import Info, info_from_draws
from bayesrl.objectives.gradient_plan import make_gradient_plan
from bayesrl.objectives.reverse_kl import ReverseKL, compute_advantages, log_weight_terms, replace_gradient, score_terms
from bayesrl.typing import Params, PRNGKey


@checked(ObjectiveError)
@dataclass(frozen=True)
class ClippedKL(ReverseKL):
    """Maximise J as `ReverseKL` does, from draws that serve several updates.

    With ρ_t the ratio of q to the policy that drew, and A_t the advantage of `ReverseKL`,

        gradient = E Σ_t ∇ min(ρ_t·A_t, clip(ρ_t, 1 − ε, 1 + ε)·A_t).

    For draws of the policy itself, ρ = 1, and this is the score-function gradient of `ReverseKL`. J, E[R] and KL in the
    history are of the policy that drew, which lags behind by the updates that its draws serve. The loss is the mean of
    −w of the current policy over these draws, and not an ELBO of either policy.

    Args:
        num_particles: draws per step and context, if the objective itself draws.
        clip: ε.
        ratio: of each time `step` separately, or of the whole `draw`, in which case ε counts per step.

    Raises:
        ObjectiveError: an option is out of range; on use, if a site has no score-function gradient.

    Example:
        >>> import bayesrl
        >>> bayesrl.objectives.ClippedKL(clip=0.1).ratio
        'step'

    References:
        Schulman, Wolski, Dhariwal, Radford & Klimov (2017), "Proximal policy optimization algorithms", equation 7;
        Zheng et al. (2025), "Group sequence policy optimization", equation 5, for ratios of whole draws.
    """

    clip: Positive = 0.2
    ratio: Literal["step", "draw"] = "step"

    def __post_init__(self) -> None:
        if self.estimator == "pathwise" or self.enumerated not in ("auto", ()):
            raise ObjectiveError(
                "ClippedKL takes gradients by scores alone; leave estimator and enumerated out, or use ReverseKL()"
            )

    def prepare(self, key: PRNGKey, programs: Programs, params: Params) -> "ClippedKL":
        """Choose the score-function gradient for every action; see `Objective.prepare`."""
        plan = make_gradient_plan(key, programs, params, self.num_particles, "score", self.baseline, ())
        return replace(self, plan=plan)

    def surrogate(self, params: Params, draws: Draws, programs: Programs, beta: Any) -> tuple[Array, Info]:
        """Return −ELBO per context, with the gradient described above; see `Objective.surrogate`."""
        plan = self._ready()
        costs = lax.stop_gradient(log_weight_terms(plan, params, draws, programs, beta))
        advantage = compute_advantages(costs, self.baseline)
        now = score_terms(plan, draws, programs.structure)
        then = score_terms(plan, draws._replace(scores=draws.log_behaviour), programs.structure)
        moved = now - lax.stop_gradient(then)
        if self.ratio == "draw":
            # Use the geometric mean over steps, so that clipping does not tighten for longer draws.
            counted = jnp.maximum((then != 0).sum(-1, keepdims=True), 1)
            mean = moved.sum(-1, keepdims=True) / counted
            # The value is that of the whole draw, and the gradient that of each step.
            moved = lax.stop_gradient(mean) + now - lax.stop_gradient(now)
        rho = jnp.exp(moved)
        clipped = jnp.clip(rho, 1 - self.clip, 1 + self.clip)
        gain = jnp.minimum(rho * advantage, clipped * advantage).sum(-1).mean()
        info = info_from_draws(draws, programs, beta, costs.shape[:-1])
        acted = then != 0  # leaves out events without an action: rewards, and positions after the end of a text
        outside = ((jnp.abs(rho - 1) > self.clip) & acted).sum() / jnp.maximum(acted.sum(), 1)
        metrics = {**info.metrics, "clipped": lax.stop_gradient(outside)}
        loss = replace_gradient(-costs.sum(-1).mean(), -gain)
        return loss, info._replace(metrics=metrics)

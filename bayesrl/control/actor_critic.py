"""`ActorCritic`: score-function gradients of J whose baseline is a learned value of the state."""

from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import Array, lax

from bayesrl.arguments import Count, Positive, UnitInterval, checked
from bayesrl.control.rollout import CONTINUE, VALUE, WEIGHT
from bayesrl.core.draws import Draws
from bayesrl.core.programs import Programs
from bayesrl.errors import ObjectiveError
from bayesrl.objectives.base import Info, Objective, info_from_draws
from bayesrl.typing import Params, PRNGKey


@checked(ObjectiveError)
@dataclass(frozen=True)
class ActorCritic(Objective):
    """Maximise J of a rollout; a learned value V of the observation assigns credit to each action.

    Let c_t = r_t + β·(log π₀ − log q)_t, where π₀ is the `reference`, g_t = γ·(1 − terminated_t), and ρ_t the
    ratio of q to the policy that drew a_t:

        δ_t = c_t + g_t·V_{t+1} − V_t,   A_t = δ_t + λ·g_t·min(1, ρ_{t+1})·A_{t+1},
        gradient = E Σ_t weight_t · ∇ min(ρ_t·A_t, clip(ρ_t, 1 − ε, 1 + ε)·A_t) / β,

    and V moves towards V_t + min(1, ρ_t)·A_t. If the guide itself drew the actions, ρ = 1 and the gradient is
    ∇log q·A. It is unbiased for λ = 1, whatever V is; λ < 1 brings in V's errors, but much less noise.
    Truncated episodes bootstrap with V; terminated ones do not.

    Args:
        num_particles: episodes per step.
        trace: λ, in [0, 1].
        clip: ε; None does not clip ratios.
        reference: the policy from which the KL is measured: the prior, or the policy that drew the batch, which makes
            each batch a step of mirror descent (a trust region of width 1/β). J is reported against the prior in both
            cases; the metric `update_kl` says how far each batch has moved the policy.
        step_weights: "discounted" weights, γᵗ, give the gradient of J, which all but ignores late steps of long
            episodes; "equal" weights learn from all steps alike, a bias that deep RL usually accepts. Recorded steps
            always have equal weights.

    Raises:
        ObjectiveError: on use, if the guide has no critic.

    Example:
        >>> from bayesrl import control
        >>> control.ActorCritic(trace=1.0).num_particles
        64

    References:
        Traces: Schulman, Moritz, Levine, Jordan & Abbeel (2016), equation 16. Clipping: Schulman et al. (2017),
        equation 7. Truncated ratios in traces: Espeholt et al. (2018), section 4.1. Weights of steps: Thomas (2014),
        "Bias in natural actor-critic algorithms".
    """

    num_particles: Count = 64
    trace: UnitInterval = 0.95
    clip: Positive | None = 0.2
    reference: Literal["prior", "previous"] = "prior"
    step_weights: Literal["discounted", "equal"] = "discounted"

    def prepare(self, key: PRNGKey, programs: Programs, params: Params) -> "ActorCritic":
        """Refuse guides without a critic; see `Objective.prepare`."""
        sites = programs.trace_guide(params).sites
        missing = [name for name in (VALUE, WEIGHT, CONTINUE) if name not in sites]
        if missing or programs.structure.actions != ("action",):
            raise ObjectiveError(
                "ActorCritic needs a bayesrl.control.Rollout and a guide that values its states "
                f"({missing[:1] or list(programs.structure.actions)}); use guide=NetworkPolicy() or TablePolicy(), "
                "or objective=ReverseKL()"
            )
        return self

    def draw(self, key: PRNGKey, params: Params, programs: Programs) -> Draws:
        """Draw episodes, [particles, ...]."""
        return programs.draw(key, params, self.num_particles, share=False, stopped=("action",))

    def surrogate(self, params: Params, draws: Draws, programs: Programs, beta: Any) -> tuple[Array, Info]:
        """Compute −J/β with the gradient described above, and the critic's loss; see `Objective.surrogate`."""
        value, weight, go_on = (draws.guide_metrics[name] for name in (VALUE, WEIGHT, CONTINUE))
        ratio = jnp.exp(draws.scores["action"] - lax.stop_gradient(draws.log_behaviour["action"]))
        counts = (weight > 0).astype(value.dtype)
        kept = lax.stop_gradient(jnp.minimum(ratio, 1.0)) * counts
        advantage = self._advantages(self._costs(draws, beta, weight), lax.stop_gradient(value), go_on, kept, counts)
        target = lax.stop_gradient(value) + kept * advantage
        clipped = ratio if self.clip is None else jnp.clip(ratio, 1.0 - self.clip, 1.0 + self.clip)
        pull = weight if self.step_weights == "discounted" else counts
        gain = (pull * jnp.minimum(ratio * advantage, clipped * advantage)).sum(-1).mean() / beta
        error = (counts * (value - target) ** 2).sum() / jnp.maximum(counts.sum(), 1.0)
        info = info_from_draws(draws, programs, beta, value.shape[:-1])
        metrics = {
            "critic_error": jnp.sqrt(error),
            # KL(behaviour ‖ q): the behaviour drew these actions, so they need no weights.
            "update_kl": -(counts * jnp.log(ratio)).sum() / jnp.maximum(counts.sum(), 1.0),
        }
        # The loss has the value −J/β, and the gradient of `gradient`.
        # The critic's error over β² has no unit, as J/β has none.
        gradient = -gain + 0.5 * error / beta**2
        loss = lax.stop_gradient(-info.objective / beta) + gradient - lax.stop_gradient(gradient)
        return loss, info._replace(metrics=info.metrics | lax.stop_gradient(metrics))

    def _costs(self, draws: Draws, beta: Any, weight: Array) -> Array:
        """Compute c_t in reward units, undiscounted, [particles, time]."""
        rewards = sum(draws.rewards.values(), start=jnp.zeros_like(weight))
        # Scores carry γᵗ already, while traces discount by themselves.
        divisor = jnp.where(weight > 0, weight, 1.0)
        if self.reference == "prior":
            total = (rewards + beta * (draws.log_prior["action"] - draws.log_q["action"])) / divisor
        else:
            # Unlike `log_q`, scores and the behaviour's density do not carry γᵗ, so nothing is divided out.
            total = rewards / divisor + beta * (draws.log_behaviour["action"] - draws.scores["action"])
        return lax.stop_gradient(jnp.where(weight > 0, total, 0.0))

    def _advantages(self, cost: Array, value: Array, go_on: Array, kept: Array, counts: Array) -> Array:
        """Compute A_t, [particles, time]; zero at steps that do not count."""
        # Nothing follows the last row: either it does not count, or the episode really ends there.
        following = jnp.concatenate([value[:, 1:], jnp.zeros_like(value[:, :1])], -1)
        delta = cost + go_on * following - value

        def back(later: Array, now: tuple[Array, ...]) -> tuple[Array, Array]:
            delta, go_on, kept, counts = now
            # Where counts are 0, as at a reset, the carry is 0, so no trace runs from one episode into the next.
            own = counts * (delta + self.trace * go_on * later)
            return kept * own, own

        by_time = jax.tree.map(lambda x: x.T, (delta, go_on, kept, counts))
        return lax.scan(back, jnp.zeros_like(value[:, 0]), by_time, reverse=True)[1].T

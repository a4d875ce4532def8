"""Reverse KL: J itself, with gradients whose noise vanishes at the optimum."""

import math
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import Array, lax

from bayesrl.arguments import Count, checked
from bayesrl.core.draws import Draws
from bayesrl.core.handlers import stop_gradient
from bayesrl.core.programs import Programs
from bayesrl.core.structure import Structure
from bayesrl.errors import ObjectiveError
from bayesrl.objectives.base import Info, Objective, info_from_draws, without_enumeration
from bayesrl.objectives.gradient_plan import GradientPlan, make_gradient_plan
from bayesrl.typing import Params, PRNGKey

type Baseline = Literal["regression", "full", "to_go", "none"]
type GradientEstimator = Literal["auto", "score", "pathwise"]

MOST_BY_PRODUCT = 256
"""Up to this many events, compute a cumulative sum as a product with a triangular matrix."""


@checked(ObjectiveError)
@dataclass(frozen=True)
class ReverseKL(Objective):
    """Maximise J = E_q[R] − β·KL(q‖π₀), that is, minimise KL(q‖p*).

    With w = R/β + log p(y|x) + log π₀ − log q of one draw of one context, the gradient is
    E[Σ_t ∇log q(x_t) · (w_t − b_t)] at score-function sites, where w_t is the part of w from t on and
    b_t is a leave-one-out regression of w_t on the part before t, over the other particles (slope in
    [−1, 0]). At the optimum w = log Z for every draw, so the noise vanishes. Reparameterised sites take
    the pathwise gradient of w, with the guide's parameters stopped inside log q ("sticking the landing",
    Roeder, Wu & Duvenaud 2017). Sites that you enumerate, or that are cheap to enumerate, have an exact
    expectation (local expectation gradients, Titsias & Lázaro-Gredilla 2015).

    Args:
        num_particles: draws per step and context.
        estimator: `auto` takes pathwise gradients where sites are reparameterised and rewards are
            continuous in them, and score-function gradients elsewhere; `score` and `pathwise` force one.
        baseline: `regression`; `full` (slope −1: leave-one-out on the whole w); `to_go` (slope 0:
            leave-one-out on w from t on); `none`. Below 8 particles `regression` means `to_go`.
        enumerated: action sites with finite support, the last ones of the program, that get an exact
            expectation. `auto` takes all action sites if their joint support has at most
            `num_particles` elements or, from 64 particles on, at most 2,048 elements that need at most
            a million numbers; else none.

    Raises:
        ObjectiveError: on use, if the gradient would be biased for the given programs.

    Example:
        >>> import bayesrl
        >>> bayesrl.objectives.ReverseKL(num_particles=16).baseline
        'regression'
    """

    num_particles: Count = 64
    estimator: GradientEstimator = "auto"
    baseline: Baseline = "regression"
    enumerated: tuple[str, ...] | Literal["auto"] = "auto"
    plan: GradientPlan | None = field(default=None, repr=False, compare=False)

    def for_source(self, source: Any) -> "ReverseKL":
        """Enumerate no site and take no pathwise gradient, since a source draws; see `Objective.for_source`."""
        super().for_source(source)
        if self.estimator == "pathwise":
            raise ObjectiveError(
                "estimator='pathwise' differentiates through the draws, and a source gives their values alone; use "
                "estimator='auto'"
            )
        return replace(without_enumeration(self), estimator="score")

    def prepare(self, key: PRNGKey, programs: Programs, params: Params) -> "ReverseKL":
        """Choose a gradient estimator for each site; see `Objective.prepare`."""
        return replace(
            self,
            plan=make_gradient_plan(
                key, programs, params, self.num_particles, self.estimator, self.baseline, self.enumerated
            ),
        )

    def draw(self, key: PRNGKey, params: Params, programs: Programs) -> Draws:
        """Draw [particles, ...], or [particles, branches, ...] with enumerated sites."""
        plan = self._ready()
        if not plan.enumerated:
            return programs.draw(key, params, plan.num_particles, stopped=plan.score)
        branches = plan.branches(programs.structure)

        def one_branch(values: dict[str, Array]) -> Draws:
            return programs.draw(key, params, plan.num_particles, stopped=plan.score, values=values)

        return jax.vmap(one_branch, out_axes=1)(branches)

    def surrogate(self, params: Params, draws: Draws, programs: Programs, beta: Any) -> tuple[Array, Info]:
        """Return −ELBO per context, with the gradient described above; see `Objective.surrogate`."""
        plan = self._ready()
        if plan.enumerated:
            return _enumerated_surrogate(plan, params, draws, programs, beta, self.baseline)
        costs = log_weight_terms(plan, params, draws, programs, beta)
        shape = costs.shape[:-1]
        value = costs.sum(-1)
        gradient = jnp.zeros(())
        if plan.score or plan.nature:
            advantage = compute_advantages(lax.stop_gradient(costs), self.baseline)
            score = score_terms(plan, draws, programs.structure)
            gradient = gradient + (score * advantage).sum(-1).mean()
        if plan.pathwise or programs.learned:
            gradient = gradient + value.mean()
        return replace_gradient(-value.mean(), -gradient), info_from_draws(draws, programs, beta, shape)

    def _ready(self) -> GradientPlan:
        if self.plan is None:
            raise ObjectiveError(
                "ReverseKL was used before prepare(key, programs, params); call it and use what it returns"
            )
        return self.plan


def replace_gradient(value: Array, gradient: Array) -> Array:
    """Return the value of one expression with the gradient of another."""
    return lax.stop_gradient(value) + gradient - lax.stop_gradient(gradient)


def log_weight_terms(plan: GradientPlan, params: Params, draws: Draws, programs: Programs, beta: Any) -> Array:
    """Lay out the summands of w in program order, [*draws, *contexts, events].

    Gradients flow only through the values of pathwise sites; the guide's parameters are stopped in log q.
    """
    order = programs.structure
    log_q = _stopped_log_q(params, draws, programs) if plan.pathwise else lax.stop_gradient(draws.log_q)
    tempered = {name: value / beta for name, value in draws.rewards.items()}
    parts = {name: draws.log_prior[name] - log_q[name] for name in order.actions}
    # The direct ratios carry the guide's parameters, which pathwise gradients must stop, so they serve only the rest.
    parts |= {} if plan.pathwise else lax.stop_gradient(draws.log_ratio)
    parts |= tempered | draws.log_likelihood
    return order.in_order(parts, order.names("action", "environment", "observed", "reward"))


def _stopped_log_q(params: Params, draws: Draws, programs: Programs) -> dict[str, Array]:
    first = programs.structure.actions[0]
    if draws.sites[first].ndim == len(programs.structure[first].shape) + 2:  # [particles, branches, ...]
        return jax.vmap(lambda branch: programs.log_q(stop_gradient(params), branch))(draws)
    return programs.log_q(stop_gradient(params), draws)


def score_terms(plan: GradientPlan, draws: Draws, structure: Structure) -> Array:
    """Lay out log q of score-function sites, and log p of nature, in program order."""
    scores = {name: draws.scores[name] for name in plan.score}
    scores |= {name: draws.log_nature[name] for name in plan.nature}
    return structure.in_order(scores, structure.names("action", "environment", "observed", "reward"))


def compute_advantages(costs: Array, baseline: Baseline) -> Array:
    """Return cost-to-go minus baseline at each event, [particles, *contexts, events].

    Each particle's baseline comes from the other particles: a least-squares fit of the cost-to-go
    on the cost before the event, with the slope clipped to [−1, 0].
    """
    num = costs.shape[0]
    centred = costs - costs.mean(0, keepdims=True)  # float32 loses the moments of uncentred costs
    if baseline == "none":
        return _to_go(costs)
    to_go = _to_go(centred)
    if num == 1:
        return to_go
    total = centred.sum(-1, keepdims=True)
    past = total - to_go
    # x minus the mean of the others is n/(n − 1) times x minus the mean of all.
    leave_one_out = num / (num - 1)
    if baseline == "full":
        return leave_one_out * total * jnp.ones_like(to_go)
    if baseline == "to_go" or num < 8:
        return leave_one_out * to_go
    # The slope is −1 plus the slope of the total on the past, which vanishes at the optimum. So use −1 also
    # if the other particles all have the same past, from which no slope can be estimated.
    # Both are sums over the other particles, about their own means.
    covariance = (past * total).sum(0) - leave_one_out * past * total
    variance = (past * past).sum(0) - leave_one_out * past * past
    limits = jnp.finfo(costs.dtype)
    rounding = math.sqrt(limits.eps) * (past * past).sum(0) + limits.tiny
    slope = jnp.clip(covariance / jnp.maximum(variance, rounding) - 1.0, -1.0, 0.0)
    return leave_one_out * (to_go - slope * past)


def _to_go(costs: Array) -> Array:
    """Sum the costs from each event on, [..., events]."""
    num = costs.shape[-1]
    if num > MOST_BY_PRODUCT:
        return jnp.flip(jnp.cumsum(jnp.flip(costs, -1), -1), -1)
    # XLA compiles a cumulative sum to many pads and slices; for few events, one product takes a third of the time.
    # At their default precision, accelerators would round the costs to fewer digits.
    return jnp.matmul(costs, jnp.tri(num, dtype=costs.dtype), precision=lax.Precision.HIGHEST)


def _enumerated_surrogate(
    plan: GradientPlan, params: Params, draws: Draws, programs: Programs, beta: Any, baseline: Baseline
) -> tuple[Array, Info]:
    """Take the expectation over the enumerated sites exactly; draws are [particles, branches, ...]."""
    structure = programs.structure
    names = structure.names("action", "environment", "observed", "reward")
    costs = log_weight_terms(plan, params, draws, programs, beta)
    log_weight = sum((draws.log_q[name].sum(-1) for name in plan.enumerated), start=jnp.zeros(costs.shape[:-1]))
    weight = jnp.exp(log_weight)
    first = sum(structure[name].length for name in names[: names.index(plan.enumerated[0])])
    # Before the first enumerated site, all branches of a particle agree.
    before, after = costs[:, 0, ..., :first], costs[..., first:].sum(-1)
    # The guide's gradient flows through the weights; a branch of weight 0 may be −inf, and 0 · inf is nan.
    tail = (weight * jnp.where(weight > 0, after, 0.0)).sum(1)
    value = before.sum(-1) + tail
    gradient = tail.mean()
    if plan.score or plan.nature:
        events = lax.stop_gradient(jnp.concatenate([before, tail[..., None]], -1))
        score = score_terms(plan, jax.tree.map(lambda x: x[:, 0], draws), structure)[..., :first]
        advantage = compute_advantages(events, baseline)[..., :first]
        gradient = gradient + (score * advantage).sum(-1).mean()
    if plan.pathwise or programs.learned:
        gradient = gradient + before.sum(-1).mean()
    return replace_gradient(-value.mean(), -gradient), info_from_draws(
        draws, programs, beta, weight.shape, lax.stop_gradient(weight)
    )

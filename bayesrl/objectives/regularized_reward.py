"""Expected reward with another regulariser than KL: J has another optimum than p*."""

from dataclasses import dataclass, field, replace
from typing import Any, Literal

import jax.numpy as jnp
from jax import Array, lax

from bayesrl.arguments import CountAboveOne, UnusedOption, checked
from bayesrl.compilation.jit import has_tracers
from bayesrl.core.draws import Draws
from bayesrl.core.programs import Programs
from bayesrl.errors import ObjectiveError
from bayesrl.objectives.base import Info, Objective, info_from_draws, without_enumeration
from bayesrl.objectives.f_divergence import refuse_other_supports
from bayesrl.objectives.generators import Generator, estimand_of, regularizer_generator
from bayesrl.objectives.gradient_plan import GradientPlan, make_gradient_plan
from bayesrl.objectives.reverse_kl import replace_gradient
from bayesrl.statistics.definitions import RegularizerName
from bayesrl.typing import Params, PRNGKey


@checked(
    ObjectiveError,
    UnusedOption("alpha", lambda given: given["regularizer"] != "alpha", "only regularizer='alpha' has an order"),
)
@dataclass(frozen=True)
class RegularizedReward(Objective):
    """Maximise J = E_q[R] − β·D_f(q‖π₀), where D_f = E_π₀[f(t)], t = q/π₀, takes the place of KL.

    The gradient is E_q[(R/β − f′(t) − b)·∇log q], by draws of whole assignments with a leave-one-out baseline b, or
    exact where all action sites can be enumerated. At the optimum R − β·f′(t) is the same for all that q draws, so the
    noise vanishes there. `bayesrl.enumerate_posterior(..., regularizer=...)` gives that optimum. The history has J of
    this regulariser, KL as ever, and the metric `divergence`; `spread` is the variance of R/β − f′(t).

    Args:
        regularizer: f by its name, as in `enumerate_posterior`.
        num_particles: draws per step and context.
        alpha: order of regularizer="alpha".
        enumerated: `auto` enumerates all action sites where `ReverseKL` would; () draws them; or all their names.

    Raises:
        ObjectiveError: the regulariser is KL, or α is missing, 0 or 1. On use: there are environment, observed or
            discounted sites, or no rewards; or the guide never draws what the prior does, and f(0) is infinite.

    Example:
        >>> import jax, jax.numpy as jnp, numpyro, numpyro.distributions as dist, bayesrl
        >>> def bandit():
        ...     arm = numpyro.sample("arm", dist.Categorical(logits=jnp.zeros(3)))
        ...     bayesrl.reward("payoff", jnp.array([0.0, 1.0, 2.0])[arm])
        >>> options = {"beta": 1.0, "regularizer": "chi_squared_kl"}
        >>> posterior = bayesrl.fit(jax.random.key(0), bandit, **options, num_steps=500, progress=False)
        >>> exact = bayesrl.enumerate_posterior(bandit, **options)
        >>> round(float(posterior.history["objective"][-1, 0]), 3), round(float(exact.optimum), 3)
        (1.164, 1.164)
    """

    regularizer: RegularizerName
    num_particles: CountAboveOne = 64
    alpha: float | None = None
    enumerated: tuple[str, ...] | Literal["auto"] = "auto"
    plan: GradientPlan | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.regularizer == "kl":
            raise ObjectiveError("RegularizedReward('kl') is what ReverseKL() maximises; use that")
        if self.regularizer == "alpha" and self.alpha is None:
            raise ObjectiveError("regularizer='alpha' needs its order; pass alpha=0.5, for instance")
        if self.alpha in (0.0, 1.0):
            kl, text = ("kl", "KL(q‖π₀)") if self.alpha == 1 else ("forward_kl", "KL(π₀‖q)")
            raise ObjectiveError(f"alpha={self.alpha:g} is {text}, whose formula is another; use regularizer={kl!r}")

    @property
    def told(self) -> dict[str, Any]:
        """Settings of a fit that say what it maximises."""
        return {"regularizer": self.regularizer} | ({} if self.alpha is None else {"alpha": self.alpha})

    @property
    def _f(self) -> Generator:
        f = regularizer_generator(self.regularizer, self.alpha)
        assert f is not None  # KL is refused when the objective is made
        return f

    def _estimand(self, x: Array) -> Array:
        estimand = estimand_of(self.regularizer, self.alpha)
        assert estimand is not None
        return estimand(x)

    def for_source(self, source: Any) -> "RegularizedReward":
        """Enumerate no site, since a source draws; see `Objective.for_source`."""
        super().for_source(source)
        return without_enumeration(self)

    def prepare(self, key: PRNGKey, programs: Programs, params: Params) -> "RegularizedReward":
        """Refuse programs for which J is not defined, and infinite divergences; see `Objective.prepare`."""
        structure = programs.structure
        wrong = {
            "environment": "nature cancels from KL alone",
            "observed": "the prior given the data has an unknown factor, which cancels from KL alone",
        }
        for kind, because in wrong.items():
            for site in structure.sites:
                if site.kind == kind:
                    raise ObjectiveError(
                        f"regularizer={self.regularizer!r} is not defined with {kind} site {site.name!r}: {because}; "
                        "use regularizer='kl'"
                    )
        for site in structure.sites:
            if site.kind == "action" and site.discounted:
                raise ObjectiveError(
                    f"action site {site.name!r} is scaled, which is defined for KL alone; use regularizer='kl'"
                )
        if not structure.names("reward"):
            raise ObjectiveError(
                f"the policy collects no reward for regularizer={self.regularizer!r} to weigh; use regularizer='kl'"
            )
        plan = make_gradient_plan(key, programs, params, self.num_particles, "score", "full", self.enumerated)
        plan.check_all_or_none(structure, "RegularizedReward")
        if not has_tracers((key, params, programs.args)):
            what = f"regularizer={self.regularizer!r}"
            refuse_other_supports(key, programs, params, what, "D_f(q‖π₀) counts them", self._f)
        return replace(self, plan=plan)

    def draw(self, key: PRNGKey, params: Params, programs: Programs) -> Draws:
        """Draw [particles, ...], or all branches, [1, branches, ...]; values carry no gradient."""
        plan, actions = self._ready(), programs.structure.actions
        if not plan.enumerated:
            return programs.draw(key, params, self.num_particles, stopped=actions)
        return plan.draw_branches(key, params, programs)

    def surrogate(self, params: Params, draws: Draws, programs: Programs, beta: Any) -> tuple[Array, Info]:
        """Return −J/β per context; see `Objective.surrogate`."""
        plan, f = self._ready(), self._f
        lead = next(iter(draws.log_q.values())).shape[: 2 if plan.enumerated else 1]
        shape = (*lead, *programs.structure.context_shape)
        log_q = draws.totals(shape).log_q
        totals = lax.stop_gradient(draws.totals(shape))
        tempered, x = totals.reward / beta, -totals.ratio
        gain = tempered - f.slope(x, jnp.exp(-x), 1.0)
        if plan.enumerated:
            q, axis = jnp.exp(totals.log_q), 1
            gain = jnp.where(q > 0, gain, 0.0)
            centred = gain - (q * gain).sum(1, keepdims=True)
            weight = q * centred
            divergence = f.value(x, jnp.exp(totals.log_prior), q).sum(1)
            value, spread = (q * tempered).sum(1) - divergence, (q * centred**2).sum(1).mean()
        else:
            num, axis = shape[0], 0
            q = None
            centred = gain - gain.mean(0, keepdims=True)
            # n/(n − 1) turns the mean of all draws into that of the others, which leaves no bias.
            weight = centred * (num / (num - 1)) / num
            divergence = self._estimand(x).mean(0)
            value, spread = tempered.mean(0) - divergence, (centred**2).sum(0).mean() / (num - 1)
        # A branch of weight 0 may have log q = −inf, and 0 · inf would be nan.
        gradient = jnp.where(weight != 0, weight * log_q, 0.0).sum(axis).mean()
        info = info_from_draws(draws, programs, beta, shape, q)
        metrics = {**info.metrics, "divergence": divergence.mean()}
        loss = replace_gradient(-value.mean(), -gradient)
        return loss, info._replace(objective=beta * value.mean(), spread=spread, metrics=metrics)

    def _ready(self) -> GradientPlan:
        if self.plan is None:
            raise ObjectiveError(
                "RegularizedReward was used before prepare(key, programs, params); call it and use what it returns"
            )
        return self.plan

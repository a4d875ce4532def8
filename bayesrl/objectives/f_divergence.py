"""Any f-divergence between the fit and p*: other ways to approach the same optimum."""

import math
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Literal, Never

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.scipy.special import logsumexp

from bayesrl.arguments import CountAboveOne, UnusedOption, checked, real_range
from bayesrl.compilation.jit import closure_jit, has_tracers
from bayesrl.core.draws import Draws, total
from bayesrl.core.programs import Programs
from bayesrl.errors import ObjectiveError
from bayesrl.objectives.base import Info, Objective, count_nonfinite, draws_of_its_own, info_from_draws
from bayesrl.objectives.forward_kl import draw_with_prior, relative_to_mixture
from bayesrl.objectives.generators import Generator, GeneratorName, make_generator
from bayesrl.objectives.gradient_plan import MOST_BRANCHES, GradientPlan, joint_size, make_gradient_plan
from bayesrl.objectives.reverse_kl import replace_gradient
from bayesrl.typing import Params, PRNGKey

_MOST_FOLDS = 8
_NUM_CHECKED = 64
_NEVER = -1e20
"""Log-probabilities below this are 0: logits of −inf may become the least number of single precision."""


@checked(
    ObjectiveError, UnusedOption("alpha", lambda given: given["generator"] != "alpha", "only generator='alpha' has one")
)
@dataclass(frozen=True)
class FDivergence(Objective):
    """Minimise D_f = E_p*[f(t)], t = q/p*, by ∇D_f = E_q[f′(t)·∇log q] (f-DPG, Go et al. 2023, theorem 1).

    Every generator has the same optimum, p*; where the guide cannot hold p*, they prefer different compromises. Do not
    confuse it with another regulariser, which moves the optimum itself: `enumerate_posterior(regularizer=...)`.

    | generator | f(t), up to a multiple of t − 1 | |
    |---|---|---|
    | `reverse_kl` | t·log t | KL(q‖p*): stays in one mode; what `ReverseKL` minimises |
    | `forward_kl` | −log t | KL(p*‖q): covers all modes |
    | `jensen_shannon` | half of t·log t − (1 + t)·log((1 + t)/2) | at most log 2 |
    | `total_variation` | half of abs(t − 1) | at most 1; f′ jumps at t = 1, so its noise does not vanish at p* |
    | `reverse_chi_squared` | (t − 1)² | χ²(q‖p*) |
    | `forward_chi_squared` | (t − 1)²/t | χ²(p*‖q) |
    | `squared_hellinger` | half of (√t − 1)² | 1 − Σ√(q·p*) |
    | `alpha` | (tᵅ − 1)/(α(α − 1)) | KL(q‖p*) as α → 1, KL(p*‖q) as α → 0 |

    If all action sites can be enumerated, gradient and divergence are exact. Otherwise draws come from a mixture of the
    guide and the prior, and t needs log Z, which is pooled over all draws of the step, guide's and prior's. Draws are
    split in at most 8 folds; f′ of a fold takes log Z, and its baseline, from the other folds. So at q = p* the noise
    vanishes, and for the KLs, χ², Hellinger and α, where an error of log Z only scales the gradient of a context, its
    direction has no bias (for `reverse_kl` its length has none either). For Jensen–Shannon and total variation an error
    of log Z does more than scale: their gradients have a bias of order 1/`num_particles`, which twice the draws halve.
    Where actions are enumerated nothing has a bias.

    A divergence that is infinite is refused where that can be seen: rewards of −inf, and a guide whose support is not
    the prior's, by all joint values where they can be listed (at most 2,048), else by 64 draws of the prior. It cannot
    be seen where values are too rare for these draws, nor in the tails of continuous sites, where χ² and α may be
    infinite though all densities are positive: then `ess` stays low, the `divergence` does not settle, and steps whose
    loss is not finite are skipped and counted.

    The history has the metrics `divergence` (D_f, in nats for KL and Jensen–Shannon), `ess` (the effective share of
    draws as draws of p*) and, for α, `renyi`: log E_p*[tᵅ]/(α − 1), the Rényi divergence of q from p*, which has the
    same minimum.

    Args:
        generator: the name of f.
        num_particles: draws per step and context.
        alpha: α, not 0 or 1.
        prior_fraction: share of the draws that come from the prior; 0 is f-DPG as published.
        enumerated: `auto` enumerates all action sites where `ReverseKL` would; () draws them; or all their names.

    Raises:
        ObjectiveError: α is missing, 0 or 1; the draws cannot be split in equal folds. On use: there are environment
            or discounted sites, for which p* is not the optimum; or the divergence is infinite, because the guide never
            draws what p* does (f(0) = ∞), or p* excludes what the guide draws (f(t)/t unbounded).

    Example:
        >>> import jax, jax.numpy as jnp, numpyro, numpyro.distributions as dist, bayesrl
        >>> def bandit():
        ...     arm = numpyro.sample("arm", dist.Categorical(logits=jnp.zeros(3)))
        ...     bayesrl.reward("payoff", jnp.array([0.0, 1.0, 2.0])[arm])
        >>> objective = bayesrl.objectives.FDivergence("jensen_shannon")
        >>> posterior = bayesrl.fit(jax.random.key(0), bandit, beta=1.0, objective=objective, progress=False)
        >>> float(bayesrl.evidence(jax.random.key(1), posterior).gap.upper) < 1e-3
        True

    References:
        Go, Korbak, Kruszewski, Rozen, Ryu & Dymetman (2023), "Aligning Language Models with Preferences through
        f-divergence Minimization".
    """

    generator: GeneratorName
    num_particles: CountAboveOne = 256
    alpha: float | None = None
    prior_fraction: Annotated[float, real_range(0, below=1)] = 0.5
    enumerated: tuple[str, ...] | Literal["auto"] = "auto"
    plan: GradientPlan | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.generator == "alpha" and self.alpha is None:
            raise ObjectiveError("FDivergence('alpha') needs its order; pass alpha=0.5, for instance")
        if self.alpha in (0.0, 1.0):
            name, text = ("reverse_kl", "KL(q‖p*)") if self.alpha == 1 else ("forward_kl", "KL(p*‖q)")
            raise ObjectiveError(
                f"FDivergence got alpha={self.alpha:g}, which is {text} and has another formula; "
                f"use FDivergence({name!r})"
            )
        if self._num_folds < 2:
            guide, prior = self._split
            raise ObjectiveError(
                f"FDivergence(num_particles={self.num_particles}, prior_fraction={self.prior_fraction:g}) takes "
                f"{guide} from the guide and {prior} from the prior, which cannot be split in equal folds for log Z "
                "and baselines; make both numbers multiples of 8, or at least even"
            )

    @property
    def _split(self) -> tuple[int, int]:
        from_prior = min(round(self.prior_fraction * self.num_particles), self.num_particles - 1)
        return self.num_particles - from_prior, from_prior

    @property
    def _num_folds(self) -> int:
        common = math.gcd(*self._split)
        return max(k for k in range(1, _MOST_FOLDS + 1) if common % k == 0)

    @property
    def _f(self) -> Generator:
        return make_generator(self.generator, self.alpha)

    @property
    def refuses_impossible(self) -> str:
        """Why rewards of −inf are refused; empty if they are allowed."""
        if self._f.finite_at_infinity:
            return ""
        return f"{self._name} of a guide that draws what p* excludes is then infinite"

    @property
    def _name(self) -> str:
        order = "" if self.alpha is None else f" of order {self.alpha:g}"
        return f"the divergence {self.generator!r}{order}"

    def for_source(self, source: Any) -> Never:
        """Refuse draws of a source; see `Objective.for_source`."""
        raise draws_of_its_own("FDivergence", "weighs draws of a mixture of guide and prior")

    def prepare(self, key: PRNGKey, programs: Programs, params: Params) -> "FDivergence":
        """Refuse programs without p* and infinite divergences; see `Objective.prepare`."""
        structure = programs.structure
        nature = structure.names("environment")
        if nature:
            raise ObjectiveError(
                f"FDivergence would tilt environment site {nature[0]!r}, which is nature's; use ReverseKL()"
            )
        discounted = [site.name for site in structure.sites if site.kind == "action" and site.discounted]
        if discounted:
            raise ObjectiveError(
                f"action site {discounted[0]!r} is scaled, so the optimum is one of control and not p*, and no "
                "divergence from it is defined; use ReverseKL()"
            )
        plan = make_gradient_plan(key, programs, params, self.num_particles, "score", "none", self.enumerated)
        plan.check_all_or_none(structure, "FDivergence")
        if not has_tracers((key, params, programs.args)):
            refuse_other_supports(key, programs, params, self._name, "p* does not", self._f)
        return replace(self, plan=plan)

    def draw(self, key: PRNGKey, params: Params, programs: Programs) -> Draws:
        """Draw from the guide first, then from the prior, [particles, ...]; or [1, branches, ...], enumerated."""
        plan = self._ready()
        if not plan.enumerated:
            return draw_with_prior(key, params, programs, *self._split)
        return plan.draw_branches(key, params, programs)

    def surrogate(self, params: Params, draws: Draws, programs: Programs, beta: Any) -> tuple[Array, Info]:
        """Estimate D_f per context; see `Objective.surrogate`."""
        if self._ready().enumerated:
            return self._enumerated_surrogate(draws, programs, beta)
        from_guide, _ = self._split
        shape = (self.num_particles, *programs.structure.context_shape)
        totals = lax.stop_gradient(draws.totals(shape))
        tempered = totals.reward / beta + totals.log_likelihood
        of_prior, log_r = relative_to_mixture(totals.ratio, *self._split)
        log_w = tempered + of_prior
        log_q = total(programs.log_q(params, draws), shape)
        advantage = _advantages(self._f, log_w, log_r, self._num_folds)
        # A draw without an advantage may have log q = −inf, and 0 · inf would be nan.
        gradient = (jnp.where(advantage != 0, advantage * log_q, 0.0)).mean(0).mean()
        log_z = logsumexp(log_w, axis=0) - logsumexp(log_r, axis=0)
        log_p = log_w - log_z
        p, r = jnp.exp(log_p), jnp.exp(log_r)
        value = self._f.value(log_r - log_p, p, r).mean(0)
        weight = jax.nn.softmax(log_w, axis=0)
        ess = 1 / (weight**2).sum(0).mean() / self.num_particles
        info = info_from_draws(jax.tree.map(lambda x: x[:from_guide], draws), programs, beta, (from_guide, *shape[1:]))
        return self._told(value, gradient, info, draws, {"ess": ess})

    def _enumerated_surrogate(self, draws: Draws, programs: Programs, beta: Any) -> tuple[Array, Info]:
        """Take all expectations exactly; draws are [1, branches, ...]."""
        branches = next(iter(draws.log_q.values())).shape[1]
        shape = (1, branches, *programs.structure.context_shape)
        log_q = draws.totals(shape).log_q
        totals = lax.stop_gradient(draws.totals(shape))
        log_w = totals.reward / beta + totals.log_likelihood
        log_z = logsumexp(log_w + totals.log_prior, axis=1, keepdims=True)
        # The ratio may be more accurate than the difference of two densities.
        x = log_z - log_w - totals.ratio
        p, q = jnp.exp(log_w + totals.log_prior - log_z), jnp.exp(totals.log_q)
        slope = self._f.slope(x, p, q)
        gradient = jnp.where(slope != 0, slope * log_q, 0.0).sum(1).mean()
        info = info_from_draws(draws, programs, beta, shape, q)
        return self._told(self._f.value(x, p, q).sum(1), gradient, info, draws, {})

    def _told(
        self, value: Array, gradient: Array, info: Info, draws: Draws, metrics: dict[str, Array]
    ) -> tuple[Array, Info]:
        loss = value.mean()
        metrics = {**info.metrics, **metrics, "divergence": loss}
        if self.alpha is not None:
            # 1 + α(α − 1)·D is E_p*[tᵅ], which only rounding can make negative.
            inside = jnp.maximum(self.alpha * (self.alpha - 1) * value, -1.0)
            metrics["renyi"] = (jnp.log1p(inside) / (self.alpha - 1)).mean()
        bad = count_nonfinite(draws, never=self._f.finite_at_infinity)
        return replace_gradient(loss, gradient), info._replace(metrics=metrics, nonfinite=bad)

    def _ready(self) -> GradientPlan:
        if self.plan is None:
            raise ObjectiveError(
                "FDivergence was used before prepare(key, programs, params); call it and use what it returns"
            )
        return self.plan


def refuse_other_supports(
    key: PRNGKey, programs: Programs, params: Params, what: str, because: str, f: Generator
) -> None:
    """Refuse a guide whose support differs from the prior's where that makes the divergence `what` infinite.

    All values are looked at where they can be listed, and a few draws of the prior elsewhere: what is too rare for
    these, or the tail of a continuous site, is not seen.

    Raises:
        ObjectiveError: naming the site.
    """
    if programs.guide is None or (f.finite_at_zero and f.finite_at_infinity):
        return
    structure, size = programs.structure, joint_size(programs.structure)
    listed = size is not None and size <= MOST_BRANCHES
    if size is not None and listed:
        plan, num, of = GradientPlan((), (), (), structure.actions, 1), size, "joint values"
        draws = closure_jit(lambda key, params: plan.draw_branches(key, params, programs), name="draw_branches")(
            key, params
        )
        draws = jax.tree.map(lambda x: x[0], draws)
    elif f.finite_at_zero:
        return
    else:
        num, of = _NUM_CHECKED, "draws of the prior"
        draws = closure_jit(lambda key, params: programs.draw_policy(key, params, num), name="draw_policy")(key, params)
    shape = (num, *structure.context_shape)
    log_prior, log_q = (total(scores, shape) for scores in (draws.log_prior, draws.log_q))
    possible = (total(draws.rewards, shape) > -jnp.inf) & (log_prior > _NEVER)
    for name in draws.log_q:
        missed, excluded = (
            int(bad.any(tuple(range(1, len(shape)))).sum())
            for bad in (
                (draws.log_q[name].sum(-1) < _NEVER) & possible,
                (draws.log_prior[name].sum(-1) < _NEVER) & (log_q > _NEVER),
            )
        )
        if missed and not f.finite_at_zero:
            raise ObjectiveError(
                f"{what} is infinite: the guide gives probability 0 to {missed} of {num} {of} "
                f"at site {name!r}, and {because}; give the guide the prior's support, or use one that stays finite, "
                "such as 'jensen_shannon'"
            )
        if listed and excluded and not f.finite_at_infinity:
            raise ObjectiveError(
                f"{what} is infinite: the guide draws {excluded} of {num} {of} at site {name!r} that the prior "
                "excludes; give the guide the prior's support, or use one that stays finite, such as 'jensen_shannon'"
            )


def _advantages(f: Generator, log_w: Array, log_r: Array, num_folds: int) -> Array:
    """Return (q/mixture)·(f′ − baseline) of each draw, with log Z and baseline from the other folds.

    Args:
        f: the generator.
        log_w: log of p̂/mixture, [particles, *contexts], nats.
        log_r: log of q/mixture, the same shape, nats.
        num_folds: divides the numbers of draws from the guide and from the prior.
    """
    fold_of = jnp.arange(len(log_w)) % num_folds
    r = jnp.exp(log_r)

    def one(fold: Array) -> Array:
        own = (fold_of == fold).reshape(-1, *(1,) * (log_w.ndim - 1))
        log_z = logsumexp(jnp.where(own, -jnp.inf, log_w), axis=0) - logsumexp(jnp.where(own, -jnp.inf, log_r), axis=0)
        log_p = log_w - log_z
        slope = f.slope(log_r - log_p, jnp.exp(log_p), r)
        # Any baseline of other folds keeps the mean: r weighs the draws as draws of q, and E_q[∇log q] = 0.
        baseline = jnp.where(own, 0.0, slope).sum(0) / jnp.where(own, 0.0, r).sum(0)
        # Without a possible draw in the other folds, log Z is unknown, and the draw tells nothing.
        return jnp.where(own & jnp.isfinite(log_z), slope - r * baseline, 0.0)

    return lax.stop_gradient(jax.vmap(one)(jnp.arange(num_folds)).sum(0))

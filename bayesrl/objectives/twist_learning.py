"""Objectives that learn a twist: a value of what is still to come, by contrast or by regression."""

from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.scipy.special import logsumexp

from bayesrl.arguments import CountAboveOne, UnitInterval, checked
from bayesrl.core.draws import Draws
from bayesrl.core.handlers import stop_gradient
from bayesrl.core.programs import Programs
from bayesrl.core.structure import Structure
from bayesrl.errors import ObjectiveError
from bayesrl.objectives.base import Info, Objective, count_nonfinite, info_from_draws
from bayesrl.objectives.forward_kl import relative_to_mixture
from bayesrl.typing import Params, PRNGKey

TWIST, START, LIVE = "twist$", "twist$start", "twist$live"
"""Deterministic sites of a guide: ψ after each step, nats; ψ before the first; and whether the step was taken."""


class _Path(NamedTuple):
    """What draws gained between the values of their twist, [draws, *contexts, ...], nats.

    Attributes:
        twist: ψ_p, [..., P].
        ratio: log π₀ − log q between ψ_{p−1} and ψ_p, and behind the last, [..., P + 1].
        gain: R/β + log p(y|x), likewise.
        off: log q − log b between them, where b is what drew the path, likewise.
        live: whether the step before ψ_p was taken, [..., P].
    """

    twist: Array
    ratio: Array
    gain: Array
    off: Array
    live: Array


def _path(draws: Draws, structure: Structure, beta: Any) -> _Path:
    told = draws.guide_metrics
    along = _along(structure)
    twist = told[TWIST]
    if structure[along[0]].scan is not None:
        twist = jnp.moveaxis(twist, 1, -1)  # a scan stacks its steps in front of the contexts
    ratio = _by_step(stop_gradient(draws.ratios), structure, along)
    rewards = {name: value / beta for name, value in draws.rewards.items()}
    gain = _by_step(stop_gradient(rewards | draws.log_likelihood), structure, along)
    behind = {name: draws.scores[name] - own for name, own in draws.log_behaviour.items()}
    off = _by_step(stop_gradient(behind), structure, along)
    live = told.get(LIVE, jnp.ones(twist.shape, bool))
    if START in told:
        start = jnp.broadcast_to(told[START], twist.shape[:-1])[..., None]
        live = jnp.concatenate([jnp.ones_like(live[..., :1]), live], -1)
        return _Path(jnp.concatenate([start, twist], -1), ratio, gain, off, live)
    # What stands before the first step joins it.
    ratio, gain, off = (jnp.concatenate([x[..., :1] + x[..., 1:2], x[..., 2:]], -1) for x in (ratio, gain, off))
    return _Path(twist, ratio, gain, off, live)


def _along(structure: Structure) -> list[str]:
    """Return the names of the sites that stand along time."""
    return [site.name for site in structure.sites if site.scan is not None or (site.latent and site.length > 1)]


def _by_step(parts: dict[str, Array], structure: Structure, along: list[str]) -> Array:
    """Sum scores of sites by time: before the first step, at each step, after the last, [..., T + 2]."""
    order = [site.name for site in structure.sites]
    length = structure[along[0]].length
    shape = next(iter(parts.values())).shape[:-1] if parts else ()
    before, steps, after = jnp.zeros((*shape, 1)), jnp.zeros((*shape, length)), jnp.zeros((*shape, 1))
    for name, part in parts.items():
        if name in along:
            steps = steps + part
        elif order.index(name) < order.index(along[0]):
            before = before + part.sum(-1, keepdims=True)
        else:
            after = after + part.sum(-1, keepdims=True)
    return jnp.concatenate([before, steps, after], -1)


class TwistObjective(Objective):
    """Base of both objectives: it draws from the guide, which the twist tilts, and asks for values of the twist."""

    prior_fraction: float
    needs_proposal: ClassVar[bool] = False
    """Whether draws must be of π₀ tilted by the twist, step by step."""

    @property
    def _split(self) -> tuple[int, int]:
        from_prior = min(round(self.prior_fraction * self.num_particles), self.num_particles - 1)
        return self.num_particles - from_prior, from_prior

    def prepare(self, key: PRNGKey, programs: Programs, params: Params) -> "TwistObjective":
        """Refuse guides without a twist, and nature; see `Objective.prepare`."""
        structure, own = programs.structure, type(self).__name__
        if nature := structure.names("environment"):
            raise ObjectiveError(
                f"{own} would tilt environment site {nature[0]!r}, which is nature's; use ReverseKL(), or "
                "bayesrl.control.ActorCritic for rollouts"
            )
        if scaled := [site.name for site in structure.sites if site.discounted]:
            raise ObjectiveError(
                f"the log-probability of site {scaled[0]!r} is scaled, as by a discount, so that no law of draws has "
                f"it, and {own} compares laws; use discount=1"
            )
        if programs.guide is None or TWIST not in programs.trace_guide(params).sites:
            raise ObjectiveError(
                f"{own} learns a twist, and the guide has none; call bayesrl.fit_twist(key, policy, beta=...), which "
                "makes one"
            )
        if self.needs_proposal and not getattr(programs.guide, "proposes", False):
            raise ObjectiveError(
                f"{own} compares values over one step drawn under the twist, and the draws of this program's steps "
                f"cannot be listed ({', '.join(map(repr, structure.actions))}); use ContrastiveTwist()"
            )
        return self

    def draw(self, key: PRNGKey, params: Params, programs: Programs) -> Draws:
        """Draw from the guide first, then from the prior, [particles, ...]; values carry no gradients."""
        from_guide, from_prior = self._split
        draws = programs.draw(key, params, from_guide, stopped=programs.structure.actions)
        if not from_prior:
            return draws
        # Both parts use one key, so that they share their mini-batch.
        prior = stop_gradient(replace(programs, guide=None).draw(key, {}, from_prior))
        prior = programs.again(params, prior)
        return jax.tree.map(lambda a, b: jnp.concatenate([a, b]), draws._replace(log_ratio={}, doubt={}), prior)

    def _info(self, draws: Draws, programs: Programs, beta: Any, log_weight: Array, *, never: bool) -> Info:
        """Summarise the guide's own draws, and the weights of all toward p*, [draws, *contexts]."""
        from_guide, _ = self._split
        shape = (from_guide, *log_weight.shape[1:])
        info = info_from_draws(jax.tree.map(lambda x: x[:from_guide], draws), programs, beta, shape)
        weight = _softmax(log_weight)
        ess = jnp.where(jnp.isfinite(log_weight.max(0)), 1 / (weight**2).sum(0) / len(log_weight), 0.0).mean()
        log_z = (logsumexp(log_weight, axis=0) - jnp.log(len(log_weight))).mean()
        told = {"ess": ess, "log_z": log_z}
        return info._replace(metrics=info.metrics | told, nonfinite=count_nonfinite(draws, never=never))


@checked(ObjectiveError)
@dataclass(frozen=True)
class ContrastiveTwist(TwistObjective):
    """Learn a twist by contrast: raise it on paths of p*, lower it on paths of its own law.

    With ψ_t the twist of a path's first t steps and π_t ∝ π₀(x_{1:t})·exp(ψ_t), it minimises Σ_t KL(p*(x_{1:t})‖π_t):

        gradient = −Σ_t (E_p*[∇ψ_t] − E_π_t[∇ψ_t]).

    Draws come from the twist-induced proposal q, in which each step is drawn from π₀·exp(ψ), and from the prior. They
    are weighted toward p* by π₀·exp(R/β) over their mixture, and toward π_t by the same ratio of their first t steps;
    weights are normalised per context. At the optimum both are uniform, so that noise and bias vanish. Rewards of −inf
    are allowed. ψ_t is log E[exp(what is to come/β)] up to a constant for each step and context, on which no weight
    depends. The metric `ess` in the history is the effective share of draws, and `log_z` an estimate of log Z, nats.
    The loss is the contrast itself, 0 at the fixed point.

    Args:
        num_particles: draws per step and context.
        prior_fraction: share of the draws that come from the prior.

    Raises:
        ObjectiveError: on use, if nature draws, or the guide has no twist; see `bayesrl.fit_twist`.

    Example:
        >>> import bayesrl
        >>> bayesrl.objectives.ContrastiveTwist(num_particles=512).prior_fraction
        0.1

    References:
        Zhao, Brekelmans, Makhzani & Grosse (2024), "Probabilistic inference in language models via twisted sequential
        Monte Carlo", section 4.1.
    """

    num_particles: CountAboveOne = 256
    prior_fraction: UnitInterval = 0.1

    @property
    def refuses_impossible(self) -> str:
        """Why rewards of −inf are refused: they are not."""
        return ""

    def surrogate(self, params: Params, draws: Draws, programs: Programs, beta: Any) -> tuple[Array, Info]:
        """Contrast paths of p* with those of π_t, per context; see `Objective.surrogate`."""
        path = _path(draws, programs.structure, beta)
        ratios = jnp.cumsum(path.ratio, -1)
        of_prior, _ = relative_to_mixture(ratios, *self._split)
        gains = jnp.cumsum(path.gain, -1)
        toward_target = of_prior[..., -1] + gains[..., -1]
        fixed = lax.stop_gradient(path.twist)
        toward_own = of_prior[..., :-1] + gains[..., :-1] + fixed
        contrast = _softmax(toward_target)[..., None] - _softmax(toward_own)
        # Without any draw that p* allows there is nothing to learn from.
        known = jnp.isfinite(toward_target.max(0))[..., None] & jnp.isfinite(toward_own.max(0))
        loss = -(jnp.where(known, contrast, 0.0) * path.twist).sum((0, -1)).mean()
        return loss, self._info(draws, programs, beta, toward_target, never=True)


@checked(ObjectiveError)
@dataclass(frozen=True)
class SoftValueRegression(TwistObjective):
    """Learn a twist by regression on the soft values of later steps: path consistency with traces.

    On paths of the twist-induced proposal q and of the prior, ψ_t moves towards

        y_t = (log π₀ − log q + r/β)_{t+1} + (1 − λ_{t+1})·ψ_{t+1} + λ_{t+1}·y_{t+1},

    by half of the mean square, nats². q ∝ π₀·exp(r/β + ψ) makes the right side for λ = 0 the soft Bellman backup
    log E_π₀[exp(r/β + ψ_{t+1})] without noise; with the true soft value it is right for every λ and every path. Where
    another policy drew a step, λ is cut by min(1, ratio of q to it). Paths that neither the prior nor q draws are not
    learned. Values are learned with their absolute size: where all rewards are far from 0, as log-probabilities are,
    add a constant that brings them near, which changes neither p* nor q. The metrics `ess` and `log_z` are those of
    `ContrastiveTwist`.

    Args:
        num_particles: draws per step and context.
        trace: λ, in [0, 1]; 1 regresses on what whole paths earned.
        prior_fraction: share of the draws that come from the prior.

    Raises:
        ObjectiveError: on use, if nature draws, the guide has no twist, or a step's draws cannot be listed.

    Example:
        >>> import bayesrl
        >>> bayesrl.objectives.SoftValueRegression().trace
        0.8

    References:
        Nachum, Norouzi, Xu & Schuurmans (2017), "Bridging the gap between value and policy based reinforcement
        learning", equation 15; Zhao et al. (2024), appendix C.
    """

    num_particles: CountAboveOne = 128
    trace: UnitInterval = 0.8
    prior_fraction: UnitInterval = 0.5

    needs_proposal: ClassVar[bool] = True

    @property
    def refuses_impossible(self) -> str:
        """Why rewards of −inf are refused; see `Objective.refuses_impossible`."""
        return "its square is then infinite"

    def surrogate(self, params: Params, draws: Draws, programs: Programs, beta: Any) -> tuple[Array, Info]:
        """Return half of the mean squared error of ψ per step and context, nats²; see `Objective.surrogate`."""
        path = _path(draws, programs.structure, beta)
        gained = path.ratio + path.gain
        fixed = lax.stop_gradient(path.twist)

        def back(later: _Later, now: tuple[Array, ...]) -> tuple[_Later, Array]:
            (target, following, trace), (gain, own, off, live) = later, now
            here = gain + (1 - trace) * following + trace * target
            # Behind the end of a text ψ stands still, and would be its own target.
            return (here, own, jnp.where(live, self.trace * jnp.exp(jnp.minimum(off, 0.0)), 1.0)), here

        of_step = (gained[..., 1:], fixed, path.off[..., :-1], path.live)
        by_time = jax.tree.map(lambda x: jnp.moveaxis(x, -1, 0), of_step)
        zero = jnp.zeros_like(fixed[..., 0])
        # What follows the last twist is known.
        targets = lax.scan(back, (zero, zero, jnp.ones_like(zero)), by_time, reverse=True)[1]
        error = path.twist - jnp.moveaxis(targets, 0, -1)
        loss = 0.5 * jnp.where(path.live, error**2, 0.0).sum() / path.live.sum()
        ratios, _ = relative_to_mixture(path.ratio.sum(-1), *self._split)
        return loss, self._info(draws, programs, beta, ratios + path.gain.sum(-1), never=False)


type _Later = tuple[Array, Array, Array]
"""The target and the twist of the step after, and how much of the target counts."""


def _softmax(log_weight: Array) -> Array:
    """Normalise over draws; nan where none has a weight."""
    return lax.stop_gradient(jax.nn.softmax(log_weight, axis=0))

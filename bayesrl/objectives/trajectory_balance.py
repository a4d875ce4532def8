"""Trajectory balance: squared log-ratios, whose fixed point is p* on draws of any behaviour with support."""

from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from jax import Array, lax

from bayesrl.arguments import Count, Positive, UnitInterval, UnusedOption, checked, real_range
from bayesrl.compilation.jit import closure_jit
from bayesrl.compilation.random_keys import fold_in
from bayesrl.core.draws import Draws, total
from bayesrl.core.handlers import stop_gradient
from bayesrl.core.programs import Programs, declared_params
from bayesrl.errors import EngineError, ObjectiveError
from bayesrl.objectives.base import OWN, Info, Objective, count_nonfinite, info_from_draws
from bayesrl.objectives.flow_network import FlowNetwork, pairwise_weights, per_step
from bayesrl.typing import Params, PRNGKey

LOG_Z = f"{OWN}log_z"
"""The parameter of log Z: its value divided by `log_z_rate`."""

_NUM_CHECKED = 64

type BalanceForm = Literal["learned", "variance", "pairs", "subtrajectory"]


@checked(
    ObjectiveError,
    UnusedOption(
        "decay", lambda given: given["form"] != "subtrajectory", "only form='subtrajectory' weighs stretches of steps"
    ),
    UnusedOption(
        "log_z_rate",
        lambda given: given["form"] in ("variance", "pairs"),
        "this form has no log Z to learn; use form='learned'",
    ),
)
@dataclass(frozen=True)
class TrajectoryBalance(Objective):
    """Minimise squares of log Z + log q(x) − log π₀(x) − R(x)/β, the training of GFlowNets.

    With w(x) = R/β + log p(y|x) + log π₀ − log q of one draw of one context, half of the mean of

        learned        (log Z − w)², with a learned log Z for each context;
        variance       (w − w̄)², with the mean w̄ of the batch in the place of log Z, times n/(n − 1);
        pairs          (w_i − w_j)²/2, for pairs of draws half a batch apart;
        subtrajectory  (log F_m − Σ_{m≤t<n} w_t − log F_n)² over the stretches of a scan, weighted by λⁿ⁻ᵐ, where
                       a recurrent network learns log F of the steps so far: log E_π₀[exp(what follows)].

    Each is 0 only where w = log Z for all draws, that is, at q = p*. So the draws need not be of q: they may come from
    the prior, from memory (`bayesrl.ReplayDraws`) or from anywhere, if they reach every x that p* holds. On draws
    of q itself the expected gradient is that of `ReverseKL`. The loss is in nats², and near the optimum, on draws of
    q, it is the gap in nats. J, E[R] and KL in the history are of q: other draws are weighted by q over what drew them
    (self-normalised); where that is unknown they are nan. The metric `ess` is the effective share of draws after this,
    and `log_z` is log Z + log p(y), as learned or averaged, nats.

    Args:
        num_particles: draws per step and context.
        form: as above. Sub-trajectories need a program with one scan, and reach p* as far as the network can tell
            the states apart; the other forms need neither.
        prior_fraction: share of the draws that come from the prior; with 1 no draw is one of q.
        decay: λ, above 0. Near 0 only single steps count; large values weigh the whole draw, as `learned` does.
        log_z_rate: learning rate of log Z, as a multiple of that of the guide.
        least_log_reward: nats; a total R/β below this counts as this (of each step, for sub-trajectories), which
            allows rewards of −inf. The fixed point is then the posterior of the clipped reward.

    Raises:
        ObjectiveError: an option is out of range; on use, if nature draws, a discount scales log-probabilities, the
            guide gives draws of the prior no probability, or there is no scan for sub-trajectories.

    Example:
        >>> import jax, jax.numpy as jnp, numpyro, numpyro.distributions as dist, bayesrl
        >>> def bandit():
        ...     arm = numpyro.sample("arm", dist.Categorical(logits=jnp.zeros(3)))
        ...     bayesrl.reward("payoff", jnp.array([0.0, 1.0, 2.0])[arm])
        >>> objective = bayesrl.objectives.TrajectoryBalance(prior_fraction=1.0)  # no draw of the fitted policy
        >>> options = {"beta": 1.0, "objective": objective, "num_steps": 500, "progress": False}
        >>> posterior = bayesrl.fit(jax.random.key(0), bandit, **options)
        >>> round(float(posterior.history["metrics/log_z"][-1, 0]), 2)  # log((1 + e + e²) / 3)
        1.31

    References:
        learned: Malkin, Jain, Bengio, Sun & Bengio (2022), equation 14. variance: Richter, Boustati, Nüsken, Ruiz &
        Akyildiz (2020), "VarGrad"; Zhang, Chen, Malkin & Bengio (2023), "Robust scheduling with GFlowNets". pairs: da
        Silva et al. (2024), "Embarrassingly parallel GFlowNets". subtrajectory: Madan et al. (2023), equation 5.
    """

    num_particles: Count = 64
    form: BalanceForm = "learned"
    prior_fraction: UnitInterval = 0.0
    decay: Positive = 0.9
    log_z_rate: Positive = 1.0
    least_log_reward: Annotated[float, real_range()] | None = None

    weighs_behaviour: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.form in ("variance", "pairs"):
            self._refuse_few(self.num_particles)

    def _refuse_few(self, num: int) -> None:
        if num < 2:
            raise ObjectiveError(
                f"TrajectoryBalance(form={self.form!r}) compares draws with each other, and has {num}; use at least 2 "
                "particles, or form='learned'"
            )

    @property
    def refuses_impossible(self) -> str:
        """Why rewards of −inf are refused, unless they are clipped; see `Objective.refuses_impossible`."""
        remedy = "is then infinite, unless TrajectoryBalance(least_log_reward=-20.0) clips it"
        return "" if self.least_log_reward is not None else f"its squared log-ratio {remedy}"

    @property
    def _split(self) -> tuple[int, int]:
        from_prior = round(self.prior_fraction * self.num_particles)
        return self.num_particles - from_prior, from_prior

    def init_params(self, key: PRNGKey, programs: Programs) -> Params:
        """Return log Z of each context, and the network of log F; see `Objective.init_params`."""
        if self.form in ("variance", "pairs"):
            return {}
        frames = sorted(programs.structure.contexts, key=lambda frame: frame.dim)
        log_z = {LOG_Z: jnp.zeros(tuple(frame.full_size for frame in frames))}
        if self.form == "learned":
            return log_z
        network = FlowNetwork.of(programs.structure)
        return log_z | closure_jit(network.init_params, name="flow_network")(key)

    def prepare(self, key: PRNGKey, programs: Programs, params: Params) -> "TrajectoryBalance":
        """Refuse programs whose fixed point would not be p*; see `Objective.prepare`."""
        structure = programs.structure
        nature = structure.names("environment")
        if nature:
            raise ObjectiveError(
                f"TrajectoryBalance would tilt environment site {nature[0]!r}, which is nature's: no policy makes its "
                "log-ratios equal; use ReverseKL()"
            )
        try:
            structure.check_whole_density()
        except EngineError as error:
            raise ObjectiveError(f"{error}; or use ReverseKL()") from error
        if programs.learned and declared_params(key, programs.policy, *programs.args)[0]:
            raise ObjectiveError(
                "TrajectoryBalance fits the posterior of a given program, and this one has parameters of its own to "
                "learn; use ReverseKL(), whose bound on log p(y) they maximise"
            )
        if self.form not in ("variance", "pairs") and LOG_Z not in params:
            raise ObjectiveError(
                f"TrajectoryBalance(form={self.form!r}) learns log Z, which NumPyro's SVI does not hold; use "
                "bayesrl.fit, or form='variance'"
            )
        if self.prior_fraction > 0 and not getattr(programs.guide, "within_prior", False):
            self._check_support(key, programs, params)
        return self

    def _check_support(self, key: PRNGKey, programs: Programs, params: Params) -> None:
        """Refuse a hand-written guide that gives draws of the prior no probability."""

        def look(key: PRNGKey, params: Params) -> dict[str, Array]:
            drawn = self._from_prior(key, params, programs, _NUM_CHECKED)
            return {name: log_q.min(tuple(range(1, log_q.ndim))) for name, log_q in drawn.log_q.items()}

        for name, least in closure_jit(look, name="support")(fold_in(key, 1), params).items():
            if count := int((least == -jnp.inf).sum()):
                raise ObjectiveError(
                    f"the guide gives {count} of {_NUM_CHECKED} draws of the prior probability 0 at site {name!r}, and "
                    "their log-ratio is infinite; draw from a distribution with the prior's support, or use "
                    "prior_fraction=0"
                )

    def _from_prior(self, key: PRNGKey, params: Params, programs: Programs, num: int) -> Draws:
        prior = stop_gradient(replace(programs, guide=None).draw(key, {}, num))
        structure = programs.structure
        # Rewards may be dear, so run the policy again only where both densities together are more accurate.
        listed = all(structure[name].support is not None for name in structure.actions)
        scored = programs.again(params, prior) if listed else programs.score(params, prior)
        return scored._replace(log_behaviour=prior.scores)

    def draw(self, key: PRNGKey, params: Params, programs: Programs) -> Draws:
        """Draw from the guide first, then from the prior, [particles, ...]; values carry no gradients."""
        from_guide, from_prior = self._split
        actions = programs.structure.actions
        parts = [programs.draw(key, params, from_guide, stopped=actions)] if from_guide else []
        if from_prior:
            # Both parts use one key, so that they share their mini-batch.
            parts.append(self._from_prior(key, params, programs, from_prior))
        if len(parts) == 1:
            return parts[0]
        if set(parts[0].log_ratio) != set(parts[1].log_ratio):
            parts = [part._replace(log_ratio={}, doubt={}) for part in parts]
        return jax.tree.map(lambda a, b: jnp.concatenate([a, b]), *parts)

    def evaluate(self, key: PRNGKey, params: Params, programs: Programs, beta: Any) -> tuple[Array, Info]:
        """Draw, and compute the loss; J, E[R] and KL are of the guide's own draws if there are any."""
        draws = self.draw(key, params, programs)
        loss, info = self.surrogate(params, draws, programs, beta)
        from_guide, from_prior = self._split
        if from_guide and from_prior:
            shape = (from_guide, *programs.structure.context_shape)
            own = info_from_draws(jax.tree.map(lambda x: x[:from_guide], draws), programs, beta, shape)
            info = own._replace(metrics=info.metrics, nonfinite=info.nonfinite)
        return loss, info

    def surrogate(self, params: Params, draws: Draws, programs: Programs, beta: Any) -> tuple[Array, Info]:
        """Return half of the mean squared log-ratio per context, nats²; see `Objective.surrogate`."""
        structure = programs.structure
        num = next(iter(draws.log_q.values())).shape[0]
        shape = (num, *structure.context_shape)
        if self.form == "subtrajectory":
            loss, log_z = self._over_stretches(params, draws, programs, beta)
        else:
            log_q = total(draws.log_q, shape)
            totals = draws.totals(shape)
            tempered = self._tempered(totals.reward, beta)
            # The direct form of log π₀ − log q is accurate; its gradient is that of −log q.
            fixed = lax.stop_gradient(tempered + totals.log_likelihood + totals.ratio)
            w = fixed - (log_q - lax.stop_gradient(log_q))
            if self.form == "learned":
                log_z = self._log_z(params, draws, programs)
                loss = 0.5 * ((w - log_z) ** 2).mean()
            else:
                self._refuse_few(num)
                log_z = fixed.mean(0)
                apart = w - log_z  # float32 loses the squares of uncentred numbers
                if self.form == "variance":
                    loss = 0.5 * ((apart - apart.mean(0)) ** 2).mean() * num / (num - 1)
                else:
                    loss = 0.25 * ((apart - jnp.roll(apart, num // 2, 0)) ** 2).mean()
        return loss, self._info(draws, programs, beta, shape, log_z)

    def _tempered(self, reward: Array, beta: Any) -> Array:
        floor = self.least_log_reward
        return reward / beta if floor is None else jnp.maximum(reward / beta, floor)

    def _log_z(self, params: Params, draws: Draws, programs: Programs) -> Array:
        """Return log Z of each draw and context, [draws or 1, *contexts]; with mini-batches, of their elements."""
        whole = self.log_z_rate * params[LOG_Z]
        frames = sorted(programs.structure.contexts, key=lambda frame: frame.dim)
        chosen = {frame.name: draws.plates[frame.name] for frame in frames if frame.name in draws.plates}
        if not chosen:
            return whole[None]

        def of_one(index: dict[str, Array]) -> Array:
            # Plates that are not subsampled have no indices among the draws.
            return whole[jnp.ix_(*(index.get(frame.name, jnp.arange(frame.size)) for frame in frames))]

        return jax.vmap(of_one)(chosen)

    def _over_stretches(self, params: Params, draws: Draws, programs: Programs, beta: Any) -> tuple[Array, Array]:
        structure = programs.structure
        network = FlowNetwork.of(structure)
        moved = {name: log_q - lax.stop_gradient(log_q) for name, log_q in draws.log_q.items()}
        parts = {name: lax.stop_gradient(ratio) - moved[name] for name, ratio in draws.ratios.items()}
        parts |= {name: self._tempered(reward, beta) for name, reward in draws.rewards.items()} | draws.log_likelihood
        terms = per_step(parts, structure, network.scan)
        log_z = self._log_z(params, draws, programs)
        flows = self.log_z_rate * network.log_flows(params, draws, structure)
        first = jnp.broadcast_to(log_z, terms.shape[:-1])[..., None]
        # What follows the end is 1, so log F there is 0.
        flow = jnp.concatenate([first, log_z[..., None] + flows, jnp.zeros_like(first)], -1)
        earned = jnp.concatenate([jnp.zeros_like(first), jnp.cumsum(terms, -1)], -1)
        # The sum over a stretch is a difference of two levels. Any constant drops out, so centre for float32.
        level = flow + earned - lax.stop_gradient(log_z)[..., None]
        weights = jnp.asarray(pairwise_weights(terms.shape[-1], self.decay))
        squares = (level[..., :, None] - level[..., None, :]) ** 2
        return 0.5 * (weights * squares).sum((-2, -1)).mean(), log_z

    def _info(self, draws: Draws, programs: Programs, beta: Any, shape: tuple[int, ...], log_z: Array) -> Info:
        """Summarise draws of any behaviour as those of q, by self-normalised weights."""
        draws = stop_gradient(draws)
        behind = total(draws.log_behaviour, shape) if draws.log_behaviour else jnp.full(shape, jnp.nan)
        weight = jax.nn.softmax(total(draws.scores, shape) - behind, axis=0)
        # To `info_from_draws`, the draws are the branches of one particle.
        as_branches = jax.tree.map(lambda x: x[None], draws)
        info = info_from_draws(as_branches, programs, beta, (1, *shape), weight[None])
        told = {"log_z": lax.stop_gradient(log_z).mean(), "ess": (1 / (weight**2).sum(0)).mean() / shape[0]}
        never = self.least_log_reward is not None
        return info._replace(metrics=info.metrics | told, nonfinite=count_nonfinite(draws, never=never))

"""What runs the particles of `smc`: along temperatures, along the time of a scan, or as a program itself knows how."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from bayesrl.compilation.jit import ClosureJit
from bayesrl.compilation.random_keys import as_hash_key, fold_in, split
from bayesrl.core.draws import Draws, Totals
from bayesrl.core.programs import Programs
from bayesrl.core.structure import Structure
from bayesrl.errors import EngineError
from bayesrl.exact.grid import num_assignments
from bayesrl.exact.weighted_draws import context_axes
from bayesrl.monte_carlo.particles.filter import FilterPlan, run_filter
from bayesrl.monte_carlo.particles.kernels import KernelName
from bayesrl.monte_carlo.particles.resampling import Scheme
from bayesrl.monte_carlo.particles.tempering import MOST_TEMPERATURES, TemperedPath, tempered_path
from bayesrl.monte_carlo.particles.time_steps import TimeSteps, context_axes_of_carries
from bayesrl.monte_carlo.particles.twists import ExactTwist, Twist, UserTwist, finite_twist, learned_twist
from bayesrl.monte_carlo.weighting import ScoredDraws, refuse_worthless
from bayesrl.posterior.posterior import Posterior
from bayesrl.statistics.evaluations import Evaluations
from bayesrl.typing import Params, PRNGKey

_MOST_STATES = 2**20
_ROUNDING = 1e-3
_RENEWALS = 64
_NATS_LOST, _SHARE_LOST = 0.1, 1e-3
"""A twist may be rounded by this many nats, or by that share of them where rewards are large themselves."""


class ParticleOptions(NamedTuple):
    """How many particles, when and how to resample them, and how they look ahead; see `smc`.

    `renewals` is how many times a conditional run along a scan may give its reference another past; `most_steps` the
    length of a path of temperatures at which a pilot gives up.
    """

    num_particles: int
    num_replications: int
    resample_below: float
    resampling: Scheme
    twist: Any
    renewals: int = 0
    most_steps: int = MOST_TEMPERATURES


@runtime_checkable
class ParticleEngine(Protocol):
    """Runs all replications of a program's particles."""

    def run(
        self, key: PRNGKey, beta: float | None, reference: dict[str, Any] | None = None
    ) -> tuple[ScoredDraws, np.ndarray]:
        """Return scored particles, all replications behind one another, and their log-weights [draws, contexts].

        Args:
            key: consumed whole.
            beta: reward units per nat; None without rewards.
            reference: a path for each replication, {site: [replications, ...]}, on which the run is conditional.
        """

    def renewing(self) -> "ParticleEngine":
        """Return an engine whose chains of conditional runs mix better, at a price; itself if it has none."""


type _MakeEngine = Callable[[Programs, Params, ParticleOptions], ParticleEngine]

_ENGINES: dict[type, _MakeEngine] = {}


def register_particles(kind: type) -> Callable[[Any], Any]:
    """Let programs of one class run particles along a time of their own: decorates a `ParticleEngine`."""

    def register(engine: Any) -> Any:
        _ENGINES[kind] = engine
        return engine

    return register


def own_engine(policy: Any) -> _MakeEngine | None:
    """Return the engine that a program's class has registered."""
    return next((engine for kind, engine in _ENGINES.items() if isinstance(policy, kind)), None)


def usual_twist(policy: Any) -> Any:
    """Return the twist that the engine of a program's class looks ahead by, if it has one that costs little."""
    kind: Any = own_engine(policy)
    return None if kind is None else kind.usual_twist(policy)


@dataclass(frozen=True)
class TemperedParticles:
    """Particles on a path of temperatures; see `ParticleEngine`."""

    programs: Programs
    params: Params
    size: ParticleOptions
    schedule: Sequence[float] | None
    moves: Sequence[KernelName] | None
    num_moves: int
    _paths: dict[Any, TemperedPath] = field(default_factory=dict, init=False, repr=False, compare=False)

    def run(
        self, key: PRNGKey, beta: float | None, reference: dict[str, Any] | None = None
    ) -> tuple[ScoredDraws, np.ndarray]:
        """Run; see `ParticleEngine`."""
        structure = self.programs.structure
        kind = (beta, reference is not None)
        chosen = kind not in self._paths
        if chosen:
            self._paths[kind] = tempered_path(
                fold_in(key, 0),
                self.programs,
                self.params,
                beta,
                context_axes(structure),
                num_runs=self.size.num_replications,
                num_particles=self.size.num_particles,
                powers=None if self.schedule is None else self._powers(self.schedule, beta),
                moves=self.moves,
                num_moves=self.num_moves,
                threshold=self.size.resample_below,
                # Only multinomial resampling leaves the others independent of the particle that must survive.
                scheme=self.size.resampling if reference is None else "multinomial",
                most_steps=self.size.most_steps,
            )
        found = self._paths[kind].run(fold_in(key, 1), reference)
        contexts = found.log_weights.shape[-1]
        sites = jax.tree.map(lambda x: np.asarray(x).reshape(-1, *x.shape[2:]), found.sites)
        # Moves carry only log q and w; rewards and metrics by site take one more run of the last particles.
        path = self._paths[kind]
        # The pilot takes as many steps as a run, and only the first run of a path needs it.
        spent = path.evaluations(conditional=reference is not None)
        spent += path.evaluations(conditional=False) if chosen and path.piloted else 0
        scored = _score_all(self.programs, self.params, sites)
        draws = ScoredDraws.of(*scored, structure, Evaluations.of_both(spent))
        refuse_worthless(structure, draws)
        return draws, found.log_weights.reshape(-1, contexts)

    def renewing(self) -> "TemperedParticles":
        """Return itself: its moves renew whole paths already."""
        return self

    def _powers(self, schedule: Sequence[float], beta: float | None) -> list[float]:
        end = 1.0 if beta is None else beta
        if not math.isclose(schedule[-1], end, rel_tol=1e-6):
            raise EngineError(
                f"schedule ends at temperature {schedule[-1]:.6g}, and the posterior is that of "
                f"{'1 (no rewards)' if beta is None else f'beta={end:.6g}'}; end it there"
            )
        # The last power is 1 exactly: end/end could be off by rounding, and the run must end at the target.
        return [end / float(t) for t in schedule[:-1]] + [1.0]


@partial(ClosureJit, name="score_particles")
def _score_particles(programs: Any, params: Params, sites: dict[str, Array]) -> tuple[Draws, Totals]:
    return _scored(programs, jax.vmap(lambda values: programs.run_both(None, params, values))(sites))


def _score_all(programs: Programs, params: Params, sites: dict[str, Any]) -> tuple[Draws, Totals]:
    found: tuple[Draws, Totals] = jax.device_get(_score_particles(programs, params, sites))
    return found


def _scored(programs: Programs, draws: Draws) -> tuple[Draws, Totals]:
    num = len(jax.tree.leaves(draws.sites)[0])
    shape = (num, *programs.structure.context_shape)
    rewards = {name: jnp.broadcast_to(values.sum(-1), shape) for name, values in draws.rewards.items()}
    kept = Draws.from_sites(draws.sites)._replace(metrics=draws.metrics, rewards=rewards)
    return kept, draws.totals(shape)


@dataclass(frozen=True)
class SequentialParticles:
    """Particles along the time of a scan; see `ParticleEngine`."""

    steps: TimeSteps
    params: Params
    size: ParticleOptions
    _plans: dict[Any, FilterPlan] = field(default_factory=dict, init=False, repr=False, compare=False)
    _prepared: dict[Any, Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    def run(
        self, key: PRNGKey, beta: float | None, reference: dict[str, Any] | None = None
    ) -> tuple[ScoredDraws, np.ndarray]:
        """Run; see `ParticleEngine`."""
        structure = self.steps.programs.structure
        given = (self.params, None if beta is None else np.asarray(beta, np.float32), as_hash_key(key), reference)
        # An exact twist holds the values at its β, so each β has a plan of its own.
        kind = (beta, reference is not None)
        planned = beta not in self._plans
        if kind not in self._prepared:
            plan = self._plans[beta] = self._plans[beta] if beta in self._plans else self._plan(beta)
            if reference is not None:
                # Only multinomial resampling leaves the others independent of the particle that must survive.
                plan = replace(plan, scheme="multinomial")
            self._prepared[kind] = plan, _run.prepare((plan, self.size.num_replications), *given)
        plan, compiled = self._prepared[kind]
        found = jax.device_get(compiled(*given))
        run, (draws, totals), weights = found
        check_filter(structure, self.size.num_particles, run.twists, run.sizes, first=-1)
        if not run.agrees.all():
            raise EngineError(
                "the program scores its paths step by step otherwise than as a whole, so weights would be wrong; it "
                "must depend on nothing but its arguments, its sites and the carry of its scan"
            )
        draws, totals = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), (draws, totals))
        spent = self._spent(plan, planned=planned, conditional=reference is not None)
        scored = ScoredDraws.of(draws, totals, structure, spent)
        refuse_worthless(structure, scored)
        if beta is not None:
            check_precision(run.twists, scored.reward / beta)
        return scored, np.asarray(weights, float).reshape(-1, weights.shape[-1])

    def evaluations_beforehand(self, beta: float | None) -> int:
        """Return how often the program is evaluated before the first run: for the values of an exact twist."""
        if self.size.twist != "exact":
            return 0
        self._plans[beta] = self._plans[beta] if beta in self._plans else self._plan(beta)
        twist = self._plans[beta].twist
        return twist.evaluations.policy if isinstance(twist, ExactTwist) else 0

    def evaluations_per_particle(self) -> int:
        """Return how often a run evaluates the program for each particle."""
        tried = self._num_tried() if self.size.twist is not None and self.steps.programs.guide is None else 1
        return tried + 1

    def _num_tried(self) -> int:
        return max(1, num_assignments(self.steps.axes(self.steps.inside))) if self.steps.is_finite else 1

    def _spent(self, plan: FilterPlan, *, planned: bool, conditional: bool) -> Evaluations:
        """Count the program's evaluations in one run: along its steps, once more as a whole, and for an exact twist."""
        tried = self._num_tried() if plan.look_ahead else 1
        # A renewal scores the past of every particle with the future of the reference.
        tried += self.size.renewals if conditional else 0
        spent = Evaluations.of_both((tried + 1) * self.size.num_replications * self.size.num_particles)
        return spent.plus(plan.twist.evaluations) if planned and isinstance(plan.twist, ExactTwist) else spent

    def renewing(self) -> "SequentialParticles":
        """Return particles whose conditional runs may give their references other pasts, so that chains mix."""
        return SequentialParticles(self.steps, self.params, self.size._replace(renewals=_RENEWALS))

    def _plan(self, beta: float | None) -> FilterPlan:
        steps, structure = self.steps, self.steps.programs.structure
        carry_axes = context_axes_of_carries(steps, self.params)
        twist: Twist | None = None
        if self.size.twist == "exact":
            frozen = replace(steps.programs, guide=None)
            twist = ExactTwist(frozen, beta, carry_axes[0], _MOST_STATES)
        elif self.size.twist == "reward":
            raise EngineError(
                "twist='reward' is the reward of a text so far, and a scan shows its rewards step by step anyway; pass "
                "a function of (step, carry), or twist='exact'"
            )
        # Without β the run is for p(y), where rewards, and so their values, do not count.
        elif self.size.twist is not None and (beta is not None or isinstance(self.size.twist, Posterior)):
            twist = UserTwist(self._function(self.size.twist), structure)
        look_ahead = twist is not None and steps.programs.guide is None and steps.is_finite
        return FilterPlan(
            steps,
            self.size.num_particles,
            self.size.resample_below,
            self.size.resampling,
            twist,
            look_ahead,
            context_axes(structure),
            carry_axes,
            self.size.renewals,
        )

    def _function(self, twist: Any) -> Callable[..., Any]:
        if not isinstance(twist, Posterior):
            function: Callable[..., Any] = twist
            return function
        guide, params, _ = learned_twist(twist)
        values: Callable[..., Any] = guide.twist_values(params)
        return values


def check_filter(structure: Structure, num_particles: int, twists: np.ndarray, sizes: np.ndarray, first: int) -> None:
    """Refuse a twist that is nan, and particles that have all lost their weight.

    Args:
        structure: of the program.
        num_particles: of one replication.
        twists: mean |twist| over particles, nan if one is nan, [replications, steps, contexts], nats.
        sizes: effective numbers of particles, 0 if no particle has a weight, in the same shape.
        first: number of the first step.

    Raises:
        EngineError: naming the step and the context.
    """
    if np.isnan(twists).any():
        step, context = (int(i) for i in np.argwhere(np.isnan(twists).any(0))[0])
        raise EngineError(
            f"the twist is nan after step {step + first} in {_context(structure, context)}; return a finite value, "
            "reward units, for every state that the prior can reach"
        )
    if np.isinf(twists).any():
        step, context = (int(i) for i in np.argwhere(np.isinf(twists).any(0))[0])
        raise EngineError(
            f"the twist is inf after step {step + first} in {_context(structure, context)}; return a finite value, "
            "reward units"
        )
    dead = (sizes == 0).any(0)
    if dead.any():
        step, context = (int(i) for i in np.argwhere(dead)[0])
        raise EngineError(
            f"no particle has a weight after step {step + first} in {_context(structure, context)}: every reward or "
            f"likelihood so far is -inf; raise num_particles={num_particles}, or pass a proposal or a twist"
        )


def check_precision(twists: np.ndarray, tilt: np.ndarray) -> None:
    """Refuse twists so large that single precision loses the rewards beside them.

    Args:
        twists: mean |twist| of a run, nats; see `check_filter`.
        tilt: R/β of the particles, [particles, contexts], nats.

    Raises:
        EngineError: what rounding a twist leaves is no longer small beside the rewards.
    """
    largest = float(twists.max())
    rounding = largest * float(np.finfo(np.float32).eps)
    scale = float(np.abs(np.where(np.isfinite(tilt), tilt, 0.0)).max())
    if rounding > _NATS_LOST * max(1.0, _SHARE_LOST * scale):
        raise EngineError(
            f"the twist reaches {largest:.3g} nats, and single precision rounds it by {rounding:.2g} of them, where "
            f"rewards / beta reach {scale:.3g}; return values no larger than what is still to come"
        )


def _context(structure: Any, flat: int) -> str:
    if not structure.contexts:
        return "the program"
    at = np.unravel_index(flat, structure.context_shape)
    frames = sorted(structure.contexts, key=lambda frame: frame.dim)
    return "context " + ", ".join(f"{frame.name!r}[{int(i)}]" for frame, i in zip(frames, at, strict=True))


class _Checked(NamedTuple):
    """What the host must look at: twists [runs, 1 + steps, contexts], sizes as in `FilterRun`, and agreement."""

    twists: Array
    sizes: Array
    agrees: Array


@partial(ClosureJit, name="filter")
def _run(
    static: Any, params: Params, beta: Any, key: PRNGKey, reference: dict[str, Array] | None
) -> tuple[_Checked, tuple[Draws, Totals], Array]:
    plan, num_runs = static
    steps = plan.steps
    programs = steps.programs
    shape = (plan.num_particles, *programs.structure.context_shape)

    def one(key: PRNGKey, reference: dict[str, Array] | None) -> tuple[_Checked, tuple[Draws, Totals], Array]:
        run = run_filter(fold_in(key, 0), plan, params, beta, reference)
        keys = split(fold_in(key, 1), plan.num_particles, None)
        # The whole program once more: it draws and scores what stands behind the scan, and confirms the steps.
        draws = jax.vmap(lambda k, v: programs.run_both(k, params, v))(keys, run.sites)
        if reference is not None:
            # The reference also has the sites behind the scan, which other particles have just drawn; its past may
            # have been renewed.
            whole = programs.run_both(None, params, reference | {k: x[0] for k, x in run.sites.items()})
            draws = jax.tree.map(lambda x, y: x.at[0].set(y), draws, whole)

        def weight(names: Sequence[str]) -> Array:
            totals = draws.of_sites(names).totals(shape)
            gain = totals.log_likelihood + totals.ratio
            return (gain if beta is None else gain + totals.reward / beta).reshape(plan.num_particles, -1)

        along = weight((*steps.before, *steps.inside))
        # The last twist stood for what comes behind the scan; now that is known.
        weights = run.log_z + run.log_weights - finite_twist(run.twisted) + weight(steps.after)
        possible = jnp.isfinite(along) & jnp.isfinite(run.log_weights)
        # Single precision: along time the terms are added in another order than in the whole program.
        off = jnp.where(possible, jnp.abs(along - run.total), 0.0)
        agrees = (off <= _ROUNDING * (1 + jnp.abs(jnp.where(possible, along, 0.0)))).all()
        return _Checked(run.twists, run.sizes, agrees), _scored(programs, draws), weights

    return jax.vmap(one)(split(key, num_runs, None), reference)

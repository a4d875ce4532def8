"""Calibration by simulation: does inference recover what generated the data, and do fits cover exact draws?"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from numpyro import handlers

from bayesrl.core.estimates import Estimate
from bayesrl.core.handlers import IntoScans
from bayesrl.core.pairing import Pair, freeze
from bayesrl.core.primitives import kind_of
from bayesrl.core.recording import Recording, record, site_log_prob
from bayesrl.core.showing import Block, Line, Listing, Shown
from bayesrl.core.structure import Structure, as_arrays, inspect, structure_of
from bayesrl.core.wording import number, with_error
from bayesrl.engines.grid import count, decode
from bayesrl.engines.setup import set_up
from bayesrl.engines.svi import Lane, default_optimizer, init, run_chunk
from bayesrl.engines.tabulation import path_axes
from bayesrl.errors import EngineError, PolicyError
from bayesrl.guides import GuideFamily
from bayesrl.objectives import Objective, ReverseKL
from bayesrl.typing import PRNGKey, Program

type Drawer = Callable[[PRNGKey, tuple[Any, ...]], dict[str, Array]]
"""Draws of the latent sites given arguments: (key, args) → {site: [num_draws, ...]}."""

type Inference = Callable[[PRNGKey, Program, tuple[Any, ...], int], Drawer]
"""Gets inference ready for a program on example arguments: (key, program, args, num_draws) → `Drawer`."""

LIKELIHOOD = "log p(y|θ)"
_LEVEL = 0.01
_AT_ONCE = 64
_MOST_ASSIGNMENTS = 2**16


def calibrate(
    key: PRNGKey,
    model: Program,
    *args: Any,
    infer: Inference | None = None,
    num_replications: int = 200,
    num_draws: int = 99,
) -> "Calibration":
    """Check inference for a program with data by simulation: draw θ ~ p(θ), y ~ p(y|θ), infer, rank θ.

    If the draws θ₁…θ_L come from p(θ|y), the rank of θ among them is uniform on 0…L, of every number
    in θ and of log p(y|θ), which also catches inference that ignores the data. Ties, which discrete
    sites have, are broken at random, so that this holds for them too. The data are simulated at the
    program's `obs=` sites, wherever they are; `args` only give shapes and covariates.

    Args:
        key: consumed whole.
        model: a program with latent and observed sites and without rewards.
        *args: its arguments.
        infer: what to check, `by_fit()` by default. It is called once, for a program whose arguments
            are (data, *args) with data = {site: values}; the function that it gives must be traceable
            by JAX, for it runs on many data sets at once. Draws should be independent of one another.
        num_replications: how many data sets.
        num_draws: L, draws for each.

    Returns:
        `Calibration`.

    Raises:
        PolicyError: there are rewards, no observed or no latent site, or a subsampled plate.

    Example:
        >>> import jax, jax.numpy as jnp, numpyro, numpyro.distributions as dist
        >>> from bayesrl.certainty.simulation import by_enumeration, calibrate
        >>> def coin(flips):
        ...     fair = numpyro.sample("fair", dist.Bernoulli(0.5))
        ...     with numpyro.plate("flip", len(flips)):
        ...         numpyro.sample("flips", dist.Bernoulli(jnp.where(fair, 0.5, 0.9)), obs=flips)
        >>> calibrate(jax.random.key(0), coin, jnp.zeros(5), infer=by_enumeration()).verdict
        'pass'

    References:
        Talts, Betancourt, Simpson, Vehtari & Gelman (2018), "Validating Bayesian inference algorithms
        with simulation-based calibration", algorithm 1; Modrák et al. (2023), "Simulation-based
        calibration checking for Bayesian computation: the choice of test quantities"; Säilynoja,
        Bürkner & Vehtari (2022), "Graphical test for discrete uniformity".
    """
    if num_replications < 20 or num_draws < 9:
        raise EngineError(
            f"num_replications={num_replications} and num_draws={num_draws} tell nothing; use at least 20 and 9"
        )
    args = as_arrays(args)
    structure = inspect(jax.random.key(0), model, *args)
    _refuse(structure)
    frozen, _ = freeze(jax.random.key(0), model, *args)
    simulate_key, infer_key, run_key, tie_key = jax.random.split(key, 4)
    keys = jax.random.split(simulate_key, num_replications)
    truth, data = jax.jit(jax.vmap(partial(_simulate, frozen, structure, args)))(keys)
    program = partial(_given, frozen)
    example = (jax.tree.map(lambda x: x[0], data), *args)
    drawer = (by_fit() if infer is None else infer)(infer_key, program, example, num_draws)

    def one(told: tuple[PRNGKey, dict[str, Array], dict[str, Array]]) -> tuple[Array, Array]:
        own_key, theta, y = told
        draws = drawer(own_key, (y, *args))
        everything = {n: jnp.concatenate([theta[n][None], jnp.asarray(draws[n])]) for n in theta}
        values = jax.vmap(lambda sites: _quantities(program, structure, (y, *args), sites))(everything)
        return (values[1:] < values[0]).sum(0), (values[1:] == values[0]).sum(0)

    run = jax.jit(lambda told: jax.lax.map(one, told, batch_size=min(_AT_ONCE, num_replications)))
    below, equal = (np.asarray(x) for x in run((jax.random.split(run_key, num_replications), truth, data)))
    rng = np.random.default_rng(np.asarray(jax.random.bits(tie_key, (4,))).tolist())
    ranks = below + rng.integers(0, equal, endpoint=True)
    return Calibration(_names(structure), ranks, num_draws, (ranks + rng.random(ranks.shape)) / (num_draws + 1))


def _refuse(structure: Structure) -> None:
    rewards = structure.named("reward")
    if rewards:
        raise PolicyError(
            f"the program has reward site {rewards[0]!r}; rewards generate no data to simulate: calibrate a program "
            "whose latent sites are to be inferred from obs= sites, or see `coverage` for a tilted fit"
        )
    if not structure.named("observed"):
        raise PolicyError("the program has no observed site, so there are no data to simulate; give one obs=...")
    if not structure.named("action", "environment"):
        raise PolicyError("the program has no latent site, so there is nothing to infer; sample one without obs=")
    if structure.subsampled:
        raise PolicyError(
            f"plate {structure.subsampled[0]!r} is subsampled, and data are simulated whole; use bayesrl.whole(model)"
        )


# ---- programs --------------------------------------------------------------------------------


class _Simulated(IntoScans):
    """Draws what the program observes."""

    def process_site(self, msg: dict[str, Any]) -> None:
        """Forget the data of an observed site."""
        if msg["type"] == "sample" and kind_of(msg) == "observed":
            msg["value"], msg["is_observed"] = None, False


def _simulate(
    model: Program, structure: Structure, args: tuple[Any, ...], key: PRNGKey
) -> tuple[dict[str, Array], dict[str, Array]]:
    """Draw latent sites and data together."""
    sites = record(handlers.seed(_Simulated(model), rng_seed=key), *args).sites
    latent, observed = structure.named("action", "environment"), structure.named("observed")
    return {name: jnp.asarray(sites[name].value) for name in latent}, {name: sites[name].value for name in observed}


def _given(model: Program, data: dict[str, Array], *args: Any) -> Any:
    """Run a program on other data: a program of (data, *args)."""
    return handlers.condition(model, data=data)(*args)


def _quantities(program: Program, structure: Structure, args: tuple[Any, ...], sites: dict[str, Array]) -> Array:
    """Lay out every number of θ, and log p(y|θ)."""
    recording = _run(program, args, sites)
    observed = [recording.sites[name] for name in structure.named("observed")]
    likelihood = sum((site_log_prob(site).sum() for site in observed), start=jnp.zeros(()))
    numbers = [jnp.ravel(sites[name]).astype(float) for name in structure.named("action", "environment")]
    return jnp.concatenate([*numbers, likelihood[None]])


def _run(program: Program, args: tuple[Any, ...], sites: dict[str, Array]) -> Recording:
    return record(handlers.seed(handlers.substitute(program, data=sites), rng_seed=jax.random.key(0)), *args)


def _names(structure: Structure) -> tuple[str, ...]:
    names: list[str] = []
    for name in structure.named("action", "environment"):
        shape = structure[name].shape
        names += [f"{name}[{','.join(map(str, i))}]" if i else name for i in np.ndindex(*shape)]
    return (*names, LIKELIHOOD)


# ---- inference -------------------------------------------------------------------------------


def by_fit(
    *,
    guide: Program | GuideFamily | None = None,
    objective: Objective | None = None,
    num_steps: int = 1000,
    learning_rate: float | None = None,
) -> Inference:
    """Infer as `bayesrl.fit` does.

    Args:
        guide: a program of (data, *args), or a family; by default `AutoTilt()`.
        objective: from `bayesrl.objectives`; by default `ReverseKL()`.
        num_steps: gradient steps on every data set.
        learning_rate: where the cosine decay begins; by default that of the guide's family.
    """

    def prepare(key: PRNGKey, program: Program, args: tuple[Any, ...], num_draws: int) -> Drawer:
        chosen = ReverseKL() if objective is None else objective
        setup = set_up(key, program, args, None, guide, chosen, 1)
        rate = setup.learning_rate if learning_rate is None else learning_rate
        pair = setup.programs.pair()

        def with_args(arrays: tuple[Any, ...]) -> Pair:
            return Pair(pair.policy, pair.guide, pair.structure, arrays, pair.transforms, pair.learned)

        def draw(key: PRNGKey, args: tuple[Any, ...]) -> dict[str, Array]:
            fit_key, draw_key = jax.random.split(key)
            arrays, static = eqx.partition(args, eqx.is_array)
            lane = Lane(
                setup.objective,
                default_optimizer(rate, num_steps),
                lambda given: with_args(eqx.combine(given, static)),
            )
            start = init(lane, setup.params)
            state, _ = run_chunk(lane, fit_key[None], start, setup.betas, arrays, jnp.asarray(num_steps))
            params = jax.tree.map(lambda x: x[0], state.average)
            return with_args(args).draw(draw_key, params, num_draws, share=False).sites

        return draw

    return prepare


def by_enumeration() -> Inference:
    """Infer exactly, where all latent sites are discrete and few: draws by the probabilities of all assignments."""

    def prepare(key: PRNGKey, program: Program, args: tuple[Any, ...], num_draws: int) -> Drawer:
        # Contexts are taken together here: a program without a context plate is one problem.
        structure = _one_problem(structure_of(record(handlers.seed(program, rng_seed=key), *args)))
        axes = path_axes(structure)
        if count(axes) > _MOST_ASSIGNMENTS:
            raise EngineError(
                f"the program has {count(axes):,} assignments, too many to enumerate for every data set; use by_fit()"
            )
        rows = jax.vmap(partial(decode, axes))(jnp.arange(count(axes)))

        def draw(key: PRNGKey, args: tuple[Any, ...]) -> dict[str, Array]:
            def log_joint(sites: dict[str, Array]) -> Array:
                recording = _run(program, args, sites)
                scored = [recording.sites[s.name] for s in structure.sites if s.kind != "metric"]
                return sum((site_log_prob(site).sum() for site in scored), start=jnp.zeros(()))

            chosen = jax.random.categorical(key, jax.vmap(log_joint)(rows), shape=(num_draws,))
            return jax.tree.map(lambda values: values[chosen], rows)

        return draw

    return prepare


def _one_problem(structure: Structure) -> Structure:
    return Structure(structure.sites, ())


# ---- what is found ---------------------------------------------------------------------------


@dataclass(frozen=True, repr=False)
class Calibration(Shown):
    """Ranks of what generated the data among draws inferred from them.

    Attributes:
        names: of the quantities: every number of every latent site, and log p(y|θ).
        ranks: [replication, quantity], 0 to `num_draws`, ties broken at random.
        num_draws: draws that each rank is among.
        pit: the same as uniform numbers between 0 and 1.
    """

    names: tuple[str, ...]
    ranks: np.ndarray
    num_draws: int
    pit: np.ndarray

    @property
    def p_values(self) -> np.ndarray:
        """Of a test of uniformity of each quantity (ArviZ's `pot_c`), [quantity]."""
        from arviz_stats.base.array import array_stats

        return np.asarray(array_stats.uniformity_test(self.pit, axis=0, method="pot_c")[0], float).reshape(-1)

    @property
    def p_value(self) -> float:
        """Of all quantities together, by Bonferroni."""
        return float(min(1.0, self.p_values.min() * len(self.names)))

    @property
    def verdict(self) -> Literal["pass", "fail"]:
        """`fail` where ranks this uneven would come of calibrated inference once in a hundred times."""
        return "fail" if self.p_value < _LEVEL else "pass"

    @property
    def sentence(self) -> str:
        """What the worst quantity looks like."""
        p_values, replications = self.p_values, len(self.pit)
        if self.verdict == "pass":
            return (
                f"Ranks of {len(self.names)} quantities over {replications} data sets are uniform, as they should be."
            )
        worst = int(p_values[:-1].argmin())
        if p_values[worst] * len(self.names) >= _LEVEL:
            return (
                f"Ranks of {LIKELIHOOD} are not uniform (p = {p_values[-1]:.1g}) though those of the latent sites are: "
                "inference does not use the data as it should."
            )
        centred = self.pit[:, worst] - 0.5
        shift, spread = centred.mean() * np.sqrt(12), ((centred**2).mean() - 1 / 12) * np.sqrt(180)
        if abs(shift) > abs(spread):
            how = "too low" if shift > 0 else "too high"
        else:
            how = "too narrow" if spread > 0 else "too wide"
        return f"Draws of {self.names[worst]} are {how}: its ranks are not uniform (p = {p_values[worst]:.1g})."

    def coverage(self, level: float) -> Estimate:
        """How often the central interval of this level held the truth, with standard error, [quantity]."""
        inside = np.abs(self.pit - 0.5) <= level / 2
        mean = inside.mean(0)
        return Estimate(jnp.asarray(mean), jnp.asarray(np.sqrt(mean * (1 - mean) / len(inside))))

    def _blocks(self) -> Sequence[Block]:
        p_values = self.p_values
        order = np.argsort(p_values)[:10]
        told = [self.coverage(level) for level in (0.5, 0.8, 0.95)]
        rows = [
            (
                self.names[i],
                number(float(p_values[i]), 2),
                *(with_error(Estimate(one.mean[i], one.se[i])) for one in told),
            )
            for i in order
        ]
        listing = Listing(("quantity", "p of uniformity", "in 50%", "in 80%", "in 95%"), rows)
        return Line(self.sentence, self.verdict), listing

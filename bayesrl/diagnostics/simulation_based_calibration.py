"""`calibrate`: check by simulation whether inference recovers the values that generated the data."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from numpyro import handlers

from bayesrl.arguments import Count, Positive, Untraced, checked, integer_range, user_code
from bayesrl.compilation.jit import to_host
from bayesrl.compilation.random_keys import key_from_seed, split, split_keys
from bayesrl.core.handlers import IntoScans
from bayesrl.core.primitives import site_kind
from bayesrl.core.programs import freeze
from bayesrl.core.rng import FoldedKeys
from bayesrl.core.structure import Structure, as_arrays, inspect
from bayesrl.core.trace import site_log_prob, trace_program
from bayesrl.diagnostics.rank_statistics import LIKELIHOOD, Calibration
from bayesrl.errors import EngineError, PolicyError
from bayesrl.exact.grid import decode_assignment, num_assignments, path_axes, run_with_sites
from bayesrl.guides import AutoGuide
from bayesrl.objectives import Objective, ReverseKL
from bayesrl.svi.optimizers import UNPILOTED_RATE, default_optimizer
from bayesrl.svi.problem_setup import set_up
from bayesrl.svi.step import State, StepConfig, run_chunk, start
from bayesrl.typing import PRNGKey, Program
from bayesrl.value_checks import format_value

type Drawer = Callable[[PRNGKey, tuple[Any, ...]], dict[str, Array]]
"""Draws of the latent sites given arguments: (key, args) → {site: [num_samples, ...]}."""

type Inference = Callable[[PRNGKey, Program, tuple[Any, ...], int], Drawer]
"""Prepares inference for a program on example arguments: (key, program, args, num_samples) → `Drawer`."""


@dataclass(frozen=True)
class HostDrawer:
    """A `Drawer` that JAX cannot trace: it is called for one data set after another, with NumPy arrays."""

    draw: Drawer

    def __call__(self, key: PRNGKey, args: tuple[Any, ...]) -> dict[str, Any]:
        """Draw given arguments."""
        return self.draw(key, args)


_AT_ONCE = 64
_MOST_ASSIGNMENTS = 2**16


@checked(EngineError, Untraced("call it outside: it compiles its own programs"))
def calibrate(
    key: PRNGKey,
    model: Program,
    *args: Any,
    infer: Inference | None = None,
    num_replications: Annotated[int, integer_range(20)] = 200,
    num_samples: Annotated[int, integer_range(9)] = 99,
) -> Calibration:
    """Check inference for a program with data by simulation: draw θ ~ p(θ), y ~ p(y|θ), infer, rank θ.

    If the draws θ₁…θ_L come from p(θ|y), the rank of θ among them is uniform on 0…L. This holds for every
    number in θ and for log p(y|θ), which also catches inference that ignores the data. Discrete sites
    have ties; they are broken at random, so that it holds for them too. The data are simulated at the
    program's `obs=` sites, wherever they are; `args` only provide shapes and covariates.

    Args:
        key: consumed whole.
        model: a program with latent and observed sites and without rewards.
        *args: its arguments.
        infer: the inference to check, by default `svi_inference()`. It is called once, for a program whose
            arguments are (data, *args) with data = {site: values}. JAX must be able to trace the function
            it returns, which runs on many data sets at once. Its draws should be independent of one another.
        num_replications: number of data sets.
        num_samples: L, the number of draws for each.

    Returns:
        `Calibration`.

    Raises:
        PolicyError: there are rewards, no observed or no latent site, or a subsampled plate.
        EngineError: the numbers are too small; or the function that `infer` returns draws nan, draws other
            sites or shapes, or cannot be traced.

    Example:
        >>> import jax, jax.numpy as jnp, numpyro, numpyro.distributions as dist, bayesrl
        >>> def coin(flips):
        ...     fair = numpyro.sample("fair", dist.Bernoulli(0.5))
        ...     with numpyro.plate("flip", len(flips)):
        ...         numpyro.sample("flips", dist.Bernoulli(jnp.where(fair, 0.5, 0.9)), obs=flips)
        >>> bayesrl.calibrate(jax.random.key(0), coin, jnp.zeros(5), infer=bayesrl.exact_inference()).verdict
        'pass'

    References:
        Talts, Betancourt, Simpson, Vehtari & Gelman (2018), "Validating Bayesian inference algorithms
        with simulation-based calibration", algorithm 1; Modrák et al. (2023), "Simulation-based
        calibration checking for Bayesian computation: the choice of test quantities"; Säilynoja,
        Bürkner & Vehtari (2022), "Graphical test for discrete uniformity".
    """
    if infer in _MAKERS:
        raise EngineError(f"infer={_MAKERS[infer]} makes inference when it is called; pass infer={_MAKERS[infer]}()")
    args = as_arrays(args)
    structure = inspect(key_from_seed(0), model, *args)
    _refuse(structure)
    structure.check_memory(num_replications + num_samples * min(_AT_ONCE, num_replications), EngineError)
    frozen, _ = freeze(key_from_seed(0), model, *args)
    simulate_key, infer_key, run_key, tie_key = split_keys(key, 4)
    keys = split(simulate_key, num_replications)
    truth, data = to_host(jax.jit(jax.vmap(partial(_simulate, frozen, structure, args)))(keys))
    program = partial(_given, frozen)
    example = (jax.tree.map(lambda x: x[0, ...], data), *args)  # x[0] of a NumPy vector is no array
    drawer = _prepared(svi_inference() if infer is None else infer, infer_key, program, example, num_samples)
    keys = split(run_key, num_replications)
    made = _draws_on_host(drawer, keys, data, args)
    _check_draws(drawer, example, jax.tree.map(lambda x: x[0, ...], (truth, made)), num_samples)

    def one(given: tuple[Any, ...]) -> tuple[Array, Array, Array]:
        own_key, theta, y, ready = given
        draws = ready or drawer(own_key, (y, *args))
        # The truth is the first row of the batch, so that values equal to it score equally to the last bit.
        everything = {n: jnp.concatenate([theta[n][None], jnp.asarray(draws[n])]) for n in theta}
        values = jax.vmap(lambda sites: _quantities(program, structure, (y, *args), sites))(everything)
        return (values[1:] < values[0]).sum(0), (values[1:] == values[0]).sum(0), jnp.isnan(values[1:]).any(0)

    # Not one vmap: that would hold the fits to all data sets in memory at once.
    run = jax.jit(lambda given: jax.lax.map(one, given, batch_size=min(_AT_ONCE, num_replications)))
    below, equal, bad = (np.asarray(x) for x in run((keys, truth, data, made)))
    names = _names(structure)
    if bad.any():
        worst = int(bad.any(0).argmax())
        raise EngineError(
            f"inference drew nan for {names[worst]} on {int(bad[:, worst].sum())} of {num_replications} data sets; "
            "lower its learning rate, or mend what infer gives"
        )
    rng = np.random.default_rng(np.asarray(jax.random.bits(tie_key, (4,))).tolist())
    # A tied value takes a random place among its equals, which keeps the rank uniform.
    ranks = below + rng.integers(0, equal, endpoint=True)
    # A uniform number within each rank makes the ranks continuous, as the test of uniformity wants them.
    return Calibration(names, ranks, num_samples, (ranks + rng.random(ranks.shape)) / (num_samples + 1))


def _refuse(structure: Structure) -> None:
    rewards = structure.names("reward")
    if rewards:
        raise PolicyError(
            f"the program has reward site {rewards[0]!r}; rewards generate no data to simulate: calibrate a program "
            "whose latent sites are to be inferred from obs= sites, or see `coverage` for a tilted fit"
        )
    if not structure.names("observed"):
        raise PolicyError("the program has no observed site, so there are no data to simulate; give one obs=...")
    if not structure.names("action", "environment"):
        raise PolicyError("the program has no latent site, so there is nothing to infer; sample one without obs=")
    if structure.subsampled:
        raise PolicyError(
            f"plate {structure.subsampled[0]!r} is subsampled, and all data are simulated; use bayesrl.full_data(model)"
        )


def _prepared(infer: Inference, key: PRNGKey, program: Program, args: tuple[Any, ...], num_samples: int) -> Drawer:
    with user_code(
        "infer", EngineError, "let it give a function of (key, args) from (key, program, args, num_samples)"
    ):
        drawer: Any = infer(key, program, args, num_samples)
    if not callable(drawer):
        raise EngineError(f"infer gave {format_value(drawer)}, which is no function; give one of (key, args)")
    return drawer


def _draws_on_host(drawer: Drawer, keys: Any, data: dict[str, Any], args: tuple[Any, ...]) -> dict[str, np.ndarray]:
    """Draw for one data set after another, [data sets, num_samples, ...]; nothing yet where JAX can trace."""
    if not isinstance(drawer, HostDrawer):
        return {}
    parts = [drawer(key, (jax.tree.map(lambda x, at=at: x[at, ...], data), *args)) for at, key in enumerate(keys)]
    return {name: np.stack([np.asarray(part[name], np.float32) for part in parts]) for name in parts[0]}


def _check_draws(drawer: Drawer, args: tuple[Any, ...], known: Any, num_samples: int) -> None:
    """Refuse inference that JAX cannot trace or whose draws do not match the latent sites."""
    theta, draws = known
    try:
        draws = draws or jax.eval_shape(lambda key, data: drawer(key, (data, *args[1:])), key_from_seed(0), args[0])
    except jax.errors.JAXTypeError as error:
        reason = str(error).partition("\n")[0]
        raise EngineError(
            f"what infer gave cannot be traced by JAX ({reason}); write it with jax.numpy, without NumPy or "
            "Python's if on values"
        ) from None
    for name, value in theta.items():
        found = tuple(getattr(draws[name], "shape", ())) if isinstance(draws, dict) and name in draws else None
        wanted = (num_samples, *value.shape)
        if found != wanted:
            given = "no draws" if found is None else f"draws of shape {found}"
            raise EngineError(f"inference gave {given} of site {name!r}; give {{{name!r}: an array of shape {wanted}}}")


# ---- programs --------------------------------------------------------------------------------


class _Simulated(IntoScans):
    """Draws a value for every observed site."""

    def process_site(self, msg: dict[str, Any]) -> None:
        """Drop the data of an observed site."""
        if msg["type"] == "sample" and site_kind(msg) == "observed":
            msg["value"], msg["is_observed"] = None, False


def _simulate(
    model: Program, structure: Structure, args: tuple[Any, ...], key: PRNGKey
) -> tuple[dict[str, Array], dict[str, Array]]:
    """Draw latent sites and data together."""
    sites = trace_program(FoldedKeys(_Simulated(model), key), *args).sites
    latent, observed = structure.names("action", "environment"), structure.names("observed")
    return {name: jnp.asarray(sites[name].value) for name in latent}, {name: sites[name].value for name in observed}


def _given(model: Program, data: dict[str, Array], *args: Any) -> Any:
    """Run a program on other data, as a program of (data, *args)."""
    return handlers.condition(model, data=data)(*args)


def _quantities(program: Program, structure: Structure, args: tuple[Any, ...], sites: dict[str, Array]) -> Array:
    """Collect every number of θ, and log p(y|θ)."""
    trace = run_with_sites(program, sites, args)
    observed = [trace.sites[name] for name in structure.names("observed")]
    likelihood = sum((site_log_prob(site).sum() for site in observed), start=jnp.zeros(()))
    numbers = [jnp.ravel(sites[name]).astype(float) for name in structure.names("action", "environment")]
    return jnp.concatenate([*numbers, likelihood[None]])


def _names(structure: Structure) -> tuple[str, ...]:
    names: list[str] = []
    for name in structure.names("action", "environment"):
        shape = structure[name].shape
        names += [f"{name}[{','.join(map(str, i))}]" if i else name for i in np.ndindex(*shape)]
    return (*names, LIKELIHOOD)


# ---- inference -------------------------------------------------------------------------------


@checked(EngineError)
def svi_inference(
    *,
    guide: Program | AutoGuide | None = None,
    objective: Objective | None = None,
    num_steps: Count = 1000,
    learning_rate: Positive | None = None,
) -> Inference:
    """Infer as `bayesrl.fit` does.

    Args:
        guide: a program of (data, *args), or a family; by default `AutoTilt()`.
        objective: from `bayesrl.objectives`; by default `ReverseKL()`.
        num_steps: gradient steps on every data set.
        learning_rate: start of the cosine decay; by default that of the guide's family.

    Raises:
        EngineError: a number is out of range.

    Example:
        >>> import jax, jax.numpy as jnp, numpyro, numpyro.distributions as dist, bayesrl
        >>> def location(y):
        ...     theta = numpyro.sample("theta", dist.Normal(0.0, 1.0))
        ...     with numpyro.plate("datum", len(y)):
        ...         numpyro.sample("y", dist.Normal(theta, 1.0), obs=y)
        >>> infer = bayesrl.svi_inference(num_steps=200)
        >>> found = bayesrl.calibrate(jax.random.key(0), location, jnp.zeros(3), infer=infer, num_replications=50)
        >>> found.names, found.verdict
        (('theta', 'log p(y|θ)'), 'pass')
    """

    def prepare(key: PRNGKey, program: Program, args: tuple[Any, ...], num_samples: int) -> Drawer:
        chosen = ReverseKL() if objective is None else objective
        setup = set_up(key, program, args, None, guide, chosen, 1)
        rate = (setup.learning_rate or UNPILOTED_RATE) if learning_rate is None else learning_rate
        config = StepConfig(setup.objective, default_optimizer(rate, num_steps), setup.programs)

        def draw(key: PRNGKey, args: tuple[Any, ...]) -> dict[str, Array]:
            fit_key, draw_key = split_keys(key)
            arrays = eqx.filter(args, eqx.is_array)
            state = State(start(config, setup.params), setup.betas, arrays, config)
            train, _ = run_chunk(fit_key[None], state, jnp.asarray(num_steps))
            params = jax.tree.map(lambda x: x[0], train.average)
            return config.bind(arrays).draw(draw_key, params, num_samples, share=False).sites

        return draw

    return prepare


@checked(EngineError)
def nuts_inference(*, num_warmup: Count = 200, thinning: Count = 3) -> Inference:
    """Infer by NUTS, for programs whose latent sites are continuous: one chain for every data set.

    Args:
        num_warmup: steps of the chain that are thrown away.
        thinning: steps of the chain for each draw, so that draws are nearly independent.

    Raises:
        EngineError: a number is out of range.

    Example:
        >>> import jax, jax.numpy as jnp, numpyro, numpyro.distributions as dist, bayesrl
        >>> def location(y):
        ...     theta = numpyro.sample("theta", dist.Normal(0.0, 1.0))
        ...     with numpyro.plate("datum", len(y)):
        ...         numpyro.sample("y", dist.Normal(theta, 1.0), obs=y)
        >>> infer = bayesrl.nuts_inference(num_warmup=50)
        >>> bayesrl.calibrate(jax.random.key(0), location, jnp.zeros(3), infer=infer, num_replications=20).names
        ('theta', 'log p(y|θ)')

    References:
        Hoffman & Gelman (2014), "The No-U-Turn sampler".
    """

    def prepare(key: PRNGKey, program: Program, args: tuple[Any, ...], num_samples: int) -> Drawer:
        structure = inspect(key, program, *args)
        if discrete := [site.name for site in structure.sites if site.latent and site.discrete]:
            raise EngineError(f"NUTS moves continuous sites, and {discrete[0]!r} is discrete; use exact_inference()")

        def draw(key: PRNGKey, args: tuple[Any, ...]) -> dict[str, Array]:
            from numpyro.infer import MCMC, NUTS

            steps = {"num_warmup": num_warmup, "num_samples": thinning * num_samples, "thinning": thinning}
            chain = MCMC(NUTS(program), **steps, num_chains=1, progress_bar=False)
            chain.run(key, *args)
            found: dict[str, Array] = chain.get_samples()
            return found

        return draw

    return prepare


def exact_inference() -> Inference:
    """Infer exactly by enumerating all assignments; all latent sites must be discrete and few.

    Example:
        >>> import jax, jax.numpy as jnp, numpyro, numpyro.distributions as dist, bayesrl
        >>> def coin(flips):
        ...     fair = numpyro.sample("fair", dist.Bernoulli(0.5))
        ...     with numpyro.plate("flip", len(flips)):
        ...         numpyro.sample("flips", dist.Bernoulli(jnp.where(fair, 0.5, 0.9)), obs=flips)
        >>> exact = bayesrl.exact_inference()
        >>> found = bayesrl.calibrate(jax.random.key(0), coin, jnp.zeros(5), infer=exact, num_replications=50)
        >>> found.ranks.shape
        (50, 2)
    """

    def prepare(key: PRNGKey, program: Program, args: tuple[Any, ...], num_samples: int) -> Drawer:
        # Here all contexts form one problem, as in a program without a context plate.
        structure = _one_problem(inspect(key, program, *args))
        axes = path_axes(structure)
        if num_assignments(axes) > _MOST_ASSIGNMENTS:
            raise EngineError(
                f"the program has {num_assignments(axes):,} assignments, too many to enumerate for every data set; use "
                "svi_inference()"
            )
        rows = jax.jit(jax.vmap(partial(decode_assignment, axes)))(np.arange(num_assignments(axes)))

        def draw(key: PRNGKey, args: tuple[Any, ...]) -> dict[str, Array]:
            def log_joint(sites: dict[str, Array]) -> Array:
                trace = run_with_sites(program, sites, args)
                scored = [trace.sites[s.name] for s in structure.sites if s.kind != "metric"]
                return sum((site_log_prob(site).sum() for site in scored), start=jnp.zeros(()))

            chosen = jax.random.categorical(key, jax.vmap(log_joint)(rows), shape=(num_samples,))
            return jax.tree.map(lambda values: values[chosen], rows)

        return draw

    return prepare


def _one_problem(structure: Structure) -> Structure:
    return Structure(structure.sites, ())


_MAKERS: dict[Any, str] = {
    svi_inference: "svi_inference",
    nuts_inference: "nuts_inference",
    exact_inference: "exact_inference",
}

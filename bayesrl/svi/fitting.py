"""`fit`: from a policy to its posterior; `init`: the state before its first step, for your own training loops."""

from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from numpyro.infer.elbo import ELBO

from bayesrl import run_folder
from bayesrl.arguments import Count, Location, Positive, Untraced, UnusedOption, checked
from bayesrl.compilation.callbacks import host_errors
from bayesrl.compilation.jit import to_host, trace_cache
from bayesrl.compilation.random_keys import fold_in
from bayesrl.compilation.status import activity
from bayesrl.display.progress import show_progress
from bayesrl.errors import FitError, RunFolderError
from bayesrl.guides.base import Guide
from bayesrl.objectives import Objective, RegularizedReward, ReverseKL
from bayesrl.objectives.base import guide_params
from bayesrl.objectives.numpyro_elbo import as_objective
from bayesrl.posterior.datatree import as_netcdf
from bayesrl.posterior.from_params import with_draws
from bayesrl.posterior.posterior import Posterior
from bayesrl.posterior.sampling import Source
from bayesrl.statistics.definitions import RegularizerName
from bayesrl.svi.optimizers import (
    UNPILOTED_RATE,
    Optimizer,
    as_optimizer,
    check_update,
    default_optimizer,
)
from bayesrl.svi.problem_setup import Setup, set_up
from bayesrl.svi.step import State, StepConfig, start
from bayesrl.svi.training_loop import Callback, TrainingLoop, stack
from bayesrl.typing import Beta, PRNGKey, Program


@checked(
    FitError,
    Untraced("call it outside: it compiles its own steps, and an array of β and num_restarts run as one program"),
    UnusedOption("learning_rate", lambda given: given["optimizer"] is not None, "the optimiser has a rate of its own"),
    UnusedOption("start_beta", lambda given: given["beta"] is None, "without beta= there is nothing to fall to"),
    UnusedOption("alpha", lambda given: given["regularizer"] != "alpha", "only regularizer='alpha' has an order"),
    UnusedOption(
        "objective",
        lambda given: given["regularizer"] != "kl",
        "regularizer= stands for objective=objectives.RegularizedReward(...), which has further options",
    ),
)
def fit(
    key: PRNGKey,
    policy: Program,
    *args: Any,
    beta: Beta | None = None,
    guide: Guide | None = None,
    objective: Objective | ELBO | None = None,
    optimizer: Optimizer | None = None,
    learning_rate: Positive | None = None,
    num_steps: Count = 2000,
    num_restarts: Count = 1,
    tolerance: Positive | None = None,
    start_beta: Positive | None = None,
    source: Source | None = None,
    directory: Location | None = None,
    callback: Callback | None = None,
    progress: bool = True,
    regularizer: RegularizerName = "kl",
    alpha: float | None = None,
) -> Posterior:
    """Fit the reward-tilted posterior of a policy: KL-regularised RL by variational inference.

    Maximises J(q) = E_q[R] − β·KL(q‖π₀) = β·log Z − β·KL(q‖p*) per context. Parameters inside the
    policy belong to the prior and stay as declared. A program without rewards is fitted by maximum
    likelihood or, if it has latent sites, to p(θ | data).

    Args:
        key: for all random choices of the fit.
        policy: a NumPyro program that draws actions and collects `bayesrl.reward`s.
        *args: its arguments; arrays are traced, everything else is static.
        beta: temperature, reward units per nat; an array fits one policy per temperature, in one program.
        guide: a program that draws the same action sites, or an `AutoGuide`; by default `AutoTilt()`.
        objective: from `bayesrl.objectives`, or a NumPyro ELBO; by default `ReverseKL()`.
        optimizer: from Optax or `numpyro.optim`; by default Adam with a cosine decay to 0.
        learning_rate: of the default optimiser at its first step. By default, the rate that the guide's family
            suggests (0.1 for the tables and networks of `AutoTilt`). For a hand-written guide, short pilots of a 50th
            of the steps try 0.001, 0.003, …, 1, and each β and restart takes the least rate that gains as much as
            the best (within 1%); with a `source`, the rate is 0.005.
        num_steps: gradient steps.
        num_restarts: fits made side by side; the first starts at the prior, the others are dispersed around it.
        tolerance: stop early once β/2 · Var_q(w), which is the gap J* − J(q) to second order, has
            stayed under this many reward units over a chunk of steps, in every β and restart. This
            cannot see modes that q has dropped, and the noise of nature can keep it from happening.
        start_beta: temperature at the start of the fit, reward units per nat. It falls geometrically to `beta`
            over the first half of the steps (annealing), so that a cold fit follows the optimum down instead
            of settling on the first good mode that it meets. The history has J at `beta` throughout, but loss
            and spread at the temperature of the step. By default, the temperature is `beta` from the start.
        source: makes the draws instead of the objective's own `draw`: a function (key, params, programs) → `Draws` of
            the guide with these parameters, called on the host once per step, β and restart. Rewards and nature may
            come from anywhere. The log q in the draws gives J and KL of the history; the fit rescores it to learn.
        directory: run folder, for checkpoints and the saved fit; if it has an interrupted run, the fit continues it.
        callback: called with each row of the history; a true return value stops the fit.
        progress: whether to show a progress line in a terminal or a notebook.
        regularizer: D_f in the place of KL, as in `enumerate_posterior`: J = E_q[R] − β·D_f(q‖π₀), in history,
            estimates, evidence, verdict, frontier, comparison and report, which all name it.
        alpha: order of regularizer="alpha".

    Returns:
        `Posterior`. Parameters are averages over the last part of the run. Ctrl-C ends the fit and
        returns the posterior so far, marked `interrupted`.

    Raises:
        PolicyError, GuideError, ObjectiveError: the programs cannot be fitted with these options.
        FitError: num_steps or num_restarts is below 1, start_beta is below beta, or over 10% of the steps were not
            finite.
        RunFolderError: the folder has another problem or cannot be written.

    Example:
        >>> import jax, jax.numpy as jnp, numpyro, numpyro.distributions as dist, bayesrl
        >>> def bandit():
        ...     arm = numpyro.sample("arm", dist.Categorical(logits=jnp.zeros(3)))
        ...     bayesrl.reward("payoff", jnp.array([0.0, 1.0, 2.0])[arm])
        >>> posterior = bayesrl.fit(jax.random.key(0), bandit, beta=1.0, num_steps=500, progress=False)
        >>> estimates = posterior.estimate(jax.random.key(1), 1000)
        >>> round(float(estimates.objective.mean[0]), 3)  # log((1 + e + e²) / 3)
        1.309
    """
    if regularizer != "kl":
        objective = RegularizedReward(regularizer, alpha=alpha)
    with trace_cache(), show_progress(progress), run_folder.hold_folder(directory):
        problem = (key, policy, args, beta, guide, objective, optimizer, learning_rate)
        run = (num_steps, num_restarts, tolerance, start_beta, source, directory, callback)
        return _fit(*problem, *run, progress=progress)


@checked(
    FitError,
    Untraced("call it outside, and put bayesrl.step under jax.jit, or under jax.vmap over states"),
    UnusedOption("learning_rate", lambda given: given["optimizer"] is not None, "the optimiser has a rate of its own"),
    UnusedOption("num_steps", lambda given: given["optimizer"] is not None, "only the default optimiser's rate falls"),
)
def init(
    key: PRNGKey,
    policy: Program,
    *args: Any,
    beta: Beta | None = None,
    guide: Guide | None = None,
    objective: Objective | ELBO | None = None,
    optimizer: Optimizer | None = None,
    learning_rate: Positive | None = None,
    num_steps: Count = 2000,
) -> State:
    """Check a policy and a guide, and start a fit without running it; `step` then takes one step at a time.

    `bayesrl.fit` is this start, this step, and a loop around it with history, checkpoints and restarts. With the keys
    of `fit`, your loop reaches its parameters, up to rounding: step i of `fit(key, ...)` uses
    `step_key(lane_keys(key, 1)[0], i)` of `bayesrl.svi.step`.

    Args:
        key: for the random choices before the first step; consumed whole.
        policy: a NumPyro program that draws actions and collects `bayesrl.reward`s.
        *args: its arguments; arrays are leaves of the state, everything else is static.
        beta: temperature, reward units per nat: a number. For several, spread one state over them,
            `states = jax.vmap(lambda beta: dataclasses.replace(state, beta=beta))(betas)`, and step under `jax.vmap`.
        guide: as in `fit`.
        objective: as in `fit`.
        optimizer: as in `fit`; by default Adam with a cosine decay to 0 over `num_steps`.
        learning_rate: of the default optimiser at its first step. By default, the rate that the guide's family
            suggests, or 0.005 for a hand-written guide, for which `fit` chooses the rate by pilots.
        num_steps: how many steps the loop will take, for the decay of the default optimiser.

    Returns:
        `State`, with unbatched parameters [...] and a scalar β. Whatever the programs read besides their arguments
        is read once, when `step` is traced.

    Raises:
        PolicyError, GuideError, ObjectiveError: the programs cannot be fitted with these options.

    Example:
        >>> import jax, jax.numpy as jnp, numpyro, numpyro.distributions as dist, optax, bayesrl
        >>> def bandit():
        ...     arm = numpyro.sample("arm", dist.Categorical(logits=jnp.zeros(3)))
        ...     bayesrl.reward("payoff", jnp.array([0.0, 1.0, 2.0])[arm])
        >>> state = bayesrl.init(jax.random.key(0), bandit, beta=1.0, optimizer=optax.sgd(1.0))
        >>> step = jax.jit(bayesrl.step)
        >>> for i in range(200):
        ...     state, info = step(jax.random.fold_in(jax.random.key(1), i), state)
        >>> round(float(info.objective), 3)  # log((1 + e + e²) / 3)
        1.309
    """
    if isinstance(beta, np.ndarray | jax.Array) and beta.ndim > 0:
        raise FitError(
            f"beta has shape {beta.shape}; pass one number, and spread the state over several: "
            "jax.vmap(lambda beta: dataclasses.replace(state, beta=beta))(betas)"
        )
    with trace_cache(), host_errors():
        given = as_optimizer(optimizer)
        chosen = ReverseKL() if objective is None else as_objective(objective)
        setup = set_up(key, policy, args, beta, guide, chosen, 1)
        optimiser = given or default_optimizer(learning_rate or setup.learning_rate or UNPILOTED_RATE, num_steps)
        check_update(optimiser, setup.params)
        config = StepConfig(setup.objective, optimiser, setup.programs)
        stacked = start(config, jax.tree.map(jnp.asarray, setup.params))
    # All leaves but the step count have a lane axis, so give it one to drop.
    train = jax.tree.map(lambda x: x[0], stacked._replace(step=stacked.step[None]))
    return State(train, jnp.asarray(setup.betas[0]), eqx.filter(setup.programs.args, eqx.is_array), config)


def train(key: PRNGKey, program: Program, *, optimizer: Optimizer | None = None, num_steps: int) -> Posterior:
    """Fit a program that draws nothing, as `fit` does, for its parameters alone; make no draws.

    Args:
        key: for all random choices of the fit.
        program: without rewards and latent sites.
        optimizer: from Optax; by default that of `fit`.
        num_steps: gradient steps.

    Raises:
        PolicyError, FitError: as `fit`.
    """
    with trace_cache():
        setup = set_up(key, program, (), None, None, ReverseKL(), 1, drawn=False)
        optimiser = as_optimizer(optimizer) or default_optimizer(setup.learning_rate or UNPILOTED_RATE, num_steps)
        # Few chunks: each one allocates its memory again, and nobody reads this history.
        run = TrainingLoop(key, setup, optimiser, num_steps, None, None, None, num_chunks=10)
        state, rows, interrupted = run.run(show=False)
        # The loop has caught Ctrl-C to return what it has, but half a fit is of no use here.
        if interrupted:
            raise KeyboardInterrupt
        settings = _settings(key, num_steps, 1, optimizer, {})
        return posterior_of(key, setup, state, rows, settings, None, interrupted=False, drawn=False)


def _fit(
    key: PRNGKey,
    policy: Program,
    args: tuple[Any, ...],
    beta: Any,
    guide: Any,
    objective: Any,
    optimizer: Any,
    learning_rate: float | None,
    num_steps: int,
    num_restarts: int,
    tolerance: float | None,
    start_beta: float | None,
    source: Source | None,
    directory: str | Path | None,
    callback: Callback | None,
    *,
    progress: bool,
) -> Posterior:
    # Old-style keys are plain arrays of words.
    key = key if jnp.issubdtype(key.dtype, jax.dtypes.prng_key) else jax.random.wrap_key_data(key)
    if start_beta is not None and start_beta < (coldest := np.min(np.asarray(beta, float))):
        raise FitError(
            f"start_beta={start_beta!r}; use a number of reward units per nat, at least beta={coldest:g}, or None"
        )
    given = as_optimizer(optimizer)
    chosen = ReverseKL() if objective is None else as_objective(objective)
    with activity("checking the policy"), host_errors():
        setup = set_up(key, policy, args, beta, guide, chosen, num_restarts, source)
    suggested = setup.learning_rate if learning_rate is None else learning_rate
    if given is not None:
        check_update(given, setup.params)
    optimiser = given or default_optimizer(suggested or UNPILOTED_RATE, num_steps)
    optional = {"tolerance": tolerance, "start_beta": start_beta, "learning_rate": learning_rate}
    if chosen.told and (of_kl := [name for name in ("tolerance", "start_beta") if optional[name] is not None]):
        raise FitError(f"{of_kl[0]}= works with J of KL alone, and the fit has {chosen.told}; leave {of_kl[0]}= out")
    settings = _settings(key, num_steps, num_restarts, optimizer, optional) | chosen.told
    problem = {"format": run_folder.FORMAT, "identity": setup.identity, "settings": settings}
    folder = None if directory is None else run_folder.open_folder(directory, problem)
    run = TrainingLoop(key, setup, optimiser, num_steps, tolerance, folder, callback, source, problem, start_beta)
    if suggested is None and given is None and source is None and setup.programs.guide is not None:
        run = replace(run, pilot=True)
    try:
        state, rows, interrupted = run.run(show=progress)
        with activity("drawing from the fit"):
            posterior = posterior_of(key, setup, state, rows, settings, beta, interrupted=interrupted)
    finally:
        if (close := getattr(source, "close", None)) is not None:
            close()
    if folder is not None:
        with activity("saving the draws"):
            save_posterior(folder, posterior)
    return posterior


def _settings(
    key: PRNGKey, num_steps: int, num_restarts: int, optimizer: Any, optional: dict[str, float | None]
) -> dict[str, Any]:
    impl = str(jax.random.key_impl(key))
    return {
        "num_steps": num_steps,
        "num_restarts": num_restarts,
        **({} if impl == "threefry2x32" else {"key_impl": impl}),
        **{name: float(value) for name, value in optional.items() if value is not None},
        "optimizer": "default" if optimizer is None else "given",
        **{f"{package}_version": version(package) for package in ("bayesrl", "numpyro", "jax", "optax")},
    }


def posterior_of(
    key: PRNGKey,
    setup: Setup,
    state: State,
    rows: list[dict[str, np.ndarray]],
    settings: dict[str, Any],
    beta: Any,
    *,
    interrupted: bool,
    drawn: bool = True,
) -> Posterior:
    """Make the posterior of a state: averaged parameters, history and, if `drawn`, draws."""
    shape = (*setup.beta_shape, setup.betas.shape[0] // max(int(np.prod(setup.beta_shape)), 1))
    params = jax.tree.map(lambda x: x.reshape(shape + x.shape[1:]), to_host(guide_params(state.train.average)))
    made = Posterior(
        beta=None if beta is None else (np.asarray(beta, float) if setup.beta_shape else float(beta)),
        params=params,
        history=stack(rows) or {"loss": np.zeros((0, *shape)), "step": np.zeros(0, int)},
        draws={},
        statistics={},
        prior_draws={},
        settings=settings | {"seed": str(np.asarray(jax.random.key_data(key)).tolist())},
        interrupted=interrupted,
        programs=setup.programs,
    )
    return (
        with_draws(fold_in(key, 6), made, jax.tree.map(lambda x: x[0], guide_params(setup.params))) if drawn else made
    )


def save_posterior(folder: Path, posterior: Posterior) -> None:
    """Write draws and history into a run folder, replacing the old ones in one step.

    Raises:
        RunFolderError: they cannot be written; the checkpoint is complete.
    """
    try:
        run_folder.save_draws(folder, as_netcdf(posterior))
    except RunFolderError as error:
        raise RunFolderError(
            f"{error}; the checkpoint beside it is complete: "
            "make room and call bayesrl.resume, or load the folder with its policy"
        ) from error

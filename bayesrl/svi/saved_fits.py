"""`load` and `resume`: reopen a fit from its run folder."""

from collections.abc import Mapping
from io import BytesIO
from pathlib import Path
from typing import Any

import jax
import numpy as np
from numpyro.infer.elbo import ELBO

from bayesrl import run_folder
from bayesrl.arguments import Count, Location, UnusedOption, checked
from bayesrl.errors import RunFolderError
from bayesrl.guides import AutoGuide
from bayesrl.guides.base import Guide
from bayesrl.objectives import Objective, ReverseKL
from bayesrl.objectives.base import OWN
from bayesrl.objectives.numpyro_elbo import as_objective
from bayesrl.posterior.datatree import from_datatree
from bayesrl.posterior.posterior import Posterior
from bayesrl.posterior.sampling import Source
from bayesrl.svi.fitting import fit, posterior_of
from bayesrl.svi.optimizers import UNPILOTED_RATE, Optimizer, as_optimizer, default_optimizer
from bayesrl.svi.problem_setup import set_up
from bayesrl.svi.training_loop import Callback, TrainingLoop
from bayesrl.typing import PRNGKey, Program


@checked(
    RunFolderError,
    *(
        UnusedOption(
            name,
            lambda given: given["policy"] is None,
            "without its policy a fit is shown as it was saved; pass policy=",
        )
        for name in ("guide", "objective", "optimizer", "source")
    ),
)
def load(
    directory: Location,
    policy: Program | None = None,
    *args: Any,
    guide: Guide | None = None,
    objective: Objective | ELBO | None = None,
    optimizer: Optimizer | None = None,
    source: Source | None = None,
) -> Posterior:
    """Load a fit from its run folder.

    Args:
        directory: the run folder.
        policy: the program; without it, the posterior shows draws and history but cannot make new draws.
        *args: its arguments, as in the fit.
        guide: as in the fit, if it was hand-written.
        objective: as in the fit, if it was not one of `bayesrl.objectives`.
        optimizer: as in the fit, if you passed one.
        source: as in the fit, if the environment is not a program; the source then plays in it to draw.

    Raises:
        RunFolderError: the folder has no fit, or one of another problem.

    Example:
        >>> import tempfile, jax, jax.numpy as jnp, numpyro, numpyro.distributions as dist, bayesrl
        >>> def bandit():
        ...     arm = numpyro.sample("arm", dist.Categorical(logits=jnp.zeros(3)))
        ...     bayesrl.reward("payoff", jnp.array([0.0, 1.0, 2.0])[arm])
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     options = {"beta": 1.0, "num_steps": 500, "progress": False}
        ...     fit = bayesrl.fit(jax.random.key(0), bandit, directory=folder, **options)
        ...     loaded = bayesrl.load(folder, bandit)
        >>> bool((loaded.draws["arm"] == fit.draws["arm"]).all())
        True
    """
    problem = _problem_of_fit(directory)
    if policy is None:
        return _shown(directory, problem)
    guide, objective = _rebuild(directory, problem, guide, objective, optimizer)
    settings, key, beta = problem["settings"], key_of(problem), _beta_of(problem)
    chosen = ReverseKL() if objective is None else as_objective(objective)
    setup = set_up(key, policy, args, beta, guide, chosen, settings["num_restarts"], source)
    run_folder.check_same(directory, {**problem, "identity": setup.identity})
    # A rate that pilots chose is in the optimiser's state, which the checkpoint restores.
    rate = settings.get("learning_rate", setup.learning_rate or UNPILOTED_RATE)
    optimiser = as_optimizer(optimizer) or default_optimizer(rate, settings["num_steps"])
    run = TrainingLoop(key, setup, optimiser, settings["num_steps"], None, Path(directory), None, source)
    state, rows = run.restore(run.start())
    if not rows:
        raise RunFolderError(f"{directory} holds no checkpoint yet; run bayesrl.resume(directory, policy, *args)")
    interrupted = int(state.train.step) < run.num_steps
    return posterior_of(key, setup, state, rows, settings, beta, interrupted=interrupted)


def _problem_of_fit(directory: str | Path) -> dict[str, Any]:
    """Read the description of a fit.

    Raises:
        RunFolderError: the folder has none.
    """
    problem = run_folder.read_problem(directory)
    if problem["identity"].get("kind") == "learn":
        raise RunFolderError(
            f"{directory} holds a run of `learn`; go on with it by bayesrl.control.learn(..., directory=...), or "
            "look at it with `bayesrl show`"
        )
    return problem


def _shown(directory: str | Path, problem: Mapping[str, Any]) -> Posterior:
    """Load a fit from its saved draws and checkpoint, without its programs.

    Raises:
        RunFolderError: the fit has not ended, or a file is damaged.
    """
    go_on = "continue it with bayesrl.resume(directory, policy, *args)"
    content = run_folder.read_draws(directory)
    if content is None:
        raise RunFolderError(
            f"{directory} holds a run that has not ended: there are no saved draws yet ({run_folder.POSTERIOR}); "
            f"{go_on}"
        )
    arrays = run_folder.read_checkpoint(directory) or {}
    lead = run_folder.fits_in(problem)
    import xarray as xr

    try:
        params = {
            name.removeprefix("state.average"): a.reshape(lead + a.shape[1:])
            for name, a in arrays.items()
            if name.startswith("state.average") and OWN not in name
        }
        with xr.open_datatree(BytesIO(content), engine="h5netcdf") as tree:
            posterior = from_datatree(tree.load(), params, problem["settings"])
    except Exception as error:  # xarray raises anything for a file of another program, even one with a valid digest
        raise RunFolderError(
            f"cannot read {Path(directory) / run_folder.POSTERIOR}: {error}; it is damaged: "
            "load the folder with its policy, which needs the checkpoint alone"
        ) from error
    steps = posterior.history.get("step", np.zeros(0, int))
    drawn, done = int(steps[-1]) if len(steps) else 0, run_folder.done_in(directory, arrays)
    if drawn != done:
        raise RunFolderError(
            f"{directory} holds draws ({run_folder.POSTERIOR}) that were made after {drawn:,} steps, and a checkpoint "
            f"({run_folder.CHECKPOINT}) after {done:,}; {go_on}"
        )
    return posterior


@checked(RunFolderError)
def resume(
    directory: Location,
    policy: Program,
    *args: Any,
    num_steps: Count | None = None,
    guide: Guide | None = None,
    objective: Objective | ELBO | None = None,
    optimizer: Optimizer | None = None,
    source: Source | None = None,
    callback: Callback | None = None,
    progress: bool = True,
) -> Posterior:
    """Continue a fit where it stopped, bit for bit as if it had not been interrupted.

    Args:
        directory: the run folder.
        policy: the program, as in the fit.
        *args: its arguments, as in the fit.
        num_steps: a larger total extends the run, on the learning-rate schedule of that total.
        guide: as in the fit, if it was hand-written.
        objective: as in the fit, if it was not one of `bayesrl.objectives`.
        optimizer: as in the fit, if you passed one.
        source: as in the fit, if you passed one; the run then continues bit for bit only if the source keeps a memory
            in the checkpoint, as `ReuseDraws` and `ReplayDraws` do.
        callback: as in `fit`.
        progress: as in `fit`.

    Raises:
        RunFolderError: the folder has no run, or one of another problem, or an argument that you passed
            to the fit is missing.

    Example:
        >>> import tempfile, jax, jax.numpy as jnp, numpyro, numpyro.distributions as dist, bayesrl
        >>> def bandit():
        ...     arm = numpyro.sample("arm", dist.Categorical(logits=jnp.zeros(3)))
        ...     bayesrl.reward("payoff", jnp.array([0.0, 1.0, 2.0])[arm])
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     options = {"beta": 1.0, "num_steps": 500, "progress": False}
        ...     fit = bayesrl.fit(jax.random.key(0), bandit, directory=folder, **options)
        ...     longer = bayesrl.resume(folder, bandit, num_steps=550, progress=False)
        >>> int(longer.history["step"][-1])
        550
    """
    problem = _problem_of_fit(directory)
    settings = problem["settings"]
    guide, objective = _rebuild(directory, problem, guide, objective, optimizer)
    return fit(
        key_of(problem),
        policy,
        *args,
        beta=_beta_of(problem),
        guide=guide,
        objective=objective,
        optimizer=optimizer,
        learning_rate=settings.get("learning_rate"),
        num_steps=max(settings["num_steps"], 1 if num_steps is None else num_steps),
        num_restarts=settings["num_restarts"],
        tolerance=settings.get("tolerance"),
        start_beta=settings.get("start_beta"),
        source=source,
        directory=directory,
        callback=callback,
        progress=progress,
    )


def key_of(problem: Mapping[str, Any]) -> PRNGKey:
    """Return the key of a run folder's fit.

    Raises:
        RunFolderError: the stored seed is not a key.
    """
    seed, impl = problem["identity"]["seed"], problem["settings"].get("key_impl", "threefry2x32")
    try:
        return jax.random.wrap_key_data(jax.device_put(np.asarray(seed, np.uint32)), impl=impl)
    except (TypeError, ValueError) as error:
        raise RunFolderError(
            f"the run folder tells the seed {seed!r:.60} of a generator {impl!r:.40}, which is no key: fit anew"
        ) from error


def _beta_of(problem: Mapping[str, Any]) -> Any:
    beta = problem["identity"]["beta"]
    return np.asarray(beta) if isinstance(beta, list) else beta


def _rebuild(
    directory: Location, problem: Mapping[str, Any], guide: Any, objective: Any, optimizer: Any
) -> tuple[Any, Any]:
    """Rebuild guide and objective from their description in the folder."""
    known = {kind.__name__: kind for kind in (*_kinds(AutoGuide), *_kinds(Objective))}

    def make(role: str, given: Any) -> Any:
        told = problem["identity"][role]
        if given is not None or told is None:
            return given
        if isinstance(told, dict) and told["type"] in known:
            fields = {k: tuple(v) if isinstance(v, list) else v for k, v in told.items() if k != "type"}
            try:
                return known[told["type"]](**fields)
            except (TypeError, ValueError) as error:
                raise RunFolderError(
                    f"{directory} tells of the {role} {told!r:.80}, which cannot be made: {error}; pass {role}=..."
                ) from error
        raise RunFolderError(
            f"{directory} was fitted with {role} {told!r}, which was given by hand; pass {role}=... again"
        )

    if problem["settings"]["optimizer"] == "given" and optimizer is None:
        raise RunFolderError(f"{directory} was fitted with an optimizer given by hand; pass optimizer=... again")
    return make("guide", guide), make("objective", objective)


def _kinds(base: type[Any]) -> list[type[Any]]:
    """List all imported subclasses of `base`, subclasses of subclasses included."""
    return [own for kind in base.__subclasses__() for own in (kind, *_kinds(kind))]

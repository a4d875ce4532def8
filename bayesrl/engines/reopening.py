"""`load` and `resume`: a fit taken up again from its run folder."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from numpyro.infer.elbo import ELBO

from bayesrl import run_folder
from bayesrl.datatree import from_datatree
from bayesrl.engines.fitting import fit, posterior_of, whole_number
from bayesrl.engines.running import Callback, Run
from bayesrl.engines.setup import Setup, set_up
from bayesrl.engines.svi import default_optimizer
from bayesrl.errors import RunFolderError
from bayesrl.guides import GuideFamily
from bayesrl.objectives import Objective, ReverseKL
from bayesrl.objectives.stock import as_objective
from bayesrl.posterior import Posterior
from bayesrl.programs import Source
from bayesrl.typing import PRNGKey, Program


def load(
    directory: str | Path,
    policy: Program | None = None,
    *args: Any,
    guide: Program | GuideFamily | None = None,
    objective: Objective | ELBO | None = None,
    optimizer: optax.GradientTransformation | None = None,
    source: Source | None = None,
) -> Posterior:
    """Load a fit from its run folder.

    Args:
        directory: the run folder.
        policy: the program; without it the posterior shows draws and history but cannot draw anew.
        *args: its arguments, as fitted.
        guide: as fitted, where it was written by hand.
        objective: as fitted, where it was not one of `bayesrl.objectives`.
        optimizer: as fitted, where one was given.
        source: as fitted, where the environment is no program: draws are then made by playing in it.

    Raises:
        RunFolderError: there is no fit in the folder, or it is of another problem.
    """
    problem = run_folder.read_problem(directory)
    path = Path(directory) / run_folder.POSTERIOR
    if policy is None:
        if not path.exists():
            raise RunFolderError(
                f"{directory} holds a run that has not ended: there are no saved draws yet; "
                "continue it with bayesrl.resume(directory, policy, *args)"
            )
        arrays = run_folder.read_arrays(Path(directory) / run_folder.CHECKPOINT)
        beta = problem["identity"]["beta"]
        lead = (*((len(beta),) if isinstance(beta, list) else ()), problem["settings"]["num_restarts"])
        params = {
            name.removeprefix("state.average"): a.reshape(lead + a.shape[1:])
            for name, a in arrays.items()
            if name.startswith("state.average")
        }
        import xarray as xr

        try:
            with xr.open_datatree(path, engine="h5netcdf") as tree:
                return from_datatree(tree.load(), params, problem["settings"])
        except (OSError, ValueError, KeyError) as error:
            raise RunFolderError(
                f"cannot read {path}: {error}; it is damaged: "
                "load the folder with its policy, which needs the checkpoint alone"
            ) from error
    run, setup, settings, beta = _reopen(directory, problem, policy, args, guide, objective, optimizer, source)
    lane, _ = run.lane()
    state, rows = run.restore(run.start(lane), [])
    if not rows:
        raise RunFolderError(f"{directory} holds no checkpoint yet; run bayesrl.resume(directory, policy, *args)")
    interrupted = int(state.step) < run.num_steps
    return posterior_of(run.key, setup, state, rows, settings, beta, interrupted=interrupted)


def resume(
    directory: str | Path,
    policy: Program,
    *args: Any,
    num_steps: int | None = None,
    guide: Program | GuideFamily | None = None,
    objective: Objective | ELBO | None = None,
    optimizer: optax.GradientTransformation | None = None,
    source: Source | None = None,
    callback: Callback | None = None,
    progress: bool = True,
) -> Posterior:
    """Go on with a fit where it stopped; bit for bit what an uninterrupted run would have given.

    Args:
        directory: the run folder.
        policy: the program, as fitted.
        *args: its arguments, as fitted.
        num_steps: a larger total extends the run, on the learning-rate schedule of that total.
        guide: as fitted, where it was written by hand.
        objective: as fitted, where it was not one of `bayesrl.objectives`.
        optimizer: as fitted, where one was given.
        source: as fitted, where one was given; what it plays is then no continuation bit for bit.
        callback: as in `fit`.
        progress: as in `fit`.

    Raises:
        RunFolderError: there is no run in the folder, it is of another problem, or what was given by
            hand is missing.
    """
    problem = run_folder.read_problem(directory)
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
        num_steps=max(settings["num_steps"], 1 if num_steps is None else whole_number("num_steps", num_steps)),
        num_restarts=settings["num_restarts"],
        tolerance=settings.get("tolerance"),
        start_beta=settings.get("start_beta"),
        source=source,
        directory=directory,
        callback=callback,
        progress=progress,
    )


def key_of(problem: Mapping[str, Any]) -> PRNGKey:
    """Give the key that a run folder was fitted with."""
    data = jax.device_put(np.asarray(problem["identity"]["seed"], np.uint32))
    return jax.random.wrap_key_data(data, impl=problem["settings"].get("key_impl", "threefry2x32"))


def _beta_of(problem: Mapping[str, Any]) -> Any:
    beta = problem["identity"]["beta"]
    return np.asarray(beta) if isinstance(beta, list) else beta


def _rebuild(directory: Any, problem: Mapping[str, Any], guide: Any, objective: Any, optimizer: Any) -> tuple[Any, Any]:
    """Make guide and objective anew from what the folder says of them."""
    known = {kind.__name__: kind for kind in (*_kinds(GuideFamily), *_kinds(Objective))}

    def make(role: str, given: Any) -> Any:
        told = problem["identity"][role]
        if given is not None or told is None:
            return given
        if isinstance(told, dict) and told["type"] in known:
            fields = {k: tuple(v) if isinstance(v, list) else v for k, v in told.items() if k != "type"}
            return known[told["type"]](**fields)
        raise RunFolderError(
            f"{directory} was fitted with {role} {told!r}, which was given by hand; pass {role}=... again"
        )

    if problem["settings"]["optimizer"] == "given" and optimizer is None:
        raise RunFolderError(f"{directory} was fitted with an optimizer given by hand; pass optimizer=... again")
    return make("guide", guide), make("objective", objective)


def _kinds(base: type[Any]) -> list[type[Any]]:
    """List all kinds of guides, or of objectives, that have been imported."""
    return [own for kind in base.__subclasses__() for own in (kind, *_kinds(kind))]


def _reopen(
    directory: Any,
    problem: dict[str, Any],
    policy: Program,
    args: Any,
    guide: Any,
    objective: Any,
    optimizer: Any,
    source: Any,
) -> tuple[Run, Setup, dict[str, Any], Any]:
    guide, objective = _rebuild(directory, problem, guide, objective, optimizer)
    settings, key, beta = problem["settings"], key_of(problem), _beta_of(problem)
    chosen = ReverseKL() if objective is None else as_objective(objective)
    setup = set_up(key, policy, args, beta, guide, chosen, settings["num_restarts"], source)
    run_folder.check_same(directory, {**problem, "identity": setup.identity})
    optimiser = default_optimizer(setup.learning_rate, settings["num_steps"]) if optimizer is None else optimizer
    run = Run(key, setup, optimiser, settings["num_steps"], None, Path(directory), None, source)
    return run, setup, settings, beta

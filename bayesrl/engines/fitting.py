"""`fit`, `load` and `resume`: the training loop with its run folder, progress, history and stopping."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import xarray as xr
from jax import Array
from numpyro.infer.elbo import ELBO

from bayesrl import run_folder
from bayesrl.core.pairing import Pair
from bayesrl.datatree import from_datatree, to_datatree
from bayesrl.engines.progress import Progress
from bayesrl.engines.setup import Setup, set_up
from bayesrl.engines.svi import Lane, State, Tally, default_optimizer, init, run_chunk
from bayesrl.errors import BayesRLError, FitError, RunFolderError
from bayesrl.guides import AutoTilt, GuideFamily
from bayesrl.objectives import ForwardKL, Objective, ReverseKL
from bayesrl.objectives.stock import as_objective
from bayesrl.posterior import Posterior, draw_prior
from bayesrl.typing import Beta, PRNGKey, Program

NUM_CHUNKS = 100
MAX_SKIPPED = 0.1
SECONDS_BETWEEN_CHECKPOINTS = 5.0
DRAW_BUDGET = 4_000_000

type Callback = Callable[[dict[str, np.ndarray]], Any]
type Source = Callable[..., Any]


def fit(
    key: PRNGKey,
    policy: Program,
    *args: Any,
    beta: Beta | None = None,
    guide: Program | GuideFamily | None = None,
    objective: Objective | ELBO | None = None,
    optimizer: optax.GradientTransformation | None = None,
    num_steps: int = 2000,
    num_restarts: int = 1,
    tolerance: float | None = None,
    directory: str | Path | None = None,
    callback: Callback | None = None,
    progress: bool = True,
) -> Posterior:
    """Fit the reward-tilted posterior of a policy: KL-regularised RL by variational inference.

    Maximises J(q) = E_q[R] − β·KL(q‖π₀) = β·log Z − β·KL(q‖p*) per context. Parameters inside the
    policy are the prior and stay as declared; a program without rewards is fitted by maximum
    likelihood, or to p(θ | data) where it has latent sites.

    Args:
        key: fixes everything random in the fit.
        policy: a NumPyro program that draws actions and collects `bayesrl.reward`s.
        *args: its arguments; arrays are traced, everything else is static.
        beta: temperature, reward units per nat; an array fits one policy each, in one program.
        guide: a program drawing the same action sites, or a `GuideFamily`; by default `AutoTilt()`.
        objective: from `bayesrl.objectives`, or a NumPyro ELBO; by default `ReverseKL()`.
        optimizer: from Optax; by default Adam with a cosine decay to 0.
        num_steps: gradient steps.
        num_restarts: fits made side by side; the first starts at the prior, the others dispersed.
        tolerance: stop early once β/2 · Var_q(w), which is the gap J* − J(q) to second order, has
            stayed under this many reward units over a chunk of steps, in every β and restart. It
            cannot see modes that q has dropped, and nature's noise keeps it from being reached.
        directory: run folder, for checkpoints and the saved fit; an interrupted run in it is continued.
        callback: called with each row of the history; a true return value stops the fit.
        progress: whether to show a progress line where there is a terminal or a notebook.

    Returns:
        `Posterior`. Parameters are averages over the last part of the run. Ctrl-C ends the fit and
        returns what was fitted so far, marked `interrupted`.

    Raises:
        PolicyError, GuideError, ObjectiveError: the programs cannot be fitted as asked.
        FitError: num_steps or num_restarts is below 1, or over 10% of the steps were not finite.
        RunFolderError: the folder holds another problem or cannot be written.

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
    _check_counts(num_steps, num_restarts, tolerance)
    chosen = ReverseKL() if objective is None else as_objective(objective)
    setup = set_up(key, policy, args, beta, guide, chosen, num_restarts)
    optimiser = default_optimizer(setup.learning_rate, num_steps) if optimizer is None else optimizer
    settings = _settings(num_steps, num_restarts, tolerance, optimizer)
    folder = None
    if directory is not None:
        problem = {"format": run_folder.FORMAT, "identity": setup.identity, "settings": settings}
        folder = run_folder.open_folder(directory, problem)
    run = _Run(key, setup, optimiser, num_steps, tolerance, folder, callback)
    state, rows, interrupted = run.go(show=progress)
    posterior = _posterior(key, setup, state, rows, settings, beta, interrupted=interrupted)
    if folder is not None:
        save_posterior(folder, posterior)
    return posterior


def _check_counts(num_steps: int, num_restarts: int, tolerance: float | None) -> None:
    for name, value in (("num_steps", num_steps), ("num_restarts", num_restarts)):
        if not isinstance(value, int) or value < 1:
            raise FitError(f"{name}={value!r}; use an integer of at least 1")
    if tolerance is not None and not tolerance > 0:
        raise FitError(f"tolerance={tolerance!r}; use a positive number of reward units, or None")


def _settings(num_steps: int, num_restarts: int, tolerance: float | None, optimizer: Any) -> dict[str, Any]:
    settings: dict[str, Any] = {"num_steps": num_steps, "num_restarts": num_restarts}
    if tolerance is not None:
        settings["tolerance"] = tolerance
    settings["optimizer"] = "default" if optimizer is None else "given"
    for package in ("bayesrl", "numpyro", "jax", "optax"):
        settings[f"{package}_version"] = version(package)
    return settings


@dataclass(frozen=True)
class _Run:
    """One run of the loop, from its start or its checkpoint to its end."""

    key: PRNGKey
    setup: Setup
    optimizer: optax.GradientTransformation
    num_steps: int
    tolerance: float | None
    folder: Path | None
    callback: Callback | None

    def go(self, *, show: bool) -> tuple[State, list[dict[str, np.ndarray]], bool]:
        """Run; give the last state, the rows of the history, and whether Ctrl-C ended it."""
        lane, args = self._lane()
        state = init(lane, self.setup.params)
        rows: list[dict[str, np.ndarray]] = []
        state, rows = self._restore(state, rows)
        lanes = self.setup.betas.shape[0]
        keys = jax.random.split(jax.random.fold_in(self.key, 5), lanes)
        chunk = jax.jit(partial(run_chunk, lane))
        every = max(1, -(-self.num_steps // NUM_CHUNKS))
        saved = time.monotonic()
        with Progress(self.num_steps, int(state.step), show=show) as line:
            try:
                while (done := int(state.step)) < self.num_steps:
                    steps = min(every, self.num_steps - done)
                    state, tally = chunk(keys, state, self.setup.betas, args, jnp.asarray(steps))
                    rows.append(_row(self.setup, state, tally, steps))
                    line.update(steps, rows[-1])
                    stop = self._stop(state, tally, rows)
                    if self.folder is not None and time.monotonic() - saved > SECONDS_BETWEEN_CHECKPOINTS:
                        self._save(state, rows)
                        saved = time.monotonic()
                    if stop:
                        break
            except KeyboardInterrupt:
                self._save(state, rows)
                return state, rows, True
            except BayesRLError:
                self._save(state, rows)
                raise
        self._save(state, rows)
        return state, rows, False

    def _lane(self) -> tuple[Lane, Any]:
        programs = self.setup.programs
        arrays, static = eqx.partition(programs.args, eqx.is_array)

        def pair(arrays: Any) -> Pair:
            return replace(programs.pair(), args=eqx.combine(arrays, static))

        return Lane(self.setup.objective, self.optimizer, pair), arrays

    def _restore(self, state: State, rows: list[dict[str, np.ndarray]]) -> tuple[State, list[dict[str, np.ndarray]]]:
        found = run_folder.load_checkpoint(self.folder, state) if self.folder is not None else None
        if found is None:
            return state, rows
        restored, history = found
        return restored, [{name: values[i] for name, values in history.items()} for i in range(len(history["step"]))]

    def _save(self, state: State, rows: list[dict[str, np.ndarray]]) -> None:
        if self.folder is not None:
            run_folder.save_checkpoint(self.folder, state, stack(rows))

    def _stop(self, state: State, tally: Tally, rows: list[dict[str, np.ndarray]]) -> bool:
        """Decide whether to end early.

        Raises:
            FitError: too many steps were not finite.
        """
        done, skipped = int(state.step), np.asarray(state.skipped)
        if done >= 20 and skipped.max() > MAX_SKIPPED * done:
            sites = {name: int(np.asarray(count).sum()) for name, count in tally.info.nonfinite.items()}
            blamed = [
                f"reward site {name!r} was not finite for {count} draws of the last chunk"
                for name, count in sites.items()
                if count
            ]
            cause = (
                "; ".join(blamed) or "every reward was finite, so the guide has diverged: try a smaller learning rate"
            )
            raise FitError(
                f"{skipped.max()} of {done} steps had a loss or gradient that was not finite (over {MAX_SKIPPED:.0%}); {cause}"
            )
        if self.callback is not None and self.callback(rows[-1]):
            return True
        if self.tolerance is None:
            return False
        gap = self.setup.betas.reshape(rows[-1]["spread"].shape) / 2 * rows[-1]["spread"]
        return bool((gap < self.tolerance).all())


def _row(setup: Setup, state: State, tally: Tally, steps: int) -> dict[str, np.ndarray]:
    """Turn the sums of a chunk into one row of the history, [*beta, restart] each."""
    shape = (*setup.beta_shape, -1)
    taken = np.maximum(np.asarray(tally.taken), 1e-30)
    none = np.asarray(tally.taken) == 0

    def mean(total: Array) -> np.ndarray:
        return np.where(none, np.nan, np.asarray(total, float) / taken).astype(np.float32).reshape(shape)

    info = tally.info
    row = {
        "step": np.asarray(int(state.step)),
        "loss": mean(tally.loss),
        "objective": mean(info.objective),
        "reward": mean(info.reward),
        "kl": mean(info.kl),
        "spread": mean(info.spread),
        "grad_norm": mean(tally.grad_norm),
        "skipped": np.asarray(state.skipped).reshape(shape),
    }
    return row | {f"metrics/{name}": mean(total) for name, total in info.metrics.items()}


def stack(rows: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Stack rows of the history into arrays, [chunk, ...]."""
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]} if rows else {}


def _posterior(
    key: PRNGKey,
    setup: Setup,
    state: State,
    rows: list[dict[str, np.ndarray]],
    settings: dict[str, Any],
    beta: Any,
    *,
    interrupted: bool,
) -> Posterior:
    shape = (*setup.beta_shape, setup.betas.shape[0] // max(int(np.prod(setup.beta_shape)), 1))
    params = jax.tree.map(lambda x: x.reshape(shape + x.shape[1:]), state.average)
    bare = Posterior(
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
    return with_draws(jax.random.fold_in(key, 6), bare)


def with_draws(key: PRNGKey, posterior: Posterior) -> Posterior:
    """Fill in the draws that a posterior carries: up to 1,000 each, fewer where they are large."""
    programs = posterior.programs
    if programs is None:
        return posterior
    sites = programs.structure.sites
    size = sum(int(np.prod(s.shape)) for s in sites if s.latent) + 4 * int(np.prod(programs.structure.context_shape))
    num = int(np.clip(DRAW_BUDGET // max(size * int(np.prod(posterior.batch_shape)), 1), 50, 1000))
    draw_key, prior_key = jax.random.split(key)
    draws, totals = posterior._draw(draw_key, num, ())
    prior, _ = draw_prior(prior_key, programs, num)
    beta = jnp.asarray(1.0 if posterior.beta is None else posterior.beta, float)
    scale = beta.reshape(beta.shape + (1,) * (totals.reward.ndim - beta.ndim))
    statistics = {
        "log_prior": totals.log_prior,
        "total_reward": totals.reward,
        "log_q": totals.log_q,
        "log_weight": totals.log_weight(scale),
    }
    return replace(
        posterior,
        draws={**draws.sites, **draws.metrics},
        statistics=statistics,
        prior_draws={**prior.sites, **prior.metrics},
    )


def save_posterior(folder: Path, posterior: Posterior) -> None:
    """Write draws and history into a run folder, replacing what is there in one step."""
    path = folder / run_folder.POSTERIOR
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        to_datatree(posterior).to_netcdf(temporary, engine="h5netcdf")
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise RunFolderError(
            f"cannot write {path}: {error}; the checkpoint beside it is complete: "
            "make room and call bayesrl.resume, or load the folder with its policy"
        ) from error


def load(
    directory: str | Path,
    policy: Program | None = None,
    *args: Any,
    guide: Program | GuideFamily | None = None,
    objective: Objective | ELBO | None = None,
    optimizer: optax.GradientTransformation | None = None,
) -> Posterior:
    """Load a fit from its run folder.

    Args:
        directory: the run folder.
        policy: the program; without it the posterior shows draws and history but cannot draw anew.
        *args: its arguments, as fitted.
        guide: as fitted, where it was written by hand.
        objective: as fitted, where it was not one of `bayesrl.objectives`.
        optimizer: as fitted, where one was given.

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
        params = {
            name.removeprefix("state.average"): a for name, a in arrays.items() if name.startswith("state.average")
        }
        with xr.open_datatree(path, engine="h5netcdf") as tree:
            return from_datatree(tree.load(), params, problem["settings"])
    run, setup, settings, beta = _reopen(directory, problem, policy, args, guide, objective, optimizer, None)
    lane, _ = run._lane()
    state, rows = run._restore(init(lane, setup.params), [])
    if not rows:
        raise RunFolderError(f"{directory} holds no checkpoint yet; run bayesrl.resume(directory, policy, *args)")
    interrupted = int(state.step) < run.num_steps
    return _posterior(run.key, setup, state, rows, settings, beta, interrupted=interrupted)


def resume(
    directory: str | Path,
    policy: Program,
    *args: Any,
    num_steps: int | None = None,
    guide: Program | GuideFamily | None = None,
    objective: Objective | ELBO | None = None,
    optimizer: optax.GradientTransformation | None = None,
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
        num_steps=max(settings["num_steps"], num_steps or 0),
        num_restarts=settings["num_restarts"],
        tolerance=settings.get("tolerance"),
        directory=directory,
        callback=callback,
        progress=progress,
    )


def key_of(problem: Mapping[str, Any]) -> PRNGKey:
    """Give the key that a run folder was fitted with."""
    data = jnp.asarray(problem["identity"]["seed"], jnp.uint32)
    return jax.random.wrap_key_data(data)


def _beta_of(problem: Mapping[str, Any]) -> Any:
    beta = problem["identity"]["beta"]
    return np.asarray(beta) if isinstance(beta, list) else beta


def _rebuild(directory: Any, problem: Mapping[str, Any], guide: Any, objective: Any, optimizer: Any) -> tuple[Any, Any]:
    """Make guide and objective anew from what the folder says of them."""
    known = {"AutoTilt": AutoTilt, "ReverseKL": ReverseKL, "ForwardKL": ForwardKL}

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


def _reopen(
    directory: Any,
    problem: dict[str, Any],
    policy: Program,
    args: Any,
    guide: Any,
    objective: Any,
    optimizer: Any,
    callback: Any,
) -> tuple[_Run, Setup, dict[str, Any], Any]:
    guide, objective = _rebuild(directory, problem, guide, objective, optimizer)
    settings, key, beta = problem["settings"], key_of(problem), _beta_of(problem)
    chosen = ReverseKL() if objective is None else as_objective(objective)
    setup = set_up(key, policy, args, beta, guide, chosen, settings["num_restarts"])
    folder = run_folder.open_folder(directory, {**problem, "identity": setup.identity})
    optimiser = default_optimizer(setup.learning_rate, settings["num_steps"]) if optimizer is None else optimizer
    return _Run(key, setup, optimiser, settings["num_steps"], None, folder, callback), setup, settings, beta

"""One run of the training loop, from its start or its checkpoint to its end."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from bayesrl import run_folder
from bayesrl.arguments import user_code
from bayesrl.compilation.jit import closure_jit, trace_once
from bayesrl.compilation.status import activity
from bayesrl.core.draws import Draws
from bayesrl.core.programs import Programs
from bayesrl.display.formatting import pluralize
from bayesrl.display.progress import Progress, format_row
from bayesrl.errors import BayesRLError, FitError
from bayesrl.posterior.sampling import Source
from bayesrl.svi.optimizers import PILOT_RATES, UNPILOTED_RATE
from bayesrl.svi.problem_setup import Setup
from bayesrl.svi.step import (
    LANES,
    FitState,
    State,
    StepConfig,
    StepInfo,
    lane_keys,
    run_chunk,
    start,
    step_key,
    step_on_draws,
    sum_steps,
)
from bayesrl.typing import Numbers, Params, PRNGKey, PRNGKeys

NUM_CHUNKS = 100
ANNEALED = 0.5
"""The temperature falls from `start_beta` to β over this share of the steps."""

PILOT_SHARE = 50
"""Each pilot takes one step for this many of the fit."""

GOOD_PILOT = 0.99
"""Choose the least rate whose gain is at least this share of the best gain: a larger rate only adds noise."""

MAX_SKIPPED = 0.1
SECONDS_BETWEEN_CHECKPOINTS = 5.0
MANY_STEPS = 1000
"""From this many steps on, it pays to compile with all optimisations."""

type Chunk = Callable[[PRNGKeys, State, Numbers], tuple[FitState, StepInfo]]
type Callback = Callable[[dict[str, np.ndarray]], Any]


def _made(source: Source, key: PRNGKey, params: Params, programs: Programs) -> Draws:
    """Get draws from a source.

    Raises:
        FitError: it fails, or returns something else.
    """
    with user_code("source", FitError, "let it give Draws from (key, params, programs)"):
        draws = source(key, params, programs)
    if not isinstance(draws, Draws):
        raise FitError(f"source gave a {type(draws).__name__}; let it give Draws from (key, params, programs)")
    missing = [name for name in programs.structure.actions if name not in draws.sites]
    if missing:
        raise FitError(
            f"source gave draws of {sorted(draws.sites)} without site {missing[0]!r}: they are of another policy; "
            "give draws of this one"
        )
    return draws


@dataclass(frozen=True)
class TrainingLoop:
    """One run of the training loop, from its start or its checkpoint to its end."""

    key: PRNGKey
    setup: Setup
    optimizer: optax.GradientTransformation
    num_steps: int
    tolerance: float | None
    folder: Path | None
    callback: Callback | None
    source: Source | None = None
    problem: Mapping[str, Any] | None = None
    """The description to write into the run folder."""
    start_beta: float | None = None
    num_chunks: int = NUM_CHUNKS
    pilot: bool = False
    """Whether to choose each lane's rate by trying several for a few steps."""

    def run(self, *, show: bool, chunk: Chunk | None = None) -> tuple[State, list[dict[str, np.ndarray]], bool]:
        """Run, and return the last state, the rows of the history, and whether Ctrl-C ended the run.

        Args:
            show: whether to show a progress line.
            chunk: the `chunk()` of an earlier run with the same setup and optimiser, to save its compilation.
        """
        state, rows = self.restore(self.start())
        self._recall()
        if self.folder is not None and self.problem is not None:
            run_folder.save_problem(self.folder, self.problem)
        lanes = self.setup.betas.shape[0]
        keys = lane_keys(self.key, lanes)
        chunk = self.chunk() if chunk is None else chunk
        if self.pilot and int(state.train.step) == 0:
            with activity("choosing the learning rate"):
                state = self._paced(chunk, keys, state)
        every = max(1, -(-self.num_steps // self.num_chunks))
        saved, halfway = time.monotonic(), False
        with Progress(self.num_steps, int(state.train.step), show=show) as line:
            try:
                while (done := int(state.train.step)) < self.num_steps:
                    steps = min(every, self.num_steps - done)
                    # Within a chunk the temperature stays, since the compiled loop does not change it.
                    betas = self._betas_at(done)
                    # The number of steps is an array, or a last chunk of another length would be traced anew.
                    train, sums = chunk(keys, replace(state, beta=betas), np.asarray(steps, np.int32))
                    state = replace(state, train=train, beta=betas)
                    rows.append(_row(self.setup, state, sums))
                    line.update(steps, partial(format_row, rows[-1]))
                    stop = self._stop(state, sums, rows)
                    # Save halfway too, so that even a short run has an older checkpoint if the last one is damaged.
                    passed = not halfway and 2 * int(state.train.step) >= self.num_steps
                    if passed or time.monotonic() - saved > SECONDS_BETWEEN_CHECKPOINTS:
                        self._save(state, rows)
                        saved, halfway = time.monotonic(), halfway or passed
                    if stop:
                        break
            except KeyboardInterrupt:
                # `state` is still that of the last whole chunk.
                self._save(state, rows)
                return state, rows, True
            except BayesRLError:
                # Once the user has mended what failed, the run can go on from here.
                self._save(state, rows)
                raise
        self._save(state, rows)
        return state, rows, False

    def _paced(self, chunk: Chunk, keys: PRNGKeys, state: State) -> State:
        """Return the state before the first step, with each lane at the least rate that gains nearly the most.

        The pilots use the compiled step of the fit itself, on the first steps of its schedule, where the rate has
        hardly begun to fall.
        """
        steps = int(np.clip(self.num_steps // PILOT_SHARE, 10, 200))
        betas, gains = self._betas_at(0), []
        first: np.ndarray | None = None
        for rate in PILOT_RATES:
            trial = replace(_at_rate(state, np.full(betas.shape, rate)), beta=betas)
            told = []
            # The gain is from the first step to the mean over the last third, since single steps are noisy.
            for part in (1, steps - steps // 3 - 1, steps // 3):
                train, sums = chunk(keys, trial, np.asarray(part, np.int32))
                trial = replace(trial, train=train)
                told.append(_objective(sums, betas, self.setup.betas))
            # The first step measures J before any update, so it is the same at every rate.
            first = told[0] if first is None else first
            gains.append(np.nan_to_num(told[-1] - first, nan=-np.inf, neginf=-np.inf, posinf=-np.inf))
        gained = np.stack(gains)
        good = gained >= np.maximum(GOOD_PILOT * gained.max(0), 0.0)
        # The rates rise, and argmax finds the first True.
        chosen = np.where(good.any(0), np.asarray(PILOT_RATES)[good.argmax(0)], UNPILOTED_RATE)
        return _at_rate(state, chosen)

    def start(self) -> State:
        """Return the state before the first step, with one lane for each β and restart."""
        config = StepConfig(self.setup.objective, self.optimizer, self.setup.programs)
        train = closure_jit(partial(start, config), name="initial_state")(self.setup.params)
        return State(train, self.setup.betas, eqx.filter(self.setup.programs.args, eqx.is_array), config)

    def _betas_at(self, step: int) -> np.ndarray:
        """Return the temperatures of a step, [lanes]: geometrically down from `start_beta` to β, then β."""
        betas = self.setup.betas
        if self.start_beta is None:
            return betas
        left = max(0.0, 1.0 - step / (ANNEALED * self.num_steps))
        return np.asarray(betas * (np.maximum(self.start_beta, betas) / betas) ** left, np.float32)

    def chunk(self) -> Chunk:
        """Return the function that takes a chunk of steps; it compiles at its first call."""
        if self._sources:
            return self._host_chunk(self._sources)
        return trace_once(run_chunk, name="fit_step", full_optimization=self.num_steps >= MANY_STEPS)

    @cached_property
    def _sources(self) -> list[Any]:
        """The makers of draws, one for each lane; none if the objective itself draws."""
        source: Any = self.source
        if source is None:
            # The compilation cache does not store programs that call Python, so such a guide may draw outside the step.
            sampler = getattr(self.setup.programs.guide, "sampler", None)
            source = None if sampler is None else sampler.source(self.setup.programs, self.setup.objective)
        if source is None:
            return []
        for_lane = getattr(source, "lane", lambda _: source)
        return [source, *map(for_lane, range(1, len(self.setup.betas)))]

    def _host_chunk(self, sources: list[Any]) -> Chunk:
        """Return a function that takes a chunk of steps on draws that the sources make on the host."""
        programs = self.setup.programs
        one_batch = bool(getattr(sources[0], "one_batch", False))

        def one(lane: State, draws: Draws) -> tuple[FitState, StepInfo]:
            new, info = step_on_draws(lane, draws, one_batch=one_batch)
            return new.train, info

        @jax.jit  # so that `sum_steps`, which needs it twice, traces it once
        def all_lanes(state: State, draws: Draws) -> tuple[FitState, StepInfo]:
            return jax.vmap(one, in_axes=(state.lane_axes, 0), out_axes=(LANES, 0))(state, draws)

        # Compile the small operations too: dispatched one by one, they take longer than the step.
        @partial(trace_once, name="lanes_apart")
        def apart(keys: PRNGKeys, train: FitState) -> list[tuple[PRNGKey, Params]]:
            return [
                (step_key(keys[i], train.step), jax.tree.map(lambda x, i=i: x[i], train.params))
                for i in range(len(sources))
            ]

        @partial(trace_once, name="fit_step", full_optimization=self.num_steps >= MANY_STEPS)
        def update(state: State, made: list[Draws], times: Array) -> tuple[FitState, StepInfo]:
            draws = jax.tree.map(lambda *leaves: jnp.stack(leaves), *made)
            return sum_steps(lambda train: all_lanes(replace(state, train=train), draws), state.train, times)

        @partial(trace_once, name="add_sums")
        def add(total: StepInfo, sums: StepInfo) -> StepInfo:
            return jax.tree.map(jnp.add, total, sums)

        def chunk(keys: PRNGKeys, state: State, num_steps: Numbers) -> tuple[FitState, StepInfo]:
            total: StepInfo | None = None
            left = int(num_steps)
            while left > 0:
                pieces = zip(sources, apart(keys, state.train), strict=True)
                made = [_made(own, key, params, programs) for own, (key, params) in pieces]
                # If a batch serves more updates, make them all in one compiled loop.
                more = min(left - 1, *(getattr(own, "remaining_updates", 0) for own in sources))
                for own in sources if more else ():
                    own.count_updates(more)
                train, sums = update(state, made, np.asarray(1 + more, np.int32))
                state = replace(state, train=train)
                total = sums if total is None else add(total, sums)
                left -= 1 + more
            assert total is not None
            return state.train, total

        return chunk

    def restore(self, state: State) -> tuple[State, list[dict[str, np.ndarray]]]:
        """Return state and history of the checkpoint; without one, the given state and no history."""
        found = run_folder.load_checkpoint(self.folder, state.train) if self.folder is not None else None
        if found is None:
            return state, []
        restored, history = found
        return replace(state, train=restored), [
            {name: np.asarray(values[i]) for name, values in history.items()}
            for i in range(len(history.get("step", ())))
        ]

    @property
    def _remembering(self) -> list[Any]:
        return [own for own in self._sources if callable(getattr(own, "save_state", None))]

    def _recall(self) -> None:
        """Give the sources of an interrupted run back what they remembered."""
        remembering = self._remembering
        memories = run_folder.load_memories(self.folder) if self.folder is not None and remembering else {}
        for i, own in enumerate(remembering):
            lead = f"{i}/"
            held = {name.removeprefix(lead): array for name, array in memories.items() if name.startswith(lead)}
            if held:
                own.restore_state(held)

    def _save(self, state: State, rows: list[dict[str, np.ndarray]]) -> None:
        if self.folder is not None:
            memories = {
                f"{i}/{name}": array
                for i, own in enumerate(self._remembering)
                for name, array in own.save_state().items()
            }
            run_folder.save_checkpoint(self.folder, state.train, stack(rows), memories)

    def _stop(self, state: State, sums: StepInfo, rows: list[dict[str, np.ndarray]]) -> bool:
        """Decide whether to end early.

        Raises:
            FitError: too many steps were not finite.
        """
        done, skipped = int(state.train.step), np.asarray(state.train.skipped)
        # Before step 20, two skipped steps alone would be over the limit.
        if done >= min(20, self.num_steps) and skipped.max() > MAX_SKIPPED * done:
            sites = {name: int(np.asarray(count).sum()) for name, count in sums.nonfinite.items()}
            each = {name: pluralize(count, "draw") for name, count in sites.items() if count}
            blamed = [f"reward site {name!r} was not finite for {draws}" for name, draws in each.items()]
            of_source = ", or policy or guide give draws of the source probability 0 (leave them out)"
            cause = "; ".join(blamed) or (
                "no reward was nan or inf: the guide has diverged (lower the learning rate), rewards are too large for "
                "beta (scale them), or every draw has reward -inf (allow at least one action)"
                + (of_source if self.source is not None else "")
            )
            raise FitError(
                f"{skipped.max()} of {done} steps had a loss or gradient that was not finite "
                f"(over {MAX_SKIPPED:.0%}); {cause}"
            )
        if self.callback is not None and self.callback(rows[-1]):
            return True
        if self.tolerance is None or (self.start_beta is not None and done < ANNEALED * self.num_steps):
            return False
        # After a chunk of skipped steps the spread is nan, which is not below the tolerance.
        gap = self.setup.betas.reshape(rows[-1]["spread"].shape) / 2 * rows[-1]["spread"]
        return bool((gap < self.tolerance).all())


def _at_rate(state: State, rates: np.ndarray) -> State:
    """Return the state with these rates, [lanes], in its default optimiser."""
    opt_state = state.train.opt_state._replace(rate=rates.astype(np.float32))
    return replace(state, train=state.train._replace(opt_state=opt_state))


def _objective(sums: StepInfo, betas: np.ndarray, final: np.ndarray) -> np.ndarray:
    """J of the summed steps, [lanes], at the final temperatures of the fit."""
    # J is linear in β, so E[R] − β₁·KL follows from J at β and the KL.
    taken = np.asarray(sums.taken, float)
    total = np.asarray(sums.objective, float) + (betas - final) * np.asarray(sums.kl, float)
    return np.where(taken > 0, total / np.maximum(taken, 1e-30), np.nan)


def _row(setup: Setup, state: State, sums: StepInfo) -> dict[str, np.ndarray]:
    """Turn the sums of a chunk into one row of the history, [*beta, restart] each."""
    shape = (*setup.beta_shape, -1)
    taken = np.maximum(np.asarray(sums.taken), 1e-30)
    none = np.asarray(sums.taken) == 0

    def mean(total: Numbers) -> np.ndarray:
        return np.where(none, np.nan, np.asarray(total, float) / taken).astype(np.float32).reshape(shape)

    betas = np.asarray(state.beta)
    # Steps report J and KL up to log p(y), and J at the temperature of the step: correct both here.
    kl = np.asarray(sums.kl) + taken * setup.log_marginal
    objective = np.asarray(sums.objective) + (betas - setup.betas) * np.asarray(sums.kl)
    row = {
        "step": np.asarray(int(state.train.step)),
        "loss": mean(sums.loss),
        "objective": mean(objective - taken * setup.betas * setup.log_marginal),
        "reward": mean(sums.reward),
        "kl": mean(kl),
        "spread": mean(sums.spread),
        "grad_norm": mean(sums.grad_norm),
        "skipped": np.asarray(state.train.skipped).reshape(shape),
    }
    return row | {f"metrics/{name}": mean(total) for name, total in sums.metrics.items()}


def stack(rows: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Stack rows of the history into arrays, [chunk, ...]."""
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]} if rows else {}

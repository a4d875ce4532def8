"""`learn`: the one loop of both algorithms."""

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import jax
import numpy as np

from bayesrl import run_folder
from bayesrl.argument_types import Requirement
from bayesrl.arguments import Count, Location, Positive, checked, real_range
from bayesrl.compilation.jit import trace_cache
from bayesrl.compilation.random_keys import as_hash_key, fold_in, split_keys
from bayesrl.compilation.status import activity
from bayesrl.control.exploration.rules import Exploration, Rule
from bayesrl.control.learning.adapters import Playable, adapt_environment
from bayesrl.control.learning.agents.base import Agent, AgentState
from bayesrl.control.learning.env_adapter import EnvAdapter
from bayesrl.control.learning.result import LearnResult, Snapshot
from bayesrl.display.progress import Progress, show_progress
from bayesrl.errors import BayesRLError, ControlError, RunFolderError
from bayesrl.svi.problem_setup import digest
from bayesrl.svi.training_loop import SECONDS_BETWEEN_CHECKPOINTS
from bayesrl.typing import PRNGKey

_CONVERGED_FOR = 10
"""A criterion stops the run after it has held for this number of episodes in a row."""
_COLUMNS = (*run_folder.LEARNED, "objective", "kl")
"""The columns of the history, one row per episode."""


@checked(ControlError)
def learn(
    key: PRNGKey,
    environment: Playable,
    agent: Annotated[
        Agent,
        Requirement("a KLControlAgent or BayesianAgent instance", lambda one: isinstance(one, Agent), any_type=True),
    ],
    *,
    exploration: Rule | None = None,
    num_episodes: Count,
    tolerance: Positive | None = None,
    confidence: Annotated[float, real_range(above=0, most=1)] | None = None,
    directory: Location | None = None,
    callback: Callable[[dict[str, float]], Any] | None = None,
    progress: bool = True,
    action_masks: bool | None = None,
) -> LearnResult:
    """Learn from experience: choose how to explore, play an episode, compute returns, update by inference, repeat.

    The same loop serves KL-regularised RL (`KLControlAgent`, a posterior over what to do) and Bayesian RL
    (`BayesianAgent`, a posterior over the unknown), so they can be compared.

    Args:
        key: fixes everything random, including the environment. Only a bandit's instance is not drawn from it:
            `BanditEnv(bandit, seed=...)` draws that, and a bandit passed as it is has the instance of seed 0.
        environment: a `TabularMDP`, a bandit, an `Environment`, or a Gymnasium environment, its id or a function that
            makes one, with finitely many actions. Agents play it but do not look into it.
        agent: `KLControlAgent(beta)` or `BayesianAgent(model)`.
        exploration: `thompson()`, `k_learning()`, `epsilon_greedy(ε)`, …, or your own function from (key, belief,
            episode) to actions, or for `KLControlAgent` from (key, q, prior) to an action and its log-probability; by
            default, a draw from the agent's own posterior.
        num_episodes: the greatest number of episodes.
        tolerance: stop once the expected loss of the decision in the first state has been below this, in reward
            units, for ten episodes in a row; for `BayesianAgent`.
        confidence: stop once P(the decision in the first state is optimal) has been at least this for ten
            episodes in a row; for `BayesianAgent`.
        directory: run folder, for checkpoints; an interrupted run in it continues, and more episodes extend it.
        callback: called with each row of the history; a true return value stops the run.
        progress: whether to show a progress line in a terminal or a notebook.
        action_masks: whether to take only allowed actions. The environment's mask is the part `action_mask` of its
            observation, `info["action_mask"]`, a method `action_masks()`, or `Environment.allowed`; by default, masks
            are used wherever there are some. Models that plan need a mask that depends on the state alone.

    Returns:
        `LearnResult`. Ctrl-C ends the run and returns the result so far, marked `interrupted`.

    Raises:
        ControlError: a number is out of range; the agent or the rule does not fit the environment; the rule chose an
            action that the environment does not have or does not allow there; a state's mask changed, and the model
            plans with it; a reward is not finite.
        RunFolderError: the folder holds another run or cannot be written.

    Example:
        >>> import jax
        >>> from bayesrl import control
        >>> swim = control.river_swim()
        >>> model = control.TabularModel.of(swim, noise=0.1)
        >>> learned = control.learn(
        ...     jax.random.key(0), swim, control.BayesianAgent(model), exploration=control.thompson(), num_episodes=30
        ... )
        >>> learned.history["regret"].shape
        (30,)

    References:
        One draw per episode: Osband, Russo & Van Roy (2013), "(More) efficient reinforcement learning via posterior
        sampling". The two posteriors: O'Donoghue, Osband & Ionescu (2020).
    """
    with show_progress(progress), trace_cache(), run_folder.hold_folder(directory):
        env = adapt_environment(environment, action_masks=action_masks)
        rule = agent.default_exploration if exploration is None else exploration
        try:
            with activity("entering the environment"):
                agent_state = agent.enter(fold_in(key, 0), env, num_episodes)
                loop = _Loop(as_hash_key(key), env, agent_state, rule, callback, num_episodes, tolerance, confidence)
                problem = _problem(key, agent, loop, run_folder.option_names(directory))
            folder = None if directory is None else run_folder.open_folder(directory, problem)
            interrupted = loop.run(folder, problem, show=progress)
        finally:
            env.close()
    return LearnResult(agent_state, env, rule, loop.history(), tuple(loop.snapshots), problem, interrupted=interrupted)


@dataclass
class _Loop:
    """One run of `learn`, from its start or its checkpoint to its end."""

    key: PRNGKey
    env: EnvAdapter
    agent_state: AgentState
    rule: Any
    callback: Callable[[dict[str, float]], Any] | None
    num_episodes: int
    tolerance: float | None
    confidence: float | None
    rows: list[dict[str, float]] = field(default_factory=list)
    snapshots: list[Snapshot] = field(default_factory=list)

    def run(self, folder: Path | None, problem: dict[str, Any], *, show: bool) -> bool:
        """Run, and return whether Ctrl-C ended it."""
        if folder is not None:
            self._restore(folder)
            # A run that has nothing left to do keeps the settings with which it ran.
            if len(self.rows) < self.num_episodes:
                run_folder.save_problem(folder, problem)
        saved, halfway, interrupted = time.monotonic(), False, False
        with Progress(self.num_episodes, len(self.rows), show=show, unit="episode") as line:
            try:
                while len(self.rows) < self.num_episodes and not self._converged():
                    stop = self._episode()
                    line.update(1, self._postfix)
                    passed = not halfway and 2 * len(self.rows) >= self.num_episodes
                    if folder is not None and (passed or time.monotonic() - saved > SECONDS_BETWEEN_CHECKPOINTS):
                        self._save(folder)
                        saved, halfway = time.monotonic(), halfway or passed
                    if stop:
                        break
            except KeyboardInterrupt:
                interrupted = True
            finally:
                if folder is not None:
                    self._save(folder)  # a failure, too, keeps the episodes before it
        return interrupted

    def _episode(self) -> bool:
        """Explore, play, compute returns, update; return whether the callback wants to stop."""
        number, savepoint = len(self.rows), self.agent_state.savepoint()
        # Keys depend only on the number of the episode, so a resumed run repeats an uninterrupted one.
        explore_key, play_key, update_key = split_keys(fold_in(self.key, number + 1), 3)
        try:
            policy = self.agent_state.explore(explore_key, self.rule, number)
            episode = self.env.play(play_key, policy)
            judged = self.tolerance is not None or self.confidence is not None
            info = self.agent_state.update(update_key, episode, always_judge=judged)
            row = {
                "episode": number + 1,
                "return": float(episode.reward.sum()),
                "discounted": float(episode.returns(self.env.discount)[0]),
                "length": len(episode.reward),
                "regret": self.env.regret(episode, policy),
                **info._asdict(),
            }
            self.rows.append(row)
        except BaseException:
            # An episode counts as a whole or not at all, even if Ctrl-C comes between its steps.
            self.agent_state.rollback(savepoint)
            del self.rows[number:]
            raise
        # Snapshots follow episodes 1, 2, 5, 10, 20, 50 and so on, and the last one.
        if str(number + 1).rstrip("0") in ("1", "2", "5") or number + 1 == self.num_episodes:
            self.snapshots.append(Snapshot(number + 1, int(sum(row["length"] for row in self.rows))))
        # Outside the try: if the callback fails, the episode stands.
        return bool(self.callback is not None and self.callback(row))

    def _converged(self) -> bool:
        last = self.rows[-_CONVERGED_FOR:]
        if len(last) < _CONVERGED_FOR:
            return False
        if self.tolerance is not None and all(row["expected_regret"] <= self.tolerance for row in last):
            return True
        return self.confidence is not None and all(row["p_optimal"] >= self.confidence for row in last)

    def _postfix(self) -> str:
        recent = [row["return"] for row in self.rows[-20:]]
        regret = sum(row["regret"] for row in self.rows)
        return f"return={np.mean(recent):.4g}" + ("" if math.isnan(regret) else f" regret={regret:.4g}")

    def history(self) -> dict[str, np.ndarray]:
        """Return the columns as arrays, [episodes]."""
        return {name: np.array([row[name] for row in self.rows]) for name in _COLUMNS}

    def _save(self, folder: Path) -> None:
        arrays = {f"history/{name}": values for name, values in self.history().items()}
        arrays |= {f"agent/{name}": np.asarray(values) for name, values in self.agent_state.arrays().items()}
        arrays["snapshots"] = np.array(self.snapshots, np.int64).reshape(-1, 2)
        run_folder.save_arrays(folder, arrays)

    def _restore(self, folder: Path) -> None:
        arrays = run_folder.read_checkpoint(folder)
        if arrays is None:
            return
        history = run_folder.history_in(folder, arrays)
        count = len(history["episode"]) if history else 0
        try:
            blank = np.full(count, np.nan)  # older versions did not record J and KL
            self.rows = [{name: history.get(name, blank)[i].item() for name in _COLUMNS} for i in range(count)]
            self.snapshots = [Snapshot(*map(int, row)) for row in arrays["snapshots"]]
            self.agent_state.restore({k.removeprefix("agent/"): v for k, v in arrays.items() if k.startswith("agent/")})
        except BayesRLError:
            raise
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise RunFolderError(
                f"{folder / run_folder.CHECKPOINT} holds no run of `learn` that can go on ({error}); choose another "
                "directory"
            ) from error


def _numbers(described: Any, names: Mapping[str, str]) -> Any:
    """Collect the numbers in an agent, which the run folder may know by earlier `names`, and in its parts."""
    if is_dataclass(described) and not isinstance(described, type):
        found = {f.name: getattr(described, f.name) for f in fields(described) if f.init}
        return {names.get(name, name): _numbers(part, {}) for name, part in found.items()}
    return np.asarray(described) if isinstance(described, int | float | np.ndarray | jax.Array) else ()


def _problem(key: PRNGKey, agent: Agent, loop: _Loop, names: Mapping[str, str]) -> dict[str, Any]:
    env, rule = loop.env, loop.rule
    tables: Any = getattr(env, "values", ())
    if (mdp := getattr(env, "mdp", None)) is not None:
        tables = (mdp.successors, mdp.probabilities, mdp.rewards, mdp.start, mdp.terminal, mdp.discount, mdp.horizon)
    identity = {
        "kind": "learn",
        "environment": env.name or type(env).__name__,
        "tables": digest(tables),
        "observations": list(env.shape) if env.num_observations is None else env.num_observations,
        "actions": env.num_actions,
        "agent": agent.describe(),
        "agent's numbers": digest(_numbers(agent, names)),
        "exploration": repr(rule) if isinstance(rule, Exploration) else getattr(rule, "__qualname__", "given"),
        "seed": np.asarray(jax.random.key_data(key)).tolist(),
    }
    if env.masked:
        identity["action_masks"] = True
    if env.options:
        identity["options"] = dict(env.options)
    criteria = {"num_episodes": loop.num_episodes, "tolerance": loop.tolerance, "confidence": loop.confidence}
    settings: dict[str, Any] = {name: value for name, value in criteria.items() if value is not None}
    settings |= {f"{package}_version": version(package) for package in ("bayesrl", "numpyro", "jax")}
    return {"format": run_folder.FORMAT, "identity": identity, "settings": settings}

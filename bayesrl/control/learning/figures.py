"""Figures of learning: returns and regret with bands, posteriors of Q, and a map of the policy's certainty."""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from bayesrl.control.environments.tabular import TabularMDP
from bayesrl.control.figures import FITTED, OPTIMAL, draw_arrows, draw_band, draw_cells, grid_axes, grid_cells
from bayesrl.control.learning.agents.kl_control import KLControlAgentState
from bayesrl.control.learning.result import LearnResult, Snapshot
from bayesrl.control.planning import soft_value_iteration
from bayesrl.display.formatting import pluralize
from bayesrl.report.site_panels import panel, style_axes
from bayesrl.typing import PRNGKey

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_COLOURS = (FITTED, "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
_DRAWS = 200


def returns_figure(runs: Mapping[str, Sequence[LearnResult]]) -> "Figure":
    """Draw a moving average of returns, with median and range over runs; the optimum is dashed."""

    def draw(axis: Any, colour: str, name: str | None, several: Sequence[LearnResult]) -> None:
        window = max(max(run.num_episodes for run in several) // 20, 1)
        curves = _stacked([_smoothed(run.history["return"], window) for run in several], constant_values=np.nan)
        label = name or (f"mean of {window} episodes" if window > 1 else "return")
        draw_band(axis, np.arange(1, curves.shape[1] + 1), curves, colour, label)

    optimum = next(iter(runs.values()))[0].env.optimum
    return _learning_figure(runs, "return of an episode", draw, optimum)


def regret_figure(runs: Mapping[str, Sequence[LearnResult]]) -> "Figure":
    """Draw cumulative regret: median and range over runs."""

    def draw(axis: Any, colour: str, name: str | None, several: Sequence[LearnResult]) -> None:
        # A run that has ended loses no more, so its curve stays level.
        curves = _stacked([run.regret for run in several], mode="edge")
        label = name or (f"median and range of {len(several)} runs" if len(several) > 1 else "regret")
        draw_band(axis, np.arange(1, curves.shape[1] + 1), curves, colour, label)

    return _learning_figure(runs, "cumulated regret (reward units)", draw)


def certainty_figure(runs: Mapping[str, Sequence[LearnResult]]) -> "Figure":
    """Draw P(the first decision is optimal) along the episodes."""

    def draw(axis: Any, colour: str, name: str | None, several: Sequence[LearnResult]) -> None:
        for i, run in enumerate(several):
            judged = ~np.isnan(run.history["p_optimal"])
            episodes, probs = run.history["episode"][judged], run.history["p_optimal"][judged]
            axis.plot(episodes, probs, color=colour, linewidth=1, label=None if i else name or "each run")
        axis.set_ylim(0, 1.03)

    return _learning_figure(runs, "P(first decision is optimal)", draw)


def _learning_figure(
    runs: Mapping[str, Sequence[LearnResult]], ylabel: str, draw: Callable[..., None], optimum: float | None = None
) -> "Figure":
    """Draw each kind of runs in its own colour, with its name if there are several kinds."""
    figure, axis = panel()
    for i, (name, several) in enumerate(runs.items()):
        draw(axis, _COLOURS[i % len(_COLOURS)], name if len(runs) > 1 else None, several)
    if optimum is not None:
        axis.axhline(optimum, color="black", linestyle="--", linewidth=1, label="optimum")
    style_axes(axis, "episode", ylabel)
    axis.legend(frameon=False, fontsize=8)
    return figure


def values_figure(
    key: PRNGKey, result: LearnResult, states: Sequence[int], truth: Mapping[int, np.ndarray] | None = None
) -> "Figure":
    """Draw the posterior of Q in up to six states: middle 50% and 95% of each action, and Q* by state, if known."""
    from matplotlib.figure import Figure

    shown = list(states)[:6]
    tables = np.asarray(result.sample(key, 400)["action_values"])
    columns = min(len(shown), 3)
    rows = -(-len(shown) // columns)
    figure = Figure(figsize=(max(1.6 * columns + 0.4, 3.4), 1.7 * rows + 0.3), layout="constrained")
    axes = np.atleast_1d(figure.subplots(rows, columns, sharey=True)).ravel()
    for axis, state in zip(axes, shown, strict=False):
        values = result.bayesian_state().at(tables, first_visit(result, state), state)
        actions = range(values.shape[1])
        low, first, middle, third, high = np.quantile(values, [0.025, 0.25, 0.5, 0.75, 0.975], axis=0)
        axis.vlines(actions, low, high, color=FITTED, linewidth=1)
        axis.vlines(actions, first, third, color=FITTED, linewidth=5, alpha=0.5)
        axis.plot(actions, middle, "o", color=FITTED, markersize=4)
        if truth is not None and state in truth:
            axis.plot(actions, truth[state], "x", color=OPTIMAL, markersize=6, markeredgewidth=1.6)
        axis.set_xticks(actions, [result.action_name(a) for a in actions], fontsize=7)
        axis.set_xlim(-0.5, values.shape[1] - 0.5)
        axis.set_title(f"state {state}" if result.env.max_steps > 1 else "", fontsize=9)
        axis.tick_params(labelsize=7)
        axis.spines[["top", "right"]].set_visible(False)
    for axis in axes[len(shown) :]:
        axis.set_axis_off()
    axes[0].set_ylabel("Q (reward units)", fontsize=8)
    return figure


def sure_map(key: PRNGKey, result: LearnResult, mdp: TabularMDP, snapshots: Sequence[Snapshot | None]) -> "Figure":
    """Draw on the grid how sure the best action is, at some moments (None is the end).

    Darker cells are surer, and cells never entered are white.
    """
    titles = ["at the end" if s is None else f"after {pluralize(s.episode, 'episode')}" for s in snapshots]
    figure, axes = grid_axes(mdp, titles)
    visited = result.bayesian_state().memory.arrays()["observation"]
    for axis, snapshot in zip(axes, snapshots, strict=True):
        tables = np.asarray(result.sample(key, _DRAWS, snapshot=snapshot)["action_values"])
        sure = np.zeros((mdp.num_states, mdp.num_actions))
        before = visited[: None if snapshot is None else snapshot.rows]
        seen = (np.bincount(before, minlength=mdp.num_states) > 0) & ~mdp.terminal
        cells = [(cell, x, y) for cell, x, y in grid_cells(mdp) if seen[cell]]
        for cell, _, _ in cells:
            values = result.bayesian_state().at(tables, first_visit(result, cell), cell)
            sure[cell] = np.bincount(values.argmax(1), minlength=mdp.num_actions) / len(values)
        best = np.where(seen, sure.max(1), np.nan)
        draw_cells(axis, mdp, best, "Blues", (1 / mdp.num_actions, 1.5))
        draw_arrows(axis, mdp, sure, FITTED)
        for cell, x, y in cells if len(cells) <= 64 else ():
            axis.text(x - 0.46, y - 0.44, f"{best[cell]:.2f}", fontsize=5.5, color="#333")
    return figure


def policies_figure(agent_state: KLControlAgentState, mdp: TabularMDP) -> "Figure":
    """Draw the learned and the optimal policy on the grid, side by side."""
    figure, axes = grid_axes(mdp, ("learned", "optimum"))
    exact = soft_value_iteration(mdp, 0.0).policy
    for axis, policy, colour in zip(axes, (agent_state.probs(), exact), (FITTED, OPTIMAL), strict=True):
        draw_arrows(axis, mdp, policy if policy.ndim == 2 else policy[0], colour)
    return figure


def first_visit(result: LearnResult, state: int) -> int:
    """Find the earliest step of an episode at which a state was visited; 0 if it never was."""
    rows = result.bayesian_state().memory.arrays()
    times = rows["time"][rows["observation"] == state]
    return int(times.min()) if len(times) else 0


def _smoothed(values: np.ndarray, window: int) -> np.ndarray:
    """Average over a trailing window, shorter at the start."""
    total = np.cumsum(np.insert(np.asarray(values, float), 0, 0.0))
    ends = np.arange(1, len(values) + 1)
    begins = np.maximum(ends - window, 0)
    return (total[ends] - total[begins]) / (ends - begins)


def _stacked(curves: Sequence[np.ndarray], **padding: Any) -> np.ndarray:
    """Stack curves that may have ended early; `numpy.pad` fills the rest."""
    longest = max(map(len, curves))
    return np.stack([np.pad(np.asarray(c, float), (0, longest - len(c)), **padding) for c in curves])

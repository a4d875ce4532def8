"""Figures of control: policies and visits on a map, returns while learning, and frames of an episode."""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from bayesrl.arguments import Count, checked
from bayesrl.compilation.random_keys import fold_in
from bayesrl.control.environments.tabular import TabularMDP
from bayesrl.control.environments.tabular_rollout import evaluate_fitted_policy
from bayesrl.control.gymnasium.spaces import describe_actions, describe_observations
from bayesrl.control.gymnasium.vector_env import make_environment
from bayesrl.control.planning import PlanResult, evaluate_policy, soft_value_iteration
from bayesrl.display.formatting import format_number
from bayesrl.display.formatting import format_share as in_percent
from bayesrl.display.section import Section
from bayesrl.errors import ControlError
from bayesrl.posterior.posterior import Posterior
from bayesrl.report.site_panels import panel, style_axes
from bayesrl.typing import PRNGKey

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_DIRECTIONS = {"up": (0, 1), "right": (1, 0), "down": (0, -1), "left": (-1, 0)}
FITTED, OPTIMAL = "#0b62a8", "#b35900"
"""Colours of the fitted or learned policy, and of the optimum."""


@checked(ControlError)
def policy_map(mdp: TabularMDP, fitted: PlanResult, exact: PlanResult) -> "Figure":
    """Draw two policies on the grid of a tabular problem, side by side: arrows by probability, colour by value.

    With a horizon, the figure shows the first step.
    """
    figure, axes = grid_axes(mdp, ("fitted", "exact"))
    firsts = [(p.value, p.policy) if mdp.horizon is None else (p.value[0], p.policy[0]) for p in (fitted, exact)]
    values = np.stack([value for value, _ in firsts])
    low, high = values.min(), values.max()
    for axis, (value, policy), colour in zip(axes, firsts, (FITTED, OPTIMAL), strict=True):
        # The scale ends above the greatest value, so that no cell is too dark to show its arrows.
        draw_cells(axis, mdp, value, "Greys", (low, high + 0.6 * max(high - low, 1e-12)))
        draw_arrows(axis, mdp, policy, colour)
    return figure


@checked(ControlError)
def occupancy_map(mdp: TabularMDP, fitted: PlanResult, exact: PlanResult) -> "Figure":
    """Draw where two policies spend their time, as expected discounted visits of each cell of the grid."""
    figure, axes = grid_axes(mdp, ("fitted", "exact"))
    visits = [plan.occupancy.sum((0, -1) if mdp.horizon is not None else -1) for plan in (fitted, exact)]
    most = max(v.max() for v in visits)
    for axis, visit in zip(axes, visits, strict=True):
        draw_cells(axis, mdp, visit, "Blues", (0.0, most))
        for cell, x, y in grid_cells(mdp):
            if not mdp.terminal[cell]:
                shade = "white" if visit[cell] > 0.6 * most else "black"
                axis.text(x, y, f"{visit[cell]:.2g}", ha="center", va="center", fontsize=6.5, color=shade)
    return figure


@checked(ControlError)
def return_curve(posterior: Posterior, name: str = "return") -> "Figure":
    """Draw a metric of episodes along the training steps: the median over restarts, and their range as a band."""
    values = posterior.history.get(f"metrics/{name}")
    if values is None:
        known = ", ".join(key.removeprefix("metrics/") for key in posterior.history if key.startswith("metrics/"))
        raise ControlError(f"the history has no metric {name!r}; it has {known or 'none'}")
    figure, axis = panel()
    steps = np.asarray(posterior.history["step"])
    draw_band(axis, steps, np.asarray(values, float).reshape(len(steps), -1).T, FITTED)
    style_axes(axis, "training steps", f"{name} of an episode")
    return figure


@checked(ControlError)
def episode_strip(
    key: PRNGKey, environment: str, posterior: Posterior, *, frames: Count = 6, **options: Any
) -> "Figure":
    """Draw frames of one episode of a fit's best restart in a real environment that renders as `rgb_array`."""
    from matplotlib.figure import Figure

    os.environ.setdefault("SDL_VIDEODRIVER", "dummy")  # frames need no window
    env = make_environment(environment, render_mode="rgb_array", **options)
    actions, observations = describe_actions(env.action_space), describe_observations(env.observation_space)
    images: list[Any] = []
    with closing(env):
        seen, _ = env.reset(seed=int(np.asarray(jax.random.key_data(key)).ravel()[-1] % 2**31))
        over, step = False, 0
        while not over:
            images.append(env.render())
            action = np.asarray(posterior.act(fold_in(key, step), observations.one(seen)))
            seen, _, terminated, truncated, _ = env.step(actions.one(action))
            over, step = terminated or truncated, step + 1
        images.append(env.render())
    chosen = np.unique(np.linspace(0, len(images) - 1, frames).astype(int))
    figure = Figure(figsize=(1.5 * len(chosen), 1.5), layout="constrained")
    for axis, index in zip(np.atleast_1d(figure.subplots(1, len(chosen))), chosen, strict=True):
        image = np.asarray(images[index])
        # Thinned pixels keep the report small.
        axis.imshow(image[:: max(image.shape[0] // 200, 1), :: max(image.shape[1] // 300, 1)])
        axis.set_title(f"step {index}", fontsize=7)
        axis.set_axis_off()
    return figure


@checked(ControlError)
def tabular_sections(mdp: TabularMDP) -> Callable[[PRNGKey, Posterior], Iterator[Section]]:
    """Make the report sections of fits of a tabular problem: policy map and occupancy, fitted beside exact.

    Example:
        >>> from bayesrl import control
        >>> sections = control.tabular_sections(control.river_swim())  # Problem(..., sections=(sections,))
    """

    def sections(_: PRNGKey, posterior: Posterior) -> Iterator[Section]:
        one = _first_beta(posterior).select(restart="best")
        fitted = None if mdp.layout is None else evaluate_fitted_policy(mdp, one)
        if fitted is None or one.beta is None:
            return
        beta = float(one.beta)
        exact = soft_value_iteration(mdp, beta)
        yield Section(
            f"The policy on the map, β = {beta:g}",
            "An arrow is as long as its action is likely; darker cells are worth more. Good is where both maps show "
            "the same arrows in the cells that the policy visits; elsewhere it cannot know better than its prior.",
            policy_map(mdp, fitted, exact),
        )
        yield Section(
            f"Where it goes, β = {beta:g}",
            "Expected (discounted) visits of each cell. Good is where both maps agree.",
            occupancy_map(mdp, fitted, exact),
        )
        yield _numbers(mdp, fitted, exact, beta)

    return sections


def _numbers(mdp: TabularMDP, fitted: PlanResult, exact: PlanResult, beta: float) -> Section:
    start = evaluate_policy(mdp, mdp.prior, beta)
    rows: list[Sequence[str]] = [("", "J", "E[R]", "KL, nats")]
    for name, plan in (("prior", start), ("fitted", fitted), ("exact optimum", exact)):
        rows.append((name, *(format_number(float(x)) for x in (plan.objective, plan.reward, plan.kl))))
    gain = float(exact.objective - start.objective)
    left = float(exact.objective - fitted.objective)
    told = f"{in_percent(left / gain)} of what there was to gain is left." if gain > 0 else "There was nothing to gain."
    return Section("Beside the exact optimum", f"Every number is exact, by planning: no draws. {told}", rows)


@checked(ControlError)
def episode_sections(environment: str, **options: Any) -> Callable[[PRNGKey, Posterior], Iterator[Section]]:
    """Make the report sections of fits in a real environment: the curve of returns, and frames of an episode.

    Example:
        >>> from bayesrl import control
        >>> sections = control.episode_sections("CartPole-v1")  # Problem(..., sections=(sections,))
    """

    def sections(key: PRNGKey, posterior: Posterior) -> Iterator[Section]:
        if "metrics/return" in posterior.history:
            yield Section(
                "Returns while it learned",
                "The mean return of the last 100 episodes, undiscounted, median and range over restarts. "
                "Good is a curve that has levelled off.",
                return_curve(posterior),
            )
        if posterior.programs is not None:
            yield Section(
                "An episode",
                "Frames of one episode of the fitted policy, evenly spaced, the first and the last among them.",
                episode_strip(key, environment, _first_beta(posterior), **options),
            )

    return sections


def _first_beta(posterior: Posterior) -> Posterior:
    """Select the fit at the first temperature, or return a fit at one temperature as it is."""
    if posterior.beta is None or np.shape(posterior.beta) == ():
        return posterior
    return posterior.select(beta=float(np.asarray(posterior.beta)[0]))


def draw_band(axis: "Axes", x: np.ndarray, curves: np.ndarray, colour: str, label: str | None = None) -> None:
    """Draw the median of curves [curves, x] as a line, and their range as a band."""
    if len(curves) > 1:
        axis.fill_between(x, np.nanmin(curves, 0), np.nanmax(curves, 0), color=colour, alpha=0.2, linewidth=0)
    axis.plot(x, np.nanmedian(curves, 0), color=colour, linewidth=1.5, label=label)


def grid_cells(mdp: TabularMDP) -> Iterator[tuple[int, int, int]]:
    """Walk the cells of a problem's grid: (state, x, y)."""
    rows, columns = mdp.layout or (0, 0)
    for cell in range(rows * columns):
        yield cell, cell % columns, -(cell // columns)


def grid_axes(mdp: TabularMDP, titles: Sequence[str]) -> tuple["Figure", list["Axes"]]:
    """Begin a figure with a grid for each title, side by side, or one above the other if they are wide."""
    from matplotlib.figure import Figure

    if mdp.layout is None:
        raise ControlError(f"{mdp.name or 'the problem'} has no layout to draw it on; pass layout=(rows, columns)")
    rows, columns = mdp.layout
    wide = columns > 2 * rows
    width = min(0.62 * columns, 8.6)
    size = (width + 0.4, 2 * (width * rows / columns + 0.5)) if wide else (7.2, 3.9)
    figure = Figure(figsize=size, layout="constrained")
    axes = list(np.atleast_1d(figure.subplots(len(titles) if wide else 1, 1 if wide else len(titles))))
    for axis, title in zip(axes, titles, strict=True):
        axis.set_title(title, fontsize=9)
        axis.set(xlim=(-0.5, columns - 0.5), ylim=(-rows + 0.5, 0.5), aspect="equal", xticks=[], yticks=[])
    return figure, axes


def draw_cells(axis: "Axes", mdp: TabularMDP, values: np.ndarray, colours: str, limits: tuple[float, float]) -> None:
    """Colour the cells of a grid by values [states], and mark where episodes start and end."""
    rows, columns = mdp.layout or (1, 1)
    grid = values[: rows * columns].reshape(rows, columns)
    axis.imshow(grid, extent=(-0.5, columns - 0.5, -rows + 0.5, 0.5), cmap=colours, vmin=limits[0], vmax=limits[1])
    for cell, x, y in grid_cells(mdp):
        if mdp.start[cell] > 0 or mdp.terminal[cell]:
            axis.text(x - 0.44, y + 0.3, "start" if mdp.start[cell] > 0 else "end", fontsize=5.5, color="#666")


def draw_arrows(axis: "Axes", mdp: TabularMDP, policy: np.ndarray, colour: str) -> None:
    """Draw an arrow for each action that is a direction, as long as its probability in `policy` [states, actions]."""
    for cell, x, y in grid_cells(mdp):
        for name, share in zip(mdp.action_names, policy[cell], strict=True):
            if mdp.terminal[cell] or name not in _DIRECTIONS or share < 0.02:
                continue
            right, up = _DIRECTIONS[name]
            style = {"arrowstyle": "-|>", "color": colour, "lw": 0.6 + 1.2 * share, "shrinkA": 0, "shrinkB": 0}
            axis.annotate("", (x + 0.42 * share * right, y + 0.42 * share * up), (x, y), arrowprops=style)

"""The report of runs of `learn`: decisions and their certainty, returns and regret, posteriors."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from bayesrl.arguments import checked
from bayesrl.compilation.random_keys import fold_in
from bayesrl.control.environments.tabular import TabularMDP
from bayesrl.control.learning.agents.bayesian_state import BayesianAgentState
from bayesrl.control.learning.agents.kl_control import KLControlAgentState
from bayesrl.control.learning.figures import (
    certainty_figure,
    first_visit,
    policies_figure,
    regret_figure,
    returns_figure,
    sure_map,
    values_figure,
)
from bayesrl.control.learning.posterior_checks import DESCRIBED, SETTLED, check_learning
from bayesrl.control.learning.result import LearnResult, listing, mean_return, summary
from bayesrl.control.planning import soft_value_iteration
from bayesrl.diagnostics.checks import Check
from bayesrl.display.formatting import format_number
from bayesrl.display.section import Section
from bayesrl.display.tables import tag
from bayesrl.errors import ControlError
from bayesrl.report.figure_sections import checks_table
from bayesrl.report.html_page import CaptionedFigure, Cell, Part
from bayesrl.report.sections import section_parts, verdict_card
from bayesrl.report.write import register_report
from bayesrl.typing import PRNGKey
from bayesrl.value_checks import format_value


def learning_parts(
    key: PRNGKey,
    runs: Mapping[str, Sequence[LearnResult]],
    sections: Sequence[Section] = (),
    about: str = "",
    made: Any = (),
    checks: Any = None,
) -> list[Part]:
    """Make the parts of the report of independent runs, by name.

    `sections` and `checks` are of the first run of each; `about` says in one line what the problem is, and `made` are
    more rows of (setting, value).
    """
    if checks is None:
        checks = {name: check_learning(fold_in(key, i), several[0]) for i, (name, several) in enumerate(runs.items())}
    return [
        Part("Verdict", "", [Cell(name, _verdict(several, checks[name], about)) for name, several in runs.items()]),
        Part(
            "Checks",
            "Of the first run. Good: all pass; a warning says what to look at, a failure what to do.",
            [Cell(name, [checks_table(checks[name])]) for name in runs],
        ),
        Part(
            "Numbers",
            "Returns, regret and optimum are in reward units. Regret is the optimum less what was earned: its growth "
            "is what exploration costs.",
            [Cell(name, [listing(summary(several))]) for name, several in runs.items()],
        ),
        Part("Learning", "", [Cell("", _curves(runs))]),
        *section_parts(sections),
        Part(
            "How it was made",
            "The same command with the same versions gives the same run.",
            [Cell(name, [listing([*_made(several[0]), *made])]) for name, several in runs.items()],
        ),
    ]


def _verdict(several: Sequence[LearnResult], checks: Sequence[Check], about: str) -> list[Any]:
    outcomes = [check.outcome for check in checks if check.name not in (DESCRIBED, SETTLED)]
    card = next((outcome for outcome in ("fail", "warn", "pass") if outcome in outcomes), "unknown")
    headline = {"pass": "Learned", "warn": "Not settled", "fail": "Not learned", "unknown": "Unknown"}[card]
    pairs = [row for row in summary(several) if row[0] not in ("runs", "steps")][:5]
    blocks = [tag("p", about)] if about else []
    blocks.append(verdict_card(card, headline, sentence(several, checks), pairs))
    if any(run.interrupted for run in several):
        blocks.append(tag("p", "A run was interrupted; what follows is what it had learned.", class_="missing"))
    return blocks


def sentence(several: Sequence[LearnResult], checks: Sequence[Check]) -> str:
    """Say in one sentence how well it learned, and which checks of the first run need a look."""
    odd = [check.name for check in checks if check.outcome != "pass"]
    named, mean = mean_return(several)
    earned = f"The {named} earned {mean} on average"
    optimum = several[0].env.optimum
    against = f", where {format_number(optimum)} is the most that can be expected" if optimum is not None else ""
    return f"{earned}{against}" + (f"; look at: {', '.join(odd)}." if odd else "; all checks pass.")


def _curves(runs: Mapping[str, Sequence[LearnResult]]) -> list[Any]:
    several = all(len(r) > 1 for r in runs.values())
    bands = " Bands are the range over runs, lines their median." if several else ""
    shown: list[Any] = [CaptionedFigure(returns_figure(runs), f"Good: it rises to the optimum and stays there.{bands}")]
    if not any(np.isnan(run.history["regret"]).any() for r in runs.values() for run in r):
        shown.append(CaptionedFigure(regret_figure(runs), f"Good: it flattens; a straight line learns nothing.{bands}"))
    bayesian = {n: r for n, r in runs.items() if isinstance(r[0].agent_state, BayesianAgentState)}
    if bayesian:
        caption = "Good: it rises to 1, or settles where actions are worth the same."
        shown.append(CaptionedFigure(certainty_figure(bayesian), caption))
    return shown


def _made(result: LearnResult) -> list[tuple[str, str]]:
    identity, settings = result.problem["identity"], result.problem["settings"]
    agent = ", ".join(f"{k}={v}" for k, v in identity["agent"].items() if k != "type")
    rows = [
        ("environment", str(identity["environment"])),
        ("agent", f"{identity['agent']['type']}({agent})"),
        ("exploration", str(identity["exploration"])),
        ("seed", str(identity["seed"][-1])),
    ]
    return rows + [(name.replace("_", " "), str(value)) for name, value in settings.items()]


@register_report(LearnResult)
def _registered_parts(key: PRNGKey, named: Mapping[str, Any], sections: Sequence[Section]) -> list[Part]:
    runs = {name: [run] if isinstance(run, LearnResult) else run for name, run in named.items()}
    for name, several in runs.items():
        if not isinstance(several, list | tuple) or not all(isinstance(run, LearnResult) for run in several):
            raise ControlError(
                f"posteriors[{name!r}] is {format_value(several)} beside a result of learn; write a report of each kind"
            )
    return learning_parts(key, runs, sections)


@checked(ControlError)
def learning_maps(mdp: TabularMDP) -> Callable[[PRNGKey, LearnResult], Iterator[Section]]:
    """Make the report sections of learning in a tabular problem: posterior of Q, and how sure it is.

    Args:
        mdp: the environment of the run, for its layout and its exact values.

    Example:
        >>> import jax
        >>> from bayesrl import control
        >>> swim = control.river_swim()
        >>> agent = control.BayesianAgent(control.TabularModel.of(swim, noise=0.1))
        >>> result = control.learn(jax.random.key(0), swim, agent, exploration=control.thompson(), num_episodes=30)
        >>> [section.title for section in control.learning_maps(swim)(jax.random.key(1), result)]
        ['Posterior of Q, in states along the way', 'How sure it is, on the map']
    """

    def sections(key: PRNGKey, result: LearnResult) -> Iterator[Section]:
        state = result.agent_state
        if isinstance(state, KLControlAgentState) and mdp.layout is not None:
            yield Section(
                "The policy on the map",
                "An arrow is as long as its action is likely. Good is where it agrees with the optimum beside it.",
                policies_figure(state, mdp),
            )
        if not isinstance(state, BayesianAgentState) or not result.num_episodes:
            return
        exact = soft_value_iteration(mdp, 0.0).action_value
        states = _common_states(result)
        timed = exact if exact.ndim == 3 else exact[None]
        truth = {s: timed[min(first_visit(result, s), len(timed) - 1), s] for s in states}
        yield Section(
            "Posterior of Q, in states along the way",
            "Bars hold the middle 50% and 95% of the posterior, crosses are the true values. Good is where the crosses "
            "of the better actions lie within their bars; actions known to be worse are tried no more, and stay wide.",
            values_figure(key, result, states, truth),
        )
        if mdp.layout is not None:
            early = next((s for s in result.snapshots if s.episode >= result.num_episodes / 20), None)
            yield Section(
                "How sure it is, on the map",
                "Darker cells are surer of their best action, and white ones were never entered; arrows are as long "
                "as their action is probably the best. Good is where the way to the goal is dark at the end.",
                sure_map(key, result, mdp, [early, None] if state.model.online and early else [None]),
            )

    return sections


@checked(ControlError)
def learning_values(truth: Sequence[float] | None = None) -> Callable[[PRNGKey, LearnResult], Iterator[Section]]:
    """Make the report section of learning in a bandit: the posterior of each arm's value.

    Args:
        truth: the true values, reward units, or None.

    Example:
        >>> import jax
        >>> from bayesrl import control
        >>> arms = control.bandits.GaussianArms(2)
        >>> agent = control.BayesianAgent(control.ArmsModel(arms))
        >>> result = control.learn(jax.random.key(0), arms, agent, num_episodes=20)
        >>> [section.title for section in control.learning_values()(jax.random.key(1), result)]
        ['Posterior of the values']
    """

    def sections(key: PRNGKey, result: LearnResult) -> Iterator[Section]:
        state = result.agent_state
        if not isinstance(state, BayesianAgentState) or not result.num_episodes or not state.finite:
            return
        decision = result.decide(key, 0)
        known = None if truth is None else {0: np.asarray(truth, float)}
        best = int(np.argmax(decision.p_optimal))
        low, high = np.asarray(decision.interval[best])
        yield Section(
            "Posterior of the values",
            "Bars hold the middle 50% and 95% of the posterior, crosses are the true values. Good is where the bar of "
            f"the best arm stands apart. {result.action_name(best)} is the best with probability "
            f"{float(decision.p_optimal[best]):.2f}, and choosing it loses {low:.2g} to {high:.2g} (95%).",
            values_figure(key, result, [0], known),
        )

    return sections


def _common_states(result: LearnResult) -> list[int]:
    """Choose the states to show: those that recent episodes visited most, in order of first visit."""
    last = result.bayesian_state().memory.arrays()["observation"][-2000:].astype(int)
    count = np.bincount(last)
    often = np.argsort(-count, kind="stable")[: min(6, int((count > 0).sum()))]
    return sorted((int(s) for s in often), key=lambda s: (first_visit(result, s), s))

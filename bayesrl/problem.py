"""Problems to fit or to learn, and the ready ones that ship with the library."""

import importlib.util
import inspect
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from bayesrl.argument_types import LazyAnnotation, Requirement
from bayesrl.arguments import Count, checked
from bayesrl.cache import use_by_default
from bayesrl.compilation.random_keys import fold_in
from bayesrl.display.section import Section
from bayesrl.errors import BayesRLError
from bayesrl.posterior.posterior import Posterior
from bayesrl.ready_models import COMMANDS, ProblemError, check_use, declared_options, model_path, needed, no_function
from bayesrl.typing import Beta, PRNGKey, Program

if TYPE_CHECKING:
    from bayesrl.control.learning.result import LearnResult


def _options_of(module: str, name: str, *others: str) -> Requirement:
    """Require options of a function other than `others`; import the function only when there are options."""

    def hold(options: Mapping[str, Any]) -> bool:
        known = inspect.signature(LazyAnnotation(module, name)()).parameters.values() if options else ()
        return {*options} <= {one.name for one in known if one.kind is one.KEYWORD_ONLY and one.name not in others}

    return Requirement(f"a dictionary of options of `{name}`, but for {' and '.join(others)}", hold)


_FIT_OPTIONS = _options_of("bayesrl.svi.fitting", "fit", "beta", "directory")
_ENGINE_OPTIONS = _options_of("bayesrl.diagnostics.engines.side_by_side", "compare_engines", "beta", "optimum")
_LEARN_OPTIONS = _options_of("bayesrl.control.learning.loop", "learn", "exploration", "num_episodes", "directory")


@checked(ProblemError)
@dataclass(frozen=True)
class Problem:
    """A policy with everything needed to fit and report it.

    Attributes:
        policy: the program.
        args: its arguments.
        beta: default temperature, reward units per nat; None without rewards.
        fit_options: further options of `bayesrl.fit`, such as `guide` and `num_steps`.
        held_out: other arguments of the program, on which to report the fit too.
        optimum: maps a temperature to the known optimum J* per context (reward units); None if
            enumeration finds it or it is unknown.
        sections: further sections of the report, and functions of a key and the posterior that return some.
        about: one line that describes the problem.
        engines: options of `bayesrl.compare_engines`, such as `budget`, for a section of the report on what other
            engines say of the same optimum; None leaves it out.

    Example:
        >>> import math, jax.numpy as jnp, numpyro, numpyro.distributions as dist, bayesrl
        >>> def bandit():
        ...     arm = numpyro.sample("arm", dist.Categorical(logits=jnp.zeros(3)))
        ...     bayesrl.reward("payoff", jnp.array([0.0, 1.0, 2.0])[arm])
        >>> problem = bayesrl.Problem(
        ...     bandit,
        ...     beta=1.0,
        ...     fit_options={"num_steps": 500},
        ...     optimum=lambda beta: beta * math.log(sum(math.exp(r / beta) for r in (0, 1, 2)) / 3),
        ...     about="three arms that pay 0, 1 and 2",
        ... )
        >>> round(problem.optimum(1.0), 3)
        1.309
    """

    policy: Program
    args: tuple[Any, ...] = ()
    beta: Beta | None = None
    fit_options: Annotated[Mapping[str, Any], _FIT_OPTIONS] = field(default_factory=dict)
    held_out: tuple[Any, ...] | None = None
    optimum: Callable[[float], float] | None = None
    sections: tuple[Any, ...] = ()
    about: str = ""
    engines: Annotated[Mapping[str, Any], _ENGINE_OPTIONS] | None = None

    def sections_of(self, key: PRNGKey, posterior: Posterior) -> list[Section]:
        """Return the further sections of a fit's report; an error becomes a section."""
        return _sections_of(key, self.sections, posterior)


def _sections_of(key: PRNGKey, parts: tuple[Any, ...], made: Any) -> list[Section]:
    found: list[Section] = []
    for i, part in enumerate(parts):
        if isinstance(part, Section):
            found.append(part)
            continue
        try:
            found += list(part(fold_in(key, i), made))
        except BayesRLError as error:
            found.append(Section("A part that is missing", "It could not be made.", str(error)))
    return found


@checked(ProblemError)
@dataclass(frozen=True)
class LearningProblem:
    """An environment with an agent that learns in it, and everything needed to run and report it.

    Attributes:
        environment: as for `bayesrl.control.learn`.
        agent: `KLControlAgent(...)` or `BayesianAgent(...)`.
        exploration: the rule, or None for the agent's own.
        num_episodes: the most episodes of a run.
        num_runs: independent runs; the bands of the report show their spread.
        learn_options: further options of `learn`, such as `confidence`.
        sections: further sections of the report, and functions of a key and the first run that return some.
        about: one line that describes the problem.

    Example:
        >>> import bayesrl
        >>> from bayesrl import control
        >>> swim = control.river_swim()
        >>> agent = control.BayesianAgent(control.TabularModel.of(swim))
        >>> problem = bayesrl.LearningProblem(swim, agent, control.thompson(), num_episodes=30, num_runs=3)
        >>> problem.num_episodes * problem.num_runs  # episodes in all
        90
    """

    environment: Annotated[Any, LazyAnnotation("bayesrl.control.learning.adapters", "Playable")]
    agent: Annotated[Any, LazyAnnotation("bayesrl.control.learning.agents.base", "Agent")]
    exploration: Annotated[Any, LazyAnnotation("bayesrl.control.exploration.rules", "Rule")] | None = None
    num_episodes: Count = 200
    num_runs: Count = 1
    learn_options: Annotated[Mapping[str, Any], _LEARN_OPTIONS] = field(default_factory=dict)
    sections: tuple[Any, ...] = ()
    about: str = ""

    def sections_of(self, key: PRNGKey, learned: "LearnResult") -> list[Section]:
        """Return the further sections of a run's report; an error becomes a section."""
        return _sections_of(key, self.sections, learned)


@checked(ProblemError)
def load_problem(name: str, **options: Any) -> Problem:
    """Make one of the ready problems, or one from your own file.

    Args:
        name: of a ready model, or the path of a Python file that defines `problem(**options)`.
        **options: passed on to `problem`.

    Raises:
        ProblemError: there is no such model, its file does not import or has no `problem`, or an
            option is unknown or does not fit its declaration as int, float or bool.

    Example:
        >>> import bayesrl
        >>> bayesrl.load_problem("bernoulli_bandit", arms=3).beta
        0.1
    """
    return _made(name, "problem", Problem, options)


@checked(ProblemError)
def load_learning_problem(name: str, **options: Any) -> LearningProblem:
    """Make one of the ready environments with its agent, or one from your own file.

    Args:
        name: of a ready model, or the path of a Python file that defines `learning(**options)`.
        **options: passed on to `learning`.

    Raises:
        ProblemError: as `load_problem`.

    Example:
        >>> import bayesrl
        >>> bayesrl.load_learning_problem("deep_sea", size=5).environment.name
        'deep_sea'
    """
    return _made(name, "learning", LearningProblem, options)


def _made[T](name: str, function: str, kind: type[T], options: dict[str, Any]) -> T:
    use_by_default()
    check_use(name, function, options)  # reads the file without importing it, so that mistakes show at once
    path = model_path(name)
    module = _module(path)
    make = getattr(module, function, None)
    if not callable(make):
        raise no_function(name, path, function, tuple(u for u in COMMANDS if callable(getattr(module, u, None))))
    declared = declared_options(name, options, inspect.signature(make).parameters)
    try:
        problem = make(**declared)
    except BayesRLError:
        raise
    except ModuleNotFoundError as error:
        raise ProblemError(f"{function}() of {path} needs {needed(error.name or str(error))}") from error
    except Exception as error:
        raise ProblemError(f"{function}() of {path} failed: {type(error).__name__}: {error}") from error
    if not isinstance(problem, kind):
        raise ProblemError(
            f"{function}() of {path} returned {type(problem).__name__}; return a bayesrl.{kind.__name__}"
        )
    return problem


def _module(path: Path) -> Any:
    """Import a model file by its path.

    Raises:
        ProblemError: with the reason and the line.
    """
    name = f"bayesrl_model_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ProblemError(f"{path} is not a Python file; give the path of a .py file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BayesRLError:
        raise
    except Exception as error:
        raise ProblemError(f"{path} does not import: {type(error).__name__}: {error}") from error
    return module

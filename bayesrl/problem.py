"""A problem ready to be fitted, and the ready ones that ship with the library."""

import importlib.util
import inspect
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bayesrl.certainty.verdicts import Section
from bayesrl.errors import BayesRLError
from bayesrl.posterior import Posterior
from bayesrl.typing import Program


class ModelError(BayesRLError, ValueError):
    """A model file, its name or an option of it cannot be used."""


@dataclass(frozen=True)
class Problem:
    """A policy with everything that fitting and reporting it needs.

    Attributes:
        policy: the program.
        args: its arguments.
        beta: default temperature, reward units per nat; None without rewards.
        fit_options: further options of `bayesrl.fit`, such as `guide` and `num_steps`.
        held_out: other arguments of the program, on which the fit is reported too.
        exact: gives the known optimum J* per context (reward units) at a temperature; None where
            enumeration finds it or nobody knows.
        sections: further sections of the report, and functions of the posterior that give some.
        about: one line on what the problem is.
    """

    policy: Program
    args: tuple[Any, ...] = ()
    beta: Any = None
    fit_options: Mapping[str, Any] = field(default_factory=dict)
    held_out: tuple[Any, ...] | None = None
    exact: Callable[[float], float] | None = None
    sections: tuple[Any, ...] = ()
    about: str = ""

    def sections_of(self, posterior: Posterior) -> list[Section]:
        """Give the further sections of the report of a fit; what fails is told in the place of its sections."""
        found: list[Section] = []
        for part in self.sections:
            if isinstance(part, Section):
                found.append(part)
                continue
            try:
                found += list(part(posterior))
            except BayesRLError as error:
                found.append(Section("A part that is missing", "It could not be made.", str(error)))
        return found


def model_folder() -> Path:
    """Where the ready models lie: inside the installed package, or beside it in a checkout."""
    package = Path(__file__).parent
    inside = package / "models"
    return inside if inside.is_dir() else package.parent / "models"


def model_names() -> dict[str, str]:
    """Names of the ready models, each with its one-line description."""
    found = {}
    for path in sorted(model_folder().glob("*.py")):
        if not path.name.startswith("_"):
            first = path.read_text(encoding="utf-8").lstrip().removeprefix('"""').splitlines()[0]
            found[path.stem] = first.removesuffix('"""').strip()
    return found


def ready_model(name: str, **options: Any) -> Problem:
    """Make one of the ready problems, or one from a file of yours.

    Args:
        name: of a ready model, or the path of a Python file that defines `problem(**options)`.
        **options: passed on to `problem`.

    Raises:
        ModelError: there is no such model, its file does not import or has no `problem`, or an
            option is unknown.

    Example:
        >>> import bayesrl
        >>> bayesrl.ready_model("bernoulli_bandit", arms=3).beta
        0.1
    """
    make, path = _maker(name)
    signature = inspect.signature(make)
    accepts_all = any(p.kind is p.VAR_KEYWORD for p in signature.parameters.values())
    unknown = [option for option in options if option not in signature.parameters]
    if unknown and not accepts_all:
        known = ", ".join(f"{p.name}={p.default!r}" for p in signature.parameters.values()) or "none"
        raise ModelError(f"model {name!r} has no option {unknown[0]!r}; its options are {known}")
    try:
        problem = make(**options)
    except BayesRLError:
        raise
    except Exception as error:
        raise ModelError(f"problem() of {path} failed: {type(error).__name__}: {error}") from error
    if not isinstance(problem, Problem):
        raise ModelError(f"problem() of {path} returned {type(problem).__name__}; return a bayesrl.Problem")
    return problem


def model_options(name: str) -> dict[str, Any]:
    """Give the options of a ready model with their defaults.

    Raises:
        ModelError: as `ready_model`.
    """
    make, _ = _maker(name)
    parameters = inspect.signature(make).parameters.values()
    return {p.name: p.default for p in parameters if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)}


def _maker(name: str) -> tuple[Callable[..., Any], Path]:
    """Find the function `problem` of a model, and its file."""
    path = Path(name) if name.endswith(".py") else model_folder() / f"{name}.py"
    if not path.is_file():
        known = ", ".join(model_names())
        raise ModelError(f"there is no model {name!r}; choose from {known}, or give the path of a .py file")
    make = getattr(_module(path), "problem", None)
    if not callable(make):
        raise ModelError(f"{path} defines no function problem(**options); add one that returns a bayesrl.Problem")
    return make, path


def _module(path: Path) -> Any:
    """Import a model file by its path.

    Raises:
        ModelError: with the reason and the line.
    """
    name = f"bayesrl_model_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ModelError(f"{path} is not a Python file; give the path of a .py file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BayesRLError:
        raise
    except Exception as error:
        raise ModelError(f"{path} does not import: {type(error).__name__}: {error}") from error
    return module

"""Describe the ready models from their files without importing them, so that a wrong name or option shows at once."""

import ast
import inspect
from collections.abc import Mapping
from difflib import get_close_matches
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from bayesrl.errors import BayesRLError

COMMANDS = {"problem": "fit", "learning": "learn"}
"""Functions of model files, and the commands that use them."""

_KINDS = {"int": int, "float": float, "bool": bool, "str": str}
_TOLD = {int: "an integer", float: "a number", bool: "true or false"}


EXTRAS = {
    "gymnasium": "control",
    "sklearn": "digits",
    "tokenizers": "lm",
    "num2words": "lm",
    "sacrebleu": "lm",
    "huggingface_hub": "lm",
}
"""Packages that come with an extra, and the name of that extra."""

_NEEDS = "NEEDS"
"""The variable in a model file that lists its packages, each with the options that need it."""


class ProblemError(BayesRLError, ValueError):
    """A model file, its name or an option of it cannot be used."""


class SourceText:
    """The source text of a default that is not a literal."""

    def __init__(self, text: str) -> None:
        self.text = text

    def __repr__(self) -> str:
        return self.text


def model_folder() -> Path:
    """The folder of the ready models: inside the installed package, or beside it in a checkout."""
    package = Path(__file__).parent
    inside = package / "models"
    return inside if inside.is_dir() else package.parent / "models"


def model_names() -> dict[str, str]:
    """Names of the ready models, each with its one-line description."""
    found = {}
    for path in sorted(model_folder().glob("*.py")):
        if not path.name.startswith("_"):
            told = (ast.get_docstring(_parsed(path)) or "").splitlines()
            found[path.stem] = told[0].strip() if told else ""
    return found


def model_path(name: str) -> Path:
    """Find the file of a model.

    Args:
        name: of a ready model, or the path of a Python file.

    Raises:
        ProblemError: there is none; the message names the closest model, or all ready ones.
    """
    path = Path(name) if name.endswith(".py") else model_folder() / f"{name}.py"
    if path.is_file():
        return path
    known = sorted(path.stem for path in model_folder().glob("[!_]*.py"))
    beside = [str(other) for other in path.parent.glob("*.py")] if name.endswith(".py") and path.parent.is_dir() else []
    meant = closest(name, beside) or closest(Path(name).stem if name.endswith(".py") else name, known)
    if meant is not None:
        raise ProblemError(f"there is no model {name!r}; did you mean {meant!r}? `bayesrl models` lists all")
    raise ProblemError(f"there is no model {name!r}; choose from {', '.join(known)}, or give the path of a .py file")


def closest(text: str, known: list[str], least: float = 0.7) -> str | None:
    """Return the known word closest to a text, or None if none is similar enough."""
    return next(iter(get_close_matches(text, known, 1, least)), None)


def model_uses(name: str) -> tuple[str, ...]:
    """Return the uses of a model: `problem` to fit it, `learning` to learn in it, or both.

    Raises:
        ProblemError: there is no such model, or its file cannot be read.
    """
    tree = _parsed(model_path(name))
    return tuple(use for use in COMMANDS if _times_bound(tree, use))


def model_options(name: str, function: str = "problem") -> dict[str, Any]:
    """Return the options of a model with their defaults.

    Raises:
        ProblemError: there is no such model, or its file has no such function.

    Example:
        >>> from bayesrl.ready_models import model_options
        >>> model_options("bernoulli_bandit")
        {'arms': 5, 'best': 0.9, 'worst': 0.1}
    """
    check_use(name, function)
    parameters = _parameters(_parsed(model_path(name)), function) or {}
    return {p.name: p.default for p in parameters.values() if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)}


def check_use(name: str, function: str, options: Mapping[str, Any] | None = None) -> None:
    """Refuse a model or options that cannot work, before importing anything; in doubt, accept.

    Args:
        name: of the model.
        function: `problem` or `learning`.
        options: the options to pass to it.

    Raises:
        ProblemError: there is no such model or function, or an option is unknown or has a wrong value.
    """
    path = model_path(name)
    tree = _parsed(path)
    if not _times_bound(tree, function):
        raise no_function(name, path, function, tuple(use for use in COMMANDS if _times_bound(tree, use)))
    parameters = _parameters(tree, function)
    if parameters is not None:
        given = declared_options(name, options or {}, parameters)
        _check_installed(name, tree, {p.name: p.default for p in parameters.values()} | given)


def _check_installed(name: str, tree: ast.Module, options: Mapping[str, Any]) -> None:
    """Refuse a model whose packages are not installed.

    Raises:
        ProblemError: naming the extra.
    """
    told = _constants(tree).get(_NEEDS)
    for package, where in ast.literal_eval(told).items() if told is not None else ():
        if all(options.get(option) == value for option, value in where.items()) and find_spec(package) is None:
            raise ProblemError(f"model {name!r} needs {needed(package)}")


def needed(package: str) -> str:
    """Say that a package is not installed, and how to install it."""
    extra = EXTRAS.get(package)
    how = f"install bayesrl[{extra}] (pip install 'bayesrl[{extra}]')" if extra else f"pip install {package}"
    return f"{package}, which is not installed: {how}"


def no_function(name: str, path: Path, function: str, others: tuple[str, ...]) -> ProblemError:
    """Make the error of a model file without a function; `others` are those that it has."""
    if others and not name.endswith(".py"):
        done = {"problem": "fitted", "learning": "learned"}
        return ProblemError(
            f"{name} is {done[others[0]]}, not {done[function]}: choose another model, or use "
            f"`bayesrl {COMMANDS[others[0]]} {name}`"
        )
    remedy = f"add one, or use `bayesrl {COMMANDS[others[0]]} {name}`" if others else "add one"
    return ProblemError(f"{path} defines no function {function}(**options); {remedy}")


def declared_options(
    name: str, options: Mapping[str, Any], parameters: Mapping[str, inspect.Parameter]
) -> dict[str, Any]:
    """Convert the options of a model to the types that its parameters declare.

    Raises:
        ProblemError: one is unknown, or does not fit its declaration as int, float or bool.
    """
    accepts_all = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    unknown = next((option for option in options if option not in parameters), None)
    if unknown is not None and not accepts_all:
        known = ", ".join(f"{p.name}={p.default!r}" for p in parameters.values()) or "none"
        meant = closest(unknown, list(parameters))
        hint = f"did you mean {meant!r}? Its options are" if meant is not None else "its options are"
        others = "" if meant is not None else _having(unknown)
        raise ProblemError(f"model {name!r} has no option {unknown!r}; {hint} {known}{others}")
    return {k: _declared(k, v, parameters[k]) if k in parameters else v for k, v in options.items()}


def _having(option: str) -> str:
    """Say which ready models have an option, and how to pass it."""
    trees = {model: _parsed(model_path(model)) for model in model_names()}
    having = [
        f"`bayesrl {command} {model} --set {option}=...`"
        for model, tree in trees.items()
        for use, command in COMMANDS.items()
        if option in (_parameters(tree, use) or {})
    ]
    return f"; other models have it: {' or '.join(having[:3])}" if having else ""


def _declared(name: str, value: Any, parameter: inspect.Parameter) -> Any:
    """Convert an option to the type that its parameter declares: 2e3 is an integer, 2.5 is not."""
    kind = parameter.annotation
    if kind not in (int, float, bool) or hasattr(value, "dtype"):
        return value
    number = isinstance(value, int | float) and not isinstance(value, bool)
    fine = {int: number and value == value // 1, float: number, bool: isinstance(value, bool)}
    if not fine[kind]:
        example = "" if kind is bool or parameter.default is parameter.empty else f", such as {parameter.default!r}"
        raise ProblemError(f"option {name} must be {_TOLD[kind]}{example}, got {value!r}")
    return int(value) if kind is int else value


# ---- what a file says -------------------------------------------------------------------------


def _parsed(path: Path) -> ast.Module:
    try:
        return _tree(path, path.stat().st_mtime_ns)
    except OSError as error:
        raise ProblemError(f"cannot read {path}: {error.strerror}") from error
    except (SyntaxError, ValueError) as error:
        raise ProblemError(f"{path} does not import: {type(error).__name__}: {error}") from error


@lru_cache(64)
def _tree(path: Path, _changed: int) -> ast.Module:
    return ast.parse(path.read_bytes())


def _times_bound(tree: ast.Module, name: str) -> int:
    """Count the places, at any depth, where a file may bind a name; `import *` and `__getattr__` count too."""
    count = 0
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            count += node.name in (name, "__getattr__")
        elif isinstance(node, ast.Import | ast.ImportFrom):
            count += any((alias.asname or alias.name) in (name, "*") for alias in node.names)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            count += node.id == name
    return count


def _constants(tree: ast.Module) -> dict[str, ast.expr]:
    """Return the expressions that a file assigns to its names."""
    assigned = (node for node in tree.body if isinstance(node, ast.Assign))
    return {node.targets[0].id: node.value for node in assigned if isinstance(node.targets[0], ast.Name)}


def _parameters(tree: ast.Module, function: str) -> dict[str, inspect.Parameter] | None:
    """Read the parameters of a top-level function of a file, or return None if only an import could show them."""
    found = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == function]
    if len(found) != 1 or found[0].decorator_list or _times_bound(tree, function) != 1:
        return None
    told = found[0].args
    constants = _constants(tree)
    arguments = [*told.posonlyargs, *told.args, *told.kwonlyargs]
    missing: list[ast.expr | None] = [None] * (len(arguments) - len(told.defaults) - len(told.kw_defaults))
    defaults = [*missing, *told.defaults, *told.kw_defaults]
    # Every option is passed by name, so its kind does not matter.
    parameters = [_parameter(*both, constants) for both in zip(arguments, defaults, strict=True)]
    if told.kwarg is not None:
        parameters.append(inspect.Parameter(told.kwarg.arg, inspect.Parameter.VAR_KEYWORD))
    return {parameter.name: parameter for parameter in parameters}


def _parameter(arg: ast.arg, default: ast.expr | None, constants: dict[str, ast.expr]) -> inspect.Parameter:
    told = arg.annotation
    annotation = _KINDS.get(told.id, inspect.Parameter.empty) if isinstance(told, ast.Name) else inspect.Parameter.empty
    value: Any = inspect.Parameter.empty
    if default is not None:
        meant = constants.get(default.id, default) if isinstance(default, ast.Name) else default
        try:
            value = ast.literal_eval(meant)
        except ValueError:
            value = SourceText(ast.unparse(default))
    return inspect.Parameter(arg.arg, inspect.Parameter.KEYWORD_ONLY, default=value, annotation=annotation)

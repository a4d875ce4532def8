"""The house: imports go down only, modules stay short, nothing dangerous is called, names are told."""

import ast
import importlib
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from types import ModuleType

import pytest

import bayesrl

PACKAGE = Path(bayesrl.__file__).parent
FILES = sorted(path for path in PACKAGE.rglob("*.py") if "models" not in path.relative_to(PACKAGE).parts)

# From the bottom to the top; a module may import its own room and lower floors, no sibling.
FLOORS = [
    ["errors", "value_checks"],
    ["argument_types"],
    ["arguments", "typing"],
    ["files", "jaxprs"],
    ["run_folder", "ready_models"],
    ["compilation"],
    ["cache", "core"],
    ["guides", "statistics"],
    ["display", "exact", "objectives"],
    ["posterior"],
    ["monte_carlo", "svi"],
    ["diagnostics", "moments", "twists"],
    ["report", "lm"],
    ["preferences"],
    ["control", "rewards"],
    ["problem"],
    ["cli"],
]
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}


PACKAGES = [
    "bayesrl",
    "bayesrl.control",
    "bayesrl.control.bandits",
    "bayesrl.guides",
    "bayesrl.lm",
    "bayesrl.lm.rewards",
    "bayesrl.objectives",
    "bayesrl.preferences",
    "bayesrl.report",
    "bayesrl.rewards",
]
"""They have names for users; all others are read by the library alone."""

TWICE: dict[str, str] = {}
"""Public names with two meanings, each with its reason; at most five."""


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports_of(tree: ast.AST) -> list[str]:
    found: list[str] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, "imports are absolute"
            if node.module == "bayesrl":
                found += [f"bayesrl.{alias.name}" for alias in node.names]
            else:
                found.append(node.module)
    return found


def _name(path: Path) -> str:
    return ".".join(["bayesrl", *path.relative_to(PACKAGE).with_suffix("").parts]).removesuffix(".__init__")


MODULES = {_name(path): path for path in FILES}


def _files_imported(name: str) -> Iterator[str]:
    """Give the files that a module imports, wherever in it it does so."""
    for node in ast.walk(ast.parse(MODULES[name].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in MODULES)
        elif isinstance(node, ast.ImportFrom) and node.module in MODULES:
            inside = (f"{node.module}.{alias.name}" for alias in node.names)
            yield from (file if file in MODULES else node.module for file in inside)


def _assigned(tree: ast.Module) -> Iterator[str]:
    for node in tree.body:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        yield from (target.id for target in targets if isinstance(target, ast.Name))


def _defined(tree: ast.Module) -> Iterator[str]:
    yield from _assigned(tree)
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.TypeAlias):
            yield node.name.id


def _edits(a: str, b: str) -> int:
    """Levenshtein's distance."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        left = [i]
        for j, y in enumerate(b, 1):
            left.append(min(row[j] + 1, left[-1] + 1, row[j - 1] + (x != y)))
        row = left
    return row[-1]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_module(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    tree = ast.parse(text)
    room = room_of(path)
    assert text.count("\n") <= 400, "a module holds one idea"
    assert ast.get_docstring(tree), "a module says what it is"
    if room == "__init__":
        return
    assert room in FLOOR, f"{room} has no floor: give it one in this test and in README.md"
    for name in imports_of(tree):
        assert name != "bayesrl", "nothing inside imports the package root"
        if name.startswith("bayesrl."):
            other = name.split(".")[1]
            assert other == room or FLOOR[other] < FLOOR[room], f"{room} imports {other}, which is not below it"
        assert name.split(".")[0] not in {"pickle", "dill", "cloudpickle", "shelve"}, name
    exported = getattr(importlib.import_module(f"bayesrl.{room}"), "__all__", []) if path.parent.name == room else []
    assert path.stem not in exported, "a submodule would hide the name that its package exports"
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id not in {"eval", "exec", "compile", "__import__"}, f"line {node.lineno}"
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno is not None
            assert node.end_lineno - node.lineno <= 90, f"{node.name} is long: name its middle"


def test_no_circle_of_files() -> None:
    """Imports inside of functions count, so that nothing hides there."""
    below = {name: {other for other in _files_imported(name) if other != name} for name in MODULES}
    while bottom := {name for name, others in below.items() if not others}:
        below = {name: others - bottom for name, others in below.items() if name not in bottom}
    assert not below, f"files import each other in a circle, or stand above one: {sorted(below)}"


def test_folders_can_be_read_at_a_glance() -> None:
    for folder in {path.parent for path in FILES}:
        names = sorted(path.stem for path in folder.glob("*.py"))
        assert len(names) <= 14, f"{folder} holds {len(names)} files"
        near = [pair for pair in combinations(names, 2) if _edits(*pair) <= 2]
        assert not near, f"names in {folder} that are easily confused: {near}"


def test_one_name_has_one_meaning() -> None:
    """A public function, class, type or constant is defined in one file; what else bears its name says why here."""
    homes = defaultdict(set)
    for path in FILES:
        for name in _defined(ast.parse(path.read_text(encoding="utf-8"))):
            if not name.startswith("_") and name != "app":
                homes[name].add(path.relative_to(PACKAGE).as_posix())
    twice = {name: files for name, files in homes.items() if len(files) > 1}
    assert len(TWICE) <= 5
    assert set(twice) == set(TWICE), {name: sorted(files) for name, files in twice.items() if name not in TWICE}


def test_exported_names_are_those_of_the_list() -> None:
    """The public surface changes on purpose: in this list, in CHANGELOG.md, and in what users read."""
    exported = sorted(f"{package}.{name}" for package in PACKAGES for name in importlib.import_module(package).__all__)
    listed = (Path(__file__).parent / "exported_names.txt").read_text(encoding="utf-8").split()
    assert exported == listed
    # 12 of them for preferences: a room of its own, with its data, its models and their posterior; one for rewards that
    # are not known, and their room; overoptimisation and its figure; one scores records.
    assert len(exported) <= 187


@pytest.mark.parametrize("package", PACKAGES)
def test_exported_names_are_documented_by_an_example(package: str) -> None:
    module = importlib.import_module(package)
    things = {name: getattr(module, name) for name in module.__all__}
    silent = [name for name, thing in things.items() if not (thing.__doc__ or "").strip()]
    assert not silent
    without = [
        name for name, thing in things.items() if not isinstance(thing, ModuleType) and ">>>" not in thing.__doc__
    ]
    assert not without, "an exported name shows itself at work"


def test_only_public_packages_export() -> None:
    for path in PACKAGE.rglob("__init__.py"):
        package = ".".join(["bayesrl", *path.parent.relative_to(PACKAGE).parts])
        names = {name for name in _assigned(ast.parse(path.read_text(encoding="utf-8"))) if name == "__all__"}
        assert bool(names) == (package in PACKAGES), package


def test_import_is_light_and_makes_no_arrays() -> None:
    code = (
        "import sys, bayesrl, jax\n"
        "heavy = {'arviz', 'matplotlib', 'sklearn', 'pandas', 'typer', 'rich', 'xarray'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "assert not jax.live_arrays(), jax.live_arrays()\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr

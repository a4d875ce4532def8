"""The house: imports go down only, modules stay short, nothing dangerous is called, names are told."""

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import bayesrl

PACKAGE = Path(bayesrl.__file__).parent
FILES = sorted(path for path in PACKAGE.rglob("*.py") if "models" not in path.relative_to(PACKAGE).parts)

# From the bottom to the top; a module may import its own room and lower floors, no sibling.
FLOORS = [
    ["errors", "values"],
    ["annotations"],
    ["arguments", "typing"],
    ["files", "jaxprs"],
    ["run_folder", "catalogue"],
    ["compilation"],
    ["cache", "core"],
    ["guides", "statistics"],
    ["display", "exact", "objectives"],
    ["posterior"],
    ["monte_carlo", "svi"],
    ["diagnostics"],
    ["report", "lm"],
    ["control"],
    ["problem"],
    ["cli"],
]
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}


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


@pytest.mark.parametrize("name", bayesrl.__all__)
def test_public_names_are_documented(name: str) -> None:
    assert (getattr(bayesrl, name).__doc__ or "").strip()


def test_import_is_light_and_makes_no_arrays() -> None:
    code = (
        "import sys, bayesrl, jax\n"
        "heavy = {'arviz', 'matplotlib', 'sklearn', 'pandas', 'typer', 'rich', 'xarray'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "assert not jax.live_arrays(), jax.live_arrays()\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr

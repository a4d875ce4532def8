"""The run folder: one place for the checkpoint, the settings and the saved draws of a fit.

problem.json             what was fitted: compared before a run is continued
checkpoint.safetensors   state and history, replaced in one step
posterior.nc             draws and history as a netCDF DataTree, written when a run ends
model.json               the model and its options, where the command line made the run
scores.json              the scores of the fit, where the command line made the run
"""

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from bayesrl.errors import RunFolderError

FORMAT = 2
PROBLEM, CHECKPOINT, POSTERIOR = "problem.json", "checkpoint.safetensors", "posterior.nc"
MODEL, SCORES = "model.json", "scores.json"
_MOST_TOLD = 4


def open_folder(directory: str | Path, problem: Mapping[str, Any]) -> Path:
    """Make a run folder, or open one of the same problem; nothing in it is changed.

    Args:
        directory: the folder.
        problem: as for `check_same`.

    Raises:
        RunFolderError: the folder cannot be made, holds other files, or another problem; the
            message says what differs.
    """
    folder = claim(directory)
    if (folder / PROBLEM).exists():
        check_same(folder, problem)
    return folder


def save_problem(folder: Path, problem: Mapping[str, Any]) -> None:
    """Write the description of the problem, atomically."""
    write(folder / PROBLEM, json.dumps(problem, indent=1, ensure_ascii=False).encode())


def claim(directory: str | Path) -> Path:
    """Make a folder for a run, or accept one that is empty or holds a run.

    Raises:
        RunFolderError: the folder cannot be made, or holds other files.
    """
    folder = Path(directory)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        names = sorted(path.name for path in folder.iterdir())
    except OSError as error:
        raise RunFolderError(
            f"cannot make the run folder {folder}: {error.strerror}; choose another directory"
        ) from error
    strangers = [name for name in names if not name.startswith(".") and name != MODEL]
    if strangers and PROBLEM not in names:
        raise RunFolderError(
            f"{folder} is not a run folder, and not empty ({', '.join(strangers[:3])}); "
            "choose another directory, or empty it"
        )
    return folder


def release(folder: Path) -> None:
    """Give up a claimed folder in which no run was begun: remove it where nothing else is in it."""
    if not (folder / PROBLEM).exists():
        (folder / MODEL).unlink(missing_ok=True)
        if not any(folder.iterdir()):
            folder.rmdir()


def check_same(folder: str | Path, problem: Mapping[str, Any]) -> None:
    """Refuse a run folder of another problem.

    Args:
        folder: a run folder.
        problem: JSON-able description; its `identity`, and whether its optimiser was given by hand,
            must agree with what the folder holds, real numbers to a part in a thousand.

    Raises:
        RunFolderError: the folder holds another problem; the message says what differs.
    """
    old, new = _told(read_problem(folder)), _told(json.loads(json.dumps(problem)))
    different = [key for key in {**old, **new} if not _alike(old.get(key), new.get(key))]
    if different:
        told = [f"{key} was {_short(old.get(key))}, is {_short(new.get(key))}" for key in different[:_MOST_TOLD]]
        more = f"; and {len(different) - _MOST_TOLD} differences more" if len(different) > _MOST_TOLD else ""
        raise RunFolderError(
            f"{folder} holds a run of another problem: {'; '.join(told)}{more}; choose another directory"
        )


def _told(problem: Mapping[str, Any]) -> dict[str, Any]:
    """Lay out what identifies a problem, parts of parts by their own names."""
    told: dict[str, Any] = {"optimizer": problem["settings"].get("optimizer")}
    for key, value in problem["identity"].items():
        told |= {f"{key} {name}": part for name, part in value.items()} if isinstance(value, dict) else {key: value}
    return told


def _alike(old: Any, new: Any) -> bool:
    if isinstance(old, list) and isinstance(new, list):
        return len(old) == len(new) and all(_alike(*parts) for parts in zip(old, new, strict=True))
    if isinstance(old, float) and isinstance(new, float):
        return bool(np.isclose(old, new, rtol=1e-3, atol=1e-4, equal_nan=True))
    return bool(old == new)


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else text[:77] + "..."


def read_problem(directory: str | Path) -> dict[str, Any]:
    """Read the description of the problem in a run folder.

    Raises:
        RunFolderError: there is none, it cannot be read, or another version wrote it.
    """
    path = Path(directory) / PROBLEM
    try:
        problem: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise RunFolderError(
            f"{directory} is not a run folder: it has no {PROBLEM}; pass the directory= of a fit"
        ) from error
    except (OSError, ValueError) as error:
        raise RunFolderError(f"cannot read {path}: {error}") from error
    if not isinstance(problem, dict) or problem.get("format") != FORMAT:
        found = problem.get("format") if isinstance(problem, dict) else problem
        raise RunFolderError(f"{path} has format {found!r}, and this version reads {FORMAT}; fit anew")
    missing = [key for key in ("identity", "settings") if not isinstance(problem.get(key), dict)]
    if missing:
        raise RunFolderError(f"{path} has no {missing[0]!r}; it is damaged: fit anew into another directory")
    return problem


def read_json(directory: str | Path, name: str) -> dict[str, Any] | None:
    """Read one of the folder's JSON files, or give None where there is none.

    Raises:
        RunFolderError: it cannot be read.
    """
    path = Path(directory) / name
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise RunFolderError(f"cannot read {path}: {error}; it is damaged: fit anew into another directory") from error
    return content


def write(path: Path, content: bytes) -> None:
    """Replace a file in one step: whoever reads it sees the old content or the new, never a part.

    Raises:
        RunFolderError: the disk is full or the folder cannot be written; the old content is intact.
    """
    temporary = None
    try:
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).replace(path)
    except OSError as error:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
        raise RunFolderError(f"cannot write {path}: {error.strerror}; what it held before is intact") from error


def save_checkpoint(folder: Path, state: Any, history: Mapping[str, np.ndarray]) -> None:
    """Write state and history as one file, atomically."""
    import jax

    leaves = jax.tree_util.tree_flatten_with_path(state)[0]
    arrays = {f"state{jax.tree_util.keystr(path)}": np.asarray(leaf) for path, leaf in leaves}
    arrays |= {f"history/{name}": np.asarray(values) for name, values in history.items()}
    write(folder / CHECKPOINT, save(arrays))


def load_checkpoint(directory: str | Path, template: Any) -> tuple[Any, dict[str, np.ndarray]] | None:
    """Read state and history, or None where nothing was saved yet.

    Args:
        directory: the run folder.
        template: a state of the same structure.

    Raises:
        RunFolderError: the file is damaged, or its arrays are not those of the template.
    """
    import jax

    path = Path(directory) / CHECKPOINT
    if not path.exists():
        return None
    arrays = read_arrays(path)
    leaves, treedef = jax.tree_util.tree_flatten_with_path(template)
    wanted = {f"state{jax.tree_util.keystr(keys)}" for keys, _ in leaves}
    foreign = [name for name in arrays if name.startswith("state") and name not in wanted]
    if foreign:
        raise RunFolderError(
            f"{path} holds {foreign[0]}, which the fit has no use for; "
            "was the guide or the optimiser changed? Fit into another directory"
        )
    restored = []
    for keys, leaf in leaves:
        name = f"state{jax.tree_util.keystr(keys)}"
        array = arrays.get(name)
        if array is None or array.shape != np.shape(leaf) or array.dtype != leaf.dtype:
            found = "nothing" if array is None else f"{array.dtype}{list(array.shape)}"
            raise RunFolderError(
                f"{path} holds {found} for {name}, and the fit needs {leaf.dtype}{list(np.shape(leaf))}; "
                "was the guide or the optimiser changed? Fit into another directory"
            )
        restored.append(jax.device_put(array))
    history = {name.removeprefix("history/"): a for name, a in arrays.items() if name.startswith("history/")}
    return jax.tree.unflatten(treedef, restored), history


def read_history(directory: str | Path) -> tuple[int, dict[str, np.ndarray]]:
    """Read how many steps a checkpoint has done, and its history; 0 and nothing where there is none.

    Raises:
        RunFolderError: the file is damaged.
    """
    path = Path(directory) / CHECKPOINT
    if not path.exists():
        return 0, {}
    arrays = read_arrays(path)
    history = {name.removeprefix("history/"): a for name, a in arrays.items() if name.startswith("history/")}
    return int(arrays.get("state.step", np.zeros((), int))), history


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """Read every array of a safetensors file.

    Raises:
        RunFolderError: the file is damaged.
    """
    try:
        with safe_open(path, framework="numpy") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise RunFolderError(f"cannot read {path}: {error}; it is damaged: fit anew into another directory") from error

"""The checkpoint and the saved draws of a run folder."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, deserialize
from safetensors.numpy import save

from bayesrl.errors import RunFolderError
from bayesrl.files.digests import STAMP, blank, stamped
from bayesrl.files.regular_files import read_file, write_file
from bayesrl.run_folder import earlier_formats
from bayesrl.run_folder.json_files import (
    ANEW,
    begun_problem,
    check_stamp,
    is_begun,
    problem_of,
    stored_digest,
    stored_problem,
)

CHECKPOINT, POSTERIOR = "checkpoint.safetensors", "posterior.nc"
PREVIOUS_CHECKPOINT = "checkpoint.before.safetensors"
FITTED = ("step", "loss", "objective", "reward", "kl", "spread", "grad_norm", "skipped")
LEARNED = ("episode", "return", "discounted", "length", "regret", "p_optimal", "expected_regret")
"""The columns that every history has."""


def save_checkpoint(
    folder: Path, state: Any, history: Mapping[str, np.ndarray], memories: Mapping[str, np.ndarray] | None = None
) -> None:
    """Write state, history and what the sources of draws remember as one file, atomically."""
    import jax

    leaves = jax.tree_util.tree_flatten_with_path(state)[0]
    arrays = {f"state{jax.tree_util.keystr(path)}": np.asarray(leaf) for path, leaf in leaves}
    arrays |= {f"history/{name}": np.asarray(values) for name, values in history.items()}
    save_arrays(folder, arrays | {f"memory/{name}": array for name, array in (memories or {}).items()})


def save_arrays(folder: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Write arrays as the folder's checkpoint, atomically, and keep the previous one.

    Raises:
        RunFolderError: it cannot be written; the old checkpoint is intact.
    """
    laid_out = {name: np.asarray(array, order="C") for name, array in arrays.items()}
    content = stamped(save(laid_out, metadata={STAMP: blank(CHECKPOINT, problem_of(folder))}))
    write_file(folder / CHECKPOINT, content, before=folder / PREVIOUS_CHECKPOINT)


def load_checkpoint(directory: str | Path, template: Any) -> tuple[Any, dict[str, np.ndarray]] | None:
    """Read a state of the template's structure, and the history, or return None if there is no checkpoint yet.

    Raises:
        RunFolderError: the file is damaged, or its arrays are not those of the template.
    """
    import jax

    path, problem = Path(directory) / CHECKPOINT, begun_problem(directory)
    arrays = read_checkpoint(directory, problem)
    if arrays is None:
        return None
    problem = problem or stored_problem(directory)
    leaves, treedef = jax.tree_util.tree_flatten_with_path(template)
    wanted = {f"state{jax.tree_util.keystr(keys)}" for keys, _ in leaves}
    foreign = [name for name in arrays if name.startswith("state") and name not in wanted]
    if foreign:
        raise RunFolderError(
            f"{path} holds {foreign[0]}, which the fit does not use; "
            "was the guide or the optimiser changed? Fit into another directory"
        )
    restored = []
    as_at_the_start = earlier_formats.NEW_STATE.get(problem["format"], ())
    for keys, leaf in leaves:
        name = f"state{jax.tree_util.keystr(keys)}"
        if name in as_at_the_start and name not in arrays:
            restored.append(leaf)
            continue
        array = arrays.get(name)
        if array is None or array.shape != np.shape(leaf) or array.dtype != leaf.dtype:
            found = "nothing" if array is None else f"{array.dtype}{list(array.shape)}"
            raise RunFolderError(
                f"{path} holds {found} for {name}, and the fit needs {leaf.dtype}{list(np.shape(leaf))}; "
                "was the guide or the optimiser changed? Fit into another directory"
            )
        restored.append(jax.device_put(array))
    return jax.tree.unflatten(treedef, restored), history_in(directory, arrays, problem)


def load_memories(directory: str | Path) -> dict[str, np.ndarray]:
    """Read what the sources of draws remembered at the checkpoint; nothing without a checkpoint.

    Raises:
        RunFolderError: the file is damaged.
    """
    arrays = read_checkpoint(directory) if is_begun(directory) else None
    lead = "memory/"
    return {name.removeprefix(lead): array for name, array in (arrays or {}).items() if name.startswith(lead)}


def read_history(directory: str | Path) -> tuple[int, dict[str, np.ndarray]]:
    """Read how many steps a checkpoint has done, and its history; 0 and an empty history without a checkpoint.

    Raises:
        RunFolderError: the file is damaged.
    """
    problem = begun_problem(directory)
    arrays = read_checkpoint(directory, problem) or {}
    return done_in(directory, arrays), history_in(directory, arrays, problem)


def history_in(
    directory: str | Path, arrays: Mapping[str, np.ndarray], problem: Mapping[str, Any] | None = None
) -> dict[str, np.ndarray]:
    """Return the history among a checkpoint's arrays: [chunk, *beta, restart] of a fit, [episode] of `learn`.

    Args:
        directory: the run folder.
        arrays: of its checkpoint.
        problem: of the folder, if it has been read already.

    Raises:
        RunFolderError: its columns or shapes are not those of this folder's run.
    """
    history = {name.removeprefix("history/"): a for name, a in arrays.items() if name.startswith("history/")}
    if not history:
        return {}
    problem = problem or stored_problem(directory)
    learns = problem["identity"].get("kind") == "learn"
    lead = () if learns else fits_in(problem)
    for name in LEARNED if learns else FITTED:
        if name not in history:
            raise _no_history(directory, f"has no history of {name!r}")
    rows = len(np.atleast_1d(history["episode" if learns else "step"]))
    for name, array in history.items():
        wanted = (rows,) if learns or name == "step" else (rows, *lead)
        if array.shape != wanted or array.dtype.kind not in "iufb":
            raise _no_history(directory, f"has {name!r:.60} as {array.dtype}{list(array.shape)}, not {list(wanted)}")
    return history


def fits_in(problem: Mapping[str, Any]) -> tuple[int, ...]:
    """Return the axes (*beta, restart) of a fit's arrays, according to its problem."""
    beta = problem["identity"]["beta"]
    return (*((len(beta),) if isinstance(beta, list) else ()), problem["settings"]["num_restarts"])


def _no_history(directory: str | Path, why: str) -> RunFolderError:
    return RunFolderError(f"cannot read {Path(directory) / CHECKPOINT}: it {why}; it is damaged: {ANEW}")


def done_in(directory: str | Path, arrays: Mapping[str, np.ndarray]) -> int:
    """Return how many steps a fit has done according to its checkpoint; 0 if that has no count.

    Raises:
        RunFolderError: the count is not an integer.
    """
    step = arrays.get("state.step", np.zeros((), int))
    if step.shape != () or step.dtype.kind not in "iu":
        raise _no_history(directory, f"has the steps as {step.dtype}{list(step.shape)}")
    return int(step)


def read_checkpoint(directory: str | Path, problem: Mapping[str, Any] | None = None) -> dict[str, np.ndarray] | None:
    """Read every array of the folder's checkpoint, or return None if there is none.

    If only the previous checkpoint exists, read that one. This happens when a process was killed between two renames,
    or when somebody deleted a damaged checkpoint.

    Args:
        directory: the run folder.
        problem: of the folder, if it has been read already.

    Raises:
        RunFolderError: it is damaged; the message offers the previous one, if that is whole.
    """
    folder, problem = Path(directory), problem or begun_problem(directory)
    try:
        last = _read_arrays(folder / CHECKPOINT, problem, ANEW)
    except RunFolderError as error:
        # Only damage is a reason to look at the one before: other errors would hold for both.
        try:
            kept = _read_arrays(folder / PREVIOUS_CHECKPOINT, problem, "") if "damaged" in str(error) else None
        except RunFolderError:
            kept = None
        if kept is None:
            raise
        done = done_in(folder, kept) if "state.step" in kept else len(kept.get("history/episode", ()))
        what = "steps" if "state.step" in kept else "episodes"
        raise RunFolderError(
            f"{str(error).removesuffix(ANEW)}the checkpoint before it, after {done:,} {what}, is whole: delete "
            f"{CHECKPOINT}, and resume goes on from there"
        ) from error
    return _read_arrays(folder / PREVIOUS_CHECKPOINT, problem, ANEW) if last is None else last


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """Read every array of a checkpoint.

    Raises:
        RunFolderError: the file is missing or damaged.
    """
    arrays = _read_arrays(path, begun_problem(path.parent), ANEW)
    if arrays is None:
        raise RunFolderError(f"there is no {path}; pass the checkpoint of a run that was begun")
    return arrays


def _read_arrays(path: Path, problem: Mapping[str, Any] | None, remedy: str) -> dict[str, np.ndarray] | None:
    content = read_file(path)
    if content is None:
        return None
    check_stamp(path, content, stored_digest(problem), remedy, CHECKPOINT)
    try:
        arrays = {name: _array(**told) for name, told in deserialize(content)}
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise RunFolderError(f"cannot read {path}: {error}; it is damaged: {remedy}") from error
    return arrays if problem is None else earlier_formats.upgrade_arrays(arrays, problem)


def _array(dtype: str, shape: list[int], data: bytes | bytearray) -> np.ndarray:
    kinds = {"F": "f", "I": "i", "U": "u"}
    # NumPy has no bfloat16 of its own.
    if dtype == "BF16":
        import ml_dtypes

        kind = np.dtype(ml_dtypes.bfloat16)
    else:
        kind = np.dtype(bool) if dtype == "BOOL" else np.dtype(f"{kinds[dtype[0]]}{int(dtype[1:]) // 8}")
    return np.frombuffer(data, kind).reshape(shape)


def save_draws(folder: Path, content: bytes) -> None:
    """Write the netCDF file of draws and history, atomically.

    Raises:
        RunFolderError: it cannot be written; the old file is intact.
    """
    # HDF5 readers ignore bytes after the end of the data, so the stamp goes there.
    write_file(folder / POSTERIOR, stamped(content + f"\n{blank(POSTERIOR, problem_of(folder))}\n".encode()))


def read_draws(directory: str | Path) -> bytes | None:
    """Read the netCDF file of draws and history, or return None if it does not exist.

    Raises:
        RunFolderError: it is damaged.
    """
    path = Path(directory) / POSTERIOR
    content = read_file(path)
    if content is not None:
        remedy = "load the folder with its policy, which needs the checkpoint alone"
        check_stamp(path, content, problem_of(directory), remedy)
    return content

"""The JSON files of a run folder: its problem, its model and its scores."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from bayesrl.errors import RunFolderError
from bayesrl.files import schemas
from bayesrl.files.digests import (
    ANYBODY,
    FORMAT,
    STAMP,
    NewerError,
    UnstampedError,
    newer,
    problem_digest,
    stamped_json,
    verify,
)
from bayesrl.files.regular_files import read_file, write_file
from bayesrl.files.schemas import FLAG, NOTHING, NUMBER, POSITIVE, TEXT, Schema, integer_between, misfit
from bayesrl.run_folder import earlier_formats

PROBLEM, MODEL, SCORES = "problem.json", "model.json", "scores.json"
ANEW = "fit anew into another directory"
_MOST_TOLD = 4

_STEPS, _FITS = integer_between(1, 2**31 - 1), integer_between(1, 2**20)
_PLAIN: Schema = (NOTHING, TEXT, NUMBER, FLAG, [(NOTHING, TEXT, NUMBER, FLAG)])
_DESCRIBED: Schema = (NOTHING, TEXT, {"type": TEXT, "*": _PLAIN})
_SEED: Schema = [integer_between(0, 2**32 - 1)]
_FITTED: Schema = {
    "identity": {
        "sites": [TEXT],
        "arguments": TEXT,
        "beta": (NOTHING, [POSITIVE], POSITIVE),
        "restarts": _FITS,
        "seed": _SEED,
        "guide": _DESCRIBED,
        "objective": _DESCRIBED,
        "parameters": {"*": TEXT},
    },
    "settings": {
        "num_steps": _STEPS,
        "num_restarts": _FITS,
        "optimizer": TEXT,
        "tolerance?": POSITIVE,
        "start_beta?": POSITIVE,
        "learning_rate?": POSITIVE,
        "key_impl?": TEXT,
        "*": _PLAIN,
    },
}
_LEARNED: Schema = {
    "identity": {
        "kind": TEXT,
        "environment": TEXT,
        "agent": {"type": TEXT},
        "exploration": TEXT,
        "seed": _SEED,
    },
    "settings": {"num_episodes": _STEPS, "tolerance?": POSITIVE, "confidence?": POSITIVE, "*": _PLAIN},
}
MODEL_SCHEMA: dict[str, Schema] = {
    "model": TEXT,
    "options": {"*": (TEXT, NUMBER, FLAG)},
    "learn?": {
        "explore": (NOTHING, TEXT),
        "episodes": _STEPS,
        "runs": integer_between(1, 10_000),
        "seed": integer_between(0, 2**63 - 1),
    },
}


def is_begun(directory: str | Path) -> bool:
    """Whether a folder has a run."""
    return (Path(directory) / PROBLEM).exists(follow_symlinks=False)


def save_problem(folder: Path, problem: Mapping[str, Any]) -> None:
    """Write the description of the problem, atomically; keep the identity of a description that is already there."""
    kept = {"format": FORMAT}
    if is_begun(folder):
        begun = stored_problem(folder)
        kept = {"format": begun["format"], "identity": begun["identity"]}
    # There and back, so that what is stamped is what will be read: tuples become lists, keys become text.
    told = json.loads(json.dumps({**problem, **kept}))
    write_file(folder / PROBLEM, stamped_json(told, PROBLEM, problem_digest(told["identity"])))


def check_same(folder: str | Path, problem: Mapping[str, Any]) -> None:
    """Refuse a run folder of another problem.

    The `identity` of the problem, and whether its optimiser was given by hand, must agree with those in the folder,
    real numbers to one part in a thousand.

    Raises:
        RunFolderError: the folder has another problem; the message says what differs.
    """
    begun, given = read_problem(folder), json.loads(json.dumps(problem))
    for part in earlier_formats.NOT_COMPARED.get(begun["format"], ()):
        given["identity"].pop(part, None)
    old, new = _told(begun), _told(given)
    different = [key for key in {**old, **new} if not _alike(old.get(key), new.get(key))]
    if different:
        told = [f"{key} was {_short(old.get(key))}, is {_short(new.get(key))}" for key in different[:_MOST_TOLD]]
        more = f"; and {len(different) - _MOST_TOLD} more differences" if len(different) > _MOST_TOLD else ""
        raise RunFolderError(
            f"{folder} holds a run of another problem: {'; '.join(told)}{more}; choose another directory"
        )


def _told(problem: Mapping[str, Any]) -> dict[str, Any]:
    """Flatten the identity of a problem: each part of a part gets its own name."""
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
    """Read the description of the problem in a run folder, in this version's names, whichever version wrote it.

    Raises:
        RunFolderError: it is missing or damaged, or a later version wrote it.
    """
    return earlier_formats.upgrade_problem(stored_problem(directory))


def option_names(directory: str | Path | None) -> dict[str, str]:
    """Return today's names of options → their names in a run folder, where an earlier version wrote others."""
    if directory is None or not is_begun(directory) or stored_problem(directory)["format"] == FORMAT:
        return {}
    return {today: earlier for earlier, today in earlier_formats.RENAMED_OPTIONS.items()}


def stored_problem(directory: str | Path) -> dict[str, Any]:
    """Read the description of the problem as it was written."""
    path = Path(directory) / PROBLEM
    content = read_file(path, most=schemas.MOST_BYTES)
    if content is None:
        raise RunFolderError(f"{directory} is not a run folder: it has no {PROBLEM}; pass the directory= of a fit")
    problem = _parsed(path, content, ANEW)
    found = problem.get("format") if isinstance(problem, dict) else problem
    if not isinstance(problem, dict) or found not in (*earlier_formats.EARLIER, FORMAT):
        if isinstance(found, int) and found > FORMAT:
            raise RunFolderError(f"cannot read {path}: {newer(found)}")
        raise RunFolderError(f"{path} has format {found!r:.80}, and this version reads {FORMAT}; fit anew")
    learns = isinstance(problem.get("identity"), dict) and problem["identity"].get("kind") == "learn"
    told = misfit(problem, _LEARNED if learns else _FITTED)
    if told is not None:
        raise RunFolderError(f"{path}: {told}; it is damaged: {ANEW}")
    check_stamp(path, content, problem_digest(problem["identity"]), ANEW)
    return problem


def load_json(
    directory: str | Path, name: str, schema: Mapping[str, Schema], remedy: str = ANEW
) -> dict[str, Any] | None:
    """Read one of the folder's JSON files as this version writes it, or return None if it does not exist.

    The schema `{}` accepts any object; the remedy says what to do if the file is damaged.

    Raises:
        RunFolderError: it is damaged, or does not fit the schema.
    """
    path = Path(directory) / name
    content = read_file(path, most=schemas.MOST_BYTES)
    if content is None:
        return None
    told: Any = _parsed(path, content, remedy)
    told = earlier_formats.upgrade_scores(told) if name == SCORES else told
    wrong = misfit(told, dict(schema))
    if wrong is not None:
        raise RunFolderError(f"{path}: {wrong}; it is damaged: {remedy}")
    # People write a model file by hand too, and then it has no stamp.
    written_by_hand = name == MODEL and set(told) <= {key.removesuffix("?") for key in MODEL_SCHEMA}
    if not written_by_hand:
        check_stamp(path, content, problem_of(directory), remedy)
    return {key: value for key, value in told.items() if key != STAMP}


def save_json(folder: Path, name: str, content: Mapping[str, Any]) -> None:
    """Write one of the folder's JSON files, atomically.

    Raises:
        RunFolderError: it cannot be written.
    """
    write_file(folder / name, stamped_json(content, name, problem_of(folder)))


def _parsed(path: Path, content: bytes, remedy: str) -> Any:
    try:
        return schemas.parsed(content)
    except ValueError as error:
        raise RunFolderError(f"cannot read {path}: {error}; it is damaged: {remedy}") from error


def check_stamp(path: Path, content: bytes, problem: str, remedy: str, name: str = "") -> None:
    """Refuse a file whose stamp does not agree with its content, its problem and `name`, by default the file's name.

    Raises:
        RunFolderError: naming the file, what is wrong and the remedy.
    """
    try:
        verify(content, name or path.name, problem)
    except NewerError as error:
        raise RunFolderError(f"cannot read {path}: {error}") from error
    except UnstampedError as error:
        if not _is_unstamped(path.parent):
            raise RunFolderError(f"cannot read {path}: {error}; it is damaged: {remedy}") from error
    except ValueError as error:
        raise RunFolderError(f"cannot read {path}: {error}; it is damaged: {remedy}") from error


def _is_unstamped(folder: Path) -> bool:
    """Whether a version whose files have no stamps began the folder."""
    content = read_file(folder / PROBLEM, most=schemas.MOST_BYTES)
    return content is not None and _parsed(folder / PROBLEM, content, ANEW).get("format") == earlier_formats.UNSTAMPED


def problem_of(directory: str | Path) -> str:
    """Return the digest of a folder's problem, or the wildcard `ANYBODY` if it has no run yet."""
    return stored_digest(begun_problem(directory))


def begun_problem(directory: str | Path) -> dict[str, Any] | None:
    """Read the description of the problem as it was written, or return None if the folder has no run yet."""
    return stored_problem(directory) if is_begun(directory) else None


def stored_digest(problem: Mapping[str, Any] | None) -> str:
    """Return the digest of a stored problem, or the wildcard `ANYBODY` if there is none."""
    return ANYBODY if problem is None else problem_digest(problem["identity"])

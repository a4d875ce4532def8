"""Damage the files of a run folder, or put somebody else's files in their place."""

import io
import json
import os
import random
from pathlib import Path
from typing import Any

import numpy as np

# ---- damage -----------------------------------------------------------------------------------


def damage(rng: random.Random, content: bytes, kind: str, others: list[bytes]) -> bytes | None:  # noqa: PLR0912
    """Damage the content of a file; None means that the file is removed."""
    data, size = bytearray(content), len(content)
    at, length = rng.randrange(size), rng.choice((1, 4, 16, 64, 512))
    # Half of the damage hits the beginning, where headers are.
    at = at if rng.random() < 0.5 else min(at, rng.randrange(min(size, 400)))
    other = rng.randrange(size)
    match kind:
        case "a bit flipped":
            data[at] ^= 1 << rng.randrange(8)
        case "a byte changed":
            data[at] = (data[at] + rng.randrange(1, 256)) % 256
        case "a block of zeros":
            data[at : at + length] = bytes(len(data[at : at + length]))
        case "a block of noise":
            data[at : at + length] = rng.randbytes(len(data[at : at + length]))
        case "a block lost":
            del data[at : at + length]
        case "a block twice":
            data[at:at] = data[at : at + length]
        case "two blocks exchanged":
            one, two = min(at, other), max(at, other)
            length = min(length, two - one)
            data[one : one + length], data[two : two + length] = data[two : two + length], data[one : one + length]
        case "cut short":
            del data[at:]
        case "longer":
            data += rng.randbytes(length)
        case "empty":
            data.clear()
        case "another file":
            return rng.choice(others)
        case "gone":
            return None
        case _:
            raise ValueError(kind)
    return bytes(data)


DAMAGE = (
    "a bit flipped", "a byte changed", "a block of zeros", "a block of noise", "a block lost", "a block twice",
    "two blocks exchanged", "cut short", "longer", "empty", "another file", "gone",
)  # fmt: skip

# ---- files laid by somebody else ----------------------------------------------------------------

STEERS = "\x1b[2J\x1b]0;x\x07\u202e\x9b31m"
_VALUES: tuple[Any, ...] = (
    None, True, False, 0, -1, 3, 2**31, 2**63, 10**40, 0.5, -0.0, 1e308, float("nan"), float("inf"), "", "x", STEERS,
    "../../x", "x" * 5000, "\ud800", [], [None], [[0, 0]], [[[]]], ["x"] * 3, {}, {"type": "AutoTilt"},
    {"type": "ReverseKL", "num_particles": "many"}, {"type": STEERS}, {"x": {"y": {}}}, {"": ""},
)  # fmt: skip


def _other_value(rng: random.Random, told: Any) -> Any:
    """Copy a value with one part exchanged, removed or added, somewhere inside."""
    if isinstance(told, dict) and told and rng.random() < 0.9:
        name = rng.choice(list(told))
        if name == "digest":
            return told
        if rng.random() < 0.1:
            return {key: value for key, value in told.items() if key != name}
        if rng.random() < 0.05:
            return {**told, rng.choice(("x", STEERS, "kind", "learn", "note")): rng.choice(_VALUES)}
        return {**told, name: _other_value(rng, told[name])}
    if isinstance(told, list) and told and rng.random() < 0.7:
        at = rng.randrange(len(told))
        return [*told[:at], _other_value(rng, told[at]), *told[at + 1 :]]
    return rng.choice(_VALUES)


def _laid_json(rng: random.Random, path: Path, problem: str) -> None:
    from bayesrl.files.digests import FORMAT, problem_digest, stamped_json

    told = json.loads(path.read_bytes())
    told = _other_value(rng, told)
    told = told if isinstance(told, dict) else {"value": told}
    if path.name == "problem.json" and isinstance(told.get("identity"), dict):
        problem = problem_digest(told["identity"])
    content = stamped_json(told, path.name, problem)
    if rng.random() < 0.1:
        content = content.replace(f"bayesrl format {FORMAT}".encode(), f"bayesrl format {FORMAT + 5}".encode())
    path.write_bytes(content)


def _laid_arrays(rng: random.Random, path: Path, problem: str) -> None:
    from safetensors.numpy import load, save

    from bayesrl.files.digests import STAMP, blank, stamped

    arrays = load(path.read_bytes())
    name = rng.choice(list(arrays))
    array = arrays.pop(name)
    match rng.randrange(6):
        case 0:
            arrays[name + STEERS] = array
        case 1:
            arrays[name] = np.zeros((*array.shape, 2), array.dtype)
        case 2:
            arrays[name] = array.astype(np.float16 if array.dtype.kind == "f" else np.int64)
        case 3:
            arrays[name] = np.zeros((0, *array.shape[1:]), array.dtype)
        case 4:
            arrays |= {name: array, "state.more": np.ones(3), "history/more": np.ones(2), "agent/more": np.ones(1)}
    path.write_bytes(stamped(save(arrays, metadata={STAMP: blank("checkpoint.safetensors", problem)})))


def _laid_draws(rng: random.Random, path: Path, problem: str) -> None:
    import h5netcdf

    from bayesrl.files.digests import blank, stamped

    held = io.BytesIO()
    with h5netcdf.File(held, "w") as file:
        for group in rng.sample(("posterior", "prior", "sample_stats", "training"), rng.randrange(5)):
            made = file.create_group(group)
            made.dimensions = {rng.choice(("chain", "draw", "step", "beta", "x")): 2}
            made.create_variable(rng.choice(("arm", "loss", "x")), tuple(made.dimensions), data=np.zeros(2))
    path.write_bytes(stamped(held.getvalue() + f"\n{blank(path.name, problem)}\n".encode()))


def lay(rng: random.Random, path: Path, kind: str, outside: Path, problem: str) -> None:
    """Replace a file by something else; links lead outside the folder."""
    if kind == "other values":
        if path.suffix == ".json":
            _laid_json(rng, path, problem)
        elif path.suffix == ".safetensors":
            _laid_arrays(rng, path, problem)
        elif path.suffix == ".nc":
            _laid_draws(rng, path, problem)
        return
    content = path.read_bytes()
    path.unlink()
    match kind:
        case "a link":
            outside.write_bytes(content)
            path.symlink_to(outside)
        case "a link to nothing":
            path.symlink_to(outside)
        case "a pipe":
            os.mkfifo(path)
        case "a device":
            path.symlink_to("/dev/zero")
        case "a folder":
            path.mkdir()
        case "a file of a terabyte":
            with path.open("wb") as file:
                file.truncate(2**40)
        case "a nest of brackets":
            path.write_bytes(b'{"a":' * 100_000 if rng.random() < 0.5 else b"[" * 1_000_000)
        case _:
            raise ValueError(kind)


LAID = (
    *("other values",) * 12, "a link", "a link to nothing", "a pipe", "a device", "a folder", "a file of a terabyte",
    "a nest of brackets",
)  # fmt: skip

"""Files of weights: what a folder holds, one array after another, and how arrays are written into one."""

import json
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from bayesrl.errors import LanguageModelError
from bayesrl.lm.tokenization.files import read_json_object
from bayesrl.run_folder import write_file

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
PART = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")
FLOAT8 = {"F8_E4M3": jnp.dtype(jnp.float8_e4m3fn), "F8_E5M2": jnp.dtype(jnp.float8_e5m2)}
PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")


def read_arrays(*paths: Path) -> Iterator[tuple[str, Any]]:
    """Read the arrays of files, one after another."""
    held: dict[str, Path] = {}
    for path in paths:
        try:
            with safe_open(path, framework="numpy") as file:
                for name in file.keys():  # noqa: SIM118
                    if name in held:
                        raise LanguageModelError(
                            f"{path} holds {name}, and so does {held[name].name}: one of the two is of another model, "
                            "or of an earlier one; copy them anew"
                        )
                    held[name] = path
                    yield name, _tensor(path, file, name)
        except (OSError, SafetensorError) as error:
            raise LanguageModelError(
                f"cannot read {path}: {error}; it is damaged or cut short: copy it anew"
            ) from error


def _tensor(path: Path, file: Any, name: str) -> Any:
    """Read a tensor into NumPy, or into JAX where NumPy does not know its type."""
    try:
        return file.get_tensor(name)
    except (TypeError, AttributeError, KeyError):
        eight = _float8(path, name)
        if eight is not None:
            return eight
        with safe_open(path, framework="flax") as other:
            return other.get_tensor(name)


def _float8(path: Path, name: str) -> np.ndarray | None:
    """Read a tensor of float8, which safetensors reads into neither NumPy nor JAX; None where it is of another type.

    The file was found whole before: its first eight bytes tell how long the header is, and that where the tensor is.
    """
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        told = json.loads(file.read(length))[name]
        dtype = FLOAT8.get(told["dtype"])
        if dtype is None:
            return None
        first, last = told["data_offsets"]
        file.seek(8 + length + first)
        return np.frombuffer(file.read(last - first), dtype).reshape(told["shape"])


def weight_files(folder: Path) -> list[Path]:
    """Find the files of a model's weights."""
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    index = read_json_object(folder / INDEX)
    if index is not None:
        places = index.get("weight_map")
        if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
            raise LanguageModelError(f"{folder / INDEX} has no weight_map; it is damaged: copy it anew")
        # Names only: an index must not lead out of its folder.
        files = [folder / Path(name).name for name in sorted(set(places.values()))]
        lost = [path.name for path in files if not path.is_file()]
        if lost:
            raise LanguageModelError(f"{folder} has no {abbreviate(lost)}, which {INDEX} names; copy them there")
        return files
    pickled = sorted(path.name for pattern in PICKLED for path in folder.glob(pattern))
    if pickled:
        raise LanguageModelError(
            f"{folder} holds only pickled weights ({abbreviate(pickled)}), which could run any code when read; load "
            "the model in transformers and write it anew with model.save_pretrained(folder, safe_serialization=True)"
        )
    raise LanguageModelError(
        f"{folder} has no {WEIGHTS} and no {INDEX}; pass the folder of a saved model (where the hub has only pickled "
        "weights of it, load it in transformers and write it anew with save_pretrained)"
    )


def save_weights(
    folder: Path, arrays: Mapping[str, np.ndarray], *, limit: float = math.inf, whole: str = WEIGHTS
) -> None:
    """Write the arrays into one file or several, then remove the parts of the model that was there before.

    Args:
        folder: which there is.
        arrays: by name.
        limit: of the bytes of a file.
        whole: the name of the file, where one is enough.
    """
    shards: list[dict[str, np.ndarray]] = [{}]
    size = 0
    for name, array in arrays.items():
        if shards[-1] and size + array.nbytes > limit:
            shards.append({})
            size = 0
        shards[-1][name] = array
        size += array.nbytes
    alone = len(shards) == 1
    before = _indexed(folder) if whole == WEIGHTS else set()
    names = [whole if alone else f"model-{n + 1:05}-of-{len(shards):05}.safetensors" for n in range(len(shards))]
    for file, shard in zip(names, shards, strict=True):
        write_file(folder / file, save(shard, metadata={"format": "pt"}))
    if not alone:
        places = {name: file for file, shard in zip(names, shards, strict=True) for name in shard}
        total = sum(array.nbytes for array in arrays.values())
        write_file(folder / INDEX, to_json_bytes({"metadata": {"total_size": total}, "weight_map": places}))
        before |= {WEIGHTS}
    for name in before - set(names) | ({INDEX} if alone and whole == WEIGHTS else set()):
        if (folder / name).is_file() and not (folder / name).is_symlink():
            (folder / name).unlink(missing_ok=True)


def _indexed(folder: Path) -> set[str]:
    """Name the parts of a model that the index of a folder tells of, as this library and transformers name them."""
    try:
        places = (read_json_object(folder / INDEX) or {}).get("weight_map")
    except LanguageModelError:
        return set()
    told = places.values() if isinstance(places, dict) else ()
    return {name for name in told if isinstance(name, str) and PART.fullmatch(name)}


def to_json_bytes(told: Mapping[str, Any]) -> bytes:
    """Write what JSON can hold, as transformers lays it out."""
    return (json.dumps(told, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()


def abbreviate(names: list[str]) -> str:
    """Name the first of several, and how many more there are."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")

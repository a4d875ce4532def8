"""Read the weight files of a folder, one array after another, and write arrays into them."""

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
from bayesrl.lm.tokenization.tokenizer_files import read_json_object
from bayesrl.run_folder import write_file

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
PART = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")
FLOAT8 = {"F8_E4M3": jnp.dtype(jnp.float8_e4m3fn), "F8_E5M2": jnp.dtype(jnp.float8_e5m2)}
PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")


def iterate_arrays(*paths: Path) -> Iterator[tuple[str, Any]]:
    """Read the arrays of files, one after another."""
    files_by_name: dict[str, Path] = {}
    for path in paths:
        try:
            with safe_open(path, framework="numpy") as file:
                for name in file.keys():  # noqa: SIM118
                    if name in files_by_name:
                        raise LanguageModelError(
                            f"{path} holds {name}, and so does {files_by_name[name].name}: one of the two is of "
                            "another model, or of an earlier one; copy them anew"
                        )
                    files_by_name[name] = path
                    yield name, _read_tensor(path, file, name)
        except (OSError, SafetensorError) as error:
            raise LanguageModelError(
                f"cannot read {path}: {error}; it is damaged or cut short: copy it anew"
            ) from error


def _read_tensor(path: Path, file: Any, name: str) -> Any:
    """Read a tensor into NumPy, or into JAX if NumPy does not know its dtype."""
    try:
        return file.get_tensor(name)
    except (TypeError, AttributeError, KeyError):
        eight = _read_float8(path, name)
        if eight is not None:
            return eight
        with safe_open(path, framework="flax") as other:
            return other.get_tensor(name)


def _read_float8(path: Path, name: str) -> np.ndarray | None:
    """Read a float8 tensor, which safetensors reads into neither NumPy nor JAX; None for other dtypes.

    The file is known to be whole: its first eight bytes give the length of the header, which locates the tensor.
    """
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))[name]
        dtype = FLOAT8.get(header["dtype"])
        if dtype is None:
            return None
        first, last = header["data_offsets"]
        file.seek(8 + length + first)
        return np.frombuffer(file.read(last - first), dtype).reshape(header["shape"])


def weight_files(folder: Path) -> list[Path]:
    """Find the files of a model's weights."""
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    index = read_json_object(folder / INDEX)
    if index is not None:
        weight_map = index.get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
            raise LanguageModelError(f"{folder / INDEX} has no weight_map; it is damaged: copy it anew")
        # Names only: an index must not lead out of its folder.
        files = [folder / Path(name).name for name in sorted(set(weight_map.values()))]
        missing = [path.name for path in files if not path.is_file()]
        if missing:
            raise LanguageModelError(f"{folder} has no {abbreviate(missing)}, which {INDEX} names; copy them there")
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
    folder: Path, arrays: Mapping[str, np.ndarray], *, limit: float = math.inf, file_name: str = WEIGHTS
) -> None:
    """Write the arrays into one or several files, then remove the parts of the old model."""
    shards: list[dict[str, np.ndarray]] = [{}]
    size = 0
    for name, array in arrays.items():
        if shards[-1] and size + array.nbytes > limit:
            shards.append({})
            size = 0
        shards[-1][name] = array
        size += array.nbytes
    single = len(shards) == 1
    # Read now: the new index will overwrite the old one.
    stale = _files_in_index(folder) if file_name == WEIGHTS else set()
    names = [file_name if single else f"model-{n + 1:05}-of-{len(shards):05}.safetensors" for n in range(len(shards))]
    for file, shard in zip(names, shards, strict=True):
        write_file(folder / file, save(shard, metadata={"format": "pt"}))
    if not single:
        weight_map = {name: file for file, shard in zip(names, shards, strict=True) for name in shard}
        total = sum(array.nbytes for array in arrays.values())
        write_file(folder / INDEX, to_json_bytes({"metadata": {"total_size": total}, "weight_map": weight_map}))
        stale |= {WEIGHTS}
    for file in stale - set(names) | ({INDEX} if single and file_name == WEIGHTS else set()):
        if (folder / file).is_file() and not (folder / file).is_symlink():
            (folder / file).unlink(missing_ok=True)


def _files_in_index(folder: Path) -> set[str]:
    """Return the parts of a model in a folder's index that have names of this library or of transformers."""
    try:
        weight_map = (read_json_object(folder / INDEX) or {}).get("weight_map")
    except LanguageModelError:
        return set()
    files = weight_map.values() if isinstance(weight_map, dict) else ()
    return {name for name in files if isinstance(name, str) and PART.fullmatch(name)}


def to_json_bytes(value: Mapping[str, Any]) -> bytes:
    """Write JSON in the layout of transformers."""
    return (json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()


def abbreviate(names: list[str]) -> str:
    """Name the first few, and say how many more there are."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")

"""Checkpoints as Hugging Face's transformers writes them: read from a folder or the hub, and written to a folder."""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from bayesrl.arguments import Bytes, Location, checked
from bayesrl.errors import LanguageModelError
from bayesrl.lm.tokenizer import (
    CONFIG,
    GENERATION,
    SPECIAL,
    TEMPLATE,
    TOKENIZER,
    TOKENIZER_CONFIG,
    Tokenizer,
    read_json,
)
from bayesrl.lm.transformers.causal import CausalLM, Transformer
from bayesrl.lm.transformers.families import family_of
from bayesrl.lm.transformers.stored import Stored, refuse
from bayesrl.run_folder import write

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
ADAPTER = "adapter_config.json"
PART = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")
PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")
# What old versions of transformers saved beside the weights: masks and tables that follow from the configuration.
HARMLESS = re.compile(r"(^|\.)(attn\.(masked_)?bias|rotary_emb\.inv_freq|position_ids)$")
HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")


@checked(LanguageModelError)
@dataclass(frozen=True)
class Pretrained:
    """A model that was loaded, with what came along.

    Args:
        model: the model.
        tokenizer: its tokenizer, or None where the folder has no tokenizer.json.
        folder: where it was read; None where it was made here.
        config: config.json, as read: pass it as `keep` to `save_pretrained` to lose none of its settings.
    """

    model: Transformer
    tokenizer: Tokenizer | None
    folder: Path | None = None
    config: Mapping[str, Any] = field(default_factory=dict, repr=False)


@checked(LanguageModelError)
def load_pretrained(source: Location, *, dtype: Any = None, revision: str | None = None) -> Pretrained:
    """Load a model, and its tokenizer, from a folder or from the Hugging Face hub.

    Args:
        source: a folder with config.json and model.safetensors, whole or in shards; or, where there is no such
            folder, the name of a model on the hub, which is fetched once and kept in the hub's own cache. Only
            safetensors files are read, which hold arrays and nothing that could run.
        dtype: of all weights, float32 or bfloat16; None is as stored, and float32 where that is neither.
        revision: branch, tag or commit on the hub.

    Raises:
        LanguageModelError: the folder is missing, or the hub cannot be reached; config.json is missing, names an
            unknown architecture or asks for what is not implemented; tensors are missing, left over, quantised, not
            finite or of the wrong shape; there are only pickled weights, or an adapter; a file is damaged; the
            tokenizer does not fit the model.

    Example:
        >>> import jax, tempfile
        >>> from bayesrl.lm.transformers import GPT2, GPT2Config
        >>> config = GPT2Config(vocab_size=7, max_length=8, width=4, depth=1, heads=2)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_pretrained(folder, GPT2.random(jax.random.key(0), config))
        ...     load_pretrained(folder).model.config == config
        True
    """
    folder = _folder(source, revision)
    if (config := read_json(folder / CONFIG)) is None and (folder / ADAPTER).is_file():
        base = (read_json(folder / ADAPTER) or {}).get("base_model_name_or_path")
        raise LanguageModelError(
            f"{folder} holds an adapter{f' of the model {base!r}' if base else ''} and no model; load both with PEFT, "
            "merge them (merge_and_unload), save what comes out with save_pretrained, and pass that folder"
        )
    if config is None:
        raise LanguageModelError(f"{folder} has no {CONFIG}; pass the folder of a model that transformers saved")
    family = family_of(config)
    refuse(config, "quantization_config")
    shape = family.config.from_json(config)
    skeleton = eqx.filter_eval_shape(family.model.random, jax.random.key(0), shape)
    model = filled(skeleton, _arrays(folder), _dtype(dtype), folder)
    tokenizer = Tokenizer.load(folder) if (folder / TOKENIZER).exists() else None
    if tokenizer is not None:
        check_vocabulary(model, tokenizer)
    return Pretrained(model, tokenizer, folder, config)


def check_vocabulary(model: Transformer, tokenizer: Tokenizer) -> None:
    """Refuse a tokenizer with ids that the model has no row for.

    Raises:
        LanguageModelError: it has some.
    """
    if tokenizer.vocab_size > model.config.vocab_size:
        raise LanguageModelError(
            f"the tokenizer has {tokenizer.vocab_size} tokens and the model a vocabulary of {model.config.vocab_size}; "
            "use the tokenizer that the model was trained with"
        )


def filled(skeleton: Transformer, arrays: Iterator[tuple[str, Any]], dtype: Any, origin: Any) -> Transformer:
    """Put the arrays of a checkpoint into their places.

    Args:
        skeleton: a model whose leaves tell shapes.
        arrays: the names and values of the checkpoint, in any order.
        dtype: of the model; None is as stored.
        origin: where they come from, for messages.

    Raises:
        LanguageModelError: arrays are missing, left over, not finite or of the wrong shape.
    """
    wanted = {stored.name: stored for stored in skeleton.tensors(skeleton.config)}
    paths, treedef = jax.tree_util.tree_flatten_with_path(skeleton)
    shapes = {jax.tree_util.keystr(path): leaf.shape for path, leaf in paths}
    found: dict[str, Any] = {}
    extra = []
    for given, array in arrays:
        name = _canonical(given, wanted)
        if name is not None:
            found[wanted[name].path] = _fitted(array, given, wanted[name], shapes[wanted[name].path], origin)
        elif not HARMLESS.search(given) and given != "lm_head.weight":
            extra.append(given)
    missing = [name for name, stored in wanted.items() if stored.path not in found]
    if missing or extra:
        told = [f"has no {_some(missing)}"] * bool(missing) + [f"has {_some(extra)} too many"] * bool(extra)
        raise LanguageModelError(
            f"{origin} {' and '.join(told)} for a {skeleton.config.model_type} model "
            f"({type(skeleton).__name__}); is it a checkpoint of another class, or does config.json belong to another?"
        )
    dtype = dtype or _common(found.values())
    return jax.tree.unflatten(treedef, jax.device_put([_of_dtype(found[name], dtype) for name in shapes]))


def _of_dtype(array: Any, dtype: Any) -> np.ndarray:
    return np.ascontiguousarray(np.asarray(array).astype(dtype))


def _canonical(given: str, wanted: Mapping[str, Stored]) -> str | None:
    """Find what a tensor is called today; base models have no prefix, and old files other names for norms."""
    prefix = next(iter(wanted)).split(".")[0] + "."
    name = re.sub(r"LayerNorm\.gamma$", "LayerNorm.weight", re.sub(r"LayerNorm\.beta$", "LayerNorm.bias", given))
    return next((known for known in (name, prefix + name) if known in wanted), None)


def _fitted(array: Any, given: str, stored: Stored, shape: tuple[int, ...], origin: Any) -> Any:
    held = tuple(reversed(shape)) if stored.transposed else shape
    if array.shape != held:
        raise LanguageModelError(
            f"{origin} holds {given} of shape {list(array.shape)}, and config.json asks for {list(held)}; "
            "one of the two belongs to another model"
        )
    if not jnp.issubdtype(array.dtype, jnp.floating) or array.dtype.itemsize < 2:
        raise LanguageModelError(
            f"{origin} holds {given} as {array.dtype}; quantised weights are not read: load the model in transformers, "
            "dequantise it there, and save it anew"
        )
    lost = int(array.size - np.isfinite(np.asarray(array)).sum())
    if lost:
        raise LanguageModelError(
            f"{origin} holds {given} with {lost:,} of {array.size:,} numbers nan or infinite, and texts would be "
            f"impossible; make the weights anew, in float32 where {array.dtype} is too small for them"
        )
    return array.T if stored.transposed else array


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _common(arrays: Any) -> Any:
    """Give the dtype that all arrays can be held in: bfloat16 where all are, else float32 at least."""
    dtypes = {array.dtype for array in arrays}
    return jnp.bfloat16 if dtypes == {jnp.dtype(jnp.bfloat16)} else jnp.result_type(jnp.float32, *dtypes)


def _dtype(dtype: Any) -> Any:
    if dtype is None:
        return None
    try:
        known = jnp.dtype(dtype)
    except TypeError:
        known = None
    if known not in (jnp.dtype(jnp.float32), jnp.dtype(jnp.bfloat16)):
        raise LanguageModelError(f"load_pretrained got dtype={dtype!r}; use jnp.float32, jnp.bfloat16 or None")
    return known


def _arrays(folder: Path) -> Iterator[tuple[str, Any]]:
    """Read the tensors of a folder, one after another."""
    for path in _files(folder):
        try:
            with safe_open(path, framework="numpy") as file:
                for name in file.keys():  # noqa: SIM118
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
        with safe_open(path, framework="flax") as other:
            return other.get_tensor(name)


def _files(folder: Path) -> list[Path]:
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    index = read_json(folder / INDEX)
    if index is not None:
        places = index.get("weight_map")
        if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
            raise LanguageModelError(f"{folder / INDEX} has no weight_map; it is damaged: copy it anew")
        # Names only: an index must not lead out of its folder.
        files = [folder / Path(name).name for name in sorted(set(places.values()))]
        lost = [path.name for path in files if not path.is_file()]
        if lost:
            raise LanguageModelError(f"{folder} has no {_some(lost)}, which {INDEX} names; copy them there")
        return files
    pickled = sorted(path.name for pattern in PICKLED for path in folder.glob(pattern))
    if pickled:
        raise LanguageModelError(
            f"{folder} holds only pickled weights ({_some(pickled)}), which could run any code when read; load the "
            "model in transformers and write it anew with model.save_pretrained(folder, safe_serialization=True)"
        )
    raise LanguageModelError(
        f"{folder} has no {WEIGHTS} and no {INDEX}; pass the folder of a saved model (where the hub has only pickled "
        "weights of it, load it in transformers and write it anew with save_pretrained)"
    )


def _folder(source: str | Path, revision: str | None) -> Path:
    """Find the folder of a model, fetching it from the hub where there is none here."""
    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder
    if isinstance(source, Path) or not HUB_NAME.fullmatch(source) or source.startswith("."):
        raise LanguageModelError(f"there is no folder {folder}; pass the folder of a saved model, or a name on the hub")
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise LanguageModelError(
            f"there is no folder {source!r} here, and to fetch it from the Hugging Face hub a library is needed that "
            "is not installed; install bayesrl with its extra: pip install 'bayesrl[lm]'"
        ) from error
    wanted = [CONFIG, GENERATION, TOKENIZER, TOKENIZER_CONFIG, SPECIAL, TEMPLATE, "model*.safetensors", INDEX]
    try:
        return Path(snapshot_download(source, revision=revision, allow_patterns=wanted))
    except (OSError, ValueError) as error:
        reason = str(error).strip().split("\n")[0]
        raise LanguageModelError(
            f"there is no folder {source!r} here, and it could not be fetched from the Hugging Face hub "
            f"({type(error).__name__}: {reason}); check the name and the network, or copy the model's config.json, "
            "*.safetensors and tokenizer*.json into a folder by other means and pass that"
        ) from error


@checked(LanguageModelError)
def save_pretrained(
    folder: Location,
    model: Transformer,
    tokenizer: Tokenizer | None = None,
    *,
    keep: Mapping[str, Any] | None = None,
    max_shard_bytes: Bytes = 5_000_000_000,
) -> None:
    """Write a model, and its tokenizer, as transformers and `load_pretrained` read them.

    Weights that the folder held before under the names of transformers are replaced, and parts that an index of before
    names are removed; other files are left alone. Arrays are written bit by bit as they are.

    Args:
        folder: made where there is none.
        model: without low-rank paths: pass `merged(model)`.
        tokenizer: what to write beside it.
        keep: further settings for config.json, such as `Pretrained.config`; those of the model come first.
        max_shard_bytes: weights beyond so many bytes go into several files.

    Raises:
        LanguageModelError: the model has low-rank paths; the tokenizer does not fit it; the folder cannot be made.
        RunFolderError: a file cannot be written; what it held before is intact.

    Example:
        >>> import jax, tempfile
        >>> from bayesrl.lm.transformers import GPT2, GPT2Config
        >>> config = GPT2Config(vocab_size=7, max_length=8, width=4, depth=1, heads=2)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_pretrained(folder, GPT2.random(jax.random.key(0), config))
        ...     sorted(path.name for path in Path(folder).iterdir())
        ['config.json', 'model.safetensors']
    """
    arrays = _named(model)
    if tokenizer is not None:
        check_vocabulary(model, tokenizer)
    try:
        (path := Path(folder)).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise LanguageModelError(f"cannot make the folder {path}: {error.strerror}; choose another") from error
    special: dict[str, Any] = {f"{name}_token_id": i for name, i in (tokenizer.special if tokenizer else {}).items()}
    if tokenizer is not None and len(tokenizer.ends) > 1:
        special["eos_token_id"] = list(tokenizer.ends)
    dtype = str(next(iter(arrays.values())).dtype)
    _save_weights(path, arrays, max_shard_bytes)
    write(path / CONFIG, _json({**_settings(model, keep or {}), **special, "torch_dtype": dtype}))
    if tokenizer is not None:
        tokenizer.save(path)
        if isinstance(model, CausalLM):
            write(path / GENERATION, _json({**tokenizer.generation, **special}))


def _settings(model: Transformer, keep: Mapping[str, Any]) -> dict[str, Any]:
    """Give what config.json says of a model: its shape, over what is kept."""
    # "dtype" is what new versions of transformers call torch_dtype, and a stale one would win.
    kept = {name: value for name, value in keep.items() if name != "dtype"}
    # Where nobody says which they are, transformers would put ids of other vocabularies.
    unknown = {"bos_token_id": None, "eos_token_id": None} if isinstance(model, CausalLM) else {}
    return {**unknown, **kept, **model.config.to_json()}


def _json(told: Mapping[str, Any]) -> bytes:
    return (json.dumps(told, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()


def _named(model: Transformer) -> dict[str, np.ndarray]:
    """Give the arrays of a model by their names in a checkpoint.

    Raises:
        LanguageModelError: the model has arrays that a checkpoint has no place for.
    """
    leaves = {
        jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in jax.tree_util.tree_flatten_with_path(model)[0]
    }
    places = list(model.tensors(model.config))
    strangers = [path for path in leaves if path not in {stored.path for stored in places}]
    if strangers:
        raise LanguageModelError(
            f"the model has {_some(strangers)}, which a checkpoint of a {model.config.model_type} model has no place "
            "for; pass bayesrl.lm.transformers.merged(model), which adds low-rank paths to the weights"
        )
    arrays = {stored.name: leaves[stored.path].T if stored.transposed else leaves[stored.path] for stored in places}
    return {name: np.ascontiguousarray(array) for name, array in arrays.items()}


def _save_weights(folder: Path, arrays: Mapping[str, np.ndarray], limit: int) -> None:
    """Write the arrays into one file or several, then remove the parts of the model that was there before."""
    shards: list[dict[str, np.ndarray]] = [{}]
    size = 0
    for name, array in arrays.items():
        if shards[-1] and size + array.nbytes > limit:
            shards.append({})
            size = 0
        shards[-1][name] = array
        size += array.nbytes
    whole = len(shards) == 1
    before = _indexed(folder)
    names = [WEIGHTS if whole else f"model-{n + 1:05}-of-{len(shards):05}.safetensors" for n in range(len(shards))]
    for file, shard in zip(names, shards, strict=True):
        write(folder / file, save(shard, metadata={"format": "pt"}))
    if not whole:
        places = {name: file for file, shard in zip(names, shards, strict=True) for name in shard}
        total = sum(array.nbytes for array in arrays.values())
        write(folder / INDEX, _json({"metadata": {"total_size": total}, "weight_map": places}))
        before |= {WEIGHTS}
    for name in before - set(names) | ({INDEX} if whole else set()):
        if (folder / name).is_file() and not (folder / name).is_symlink():
            (folder / name).unlink(missing_ok=True)


def _indexed(folder: Path) -> set[str]:
    """Name the parts of a model that the index of a folder tells of, as this library and transformers name them."""
    try:
        places = (read_json(folder / INDEX) or {}).get("weight_map")
    except LanguageModelError:
        return set()
    told = places.values() if isinstance(places, dict) else ()
    return {name for name in told if isinstance(name, str) and PART.fullmatch(name)}

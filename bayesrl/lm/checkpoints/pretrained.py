"""Read checkpoints of Hugging Face's transformers from a folder or the hub, and write them to a folder."""

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp

from bayesrl.arguments import Bytes, Location, checked
from bayesrl.errors import LanguageModelError
from bayesrl.lm.adapters import ADAPTER, ADAPTER_WEIGHTS, apply_adapter, extract_adapter
from bayesrl.lm.checkpoints.model_arrays import fill_model, named_arrays
from bayesrl.lm.checkpoints.quantized import SETTING, check_quantization, dequantize
from bayesrl.lm.checkpoints.weights import INDEX, WEIGHTS, iterate_arrays, save_weights, to_json_bytes, weight_files
from bayesrl.lm.tokenization.tokenizer import Tokenizer
from bayesrl.lm.tokenization.tokenizer_files import (
    CHECKPOINT_FILES,
    CONFIG,
    GENERATION,
    TOKENIZER,
    read_json_object,
)
from bayesrl.lm.transformers.base import CausalLM, Config, Transformer, WeightType
from bayesrl.lm.transformers.layers.linear_and_norm import merge_adapters
from bayesrl.lm.transformers.registry import find_family
from bayesrl.run_folder import write_file
from bayesrl.value_checks import format_value

HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")


@checked(LanguageModelError)
@dataclass(frozen=True)
class Pretrained:
    """A loaded model with its tokenizer and settings.

    Args:
        model: the model.
        tokenizer: its tokenizer, or None if the folder has no tokenizer.json.
        folder: where it was read from; None if it was made here.
        config: config.json, as read; `save_pretrained` also writes the settings that the model does not use.
        adapter: adapter_config.json, if the model has the low-rank paths of an adapter beside its weights.
        generation: generation_config.json, as read.

    Example:
        >>> import jax
        >>> from bayesrl.lm import GPT2, GPT2Config, char_tokenizer
        >>> config = GPT2Config(vocab_size=6, max_length=8, width=4, depth=1, heads=2)
        >>> Pretrained(GPT2.init(jax.random.key(0), config), char_tokenizer("abc")).tokenizer.eos
        1
    """

    GIVEN_BY: ClassVar[str] = "as lm.load_pretrained gives it"

    model: Transformer
    tokenizer: Tokenizer | None
    folder: Path | None = None
    config: Mapping[str, Any] = field(default_factory=dict, repr=False)
    adapter: Mapping[str, Any] = field(default_factory=dict, repr=False)
    generation: Mapping[str, Any] = field(default_factory=dict, repr=False)


@checked(LanguageModelError)
def load_pretrained(
    source: Location,
    *,
    dtype: WeightType | None = None,
    revision: str | None = None,
    base: Pretrained | Location | None = None,
    merge: bool = True,
) -> Pretrained:
    """Load a model, and its tokenizer, from a folder or from the Hugging Face hub.

    Args:
        source: a folder with config.json and model.safetensors, whole or in shards, or with an adapter that PEFT saved.
            If no such folder exists, the name of a model on the hub, which is fetched once into the hub's own cache.
        dtype: of all weights, float32 or bfloat16. None means as stored, or float32 for other types: float16, and
            float8 with scales, which is reported.
        revision: branch, tag or commit on the hub.
        base: for an adapter, the model that it was trained with; None means the one that it names.
        merge: whether to add an adapter to the weights, or leave it as low-rank paths beside them.

    Raises:
        LanguageModelError: the folder is missing, or the hub cannot be reached; config.json is missing, names an
            unknown architecture or asks for what is not implemented; tensors are missing, left over, quantized, not
            finite or of the wrong shape; there are only pickled weights; a file is damaged; an adapter does not
            fit its base, or that cannot be found; the tokenizer does not fit the model.

    Example:
        >>> import jax, tempfile
        >>> from bayesrl.lm import GPT2, GPT2Config
        >>> config = GPT2Config(vocab_size=7, max_length=8, width=4, depth=1, heads=2)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_pretrained(folder, GPT2.init(jax.random.key(0), config))
        ...     load_pretrained(folder).model.config == config
        True
    """
    if dtype is not None and jnp.dtype(dtype) not in (jnp.float32, jnp.bfloat16):
        raise LanguageModelError(
            f"load_pretrained got dtype={dtype!r}; use a type of weights: jnp.float32 or jnp.bfloat16, or None"
        )
    folder = _find_folder(source, revision)
    config = read_json_object(folder / CONFIG)
    if (folder / ADAPTER).is_file() and (
        config is None or not any((folder / name).is_file() for name in (WEIGHTS, INDEX))
    ):
        return _load_with_adapter(folder, base, dtype, merge)
    if base is not None:
        raise LanguageModelError(f"{folder} holds no adapter, and needs no base=; leave it out")
    if config is None:
        raise LanguageModelError(f"{folder} has no {CONFIG}; pass the folder of a model that transformers saved")
    family = find_family(config)
    check_quantization(config)
    shape = family.config.from_json(config)
    # Shapes alone: weights drawn at random would only be thrown away.
    skeleton = eqx.filter_eval_shape(family.model.init, jax.random.key(0), shape)
    arrays = dequantize(iterate_arrays(*weight_files(folder)), config, folder)
    model = fill_model(skeleton, arrays, dtype, folder)
    tokenizer = Tokenizer.load(folder) if (folder / TOKENIZER).exists() else None
    check_vocabulary(model, tokenizer)
    # The weights are plain floats by now, and what is saved must not say otherwise.
    config = {name: value for name, value in config.items() if name != SETTING}
    return Pretrained(model, tokenizer, folder, config, generation=read_json_object(folder / GENERATION) or {})


def _load_with_adapter(folder: Path, base: Any, dtype: Any, merge: bool) -> Pretrained:
    """Load an adapter, and the model that it was trained with."""
    adapter = read_json_object(folder / ADAPTER) or {}
    base_name = adapter.get("base_model_name_or_path")
    if base is None and not base_name:
        raise LanguageModelError(
            f"{folder} holds an adapter and no model, and does not name the one that it was trained beside; pass that "
            "as base="
        )
    try:
        base_model = base if isinstance(base, Pretrained) else load_pretrained(base or str(base_name), dtype=dtype)
    except LanguageModelError as error:
        raise LanguageModelError(
            f"{folder} holds an adapter of the model {base or base_name!r} and no model, and that one cannot be "
            f"loaded: {error}; pass its folder as base="
        ) from error
    model = apply_adapter(base_model.model, adapter, iterate_arrays(folder / ADAPTER_WEIGHTS), folder)
    tokenizer = Tokenizer.load(folder) if (folder / TOKENIZER).exists() else base_model.tokenizer
    check_vocabulary(model, tokenizer)
    base_model = dataclasses.replace(base_model, tokenizer=tokenizer)
    if merge:
        return dataclasses.replace(base_model, model=merge_adapters(model))
    return dataclasses.replace(base_model, model=model, adapter=adapter)


@checked(LanguageModelError)
def save_adapter(folder: Location, tuned: Pretrained, *, base: Location | None = None) -> None:
    """Write the low-rank paths of a model, without its weights, in the format of PEFT and `load_pretrained`.

    Args:
        folder: created if it does not exist.
        tuned: with low-rank paths: `finetuned(posterior, merge=False)`, or an adapter loaded with `merge=False`.
        base: the folder or name of the base model, for adapter_config.json; None means the folder that it was read
            from, if any.

    Raises:
        LanguageModelError: the model has no low-rank paths; the folder cannot be made.
        RunFolderError: a file cannot be written; its old content is intact.

    Example:
        >>> import jax, tempfile
        >>> from bayesrl.lm import GPT2, GPT2Config
        >>> from bayesrl.lm.transformers.layers.linear_and_norm import Linear
        >>> model = GPT2.init(jax.random.key(0), GPT2Config(vocab_size=4, max_length=4, width=8, depth=1, heads=2))
        >>> weight, bias = model.blocks[0].output.weight, model.blocks[0].output.bias
        >>> with_path = Linear(weight, bias, down=weight[:1], up=0 * weight[:, :1])
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     tuned = eqx.tree_at(lambda model: model.blocks[0].output, model, with_path)
        ...     save_adapter(folder, Pretrained(tuned, None))
        ...     sorted(path.name for path in Path(folder).iterdir())
        ['adapter_config.json', 'adapter_model.safetensors']

    References:
        Hu et al. (2022), "LoRA: low-rank adaptation of large language models", equation 3.
    """
    named = base if base is not None else tuned.folder
    config, arrays = extract_adapter(tuned.model, tuned.adapter, None if named is None else str(named))
    path = _make_folder(folder)
    save_weights(path, arrays, file_name=ADAPTER_WEIGHTS)
    write_file(path / ADAPTER, to_json_bytes(config))
    if tuned.tokenizer is not None:
        tuned.tokenizer.save(path)


def unwrap(
    model: Transformer | Pretrained, tokenizer: Tokenizer | None
) -> tuple[Transformer, Tokenizer | None, Pretrained | None]:
    """Return a model, its tokenizer and the `Pretrained` it came in; `tokenizer` is for a model that brings none."""
    source = model if isinstance(model, Pretrained) else None
    bare, own = (model.model, model.tokenizer) if isinstance(model, Pretrained) else (model, None)
    if tokenizer is not None and own is not None and tokenizer.digest != own.digest:
        raise LanguageModelError(
            f"tokenizer= encodes texts differently (fingerprint {tokenizer.digest}) from that of the model "
            f"({own.digest}); leave it out"
        )
    tokenizer = tokenizer if own is None else own
    check_vocabulary(bare, tokenizer)
    return bare, tokenizer, source


def check_vocabulary(model: Transformer, tokenizer: Tokenizer | None) -> None:
    """Refuse a tokenizer with ids that the model has no row for."""
    if tokenizer is not None and tokenizer.vocab_size > model.config.vocab_size:
        raise LanguageModelError(
            f"the tokenizer has {tokenizer.vocab_size} tokens and the model knows {model.config.vocab_size}; use the "
            "tokenizer that the model was trained with, or make the model with the tokenizer's vocab_size"
        )


def _find_folder(source: str | Path, revision: str | None) -> Path:
    """Find the folder of a model, or fetch it from the hub."""
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
    # Named one by one, so that pickles and weights for other libraries stay on the hub.
    wanted = [ADAPTER, ADAPTER_WEIGHTS, "model*.safetensors", INDEX, *CHECKPOINT_FILES]
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
    model: Transformer | Pretrained,
    tokenizer: Tokenizer | None = None,
    *,
    keep: Mapping[str, Any] | None = None,
    max_shard_bytes: Bytes = 5_000_000_000,
) -> None:
    """Write a model, and its tokenizer, in the format of transformers and `load_pretrained`.

    It replaces old weights in the folder under the names of transformers, and removes the parts that an old index
    names; it leaves other files alone. Arrays keep every bit.

    Args:
        folder: created if it does not exist.
        model: without low-rank paths. A result of `load_pretrained` or `finetuned` is written with its tokenizer, chat
            template and settings.
        tokenizer: the tokenizer to write, if the model brings none.
        keep: further settings for config.json, by default those that the model brings; its own come first.
        max_shard_bytes: the largest size of a weight file; larger models go into several files.

    Raises:
        LanguageModelError: the model has low-rank paths; the tokenizer does not fit it; the folder cannot be made.
        RunFolderError: a file cannot be written; its old content is intact.

    Example:
        >>> import jax, tempfile
        >>> from bayesrl.lm import GPT2, GPT2Config
        >>> config = GPT2Config(vocab_size=7, max_length=8, width=4, depth=1, heads=2)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_pretrained(folder, GPT2.init(jax.random.key(0), config))
        ...     sorted(path.name for path in Path(folder).iterdir())
        ['config.json', 'model.safetensors']
    """
    generation: Mapping[str, Any] = tokenizer.generation if tokenizer is not None else {}
    if isinstance(model, Pretrained):
        tokenizer, keep = tokenizer or model.tokenizer, model.config if keep is None else keep
        generation = generation or model.generation
        model = model.model
    arrays = named_arrays(model)
    check_vocabulary(model, tokenizer)
    path = _make_folder(folder)
    special: dict[str, Any] = {f"{name}_token_id": i for name, i in (tokenizer.special if tokenizer else {}).items()}
    if tokenizer is not None and len(tokenizer.eos_ids) > 1:
        special["eos_token_id"] = list(tokenizer.eos_ids)
    dtype = str(next(iter(arrays.values())).dtype)
    save_weights(path, arrays, limit=max_shard_bytes)
    write_file(path / CONFIG, to_json_bytes({**_config_json(model, keep or {}), **special, "torch_dtype": dtype}))
    if tokenizer is not None:
        tokenizer.save(path)
    if isinstance(model, CausalLM) and (generation or tokenizer is not None):
        # These keep even ids that the tokenizer does not know, which `eos_ids` leaves out.
        ends = {name: ids for name, ids in generation.items() if name == "eos_token_id" and ids is not None}
        write_file(path / GENERATION, to_json_bytes({**generation, **special, **ends}))


def _make_folder(folder: str | Path) -> Path:
    path = Path(folder)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise LanguageModelError(f"cannot make the folder {path}: {error.strerror}; choose another") from error
    return path


def _check_shape(config: Config) -> None:
    """Refuse a shape that its family's config.json cannot express, because loading it would make another model."""
    reread = type(config).from_json(config.to_json())
    for part in dataclasses.fields(config):  # type: ignore[arg-type]  # every subclass is a dataclass
        own, read = getattr(config, part.name), getattr(reread, part.name)
        if own != read:
            raise LanguageModelError(
                f"config.json of a {config.model_type!r} model cannot say {part.name}={format_value(own)}, "
                f"and would be read as {format_value(read)}; use another model_type, or leave it out"
            )


def _config_json(model: Transformer, keep: Mapping[str, Any]) -> dict[str, Any]:
    """Return a model's config.json: its shape, and the further settings to keep."""
    # New versions of transformers read "dtype" instead of torch_dtype, so a stale one would win.
    others = {name: value for name, value in keep.items() if name != "dtype"}
    _check_shape(model.config)
    # Without these, transformers would fill in ids of other vocabularies.
    unknown = {"bos_token_id": None, "eos_token_id": None} if isinstance(model, CausalLM) else {}
    return {**unknown, **others, **model.config.to_json()}

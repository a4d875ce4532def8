"""How a model's arrays are called in a checkpoint, and how its configuration is read."""

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from bayesrl.annotations import Requirement
from bayesrl.errors import LanguageModelError


def _is_dtype(value: Any) -> bool:
    try:
        if value is not None and not isinstance(value, str | type | np.dtype):
            return False
        return value is None or jnp.issubdtype(jnp.dtype(value), jnp.floating)
    except (TypeError, ValueError, UnicodeError):
        return False


type DtypeOrNone = Annotated[Any, Requirement("jnp.float32, jnp.bfloat16 or None", _is_dtype, alone=True)]
"""The type of all weights of a model, or None for that of the file."""


class CheckpointTensor(NamedTuple):
    """One array: its name in a checkpoint and its place in the model.

    Args:
        name: the name of the tensor, as Hugging Face's transformers writes it.
        path: the place, as `jax.tree_util.keystr` writes it: `.layers[0].attention.output.weight`.
        transposed: whether the checkpoint holds [in, out] where the model holds [out, in].
    """

    name: str
    path: str
    transposed: bool = False


def affine(name: str, path: str, *, bias: bool = True, transposed: bool = False) -> Iterator[CheckpointTensor]:
    """List the weight, and the bias where there is one, of a linear map or a norm."""
    yield CheckpointTensor(f"{name}.weight", f"{path}.weight", transposed)
    if bias:
        yield CheckpointTensor(f"{name}.bias", f"{path}.bias")


def required(json: Mapping[str, Any], key: str) -> Any:
    """Read a setting that has no default."""
    value = json.get(key)
    if value is None:
        raise LanguageModelError(
            f"config.json of a {json.get('model_type')!r} model has no {key!r}; it is damaged, or of an old format: "
            "load the model in transformers and save it anew with save_pretrained"
        )
    return value


def optional(json: Mapping[str, Any], key: str, default: Any) -> Any:
    """Read a setting; null, as transformers writes it, is as good as none."""
    value = json.get(key)
    return default if value is None else value


def consistent(json: Mapping[str, Any], key: str, other: str, default: Any) -> Any:
    """Read a setting that has two names, of which versions of transformers read one or the other."""
    value = optional(json, key, default)
    if optional(json, other, value) != value:
        raise LanguageModelError(
            f"config.json of a {json.get('model_type')!r} model sets {other}={json[other]!r} where {key} is {value!r}, "
            "and versions of transformers read the one or the other; set both to what the model was trained with"
        )
    return value


def refuse(json: Mapping[str, Any], key: str, *accepted: Any) -> None:
    """Refuse a setting that would change what the model computes and is not implemented."""
    value = json.get(key)
    if value is not None and value not in accepted:
        raise LanguageModelError(
            f"config.json of a {json.get('model_type')!r} model sets {key}={value!r}, which bayesrl does not implement "
            f"(it reads {' or '.join(map(repr, accepted)) or 'models without it'}); choose another model"
        )

"""From the arrays of a checkpoint to a model, and back."""

import dataclasses
import logging
import re
from collections.abc import Iterator, Mapping
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from bayesrl.errors import LanguageModelError
from bayesrl.lm.checkpoints.weights import abbreviate
from bayesrl.lm.transformers.base import CausalLM, Transformer
from bayesrl.lm.transformers.checkpoint_names import CheckpointTensor

# What old versions of transformers saved beside the weights: masks and tables that follow from the configuration; and
# a layer that RoBERTa's classifiers do not use.
HARMLESS = re.compile(r"(^|\.)(attn\.(masked_)?bias|attention\.(masked_)?bias|rotary_emb\.inv_freq|position_ids)$")
UNUSED = re.compile(r"^(xlm-)?roberta\.pooler\.")
HEADS = ("lm_head.weight", "embed_out.weight")

_log = logging.getLogger(__name__)


def fill_model(skeleton: Transformer, arrays: Iterator[tuple[str, Any]], dtype: Any, origin: Any) -> Transformer:
    """Put the arrays of a checkpoint into their places.

    Args:
        skeleton: a model whose leaves tell shapes.
        arrays: the names and values of the checkpoint, in any order.
        dtype: of the model; None is as stored.
        origin: where they come from, for messages.

    Where the head is tied, a table under either name is that of both; two tables that differ are both kept, and the
    head is not tied, as transformers 5 has it.
    """
    wanted, shapes = _places(skeleton)
    found: dict[str, Any] = {}
    extra, heads, halves = [], {}, False
    for given, array in arrays:
        halves |= array.dtype == np.float16
        name = _canonical(given, wanted)
        if name is not None:
            found[wanted[name].path] = _fitted(array, given, wanted[name], shapes[wanted[name].path], origin)
        elif given in HEADS:
            heads[given] = array
        elif not (HARMLESS.search(given) or UNUSED.search(given)):
            extra.append(given)
    if heads and isinstance(skeleton, CausalLM):
        skeleton, wanted, shapes = _with_head(skeleton, wanted, shapes, found, heads, origin)
    missing = [name for name, stored in wanted.items() if stored.path not in found]
    if missing or extra:
        told = [f"has no {abbreviate(missing)}"] * bool(missing) + [f"has {abbreviate(extra)} too many"] * bool(extra)
        raise LanguageModelError(
            f"{origin} {' and '.join(told)} for a {skeleton.config.model_type} model "
            f"({type(skeleton).__name__}); is it a checkpoint of another class, or does config.json belong to another?"
        )
    if halves and dtype is None:
        _log.warning(
            "%s holds float16, which is held as float32 in twice the memory; dtype=jnp.bfloat16 would not take more, "
            "and round it",
            origin,
        )
    dtype = dtype or _common(found.values())
    treedef = jax.tree.structure(skeleton)
    return jax.tree.unflatten(treedef, jax.device_put([_of_dtype(found[name], dtype) for name in shapes]))


def _places(skeleton: Transformer) -> tuple[dict[str, CheckpointTensor], dict[str, tuple[int, ...]]]:
    """Give what a model wants by its name in a checkpoint, and the shapes of its leaves by their places."""
    wanted = {stored.name: stored for stored in skeleton.tensors(skeleton.config)}
    paths = jax.tree_util.tree_flatten_with_path(skeleton)[0]
    return wanted, {jax.tree_util.keystr(path): leaf.shape for path, leaf in paths}


def _with_head(
    skeleton: Transformer,
    wanted: dict[str, CheckpointTensor],
    shapes: dict[str, tuple[int, ...]],
    found: dict[str, Any],
    heads: Mapping[str, Any],
    origin: Any,
) -> tuple[Transformer, dict[str, CheckpointTensor], dict[str, tuple[int, ...]]]:
    """Take the head of a checkpoint whose head is to be tied for the table, or untie it where it is another."""
    name, head = next(iter(heads.items()))
    at = ".token.weight"
    table = next(stored for stored in wanted.values() if stored.path == at)
    head = _fitted(head, name, table, shapes[at], origin)
    if at not in found:
        found[at] = head
    elif not np.array_equal(np.asarray(found[at]), np.asarray(head)):
        _log.warning(
            "config.json of %s ties the head to the table of tokens, and the weights hold another %s; it is not tied",
            origin,
            name,
        )
        config: Any = dataclasses.replace(skeleton.config, tied=False)  # type: ignore[type-var]  # every config is one
        skeleton = eqx.filter_eval_shape(type(skeleton).init, jax.random.key(0), config)
        found[".head.weight"] = head
        return skeleton, *_places(skeleton)
    return skeleton, wanted, shapes


def _of_dtype(array: Any, dtype: Any) -> np.ndarray:
    return np.ascontiguousarray(np.asarray(array).astype(dtype))


def _canonical(given: str, wanted: Mapping[str, CheckpointTensor]) -> str | None:
    """Find what a tensor is called today; base models have no prefix, and old files other names for norms."""
    prefix = next(iter(wanted)).split(".")[0] + "."
    name = re.sub(r"LayerNorm\.gamma$", "LayerNorm.weight", re.sub(r"LayerNorm\.beta$", "LayerNorm.bias", given))
    return next((known for known in (name, prefix + name) if known in wanted), None)


def _fitted(array: Any, given: str, stored: CheckpointTensor, shape: tuple[int, ...], origin: Any) -> Any:
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


def _common(arrays: Any) -> Any:
    """Give the dtype that all arrays can be held in: bfloat16 where all are, else float32 at least."""
    dtypes = {array.dtype for array in arrays}
    return jnp.bfloat16 if dtypes == {jnp.dtype(jnp.bfloat16)} else jnp.result_type(jnp.float32, *dtypes)


def named_arrays(model: Transformer) -> dict[str, np.ndarray]:
    """Give the arrays of a model by their names in a checkpoint."""
    leaves = {
        jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in jax.tree_util.tree_flatten_with_path(model)[0]
    }
    places = list(model.tensors(model.config))
    strangers = [path for path in leaves if path not in {stored.path for stored in places}]
    if strangers:
        raise LanguageModelError(
            f"the model has {abbreviate(strangers)}, which a checkpoint of a {model.config.model_type} model has no "
            "place for; pass a model whose low-rank paths are merged: lm.finetuned(posterior), load_pretrained(..., "
            "merge=True), or write them by lm.save_adapter"
        )
    arrays = {stored.name: leaves[stored.path].T if stored.transposed else leaves[stored.path] for stored in places}
    odd = [f"{name} ({array.dtype})" for name, array in arrays.items() if not jnp.issubdtype(array.dtype, jnp.floating)]
    if odd:
        raise LanguageModelError(
            f"the model has {abbreviate(odd)}, and weights are floats; make them anew, say in float32"
        )
    return {name: np.ascontiguousarray(array) for name, array in arrays.items()}

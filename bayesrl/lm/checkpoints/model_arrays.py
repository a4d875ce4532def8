"""Convert the arrays of a checkpoint to a model, and back."""

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
    """Put the arrays of a checkpoint, in any order, into their places in a model of shapes; dtype None is as stored.

    If the head is tied, a table under either name serves both. If the two tables differ, both stay and the head is not
    tied, as in transformers 5.
    """
    expected, shapes = _expected_tensors(skeleton)
    by_path: dict[str, Any] = {}
    extra, heads, has_float16 = [], {}, False
    for key, array in arrays:
        has_float16 |= array.dtype == np.float16
        name = _canonical_name(key, expected)
        if name is not None:
            path = expected[name].path
            by_path[path] = _checked_array(array, key, expected[name], shapes[path], origin)
        elif key in HEADS:
            heads[key] = array
        elif not (HARMLESS.search(key) or UNUSED.search(key)):
            extra.append(key)
    if heads and isinstance(skeleton, CausalLM):
        skeleton, expected, shapes = _tie_or_untie_head(skeleton, expected, shapes, by_path, heads, origin)
    missing = [name for name, tensor in expected.items() if tensor.path not in by_path]
    if missing or extra:
        faults = [f"has no {abbreviate(missing)}"] * bool(missing) + [f"has {abbreviate(extra)} too many"] * bool(extra)
        raise LanguageModelError(
            f"{origin} {' and '.join(faults)} for a {skeleton.config.model_type} model "
            f"({type(skeleton).__name__}); is it a checkpoint of another class, or does config.json belong to another?"
        )
    if has_float16 and dtype is None:
        _log.warning(
            "%s holds float16, which is held as float32 in twice the memory; dtype=jnp.bfloat16 would not take more, "
            "and round it",
            origin,
        )
    dtype = dtype or _common_dtype(by_path.values())
    treedef = jax.tree.structure(skeleton)
    # Cast in NumPy, because JAX would compile a cast for each shape.
    ordered = [np.ascontiguousarray(np.asarray(by_path[path]).astype(dtype)) for path in shapes]
    return jax.tree.unflatten(treedef, jax.device_put(ordered))


def _expected_tensors(skeleton: Transformer) -> tuple[dict[str, CheckpointTensor], dict[str, tuple[int, ...]]]:
    """Return the tensors of a model by their names in a checkpoint, and the shapes of its leaves by their paths."""
    expected = {tensor.name: tensor for tensor in skeleton.tensors(skeleton.config)}
    paths = jax.tree_util.tree_flatten_with_path(skeleton)[0]
    return expected, {jax.tree_util.keystr(path): leaf.shape for path, leaf in paths}


def _tie_or_untie_head(
    skeleton: Transformer,
    expected: dict[str, CheckpointTensor],
    shapes: dict[str, tuple[int, ...]],
    by_path: dict[str, Any],
    heads: Mapping[str, Any],
    origin: Any,
) -> tuple[Transformer, dict[str, CheckpointTensor], dict[str, tuple[int, ...]]]:
    """Use the checkpoint's head as the table of a tied model, or untie the head if the two differ."""
    name, head = next(iter(heads.items()))
    at = ".token.weight"
    table = next(tensor for tensor in expected.values() if tensor.path == at)
    head = _checked_array(head, name, table, shapes[at], origin)
    if at not in by_path:
        by_path[at] = head
    elif not np.array_equal(np.asarray(by_path[at]), np.asarray(head)):
        _log.warning(
            "config.json of %s ties the head to the table of tokens, and the weights hold another %s; it is not tied",
            origin,
            name,
        )
        config: Any = dataclasses.replace(skeleton.config, tied=False)  # type: ignore[type-var]  # every config is one
        skeleton = eqx.filter_eval_shape(type(skeleton).init, jax.random.key(0), config)
        by_path[".head.weight"] = head
        return skeleton, *_expected_tensors(skeleton)
    return skeleton, expected, shapes


def _canonical_name(key: str, expected: Mapping[str, CheckpointTensor]) -> str | None:
    """Find today's name of a tensor; base models lack a prefix, and old files name norms differently."""
    prefix = next(iter(expected)).split(".")[0] + "."
    name = re.sub(r"LayerNorm\.gamma$", "LayerNorm.weight", re.sub(r"LayerNorm\.beta$", "LayerNorm.bias", key))
    return next((known for known in (name, prefix + name) if known in expected), None)


def _checked_array(array: Any, key: str, tensor: CheckpointTensor, shape: tuple[int, ...], origin: Any) -> Any:
    stored_shape = tuple(reversed(shape)) if tensor.transposed else shape
    if array.shape != stored_shape:
        raise LanguageModelError(
            f"{origin} holds {key} of shape {list(array.shape)}, and config.json asks for "
            f"{list(stored_shape)}; one of the two belongs to another model"
        )
    if not jnp.issubdtype(array.dtype, jnp.floating) or array.dtype.itemsize < 2:
        raise LanguageModelError(
            f"{origin} holds {key} as {array.dtype}; quantized weights are not read: load the model in "
            "transformers, dequantize it there, and save it anew"
        )
    num_bad = int(array.size - np.isfinite(np.asarray(array)).sum())
    if num_bad:
        raise LanguageModelError(
            f"{origin} holds {key} with {num_bad:,} of {array.size:,} numbers nan or infinite, and texts would "
            f"be impossible; make the weights anew, in float32 where {array.dtype} is too small for them"
        )
    return array.T if tensor.transposed else array


def _common_dtype(arrays: Any) -> Any:
    """Return a dtype for all arrays: bfloat16 if all are, else at least float32."""
    dtypes = {array.dtype for array in arrays}
    return jnp.bfloat16 if dtypes == {jnp.dtype(jnp.bfloat16)} else jnp.result_type(jnp.float32, *dtypes)


def named_arrays(model: Transformer) -> dict[str, np.ndarray]:
    """Return the arrays of a model by their names in a checkpoint."""
    leaves = {
        jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in jax.tree_util.tree_flatten_with_path(model)[0]
    }
    places = list(model.tensors(model.config))
    unknown = [path for path in leaves if path not in {tensor.path for tensor in places}]
    if unknown:
        raise LanguageModelError(
            f"the model has {abbreviate(unknown)}, which a checkpoint of a {model.config.model_type} model has no "
            "place for; pass a model whose low-rank paths are merged: lm.finetuned(posterior), load_pretrained(..., "
            "merge=True), or write them by lm.save_adapter"
        )
    arrays = {tensor.name: leaves[tensor.path].T if tensor.transposed else leaves[tensor.path] for tensor in places}
    bad = [f"{name} ({array.dtype})" for name, array in arrays.items() if not jnp.issubdtype(array.dtype, jnp.floating)]
    if bad:
        raise LanguageModelError(
            f"the model has {abbreviate(bad)}, and weights are floats; make them anew, say in float32"
        )
    return {name: np.ascontiguousarray(array) for name, array in arrays.items()}

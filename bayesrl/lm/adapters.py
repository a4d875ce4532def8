"""Read and write adapters in the format of PEFT: low-rank paths beside the weights of a model."""

import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bayesrl.errors import LanguageModelError
from bayesrl.lm.checkpoints.weights import abbreviate
from bayesrl.lm.transformers.base import CausalLM, Transformer
from bayesrl.lm.transformers.layers.linear_and_norm import Linear, is_linear
from bayesrl.value_checks import is_count, is_real

ADAPTER, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
LOW_RANK = re.compile(r"(?P<module>.+)\.lora_(?P<side>[AB])(\.default)?\.weight")
WHOLE = re.compile(r"(?P<module>.+?)(\.base_layer|\.modules_to_save)?(\.default)?\.(?P<kind>weight|bias)")
# Each of these changes what the adapted model computes.
UNSUPPORTED = (
    *("use_dora", "use_qalora", "lora_bias", "layer_replication", "alora_invocation_tokens"),
    *("trainable_token_indices", "target_parameters", "use_bdlora", "arrow_config", "kasa_config", "velora_config"),
)
# All other kinds of initialisation change the base weights too.
KNOWN_INITS = (None, True, False, "gaussian", "orthogonal", "eva")


def apply_adapter(
    model: Transformer, config: Mapping[str, Any], arrays: Iterator[tuple[str, Any]], origin: Any
) -> Transformer:
    """Put an adapter beside the weights of a model.

        y = W·x + b + s·U·(D·x),   s = α/r, or α/√r with `use_rslora`; patterns may set α and r by module

    D is lora_A and U is lora_B; other arrays of the adapter replace those of the model.

    References:
        Hu et al. (2022), "LoRA", equation 3; Kalajdzievski (2023), "A rank stabilization scaling factor", section 3.
    """
    _check_config(config, origin)
    paths, replaced = _sort_arrays(model, arrays, origin)

    def with_path(path: Any, leaf: Any) -> Any:
        path_name = jax.tree_util.keystr(path)
        if not is_linear(leaf):
            return _replaced(leaf, replaced.get(path_name), path_name, origin)
        weight = _replaced(leaf.weight, replaced.get(f"{path_name}.weight"), path_name, origin)
        bias = None if leaf.bias is None else _replaced(leaf.bias, replaced.get(f"{path_name}.bias"), path_name, origin)
        if path_name not in paths:
            return Linear(weight, bias, leaf.down, leaf.up, leaf.factor)
        module, sides = paths[path_name]
        down, up = (jnp.asarray(sides[side]) for side in "AB")
        if down.ndim != 2 or up.ndim != 2 or (up.shape[0], down.shape[1]) != weight.shape or len(down) != up.shape[1]:
            raise LanguageModelError(
                f"the adapter of {origin} has a path of shapes {list(up.shape)} and {list(down.shape)} for {module}, "
                f"whose weight is {list(weight.shape)}; pass the model that it was trained beside as base="
            )
        return Linear(weight, bias, down, up, _scaling(config, module, len(down), origin))

    adapted: Transformer = jax.tree_util.tree_map_with_path(with_path, model, is_leaf=is_linear)
    return adapted


def _sort_arrays(
    model: Transformer, arrays: Iterator[tuple[str, Any]], origin: Any
) -> tuple[dict[str, tuple[str, dict[str, np.ndarray]]], dict[str, np.ndarray]]:
    """Return, by path in the model, the name and both sides of each low-rank path, and the arrays to replace."""
    tensors = {tensor.name: tensor for tensor in model.tensors(model.config)}
    paths: dict[str, tuple[str, dict[str, np.ndarray]]] = {}
    replaced, unknown = {}, []
    for name, array in arrays:
        values = np.asarray(array)
        if not np.isfinite(values.astype(np.float32)).all():
            raise LanguageModelError(f"{origin} holds {name} with numbers that are nan or infinite; train it anew")
        bare = name.removeprefix(PREFIX)
        low, whole = LOW_RANK.fullmatch(bare), WHOLE.fullmatch(bare)
        beside = tensors.get(f"{low['module']}.weight") if low else None
        tensor = tensors.get(f"{whole['module']}.{whole['kind']}") if whole else None
        if low and beside:
            paths.setdefault(beside.path.removesuffix(".weight"), (low["module"], {}))[1][low["side"]] = values
        elif tensor:
            replaced[tensor.path] = values.T if tensor.transposed else values
        else:
            unknown.append(name)
    halves = [module for module, sides in paths.values() if len(sides) < 2]
    if unknown or halves or not (paths or replaced):
        half = f"has half a path for {abbreviate(halves)}" if halves else "is empty"
        raise LanguageModelError(
            f"the adapter of {origin} {f'holds {abbreviate(unknown)}' if unknown else half}, which a "
            f"{model.config.model_type} model has no place for; pass the model that it was trained beside as base=, "
            "or merge them in PEFT (merge_and_unload) and save what comes out"
        )
    return paths, replaced


def extract_adapter(
    model: Transformer, config: Mapping[str, Any], base: str | None
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Return adapter_config.json and the weights of a model's low-rank paths."""
    leaves = jax.tree_util.tree_flatten_with_path(model, is_leaf=is_linear)[0]
    linears = {jax.tree_util.keystr(path): leaf for path, leaf in leaves if is_linear(leaf)}
    tensors = {tensor.path.removesuffix(".weight"): tensor for tensor in model.tensors(model.config)}
    adapters = {path: leaf for path, leaf in linears.items() if leaf.down is not None and leaf.up is not None}
    if not adapters:
        raise LanguageModelError(
            "save_adapter got a model without low-rank paths; pass finetuned(posterior, merge=False) of a fit by LoRA, "
            "or save the whole model by save_pretrained"
        )
    names = {path: tensors[path].name.removesuffix(".weight") for path in linears}
    arrays, ranks, alphas = {}, {}, {}
    for path, leaf in adapters.items():
        name, rank = names[path], len(leaf.down)
        arrays[f"{PREFIX}{name}.lora_A.weight"] = np.ascontiguousarray(leaf.down)
        arrays[f"{PREFIX}{name}.lora_B.weight"] = np.ascontiguousarray(leaf.up)
        ranks[name], alphas[name] = rank, leaf.factor * (math.sqrt(rank) if config.get("use_rslora") else rank)
    arrays |= _saved_arrays(model, config, set(ranks))
    # PEFT has one rank and one α, with patterns for exceptions: the most frequent values leave the fewest.
    rank = Counter(ranks.values()).most_common(1)[0][0]
    alpha = Counter(alphas.values()).most_common(1)[0][0]
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM" if isinstance(model, CausalLM) else "SEQ_CLS",
        "inference_mode": True,
        "bias": "none",
        "lora_dropout": 0.0,
        **config,
        "base_model_name_or_path": base if base is not None else config.get("base_model_name_or_path"),
        "r": rank,
        "lora_alpha": _as_int(alpha),
        # PEFT reads these names as regular expressions, and they hold dots.
        "rank_pattern": {re.escape(name): value for name, value in ranks.items() if value != rank},
        "alpha_pattern": {re.escape(name): _as_int(value) for name, value in alphas.items() if value != alpha},
        "target_modules": _targets(set(ranks), set(names.values())),
        # GPT-2 stores its weights transposed, and PEFT must know that to add U·D.
        "fan_in_fan_out": any(tensors[path].transposed for path in adapters),
        # Trained weights need no start, and some values would make PEFT change the base.
        "init_lora_weights": True,
    }
    return settings, arrays


def _saved_arrays(model: Transformer, config: Mapping[str, Any], adapted: set[str]) -> dict[str, np.ndarray]:
    """Return the arrays that an adapter stores whole because they were trained too: of some modules, and biases."""
    saved_modules, biases = config.get("modules_to_save") or (), config.get("bias", "none")
    leaves = {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(model)[0]}
    arrays = {}
    for tensor in model.tensors(model.config):
        module, kind = tensor.name.rsplit(".", 1)
        biased = kind == "bias" and (biases == "all" or (biases == "lora_only" and module in adapted))
        # An entry names a module by the last part of its name, or by that of a module around it.
        if biased or any(f".{name}." in f".{module}." for name in saved_modules):
            leaf = np.asarray(leaves[tensor.path])
            name = f"{module}.base_layer.{kind}" if module in adapted else tensor.name
            arrays[PREFIX + name] = np.ascontiguousarray(leaf.T if tensor.transposed else leaf)
    return arrays


def _check_config(config: Mapping[str, Any], origin: Any) -> None:
    """Refuse adapters that compute anything other than low-rank paths."""
    kind = config.get("peft_type")
    if kind != "LORA":
        raise LanguageModelError(
            f"{origin} holds an adapter of type {kind!r}; bayesrl reads LORA: merge it in PEFT (merge_and_unload), and "
            "save what comes out with save_pretrained"
        )
    unsupported = [name for name in UNSUPPORTED if config.get(name)]
    init_weights = config.get("init_lora_weights")
    if not isinstance(init_weights, str | bool | None) or init_weights not in KNOWN_INITS:
        unsupported.append("init_lora_weights")
    if unsupported:
        raise LanguageModelError(
            f"{origin} holds an adapter with {unsupported[0]}={config[unsupported[0]]!r:.100}, which bayesrl does not "
            "implement; merge it in PEFT (merge_and_unload), and save what comes out with save_pretrained"
        )


def _replaced(leaf: Any, array: np.ndarray | None, path: str, origin: Any) -> Any:
    """Return the adapter's replacement of a model's array, or the array itself."""
    if array is None:
        return leaf
    if array.shape != leaf.shape:
        raise LanguageModelError(
            f"the adapter of {origin} replaces {path}, of shape {list(leaf.shape)}, by {list(array.shape)}; pass the "
            "model that it was trained beside as base="
        )
    return jnp.asarray(array, leaf.dtype)


def _scaling(config: Mapping[str, Any], module: str, rank: int, origin: Any) -> float:
    """Return the factor of a module's low-rank path."""
    alpha = _by_pattern(config.get("alpha_pattern"), module, config.get("lora_alpha", 8))
    expected = _by_pattern(config.get("rank_pattern"), module, config.get("r", rank))
    if not (is_real(alpha) and alpha > 0 and is_count(expected, least=1)) or int(expected) != rank:
        raise LanguageModelError(
            f"adapter_config.json of {origin} sets lora_alpha={alpha!r} and r={expected!r} for {module}, whose path "
            f"has rank {rank}; the two files belong to different adapters"
        )
    return float(alpha) / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _by_pattern(patterns: Any, module: str, default: Any) -> Any:
    """Return the value of the first pattern that matches the end of a module's name."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default


def _targets(adapted: set[str], modules: set[str]) -> list[str]:
    """Name the adapted modules, by the last part of their names if no other module has it."""
    names = set()
    for name in adapted:
        last = name.split(".")[-1]
        alike = {other for other in modules if other.split(".")[-1] == last}
        names.add(last if alike <= adapted else name)
    return sorted(names)


def _as_int(number: float) -> float | int:
    # α is factor·rank, or factor·√rank, and rounding may leave it just beside a whole number.
    return round(number) if abs(number - round(number)) < 1e-9 else number

"""Adapters as PEFT writes them: low-rank paths beside the weights of a model, read and written."""

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
from bayesrl.lm.transformers.checkpoint_names import CheckpointTensor
from bayesrl.lm.transformers.layers.layers import Linear, is_linear
from bayesrl.values import is_count, is_real

ADAPTER, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
FRONT = "base_model.model."
LOW_RANK = re.compile(r"(?P<module>.+)\.lora_(?P<side>[AB])(\.default)?\.weight")
WHOLE = re.compile(r"(?P<module>.+?)(\.base_layer|\.modules_to_save)?(\.default)?\.(?P<kind>weight|bias)")
# Each of these changes what the adapted model computes.
OTHERWISE = (
    *("use_dora", "use_qalora", "lora_bias", "layer_replication", "alora_invocation_tokens"),
    *("trainable_token_indices", "target_parameters", "use_bdlora", "arrow_config", "kasa_config", "velora_config"),
)
# These begin by changing the weights that the paths stand beside.
PLAIN = (None, True, False, "gaussian", "orthogonal", "eva")


def apply_adapter(
    model: Transformer, told: Mapping[str, Any], arrays: Iterator[tuple[str, Any]], origin: Any
) -> Transformer:
    """Put an adapter beside the weights of a model.

        y = W·x + b + s·U·(D·x),   s = α/r, or α/√r where `use_rslora` says so, by module where patterns do

    Args:
        model: that it was trained beside.
        told: adapter_config.json.
        arrays: its weights by name: D is lora_A and U is lora_B; others replace those of the model.
        origin: where they come from, for messages.

    References:
        Hu et al. (2022), "LoRA", equation 3; Kalajdzievski (2023), "A rank stabilization scaling factor", section 3.
    """
    _check(told, origin)
    places = {stored.name: stored for stored in model.tensors(model.config)}
    sides: dict[str, dict[str, np.ndarray]] = {}
    replaced: dict[str, Any] = {}
    strange = []
    for name, array in arrays:
        bare = name.removeprefix(FRONT)
        low, whole = LOW_RANK.fullmatch(bare), WHOLE.fullmatch(bare)
        values = np.asarray(array)
        if not np.isfinite(values.astype(np.float32)).all():
            raise LanguageModelError(f"{origin} holds {name} with numbers that are nan or infinite; train it anew")
        if low and _place(low["module"], places) is not None:
            sides.setdefault(low["module"], {})[low["side"]] = values
        elif whole and f"{whole['module']}.{whole['kind']}" in places:
            stored = places[f"{whole['module']}.{whole['kind']}"]
            replaced[stored.path] = values.T if stored.transposed else values
        else:
            strange.append(name)
    halves = [module for module, pair in sides.items() if len(pair) < 2]
    if strange or halves or not (sides or replaced):
        what = (
            f"holds {abbreviate(strange)}"
            if strange
            else f"has half a path for {abbreviate(halves)}"
            if halves
            else "is empty"
        )
        raise LanguageModelError(
            f"the adapter of {origin} {what}, which a {model.config.model_type} model has no place for; pass the model "
            "that it was trained beside as base=, or merge them in PEFT (merge_and_unload) and save what comes out"
        )
    paths = {_place(module, places): (module, pair) for module, pair in sides.items()}

    def beside(path: Any, leaf: Any) -> Any:
        at = jax.tree_util.keystr(path)
        if not is_linear(leaf):
            return _fits(leaf, replaced.get(at), at, origin)
        weight = _fits(leaf.weight, replaced.get(f"{at}.weight"), at, origin)
        bias = None if leaf.bias is None else _fits(leaf.bias, replaced.get(f"{at}.bias"), at, origin)
        if at not in paths:
            return Linear(weight, bias, leaf.down, leaf.up, leaf.factor)
        module, pair = paths[at]
        down, up = (jnp.asarray(pair[side]) for side in "AB")
        if down.ndim != 2 or up.ndim != 2 or (up.shape[0], down.shape[1]) != weight.shape or len(down) != up.shape[1]:
            raise LanguageModelError(
                f"the adapter of {origin} has a path of shapes {list(up.shape)} and {list(down.shape)} for {module}, "
                f"whose weight is {list(weight.shape)}; pass the model that it was trained beside as base="
            )
        return Linear(weight, bias, down, up, _factor(told, module, len(down), origin))

    made: Transformer = jax.tree_util.tree_map_with_path(beside, model, is_leaf=is_linear)
    return made


def extract_adapter(
    model: Transformer, told: Mapping[str, Any], base: str | None
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Give adapter_config.json and the weights of the low-rank paths of a model.

    Args:
        model: with low-rank paths.
        told: adapter_config.json, where one was read: what it says beside ranks and scales is kept.
        base: the name or folder of the model that they stand beside.
    """
    leaves = jax.tree_util.tree_flatten_with_path(model, is_leaf=is_linear)[0]
    linears = {jax.tree_util.keystr(path): leaf for path, leaf in leaves if is_linear(leaf)}
    places = {stored.path.removesuffix(".weight"): stored for stored in model.tensors(model.config)}
    paths = {at: leaf for at, leaf in linears.items() if leaf.down is not None and leaf.up is not None}
    if not paths:
        raise LanguageModelError(
            "save_adapter got a model without low-rank paths; pass finetuned(posterior, merge=False) of a fit by LoRA, "
            "or save the whole model by save_pretrained"
        )
    names = {at: places[at].name.removesuffix(".weight") for at in linears}
    arrays = {}
    for at, leaf in paths.items():
        arrays[f"{FRONT}{names[at]}.lora_A.weight"] = np.ascontiguousarray(leaf.down)
        arrays[f"{FRONT}{names[at]}.lora_B.weight"] = np.ascontiguousarray(leaf.up)
    arrays |= _whole(model, told, {names[at] for at in paths})
    stable = bool(told.get("use_rslora"))
    ranks = {names[at]: len(leaf.down) for at, leaf in paths.items()}
    alphas = {
        name: leaf.factor * (math.sqrt(ranks[name]) if stable else ranks[name])
        for name, leaf in ((names[at], leaf) for at, leaf in paths.items())
    }
    rank = Counter(ranks.values()).most_common(1)[0][0]
    alpha = Counter(alphas.values()).most_common(1)[0][0]
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM" if isinstance(model, CausalLM) else "SEQ_CLS",
        "inference_mode": True,
        "bias": "none",
        "lora_dropout": 0.0,
        **told,
        "base_model_name_or_path": base if base is not None else told.get("base_model_name_or_path"),
        "r": rank,
        "lora_alpha": _plain(alpha),
        "rank_pattern": {re.escape(name): own for name, own in ranks.items() if own != rank},
        "alpha_pattern": {re.escape(name): _plain(own) for name, own in alphas.items() if own != alpha},
        "target_modules": _targets(set(ranks), set(names.values())),
        "fan_in_fan_out": any(places[at].transposed for at in paths),
        "init_lora_weights": True,
    }
    return settings, arrays


def _whole(model: Transformer, told: Mapping[str, Any], chosen: set[str]) -> dict[str, np.ndarray]:
    """Give the arrays that an adapter has whole, since they were trained too: of some modules, and biases."""
    kept, biases = told.get("modules_to_save") or (), told.get("bias", "none")
    leaves = {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(model)[0]}
    found = {}
    for stored in model.tensors(model.config):
        module, kind = stored.name.rsplit(".", 1)
        biased = kind == "bias" and (biases == "all" or (biases == "lora_only" and module in chosen))
        # A module is named by the last part of its name, or by that of what it is part of.
        if biased or any(f".{name}." in f".{module}." for name in kept):
            leaf = np.asarray(leaves[stored.path])
            told_as = f"{module}.base_layer.{kind}" if module in chosen else stored.name
            found[FRONT + told_as] = np.ascontiguousarray(leaf.T if stored.transposed else leaf)
    return found


def _check(told: Mapping[str, Any], origin: Any) -> None:
    """Refuse adapters that compute something else than low-rank paths."""
    kind = told.get("peft_type")
    if kind != "LORA":
        raise LanguageModelError(
            f"{origin} holds an adapter of type {kind!r}; bayesrl reads LORA: merge it in PEFT (merge_and_unload), and "
            "save what comes out with save_pretrained"
        )
    strange = [name for name in OTHERWISE if told.get(name)]
    begun = told.get("init_lora_weights")
    if not (isinstance(begun, str) or begun is None or isinstance(begun, bool)) or begun not in PLAIN:
        strange.append("init_lora_weights")
    if strange:
        raise LanguageModelError(
            f"{origin} holds an adapter with {strange[0]}={told[strange[0]]!r:.100}, which bayesrl does not implement; "
            "merge it in PEFT (merge_and_unload), and save what comes out with save_pretrained"
        )


def _place(module: str, places: Mapping[str, CheckpointTensor]) -> str | None:
    """Find where a module of a checkpoint stands in a model."""
    stored = places.get(f"{module}.weight")
    return None if stored is None else stored.path.removesuffix(".weight")


def _fits(leaf: Any, value: np.ndarray | None, at: str, origin: Any) -> Any:
    """Give what an adapter has for an array of the model, or the array."""
    if value is None:
        return leaf
    if value.shape != leaf.shape:
        raise LanguageModelError(
            f"the adapter of {origin} replaces {at}, of shape {list(leaf.shape)}, by {list(value.shape)}; pass the "
            "model that it was trained beside as base="
        )
    return jnp.asarray(value, leaf.dtype)


def _factor(told: Mapping[str, Any], module: str, rank: int, origin: Any) -> float:
    """Give the factor of a module's path."""
    alpha = _by_pattern(told.get("alpha_pattern"), module, told.get("lora_alpha", 8))
    expected = _by_pattern(told.get("rank_pattern"), module, told.get("r", rank))
    if not (is_real(alpha) and alpha > 0 and is_count(expected, least=1)) or int(expected) != rank:
        raise LanguageModelError(
            f"adapter_config.json of {origin} tells lora_alpha={alpha!r} and r={expected!r} for {module}, whose path "
            f"has rank {rank}; the two files belong to different adapters"
        )
    return float(alpha) / (math.sqrt(rank) if told.get("use_rslora") else rank)


def _by_pattern(patterns: Any, module: str, default: Any) -> Any:
    """Give what the first pattern says that a module's name ends with."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default


def _targets(chosen: set[str], every: set[str]) -> list[str]:
    """Name modules, by the last part of their names where that names no others."""
    found = set()
    for name in chosen:
        last = name.split(".")[-1]
        alike = {other for other in every if other.split(".")[-1] == last}
        found.add(last if alike <= chosen else name)
    return sorted(found)


def _plain(number: float) -> float | int:
    return round(number) if abs(number - round(number)) < 1e-9 else number

"""Read eight-bit weights with scales as the numbers that they stand for."""

import logging
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from bayesrl.errors import LanguageModelError

SETTING = "quantization_config"
SCALES = (".weight_scale_inv", ".weight_scale")
"""The two names of scales; both multiply."""
ACTIVATION_SCALES = (".input_scale", ".activation_scale", ".output_scale", ".k_scale", ".v_scale")
METHODS = ("fp8", "fbgemm_fp8", "compressed-tensors")

_log = logging.getLogger(__name__)


def check_quantization(config: Mapping[str, Any]) -> None:
    """Refuse quantized weights other than float8 with scales."""
    settings = config.get(SETTING)
    if settings is None:
        return
    method = settings.get("quant_method") if isinstance(settings, Mapping) else None
    # Some formats of compressed-tensors hold integers.
    is_float = method != "compressed-tensors" or "float" in str(settings.get("format"))
    if method not in METHODS or not is_float:
        raise LanguageModelError(
            f"config.json of a {config.get('model_type')!r} model sets {SETTING}={settings!r:.200}, which bayesrl does "
            f"not implement (it reads models without it, and float8 with scales: {', '.join(METHODS)}); dequantize the "
            "model in transformers and save it anew"
        )


def dequantize(arrays: Iterator[tuple[str, Any]], config: Mapping[str, Any], origin: Any) -> Iterator[tuple[str, Any]]:
    """Multiply float8 weights by their scales, in float32; leave other arrays as they are.

        W = Q·s,   with one scale for all, for each row, or for each block of `weight_block_size`

    References:
        DeepSeek-AI (2024), "DeepSeek-V3 technical report", section 3.3.
    """
    settings = config.get(SETTING) or {}
    block = settings.get("weight_block_size") if isinstance(settings, Mapping) else None
    # A weight and its scale come in any order, even from two files; only those that wait for the other are held.
    weights: dict[str, Any] = {}
    scales: dict[str, Any] = {}
    count = 0
    for name, array in arrays:
        ending = next((end for end in SCALES if name.endswith(end)), None)
        if name.endswith(ACTIVATION_SCALES):
            continue
        if ending is not None:
            base = name.removesuffix(ending) + ".weight"
            scales[base] = array
        elif _is_float8(array):
            base = name
            weights[base] = array
        else:
            yield name, array
            continue
        if base in weights and base in scales:
            count += 1
            yield base, _multiply_scales(base, weights.pop(base), scales.pop(base), block, origin)
    if weights:
        raise LanguageModelError(
            f"{origin} holds {next(iter(weights))} as float8 without a scale beside it; copy the weights anew, or save "
            "the model in transformers without quantization"
        )
    if count:
        _log.warning(
            "%s holds %d weights as float8 with scales; they are held multiplied out, and saved so. What is computed "
            "is not rounded to float8 on the way, as it is where the model is served so",
            origin,
            count,
        )


def _is_float8(array: Any) -> bool:
    return str(array.dtype).startswith("float8")


def _multiply_scales(name: str, weight: Any, scale: Any, block: Any, origin: Any) -> np.ndarray:
    """Multiply a weight by its scales."""
    values, scales = np.asarray(weight).astype(np.float32), np.asarray(scale).astype(np.float32)
    rows, columns = values.shape
    if scales.size == 1:
        return values * scales.reshape(())
    if scales.shape in ((rows,), (rows, 1)):
        return values * scales.reshape(rows, 1)
    if isinstance(block, list | tuple) and len(block) == 2 and scales.ndim == 2:
        height, width = (int(size) for size in block)
        if scales.shape == (-(-rows // height), -(-columns // width)):
            # Blocks at the lower and right edge may reach beyond the weight.
            spread = np.repeat(np.repeat(scales, height, 0), width, 1)
            return values * spread[:rows, :columns]
    raise LanguageModelError(
        f"{origin} holds {name} of shape {list(values.shape)} with scales of shape {list(scales.shape)}, which do not "
        f"fit it (weight_block_size={block!r}); copy config.json and weights anew"
    )

"""Recognise values of any type: numbers and arrays, flags, texts, functions; and format them for messages."""

import math
import reprlib
import sys
import types
from typing import Any

import numpy as np

LARGEST, LEAST = float(np.finfo(np.float32).max), float(np.finfo(np.float32).tiny)
"""The largest and smallest numbers that single precision can tell from infinity and from 0."""
_SHOWN = (str, bytes, bool, int, float, complex, list, tuple, dict, set)
_SPOKEN = reprlib.Repr(maxother=100, maxstring=60, maxlong=40)


def is_traced(value: Any) -> bool:
    """Whether a value is a JAX tracer, whose numbers are not known yet."""
    jax = sys.modules.get("jax")  # not imported here: if nobody has imported JAX, the value is no tracer
    return jax is not None and isinstance(value, jax.core.Tracer)


def is_under_jit() -> bool:
    """Whether JAX traces the caller, as under `jax.jit`: all that it computes is then a tracer, constants too."""
    jax = sys.modules.get("jax")
    return jax is not None and is_traced(jax.device_put(np.zeros(())))


def is_array(value: Any) -> bool:
    """Whether a value is a JAX array of numbers, not of keys."""
    jax = sys.modules.get("jax")
    # The type of a key is written `key<...>`.
    return jax is not None and isinstance(value, jax.Array) and "key" not in str(value.dtype)


def dtype_kind(value: Any) -> str:
    """Return the kind letter of a scalar's dtype or of a Python number; "" for anything else."""
    # First of all, since to Python a bool is an int.
    if isinstance(value, bool | np.bool_):
        return "b"
    if isinstance(value, int):
        return "i"
    if isinstance(value, float):
        return "f"
    if getattr(value, "shape", None) != () or not hasattr(value, "dtype"):
        return ""
    # To NumPy, bfloat16 and the 8-bit floats are of kind V.
    kind = str(getattr(value.dtype, "kind", ""))
    return "f" if "float" in str(value.dtype) else kind


def is_integer(value: Any) -> bool:
    """Whether a value is a single whole number."""
    return dtype_kind(value) in ("i", "u")


def is_count(value: Any, *, least: int) -> bool:
    """Whether a value is a single whole number of at least `least`."""
    return is_integer(value) and bool(value >= least)


def is_real(value: Any) -> bool:
    """Whether a value is a single number that single precision can tell from infinity."""
    if dtype_kind(value) not in ("i", "u", "f"):
        return False
    if is_traced(value):
        return True
    try:
        # `isfinite` turns whole numbers into floats, and raises if they are too large for that.
        return bool(math.isfinite(value) and abs(value) <= LARGEST)
    except OverflowError:
        return False


def are_numbers(value: Any) -> bool:
    """Whether a value is a number or an array of numbers, or lists of them; traced ones pass."""
    return is_traced(value) or array_of(value).dtype.kind in "iuf"


def are_finite(value: Any) -> bool:
    """Whether a value is a finite number, or an array or lists of finite numbers; traced ones pass."""
    return is_traced(value) or (are_numbers(value) and bool((np.abs(array_of(value).astype(float)) <= LARGEST).all()))


def are_positive(value: Any) -> bool:
    """Whether a value is a finite number above 0, or an array or lists of such numbers; traced ones pass."""
    return is_traced(value) or (are_finite(value) and bool((array_of(value) >= LEAST).all()))


def has_no_nan(value: Any) -> bool:
    """Whether a value has no NaN, anywhere in its lists, dictionaries and other pytrees."""
    jax = sys.modules.get("jax")
    parts = [value] if jax is None else jax.tree.leaves(value)
    return not any(_is_nan(part) for part in parts)


def _is_nan(value: Any) -> bool:
    if is_traced(value) or (not isinstance(value, float | np.generic | np.ndarray) and not is_array(value)):
        return False
    array = array_of(value)
    return array.dtype.kind == "f" and bool(np.isnan(array).any())


def are_integers(value: Any) -> bool:
    """Whether a value is a whole number, or an array or lists of whole numbers; traced ones pass by their dtype."""
    return value.dtype.kind in "iu" if is_traced(value) else array_of(value).dtype.kind in "iu"


def are_flags(value: Any) -> bool:
    """Whether a value is True or False, or an array or lists of them, or traced; 0 and 1 pass too."""
    if is_traced(value):
        return True
    array = array_of(value)
    return array.dtype.kind in "biu" and bool(np.isin(array, (0, 1)).all())


def array_of(value: Any) -> np.ndarray:
    """Read numbers as an array; for anything else, return an array of dtype object or of another kind."""
    nothing = np.asarray(None, object)
    if isinstance(value, str | bytes) or "key" in str(getattr(value, "dtype", "")):
        return nothing
    try:
        array = np.asarray(value)
        return array.astype(np.float32) if "float" in str(array.dtype) and array.dtype.kind not in "f" else array
    except (TypeError, ValueError, OverflowError, RuntimeError):
        return nothing


def is_valid_text(value: Any) -> bool:
    """Whether a value is a text without lone surrogates."""
    return isinstance(value, str) and not any("\ud800" <= letter <= "\udfff" for letter in value)


def is_function(value: Any) -> bool:
    """Whether a value can serve as a function."""
    return callable(value) and not hasattr(value, "log_prob")  # NumPyro's distributions are callable too


# ---- words -----------------------------------------------------------------------------------


def format_value(value: Any) -> str:
    """Describe any value in a few words, on one line."""
    if hasattr(value, "dtype") and hasattr(value, "shape") and not isinstance(value, np.generic | type):
        return f"an array of shape {tuple(value.shape)} and type {value.dtype}"
    if isinstance(value, type):
        return f"the class {value.__name__}, which is not called yet"
    if isinstance(value, types.FunctionType | types.BuiltinFunctionType | types.MethodType):
        return f"the function {value.__name__}"
    if value is None or isinstance(value, np.generic) or type(value) in _SHOWN:
        try:
            return " ".join(_SPOKEN.repr(value).split())
        except ValueError:  # whole numbers of thousands of digits
            return "a number of thousands of digits"
    return f"{'an' if type(value).__name__[0] in 'AEIOU' else 'a'} {type(value).__name__}"

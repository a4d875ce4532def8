"""`Rope`: the frequencies of rotary embeddings, as in a checkpoint, and the rotation itself."""

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Int

from bayesrl.errors import LanguageModelError
from bayesrl.lm.transformers.config_json import optional
from bayesrl.value_checks import is_real

KINDS = ("default", "linear", "dynamic", "yarn", "longrope", "llama3")

_log = logging.getLogger(__name__)


class Rotation(NamedTuple):
    """The turns of n positions."""

    cosine: Float[Array, "n 1 half"]
    sine: Float[Array, "n 1 half"]


@dataclass(frozen=True)
class Rope:
    """How fast each pair of coordinates turns with the position.

        ω_i = theta^(−2i/d),   d = share·head_dim,   stretched where a model was made for longer contexts

    Args:
        theta: the base.
        kind: "default"; "linear", ω/factor; "llama3" and "yarn", which stretch only slow turns; "dynamic", which
            stretches only beyond the context and so leaves ω unchanged within; or "longrope", ω/`short`.
        factor: of the stretch.
        low: pairs that come round less often than this within `original` tokens are stretched in full.
        high: pairs that come round more often are left alone.
        original: the context length before the stretch, in tokens.
        share: of the coordinates of a head that turn, the first ones.
        sharpness: multiplies turned queries and keys ("yarn", "longrope").
        truncate: whether the bounds of "yarn" are rounded to whole pairs.
        short: the divisor of each ω within the original context ("longrope").
        long: the same beyond it; stored but not used, because a text's density must not depend on later tokens.

    References:
        Su et al. (2021), "RoFormer", equation 15; Dubey et al. (2024), "The Llama 3 herd of models", section 3.2;
        Peng et al. (2023), "YaRN", section 3.2; Ding et al. (2024), "LongRoPE", equation 2.
    """

    theta: float = 10000.0
    kind: str = "default"
    factor: float = 1.0
    low: float = 1.0
    high: float = 4.0
    original: int = 8192
    share: float = 1.0
    sharpness: float = 1.0
    truncate: bool = True
    short: tuple[float, ...] = ()
    long: tuple[float, ...] = ()

    def frequencies(self, head_dim: int) -> np.ndarray:
        """Return ω, in radians per token, [share·head_dim/2]."""
        # In NumPy, so in float64 and on the host; `rotation` rounds to float32.
        turning = int(head_dim * self.share)
        turns = 1.0 / self.theta ** (np.arange(0, turning, 2) / turning)
        if self.kind == "linear":
            return turns / self.factor
        if self.kind == "longrope":
            return turns / np.asarray(self.short)
        if self.kind == "llama3":
            # Between the two bounds, the unstretched share is linear in 1/wavelength.
            share = (self.original * turns / (2 * math.pi) - self.low) / (self.high - self.low)
        elif self.kind == "yarn":
            share = 1 - self._ramp(turning)
        else:
            return turns
        share = np.clip(share, 0.0, 1.0)
        return share * turns + (1 - share) * turns / self.factor

    def _ramp(self, turning: int) -> np.ndarray:
        """Rise from 0 to 1 between the pairs that come round `high` and `low` times in the original context."""

        def pair(rounds: float) -> float:
            # Solves ω_i·original = 2π·rounds for i.
            return turning * math.log(self.original / (rounds * 2 * math.pi)) / (2 * math.log(self.theta))

        first, last = pair(self.high), pair(self.low)
        if self.truncate:
            first, last = math.floor(first), math.ceil(last)
        # Bounded by turning − 1, though there are only turning/2 pairs, as in YaRN's own code.
        first, last = max(first, 0), min(last, turning - 1)
        # Equal bounds make a step; the small width only avoids 0/0.
        return (np.arange(turning // 2) - first) / ((last - first) or 0.001)

    def rotation(self, positions: Int[Array, "n"], head_dim: int) -> Rotation:
        """Return the turns of n positions, in at least float32."""
        # Float32 holds positions up to 2²⁴ exactly; bfloat16 would stop at 256.
        turns = jnp.asarray(self.frequencies(head_dim), jnp.float32)
        angles = (positions[:, None].astype(turns.dtype) * turns)[:, None]
        if self.sharpness == 1:
            return Rotation(jnp.cos(angles), jnp.sin(angles))
        return Rotation(self.sharpness * jnp.cos(angles), self.sharpness * jnp.sin(angles))

    @classmethod
    def from_json(
        cls,
        json: Mapping[str, Any],
        *,
        parameters: Mapping[str, Any] | None = None,  # of one kind of layer, if each kind has its own
        theta: float = 10000.0,  # the default base
        share: float = 1.0,  # the default share of the coordinates that turn
    ) -> "Rope":
        """Read `rope_parameters`, or `rope_theta` and `rope_scaling` of older files."""
        if parameters is None:
            parameters = json.get("rope_parameters") or json.get("rope_scaling") or {}
        if not isinstance(parameters, Mapping):
            raise LanguageModelError(
                f"config.json sets rope_scaling={parameters!r}; it must be null, or name a rope_type with its factor"
            )
        kind = parameters.get("rope_type") or parameters.get("type") or "default"
        # An older name of the same kind.
        kind = {"su": "longrope"}.get(kind, kind)
        if kind not in KINDS:
            raise LanguageModelError(
                f"config.json asks for rotary positions of type {kind!r}; bayesrl knows {', '.join(KINDS)}: "
                "choose another model"
            )
        theta = _positive("rope_theta", parameters.get("rope_theta") or optional(json, "rope_theta", theta))
        share = _positive(
            "partial_rotary_factor",
            parameters.get("partial_rotary_factor") or optional(json, "partial_rotary_factor", share),
        )
        if share > 1:
            raise LanguageModelError(f"config.json sets partial_rotary_factor={share!r}; use a share of at most 1")
        plain: dict[str, Any] = {"theta": theta, "share": share}
        if kind == "default":
            return cls(**plain)
        try:
            return cls(**plain, kind=kind, **_stretch(kind, parameters, json))
        except KeyError as error:
            raise LanguageModelError(
                f"config.json asks for {kind!r} rotary positions without {error.args[0]!r}; it is damaged: "
                "copy it anew from where the model came from"
            ) from error

    def to_json(self) -> dict[str, Any]:
        """Return the settings under their names in old and new versions of transformers."""
        settings: dict[str, Any] = {"rope_type": self.kind}
        if self.kind != "default":
            settings["factor"] = self.factor
        if self.kind in ("llama3", "yarn", "longrope"):
            settings["original_max_position_embeddings"] = self.original
        if self.kind == "llama3":
            settings |= {"low_freq_factor": self.low, "high_freq_factor": self.high}
        if self.kind == "yarn":
            settings |= {"beta_slow": self.low, "beta_fast": self.high, "truncate": self.truncate}
        if self.kind == "longrope":
            settings |= {"short_factor": list(self.short), "long_factor": list(self.long)}
        if self.kind in ("yarn", "longrope"):
            settings["attention_factor"] = self.sharpness
        partial = {} if self.share == 1 else {"partial_rotary_factor": self.share}
        return {
            "rope_theta": self.theta,
            "rope_scaling": None if self.kind == "default" else settings,
            "rope_parameters": {"rope_theta": self.theta, **settings, **partial},
            **partial,
        }


def _stretch(kind: str, params: Mapping[str, Any], json: Mapping[str, Any]) -> dict[str, Any]:
    """Read the settings of one kind of stretch; a missing one raises KeyError."""
    if kind in ("linear", "dynamic"):
        return {"factor": _positive("factor", params["factor"])}
    length = json.get("max_position_embeddings")
    # A length outside the parameters takes precedence, as in Phi-3.
    base = json.get("original_max_position_embeddings") or params.get("original_max_position_embeddings") or length
    original = int(_positive("original_max_position_embeddings", base))
    if kind == "llama3":
        factor, low, high = (
            _positive(name, params[name]) for name in ("factor", "low_freq_factor", "high_freq_factor")
        )
        return {"factor": factor, "low": low, "high": high, "original": original}
    # Phi-3's files have no factor: it follows from the two lengths.
    ratio = (
        _positive("max_position_embeddings", length) / original if params.get("factor") is None else params["factor"]
    )
    factor = _positive("factor", ratio)
    sharpness = params.get("attention_factor")
    if kind == "longrope":
        if sharpness is None:
            sharpness = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
        short, long = (tuple(_positive(name, one) for one in params[name]) for name in ("short_factor", "long_factor"))
        _log.warning(
            "config.json asks for longrope, whose turns change where a text outgrows %d tokens; texts are kept within "
            "them, that one density scores every part of a text",
            original,
        )
        return {
            "factor": factor, "original": original, "short": short, "long": long,
            "sharpness": _positive("attention_factor", sharpness),
        }  # fmt: skip
    if sharpness is None:
        # Without both scales the divisor is _sharpness(factor, 0) = 1, and YaRN's 0.1·ln(factor) + 1 is left.
        scales = [params.get(name) for name in ("mscale", "mscale_all_dim")]
        above, below = (_positive("mscale", scale) for scale in scales) if all(scales) else (1.0, 0.0)
        sharpness = _sharpness(factor, above) / _sharpness(factor, below)
    return {
        "factor": factor, "original": original, "sharpness": _positive("attention_factor", sharpness),
        "low": _positive("beta_slow", params.get("beta_slow") or 1.0),
        "high": _positive("beta_fast", params.get("beta_fast") or 32.0),
        "truncate": bool(optional(params, "truncate", True)),
    }  # fmt: skip


def _sharpness(factor: float, scale: float) -> float:
    return 0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0


def _positive(name: str, value: Any) -> float:
    if not (is_real(value) and value > 0):
        raise LanguageModelError(f"config.json sets {name}={value!r} of the rotary positions; use a number above 0")
    return float(value)


def apply_rotary(x: Float[Array, "n heads head_dim"], rotation: Rotation) -> Float[Array, "n heads head_dim"]:
    """Rotate each pair (x_i, x_{i + half}) by its angle, in float32; coordinates beyond the pairs stay as they are.

    References:
        Su et al. (2021), "RoFormer", equation 34, with the pairs laid out in halves as Llama's checkpoints have them.
    """
    half = rotation.cosine.shape[-1]
    first, second, rest = jnp.split(x.astype(rotation.cosine.dtype), [half, 2 * half], axis=-1)
    turned = [first * rotation.cosine - second * rotation.sine, second * rotation.cosine + first * rotation.sine]
    return jnp.concatenate([*turned, rest] if rest.shape[-1] else turned, -1).astype(x.dtype)

"""What a model's generation_config.json says of sampling, as defaults of a policy."""

import logging
from collections.abc import Mapping
from typing import Any, NamedTuple

from bayesrl.errors import LanguageModelError
from bayesrl.lm.tokenization.files import GENERATION
from bayesrl.values import is_count, is_real

# What changes the distribution and is no part of a policy's, and the value of each that changes nothing.
IGNORED: Mapping[str, tuple[Any, ...]] = {
    **dict.fromkeys(("repetition_penalty", "encoder_repetition_penalty", "typical_p", "guidance_scale"), (1, 1.0)),
    **dict.fromkeys(
        (
            "top_h", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "min_length", "min_new_tokens",
            "epsilon_cutoff", "eta_cutoff", "penalty_alpha",
        ),
        (0, 0.0),
    ),
    **dict.fromkeys(
        (
            "suppress_tokens", "begin_suppress_tokens", "bad_words_ids", "force_words_ids", "sequence_bias",
            "forced_bos_token_id", "forced_eos_token_id", "forced_decoder_ids", "exponential_decay_length_penalty",
            "stop_strings", "watermarking_config", "dola_layers",
        ),
        ([], {}),
    ),
    "num_beams": (1,),
}  # fmt: skip

_log = logging.getLogger(__name__)


class SamplingSettings(NamedTuple):
    """How a policy draws, by the names of `CausalLMDistribution`."""

    num_steps: int
    temperature: float
    top_k: int | None
    top_p: float
    min_p: float


def sampling_settings(
    told: Mapping[str, Any], width: int, *, max_new_tokens: Any, temperature: Any, top_k: Any, top_p: Any, min_p: Any
) -> SamplingSettings:
    """Give the options of sampling: those that were given, else those that the file says, else none.

    Where the file says that nothing is drawn (`do_sample` is false), its temperature and truncation say nothing.

    Args:
        told: generation_config.json.
        width: tokens of the longest prompt, which `max_length` counts too.
        max_new_tokens: as given; None where it was not.
        temperature: the same.
        top_k: the same; 0 is all.
        top_p: the same.
        min_p: the same.
    """
    drawn = told if told.get("do_sample") is not False else {}
    if max_new_tokens is None:
        longest: Any = told.get("max_length")
        left = longest - width if is_count(longest, least=width + 1) else None
        max_new_tokens = told["max_new_tokens"] if told.get("max_new_tokens") is not None else left
        if max_new_tokens is None:
            raise LanguageModelError(
                f"policy got no max_new_tokens, and the model has no {GENERATION} that says it; pass how many tokens "
                "are written at most"
            )
        _fits("max_new_tokens", max_new_tokens, is_count(max_new_tokens, least=1), "a whole number of at least 1")
    if temperature is None:
        temperature = _or(drawn.get("temperature"), 1.0)
        _fits("temperature", temperature, is_real(temperature) and temperature > 0, "a number above 0")
    if top_k is None:
        top_k = _or(drawn.get("top_k"), 0)
        _fits("top_k", top_k, is_count(top_k, least=0), "a whole number, 0 for all tokens")
    if top_p is None:
        top_p = _or(drawn.get("top_p"), 1.0)
        _fits("top_p", top_p, is_real(top_p) and 0 < top_p <= 1, "a probability in (0, 1]")
    if min_p is None:
        min_p = _or(drawn.get("min_p"), 0.0)
        _fits("min_p", min_p, is_real(min_p) and 0 <= min_p <= 1, "a number in [0, 1]")
    strange = [f"{name}={told[name]!r:.40}" for name, plain in IGNORED.items() if told.get(name) not in (None, *plain)]
    if strange:
        _log.warning(
            "%s sets %s, which are no part of a policy's distribution: what is drawn here is drawn without",
            GENERATION,
            ", ".join(strange),
        )
    return SamplingSettings(int(max_new_tokens), float(temperature), int(top_k) or None, float(top_p), float(min_p))


def _or(value: Any, default: Any) -> Any:
    return default if value is None else value


def _fits(name: str, value: Any, fine: bool, wanted: str) -> None:
    if not fine:
        raise LanguageModelError(f"{GENERATION} sets {name}={value!r}; set {wanted} there, or pass {name}=")

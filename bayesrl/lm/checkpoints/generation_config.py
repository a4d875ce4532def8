"""Read the sampling settings of a model's generation_config.json, as defaults of a policy."""

import logging
from collections.abc import Callable, Mapping
from typing import Any

from bayesrl.errors import LanguageModelError
from bayesrl.lm.tokenization.tokenizer_files import GENERATION
from bayesrl.value_checks import is_count, is_real

# Settings that would change the distribution but that a policy does not have, each with the values without effect.
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

_OPTIONS: Mapping[str, tuple[Any, Callable[[Any], bool], str]] = {
    "temperature": (1.0, lambda value: is_real(value) and value > 0, "a number above 0"),
    "top_k": (0, lambda value: is_count(value, least=0), "a whole number, 0 for all tokens"),
    "top_p": (1.0, lambda value: is_real(value) and 0 < value <= 1, "a probability in (0, 1]"),
    "min_p": (0.0, lambda value: is_real(value) and 0 <= value <= 1, "a number in [0, 1]"),
}
"""By option: the default without effect, the check of a file's value, and the description of valid values."""

_log = logging.getLogger(__name__)


def sampling_settings(
    config: Mapping[str, Any], width: int, max_new_tokens: int | None, given: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the options of `CausalLMDistribution`: the caller's, else the file's, else ones without effect.

    If the file turns sampling off (`do_sample` is false), its temperature and truncation do not count.
    """
    sampled = config if config.get("do_sample") is not False else {}
    if max_new_tokens is None:
        longest: Any = config.get("max_length")
        # max_length counts the prompt too.
        left = longest - width if is_count(longest, least=width + 1) else None
        max_new_tokens = config["max_new_tokens"] if config.get("max_new_tokens") is not None else left
        if max_new_tokens is None:
            raise LanguageModelError(
                f"policy got no max_new_tokens, and the model has no {GENERATION} that says it; pass how many tokens "
                "are written at most"
            )
        _checked("max_new_tokens", max_new_tokens, is_count(max_new_tokens, least=1), "a whole number of at least 1")
    options = {"num_steps": int(max_new_tokens), **given}
    for name, (default, fine, wanted) in _OPTIONS.items():
        if options[name] is None:
            value = default if sampled.get(name) is None else sampled[name]
            options[name] = _checked(name, value, fine(value), wanted)
        options[name] = (int if name == "top_k" else float)(options[name])
    ignored = [
        f"{name}={config[name]!r:.40}" for name, plain in IGNORED.items() if config.get(name) not in (None, *plain)
    ]
    if ignored:
        _log.warning(
            "%s sets %s, which a policy does not have: texts are drawn without them",
            GENERATION,
            ", ".join(ignored),
        )
    return options | {"top_k": options["top_k"] or None}


def _checked(name: str, value: Any, fine: bool, wanted: str) -> Any:
    if not fine:
        raise LanguageModelError(f"{GENERATION} sets {name}={value!r}; set {wanted} there, or pass {name}=")
    return value

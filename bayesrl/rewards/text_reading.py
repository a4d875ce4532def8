"""Features of completions, as the last layer of a posterior over rewards reads them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from bayesrl.compilation.callbacks import host_call
from bayesrl.errors import PreferenceError
from bayesrl.lm.prompts import Completions, Examples
from bayesrl.lm.rewards.text import decode_completions
from bayesrl.lm.transformers.base import CausalLM
from bayesrl.preferences.text_scores import TextScores, read_text


@dataclass(frozen=True, eq=False)
class TextFeatures:
    """Reads h / √width of completions, inside compiled code; less that of a reference completion, if there is one.

    The host decodes each completion and encodes it as the judged texts were, so that a text has one score, whatever the
    policy's tokens. The model runs in the compiled step; its result is a constant for gradients.
    """

    scores: TextScores
    reference: str | None = None  # the field of prompts' records that holds the reference completion

    def __call__(self, completions: Completions) -> Array:
        """Return features, [..., width].

        Raises:
            PreferenceError: a record has no reference completion, or a text is too long.
        """
        own = self._read(completions, None)
        return own if self.reference is None else own - self._read(completions, self.reference)

    def _read(self, completions: Completions, reference: str | None) -> Array:
        shape, room = completions.index.shape, self.scores.room
        out = [jax.ShapeDtypeStruct((*shape, room), dtype) for dtype in (jnp.int32, jnp.bool_)]
        given = (completions.index, completions.tokens, completions.mask)
        tokens, mask = host_call(lambda *arrays: self._encode(completions.examples, reference, *arrays), out, *given)
        arrays, rest = eqx.partition(self.scores.body, eqx.is_array)
        body = eqx.combine(lax.stop_gradient(arrays), rest)
        read = jax.vmap(lambda tokens, mask: read_text(body, tokens, mask))
        return read(tokens.reshape(-1, room), mask.reshape(-1, room)).reshape(*shape, -1)

    def _encode(
        self, examples: Examples, reference: str | None, index: np.ndarray, tokens: np.ndarray, mask: np.ndarray
    ) -> list[np.ndarray]:
        records = [examples[int(at)] for at in index.reshape(-1)]
        if reference is not None:
            lacking = [record for record in records if not isinstance(record.get(reference), str)]
            if lacking:
                raise PreferenceError(
                    f"reference={reference!r} is not a text in the record of prompt {lacking[0]['prompt']!r:.80}; give "
                    "every prompt one"
                )
            texts = [record[reference] for record in records]
        elif examples.tokenizer is None:
            rows = zip(tokens.reshape(-1, tokens.shape[-1]), mask.reshape(-1, mask.shape[-1]), strict=True)
            # The record of a prompt of ids holds them as numbers between blanks.
            given = [[int(number) for number in record["prompt"].split()] for record in records]
            items: list[dict[str, Any]] = [
                {"prompt": prompt, "completion": row[kept].tolist()}
                for prompt, (row, kept) in zip(given, rows, strict=True)
            ]
            return self._padded(items, index.shape)
        else:
            texts = decode_completions(examples, tokens, mask)
        items = [{"prompt": record["prompt"], "completion": text} for record, text in zip(records, texts, strict=True)]
        return self._padded(items, index.shape)

    def _padded(self, items: Sequence[dict[str, Any]], shape: tuple[int, ...]) -> list[np.ndarray]:
        """Encode as in inference, and pad to the model's context."""
        tokens, mask = self.scores.tokens_of(items)
        missing = self.scores.room - tokens.shape[-1]
        # Texts end at the right of a language model, and begin at the left of a classifier.
        pad = [(0, 0), (missing, 0) if isinstance(self.scores.body, CausalLM) else (0, missing)]
        room = (*shape, self.scores.room)
        return [np.pad(tokens, pad).astype(np.int32).reshape(room), np.pad(mask, pad).reshape(room)]

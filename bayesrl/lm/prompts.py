"""`Prompts` for a language model to continue, and its `Completions`."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import equinox as eqx
import jax
import numpy as np
from jax import Array
from jaxtyping import Bool, Int

from bayesrl.argument_types import Requirement
from bayesrl.arguments import Location, checked
from bayesrl.errors import LanguageModelError
from bayesrl.files.regular_files import read_file
from bayesrl.lm.tokenization import chat_templates as chats
from bayesrl.lm.tokenization.tokenizer import Tokenizer, pad_left
from bayesrl.value_checks import are_integers, format_value, is_count

type Example = Mapping[str, Any]
"""The record of one prompt: its text under `prompt`, and whatever a reward needs, such as an answer."""


NOT_COLUMNS = frozenset({"prompt", "input_ids", chats.MESSAGES, *chats.SETTINGS})
"""Fields of records that make the prompt."""


class Examples(Sequence[Example]):
    """The records behind prompts, and the tokenizer of the model, if prompts are texts; they compare by identity."""

    def __init__(self, rows: Sequence[Example], tokenizer: Tokenizer | None) -> None:
        self.rows, self.tokenizer = tuple(rows), tokenizer

    def __getitem__(self, index: Any) -> Any:
        return self.rows[index]

    def __len__(self) -> int:
        return len(self.rows)


def unread_fields(examples: Iterable[Example], read: Iterable[str]) -> list[str]:
    """Return the fields of records that make no prompt and are not among those that are read."""
    rows = list(examples)
    given = {str(name) for row in rows for name in row if name not in NOT_COLUMNS}
    # The answer at the end of a conversation came out of `messages`.
    given -= {"answer"} if any(chats.MESSAGES in row for row in rows) else set()
    return sorted(given.difference(read))


_NUMBERED = Requirement(
    "a list of whole numbers, or an array [number] of them",
    lambda chosen: np.shape(chosen) == (0,) or (are_integers(chosen) and np.ndim(chosen) == 1),
    any_type=True,
)


class Prompts(eqx.Module):
    """Prompts as tokens, padded on the left so that all end at the same place.

    Args:
        tokens: [prompts, longest].
        mask: True for tokens that are not padding, [prompts, longest].
        examples: the records that they were made from.
    """

    tokens: Int[Array, "prompts longest"]
    mask: Bool[Array, "prompts longest"]
    # Static fields are hashed, as dictionaries cannot be; so `Examples` hashes by identity.
    examples: Examples = eqx.field(static=True)

    def __len__(self) -> int:
        return int(self.tokens.shape[0])

    def __iter__(self) -> Iterator[Example]:
        return iter(self.examples)

    @checked(LanguageModelError)
    def take(self, indices: Annotated[Any, _NUMBERED]) -> "Prompts":
        """Take some prompts, by number."""
        index = np.asarray(indices, int)
        if index.size and not 0 <= index.min() <= index.max() < len(self):
            raise LanguageModelError(
                f"Prompts.take got indices={format_value(indices)}; use numbers from 0 to {len(self) - 1}"
            )
        rows = [self.examples[i] for i in index.tolist()]
        tokens, mask = np.asarray(self.tokens)[index], np.asarray(self.mask)[index]
        return _make_prompts(tokens, mask, Examples(rows, self.examples.tokenizer))

    @checked(LanguageModelError)
    def concatenate(self, others: "Prompts") -> "Prompts":
        """Append other prompts of the same model."""
        longest = max(self.tokens.shape[1], others.tokens.shape[1])
        tokens, mask = (
            np.concatenate([np.pad(np.asarray(x), [(0, 0), (longest - x.shape[1], 0)]) for x in pair])
            for pair in ((self.tokens, others.tokens), (self.mask, others.mask))
        )
        return _make_prompts(tokens, mask, Examples([*self.examples, *others.examples], self.examples.tokenizer))


class Completions(eqx.Module):
    """Completions of a policy, as rewards see them; all arrays share their leading axes.

    Args:
        index: the number of the prompt, [...].
        prompt: the prompt, padded on the left, [..., P].
        prompt_mask: True for its tokens that are not padding, [..., P].
        tokens: the new tokens, [..., T].
        mask: which tokens count: all up to and including the end of the text, [..., T].
        examples: the records behind the prompts.
    """

    index: Int[Array, "..."]
    prompt: Int[Array, "..."]
    prompt_mask: Bool[Array, "..."]
    tokens: Int[Array, "..."]
    mask: Bool[Array, "..."]
    examples: Examples = eqx.field(static=True)


_NO_KEYS = Requirement(
    "a list of texts, of records with a prompt, or of rows of tokens",
    lambda texts: "key" not in str(getattr(texts, "dtype", "")),
    any_type=True,
)


@checked(LanguageModelError)
def encode_prompts(texts: Annotated[Any, _NO_KEYS], tokenizer: Tokenizer | None = None) -> Prompts:
    """Make prompts from texts, conversations, records with either, or token ids.

    A text without tokens becomes the token that begins texts, or else the one that ends them, because a model needs
    something to continue.

    Args:
        texts: texts; records, each a mapping with the text under `prompt` and whatever rewards need; token ids, in
            lists of any lengths or as whole numbers [prompts, P]; or conversations, which the tokenizer's chat template
            writes: lists of messages `{"role": …, "content": …}`, under `prompt` or `messages`. A last message of the
            assistant is gone on with under `prompt`; under `messages` it is the answer that rewards may see.
        tokenizer: of the model; token ids do not need it, but text rewards do, to decode them.

    Raises:
        LanguageModelError: there are no prompts, or one is neither a text nor a record with one.

    Example:
        >>> from bayesrl.lm.tokenization.simple_tokenizers import char_tokenizer
        >>> asked = encode_prompts([{"prompt": "1+1=", "answer": "2"}, "12+1="], char_tokenizer("0123456789+="))
        >>> asked.tokens.shape, asked.examples[0]["answer"]
        ((2, 5), '2')
    """
    if isinstance(texts, Prompts):
        return texts
    if isinstance(texts, str | Mapping) or not isinstance(texts, Iterable):
        what = "one text, " if isinstance(texts, str) else "one record, " if isinstance(texts, Mapping) else ""
        raise LanguageModelError(f"encode_prompts got {what}{str(texts)[:60]!r}; pass a list of texts, or of records")
    if isinstance(texts, np.ndarray | Array):
        return _from_tokens(np.asarray(texts), tokenizer)
    prompts = list(texts)
    if not prompts:
        raise LanguageModelError("there are no prompts; pass at least one text (an empty one is fine)")
    rows, token_ids, in_chats = zip(
        *(_parse_prompt(text, index, tokenizer) for index, text in enumerate(prompts)), strict=True
    )
    if tokenizer is None and any(ids is None for ids in token_ids):
        raise LanguageModelError("prompts are texts, and the model has no tokenizer; pass one, or prompts as tokens")
    if tokenizer is None:
        return _make_prompts(*pad_left(token_ids, 0), Examples(rows, None))
    start = tokenizer.bos if tokenizer.bos is not None else tokenizer.eos
    encoded = _encode_texts(rows, token_ids, in_chats, tokenizer)
    if start is None and not all(encoded):
        raise LanguageModelError(
            "a prompt is empty, and the tokenizer has neither a bos nor an eos token to begin with; give it a text"
        )
    pad = tokenizer.pad if tokenizer.pad is not None else (start or 0)
    tokens, mask = pad_left([row or [start] for row in encoded], pad)  # type: ignore[list-item]
    return _make_prompts(tokens, mask, Examples(rows, tokenizer))


@checked(LanguageModelError)
def read_json_lines(path: Location) -> list[dict[str, Any]]:
    """Read records, one JSON object per line; skip empty lines.

    Raises:
        LanguageModelError: the file cannot be read, or a line is not a JSON object.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = (path := Path(folder) / "sums.jsonl").write_text('{"prompt": "1+1=", "answer": "2"}')
        ...     read_json_lines(path)
        [{'prompt': '1+1=', 'answer': '2'}]
    """
    try:
        content = read_file(Path(path), linked=True)
        if content is None:
            raise FileNotFoundError("there is no such file")
        # Not `splitlines`, which also cuts at U+2028 and others that JSON allows inside a text.
        lines = content.decode("utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise LanguageModelError(f"{path} cannot be read: {error}; pass a file of JSON lines in UTF-8") from error
    rows = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise LanguageModelError(
                f"line {number} of {path} is not JSON: {error}; write one object a line"
            ) from error
        if not isinstance(row, dict):
            raise LanguageModelError(f"line {number} of {path} holds a {type(row).__name__}; write one object a line")
        rows.append(row)
    return rows


def _encode_texts(
    rows: Sequence[Example], token_ids: Sequence[list[int] | None], in_chats: Sequence[bool], tokenizer: Tokenizer
) -> list[list[int]]:
    """Return the token ids of each prompt; a conversation already has the special tokens of its chat template."""
    result = [ids or [] for ids in token_ids]
    # Two batches rather than a call for each text, because the library encodes the texts of a batch in parallel.
    for special in (True, False):
        indices = [index for index, ids in enumerate(token_ids) if ids is None and in_chats[index] != special]
        encoded = tokenizer.encode([rows[index]["prompt"] for index in indices], special=special) if indices else []
        for index, ids in zip(indices, encoded, strict=True):
            result[index] = ids
    return result


def _from_tokens(tokens: np.ndarray, tokenizer: Tokenizer | None) -> Prompts:
    if tokens.ndim != 2 or not np.issubdtype(tokens.dtype, np.integer) or 0 in tokens.shape:
        raise LanguageModelError(
            f"prompts of shape {tokens.shape} and type {tokens.dtype}; pass whole numbers [prompts, tokens], at least "
            "one of each, or texts"
        )
    rows = [{"prompt": _decode_ids(row, tokenizer)} for row in tokens.tolist()]
    return _make_prompts(tokens, np.ones(tokens.shape, bool), Examples(rows, tokenizer))


def _decode_ids(ids: list[int], tokenizer: Tokenizer | None) -> str:
    """Return the text of token ids for rewards and reports, or the ids themselves without a tokenizer."""
    known = tokenizer is not None and all(0 <= index < 2**32 for index in ids)
    return tokenizer.decode([ids])[0] if tokenizer is not None and known else " ".join(map(str, ids))


def _make_prompts(tokens: np.ndarray, mask: np.ndarray, examples: Examples) -> Prompts:
    """Put prompts on the device without compiling anything."""
    return Prompts(jax.device_put(np.asarray(tokens, np.int32)), jax.device_put(np.asarray(mask, bool)), examples)


def _parse_prompt(text: Any, index: int, tokenizer: Tokenizer | None) -> tuple[Example, list[int] | None, bool]:
    """Return the record of a prompt, its token ids if it was given as such, and whether it is a conversation."""
    if isinstance(text, str):
        return {"prompt": text}, None, False
    ids = _as_token_ids(text)
    if ids is not None:
        return {"prompt": _decode_ids(ids, tokenizer)}, ids, False
    record = {"prompt": text} if chats.is_conversation(text) else text
    if isinstance(record, Mapping):
        if isinstance(record.get("prompt"), str):
            return record, None, False
        ids = _as_token_ids(record.get("prompt", record.get("input_ids")))
        if ids is not None:
            return {**record, "prompt": _decode_ids(ids, tokenizer)}, ids, False
        made = chats.render_prompt(record, tokenizer)
        if made is not None:
            return made, None, True
    raise LanguageModelError(
        f"prompt {index} is {text!r:.200}; pass a text, token ids, a list of messages, or a record with one of these "
        "under 'prompt'"
    )


def _as_token_ids(value: Any) -> list[int] | None:
    """Read token ids, [P]; None for anything else."""
    if isinstance(value, np.ndarray | Array):
        whole = value.ndim == 1 and np.issubdtype(value.dtype, np.integer)
    else:
        listed = isinstance(value, Sequence) and not isinstance(value, str)
        whole = listed and all(is_count(one, least=0) for one in value)
    return [int(index) for index in value] if whole else None

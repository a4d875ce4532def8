"""`Tokenizer`: texts to token ids and back."""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Int32

from bayesrl.arguments import Location, checked
from bayesrl.errors import LanguageModelError
from bayesrl.files.regular_files import write_file
from bayesrl.lm.tokenization.tokenizer_files import (
    CONFIG,
    GENERATION,
    SPECIAL,
    TEMPLATE,
    TOKENIZER,
    TOKENIZER_CONFIG,
    add_tokens,
    check_special_tokens,
    find_special_id,
    has_token,
    import_tokenizers,
    read_chat_template,
    read_content,
    read_eos_ids,
    read_json_object,
    token_text,
    without_prefix_space,
)
from bayesrl.value_checks import array_of

_MAX_TRIES = 16
"""How many words to try, to see whether a decoder puts blanks between them."""


@checked(LanguageModelError)
@dataclass(frozen=True, eq=False)
class Tokenizer:
    """A tokenizer of the `tokenizers` library, with its special tokens.

    Args:
        core: a `tokenizers.Tokenizer`; its own padding and truncation are not used.
        eos: id of the token that ends a text, or None.
        pad: id of the token that fills rows up, or None.
        bos: id of the token that begins a text, or None.
        generation: generation_config.json, as read, which may name further tokens that end a text; written back by
            `save_pretrained`.
        config: tokenizer_config.json, as read, with the chat template from wherever it was; `save` writes it back.
        special_map: special_tokens_map.json, as read; `save` writes it back.

    Raises:
        LanguageModelError: `core` is something else, or an id is not one of its tokens.

    Example:
        >>> from bayesrl.lm.tokenization.simple_tokenizers import char_tokenizer
        >>> tokenizer = char_tokenizer("hello")
        >>> rows = tokenizer.encode(["hole", "heel"])
        >>> tokenizer.decode(rows)
        ['hole', 'heel']
    """

    core: Any
    eos: int | None = None
    pad: int | None = None
    bos: int | None = None
    config: Mapping[str, Any] = field(default_factory=dict, repr=False)
    generation: Mapping[str, Any] = field(default_factory=dict, repr=False)
    special_map: Mapping[str, Any] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        if not isinstance(self.core, import_tokenizers().Tokenizer):
            raise LanguageModelError(
                f"Tokenizer got a {type(self.core).__name__}; pass a tokenizers.Tokenizer, or call Tokenizer.load"
            )
        for name in ("eos", "pad", "bos"):
            index = getattr(self, name)
            if index is not None and not has_token(self.core, index):
                raise LanguageModelError(
                    f"Tokenizer got {name}={index!r}, and has no such token among {self.vocab_size}; pass one it has"
                )

    @property
    def vocab_size(self) -> int:
        """Number of ids: one more than the largest."""
        # Not the number of tokens, because ids may have gaps.
        return 1 + max(self.core.get_vocab(with_added_tokens=True).values(), default=-1)

    @cached_property
    def eos_ids(self) -> tuple[int, ...]:
        """Ids of all tokens that end a text: those that generation_config.json or config.json names, and eos."""
        configured = self.generation.get("eos_token_id")
        listed = configured if isinstance(configured, list) else [configured]
        known = [int(index) for index in listed if index is not None and has_token(self.core, index)]
        return tuple(dict.fromkeys([*known, *([] if self.eos is None else [self.eos])]))

    @cached_property
    def digest(self) -> str:
        """A fingerprint of encoding and decoding, which is equal for tokenizers that do the same.

        It does not depend on `eos`, `pad` and `bos`.
        """
        settings = json.loads(self.core.to_str())
        # Padding and truncation are left out here because `_plain_core` turns them off.
        settings = {key: value for key, value in settings.items() if key not in ("version", "padding", "truncation")}
        return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]

    def encode(self, texts: Sequence[str], *, special: bool = True, continues: bool = False) -> list[list[int]]:
        """Return the token ids of each text.

        Args:
            texts: several texts.
            special: whether to add the tokens that a tokenizer puts around texts, such as its bos; a text that already
                begins with bos does not get another.
            continues: whether the texts follow others, as answers follow their prompts. They then get no blank at their
                beginning, where tokenizers like Llama 2's otherwise put one.

        Raises:
            LanguageModelError: `texts` is one text, or a text cannot be encoded: it has half of a surrogate pair, or a
                word unknown to a tokenizer without an unknown token.
        """
        if isinstance(texts, str):
            raise LanguageModelError(f"encode got one text, {texts[:20]!r}; pass a list of texts")
        batch = list(texts)
        try:
            rows = (self._without_prefix_space if continues else self._plain_core).encode_batch(
                batch, add_special_tokens=special
            )
        except Exception as error:  # the library raises nothing more special
            index, reason = self._find_error(batch, error)
            raise LanguageModelError(
                f"text {index} of {len(batch)}, {batch[index]!r:.60}, cannot be encoded: {reason}; mend or leave it out"
            ) from error
        # The text of a chat template already begins with bos.
        twice = [self.bos, self.bos] if special and self.bos is not None else None
        return [list(row.ids[1:] if row.ids[:2] == twice else row.ids) for row in rows]

    def _find_error(self, texts: list[str], error: Exception) -> tuple[int, str]:
        """Find the first text that cannot be encoded, and say why."""
        for index, text in enumerate(texts):
            if not isinstance(text, str):
                return index, f"it is a {type(text).__name__}"
            half = next((letter for letter in text if "\ud800" <= letter <= "\udfff"), None)
            if half is not None:
                return index, f"it holds {half!r}, which is half of a character"
            try:
                self._plain_core.encode(text)
            except Exception as own:  # noqa: BLE001
                return index, str(own)
        return 0, str(error)

    @cached_property
    def special_affixes(self) -> tuple[list[int], list[int]]:
        """Return the tokens that `encode` puts before and after a text, such as BERT's [CLS] and [SEP]."""
        plain, special = [self.encode(["a"], special=kind)[0] for kind in (False, True)]
        for at in range(len(special) - len(plain) + 1):
            if plain and special[at : at + len(plain)] == plain:
                return special[:at], special[at + len(plain) :]
        # The text is not found again between special tokens, so assume that one of them comes before it.
        return special[:1], special[1:]

    def decode(self, rows: Iterable[Any], *, skip_special: bool = True, continues: bool = False) -> list[str]:
        """Return the text of each row of token ids.

        Args:
            rows: lists or arrays of token ids.
            skip_special: whether to leave out special tokens, including padding.
            continues: whether rows follow other text, such as their prompts. A blank at their beginning then stays,
                which tokenizers like Llama 2's drop from the beginning of a text, and which those like BERT's put
                between words.

        Raises:
            LanguageModelError: `rows` is a single row.
        """
        batch = list(rows) if isinstance(rows, Iterable) and not isinstance(rows, str | bytes | Mapping) else [0]
        arrays = [array_of(row) for row in batch]
        if any(row.ndim != 1 or (row.size and row.dtype.kind not in "iu") for row in arrays):
            raise LanguageModelError("decode needs rows of token ids, [rows, length]; put a single row into a list")
        if any(row.size and not 0 <= row.min() <= row.max() < 2**32 for row in arrays):
            raise LanguageModelError("decode got an id that no token has; ids are whole numbers of 32 bits, from 0 on")
        lists = [row.astype(int).tolist() for row in arrays]
        if not continues or self._anchor is None:
            return self._plain_core.decode_batch(lists, skip_special_tokens=skip_special)
        token, text = self._anchor
        decoded = self._plain_core.decode_batch([[token, *row] for row in lists], skip_special_tokens=skip_special)
        return [whole[len(text) :] for whole in decoded]

    @cached_property
    def _anchor(self) -> tuple[int, str] | None:
        """Return a word and its text to decode others after; None if the beginning of a text loses nothing."""
        added = self._plain_core.get_added_tokens_decoder()
        pieces = sorted((index, piece) for piece, index in self._plain_core.get_vocab().items() if index not in added)
        marked = [index for index, piece in pieces if piece.startswith("\u2581")]
        plain = [index for index, piece in pieces if piece.isalnum()]
        # In some tokenizers a piece's own mark makes the blank; in others the decoder puts blanks between words.
        for word in [*marked[:1], *plain[:_MAX_TRIES]]:
            once, twice = self._plain_core.decode_batch([[word], [word, word]])
            # More than two words' length: there is a blank between them.
            if len(twice) > 2 * len(once) and twice.startswith(once):
                return word, once
        return None

    @cached_property
    def _without_prefix_space(self) -> Any:
        """A copy of the core that puts no blank before a text."""
        settings = json.loads(self._plain_core.to_str())
        for part in ("normalizer", "pre_tokenizer"):
            settings[part] = without_prefix_space(settings.get(part))
        return import_tokenizers().Tokenizer.from_str(json.dumps(settings))

    @cached_property
    def _plain_core(self) -> Any:
        """A copy of the core that neither pads nor truncates; the core itself belongs to its maker."""
        copy = import_tokenizers().Tokenizer.from_str(self.core.to_str())
        copy.no_padding()
        copy.no_truncation()
        return copy

    def save(self, folder: Location) -> None:
        """Write tokenizer.json and tokenizer_config.json, and a chat template beside them, as transformers reads them.

        Raises:
            LanguageModelError: the folder cannot be written.
        """
        path = Path(folder)
        settings: dict[str, Any] = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
            **self.config,
        }
        named = dict(self.special_map)
        for name, index in self.special.items():
            key, token = f"{name}_token", self.core.id_to_token(index)
            # Keep an entry that also says how to cut the token out of a text.
            settings[key] = settings[key] if token_text(settings.get(key)) == token else token
            if key in named and token_text(named[key]) != token:
                named[key] = token
        template = settings.pop("chat_template") if isinstance(settings.get("chat_template"), str) else None
        files = {} if template is None else {TEMPLATE: template}
        files |= {
            TOKENIZER: self.core.to_str(pretty=True),
            TOKENIZER_CONFIG: json.dumps(settings, indent=1, ensure_ascii=False),
        }
        files |= {SPECIAL: json.dumps(named, indent=1, ensure_ascii=False)} if named else {}
        try:
            path.mkdir(parents=True, exist_ok=True)
            for name, text in files.items():
                write_file(path / name, text.encode())
        except OSError as error:
            raise LanguageModelError(f"cannot write a tokenizer to {path}: {error}; choose another folder") from error

    @property
    def special(self) -> dict[str, int]:
        """The ids of eos, pad and bos that exist, by name."""
        ids = {"eos": self.eos, "pad": self.pad, "bos": self.bos}
        return {name: index for name, index in ids.items() if index is not None}

    @classmethod
    def load(cls, folder: Location) -> "Tokenizer":
        """Read a tokenizer from a folder.

        The special tokens are those in tokenizer_config.json, else in special_tokens_map.json, else the ids in
        generation_config.json or config.json.

        Args:
            folder: has at least tokenizer.json.

        Raises:
            LanguageModelError: tokenizer.json is missing or damaged; or tokenizer_config.json names special tokens that
                it lacks, or adds tokens with ids that they cannot have.
        """
        path = Path(folder)
        content = read_content(path / TOKENIZER)
        if content is None:
            raise LanguageModelError(
                f"{path} has no {TOKENIZER}; load the tokenizer in transformers (a fast one) and save it there with "
                "save_pretrained"
            )
        try:
            core = import_tokenizers().Tokenizer.from_str(content.decode())
        except Exception as error:  # the library raises nothing more special
            raise LanguageModelError(f"cannot read {path / TOKENIZER}: {error}; copy it anew") from error
        named = [read_json_object(path / name) or {} for name in (TOKENIZER_CONFIG, SPECIAL)]
        core = add_tokens(core, named[0], path)
        check_special_tokens(core, named, path)
        numbered = [read_json_object(path / name) or {} for name in (GENERATION, CONFIG)]
        config = dict(named[0])
        template = read_chat_template(path, config.get("chat_template"))
        config |= {} if template is None else {"chat_template": template}
        special = {name: find_special_id(core, name, named, numbered) for name in ("eos", "pad", "bos")}
        ends = read_eos_ids(numbered, path)
        # Ends that config.json alone lists join the generation settings, where `eos_ids` looks for them.
        complete = numbered[0].get("eos_token_id") is not None or ends is None or ends == [special["eos"]]
        generation = numbered[0] if complete else numbered[0] | {"eos_token_id": ends}
        return cls(core, **special, config=config, generation=generation, special_map=named[1])


def pad_left(
    rows: Sequence[Sequence[int]], pad: int, *, length: int | None = None
) -> tuple[Int32[np.ndarray, "rows length"], Bool[np.ndarray, "rows length"]]:
    """Pad rows on the left, so that all end at the same place.

    Args:
        rows: token ids, of unequal lengths.
        pad: the id to pad with.
        length: of the result's rows; None means that of the longest.

    Returns:
        Token ids, and which of them are real, [rows, length].

    Example:
        >>> tokens, mask = pad_left([[5, 6, 7], [8]], 0)
        >>> tokens.tolist(), mask.sum(1).tolist()
        ([[5, 6, 7], [0, 0, 8]], [3, 1])
    """
    longest = max(map(len, rows), default=0)
    if longest == 0:
        raise LanguageModelError("pad_left got no tokens; pass at least one row with a token in it")
    width = longest if length is None else length
    if width < longest:
        raise LanguageModelError(f"pad_left got a row of {longest} tokens for length={width}; shorten it")
    tokens, mask = np.full((len(rows), width), pad, np.int32), np.zeros((len(rows), width), bool)
    for index, row in enumerate(rows):
        tokens[index, width - len(row) :], mask[index, width - len(row) :] = row, True
    return tokens, mask

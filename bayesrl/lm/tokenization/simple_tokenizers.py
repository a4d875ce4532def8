"""Make small tokenizers on the spot: of characters, of bytes, or of frequent byte pairs."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any

import numpy as np

from bayesrl.argument_types import Requirement
from bayesrl.arguments import Count, checked, user_code
from bayesrl.errors import LanguageModelError
from bayesrl.lm.tokenization.tokenizer import Tokenizer
from bayesrl.lm.tokenization.tokenizer_files import import_tokenizers
from bayesrl.value_checks import format_value, is_valid_text

PAD, EOS, UNKNOWN = "<pad>", "<eos>", "<unk>"


@checked(LanguageModelError)
def char_tokenizer(text: str) -> Tokenizer:
    """Make a tokenizer with one token for each character of a text.

    Args:
        text: has every character to encode; others become <unk>.

    Returns:
        A tokenizer with the tokens <pad>, <eos>, <unk> and the characters in order.

    Raises:
        LanguageModelError: the text is empty.

    Example:
        >>> tokenizer = char_tokenizer("abc")
        >>> tokenizer.encode(["cab", "x"]), tokenizer.vocab_size
        ([[5, 3, 4], [2]], 6)
    """
    if not text:
        raise LanguageModelError("char_tokenizer got an empty text; pass one with every character that will be wanted")
    tk = import_tokenizers()
    vocabulary = {token: index for index, token in enumerate([PAD, EOS, UNKNOWN, *sorted(set(text))])}
    core = tk.Tokenizer(tk.models.WordLevel(vocabulary, unk_token=UNKNOWN))
    # `.` would not match the end of a line.
    core.pre_tokenizer = tk.pre_tokenizers.Split(tk.Regex(r"[\s\S]"), behavior="isolated")
    core.decoder = tk.decoders.Fuse()
    core.add_special_tokens([PAD, EOS, UNKNOWN])
    return Tokenizer(core, eos=vocabulary[EOS], pad=vocabulary[PAD])


@checked(LanguageModelError)
def byte_tokenizer() -> Tokenizer:
    """Make a tokenizer with one token for each byte of UTF-8; it encodes any text without unknown tokens.

    Returns:
        A tokenizer whose ids 0 to 255 are bytes, followed by <pad> and <eos>.

    Example:
        >>> byte_tokenizer().encode(["Aé"])
        [[65, 195, 169]]
    """
    tk = import_tokenizers()
    core = tk.Tokenizer(tk.models.BPE(vocab={letter: byte for byte, letter in enumerate(_byte_letters())}, merges=[]))
    return _with_bytes(core)


def _are_texts(value: Any) -> bool:
    if isinstance(value, str | bytes | Mapping | np.ndarray) or hasattr(value, "dtype"):
        return False
    return isinstance(value, Iterable) and not (isinstance(value, Sequence) and not all(map(is_valid_text, value)))


def _text(value: Any) -> str:
    if not is_valid_text(value):
        raise LanguageModelError(f"train_bpe got {format_value(value)} among the texts; use whole texts alone")
    return str(value)


_ARE_TEXTS = Requirement("a list of texts, or another iterable of them", _are_texts, any_type=True)


@checked(LanguageModelError)
def train_bpe(texts: Annotated[Iterable[str], _ARE_TEXTS], vocab_size: Count) -> Tokenizer:
    """Train a byte-pair tokenizer, with the bytes and the most frequent pairs of some texts.

    Args:
        texts: to learn from.
        vocab_size: total number of tokens: 256 bytes, <pad>, <eos>, and as many pairs as the texts have.

    Raises:
        LanguageModelError: `vocab_size` is too small for the bytes, or `texts` is one text or has other elements.

    Example:
        >>> train_bpe(["the cat", "the hat"], 260).vocab_size
        260

    References:
        Sennrich, Haddow & Birch (2016), "Neural machine translation of rare words with subword units", section 3.2.
    """
    if vocab_size < 258:
        raise LanguageModelError(f"train_bpe got vocab_size={vocab_size}; 256 bytes, <pad> and <eos> need 258")
    tk = import_tokenizers()
    core = tk.Tokenizer(tk.models.BPE())
    core.pre_tokenizer = tk.pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = sorted(_byte_letters())
    # <pad> and <eos> follow after training.
    trainer = tk.trainers.BpeTrainer(vocab_size=vocab_size - 2, initial_alphabet=alphabet, show_progress=False)
    with user_code("texts", LanguageModelError, "let them be an iterable of texts"):
        core.train_from_iterator((_text(one) for one in texts), trainer)
    return _with_bytes(core)


def _with_bytes(core: Any) -> Tokenizer:
    """Add the conversion from bytes to their letters and back, and the special tokens."""
    tk = import_tokenizers()
    core.pre_tokenizer = tk.pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = tk.decoders.ByteLevel()
    core.add_special_tokens([PAD, EOS])
    return Tokenizer(core, eos=core.token_to_id(EOS), pad=core.token_to_id(PAD))


def _byte_letters() -> list[str]:
    """Return the letter for each byte: the byte itself if it is printable, else a character above 255."""
    # This is GPT-2's table, which the library's ByteLevel has built in.
    seen = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    beyond = iter(range(0x100, 0x200))
    return [chr(byte if byte in seen else next(beyond)) for byte in range(0x100)]

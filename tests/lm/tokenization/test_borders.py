"""Where a completion meets its prompt, for tokenizers of every kind; and weights that stand in two places."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import tokenizers as tk
from safetensors.numpy import load_file, save_file

from bayesrl import lm
from bayesrl.errors import LanguageModelError

CORPUS = ["the cat sat on the mat", "the dog was great", "a cat was on a dog"] * 3
SPECIAL = ["<unk>", "</s>"]
UNKNOWN: dict[str, Any] = {"unk_token": SPECIAL[0]}


def trained(model: Any, trainer: Any, before: Any, decoder: Any, normalizer: Any = None, **options: Any) -> Any:
    core = tk.Tokenizer(model)
    core.pre_tokenizer = before
    if decoder is not None:
        core.decoder = decoder
    if normalizer is not None:
        core.normalizer = normalizer
    core.train_from_iterator(CORPUS, trainer(special_tokens=SPECIAL, show_progress=False, **options))
    return core


def metaspace(scheme: str) -> Any:
    before = tk.pre_tokenizers.Metaspace(prepend_scheme=scheme)
    return trained(
        tk.models.BPE(**UNKNOWN), tk.trainers.BpeTrainer, before,
        tk.decoders.Metaspace(prepend_scheme=scheme), vocab_size=60,
    )  # fmt: skip


def bytes_of(prefix: bool) -> Any:
    alphabet = tk.pre_tokenizers.ByteLevel.alphabet()
    return trained(
        tk.models.BPE(), tk.trainers.BpeTrainer, tk.pre_tokenizers.ByteLevel(add_prefix_space=prefix),
        tk.decoders.ByteLevel(), vocab_size=300, initial_alphabet=alphabet,
    )  # fmt: skip


def unigram() -> Any:
    return trained(
        tk.models.Unigram(), tk.trainers.UnigramTrainer, tk.pre_tokenizers.Metaspace(), tk.decoders.Metaspace(),
        vocab_size=50, **UNKNOWN,
    )  # fmt: skip


def word_pieces() -> Any:
    return trained(
        tk.models.WordPiece(**UNKNOWN), tk.trainers.WordPieceTrainer, tk.pre_tokenizers.BertPreTokenizer(),
        tk.decoders.WordPiece(), tk.normalizers.BertNormalizer(), vocab_size=60,
    )  # fmt: skip


def whole_words(decoder: Any = None) -> Any:
    model = tk.models.WordLevel(**UNKNOWN)
    return trained(model, tk.trainers.WordLevelTrainer, tk.pre_tokenizers.WhitespaceSplit(), decoder)


def byte_fallback() -> Any:
    pieces = [*SPECIAL, *(f"<0x{i:02X}>" for i in range(256)), *"▁thecasondmwgr", "▁t", "▁c"]
    core = tk.Tokenizer(
        tk.models.BPE(
            vocab={piece: i for i, piece in enumerate(pieces)}, merges=[("▁", "t"), ("▁", "c")], **UNKNOWN,
            byte_fallback=True, fuse_unk=True,
        )
    )  # fmt: skip
    core.normalizer = tk.normalizers.Sequence([tk.normalizers.Prepend("▁"), tk.normalizers.Replace(" ", "▁")])
    steps = [tk.decoders.Replace("▁", " "), tk.decoders.ByteFallback(), tk.decoders.Fuse()]
    core.decoder = tk.decoders.Sequence([*steps, tk.decoders.Strip(" ", 1, 0)])
    return core


KINDS: dict[str, Callable[[], Any]] = {
    "metaspace, always": lambda: metaspace("always"),
    "metaspace, first": lambda: metaspace("first"),
    "metaspace, never": lambda: metaspace("never"),
    "unigram": unigram,
    "byte fallback": byte_fallback,
    "bytes": lambda: bytes_of(False),
    "bytes behind a blank": lambda: bytes_of(True),
    "word pieces": word_pieces,
    "words": whole_words,
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_completion_is_read_as_what_stands_behind_its_prompt(kind: str) -> None:
    """Whatever is cut in two, anywhere: the text of all tokens is that of the first part and that of the second."""
    tokenizer = lm.Tokenizer(KINDS[kind](), eos=1, pad=1)
    for text in ("the cat sat on the mat", "a dog was great", "a cat"):
        tokens = tokenizer.encode([text])[0]
        whole = tokenizer.decode([tokens])[0]
        assert whole.strip() == text
        for cut in range(1, len(tokens)):
            before, after = tokenizer.decode([tokens[:cut]])[0], tokenizer.decode([tokens[cut:]], continues=True)[0]
            assert before + after == whole, (before, after)


@pytest.fixture(scope="module")
def model() -> Any:
    return lm.GPT2.init(jax.random.key(0), lm.GPT2Config(vocab_size=7, max_length=8, width=4, depth=1, heads=2))


def test_weights_that_stand_in_two_files_are_refused(tmp_path: Path, model: Any) -> None:
    lm.save_pretrained(tmp_path, model, max_shard_bytes=300)
    files = sorted(set(json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"].values()))
    first, last = (load_file(tmp_path / name) for name in (files[0], files[-1]))
    name = next(iter(first))
    save_file({**last, name: first[name] + 1}, tmp_path / files[-1])
    with pytest.raises(LanguageModelError, match=f"holds {name}, and so does {files[0]}"):
        lm.load_pretrained(tmp_path)


@pytest.mark.parametrize("dtype", [np.int32, np.bool_, np.complex64, np.uint8, np.int8])
def test_weights_that_are_no_floats_are_not_written(tmp_path: Path, model: Any, dtype: Any) -> None:
    odd = jax.tree.map(lambda leaf: np.asarray(leaf).astype(dtype), model)
    with pytest.raises(LanguageModelError, match=f"{np.dtype(dtype)}.*and weights are floats"):
        lm.save_pretrained(tmp_path, odd)
    assert not list(tmp_path.iterdir())

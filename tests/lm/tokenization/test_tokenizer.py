"""Tokenizers: there and back, saved and loaded, special tokens, padding."""

import ast
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import bayesrl
from bayesrl.errors import LanguageModelError
from bayesrl.lm.tokenization.simple_tokenizers import byte_tokenizer, char_tokenizer, train_bpe
from bayesrl.lm.tokenization.tokenizer import Tokenizer, pad_left

TEXTS = ["the cat sat", "on the mat, the hat\n", "Größe 3 ≤ π", "  two  spaces", ""]
MADE = {
    "characters": lambda: char_tokenizer("".join(TEXTS)),
    "bytes": byte_tokenizer,
    "pairs": lambda: train_bpe(TEXTS, 280),
}


@pytest.mark.parametrize("wrong", [-1, 99])
def test_ids_that_are_none_are_refused(wrong: int) -> None:
    with pytest.raises(LanguageModelError, match=f"Tokenizer got eos={wrong}, and has no such token among"):
        Tokenizer(char_tokenizer("ab").core, eos=wrong)


@pytest.mark.parametrize("name", MADE)
def test_there_and_back_and_saved(name: str, tmp_path: Path) -> None:
    tokenizer = MADE[name]()
    rows = tokenizer.encode(TEXTS)
    assert tokenizer.decode(rows) == TEXTS
    assert tokenizer.decode([np.array(row, np.int32) for row in rows]) == TEXTS
    assert max(map(max, rows[:-1])) < tokenizer.vocab_size
    tokenizer.save(tmp_path)
    again = Tokenizer.load(tmp_path)
    assert again.encode(TEXTS) == rows
    assert (again.eos, again.pad, again.bos, again.digest) == (tokenizer.eos, tokenizer.pad, None, tokenizer.digest)


def test_special_tokens_are_left_out_or_not() -> None:
    tokenizer = char_tokenizer("ab")
    rows = [[tokenizer.pad, *tokenizer.encode(["ab"])[0], tokenizer.eos]]
    assert tokenizer.decode(rows) == ["ab"]
    assert tokenizer.decode(rows, skip_special=False) == ["<pad>ab<eos>"]
    assert tokenizer.encode(["a<eos>"]) == [[3, tokenizer.eos]]


def test_digests_tell_tokenizers_apart() -> None:
    digests = [make().digest for make in MADE.values()]
    assert len(set(digests)) == 3
    assert digests == [make().digest for make in MADE.values()]
    core = char_tokenizer("ab").core
    assert Tokenizer(core, eos=1).digest == Tokenizer(core, pad=0).digest == char_tokenizer("ba").digest
    assert char_tokenizer("abc").digest != char_tokenizer("ab").digest
    padding = char_tokenizer("ab")
    before = padding.digest
    padding.core.enable_padding(length=5)
    assert Tokenizer(padding.core).digest == before
    assert Tokenizer(padding.core).encode(["ab"]) == [[3, 4]], "padding of the core is not used"


def test_pairs_shorten_texts() -> None:
    tokenizer = train_bpe(["the cat sat on the mat"] * 3, 270)
    assert tokenizer.vocab_size == 270
    assert len(tokenizer.encode(["the cat sat"])[0]) < len("the cat sat")
    assert byte_tokenizer().vocab_size == 258


@pytest.mark.parametrize(
    ("files", "wanted"),
    [
        ({"tokenizer_config.json": {"eos_token": "b", "pad_token": {"content": "<pad>"}}}, (4, 0, None)),
        ({"special_tokens_map.json": {"bos_token": "a"}}, (None, None, 3)),
        ({"generation_config.json": {"eos_token_id": [4, 3]}, "config.json": {"eos_token_id": 3}}, (4, None, None)),
        ({"config.json": {"eos_token_id": 3, "pad_token_id": 99}}, (3, None, None)),
    ],
)
def test_where_special_tokens_are_read(
    tmp_path: Path, files: dict[str, object], wanted: tuple[int | None, ...]
) -> None:
    char_tokenizer("ab").save(tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    for name, told in files.items():
        (tmp_path / name).write_text(json.dumps(told))
    read = Tokenizer.load(tmp_path)
    assert (read.eos, read.pad, read.bos) == wanted


@pytest.mark.parametrize("file", ["tokenizer_config.json", "special_tokens_map.json"])
@pytest.mark.parametrize("told", [{"eos_token": "<|eot|>"}, {"pad_token": {"content": "<fill>"}}, {"bos_token": "ab"}])
def test_a_special_token_that_is_named_and_not_there_is_refused(
    tmp_path: Path, file: str, told: dict[str, Any]
) -> None:
    char_tokenizer("ab").save(tmp_path)
    (tmp_path / file).write_text(json.dumps(told))
    with pytest.raises(LanguageModelError, match=f"{file} names .* as {next(iter(told))}, and tokenizer.json has no"):
        Tokenizer.load(tmp_path)


ADDED = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}


@pytest.mark.parametrize("special", [True, False])
@pytest.mark.parametrize("names", [["<|tool|>"], ["<|a|>", "<|b|>"], ["ab"]])
def test_tokens_that_only_the_configuration_adds(tmp_path: Path, names: list[str], special: bool) -> None:
    tokenizer = char_tokenizer("ab")
    tokenizer.save(tmp_path)
    first = tokenizer.vocab_size
    listed = {first + i: {"content": name, "special": special} | ADDED for i, name in enumerate(names)}
    told = {"eos_token": names[-1], "added_tokens_decoder": {0: {"content": "<pad>", "special": True}} | listed}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(told))
    read = Tokenizer.load(tmp_path)
    assert read.eos == first + len(names) - 1
    assert read.encode([f"b{names[0]}a"])[0] == [4, first, 3]
    read.save(tmp_path / "again")
    assert Tokenizer.load(tmp_path / "again").encode([names[0]]) == [[first]]


def test_added_tokens_of_another_tokenizer_are_refused(tmp_path: Path) -> None:
    char_tokenizer("ab").save(tmp_path)
    told = {"added_tokens_decoder": {"99": {"content": "<|tool|>", "special": True}}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(told))
    with pytest.raises(LanguageModelError, match=r"as id 99, which after those of tokenizer.json would be 5"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": {"5": "<|tool|>"}}))
    with pytest.raises(LanguageModelError, match="has no list of added tokens"):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize("text", ["<s>hi", "<s>", "<s>h<s>i", "hi"])
def test_a_text_that_begins_with_bos_gets_no_second_one(text: str) -> None:
    tk = pytest.importorskip("tokenizers")
    core = tk.Tokenizer(tk.models.BPE(vocab={"<s>": 0, "</s>": 1, "h": 2, "i": 3}, merges=[]))
    core.add_special_tokens(["<s>", "</s>"])
    core.post_processor = tk.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer = Tokenizer(core, eos=1, bos=0, pad=1)
    once = text if text.startswith("<s>") else f"<s>{text}"
    assert tokenizer.encode([text]) == tokenizer.encode([once], special=False)


@pytest.mark.parametrize(
    "told",
    [
        {"chat_template": "{{ messages }}"},
        {"chat_template": [{"name": "default", "template": "{{ messages }}"}]},
        {"model_max_length": 8, "padding_side": "left"},
        {"tokenizer_class": "LlamaTokenizerFast", "add_bos_token": True},
        {"additional_special_tokens": ["a"], "of_a_later_version": {"x": [1, None]}},
    ],
)
def test_settings_survive_a_round_trip(tmp_path: Path, told: dict[str, Any]) -> None:
    char_tokenizer("ab").save(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | told))
    Tokenizer.load(tmp_path).save(tmp_path / "again")
    template = tmp_path / "again" / "chat_template.jinja"
    kept = json.loads((tmp_path / "again" / "tokenizer_config.json").read_text())
    kept |= {"chat_template": template.read_text()} if template.exists() else {}
    assert {name: kept.get(name) for name in told} == told
    again = Tokenizer.load(tmp_path / "again")
    assert again.config == Tokenizer.load(tmp_path).config | {"eos_token": "<eos>", "pad_token": "<pad>"}


@pytest.mark.parametrize(
    ("text", "reason"),
    [("good \ud83d morning", "half of a character"), ("\udfff", "half of a character")],
)
@pytest.mark.usefixtures("unchecked")
def test_what_cannot_be_coded_is_named(text: Any, reason: str) -> None:
    with pytest.raises(LanguageModelError, match=f"text 1 of 3, .*cannot be encoded: .*{reason}"):
        byte_tokenizer().encode(["fine", text, "fine"])


@pytest.mark.usefixtures("unchecked")
def test_what_is_no_text_is_named() -> None:
    with pytest.raises(LanguageModelError, match="use a list of which each is a text, and not None"):
        byte_tokenizer().encode(["fine", None, "fine"])  # type: ignore[list-item]


def sentence_pieces(decoder: str) -> Tokenizer:
    """Make a tokenizer whose words carry the blank before them, as those of Llama 2 and Mistral do."""
    tk = pytest.importorskip("tokenizers")
    words = ["<s>", "</s>", "▁The", "▁movie", "▁was", "▁great", "ly", "▁"]
    core = tk.Tokenizer(tk.models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="</s>"))  # noqa: S106
    core.normalizer = tk.normalizers.Sequence([tk.normalizers.Prepend("▁"), tk.normalizers.Replace(" ", "▁")])
    core.pre_tokenizer = tk.pre_tokenizers.Split(tk.Regex("▁"), "merged_with_next")
    blanks = [tk.decoders.Replace("▁", " "), tk.decoders.Fuse(), tk.decoders.Strip(" ", 1, 0)]
    core.decoder = tk.decoders.Metaspace() if decoder == "Metaspace" else tk.decoders.Sequence(blanks)
    core.add_special_tokens(["<s>", "</s>"])
    return Tokenizer(core, eos=1, pad=1)


@pytest.mark.parametrize("decoder", ["Metaspace", "Strip"])
@pytest.mark.parametrize("row", [[4, 5], [5], [6], [6, 4], [7, 4], [], [1], [4, 1]])
def test_a_text_that_continues_another_keeps_its_blank(decoder: str, row: list[int]) -> None:
    tokenizer = sentence_pieces(decoder)
    whole, first = tokenizer.decode([[2, 3, *row], [2, 3]])
    assert whole == first + tokenizer.decode([row], continues=True)[0]
    assert byte_tokenizer().decode([[32, 65]], continues=True) == [" A"]


def test_an_unknown_word_is_named() -> None:
    tk = pytest.importorskip("tokenizers")
    core = tk.Tokenizer(tk.models.WordLevel({"a": 0, "</s>": 1}))
    core.pre_tokenizer = tk.pre_tokenizers.Whitespace()
    with pytest.raises(LanguageModelError, match="text 0 of 1, 'a b', cannot be encoded"):
        Tokenizer(core, eos=1).encode(["a b"])


def test_pad_left() -> None:
    tokens, mask = pad_left([[5, 6, 7], [8], []], 9, length=4)
    assert tokens.tolist() == [[9, 5, 6, 7], [9, 9, 9, 8], [9, 9, 9, 9]]
    assert mask.tolist() == [[False, True, True, True], [False, False, False, True], [False] * 4]
    assert (tokens.dtype, mask.dtype) == (np.int32, bool)


@pytest.mark.usefixtures("unchecked")
def test_bad_input(tmp_path: Path) -> None:
    tokenizer = char_tokenizer("ab")
    with pytest.raises(LanguageModelError, match="encode got texts='ab'; use a list of texts"):
        tokenizer.encode("ab")
    with pytest.raises(LanguageModelError, match="put a single row into a list"):
        tokenizer.decode([3, 4])
    with pytest.raises(LanguageModelError, match=r"got a str; pass a tokenizers.Tokenizer"):
        Tokenizer("gpt2")
    with pytest.raises(LanguageModelError, match="got eos=99, and has no such token among 5"):
        Tokenizer(tokenizer.core, eos=99)
    with pytest.raises(LanguageModelError, match="char_tokenizer got an empty text"):
        char_tokenizer("")
    with pytest.raises(LanguageModelError, match="vocab_size=100; 256 bytes, <pad> and <eos> need 258"):
        train_bpe(["a"], 100)
    with pytest.raises(LanguageModelError, match="train_bpe got texts='abc'; use a list of texts"):
        train_bpe("abc", 300)
    with pytest.raises(LanguageModelError, match=r"has no tokenizer.json; load the tokenizer in transformers"):
        Tokenizer.load(tmp_path)
    with pytest.raises(LanguageModelError, match="pad_left got no tokens"):
        pad_left([[]], 0)
    with pytest.raises(LanguageModelError, match="a row of 3 tokens for length=2; shorten it"):
        pad_left([[1, 2, 3]], 0, length=2)
    (tmp_path / "file").write_text("")
    with pytest.raises(LanguageModelError, match="cannot write a tokenizer"):
        tokenizer.save(tmp_path / "file")


def test_optional_libraries_are_imported_where_they_are_used() -> None:
    for path in Path(bayesrl.__file__).parent.rglob("*.py"):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = [getattr(node, "module", None), *(alias.name for alias in node.names)]
                assert not {"tokenizers", "huggingface_hub"} & set(names), f"{path}, line {node.lineno}"


FILES = ["generation_config.json", "config.json"]


@pytest.mark.parametrize(
    ("told", "wanted"), [([3, 1], (3, 1)), (3, (3, 1)), (1, (1,)), ([], (1,)), (-1, (1,)), (None, (1,))]
)
@pytest.mark.parametrize("file", FILES)
def test_every_token_that_ends_a_text(tmp_path: Path, file: str, told: Any, wanted: tuple[int, ...]) -> None:
    """As in transformers, either file may tell one or several; a text ends at the tokenizer's own eos too."""
    char_tokenizer("ab").save(tmp_path)
    (tmp_path / file).write_text(json.dumps({"eos_token_id": told}))
    assert Tokenizer.load(tmp_path).eos_ids == wanted


@pytest.mark.parametrize("told", ["1", [[1, 3]], [1.0], True, {"id": 1}, [None]])
@pytest.mark.parametrize("file", FILES)
def test_an_end_that_is_no_id_is_refused(tmp_path: Path, file: str, told: Any) -> None:
    char_tokenizer("ab").save(tmp_path)
    (tmp_path / file).write_text(json.dumps({"eos_token_id": told}))
    with pytest.raises(LanguageModelError, match=f"{file} sets eos_token_id=.*; set the id of a token there"):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize("told", [["<|tool|>"], {"image": "<|tool|>"}, [{"content": "<|tool|>"}]])
@pytest.mark.parametrize("name", ["additional_special_tokens", "extra_special_tokens"])
def test_further_special_tokens_that_are_not_there_are_refused(tmp_path: Path, name: str, told: Any) -> None:
    """They were coded letter by letter."""
    char_tokenizer("ab").save(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({name: told}))
    with pytest.raises(LanguageModelError, match=rf"names '<\|tool\|>' as one of {name}, and tokenizer.json has no"):
        Tokenizer.load(tmp_path)


def test_added_tokens_of_earlier_versions(tmp_path: Path) -> None:
    char_tokenizer("ab").save(tmp_path)
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<pad>": 0, "<|tool|>": 5}))
    assert Tokenizer.load(tmp_path).encode(["a<|tool|>b"]) == [[3, 5, 4]]
    for wrong in ({"<|tool|>": 9}, {"<|tool|>": "x"}, {"<|tool|>": None}):
        (tmp_path / "added_tokens.json").write_text(json.dumps(wrong))
        with pytest.raises(LanguageModelError, match=r"added_tokens\.json"):
            Tokenizer.load(tmp_path)
    for listed in ({"x": {"content": "<|tool|>"}}, {"5": {"special": True}}):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": listed}))
        with pytest.raises(LanguageModelError, match="has no list of added tokens"):
            Tokenizer.load(tmp_path)

"""What people prompt with, conversations and token ids; blanks where a prompt meets its answer; settings of sampling."""

import json
import logging
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bayesrl import lm
from bayesrl.errors import LanguageModelError
from bayesrl.lm.checkpoints.pretrained import load_pretrained, save_pretrained
from bayesrl.lm.prompts import Completions
from bayesrl.lm.tokenization import chat_templates as chats
from bayesrl.lm.tokenization.tokenizer import Tokenizer
from bayesrl.lm.tokenization.tokenizer_files import import_tokenizers

GOLDEN = Path(__file__).parents[1] / "golden"
USER, REPLY = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}
TALK = [USER, REPLY, USER, REPLY]
CHATML = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}<eos>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


PIECES = "▁ h i o ▁hi ▁ho hi ho : 4 ▁4 <user> <assistant>"


def words(kind: str) -> Tokenizer:
    """Make a tokenizer that marks the beginning of words as SentencePiece does, in each way that files have it."""
    tk = import_tokenizers()
    vocabulary = {piece: at for at, piece in enumerate(["<pad>", "<eos>", "<s>", "<unk>", *PIECES.split(" ")])}
    merges = [("h", "i"), ("h", "o"), ("▁", "hi"), ("▁", "ho"), ("▁", "4")]
    core = tk.Tokenizer(tk.models.BPE(vocabulary, merges, unk_token="<unk>"))  # noqa: S106
    if kind == "prepend":
        core.normalizer = tk.normalizers.Sequence([tk.normalizers.Prepend("▁"), tk.normalizers.Replace(" ", "▁")])
    else:
        core.pre_tokenizer = tk.pre_tokenizers.Metaspace(prepend_scheme=kind, split=False)
    core.decoder = tk.decoders.Sequence(
        [tk.decoders.Replace("▁", " "), tk.decoders.Fuse(), tk.decoders.Strip(" ", 1, 0)]
    )
    core.add_special_tokens(["<pad>", "<eos>", "<s>", "<unk>", "<user>", "<assistant>"])
    return Tokenizer(core, eos=1, pad=0, bos=2)


def model(tokenizer: Tokenizer, **more: Any) -> lm.Pretrained:
    config = lm.GPT2Config(vocab_size=tokenizer.vocab_size, max_length=64, width=4, depth=1, heads=1)
    return lm.Pretrained(lm.GPT2.init(jax.random.key(0), config), tokenizer, **more)


# ---- conversations -----------------------------------------------------------------------------


@pytest.mark.parametrize("case", json.loads((GOLDEN / "chats.json").read_text()))
def test_conversations_are_written_as_by_transformers(case: dict[str, Any]) -> None:
    pytest.importorskip("jinja2")
    tokenizer = load_pretrained(GOLDEN / "gpt2").tokenizer
    assert tokenizer is not None
    core = tokenizer.core
    ours = Tokenizer(
        core,
        eos=core.token_to_id("<eos>"),
        pad=0,
        bos=core.token_to_id("<unk>"),
        config={"chat_template": case["template"]},
    )
    record = {key: value for key, value in case.items() if key not in ("template", "text", "whole")}
    made = chats.render_prompt(record, ours)
    assert made is not None
    assert made["prompt"] == case["text"]
    if "whole" in case:
        assert made["prompt"] + chats.render_answer(made, made["answer"], ours) == case["whole"]


def talking() -> Tokenizer:
    return Tokenizer(words("first").core, eos=1, pad=0, bos=2, config={"chat_template": CHATML})


@pytest.mark.parametrize(
    "record",
    [[USER], {"prompt": [USER]}, {"messages": [USER]}, {"messages": [USER, REPLY]}, {"prompt": [USER], "x": 1}],
)
def test_conversations_are_prompts(record: Any) -> None:
    pytest.importorskip("jinja2")
    tokenizer = talking()
    asked = lm.encode_prompts([record, "hi"], tokenizer)
    assert asked.examples[0]["prompt"] == "<user>hi<eos><assistant>"
    # The template has put there what belongs around a conversation.
    assert tokenizer.decode([np.asarray(asked.tokens[0])[np.asarray(asked.mask[0])]], skip_special=False) == [
        "<user>hi<eos><assistant>"
    ]
    if isinstance(record, dict) and record.get("messages") == [USER, REPLY]:
        assert asked.examples[0]["answer"] == [REPLY]
    lm.policy(model(tokenizer), [record], reward=lambda text, example: len(text), max_new_tokens=2)


@pytest.mark.parametrize(
    "record", [{"messages": TALK}, {"prompt": TALK[:3], "answer": [REPLY]}, {"prompt": TALK[:3], "completion": [REPLY]}]
)
def test_conversations_are_pairs(record: Any) -> None:
    pytest.importorskip("jinja2")
    tokenizer = talking()
    answer = "completion" if "completion" in record else "answer"
    program = lm.sft(model(tokenizer), [record], answer=answer)
    # The template writes the end itself, and nothing follows it.
    ids = np.asarray(program.tokens[0]).tolist()
    assert ids[-1] == tokenizer.eos
    assert ids.count(tokenizer.eos) == 1
    assert tokenizer.decode([ids], continues=True) == ["ho"]


def test_conversations_that_cannot_be_written() -> None:
    with pytest.raises(LanguageModelError, match="has no tokenizer with a chat template"):
        lm.encode_prompts([[USER]])
    with pytest.raises(LanguageModelError, match=r"no chat template; pass texts.*chat_template.jinja"):
        lm.encode_prompts([[USER]], words("first"))
    pytest.importorskip("jinja2")
    for template, message in (
        ("{{ raise_exception('no system here') }}", "refuses the conversation: no system here"),
        ("{% for m in messages %}", "cannot be read: .*in line 1"),
        ("{{ messages[0].content.nowhere.at.all }}", "cannot write a conversation of 1 message: UndefinedError"),
        ("{{ ''.__class__.__mro__ }}", "cannot write a conversation of 1 message: SecurityError"),
        ("{{ messages.append(1) }}", "cannot write a conversation of 1 message: SecurityError"),
    ):
        with pytest.raises(LanguageModelError, match=message):
            lm.encode_prompts([[USER]], Tokenizer(words("first").core, eos=1, config={"chat_template": template}))


def written(template: Any, messages: list[Any], **record: Any) -> str:
    ours = Tokenizer(words("first").core, eos=1, config={"chat_template": template})
    return chats.render_conversation(ours, messages, record)


SAYS = "{% for m in messages %}[{{ m.content }}]{% endfor %}"


@pytest.mark.parametrize(
    ("template", "messages", "text"),
    [
        ("{{ messages[0] | tojson(ensure_ascii=True) }}", [{"role": "é"}], '{"role": "\\u00e9"}'),
        ("{{ messages[0] | tojson(separators=(',', ':')) }}", [{"role": "é", "a": 1}], '{"role":"é","a":1}'),
        ("{{ messages[0] | tojson(sort_keys=True) }}", [{"role": "b", "a": [1.0]}], '{"a": [1.0], "role": "b"}'),
        ("{{ messages[0] | tojson(indent=1) }}", [{"role": "<b>"}], '{\n "role": "<b>"\n}'),
        ("{{ messages[0] | tojson(False, 1, (',', ':'), True) }}", [{"role": "b", "a": 0}], '{\n "a":0,\n "role":"b"\n}'),
        (SAYS, [USER, {"role": "assistant", "content": None, "tool_calls": [1]}, {"role": "tool", "content": "r"}], "[hi][][r]"),
        ("{{ 'tool_calls' in messages[0] }}", [{"role": "user", "content": "x", "tool_calls": None}], "False"),
        (SAYS, [USER, {"role": "assistant", "content": "yes "}], "[hi][yes "),
        ("{% for m in messages %}[{{ m.content | trim }}]{% endfor %}", [USER, {"role": "assistant", "content": "yes "}], "[hi][yes"),
        (SAYS, [{"role": "user", "content": "yes"}, {"role": "assistant", "content": ""}], "[yes]["),
        (SAYS + "[yes]", [{"role": "user", "content": "yes"}, {"role": "assistant", "content": "yes"}], "[yes][yes"),
        (
            "{% for m in messages %}{% for b in m.content %}{{ b.text }};{% endfor %}{% endfor %}",
            [{"role": "assistant", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}],
            "a;b",
        ),
    ],
)  # fmt: skip
def test_conversations_are_written_as_transformers_writes_them(template: str, messages: Any, text: str) -> None:
    """Texts as apply_chat_template of transformers 5.24 gives them, a last message of the assistant gone on with."""
    pytest.importorskip("jinja2")
    assert written(template, messages) == text


def test_messages_that_cannot_be_gone_on_with() -> None:
    pytest.importorskip("jinja2")
    for template, said, message in (
        ("{{ messages[0].content }}", "yes", "leaves the last message out"),
        (SAYS, 5, "the last message says 5, which is not a text"),
        (SAYS, [{"type": "image"}], "which is not a text that could be continued"),
        (SAYS, {"text": "a"}, "which is not a text"),
    ):
        with pytest.raises(LanguageModelError, match=message):
            written(template, [USER, {"role": "assistant", "content": said}])


@pytest.mark.parametrize(
    ("files", "told", "wanted", "with_tools"),
    [
        ({"chat_template.jinja": "J"}, "C", "J", "J"),
        ({"chat_template.json": '{"chat_template": "O"}'}, None, "O", "O"),
        ({"chat_template.json": '{"chat_template": "O"}'}, "C", "C", "C"),
        ({"chat_template.jinja": "J", "additional_chat_templates/tool_use.jinja": "T"}, None, "J", "T"),
        ({"chat_template.jinja": "J", "additional_chat_templates/rag.jinja": "R"}, None, "J", "J"),
        ({"additional_chat_templates/tool_use.jinja": "T"}, "C", "C", "T"),
        ({}, [{"name": "default", "template": "D"}, {"name": "tool_use", "template": "T"}], "D", "T"),
    ],
)
def test_templates_are_found_wherever_they_lie(
    tmp_path: Path, files: dict[str, str], told: Any, wanted: str, with_tools: str
) -> None:
    pytest.importorskip("jinja2")
    words("first").save(tmp_path / "first")
    (tmp_path / "first" / "additional_chat_templates").mkdir()
    for name, text in files.items():
        (tmp_path / "first" / name).write_text(text)
    if told is not None:
        path = tmp_path / "first" / "tokenizer_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": told}))
    read = Tokenizer.load(tmp_path / "first")
    read.save(tmp_path / "again")
    for one in (read, Tokenizer.load(tmp_path / "again")):
        assert chats.render_conversation(one, [USER]) == wanted
        assert chats.render_conversation(one, [USER], {"tools": [{"name": "f"}]}) == with_tools


# ---- token ids ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "ids",
    [
        [[5, 6, 7], [8]],
        [np.array([5, 6, 7]), np.array([8])],
        [(5, 6, 7), jnp.array([8])],
        [{"prompt": [5, 6, 7], "answer": "x"}, {"input_ids": [8]}],
        [[5, 6, 7], {"prompt": np.array([8])}],
    ],
)
def test_token_ids_of_any_lengths_keep_their_tokenizer(ids: Any) -> None:
    tokenizer = lm.char_tokenizer("abcdefgh")
    asked = lm.encode_prompts(ids, tokenizer)
    assert asked.tokens.tolist() == [[5, 6, 7], [0, 0, 8]]
    assert asked.mask.tolist() == [[True] * 3, [False, False, True]]
    assert asked.examples.tokenizer is tokenizer
    assert [row["prompt"] for row in asked.examples] == ["cde", "f"]
    assert lm.encode_prompts(ids).mask.tolist() == asked.mask.tolist()
    # Rewards read texts, as of prompts that are texts.
    lm.policy(model(tokenizer), ids, reward=lambda text, example: 1.0 * len(text), max_new_tokens=1)


def test_an_array_of_tokens_keeps_its_tokenizer() -> None:
    tokenizer = lm.char_tokenizer("abcdefgh")
    asked = lm.encode_prompts(np.array([[5, 6], [7, 8]]), tokenizer)
    assert asked.examples.tokenizer is tokenizer
    assert [row["prompt"] for row in asked.examples] == ["cd", "ef"]
    for wrong in ([["a"]], [[1.5]], [{"prompt": 3}], [[True]]):
        with pytest.raises(LanguageModelError, match=r"prompt 0 is .*; pass a text, token ids, a list of messages"):
            lm.encode_prompts(wrong, tokenizer)


@pytest.mark.parametrize("ids", [[1, 5], [5, 1, 6], [5, 6], [1], [7, 7, 1]])
def test_rewards_may_ask_for_special_tokens(ids: list[int]) -> None:
    tokenizer = lm.char_tokenizer("abcdefgh")
    asked = lm.encode_prompts(["a"], tokenizer)
    tokens, index = jnp.asarray([ids]), jnp.array([0])
    written = Completions(index, asked.tokens, asked.mask, tokens, tokens > 0, asked.examples)
    plain, whole = (lm.rewards.text_reward(len, special=special)(written).tolist() for special in (False, True))
    letters = sum(one > 2 for one in ids)
    assert (plain, whole) == ([letters], [letters + len("<eos>") * ids.count(1)])


# ---- blanks ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["first", "always", "prepend"])
@pytest.mark.parametrize(
    ("prompt", "answer"), [("hi", "ho"), ("hi", " ho"), ("hi ", "ho"), ("hi:", "4"), ("hi: ", " 4")]
)
def test_an_answer_stands_directly_behind_its_prompt(kind: str, prompt: str, answer: str) -> None:
    tokenizer = words(kind)
    program = lm.sft(model(tokenizer), [{"prompt": prompt, "answer": answer}])
    before, after = (np.asarray(rows[0]).tolist() for rows in (program.prompts.tokens, program.tokens))
    assert tokenizer.decode([[*before, *after]]) == [prompt + answer]
    # What a policy that has learned it writes is read as the same text.
    assert tokenizer.decode([after], continues=True) == [answer]
    assert after[-1] == tokenizer.eos


def test_bytes_and_characters_are_coded_alike_behind_others() -> None:
    for tokenizer in (lm.char_tokenizer("abc "), lm.byte_tokenizer(), lm.train_bpe(["a cab"], 260)):
        for text in ("a", " a", "cab ", "  b", ""):
            assert tokenizer.encode([text], continues=True) == tokenizer.encode([text], special=False)


# ---- settings of sampling ----------------------------------------------------------------------


def options(generation: dict[str, Any], **given: Any) -> dict[str, Any]:
    made = lm.policy(model(lm.char_tokenizer("abc"), generation=generation), ["a"], reward=len, **given)
    names = ("num_steps", "temperature", "top_k", "top_p", "min_p")
    return {name: made.options[name] for name in names}


@pytest.mark.parametrize(
    ("generation", "given", "wanted"),
    [
        ({"temperature": 0.6, "top_p": 0.9, "max_new_tokens": 3, "do_sample": True}, {}, (3, 0.6, None, 0.9, 0.0)),
        ({"temperature": 0.6, "top_k": 2, "max_new_tokens": 3}, {}, (3, 0.6, 2, 1.0, 0.0)),
        ({"temperature": 0.6, "top_k": 2, "max_new_tokens": 3, "do_sample": False}, {}, (3, 1.0, None, 1.0, 0.0)),
        ({"max_length": 8}, {}, (7, 1.0, None, 1.0, 0.0)),
        ({"max_length": 8, "max_new_tokens": 2}, {}, (2, 1.0, None, 1.0, 0.0)),
        ({"temperature": None, "top_k": 0, "max_new_tokens": 3}, {}, (3, 1.0, None, 1.0, 0.0)),
        (
            {"temperature": 0.6, "top_k": 2, "top_p": 0.5, "max_new_tokens": 3},
            {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "max_new_tokens": 5},
            (5, 1.0, None, 1.0, 0.0),
        ),
        ({}, {"max_new_tokens": 4, "top_k": 3}, (4, 1.0, 3, 1.0, 0.0)),
        ({"min_p": 0.05, "temperature": 1.5, "max_new_tokens": 3}, {}, (3, 1.5, None, 1.0, 0.05)),
        ({"min_p": 0.05, "max_new_tokens": 3}, {"min_p": 0.0}, (3, 1.0, None, 1.0, 0.0)),
        ({"min_p": 0.05, "max_new_tokens": 3, "do_sample": False}, {}, (3, 1.0, None, 1.0, 0.0)),
        ({"min_p": None, "max_new_tokens": 3}, {"min_p": 0.2, "top_p": 0.5}, (3, 1.0, None, 0.5, 0.2)),
    ],
)
def test_settings_of_sampling_are_defaults(generation: Any, given: Any, wanted: tuple[Any, ...]) -> None:
    assert tuple(options(generation, **given).values()) == wanted


def test_settings_that_are_no_part_of_a_policy_are_told(caplog: pytest.LogCaptureFixture) -> None:
    plain = {
        "repetition_penalty": 1.0,
        "typical_p": 1,
        "suppress_tokens": None,
        "num_beams": 1,
        "transformers_version": "5",
    }
    with caplog.at_level(logging.WARNING):
        options(plain, max_new_tokens=2)
        assert caplog.text == ""
        changing = {
            "repetition_penalty": 1.05, "typical_p": 0.9, "no_repeat_ngram_size": 3, "bad_words_ids": [[3]],
            "forced_eos_token_id": 1, "stop_strings": ["b"], "num_beams": 4,
        }  # fmt: skip
        options({**plain, **changing}, max_new_tokens=2)
    for name, value in changing.items():
        assert f"{name}={value!r}" in caplog.text
    assert "which a policy does not have" in caplog.text
    for told, message in (
        ({}, "got no max_new_tokens, and the model has no generation_config.json"),
        ({"max_new_tokens": 0}, "generation_config.json sets max_new_tokens=0; set a whole number of at least 1"),
        (
            {"max_new_tokens": 2, "temperature": 0},
            "sets temperature=0; set a number above 0 there, or pass temperature=",
        ),
        ({"max_new_tokens": 2, "top_p": 2}, r"sets top_p=2; set a probability in \(0, 1\]"),
        ({"max_new_tokens": 2, "min_p": 2}, r"sets min_p=2; set a number in \[0, 1\]"),
        ({"max_new_tokens": 2, "top_k": "all"}, "sets top_k='all'; set a whole number, 0 for all"),
    ):
        with pytest.raises(LanguageModelError, match=message):
            options(told)


# ---- written back ------------------------------------------------------------------------------


def test_every_file_is_written_back(tmp_path: Path) -> None:
    tokenizer = lm.char_tokenizer("abc")
    save_pretrained(tmp_path / "first", model(tokenizer))
    folder = tmp_path / "first"
    blank = {"content": "<eos>", "lstrip": False, "normalized": False, "rstrip": True, "single_word": False}
    told: dict[str, dict[str, Any]] = {
        "special_tokens_map.json": {"eos_token": blank, "additional_special_tokens": ["<pad>"], "cls_token": "<unk>"},
        "tokenizer_config.json": {
            "eos_token": blank,
            "padding_side": "right",
            "model_max_length": 7,
            "of_a_later": [1],
        },
        "generation_config.json": {"temperature": 0.5, "of_a_later": {"a": None}, "eos_token_id": [1, 2]},
        "config.json": {"of_a_later": {"b": [1]}, "dropout": 0.25, "tie_word_embeddings": True},
    }
    for name, more in told.items():
        known = json.loads((folder / name).read_text()) if (folder / name).exists() else {}
        (folder / name).write_text(json.dumps({**known, **more}))
    (folder / "chat_template.jinja").write_text(CHATML)
    loaded = load_pretrained(folder)
    policy = lm.policy(loaded, ["a"], reward=len, max_new_tokens=2)
    assert policy.source is loaded
    save_pretrained(tmp_path / "second", loaded)
    for name, more in told.items():
        written = json.loads((tmp_path / "second" / name).read_text())
        assert {key: written.get(key) for key in more} == more, name
    assert (tmp_path / "second" / "chat_template.jinja").read_text() == CHATML


def test_settings_survive_without_a_tokenizer(tmp_path: Path) -> None:
    loaded = load_pretrained(GOLDEN / "mistral_window")
    assert loaded.generation["eos_token_id"] == 2
    save_pretrained(tmp_path, loaded)
    known, written = (
        json.loads((folder / "generation_config.json").read_text()) for folder in (GOLDEN / "mistral_window", tmp_path)
    )
    assert written == known
    assert json.loads((tmp_path / "config.json").read_text())["eos_token_id"] == 2

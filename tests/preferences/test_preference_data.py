"""Preferences as people have them: every form of record and file gives the same judgements, and nothing is lost."""

import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from bayesrl import preferences
from bayesrl.errors import PreferenceError
from bayesrl.preferences import PreferenceData, read

USER, GOOD, BAD = (
    {"role": role, "content": text} for role, text in (("user", "2+2?"), ("assistant", "4"), ("assistant", "5"))
)
EXPLICIT = [
    {"prompt": "2+2=", "chosen": " 4", "rejected": " 5", "annotator": "ann"},
    {"prompt": "2+2=", "chosen": " 4", "rejected": " 5", "annotator": "bob"},
    {"prompt": "2+2=", "chosen": " 5", "rejected": " four", "annotator": "ann"},
]


def told(data: PreferenceData) -> list[tuple[Any, ...]]:
    """What was judged, and how, whatever the order of items."""
    return [
        (
            *(data.names[at] for at in members),
            ranks.tolist(),
            data.annotators[who] if data.annotator is not None else None,
        )
        for members, ranks, who in zip(
            data.members,
            data.ranks,
            np.zeros(len(data), int) if data.annotator is None else data.annotator,
            strict=True,
        )
    ]


WANTED = [
    ("2+2= 4", "2+2= 5", [0, 1], "ann"),
    ("2+2= 4", "2+2= 5", [0, 1], "bob"),
    ("2+2= 5", "2+2= four", [0, 1], "ann"),
]


def test_repetitions_and_annotators_are_kept() -> None:
    data = read(EXPLICIT)
    assert told(data) == WANTED
    assert data.num_items == 3
    assert repr(data) == "PreferenceData(3 pairs, 3 items, 2 annotators)"
    assert data.records() == EXPLICIT
    assert told(data.take([2])) == WANTED[2:]
    assert data.take([2]).num_items == 3


def test_a_common_beginning_is_the_prompt() -> None:
    implicit = [
        {**{side: row["prompt"] + row[side] for side in ("chosen", "rejected")}, "annotator": row["annotator"]}
        for row in EXPLICIT
    ]
    data = read(implicit)
    assert told(data) == WANTED
    assert data.records() == EXPLICIT
    # One answer begins the other, or nothing is common: no answer becomes empty, and no word is cut.
    short, none, word = (
        read([{"chosen": chosen, "rejected": rejected}]).items
        for chosen, rejected in (("Say yes", "Say yes please"), ("Yes", "No"), ("It is true", "It is trust"))
    )
    assert [item["completion"] for item in short] == [" yes", " yes please"]
    assert list(none) == [{"completion": "Yes"}, {"completion": "No"}]
    assert [item["prompt"] for item in word] == ["It is", "It is"]


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]},
        {"chosen": [USER, GOOD], "rejected": [USER, BAD]},
        {"prompt": [USER], "chosen": [USER, GOOD], "rejected": [USER, BAD]},
        {"prompt": "2+2?", "chosen": [USER, GOOD], "rejected": [USER, BAD]},
        {"prompt": json.dumps([USER]), "chosen": json.dumps([GOOD]), "rejected": json.dumps([BAD])},
    ],
)
def test_conversations_have_one_form(record: Any) -> None:
    items = read([record]).items
    assert items == ({"prompt": [USER], "completion": [GOOD]}, {"prompt": [USER], "completion": [BAD]})


def test_answers_to_one_prompt_are_one_item_however_it_is_split() -> None:
    data = read([{"chosen": "Say it now", "rejected": "Say it later"}, {"chosen": "Say it now", "rejected": "Sing"}])
    assert data.num_items == 3


def test_labels_rankings_and_steps() -> None:
    labels = read([{"prompt": "a", "completion": "b", "label": value} for value in (True, 0, "false", 1.0)])
    assert labels.labels is not None
    assert (labels.kind, labels.num_items, labels.labels.tolist()) == ("labels", 1, [1, 0, 0, 1])
    answers = {"prompt": "a", "completions": ["x", "y", "z"]}
    rows = [answers, {**answers, "ranks": [2, 1, 2]}, {**answers, "scores": [0.1, 0.5, -2]}]
    rankings = read([*rows, {"prompt": "a", "completions": ["y", "x"]}])
    assert rankings.ranks.tolist() == [[0, 1, 2], [1, 0, 1], [1, 0, 2], [0, 1, -1]]
    assert (rankings.members[3].tolist(), rankings.num_ties) == ([1, 0, -1], 1)
    assert told(read(rankings.records())) == told(rankings)
    ratings = read([{"prompt": "a", "completion": "b", "score": value} for value in (4, "2.5")])
    assert ratings.ratings is not None
    assert (ratings.kind, ratings.num_items, ratings.ratings.tolist()) == ("ratings", 1, [4, 2.5])
    assert read(ratings.records()).records() == ratings.records()
    steps = read([{"prompt": "2·3+1?", "completions": ["2·3=6", "6+1=8"], "labels": [True, False]}])
    assert steps.labels is not None
    assert [item["prompt"] for item in steps.items] == ["2·3+1?", "2·3+1?2·3=6\n"]
    assert steps.labels.tolist() == [1, 0]


def test_ties_and_the_order_shown_are_kept() -> None:
    outcomes = [1, 0, 0.5, "first", "second", "tie"]
    shown = read([{"prompt": "p", "first": "a", "second": "b", "outcome": one} for one in outcomes])
    assert shown.shown
    assert shown.outcomes.tolist() == [1, 0, 0.5] * 2
    assert told(read(shown.records())) == told(shown)
    tied = read([{"prompt": "p", "chosen": "a", "rejected": "b", "tie": True}])
    assert (tied.outcomes.tolist(), tied.records()[0]["tie"]) == ([0.5], True)
    same = PreferenceData.of_pairs([0, 0, 0], [1, 1, 1], [1, 0, 0.5], shown=True)
    assert same.outcomes.tolist() == [1, 0, 0.5]


@pytest.mark.parametrize("ending", ["jsonl", "json", "csv", "tsv", "json lines", "wrapped", "columns"])
def test_files(tmp_path: Path, ending: str) -> None:
    columns = {name: [row[name] for row in EXPLICIT] for name in EXPLICIT[0]}
    lines = "\n".join(map(json.dumps, EXPLICIT))
    mark = "\t" if ending == "tsv" else ","
    cells = [mark.join(EXPLICIT[0]), *(mark.join(f'"{cell}"' for cell in row.values()) for row in EXPLICIT)]
    whole: Any = {"wrapped": {"version": 1, "data": EXPLICIT}, "columns": columns}.get(ending, EXPLICIT)
    text = (
        lines
        if ending in ("jsonl", "json lines")
        else "\n".join(cells)
        if ending in ("csv", "tsv")
        else json.dumps(whole)
    )
    path = tmp_path / f"pairs.{ending if ending in ('jsonl', 'csv', 'tsv') else 'json'}"
    path.write_text(text, encoding="utf-8")
    assert told(read(path)) == WANTED
    assert told(read(str(path))) == WANTED


def test_data_sets_and_frames() -> None:
    class Dataset:
        """As the `datasets` library has it: columns, and rows by iteration."""

        column_names = tuple(EXPLICIT[0])

        def __iter__(self) -> Any:
            return iter(EXPLICIT)

    pandas = pytest.importorskip("pandas")
    columns = {name: [row[name] for row in EXPLICIT] for name in EXPLICIT[0]}
    for source in (Dataset(), columns, pandas.DataFrame(EXPLICIT), iter(EXPLICIT)):
        assert told(read(source)) == WANTED
    with pytest.raises(PreferenceError, match=r"has the splits 'train', 'test'; pass one of them: dataset\['train'\]"):
        read({"train": Dataset(), "test": Dataset()})


def test_parquet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "pairs.parquet"
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(PreferenceError, match=r"install 'bayesrl\[parquet\]'"):
        read(path)
    # Its place is taken by what has the same two calls.
    parquet, table = ModuleType("pyarrow.parquet"), SimpleNamespace(to_pylist=lambda: EXPLICIT)
    vars(parquet)["read_table"] = lambda given: table if given == path else None
    package = ModuleType("pyarrow")
    vars(package)["parquet"] = parquet
    monkeypatch.setitem(sys.modules, "pyarrow", package)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", parquet)
    assert told(read(path)) == WANTED


def test_columns_have_other_names_and_none_is_ignored_in_silence() -> None:
    rows = [{"question": "p", "response_j": "a", "response_k": "b", "id": 7, "prompt": "else"}]
    columns = {"prompt": "question", "chosen": "response_j", "rejected": "response_k"}
    with pytest.warns(UserWarning, match=r"nothing reads the columns 'id', 'prompt'"):
        data = read(rows, columns=columns)
    assert (data.names, data.unread) == (["pa", "pb"], ("id", "prompt"))
    assert not read(rows, columns=columns, ignore=["id", "prompt"]).unread


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "p", "chosen": "a", "rejected": "a"}, "row 1: chosen and rejected are equal: 'a'"),
        ({"chosen": "the same", "rejected": "the same"}, "row 1: chosen and rejected are equal: 'the same'"),
        ({"chosen": [USER, GOOD], "rejected": [USER, GOOD]}, "chosen and rejected are equal"),
        ({"prompt": "p", "chosen": "a", "rejected": " "}, "row 1: rejected is empty"),
        ({"prompt": "p", "chosen": [{"role": "user", "content": ""}], "rejected": [BAD]}, "chosen is empty"),
        ({"prompt": "p", "chosen": "a"}, "row 1: rejected is missing"),
        ({"prompt": "p", "chosen": None, "rejected": "a"}, "row 1: chosen is missing"),
        ({"prompt": "p", "chosen": float("nan"), "rejected": "a"}, "row 1: chosen is missing"),
        ({"prompt": "p", "chosen": "a", "rejected": [1, 2]}, "chosen and rejected are of two kinds"),
        ({"prompt": "p", "chosen": 3, "rejected": "a"}, "chosen is 3; give a text, a list of messages"),
        ({"prompt": "other", "chosen": [USER, GOOD], "rejected": [USER, BAD]}, "do not begin with it"),
        ({"chosen": [USER], "rejected": [USER, BAD]}, "chosen is only the beginning of the other side"),
        ({"prompt": "p", "chosen": "a", "rejected": "b", "tie": "maybe"}, "tie is 'maybe'; labels are 0 or 1"),
        ({"prompt": "p", "chosen": "\ud800", "rejected": "b"}, "chosen holds half of a character"),
    ],
)
def test_bad_pairs_are_named_or_left_out(row: Any, message: str) -> None:
    fine = {"prompt": "p", "chosen": "a", "rejected": "b"}
    with pytest.raises(PreferenceError, match=f"1 of 2 rows cannot be used: .*{message}.*invalid='leave_out'"):
        read([fine, row])
    kept = read([fine, row], invalid="leave_out")
    assert (len(kept), list(kept.left_out)) == (1, [1])


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"completion": "a", "label": 2}], "label is 2; labels are 0 or 1"),
        ([{"completion": "a", "label": "yes"}], "label is 'yes'; labels are 0 or 1"),
        ([{"completion": "a", "label": None}], "label is missing"),
        ([{"completion": "", "label": 1}], "completion is empty"),
        ([{"completion": "a", "score": "good"}], "score is 'good'; give a finite number"),
        ([{"completion": "a", "score": None}], "score is missing"),
        ([{"first": "a", "second": "b", "outcome": 0.3}], "outcome is 0.3; labels are 0 or 1, 0.5 or 'tie' for a tie"),
        ([{"completions": ["a"]}], "has 1 of them, and a ranking needs two"),
        ([{"completions": ["a", "b", "a"]}], "completions 0 and 2 are equal: 'a'"),
        ([{"completions": ["a", "b"], "ranks": [1]}], "give one finite number for each of 2"),
        ([{"completions": ["a", "b"], "scores": [1, float("nan")]}], "give one finite number for each of 2"),
        ([{"completions": ["a", "b"], "labels": [1]}], "has 2 steps and labels 1"),
        ([{"completions": "a"}], "completions is 'a'; give a list"),
        ([{"prompt": "a"}], "have the columns 'prompt', which are no preferences; they need 'chosen' and 'rejected'"),
        ([{"text": "a"}], "name yours by columns="),
        ([], "there are no records"),
        (["a"], "row 0 is 'a'; every row is a mapping"),
        ({"chosen": "a", "rejected": "b"}, "read got one record with 'chosen', 'rejected'; pass a list of records"),
        ({"chosen": ["a"], "rejected": ["b", "c"]}, "columns differ in length: 'chosen' has 1, 'rejected' has 2"),
        (3, "read got 3; pass a path"),
        ("nowhere.jsonl", "nowhere.jsonl does not exist"),
        ("pairs.txt", "does not say what it holds; use a file of JSON lines"),
    ],
)
def test_bad_input_is_refused(rows: Any, message: str) -> None:
    with pytest.raises(PreferenceError, match=message):
        read(rows)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.jsonl", '{"chosen": "a"\n', "line 1 of .* is not JSON"),
        ("a.jsonl", "[1]\n", "line 1 of .* holds .*write one object a line"),
        ("a.json", "nothing", "is not JSON"),
        ("a.json", '{"a": 1}', "holds one object without one list of records"),
        ("a.csv", "chosen,rejected\na\n", "line 2 of .* has 1 cells, and the header 2"),
        ("a.csv", "chosen,chosen\na,b\n", "names a column twice"),
        ("a.csv", "chosen,rejected\n", "there are no records in"),
    ],
)
def test_bad_files_are_refused(tmp_path: Path, name: str, text: str, message: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(PreferenceError, match=message):
        read(tmp_path / name)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: read(EXPLICIT, columns={"winner": "chosen"}), "columns= names 'winner', which no form has"),
        (lambda: read(EXPLICIT, columns={"chosen": "winner"}), "there is no such column"),
        (lambda: read(EXPLICIT, ignore=["id"]), "ignore= names 'id', and the records have only"),
        (lambda: PreferenceData.of_pairs([0, 1], [1, 1]), "row 1 compares item 1 with itself"),
        (lambda: PreferenceData.of_pairs([0], [1], 0.3), "outcome holds 0.3"),
        (lambda: PreferenceData.of_pairs([0.5], [1]), "first must be whole numbers"),
        (lambda: PreferenceData.of_pairs([0], [3], num_items=2), "there is an item 3; use at least 4"),
        (lambda: PreferenceData.of_pairs([0, 1], [1]), r"first, second and outcome have 2, 1 and \[\] entries"),
        (lambda: PreferenceData.of_pairs([0], [1], [1, 0]), r"have 1, 1 and \[2\] entries; pass one of each"),
        (lambda: PreferenceData.of_pairs([0], [1], annotator=["a", "b"]), "annotator has 2 entries for 1 rows"),
        (lambda: PreferenceData.of_rankings([[0, 1, 0]]), "name two items or more, each once"),
        (lambda: PreferenceData.of_rankings([[0]]), "name two items or more"),
        (lambda: PreferenceData.of_labels([0, 1], [0, 2]), "label must be 0 or 1"),
        (lambda: PreferenceData.of_ratings([0, 1], [3]), r"rating has shape \(1,\) for 2 items"),
        (lambda: PreferenceData.of_pairs([0], [1]).take([1]), "take got rows from 1 to 1"),
        (lambda: PreferenceData.of_pairs([0, 1], [1, 2]).take([0.5]), "take needs a list of whole numbers"),
    ],
)
def test_bad_arguments_are_refused(call: Any, message: str) -> None:
    with pytest.raises(PreferenceError, match=message):
        call()


def test_the_room_has_few_names() -> None:
    assert len(preferences.__all__) <= 11

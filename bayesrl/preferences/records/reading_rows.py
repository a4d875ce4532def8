"""Rows of a file, of a data set of the `datasets` library, of a data frame or of lists, as dictionaries."""

import csv
import io
import json
from collections.abc import Iterable, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from bayesrl.errors import BayesRLError, PreferenceError
from bayesrl.files.regular_files import read_file
from bayesrl.value_checks import format_value

type Row = dict[str, Any]

_LONGEST_CELL = 2**27
_FORMATS = "JSON lines (.jsonl, .ndjson), JSON (.json), CSV (.csv), tab-separated values (.tsv) or Parquet (.parquet)"


def read_rows(source: Any) -> list[Row]:
    """Return the records of whatever holds them, each as a dictionary of its own.

    Args:
        source: the path of a file; a list or another iterable of mappings, such as a `datasets.Dataset`; a data frame;
            or a mapping from columns to lists of one length.

    Raises:
        PreferenceError: it is none of these, cannot be read, or holds nothing.
    """
    if isinstance(source, str | Path):
        rows = _read_file(Path(source))
    elif hasattr(source, "to_dict") and hasattr(source, "columns"):  # a data frame of pandas
        rows = source.to_dict("records")
    elif isinstance(source, Mapping):
        rows = _from_columns(source)
    elif isinstance(source, Iterable):
        rows = list(source)
    else:
        raise PreferenceError(
            f"read got {format_value(source)}; pass a path, a list of records, a data set, or lists by column"
        )
    for number, row in enumerate(rows):
        if not isinstance(row, Mapping):
            raise PreferenceError(f"row {number} is {format_value(row)}; every row is a mapping from columns to values")
    if not rows:
        raise PreferenceError(f"there are no records in {_name(source)}; pass at least one")
    return [{str(name): value for name, value in row.items()} for row in rows]


def _name(source: Any) -> str:
    return str(source) if isinstance(source, str | Path) else format_value(source)


def _from_columns(columns: Mapping[Any, Any]) -> list[Row]:
    """Turn lists by column into rows, and refuse a data set that is still in splits."""
    splits = [name for name, part in columns.items() if hasattr(part, "column_names") or hasattr(part, "columns")]
    if splits:
        listed = ", ".join(map(repr, splits))
        raise PreferenceError(f"the data set has the splits {listed}; pass one of them: dataset[{splits[0]!r}]")
    lists = {name: list(part) for name, part in columns.items() if _is_list(part)}
    if not columns or len(lists) < len(columns):
        raise PreferenceError(
            f"read got one record with {', '.join(map(repr, islice(columns, 8))) or 'nothing'}; pass a list of "
            "records, or a list for each column"
        )
    lengths = {name: len(part) for name, part in lists.items()}
    if len(set(lengths.values())) > 1:
        told = ", ".join(f"{name!r} has {length}" for name, length in lengths.items())
        raise PreferenceError(f"columns differ in length: {told}; give each one value for every row")
    return [dict(zip(lists, values, strict=True)) for values in zip(*lists.values(), strict=True)]


def _is_list(value: Any) -> bool:
    return isinstance(value, Iterable) and not isinstance(value, str | bytes | Mapping)


# ---- files -----------------------------------------------------------------------------------


def _read_file(path: Path) -> list[Row]:
    kind = path.suffix.lower()
    if kind in (".parquet", ".pq"):
        return _read_parquet(path)
    if kind not in (".jsonl", ".ndjson", ".json", ".csv", ".tsv"):
        raise PreferenceError(f"the name of {path} does not say what it holds; use a file of {_FORMATS}")
    text = _read_text(path)
    if kind in (".csv", ".tsv"):
        return _read_csv(text, path, "," if kind == ".csv" else "\t")
    return _read_json(text, path) if kind == ".json" else _read_json_lines(text, path)


def _read_text(path: Path) -> str:
    try:
        content = read_file(path, linked=True)
    except BayesRLError as error:
        raise PreferenceError(str(error)) from error
    if content is None:
        raise PreferenceError(f"{path} does not exist; pass the path of a file of {_FORMATS}")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise PreferenceError(f"{path} cannot be read: {error}; save it in UTF-8") from error


def _read_json_lines(text: str, path: Path) -> list[Row]:
    rows = []
    # Not `splitlines`, which also cuts at U+2028 and others that JSON allows inside a text.
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise PreferenceError(f"line {number} of {path} is not JSON: {error}; write one object a line") from error
        if not isinstance(row, dict):
            raise PreferenceError(f"line {number} of {path} holds {format_value(row)}; write one object a line")
        rows.append(row)
    return rows


def _read_json(text: str, path: Path) -> list[Row]:
    try:
        whole = json.loads(text)
    except ValueError as error:
        if text.lstrip().startswith("{") and "\n" in text.strip():  # lines of JSON, under the name of one document
            return _read_json_lines(text, path)
        raise PreferenceError(f"{path} is not JSON: {error}; write a list of objects") from error
    if isinstance(whole, dict):
        lists = [part for part in whole.values() if isinstance(part, list)]
        # Many files wrap the rows: {"version": …, "data": [{…}, …]}.
        wrapped = [part for part in lists if part and all(isinstance(row, dict) for row in part)]
        if len(lists) < len(whole) or len(whole) == 1:
            if len(wrapped) == 1:
                return list(wrapped[0])
            raise PreferenceError(f"{path} holds one object without one list of records; write a list of objects")
        return _from_columns(whole)
    if not isinstance(whole, list):
        raise PreferenceError(f"{path} holds {format_value(whole)}; write a list of objects")
    return whole


def _read_csv(text: str, path: Path, delimiter: str) -> list[Row]:
    before = csv.field_size_limit(_LONGEST_CELL)
    try:
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
        header = next(reader, [])
        rows = []
        for cells in reader:
            if not cells:
                continue
            if len(cells) != len(header):
                raise PreferenceError(
                    f"line {reader.line_num} of {path} has {len(cells)} cells, and the header {len(header)}; put texts "
                    "with delimiters or line breaks between quotes"
                )
            rows.append(dict(zip(header, cells, strict=True)))
    except csv.Error as error:
        raise PreferenceError(f"{path} is no CSV: {error}; put texts with line breaks between quotes") from error
    finally:
        csv.field_size_limit(before)
    if len(set(header)) < len(header):
        raise PreferenceError(f"{path} names a column twice: {', '.join(header)}; rename one of them")
    return rows


def _read_parquet(path: Path) -> list[Row]:
    try:
        from pyarrow import parquet
    except ImportError as error:
        raise PreferenceError(
            f"{path} is a Parquet file, for which pyarrow is not installed; install bayesrl with its extra: pip "
            "install 'bayesrl[parquet]'"
        ) from error
    try:
        rows: list[Row] = parquet.read_table(path).to_pylist()
    except Exception as error:  # pyarrow raises many kinds
        said = (str(error).splitlines() or [""])[0]
        raise PreferenceError(f"{path} cannot be read: {said:.200}; copy or write it anew") from error
    return rows

"""`read`: preferences from files, data sets and lists of records."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np

from bayesrl.arguments import checked
from bayesrl.display.formatting import pluralize
from bayesrl.errors import PreferenceError
from bayesrl.preferences.records.preference_data import PreferenceData, padded
from bayesrl.preferences.records.reading_rows import Row, read_rows
from bayesrl.preferences.records.record_formats import (
    COLUMNS,
    Format,
    Item,
    Judgement,
    Refusal,
    find_format,
    renamed,
    told_forms,
)

_MOST_NAMED = 8


@checked(PreferenceError)
def read(
    source: Any,
    *,
    columns: Mapping[str, str] | None = None,
    ignore: Sequence[str] = (),
    invalid: Literal["raise", "leave_out"] = "raise",
) -> PreferenceData:
    """Read preferences from a file, a data set or a list of records.

    A record is one of these, after TRL's and OpenRLHF's; texts may be conversations (lists of messages) or token ids:

    | columns | |
    |---|---|
    | `chosen`, `rejected`, perhaps `prompt` | a pair; without a prompt it is the common beginning; `tie` may be true |
    | `first`, `second`, `outcome` | a pair as it was shown; 1 if the first won, 0 if the second did, 0.5 for a tie |
    | `completion`, `label` | one answer that was called good (1, true) or bad (0, false) |
    | `completion`, `score` | one answer that got a number: stars, points, the score of a reward |
    | `completions`, perhaps `ranks` or `scores` | a ranking, by default from the best to the worst; equal ones tie |
    | `completions`, `labels` | the steps of one answer, each good or bad after those before it |

    `annotator` says who judged. Repeated judgements stay separate rows.

    Args:
        source: a path (.jsonl, .json, .csv, .tsv, .parquet), a list of records, a `datasets.Dataset`, a data frame, or
            a list for each column.
        columns: names of your columns, by the names above: `{"annotator": "worker_id"}`.
        ignore: columns of yours that nothing needs to read; any other column that is not read is named in a warning.
        invalid: what to do with rows that cannot be used: raise an error that names them, or leave them out and name
            them in `left_out`.

    Raises:
        PreferenceError: the source cannot be read; the columns are of no known form; rows are invalid: a side is
            missing or empty, both sides are equal, a label is neither 0 nor 1.

    Example:
        >>> from bayesrl import preferences
        >>> data = preferences.read([{"chosen": "2+2= 4", "rejected": "2+2= 5"}])
        >>> data.items[0], data
        ({'prompt': '2+2=', 'completion': ' 4'}, PreferenceData(1 pairs, 2 items))
    """
    rows = read_rows(source)
    columns = dict(columns or {})
    present = list(dict.fromkeys(name for row in rows for name in row))
    _check_columns(columns, present, ignore)
    kept = [renamed(row, columns) for row in rows]
    form = find_format(list(dict.fromkeys(name for row in kept for name in row)))
    if form is None:
        raise PreferenceError(
            f"the records have the columns {', '.join(map(repr, present))}, which are no preferences; they need "
            f"{told_forms()}; name yours by columns={{'chosen': ...}}"
        )
    judgements, refused = _parse(kept, form)
    if refused and (invalid == "raise" or not judgements):
        raise PreferenceError(_told(refused, len(rows)))
    used = {columns.get(name, name) for name in form.read}
    unread = tuple(name for name in present if name not in used and name not in ignore)
    if unread:
        warnings.warn(
            f"nothing reads the columns {', '.join(map(repr, unread))} of these preferences; name them in columns= or "
            "ignore=",
            stacklevel=3,
        )
    return _collected(judgements, form, unread, refused)


def _check_columns(columns: Mapping[str, str], present: Sequence[str], ignore: Sequence[str]) -> None:
    for name, theirs in columns.items():
        if name not in COLUMNS:
            raise PreferenceError(f"columns= names {name!r}, which no form has; use {', '.join(COLUMNS)}")
        if theirs not in present:
            raise PreferenceError(f"columns={{{name!r}: {theirs!r}}}: there is no such column; there are {present}")
    if missing := [name for name in ignore if name not in present]:
        raise PreferenceError(f"ignore= names {missing[0]!r}, and the records have only {', '.join(present)}")


def _parse(rows: Sequence[Row], form: Format) -> tuple[list[Judgement], dict[int, str]]:
    judgements: list[Judgement] = []
    refused: dict[int, str] = {}
    for number, row in enumerate(rows):
        try:
            judgements += form.parse(row)
        except Refusal as reason:
            refused[number] = str(reason)
    return judgements, refused


def _told(refused: Mapping[int, str], count: int) -> str:
    shown = [f"row {number}: {reason}" for number, reason in list(refused.items())[:_MOST_NAMED]]
    more = f"; and {len(refused) - _MOST_NAMED} more" if len(refused) > _MOST_NAMED else ""
    what = f"{len(refused)} of {pluralize(count, 'row')} cannot be used"
    return f"{what}: {'; '.join(shown)}{more}; mend them, or pass invalid='leave_out'"


def _collected(
    judgements: Sequence[Judgement], form: Format, unread: tuple[str, ...], refused: Mapping[int, str]
) -> PreferenceData:
    places: dict[str, int] = {}
    items: list[Item] = []
    for judgement in judgements:
        for key, item in zip(judgement.keys, judgement.items, strict=True):
            if key not in places:
                places[key] = len(items)
                items.append(item)
    members = padded([np.asarray([places[key] for key in judgement.keys]) for judgement in judgements])
    ranks = padded([np.asarray(one.ranks if one.ranks is not None else [0]) for one in judgements])
    told = [one.label for one in judgements]
    labels = np.asarray(told) if form.kind == "labels" else None
    ratings = np.asarray(told, float) if form.kind == "ratings" else None
    known = tuple(dict.fromkeys(one.annotator for one in judgements if one.annotator is not None))
    numbers = {who: number for number, who in enumerate(known)}
    annotator = np.asarray([numbers.get(one.annotator, -1) for one in judgements]) if known else None
    kind: Any = form.kind
    shown = "outcome" in form.required
    data = PreferenceData(kind, tuple(items), members, ranks, labels, annotator, known, shown, unread, dict(refused))
    return replace(data, ratings=ratings)

"""`PreferenceData`: who judged which items, and how."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import combinations
from typing import Any, Literal

import numpy as np

from bayesrl.arguments import Count, FiniteNumbers, checked
from bayesrl.display.formatting import pluralize
from bayesrl.errors import PreferenceError
from bayesrl.lm.tokenization.chat_templates import SETTINGS
from bayesrl.preferences.records.reading_rows import Row
from bayesrl.preferences.records.record_formats import Item
from bayesrl.value_checks import are_integers, array_of

type Kind = Literal["pairs", "rankings", "labels", "ratings"]


@checked(PreferenceError)
@dataclass(frozen=True, eq=False, repr=False)
class PreferenceData:
    """Judgements of items: pairs, rankings, labels or ratings, with their ties, repetitions and annotators.

    Made by `read`, `of_pairs`, `of_rankings`, `of_labels` or `of_ratings`.

    Attributes:
        kind: "pairs", "rankings", "labels" or "ratings".
        items: what was judged, each once: records with `completion` and perhaps `prompt`.
        members: numbers of the judged items, [rows, places]; −1 where a ranking has no further item. The first of a
            pair is the one shown first, if `shown`, and else the chosen one.
        ranks: place of each member, 0 for the best, equal for ties; −1 where there is none, [rows, places].
        labels: 1 or 0, [rows], for labels; else None.
        annotator: number of who judged, [rows], or None.
        annotators: their names.
        shown: whether pairs keep the order in which they were shown.
        unread: columns of the records that nothing reads.
        left_out: rows that could not be used, with the reason.
        ratings: numbers, [rows], for ratings; else None.

    Example:
        >>> from bayesrl import preferences
        >>> data = preferences.PreferenceData.of_pairs([0, 0, 1], [1, 2, 2], outcome=[1, 0.5, 0])
        >>> data.num_items, data.ranks.tolist()
        (3, [[0, 1], [0, 0], [1, 0]])
    """

    kind: Kind
    items: tuple[Item, ...]
    members: np.ndarray
    ranks: np.ndarray
    labels: np.ndarray | None = None
    annotator: np.ndarray | None = None
    annotators: tuple[Any, ...] = ()
    shown: bool = False
    unread: tuple[str, ...] = ()
    left_out: Mapping[int, str] = field(default_factory=dict)
    ratings: np.ndarray | None = None

    @classmethod
    @checked(PreferenceError)
    def of_pairs(
        cls,
        first: FiniteNumbers,
        second: FiniteNumbers,
        outcome: FiniteNumbers = 1.0,
        *,
        num_items: Count | None = None,
        annotator: Sequence[Any] | np.ndarray | None = None,
        shown: bool = False,
    ) -> "PreferenceData":
        """Make data of pairs of numbered items.

        Args:
            first: numbers of items, [rows].
            second: of the items beside them, [rows].
            outcome: 1 where the first won, 0 where the second did, 0.5 for a tie; one for all, or [rows].
            num_items: how many items there are; by default, up to the greatest number.
            annotator: who judged each row.
            shown: whether the first of each pair was the one shown first.

        Raises:
            PreferenceError: numbers are no whole numbers, or equal in a row; an outcome is another number.
        """
        sides, results = (_numbered(first, "first"), _numbered(second, "second")), np.asarray(array_of(outcome), float)
        if len(sides[0]) != len(sides[1]) or results.shape not in ((), sides[0].shape):
            raise PreferenceError(
                f"first, second and outcome have {len(sides[0])}, {len(sides[1])} and {list(results.shape)} entries; "
                "pass one of each for every row, or one outcome for all"
            )
        pairs, results = np.stack(sides, -1), np.broadcast_to(results, sides[0].shape)
        if wrong := sorted(set(results.tolist()) - {0.0, 0.5, 1.0}):
            raise PreferenceError(
                f"outcome holds {wrong[0]:g}; use 1 (the first won), 0 (the second did) or 0.5 (a tie)"
            )
        equal = np.flatnonzero(pairs[:, 0] == pairs[:, 1])
        if equal.size:
            raise PreferenceError(f"row {equal[0]} compares item {pairs[equal[0], 0]} with itself; leave it out")
        ranks = np.stack([results < 0.5, results > 0.5], -1).astype(int)
        data = cls("pairs", _numbers_as_items(pairs, num_items), pairs, ranks, shown=shown)
        return data._with_annotators(annotator)

    @classmethod
    @checked(PreferenceError)
    def of_rankings(
        cls,
        rankings: Sequence[Sequence[int]] | np.ndarray,
        *,
        num_items: Count | None = None,
        annotator: Sequence[Any] | np.ndarray | None = None,
    ) -> "PreferenceData":
        """Make data of rankings of numbered items, each from the best to the worst; lengths may differ.

        Raises:
            PreferenceError: a ranking names an item twice, or fewer than two.
        """
        if not isinstance(rankings, Sequence) and np.ndim(rankings) == 0:
            raise PreferenceError("rankings must be a list of them, each a list of items; pass such as [[2, 0, 1]]")
        rows = [_numbered(row, f"ranking {number}") for number, row in enumerate(rankings)]
        for number, row in enumerate(rows):
            if len(set(row.tolist())) < len(row) or len(row) < 2:
                raise PreferenceError(f"ranking {number} is {row.tolist()}; name two items or more, each once")
        if not rows:
            raise PreferenceError("there are no rankings; pass at least one")
        members, ranks = padded(rows), padded([np.arange(len(row)) for row in rows])
        return cls("rankings", _numbers_as_items(members, num_items), members, ranks)._with_annotators(annotator)

    @classmethod
    @checked(PreferenceError)
    def of_labels(
        cls,
        item: FiniteNumbers,
        label: FiniteNumbers,
        *,
        num_items: Count | None = None,
        annotator: Sequence[Any] | np.ndarray | None = None,
    ) -> "PreferenceData":
        """Make data of numbered items that were called good, 1, or bad, 0.

        Raises:
            PreferenceError: a label is another number, or there is not one for each.
        """
        members, labels = _numbered(item, "item"), array_of(label)
        if labels.shape != members.shape or not np.isin(labels, (0, 1)).all():
            raise PreferenceError("label must be 0 or 1 for each item; mend the labels, or leave their rows out")
        column = members[:, None]
        items = _numbers_as_items(column, num_items)
        data = cls("labels", items, column, np.zeros_like(column), labels=labels.astype(int))
        return data._with_annotators(annotator)

    @classmethod
    @checked(PreferenceError)
    def of_ratings(
        cls,
        item: FiniteNumbers,
        rating: FiniteNumbers,
        *,
        num_items: Count | None = None,
        annotator: Sequence[Any] | np.ndarray | None = None,
    ) -> "PreferenceData":
        """Make data of numbered items that got a number each time: stars, points, the score of a reward.

        Raises:
            PreferenceError: there is not one rating for each.
        """
        members, ratings = _numbered(item, "item"), np.asarray(array_of(rating), float)
        if ratings.shape != members.shape:
            raise PreferenceError(f"rating has shape {ratings.shape} for {len(members)} items; pass one for each")
        column = members[:, None]
        data = cls("ratings", _numbers_as_items(column, num_items), column, np.zeros_like(column), ratings=ratings)
        return data._with_annotators(annotator)

    def _with_annotators(self, annotator: Any) -> "PreferenceData":
        if annotator is None:
            return self
        count = len(annotator) if np.ndim(annotator) == 1 else "no list of"
        if count != len(self):
            raise PreferenceError(f"annotator has {count} entries for {len(self)} rows; pass one for each")
        known = tuple(dict.fromkeys(np.asarray(annotator).tolist()))
        numbers = np.asarray([known.index(who) for who in np.asarray(annotator).tolist()], int)
        return replace(self, annotator=numbers, annotators=known)

    def __len__(self) -> int:
        return len(self.members)

    @property
    def num_items(self) -> int:
        """How many items there are."""
        return len(self.items)

    @cached_property
    def outcomes(self) -> np.ndarray:
        """Of pairs: 1 where the first won, 0 where the second did, 0.5 for ties, [rows]."""
        return 0.5 * (1 + np.sign(self.ranks[:, 1] - self.ranks[:, 0]))

    @property
    def num_ties(self) -> int:
        """In how many rows two items share a place."""
        return sum(len(set(row[row >= 0].tolist())) < int((row >= 0).sum()) for row in self.ranks)

    @property
    def most_tied(self) -> int:
        """How many items share one place, at most."""
        return max((int(np.bincount(row[row >= 0]).max()) for row in self.ranks if (row >= 0).any()), default=1)

    @property
    def names(self) -> list[str]:
        """What to call each item, [items]: its text, or its number."""
        return [name_of(item) for item in self.items]

    def take(self, rows: FiniteNumbers) -> "PreferenceData":
        """Keep some rows, by number, and all items, so that the rest can test what was learnt from them."""
        numbers = np.asarray(array_of(rows))
        if numbers.ndim != 1 or (numbers.size and not are_integers(numbers)):
            raise PreferenceError("take needs a list of whole numbers of rows; pass such as data.take(range(10))")
        numbers = numbers.astype(int)
        if numbers.size and not 0 <= numbers.min() <= numbers.max() < len(self):
            raise PreferenceError(
                f"take got rows from {numbers.min()} to {numbers.max()}; there are 0 to {len(self) - 1}"
            )
        kept: dict[str, Any] = {
            name: None if getattr(self, name) is None else getattr(self, name)[numbers]
            for name in ("members", "ranks", "labels", "ratings", "annotator")
        }
        return replace(self, **kept)

    def over_items(self, items: Sequence[Item]) -> "PreferenceData | None":
        """Return the same judgements with items numbered as in another list of them, or None if one is not there.

        Items are equal if prompt and completion are, or else if both together are the text of one item of the list
        alone: without a `prompt` column, the prompt that two answers share depends on the pair.
        """
        numbers = numbers_among(items, self.items)
        if (numbers < 0).any():
            return None
        members = np.where(self.members >= 0, numbers[self.members], -1)
        return replace(self, items=tuple(items), members=members)

    def as_pairs(self) -> "PreferenceData":
        """Break rankings into all pairs that they order, or tie.

        Pairs of one ranking are not independent: models of pairs are then too sure, and `plackett_luce` is not.
        """
        if self.kind != "rankings":
            raise PreferenceError(f"as_pairs breaks rankings, and these are {self.kind}; use them as they are")
        rows, members, ranks = [], [], []
        for row, (who, place) in enumerate(zip(self.members, self.ranks, strict=True)):
            order = np.argsort(place[place >= 0], kind="stable")
            for better, worse in combinations(order, 2):
                rows.append(row)
                members.append([who[better], who[worse]])
                ranks.append([0, int(place[better] < place[worse])])
        annotator = None if self.annotator is None else self.annotator[rows]
        return replace(self, kind="pairs", members=np.asarray(members), ranks=np.asarray(ranks), annotator=annotator)

    def records(self) -> list[Row]:
        """Write the rows as records that `read`, and trainers, know: pairs with chosen and rejected, and so on."""
        return [self._record(row) for row in range(len(self))]

    def _record(self, row: int) -> Row:
        items = [self.items[at] for at in self.members[row] if at >= 0]
        shared = {name: items[0][name] for name in ("prompt", *SETTINGS) if name in items[0]}
        if any(item.get("prompt") != items[0].get("prompt") for item in items):
            raise PreferenceError(
                f"row {row} compares answers to different prompts, for which no form of records has a place; "
                "give them one prompt"
            )
        texts = [item["completion"] for item in items]
        ranks = [int(rank) for rank in self.ranks[row] if rank >= 0]
        if self.annotator is not None and self.annotator[row] >= 0:
            shared["annotator"] = self.annotators[self.annotator[row]]
        if self.kind == "labels":
            assert self.labels is not None
            return {**shared, "completion": texts[0], "label": bool(self.labels[row])}
        if self.ratings is not None:
            return {**shared, "completion": texts[0], "score": float(self.ratings[row])}
        if self.kind == "rankings":
            return {**shared, "completions": texts, "ranks": ranks}
        if self.shown:
            return {**shared, "first": texts[0], "second": texts[1], "outcome": float(self.outcomes[row])}
        order = [0, 1] if ranks[0] <= ranks[1] else [1, 0]
        tie = {"tie": True} if ranks[0] == ranks[1] else {}
        return {**shared, "chosen": texts[order[0]], "rejected": texts[order[1]], **tie}

    def __repr__(self) -> str:
        """Describe the data in one line."""
        parts = [f"{len(self)} {self.kind}", pluralize(self.num_items, "item")]
        parts += [f"{pluralize(self.num_ties, 'row')} with ties"] if self.kind != "labels" and self.num_ties else []
        parts += [pluralize(len(self.annotators), "annotator")] if self.annotators else []
        parts += [f"{pluralize(len(self.left_out), 'row')} left out"] if self.left_out else []
        parts += [f"unread columns {', '.join(self.unread)}"] if self.unread else []
        return f"PreferenceData({', '.join(parts)})"


def padded(rows: Sequence[np.ndarray]) -> np.ndarray:
    """Put rows of several lengths into one array, with −1 behind their ends."""
    table = np.full((len(rows), max(map(len, rows))), -1, int)
    for row, values in zip(table, rows, strict=True):
        row[: len(values)] = values
    return table


def numbers_among(known: Sequence[Item], items: Sequence[Item]) -> np.ndarray:
    """Return the number of each item in a list of known ones, [items]; −1 if it is not among them."""
    places = {_exact_name(item): at for at, item in enumerate(known)}
    texts = Counter(map(name_of, known))
    by_text = {name_of(item): at for at, item in enumerate(known) if texts[name_of(item)] == 1}
    return np.asarray([places.get(_exact_name(item), by_text.get(name_of(item), -1)) for item in items], int)


def _exact_name(item: Item) -> str:
    return json.dumps([item.get("prompt", ""), item["completion"]], sort_keys=True, default=str)


def _numbered(values: Any, name: str) -> np.ndarray:
    numbers = array_of(values)
    if numbers.ndim != 1 or not are_integers(numbers) or not numbers.size or numbers.min() < 0:
        raise PreferenceError(f"{name} must be whole numbers of items from 0 on, one for each row")
    return numbers.astype(int)


def _numbers_as_items(members: np.ndarray, num_items: int | None) -> tuple[Item, ...]:
    count = int(members.max()) + 1
    if num_items is not None and num_items < count:
        raise PreferenceError(f"num_items={num_items}, and there is an item {count - 1}; use at least {count}")
    return tuple({"completion": str(number)} for number in range(num_items or count))


def name_of(item: Item) -> str:
    """Return the text of an item, with its prompt."""
    parts = [
        part if isinstance(part, str) else _told_part(part) for part in (item.get("prompt", ""), item["completion"])
    ]
    return "".join(parts)


def _told_part(part: Sequence[Any]) -> str:
    """Write messages, or token ids, on one line."""
    return " ".join(f"{one['role']}: {one.get('content')}" if isinstance(one, Mapping) else str(one) for one in part)

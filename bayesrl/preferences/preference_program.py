"""`PreferenceModel`: a model of preferences with its data, as a NumPyro program."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from jax import Array

from bayesrl.arguments import checked
from bayesrl.display.formatting import pluralize
from bayesrl.errors import PreferenceError
from bayesrl.preferences.outcome_log_probs import (
    FIRST,
    SECOND,
    TIE,
    DavidsonLuceRanks,
    PlackettLuceRanks,
    Ties,
    log_probs_of_pairs,
)
from bayesrl.preferences.records.preference_data import PreferenceData
from bayesrl.preferences.score_models import LinearScores, ScoreModel, as_real, as_whole, check_features

OUTCOME, TEMPERATURE = "outcome", "log_temperature"
_ANNOTATOR_SCALE = 0.5
"""Prior standard deviation of an annotator's log-temperature."""
_RANKS_OF = np.array([[0, 1], [1, 0], [0, 0]])
"""Ranks of the first and the second of a pair, by `FIRST`, `SECOND` and `TIE`."""
_OFFSET_SCALE = 10.0
"""Prior standard deviation of what all ratings have in common."""


@checked(PreferenceError)
@dataclass(frozen=True, eq=False, repr=False)
class PreferenceModel:
    """A model of preferences with its data, as a program without rewards; made by `bradley_terry` and its like.

    Attributes:
        data: what was judged, and how.
        score_model: where scores come from.
        name: of the model.
        ties: the model of ties, or None.
        annotators: whether each annotator has a temperature.
        position: whether being shown first counts.
        lengths: standardised lengths of the items, [items], if they count; else None.
        batch_size: rows a step sees; None means all.
        most_tied: how many items may share a place under Davidson and Luce.
        noise: standard deviation of a rating around its score.
    """

    data: PreferenceData
    score_model: ScoreModel
    name: Literal["bradley_terry", "thurstone", "plackett_luce", "gaussian_ratings"]
    ties: Ties | None = None
    annotators: bool = False
    position: bool = False
    lengths: np.ndarray | None = None
    batch_size: int | None = None
    most_tied: int = 2
    noise: float = 1.0

    def __call__(self) -> None:
        """Run as a program: Σ log P(outcome | scores) over the rows."""
        sites = {
            name: numpyro.sample(name, dist.Normal(0.0, scale).expand(list(shape)).to_event(len(shape)))
            for name, (scale, shape) in self.priors.items()
        }
        body = self.score_model.declare()
        size = self.batch_size if self.batch_size is not None and self.batch_size < len(self.data) else None
        with numpyro.plate("row", len(self.data), subsample_size=size) as index:
            numpyro.sample(OUTCOME, self.outcome_given(sites, index, body), obs=self.outcomes[index])

    @property
    def priors(self) -> dict[str, tuple[float, tuple[int, ...]]]:
        """Prior standard deviation, around 0, and shape of each latent site."""
        several = (self.most_tied - 1,) if self.ties == "davidson_luce" else ()
        effects: dict[str, tuple[bool, float, tuple[int, ...]]] = {
            "threshold": (self.data.kind == "labels", 1.0, ()),
            "offset": (self.data.kind == "ratings", _OFFSET_SCALE, ()),
            "tie": (self.ties is not None, 1.0, several),
            "position": (self.position, 1.0, ()),
            "length": (self.lengths is not None, 1.0, ()),
            TEMPERATURE: (self.annotators, _ANNOTATOR_SCALE, (len(self.data.annotators),)),
        }
        priors = {self.score_model.site: (self.score_model.scale, (self.score_model.size,))}
        return {**priors, **{name: (scale, shape) for name, (on, scale, shape) in effects.items() if on}}

    def outcome_given(self, sites: Mapping[str, Array], index: Any, body: Any = None) -> dist.Distribution:
        """Return the distribution of the outcomes of rows, by number, given the latent sites and what is trained."""
        members = as_whole(self.data.members)[index]
        scores = self.score_model.scores(sites[self.score_model.site], members, body)
        if self.lengths is not None:
            scores = scores + sites["length"] * as_real(self.lengths)[members]
        if self.annotators:
            assert self.data.annotator is not None
            scores = scores * jnp.exp(-sites[TEMPERATURE][as_whole(self.data.annotator)[index]])[:, None]
        if self.name == "plackett_luce":
            given = () if self.ties is None else (sites["tie"],)
            return (DavidsonLuceRanks if given else PlackettLuceRanks)(scores, members >= 0, *given)
        if self.name == "gaussian_ratings":
            return dist.Normal(scores[:, 0] + sites["offset"], self.noise)
        link = "logit" if self.name == "bradley_terry" else "probit"
        if self.data.kind == "labels":
            good = scores[:, 0] - sites["threshold"]
            return dist.Categorical(logits=log_probs_of_pairs(-good, link, None, None))
        difference = scores[:, 0] - scores[:, 1] + sites.get("position", 0.0)
        return dist.Categorical(logits=log_probs_of_pairs(difference, link, sites.get("tie"), self.ties))

    @property
    def observed(self) -> np.ndarray:
        """What was seen: ranks, labels, ratings, or outcomes of pairs, [rows, ...]."""
        if self.name == "plackett_luce":
            return self.data.ranks
        if self.data.labels is not None:
            return self.data.labels
        if self.data.ratings is not None:
            return self.data.ratings
        return np.select([self.data.outcomes == 1, self.data.outcomes == 0], [FIRST, SECOND], TIE)

    @property
    def outcomes(self) -> Array:
        """What was seen, for JAX."""
        return as_real(self.observed) if self.data.kind == "ratings" else as_whole(self.observed)

    def with_data(self, data: PreferenceData, features: Any = None) -> "PreferenceModel":
        """Return the same model of other judgements, such as held-out ones.

        Items are found again by their texts, so that the judgements may come from another file.

        Args:
            data: of the same kind.
            features: of its items, for a model that is linear in features.

        Raises:
            PreferenceError: another kind; items or annotators that it does not know.
        """
        if data.kind != self.data.kind:
            raise PreferenceError(
                f"the model is of {self.data.kind}, and the data are {data.kind}; pass data of one kind"
            )
        scores = self.score_model
        if features is None and data.items != self.data.items:
            renumbered = data.over_items(self.data.items)
            data = data if renumbered is None else renumbered
        if features is not None:
            if not isinstance(scores, LinearScores):
                raise PreferenceError("features= were given to a model without features; leave them out")
            table = check_features(features, data)
            if table.shape[1] != scores.features.shape[1]:
                raise PreferenceError(
                    f"features have {table.shape[1]} columns, and the model {scores.features.shape[1]}"
                )
            scores = replace(scores, features=table)
        elif data.items != self.data.items:
            scores = scores.for_items(data.items)
        made = replace(self, data=data, score_model=scores, batch_size=None)
        if self.annotators and data.annotators != self.data.annotators:
            made = replace(made, data=_renumbered(data, self.data.annotators))
        if self.lengths is not None and data.items != self.data.items:
            raise PreferenceError(
                "lengths count in this model, and the data have other items; take rows of its own data"
            )
        check_outcomes(made)
        return made

    def with_outcomes(self, outcomes: Any) -> "PreferenceModel":
        """Return the same model with other outcomes, as `observed` has them, such as simulated ones."""
        values = np.asarray(outcomes)
        if self.data.kind == "ratings":
            data = replace(self.data, ratings=values.astype(float))
        elif self.data.kind == "labels":
            data = replace(self.data, labels=values.astype(int))
        elif self.name == "plackett_luce":
            data = replace(self.data, ranks=values.astype(int))
        else:
            data = replace(self.data, ranks=_RANKS_OF[values.astype(int)])
        return replace(self, data=data)

    def over_all_data(self) -> "PreferenceModel":
        """Return the same model without mini-batches of rows."""
        return self if self.batch_size is None else replace(self, batch_size=None)

    def __repr__(self) -> str:
        """Describe the model in one line."""
        parts = [f"{len(self.data)} {self.data.kind}", pluralize(self.data.num_items, "item")]
        parts += [f"ties {self.ties}"] if self.ties else []
        parts += [pluralize(len(self.data.annotators), "annotator")] if self.annotators else []
        parts += [word for word, on in (("position", self.position), ("length", self.lengths is not None)) if on]
        return f"{self.name}({', '.join(parts)})"


def check_outcomes(model: PreferenceModel) -> None:
    """Refuse ties where the model has no place for them."""
    count = model.data.num_ties
    if model.ties == "davidson_luce" and model.data.most_tied > model.most_tied:
        raise PreferenceError(
            f"{model.data.most_tied} items share a place in these rankings, and the model knows ties of up to "
            f"{model.most_tied}; make it from data with ties as large"
        )
    if model.data.kind == "labels" or not count or model.ties is not None:
        return
    remedy = {
        "bradley_terry": "pass ties='davidson' or ties='rao_kupper'",
        "thurstone": "pass ties='glenn_david'",
        "plackett_luce": "pass ties='davidson_luce'",
    }[model.name]
    raise PreferenceError(f"{pluralize(count, 'row')} of {len(model.data)} tied, and the model has no ties; {remedy}")


def _renumbered(data: PreferenceData, annotators: Sequence[Any]) -> PreferenceData:
    unknown = [who for who in data.annotators if who not in annotators]
    if unknown or data.annotator is None:
        who = f"annotator {unknown[0]!r}" if unknown else "an annotator without a name"
        raise PreferenceError(f"the model knows no temperature of {who}; pass judgements of its own annotators")
    numbers = np.asarray([annotators.index(who) for who in data.annotators])
    return replace(data, annotator=numbers[data.annotator], annotators=tuple(annotators))

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
from bayesrl.preferences.outcome_log_probs import FIRST, SECOND, TIE, PlackettLuceRanks, Ties, log_probs_of_pairs
from bayesrl.preferences.records.preference_data import PreferenceData
from bayesrl.preferences.score_models import LinearScores, ScoreModel, as_real, as_whole, check_features

OUTCOME, TEMPERATURE = "outcome", "log_temperature"
_ANNOTATOR_SCALE = 0.5
"""Prior standard deviation of an annotator's log-temperature."""


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
    """

    data: PreferenceData
    score_model: ScoreModel
    name: Literal["bradley_terry", "thurstone", "plackett_luce"]
    ties: Ties | None = None
    annotators: bool = False
    position: bool = False
    lengths: np.ndarray | None = None
    batch_size: int | None = None

    def __call__(self) -> None:
        """Run as a program: Σ log P(outcome | scores) over the rows."""
        sites = {
            name: numpyro.sample(name, dist.Normal(0.0, scale).expand(list(shape)).to_event(len(shape)))
            for name, (scale, shape) in self.priors.items()
        }
        body = self.score_model.declare()
        size = self.batch_size if self.batch_size is not None and self.batch_size < len(self.data) else None
        with numpyro.plate("row", len(self.data), subsample_size=size) as index:
            numpyro.sample(OUTCOME, self.outcome_given(sites, index, body), obs=as_whole(self.observed)[index])

    @property
    def priors(self) -> dict[str, tuple[float, tuple[int, ...]]]:
        """Prior standard deviation, around 0, and shape of each latent site."""
        effects = {
            "threshold": self.data.kind == "labels",
            "tie": self.ties is not None,
            "position": self.position,
            "length": self.lengths is not None,
        }
        priors: dict[str, tuple[float, tuple[int, ...]]] = {
            self.score_model.site: (self.score_model.scale, (self.score_model.size,)),
            **{name: (1.0, ()) for name, on in effects.items() if on},
        }
        return priors | ({TEMPERATURE: (_ANNOTATOR_SCALE, (len(self.data.annotators),))} if self.annotators else {})

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
            return PlackettLuceRanks(scores, members >= 0)
        link = "logit" if self.name == "bradley_terry" else "probit"
        if self.data.kind == "labels":
            good = scores[:, 0] - sites["threshold"]
            return dist.Categorical(logits=log_probs_of_pairs(-good, link, None, None))
        difference = scores[:, 0] - scores[:, 1] + sites.get("position", 0.0)
        return dist.Categorical(logits=log_probs_of_pairs(difference, link, sites.get("tie"), self.ties))

    @property
    def observed(self) -> np.ndarray:
        """What was seen: ranks, labels, or outcomes of pairs, [rows, ...]."""
        if self.name == "plackett_luce":
            return self.data.ranks
        if self.data.labels is not None:
            return self.data.labels
        return np.select([self.data.outcomes == 1, self.data.outcomes == 0], [FIRST, SECOND], TIE)

    def with_data(self, data: PreferenceData, features: Any = None) -> "PreferenceModel":
        """Return the same model of other judgements, such as held-out ones.

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
        if features is not None:
            if not isinstance(scores, LinearScores):
                raise PreferenceError("features= were given to a model without features; leave them out")
            table = check_features(features, data)
            if table.shape[1] != scores.features.shape[1]:
                raise PreferenceError(
                    f"features have {table.shape[1]} columns, and the model {scores.features.shape[1]}"
                )
            scores = replace(scores, features=table)
        elif data.items is not self.data.items and data.items != self.data.items:
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
    if model.data.kind == "labels" or not count or model.ties is not None:
        return
    remedy = {
        "bradley_terry": "pass ties='davidson' or ties='rao_kupper'",
        "thurstone": "pass ties='glenn_david'",
        "plackett_luce": "use bradley_terry(data.as_pairs(), ties='davidson')",
    }[model.name]
    raise PreferenceError(f"{pluralize(count, 'row')} of {len(model.data)} tied, and the model has no ties; {remedy}")


def _renumbered(data: PreferenceData, annotators: Sequence[Any]) -> PreferenceData:
    unknown = [who for who in data.annotators if who not in annotators]
    if unknown or data.annotator is None:
        who = f"annotator {unknown[0]!r}" if unknown else "an annotator without a name"
        raise PreferenceError(f"the model knows no temperature of {who}; pass judgements of its own annotators")
    numbers = np.asarray([annotators.index(who) for who in data.annotators])
    return replace(data, annotator=numbers[data.annotator], annotators=tuple(annotators))

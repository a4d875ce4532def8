"""Where scores come from: a free number for each item, or a linear map of features."""

import abc
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array

from bayesrl.errors import PreferenceError
from bayesrl.preferences.records.preference_data import PreferenceData, name_of, numbers_among
from bayesrl.preferences.records.record_formats import Item

SCORE, WEIGHTS = "score", "weights"
"""Names of the latent sites."""

_MOST_NAMED, _MOST_SHOWN = 3, 40


class ScoreModel(abc.ABC):
    """Scores of items, as a part of a program.

    Attributes:
        site: the name of its latent site, a vector that is N(0, scale²) in the prior.
        scale: its prior standard deviation.
    """

    site: str
    scale: float

    @property
    @abc.abstractmethod
    def size(self) -> int:
        """How many numbers the latent site has."""

    def declare(self) -> Any:
        """Declare parameters that are trained beside the latent site; return what `scores` needs of them."""
        return None

    @abc.abstractmethod
    def scores(self, latent: Array, items: Any, body: Any = None) -> Array:
        """Return the scores of items, by number, of the shape of their numbers."""

    @abc.abstractmethod
    def for_items(self, items: Sequence[Item]) -> "ScoreModel":
        """Return the same model for other items.

        Raises:
            PreferenceError: it knows only its own.
        """


@dataclass(frozen=True, eq=False)
class FreeScores(ScoreModel):
    """A free score for each item: score ~ N(0, scale²)."""

    items: tuple[Item, ...]
    scale: float
    site = SCORE

    @property
    def size(self) -> int:
        """One for each item."""
        return len(self.items)

    def scores(self, latent: Array, items: Any, body: Any = None) -> Array:
        """Look scores up."""
        return latent[items]

    def for_items(self, items: Sequence[Item]) -> "FreeScores":
        """Return itself for its own items, and refuse others by name."""
        unknown = np.flatnonzero(numbers_among(self.items, items) < 0)
        if unknown.size:
            shown = ", ".join(repr(name_of(items[at])[:_MOST_SHOWN]) for at in unknown[:_MOST_NAMED])
            raise PreferenceError(
                f"other items have no score here: every item has a free score of its own, and {unknown.size} of "
                f"{len(items)} are not among the model's ({shown}{', …' if unknown.size > _MOST_NAMED else ''}); leave "
                "their rows out, or give the model features="
            )
        return self


@dataclass(frozen=True, eq=False)
class LinearScores(ScoreModel):
    """Scores linear in features: features · weights, with weights ~ N(0, scale²)."""

    features: np.ndarray
    scale: float
    site = WEIGHTS

    @property
    def size(self) -> int:
        """One for each feature."""
        return int(self.features.shape[1])

    def scores(self, latent: Array, items: Any, body: Any = None) -> Array:
        """Map features to scores."""
        # All items at once: there are fewer of them than of comparisons.
        return (as_real(self.features) @ latent)[items]

    def for_items(self, items: Sequence[Item]) -> "LinearScores":
        """Refuse other items: their features are not known."""
        raise PreferenceError(
            f"the model has features of its own {len(self.features)} items, and these {len(items)} are others; pass "
            "features= for them"
        )


def as_real(values: Any) -> Array:
    """Return numbers in the precision of the moment; without a type, JAX can keep that of an earlier one."""
    return jnp.asarray(values, jnp.result_type(float))


def as_whole(values: Any) -> Array:
    """Return whole numbers of 32 bits, in whatever precision."""
    return jnp.asarray(np.asarray(values, np.int32))


def check_features(features: Any, data: PreferenceData) -> np.ndarray:
    """Read features, [items, features], or refuse them."""
    table = np.asarray(features, float)
    if table.ndim != 2 or table.shape[0] != data.num_items or table.shape[1] == 0 or not np.isfinite(table).all():
        raise PreferenceError(
            f"features have shape {table.shape}; give finite numbers [items, features], one row for each of "
            f"{data.num_items} items"
        )
    return table

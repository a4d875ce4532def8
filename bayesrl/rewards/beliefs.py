"""Beliefs about rewards: of items, linear in features or in what a last layer reads of texts, and ensembles."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np

from bayesrl.errors import PreferenceError
from bayesrl.lm.prompts import Completions
from bayesrl.lm.rewards.base import Reward, evaluate
from bayesrl.preferences.reward_posterior import RewardPosterior
from bayesrl.preferences.score_models import LinearScores
from bayesrl.preferences.text_scores import LastLayerScores
from bayesrl.rewards.text_reading import TextFeatures
from bayesrl.statistics.reward_beliefs import RewardBelief
from bayesrl.value_checks import format_value

_LEAST_EIGENVALUE = -1e-8


@dataclass(frozen=True, eq=False)
class LinearRewardBelief(RewardBelief):
    """A reward x · w with w ~ N(mean, covariance) or known by draws; the x of items are the rows of a table.

    Attributes:
        origin: what it was made from.
        table: features of items, [items, features]; None for the identity, where w are the rewards of items.
        mean: of w, [features].
        root: of the covariance of w = root · rootᵀ, [features, features]; None if w is known by draws.
        draws: of w, [draws, features]; None if none were kept.
        shift: features that are subtracted of all others, [features].
        reader: reads features of texts; None if it knows none.
        names: of the items.
    """

    origin: Any
    table: np.ndarray | None
    mean: np.ndarray
    root: np.ndarray | None
    draws: np.ndarray | None
    shift: np.ndarray
    reader: TextFeatures | None = None
    names: Sequence[str] = ()

    @property
    def normal(self) -> bool:
        """Whether its moments are all there is to know."""
        return self.root is not None

    @property
    def items(self) -> np.ndarray:
        """Features of the items, less the shift, [items, features]."""
        table = np.eye(len(self.mean)) if self.table is None else self.table
        return table - self.shift

    @property
    def num_items(self) -> int:
        """How many items it knows by number."""
        return len(self.mean) if self.table is None else len(self.table)

    def latent_draws(self, rng: np.random.Generator, num_draws: int) -> np.ndarray:
        """Draw from the normal law, in pairs with the posterior mean between them; or return the draws that were kept.

        Of more than `num_draws` it returns some, evenly chosen.
        """
        if self.root is not None:
            half = rng.standard_normal(((num_draws + 1) // 2, len(self.mean))) @ self.root.T
            return self.mean + np.concatenate([half, -half])[:num_draws]
        assert self.draws is not None
        if len(self.draws) <= num_draws:
            return self.draws
        return self.draws[np.linspace(0, len(self.draws) - 1, num_draws).astype(int)]

    def features_of(self, what: Any) -> Any:
        """Return features less the shift, [..., features]: given ones, or those that are read of completions."""
        if isinstance(what, Completions):
            if self.reader is None:
                raise PreferenceError(
                    "the reward was asked for texts, and its posterior reads none; infer it with "
                    "features=preferences.TextScores(...), or call the reward with item numbers or features"
                )
            return self.reader(what) - jnp.asarray(self.shift, jnp.float32)
        width = len(self.mean)
        if self.table is None or what.ndim == 0 or what.shape[-1] != width:
            known = f"item numbers, or features [..., {width}]" if self.table is not None else "item numbers"
            raise PreferenceError(f"the reward was called with {what.dtype} of shape {tuple(what.shape)}; pass {known}")
        return what - jnp.asarray(self.shift, what.dtype)


@dataclass(frozen=True, eq=False)
class EnsembleRewardBelief(RewardBelief):
    """A reward that is one of several functions, each as probable as the others.

    Attributes:
        origin: what it was made from.
        members: functions of what the reward is called with; or rewards of texts.
    """

    origin: Any
    members: tuple[Callable[[Any], Any], ...]

    def latent_draws(self, rng: np.random.Generator, num_draws: int) -> np.ndarray:
        """Return the number of every member once, or draw some."""
        num = len(self.members)
        return np.arange(num) if num <= num_draws else rng.integers(num, size=num_draws)

    def values(self, what: Any) -> Any:
        """Return the reward by each member, [members, ...]."""
        found = []
        for number, member in enumerate(self.members):
            if isinstance(member, Reward) and isinstance(what, Completions):
                found.append(evaluate(member, what, f"member {number}"))
            else:
                found.append(jnp.asarray(member(what)))
        shapes = {value.shape for value in found}
        if len(shapes) > 1:
            told = " and ".join(map(str, sorted(shapes)[:2]))
            raise PreferenceError(
                f"members of the ensemble returned shapes {told}; let each return one number per item"
            )
        return jnp.stack(found)


def belief_of(source: Any, reference: Any) -> LinearRewardBelief | EnsembleRewardBelief:
    """Make a belief of whatever holds one; see `uncertain`."""
    if isinstance(source, RewardPosterior):
        return _of_posterior(source, reference)
    if isinstance(source, tuple) and len(source) == 2 and np.ndim(source[0]) == 1 and np.ndim(source[1]) == 2:
        return _of_moments(source, reference)
    if isinstance(source, list | tuple) and source and all(map(callable, source)):
        if reference is not None:
            raise PreferenceError(
                f"reference={format_value(reference)} is of items, and an ensemble of functions has none; let each "
                "function subtract its own value of a reference"
            )
        return EnsembleRewardBelief(source, tuple(source))
    draws = _numbers(source)
    if draws is None or draws.ndim != 2 or 0 in draws.shape or not np.isfinite(draws).all():
        shape = "" if draws is None else f" of shape {draws.shape}"
        raise PreferenceError(
            f"uncertain got {format_value(source)}{shape}; pass a preferences.RewardPosterior, finite draws [draw, "
            "item], a pair (mean [item], covariance [item, item]), or a list of functions"
        )
    shift = _weights(reference, draws.shape[1])
    return LinearRewardBelief(source, None, draws.mean(0), None, draws, shift, names=_numbered(draws.shape[1]))


def _of_posterior(posterior: RewardPosterior, reference: Any) -> LinearRewardBelief:
    own = posterior.model.score_model
    table = own.features if isinstance(own, LinearScores) else None
    draws = np.asarray(posterior.draws[own.site], float)
    texts = isinstance(own, LastLayerScores)
    field = reference if texts and isinstance(reference, str) else None
    shift = _weights(None if field is not None else reference, posterior.model.data.num_items)
    reader = TextFeatures(own.source, field) if isinstance(own, LastLayerScores) else None
    mean, root = draws.mean(0), None
    if posterior.gaussian is not None:
        # The scores come first among the latent numbers.
        size = own.size
        mean, covariance = posterior.gaussian.mean[:size], posterior.gaussian.covariance[:size, :size]
        root = np.linalg.cholesky(covariance)
    names = posterior.model.data.names
    return LinearRewardBelief(
        posterior, table, mean, root, draws, shift if table is None else shift @ table, reader, names
    )


def _of_moments(source: tuple[Any, Any], reference: Any) -> LinearRewardBelief:
    mean, covariance = (np.asarray(part, float) for part in source)
    size = len(mean)
    fine = covariance.shape == (size, size) and np.isfinite(mean).all() and np.isfinite(covariance).all()
    values, vectors = np.linalg.eigh((covariance + covariance.T) / 2) if fine else (np.full(1, -np.inf), np.eye(1))
    if not fine or not np.allclose(covariance, covariance.T) or values[0] < _LEAST_EIGENVALUE * max(values[-1], 1.0):
        raise PreferenceError(
            f"uncertain got a pair of a mean {mean.shape} and a covariance {covariance.shape}; pass a finite mean "
            "[item] and a covariance [item, item] that is symmetric and has no negative eigenvalue"
        )
    root = vectors * np.sqrt(np.maximum(values, 0.0))
    return LinearRewardBelief(source, None, mean, root, None, _weights(reference, size), names=_numbered(size))


def _weights(reference: Any, num_items: int) -> np.ndarray:
    """Return the weights of items whose mean reward is subtracted, [items]."""
    if reference is None:
        return np.zeros(num_items)
    given = _numbers(reference)
    if given is not None and given.ndim == 0 and given in np.arange(num_items):
        return np.eye(num_items)[int(given)]
    if given is not None and given.shape == (num_items,) and (given >= 0).all() and abs(given.sum() - 1) < 1e-4:
        return given / given.sum()
    raise PreferenceError(
        f"reference={format_value(reference)} is not known; pass the number of an item, from 0 to {num_items - 1}, "
        f"probabilities of the {num_items} items, such as those of the prior policy, or, for texts, the name of a "
        "field of the prompts' records"
    )


def _numbers(value: Any) -> np.ndarray | None:
    try:
        array = np.asarray(value)
        return array.astype(float) if array.dtype.kind in "iuf" else None
    except (TypeError, ValueError):
        return None


def _numbered(num: int) -> list[str]:
    return [str(at) for at in range(num)]

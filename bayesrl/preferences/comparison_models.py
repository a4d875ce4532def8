"""Models of preference as NumPyro programs: Bradley–Terry, Thurstone, Plackett–Luce, and ratings."""

import warnings
from typing import Annotated, Any, Literal

import numpy as np

from bayesrl.argument_types import Requirement
from bayesrl.arguments import Count, Positive, checked
from bayesrl.display.formatting import pluralize
from bayesrl.errors import PreferenceError
from bayesrl.preferences.preference_program import PreferenceModel, check_outcomes
from bayesrl.preferences.records.preference_data import PreferenceData
from bayesrl.preferences.records.record_formats import Item
from bayesrl.preferences.score_models import FreeScores, LinearScores, ScoreModel, check_features
from bayesrl.preferences.text_scores import TextScores
from bayesrl.value_checks import are_finite

_MOST_NAMED = 5

type Features = Annotated[
    Any,
    Requirement(
        "finite numbers [items, features], preferences.TextScores(model), or None",
        lambda value: value is None or isinstance(value, TextScores) or are_finite(value),
        any_type=True,
    ),
]


@checked(PreferenceError)
def bradley_terry(
    data: PreferenceData,
    *,
    features: Features = None,
    scale: Positive = 1.0,
    ties: Literal["davidson", "rao_kupper"] | None = None,
    annotators: bool = False,
    position: bool = False,
    length: bool = False,
    batch_size: Count | None = None,
) -> PreferenceModel:
    """Make Bradley and Terry's model of pairs, or of labels, as a NumPyro program for `fit`, NUTS or `infer`.

    P(i beats j) = σ((s_i − s_j + position + length · (ℓ_i − ℓ_j)) / τ), where the last three are options. A label is
    good with the probability σ((s_i − threshold) / τ).

    Sites: `score` [items], or `weights` [features], both N(0, scale²); `threshold`, `tie`, `position` and `length`,
    N(0, 1), and `log_temperature` [annotators], N(0, 0.5²), where they apply; `outcome` [rows] is observed.

    Args:
        data: pairs or labels.
        features: of the items, [items, features]: s = features · weights; or `TextScores(model)`, a last layer on a
            language model or a classifier; None gives each item a free score.
        scale: prior standard deviation of scores, or of weights, in units of log-odds.
        ties: "davidson": P(tie) ∝ ν·√(P_i P_j) with ν = e^tie; or "rao_kupper", with θ = 1 + e^tie. Data with ties need
            one of them.
        annotators: whether each annotator has a temperature τ, 1 for all otherwise.
        position: whether being shown first adds to the log-odds; the data must keep that order.
        length: whether the logarithm of the text's length, standardised over items, adds to its score.
        batch_size: rows a step of `fit` sees; by default all.

    Returns:
        The program.

    Raises:
        PreferenceError: the data are rankings, or have ties and `ties` is None; an option needs what the data lack.

    Example:
        >>> import jax
        >>> from bayesrl import preferences
        >>> data = preferences.PreferenceData.of_pairs([0] * 7 + [1] * 3, [1] * 7 + [0] * 3)
        >>> model = preferences.bradley_terry(data)
        >>> model
        bradley_terry(10 pairs, 2 items)

    References:
        Bradley & Terry (1952); Davidson (1970); Rao & Kupper (1967), equations 3.1 and 3.2.
    """
    options: dict[str, Any] = {
        "ties": ties,
        "annotators": annotators,
        "position": position,
        "length": length,
        "batch_size": batch_size,
    }
    return _made("bradley_terry", data, features, scale, **options)


@checked(PreferenceError)
def thurstone(
    data: PreferenceData,
    *,
    features: Features = None,
    scale: Positive = 1.0,
    ties: Literal["glenn_david"] | None = None,
    annotators: bool = False,
    position: bool = False,
    length: bool = False,
    batch_size: Count | None = None,
) -> PreferenceModel:
    """Make Thurstone's model (case V) of pairs, or of labels: each impression is its score plus N(0, 1) noise.

    P(i beats j) = Φ((s_i − s_j + …) / (τ·√2)), with the options and the sites of `bradley_terry`.

    Args:
        data: pairs or labels.
        features: of the items, [items, features], or `TextScores(model)`; None gives each item a free score.
        scale: prior standard deviation of scores, or of weights, in units of the noise of one impression.
        ties: "glenn_david": impressions nearer than e^tie are a tie.
        annotators: whether each annotator has a temperature τ.
        position: whether being shown first counts; the data must keep that order.
        length: whether the logarithm of the text's length counts.
        batch_size: rows a step of `fit` sees; by default all.

    Returns:
        The program.

    Raises:
        PreferenceError: as `bradley_terry`.

    Example:
        >>> from bayesrl import preferences
        >>> data = preferences.PreferenceData.of_pairs([0, 1, 2], [1, 2, 0], outcome=[1, 1, 0.5])
        >>> preferences.thurstone(data, ties="glenn_david")
        thurstone(3 pairs, 3 items, ties glenn_david)

    References:
        Thurstone (1927), "A law of comparative judgment"; Glenn & David (1960), "Ties in paired-comparison
        experiments".
    """
    options: dict[str, Any] = {
        "ties": ties,
        "annotators": annotators,
        "position": position,
        "length": length,
        "batch_size": batch_size,
    }
    return _made("thurstone", data, features, scale, **options)


@checked(PreferenceError)
def plackett_luce(
    data: PreferenceData,
    *,
    features: Features = None,
    scale: Positive = 1.0,
    ties: Literal["davidson_luce"] | None = None,
    annotators: bool = False,
    length: bool = False,
    batch_size: Count | None = None,
) -> PreferenceModel:
    """Make Plackett and Luce's model of rankings: the best is chosen ∝ exp(s / τ), then the next among the others.

    Args:
        data: rankings of two items or more, or pairs.
        features: of the items, [items, features], or `TextScores(model)`; None gives each item a free score.
        scale: prior standard deviation of scores, or of weights.
        ties: "davidson_luce": a set T of the items left is best ∝ δ_|T|·exp(mean of s / τ over T), with δ₁ = 1 and
            log δ_k the site `tie`, [most that tie − 1], N(0, 1). Data with ties need it; pairs then have Davidson's.
        annotators: whether each annotator has a temperature τ.
        length: whether the logarithm of the text's length counts.
        batch_size: rows a step of `fit` sees; by default all.

    Returns:
        The program, with the sites of `bradley_terry`; `outcome` holds ranks, [rows, places].

    Raises:
        PreferenceError: the data are labels, or have ties and `ties` is None; an option needs what the data lack.

    Example:
        >>> from bayesrl import preferences
        >>> data = preferences.PreferenceData.of_rankings([[2, 0, 1], [2, 1]])
        >>> preferences.plackett_luce(data)
        plackett_luce(2 rankings, 3 items)

    References:
        Plackett (1975), "The analysis of permutations"; Luce (1959), "Individual choice behavior"; Firth, Kosmidis &
        Turner (2019), "Davidson–Luce model for multi-item choice with ties".
    """
    options: dict[str, Any] = {"ties": ties, "annotators": annotators, "length": length, "batch_size": batch_size}
    return _made("plackett_luce", data, features, scale, **options)


@checked(PreferenceError)
def gaussian_ratings(
    data: PreferenceData,
    *,
    features: Features = None,
    scale: Positive = 1.0,
    noise: Positive = 1.0,
    length: bool = False,
    batch_size: Count | None = None,
) -> PreferenceModel:
    """Make a model of ratings: a rating is N(offset + s_i + length · ℓ_i, noise²).

    It is linear and normal, so that `infer(..., method="conjugate")` is exact, its evidence too.

    Sites: those of `bradley_terry`, and `offset`, N(0, 10²); `outcome` [rows] is observed.

    Args:
        data: ratings: records with `completion` and `score`, or `PreferenceData.of_ratings`.
        features: of the items, [items, features], or `TextScores(model)`; None gives each item a free score.
        scale: prior standard deviation of scores, or of weights, in units of the ratings.
        noise: standard deviation of a rating around its score.
        length: whether the logarithm of the text's length counts.
        batch_size: rows a step of `fit` sees; by default all.

    Returns:
        The program.

    Raises:
        PreferenceError: the data are no ratings; an option needs what the data lack.

    Example:
        >>> import jax
        >>> from bayesrl import preferences
        >>> data = preferences.PreferenceData.of_ratings([0, 0, 1], [4, 5, 2])
        >>> posterior = preferences.infer(jax.random.key(0), preferences.gaussian_ratings(data), method="conjugate")
        >>> bool(posterior.mean.mean[0] > posterior.mean.mean[1])
        True

    References:
        Bishop (2006), "Pattern recognition and machine learning", equations 3.49 to 3.51.
    """
    return _made("gaussian_ratings", data, features, scale, noise=noise, length=length, batch_size=batch_size)


def _made(
    name: Any,
    data: PreferenceData,
    features: Any,
    scale: float,
    *,
    ties: Any = None,
    annotators: bool = False,
    position: bool = False,
    length: bool = False,
    batch_size: int | None = None,
    noise: float = 1.0,
) -> PreferenceModel:
    if not len(data):
        raise PreferenceError("the data have no rows; pass at least one judgement")
    _check_kind(name, data, ties=ties, position=position)
    scores: ScoreModel = FreeScores(data.items, scale)
    if isinstance(features, TextScores):
        scores = features.score_model(data, scale)
    elif features is not None:
        scores = LinearScores(check_features(features, data), scale)
    if annotators:
        _check_annotators(data)
    lengths = _standard_lengths(data) if length else None
    most = max(2, data.most_tied)
    made = PreferenceModel(data, scores, name, ties, annotators, position, lengths, batch_size, most, noise)
    check_outcomes(made)
    return made


def _check_kind(name: str, data: PreferenceData, *, ties: Any, position: bool) -> None:
    if (name == "gaussian_ratings") != (data.kind == "ratings"):
        remedy = "use gaussian_ratings" if data.kind == "ratings" else "use bradley_terry, thurstone or plackett_luce"
        raise PreferenceError(f"{name} got {data.kind}; {remedy}")
    if name == "plackett_luce" and data.kind == "labels":
        raise PreferenceError("plackett_luce got labels, which rank nothing; use bradley_terry or thurstone")
    if name in ("bradley_terry", "thurstone") and data.kind == "rankings":
        raise PreferenceError(f"{name} got rankings; use plackett_luce, or {name}(data.as_pairs(), ...)")
    if data.kind == "labels" and (ties is not None or position):
        option = "ties" if ties is not None else "position"
        raise PreferenceError(f"{name} got {option}=, and labels are of one item at a time; leave it out")
    if position and not data.shown:
        raise PreferenceError(
            "position=True, and the data do not say which of each pair was shown first; give records with first, "
            "second and outcome, or of_pairs(..., shown=True)"
        )


def _check_annotators(data: PreferenceData) -> None:
    """Refuse annotators who cannot be told apart, and name those who judged only once."""
    if data.annotator is None:
        raise PreferenceError("annotators=True, and the data name no annotators; give them a column, or leave it out")
    if (data.annotator < 0).any():
        row = int(np.flatnonzero(data.annotator < 0)[0])
        raise PreferenceError(f"row {row} names no annotator; name one in every row, or leave annotators out")
    counts = np.bincount(data.annotator, minlength=len(data.annotators))
    once = [str(data.annotators[at]) for at in np.flatnonzero(counts == 1)]
    if len(once) == len(data.annotators):
        raise PreferenceError(
            f"each of {pluralize(len(once), 'annotator')} judged once, which tells nothing of their temperatures; "
            "leave annotators out"
        )
    if once:
        listed = ", ".join(once[:_MOST_NAMED]) + (", …" if len(once) > _MOST_NAMED else "")
        warnings.warn(
            f"{len(once)} of {pluralize(len(data.annotators), 'annotator')} judged only once ({listed}); their "
            "temperatures stay near the prior",
            stacklevel=4,
        )


def _standard_lengths(data: PreferenceData) -> np.ndarray:
    """Return log lengths of the items' completions, in standard deviations around their mean, [items]."""
    lengths = np.log([1.0 + _length_of(item) for item in data.items])
    if lengths.std() < 1e-9:
        raise PreferenceError("length=True, and all items are of one length; leave it out")
    return (lengths - lengths.mean()) / lengths.std()


def _length_of(item: Item) -> int:
    completion = item["completion"]
    if isinstance(completion, str):
        return len(completion)
    return sum(len(str(one.get("content") or "")) if isinstance(one, dict) else 1 for one in completion)

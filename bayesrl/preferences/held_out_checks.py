"""How well a posterior predicts judgements: held-out log score, calibration curve, posterior predictive p-values."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from scipy.special import logsumexp

from bayesrl.compilation.jit import closure_jit
from bayesrl.compilation.random_keys import split
from bayesrl.errors import PreferenceError
from bayesrl.preferences.outcome_log_probs import FIRST, TIE
from bayesrl.preferences.preference_program import PreferenceModel
from bayesrl.preferences.score_models import as_whole
from bayesrl.statistics.estimates import Estimate
from bayesrl.typing import PRNGKey

_ROUNDING = 1e-4


class CalibrationCurve(NamedTuple):
    """Predicted chances beside how often the events happened, by bins of equal counts.

    Attributes:
        predicted: mean predicted probability, [bins].
        observed: share of events, [bins].
        counts: judgements, [bins].
    """

    predicted: np.ndarray
    observed: Estimate
    counts: np.ndarray


def log_likelihoods(model: PreferenceModel, draws: Mapping[str, Any]) -> np.ndarray:
    """Return log P(outcome | θ) of every row for every draw, [draws, rows], nats."""
    rows, seen = as_whole(np.arange(len(model.data))), model.outcomes

    def score(sites: Mapping[str, Array], seen: Array) -> Array:
        return model.outcome_given(sites, rows).log_prob(seen)

    return np.asarray(closure_jit(jax.vmap(score, in_axes=(0, None)), name="log_likelihoods")(dict(draws), seen))


def log_score(model: PreferenceModel, draws: Mapping[str, Any]) -> Estimate:
    """Return the mean over rows of log E[P(outcome | θ)], nats, and its standard error over rows."""
    per_draw = log_likelihoods(model, draws)
    per_row = logsumexp(per_draw, axis=0) - np.log(len(per_draw))
    se = per_row.std(ddof=1) / np.sqrt(len(per_row)) if len(per_row) > 1 else np.nan
    return Estimate(np.asarray(per_row.mean()), np.asarray(se))


def calibration_curve(model: PreferenceModel, draws: Mapping[str, Any], bins: int) -> CalibrationCurve:
    """Sort judgements by the predicted chance of an event, and count how often it happened.

    The event is that a label is good, or that the first of a pair won: the one shown first, or else the item with the
    lesser number, since chosen items always come first. Rankings are broken into pairs. A tie counts as half.
    """
    if model.data.kind == "ratings":
        raise PreferenceError("ratings are numbers and no events; use log_score, or predictive_p_values")
    if model.ties == "davidson_luce" and model.data.ranks.shape[1] > 2:
        raise PreferenceError(
            "pairs of a ranking with ties have no chances of their own under Davidson and Luce; use log_score, or "
            "predictive_p_values"
        )
    if model.name == "plackett_luce":
        pairs = model.data.as_pairs() if model.data.kind == "rankings" else model.data
        model = replace(model, data=pairs, name="bradley_terry", ties=model.ties and "davidson")
    if len(model.data) < bins:
        raise PreferenceError(f"bins={bins} for {len(model.data)} judgements; use fewer bins")
    rows = as_whole(np.arange(len(model.data)))

    def chances(sites: Mapping[str, Array]) -> Array:
        return jnp.exp(model.outcome_given(sites, rows).logits)

    probs = np.asarray(closure_jit(jax.vmap(chances), name="chances")(dict(draws)), float).mean(0)
    if model.data.labels is not None:
        chance, event = probs[:, 1], model.data.labels.astype(float)
    else:
        tied = probs[:, TIE] if probs.shape[1] > TIE else 0.0
        chance, event = probs[:, FIRST] + 0.5 * tied, model.data.outcomes
        turned = (model.data.members[:, 0] > model.data.members[:, 1]) & (not model.data.shown)
        chance, event = np.where(turned, 1 - chance, chance), np.where(turned, 1 - event, event)
    parts = np.array_split(np.argsort(chance, kind="stable"), bins)
    counts = np.asarray([len(part) for part in parts])
    share = np.asarray([event[part].mean() for part in parts])
    # The chances that were predicted give the error; the observed share may be 0 or 1 by chance.
    spread = np.asarray([np.sqrt((chance[part] * (1 - chance[part])).mean() / len(part)) for part in parts])
    return CalibrationCurve(np.asarray([chance[part].mean() for part in parts]), Estimate(share, spread), counts)


def predictive_p_values_of(key: PRNGKey, model: PreferenceModel, draws: Mapping[str, Any]) -> dict[str, float]:
    """Compare replicated judgements with those seen: P(T(replicated) > T(seen)), ties counting half.

    T is the log-likelihood, the spread of the items' shares of wins, and the number of ties where the model has them.
    """
    rows, seen, members = as_whole(np.arange(len(model.data))), model.outcomes, as_whole(model.data.members)

    def statistics(outcome: Any, values: Array) -> Array:
        wins = _wins(model, values, members)
        played = jnp.maximum(_wins(model, None, members), 1.0)
        told = [outcome.log_prob(values).sum(), jnp.std(wins / played)]
        return jnp.stack([*told, _num_ties(model, values)] if model.ties is not None else told)

    def replicate(key: PRNGKey, sites: Mapping[str, Array], seen: Array) -> tuple[Array, Array]:
        outcome = model.outcome_given(sites, rows)
        return statistics(outcome, outcome.sample(key)), statistics(outcome, seen)

    count = len(next(iter(draws.values())))
    run = closure_jit(jax.vmap(replicate, in_axes=(0, 0, None)), name="replicate")
    replicated, observed = (np.asarray(part) for part in run(split(key, count), dict(draws), seen))
    tie = np.isclose(replicated, observed, rtol=_ROUNDING, atol=1e-6)
    share = ((replicated > observed) & ~tie).mean(0) + 0.5 * tie.mean(0)
    names = ["log-likelihood", "spread of wins", "ties"]
    return dict(zip(names, map(float, share), strict=False))


def _num_ties(model: PreferenceModel, values: Array) -> Array:
    """Count the pairs of items that share a place."""
    if model.name != "plackett_luce":
        return (values == TIE).sum()
    same = (values[:, None, :] == values[:, :, None]) & (values >= 0)[:, None, :]
    return (same.sum((1, 2)) - (values >= 0).sum(1)).sum() // 2


def _wins(model: PreferenceModel, values: Array | None, members: Array) -> Array:
    """Count for each item the others that it was preferred to, or with no outcomes those that it was judged with."""
    present = members >= 0
    if values is None:
        won = jnp.where(present, jnp.maximum(present.sum(-1, keepdims=True) - 1, 1), 0)
    elif model.name == "plackett_luce":
        lower = values[:, None, :] > values[:, :, None]
        won = jnp.where(present, (lower & present[:, None, :]).sum(-1), 0)
    elif model.data.kind in ("labels", "ratings"):
        won = values[:, None]
    else:
        first = jnp.where(values == TIE, 0.5, jnp.where(values == FIRST, 1.0, 0.0))
        won = jnp.stack([first, 1 - first], -1)
    flat = jnp.where(present, members, 0).reshape(-1)
    return jnp.zeros(model.data.num_items).at[flat].add(jnp.where(present, won, 0).reshape(-1).astype(float))

"""Items to choose among, known by comparisons of people: a policy that does not trust their scores too far."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist

import bayesrl
from bayesrl import control, preferences, rewards
from bayesrl.preferences.report import (
    held_out_section,
    item_names,
    items_section,
    judgements_section,
    policies_section,
    prompts_of,
    say_counts,
)

_POINT_SCALE = 10.0
"""Prior standard deviation of a point estimate: nearly none, as where a reward model is trained by likelihood alone."""


def problem(
    *,
    preferences: str = "",
    items: int = 30,
    features: int = 6,
    comparisons: int = 150,
    attitude: str = "pessimistic",
    beta: float = 0.3,
    seed: int = 0,
) -> bayesrl.Problem:
    """Make the problem.

    By default, items have features, their gold scores are linear in them with weights N(0, 1), and simulated people
    compare pairs by Bradley and Terry's model; some items are compared far more often than others. The posterior of the
    scores is Laplace's; the reward is their value with an attitude to what is not known, relative to choosing any item.

    Args:
        preferences: path of a file of judgements to use instead (.jsonl, .json, .csv, .parquet; see
            `preferences.read`). Its items are the answers to each prompt, with scores of their own, among which the
            policy chooses.
        items: number of simulated items.
        features: of each of them.
        comparisons: number of simulated judgements.
        attitude: "neutral", "pessimistic", "optimistic", "quantile" or "sd_penalty"; see `rewards.uncertain`.
        beta: temperature, log-odds per nat, also of the attitude.
        seed: of the items and the people.

    Raises:
        bayesrl.errors.PreferenceError: the file cannot be read; or a prompt has one item only.
    """
    if preferences:
        table, truth = None, None
        model = model_of(bayesrl.preferences.read(preferences))
    else:
        table, truth, data = simulated(int(items), int(features), int(comparisons), seed)
        model = model_of(data, table)
    places = prompts_of(model.data)
    if places.shape[1] < 2:
        raise bayesrl.errors.PreferenceError("no prompt has two items to choose among; add another answer to one")
    known = bayesrl.preferences.infer(jax.random.key(seed), model, num_samples=2000)
    centre = None if table is None else np.full(len(table), 1 / len(table))
    judged = rewards.uncertain(known, attitude=attitude, reference=centre, **_options(attitude, beta))
    score, gold = jnp.asarray(known.mean.mean), None if truth is None else jnp.asarray(truth)
    present = jnp.asarray(places >= 0)

    def choose(numbers: Any) -> None:
        with numpyro.plate("prompt", len(numbers)):
            place = numpyro.sample("item", dist.Categorical(logits=jnp.where(present, 0.0, -jnp.inf)))
            item = jnp.take_along_axis(numbers, place[..., None], -1)[..., 0]
            bayesrl.reward("judged score", judged(item))
            numpyro.deterministic("expected score", score[item])
            if gold is not None:
                numpyro.deterministic("gold", gold[item])

    return bayesrl.Problem(
        choose,
        (np.maximum(places, 0),),
        beta=float(beta),
        fit_options={"num_steps": 800},
        sections=(_sections(known, places, attitude, truth),),
        about=f"{say_counts(model.data)}; reward: {attitude}",
    )


def learning(
    *, items: int = 10, features: int = 0, questions: int = 100, confidence: float = 0.9, runs: int = 5, seed: int = 0
) -> bayesrl.LearningProblem:
    """Make the problem of asking: which of the items is the best, by as few comparisons as possible.

    Args:
        items: number of items.
        features: of each of them; 0 gives each item a score of its own.
        questions: the most comparisons to ask for.
        confidence: stop once an item is the best with this probability.
        runs: number of independent runs, for the bands.
        seed: of the items.
    """
    table, truth, _ = simulated(int(items), max(int(features), 1), 1, seed)
    if not features:
        table, truth = None, np.random.default_rng(seed).normal(0, 1.5, int(items))
    model = control.DuelsModel(int(items), features=table, scale=1.0 if features else 1.5)
    return bayesrl.LearningProblem(
        control.Duels(truth),
        control.BayesianAgent(model, num_samples=256),
        control.most_informative(),
        num_episodes=int(questions),
        num_runs=int(runs),
        learn_options={"confidence": float(confidence)},
        sections=(control.learning_values(truth.tolist()),),
    )


def simulated(items: int, features: int, comparisons: int, seed: int) -> tuple[Any, np.ndarray, Any]:
    """Draw features of items, their gold scores, and comparisons of which some items get far more than others."""
    rng = np.random.default_rng([seed, 18])
    table = rng.normal(size=(items, features))
    truth = table @ rng.normal(size=features) / features**0.5 * 1.5
    often = rng.permutation(np.arange(1, items + 1) ** -1.0)
    pairs = [rng.choice(items, 2, replace=False, p=often / often.sum()) for _ in range(comparisons)]
    first, second = np.transpose(pairs)
    won = rng.logistic(size=comparisons) < truth[first] - truth[second]
    data = preferences.PreferenceData.of_pairs(first, second, won.astype(int), num_items=items)
    return table * 1.5 / features**0.5, truth, data


def model_of(data: Any, table: Any = None, scale: float = 1.0) -> Any:
    """Choose the model of preference that fits the kind of judgements."""
    if data.kind == "rankings":
        return preferences.plackett_luce(data, scale=scale, ties="davidson_luce" if data.num_ties else None)
    if data.kind == "ratings":
        return preferences.gaussian_ratings(data, scale=scale)
    ties = "davidson" if data.kind == "pairs" and data.num_ties else None
    return preferences.bradley_terry(data, features=table, scale=scale, ties=ties)


def _options(attitude: str, beta: float) -> dict[str, Any]:
    return {"beta": float(beta)} if attitude in ("pessimistic", "optimistic") else {}


def _sections(known: Any, places: np.ndarray, attitude: str, truth: np.ndarray | None) -> Callable[..., Any]:
    model, present = known.model, places >= 0
    prior = present / present.sum(1, keepdims=True)

    def by_prompt(values: np.ndarray) -> np.ndarray:
        return np.where(present, values[..., np.maximum(places, 0)], 0.0)

    def tilted(scores: np.ndarray, beta: float) -> np.ndarray:
        logits = np.where(present, by_prompt(scores) / beta, -np.inf)
        probs = np.exp(logits - logits.max(1, keepdims=True))
        return probs / probs.sum(1, keepdims=True)

    def sections(key: Any, posterior: Any) -> list[Any]:
        beta = float(np.min(posterior.beta))
        one = posterior.select(beta=beta) if np.ndim(posterior.beta) else posterior
        drawn = np.asarray(one.sample(key, 4000)["item"])
        fitted = _shares(drawn.reshape(-1, len(places)), places.shape[1])
        point = preferences.infer(key, model_of(model.data, getattr(model.score_model, "features", None), _POINT_SCALE))
        policies = [
            (f"this fit ({attitude}, β = {beta:g})", fitted),
            (f"the expected scores, β = {beta:g}", tilted(known.mean.mean, beta)),
            (f"a point estimate by likelihood, β = {beta:g}", tilted(point.mean.mean, beta)),
            ("always the best of the point estimate", tilted(point.mean.mean, 1e-6)),
        ]
        chosen, before = np.zeros((2, model.data.num_items))
        chosen[places[present]], before[places[present]] = (
            (fitted / len(places))[present],
            (prior / len(places))[present],
        )
        asked = [] if model.data.kind == "ratings" else [_questions(key, known)]
        found = [
            judgements_section(model.data),
            held_out_section(key, model),
            items_section(known, chosen, before, truth),
            policies_section(policies, prior, by_prompt(known.scores), None if truth is None else by_prompt(truth)),
            *asked,
        ]
        return [section for section in found if section is not None]

    return sections


def _shares(drawn: np.ndarray, places: int) -> np.ndarray:
    return np.stack([np.bincount(column, minlength=places) / len(drawn) for column in drawn.T])


def _questions(key: Any, known: Any) -> Any:
    asked, names = control.pairs_to_ask(key, known, num_pairs=8), item_names(known.model.data)
    rows = [
        [names[first][0], names[first][1], names[second][1], f"{p:.0%}", f"{bits:.3f}"]
        for (first, second), p, bits in zip(asked.pairs, asked.p_first, asked.about_best / np.log(2), strict=True)
    ]
    table = [["asked", "this answer", "or this", "the former wins", "tells (bits)"], *rows]
    return bayesrl.Section(
        "What to ask people next",
        "The comparisons whose answers are expected to tell most about which item is the best (1 bit would settle one "
        "of two). Ask a few of them, add the answers to the file, and fit again.",
        table if any(row[0] for row in rows) else [row[1:] for row in table],
    )

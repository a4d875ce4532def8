"""Report sections on judgements: what people said, how well the scores predict it, and what is known of the items."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from bayesrl.display.formatting import format_estimate, pluralize, truncate
from bayesrl.display.section import Section
from bayesrl.preferences.inference import infer
from bayesrl.preferences.preference_program import PreferenceModel
from bayesrl.preferences.records.preference_data import PreferenceData
from bayesrl.preferences.reward_posterior import RewardPosterior
from bayesrl.report.site_panels import FITTED, PANEL_SIZE, PRIOR, TARGET, escape_mathtext, style_axes
from bayesrl.typing import PRNGKey

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_HELD_OUT = 4
"""One judgement in so many is held out."""
_LEAST = 20
_SHOWN_ITEMS = 24
_NAME = 34


def judgements_section(data: PreferenceData) -> Section:
    """Say what was judged, and what of the records could not be used."""
    counts = np.bincount(data.members[data.members >= 0], minlength=data.num_items)
    rows = [
        ["what", "how many"],
        [f"judgements ({data.kind})", f"{len(data):,}"],
        ["items", f"{data.num_items:,}"],
        ["judgements of one item", f"{counts.min()} to {counts.max()}"],
        *([["ties", f"{data.num_ties:,}"]] if data.kind in ("pairs", "rankings") else []),
        *([["annotators", f"{len(data.annotators):,}"]] if data.annotators else []),
        *([["rows left out", f"{len(data.left_out):,}"]] if data.left_out else []),
        *([["columns that nothing reads", ", ".join(data.unread)]] if data.unread else []),
    ]
    return Section(
        "What people said",
        "Good: every item was judged several times. What was judged seldom is known badly, and a cautious policy keeps "
        "away from it.",
        rows,
    )


def held_out_section(key: PRNGKey, model: PreferenceModel) -> Section | None:
    """Predict a quarter of the judgements from the others; None where there are too few, or they are no pairs."""
    data = model.data
    if data.kind != "pairs" or len(data) < _LEAST:
        return None
    order = np.random.default_rng(0).permutation(len(data))
    cut = len(data) // _HELD_OUT
    seen, unseen = model.with_data(data.take(np.sort(order[cut:]))), data.take(np.sort(order[:cut]))
    posterior = infer(key, seen, num_samples=400)
    score = posterior.log_score(unseen)
    mean, outcomes = posterior.mean.mean, unseen.outcomes
    ahead = np.sign(mean[unseen.members[:, 0]] - mean[unseen.members[:, 1]])
    decided = outcomes != 0.5
    right = float((ahead[decided] == np.sign(outcomes[decided] - 0.5)).mean()) if decided.any() else np.nan
    chance = -np.log(3 if model.ties is not None else 2)
    rows = [
        ["what", "value"],
        ["judgements held out", f"{len(unseen):,}"],
        ["predicted rightly", f"{right:.0%} (a coin: 50%)"],
        ["log score, nats per judgement", f"{format_estimate(score)} (a coin: {chance:.3f})"],
    ]
    return Section(
        "Do the scores predict what people say?",
        "The scores were inferred from three quarters of the judgements, and tested on the rest. Good: clearly better "
        "than a coin. It cannot reach 100% where people disagree.",
        rows,
    )


def items_section(
    posterior: RewardPosterior, chosen: np.ndarray, prior: np.ndarray, truth: np.ndarray | None = None
) -> Section:
    """Show the items' scores with their uncertainty, beside how often the policy takes each.

    Args:
        posterior: of the scores.
        chosen: how often the policy takes each item, [items].
        prior: how often it would without a reward, [items].
        truth: the true scores, relative to their mean, [items], if known.
    """
    known = " Crosses are the true scores." if truth is not None else ""
    return Section(
        "What is known of the items, and what the policy makes of it",
        f"Left: dots are expected scores, bars hold them with 95%.{known} Right: how often the policy takes each item. "
        "Good: the items at the top are taken, and of two alike, the one whose bar is shorter.",
        _items_figure(posterior, chosen, prior, truth),
    )


def _items_figure(
    posterior: RewardPosterior, chosen: np.ndarray, prior: np.ndarray, truth: np.ndarray | None
) -> "Figure":
    from matplotlib.figure import Figure

    draws = posterior.scores - posterior.scores.mean(1, keepdims=True)
    mean = draws.mean(0)
    # The items that matter: those taken most, and the best ones.
    worth = np.argsort(-np.maximum(chosen / chosen.max(), 0.5 * (mean - mean.min()) / max(np.ptp(mean), 1e-9)))
    shown = worth[:_SHOWN_ITEMS]
    shown = shown[np.argsort(mean[shown], kind="stable")]
    places = np.arange(len(shown))
    figure = Figure(figsize=(PANEL_SIZE[0], 1.0 + 0.17 * len(shown)), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=(3, 2))
    low, high = np.quantile(draws[:, shown], [0.025, 0.975], axis=0)
    left.hlines(places, low, high, color=FITTED, linewidth=2, alpha=0.5)
    left.plot(mean[shown], places, "o", color=FITTED, markersize=4)
    if truth is not None:
        left.plot(truth[shown] - truth.mean(), places, "x", color=TARGET, markersize=5)
    names = [" ".join(part for part in item if part) for item in item_names(posterior.model.data)]
    left.set_yticks(places, [escape_mathtext(truncate(names[at], _NAME)) for at in shown], fontsize=7)
    right.barh(places, chosen[shown], color=FITTED, alpha=0.7, label="policy")
    right.plot(prior[shown], places, "|", color=PRIOR, markersize=8, label="before")
    style_axes(left, "score, relative to the mean", "")
    style_axes(right, "share of choices", "")
    for axes in (left, right):
        axes.tick_params(labelsize=7)
        axes.xaxis.label.set_fontsize(8)
    right.legend(frameon=False, fontsize=7, loc="lower right")
    return figure


def policies_section(
    policies: Sequence[tuple[str, np.ndarray]], prior: np.ndarray, draws: np.ndarray, truth: np.ndarray | None = None
) -> Section:
    """Compare policies over items by what they may earn, in exact sums.

    Args:
        policies: names, and probabilities of the items, [prompts, items] each.
        prior: the same of the prior.
        draws: of the scores, [draws, prompts, items].
        truth: the true scores, [prompts, items], if known.
    """
    rows = [["policy", "KL from the start (nats)", "expected gain", "90% sure to lie in", "true gain"]]
    for name, probs in policies:
        with np.errstate(divide="ignore", invalid="ignore"):
            kl = np.where(probs > 0, probs * np.log(probs / prior), 0.0).sum(-1).mean()
        gain = np.einsum("dpi,pi->d", draws, probs - prior) / len(prior)
        low, high = np.quantile(gain, [0.05, 0.95])
        true = "not known" if truth is None else f"{((probs - prior) * truth).sum(-1).mean():.3f}"
        rows.append([name, f"{kl:.2f}", f"{gain.mean():.3f}", f"{low:.3f} to {high:.3f}", true])
    return Section(
        "Would it matter how the reward is read?",
        "What each policy gains in score over choosing as before, as the judgements tell it. A policy that believes a "
        "point estimate expects most of itself. Good: a low end of the interval that you could live with"
        + (", and a true gain that lies inside." if truth is not None else "."),
        rows if truth is not None else [row[:-1] for row in rows],
    )


def prompts_of(data: PreferenceData) -> np.ndarray:
    """Return the numbers of the items of each prompt, [prompts, places], with −1 behind their ends."""
    members: dict[str, list[int]] = {}
    for number, item in enumerate(data.items):
        members.setdefault(repr(item.get("prompt")), []).append(number)
    table = np.full((len(members), max(map(len, members.values()))), -1)
    for row, numbers in zip(table, members.values(), strict=True):
        row[: len(numbers)] = numbers
    return table


def item_names(data: PreferenceData) -> list[tuple[str, str]]:
    """Say what to call each item: its prompt, and its answer."""
    texts = [tuple(_text_of(item.get(part, "")) for part in ("prompt", "completion")) for item in data.items]
    return [(prompt, answer) for prompt, answer in texts]


def _text_of(part: Any) -> str:
    """Write a text, the messages of a conversation or token ids on one line."""
    if isinstance(part, str):
        return " ".join(part.split())
    return " ".join(str(one.get("content")) if isinstance(one, dict) else str(one) for one in part)


def say_counts(data: PreferenceData) -> str:
    """Describe the data in one line, for the head of a report."""
    return f"{pluralize(len(data), 'judgement')} of {pluralize(data.num_items, 'item')}"

"""Report sections on a language model: samples, where they moved, and prompts whose samples no longer differ."""

from typing import TYPE_CHECKING

import numpy as np

from bayesrl.arguments import checked
from bayesrl.display.formatting import format_estimate, format_number, pluralize, truncate
from bayesrl.display.section import Section
from bayesrl.display.tables import Markup, tag
from bayesrl.errors import LanguageModelError
from bayesrl.lm.prompted_policy import TEXT, PromptedPolicy
from bayesrl.lm.prompts import Prompts
from bayesrl.lm.text_samples import (
    ModelSamples,
    TextSamples,
    estimate_mean,
    prefix_rewards,
    sample_texts,
    unpack_posterior,
)
from bayesrl.lm.tokenization.tokenizer import Tokenizer
from bayesrl.posterior.posterior import Posterior
from bayesrl.typing import PRNGKey

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_FITTED, _PRIOR = "#0b62a8", "#8a8f98"
_MOST_POINTS = 400
_PROMPTS, _SAMPLES = 24, 32
_SHOWN = 3
_POSITIONS = 16
_STRONG = 3.0
"""The log-ratio, in nats, at which a token gets the strongest color."""

_COLLAPSED = 0.1
"""A prompt has collapsed if its completions have less than this share of the reference's entropy."""


@checked(LanguageModelError)
def text_sections(key: PRNGKey, posterior: Posterior, *, held_out: Prompts | None = None) -> list[Section]:
    """Make the report sections of a language model: `Problem(sections=(text_sections,))`.

    They show the best, the median and the worst samples, with each token colored by log q/π₀; reward and KL by
    position; length against reward; prompts where the policy collapsed; and, for held-out prompts, completions of
    the reference beside those of the fit.

    Args:
        key: consumed whole.
        posterior: of a program made by `bayesrl.lm.policy`; if it has several temperatures, of the coldest.
        held_out: prompts outside the training set, or None.

    Raises:
        LanguageModelError: the posterior is of another kind.

    Example:
        >>> import jax, jax.numpy as jnp, bayesrl
        >>> from bayesrl.lm import GPT2, GPT2Config, policy, rewards, text_sections
        >>> model = GPT2.init(jax.random.key(0), GPT2Config(vocab_size=4, max_length=4, width=8, depth=1, heads=2))
        >>> writer = policy(model, jnp.zeros((1, 1), int), reward=rewards.length(), max_new_tokens=3)
        >>> bayesrl.Problem(writer, beta=1.0, sections=(text_sections,)).beta
        1.0
    """
    betas = np.asarray(posterior.beta, float)
    one = posterior if betas.ndim == 0 else posterior.select(beta=float(betas.min()))
    policy, _, _ = unpack_posterior(one)
    seen = subset_evenly(policy.prompts)
    # Answer all prompts in one call, so that only one program is compiled.
    prompts = seen if held_out is None else seen.concatenate(subset_evenly(held_out))
    both = sample_texts(key, one, _SAMPLES, prompts)
    samples = both.of(slice(len(seen)))
    sections = [
        _extremes(policy, samples),
        _positions(policy, samples),
        Section(
            "Length and reward",
            "Each point is a completion. Good: reward does not come from length alone, unless that is what you meant.",
            length_figure(samples),
        ),
        _collapsed(policy, samples),
    ]
    if held_out is not None:
        sections.append(_before_and_after(policy, both.of(slice(len(seen), len(prompts)))))
    return sections


def subset_evenly(prompts: Prompts, most: int = _PROMPTS) -> Prompts:
    """Take at most `most` prompts, evenly spaced."""
    if len(prompts) <= most:
        return prompts
    return prompts.take([int(i) for i in np.linspace(0, len(prompts) - 1, most).round()])


def _extremes(policy: PromptedPolicy, samples: TextSamples) -> Section:
    texts = samples.fitted
    order = np.argsort(-texts.reward, axis=None, kind="stable")
    places = [tuple(map(int, np.unravel_index(i, texts.reward.shape))) for i in order]
    best = _distinct(places, texts)
    # With few different texts, one of them could be among the best and the worst.
    worst = [place for place in _distinct(places[::-1], texts)[::-1] if place not in best]
    rows: list[tuple[str, ...]] = [("", "reward", "log q/π₀", "prompt", "completion")]
    ranks = {"best": best, "median": [places[len(places) // 2]], "worst": worst}
    for rank, place in ((rank, place) for rank, group in ranks.items() for place in group):
        reward, ratio = format_number(float(texts.reward[place])), format_number(float(texts.log_ratio[place].sum()), 3)
        prompt = truncate(samples.prompts.examples[place[1]]["prompt"])
        colored = color_tokens(policy.tokenizer, texts.tokens[place], texts.mask[place], texts.log_ratio[place])
        rows.append((rank, reward, ratio, prompt, colored))
    return Section(
        "Samples, token by token",
        "Blue tokens are likelier under the fit than under the reference, orange ones less likely; the stronger, the "
        f"more, up to {_STRONG:g} nats. Good: the best read as you meant, and no trick earns the reward.",
        rows,
    )


def _distinct(places: list[tuple[int, ...]], texts: ModelSamples) -> list[tuple[int, ...]]:
    first: dict[bytes, tuple[int, ...]] = {}
    for place in places:
        first.setdefault(texts.tokens[place].tobytes(), place)
        if len(first) == _SHOWN:
            break
    return list(first.values())


def color_tokens(tokenizer: Tokenizer | None, tokens: np.ndarray, mask: np.ndarray, ratio: np.ndarray) -> Markup:
    """Write tokens with a background color that shows log q/π₀ of each, in nats."""
    indices = np.flatnonzero(mask)
    pieces = token_pieces(tokenizer, tokens[indices])
    spans = []
    for piece, value in zip(pieces, ratio[indices], strict=True):
        strength = 0.55 * min(abs(float(value)) / _STRONG, 1.0)
        hue = "30,120,220" if value > 0 else "230,120,20"
        shown = piece.replace("\n", "⏎")
        spans.append(tag("span", shown, style=f"background:rgba({hue},{strength:.2f})", title=f"{value:+.2f} nats"))
    return tag("span", *spans, style="white-space:pre-wrap;font-family:ui-monospace,monospace")


def token_pieces(tokenizer: Tokenizer | None, tokens: np.ndarray) -> list[str]:
    """Cut a text where its tokens begin; the pieces join to the decoded text, and ∎ marks the end."""
    if tokenizer is None:
        return [f"{int(token)} " for token in tokens]
    prefixes = ["", *tokenizer.decode([tokens[: i + 1] for i in range(len(tokens))], continues=True)]
    # A multi-byte character is complete only with its last token; leave it out until then, or until the end.
    clean = [prefix if prefix == prefixes[-1] else prefix.rstrip("\ufffd") for prefix in prefixes]
    return [
        "∎" if int(token) in tokenizer.eos_ids else after[len(before) :] if after.startswith(before) else ""
        for token, before, after in zip(tokens, clean, clean[1:], strict=False)
    ]


def _positions(policy: PromptedPolicy, samples: TextSamples) -> Section:
    steps = samples.fitted.tokens.shape[-1]
    positions = np.unique(np.linspace(0, steps - 1, min(steps, _POSITIONS)).round().astype(int))
    earned = [prefix_rewards(policy, samples.prompts, texts, positions) for texts in (samples.fitted, samples.prior)]
    return Section(
        "Reward and KL by position",
        "Above: the reward of what is written so far. Below: KL of each next token, summed over the vocabulary. Good: "
        "KL is spent where reward is earned.",
        position_figure(samples, positions, earned[0], earned[1]),
    )


def _collapsed(policy: PromptedPolicy, samples: TextSamples) -> Section:
    """List prompts by the share of the reference's entropy that is left, least first."""
    texts = samples.fitted
    # −log p of a model's own samples estimates its entropy without bias; each model is judged by its own.
    ours, theirs = -texts.log_q.sum(-1).mean(0), -samples.prior.log_prior.sum(-1).mean(0)
    # A reference that allows just one answer has no entropy.
    share = ours / np.maximum(theirs, 1e-6)
    gone = int((share < _COLLAPSED).sum())
    rows: list[tuple[object, ...]] = [("prompt", "entropy left", "nats", f"different of {_SAMPLES}", "most frequent")]
    for i in np.argsort(share)[: 2 * _SHOWN]:
        distinct, first, counts = np.unique(texts.tokens[:, i], axis=0, return_index=True, return_counts=True)
        commonest = completion_text(policy, texts, (int(first[counts.argmax()]), int(i)))
        prompt = truncate(samples.prompts.examples[int(i)]["prompt"])
        rows.append((prompt, f"{share[i]:.0%}", float(ours[i]), len(distinct), commonest))
    return Section(
        "Prompts where the policy collapsed",
        f"{gone} of {len(samples.prompts)} prompts have kept less than {_COLLAPSED:.0%} of the reference's entropy; "
        "those with the least are listed. Good: none, unless only one answer is right.",
        rows,
    )


def completion_text(policy: PromptedPolicy, texts: ModelSamples, place: tuple[int, ...]) -> str:
    """Decode one completion up to its end, and shorten it."""
    tokens = texts.tokens[place][texts.mask[place]]
    text = policy.read(TEXT, tokens)
    return truncate(" ".join(map(str, tokens)) if text is None else text)


def _before_and_after(policy: PromptedPolicy, samples: TextSamples) -> Section:
    """Show the completion with the median reward of fit and reference, for evenly chosen prompts."""
    rows: list[tuple[object, ...]] = [("held-out prompt", "before", "reward", "after", "reward")]
    for i in range(min(len(samples.prompts), 4 * _SHOWN)):
        row: list[object] = [truncate(samples.prompts.examples[i]["prompt"])]
        for texts in (samples.prior, samples.fitted):
            rewards = texts.reward[:, i]
            place = (int(np.argsort(rewards)[len(rewards) // 2]), i)
            row += [completion_text(policy, texts, place), float(texts.reward[place])]
        rows.append(tuple(row))
    by_draw = [texts.reward.mean(1) for texts in (samples.prior, samples.fitted)]
    before, after = (format_estimate(estimate_mean(x)) for x in by_draw)
    num = len(samples.prompts)
    return Section(
        "Before and after, on held-out prompts",
        f"The completion of median reward among {_SAMPLES}. The mean reward of these {_SAMPLES * num:,} completions of "
        f"{pluralize(num, 'prompt')} was {before} and is {after} (E[R] of all that was held out stands elsewhere). "
        "Good: it rose here as it did in training.",
        rows,
    )


# ---- figures -------------------------------------------------------------------------------------


def position_figure(samples: TextSamples, positions: np.ndarray, fitted: np.ndarray, prior: np.ndarray) -> "Figure":
    """Draw the reward of the text so far, and the KL of each next token, by position."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(4.6, 4.8), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True)
    for values, color, name in ((fitted, _FITTED, "fit"), (prior, _PRIOR, "reference")):
        _band(above, positions + 1, values.reshape(len(positions), -1), color, name)
    above.set_ylabel("reward so far")
    above.legend(frameon=False)
    kl = samples.fitted.kl
    steps = np.arange(kl.shape[-1]) + 1
    _band(below, steps, kl.reshape(-1, kl.shape[-1]).T, _FITTED, "KL")
    going_on = samples.fitted.mask.mean((0, 1))
    if going_on.min() < 1:
        other = below.twinx()
        other.plot(steps, going_on, color=_PRIOR, linestyle=":", linewidth=1.4)
        other.set_ylim(0, 1.02)
        other.set_ylabel("share still writing (dotted)", color=_PRIOR)
    below.set_ylabel("KL of the next token, nats")
    below.set_ylim(bottom=0)
    below.set_xlabel("position")
    for axes in (above, below):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.spines["top"].set_visible(False)
    return figure


def _band(axes: "Axes", x: np.ndarray, values: np.ndarray, color: str, name: str) -> None:
    """Draw a mean with a band of two standard errors, from values [x, draws]."""
    mean, se = values.mean(-1), values.std(-1) / np.sqrt(values.shape[-1])
    axes.plot(x, mean, color=color, label=name, marker="o" if len(x) < 12 else None, markersize=3)
    axes.fill_between(x, mean - 2 * se, mean + 2 * se, color=color, alpha=0.2, linewidth=0)


def length_figure(samples: TextSamples) -> "Figure":
    """Draw the reward of completions against their length in tokens, for the fit and its reference."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.6, 3.0), layout="constrained")
    axes = figure.subplots()
    for texts, color, name in ((samples.prior, _PRIOR, "reference"), (samples.fitted, _FITTED, "fit")):
        # A fixed seed, so that one fit always gives the same figure.
        rng = np.random.default_rng(0)
        chosen = rng.permutation(texts.reward.size)[:_MOST_POINTS]
        lengths = texts.mask.sum(-1).ravel()[chosen] + rng.uniform(-0.25, 0.25, len(chosen))
        axes.scatter(lengths, texts.reward.ravel()[chosen], s=9, color=color, alpha=0.45, linewidths=0, label=name)
    axes.set_xlabel("length, tokens (the end counts; points are spread a little)")
    axes.set_ylabel("reward")
    for handle in axes.legend(frameon=False, markerscale=2).legend_handles:
        if handle is not None:
            handle.set_alpha(1.0)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    return figure

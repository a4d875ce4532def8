"""Replies to customers by a small GPT-2, rewarded by a judge that was learnt from noisy comparisons of replies."""

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import numpy as np

import bayesrl
from bayesrl import control, lm, rewards
from bayesrl.compilation.callbacks import host_call
from bayesrl.lm.rewards.base import Reward
from bayesrl.lm.rewards.text import decode_completions
from bayesrl.lm.small_models import check_counts, fit_options
from bayesrl.preferences.report import held_out_section, item_names, judgements_section, say_counts

NEEDS = {"tokenizers": {}}

_TOPICS = {
    "reset the router": ("hold the button", "for ten seconds"),
    "change my password": ("open the settings", "under security"),
    "find my parcel": ("check the tracking page", "with your order number"),
    "get a refund": ("fill in the form", "within thirty days"),
    "charge the lamp": ("use the small cable", "for one hour"),
    "cancel my plan": ("write to support", "before friday"),
}
_ASKED = ("How do I {}?", "Please tell me how to {}.")
"""Two ways to ask: the first is trained on, the second is held out."""

_OPENINGS = ("thanks for asking", "good question", "sure")
_CLOSINGS = ("let us know", "have a nice day")
_EVASIONS = ("it depends", "please wait", "this is easy", "many people ask that")
_SCALE = 0.5
"""Prior standard deviation of what a word is worth to the judge, log-odds."""
_MOST_WORDS, _MOST_PROMPTS = 60, 12


def problem(
    *,
    preferences: str = "",
    checkpoint: str = "",
    comparisons: int = 200,
    attitude: str = "pessimistic",
    max_new_tokens: int = 20,
    num_particles: int = 12,
    num_steps: int = 120,
    rank: int = 0,
    training_steps: int = 300,
    beta: float = 0.5,
    seed: int = 0,
) -> bayesrl.Problem:
    """Make the problem.

    The reference is a model briefly trained on replies of mixed quality. Its replies are compared in pairs by people
    who follow a gold score with the noise of Bradley and Terry's model. The judge counts words: each is worth something
    to it, and to each question something more. It learns that from the comparisons, by Laplace's approximation; the
    reward is its score, relative to the mean of what was compared, with an attitude to what it does not know. A judge
    that counts can be told the same thing twice, and people cannot.

    Args:
        preferences: path of a file of judgements to use instead (.jsonl, .json, .csv, .parquet; see
            `preferences.read`), with texts as prompts and answers. No gold score is known then.
        checkpoint: folder or hub id of a causal model to use instead.
        comparisons: number of simulated judgements.
        attitude: "neutral", "pessimistic", "optimistic", "quantile" or "sd_penalty"; see `rewards.uncertain`.
        max_new_tokens: length of the longest reply, its end included.
        num_particles: number of replies to each prompt in each step.
        num_steps: steps of the fit.
        rank: rank of low-rank paths; 0 trains all parameters.
        training_steps: training steps of the reference.
        beta: temperature, log-odds per nat, also of the attitude.
        seed: of the texts, the people and the model.

    Raises:
        bayesrl.errors.PreferenceError: the file cannot be read, or holds no texts.
    """
    check_counts(comparisons=comparisons, training_steps=training_steps)
    given = bayesrl.preferences.read(preferences) if preferences else None
    records = _replies(seed) if given is None else _texts_of(given)
    model = _writer(records, checkpoint, int(training_steps), seed)
    asked, unseen = _prompts(records, known=given is None)
    gold = rewards_of_gold() if given is None else {}
    write = partial(lm.policy, model, max_new_tokens=int(max_new_tokens))
    if given is None:
        given = compared(jax.random.key(seed), write(asked, reward=gold["gold"]), int(comparisons), seed)
    judge = Judge.of(given)
    ties = "davidson" if given.kind == "pairs" and given.num_ties else None
    believed = bayesrl.preferences.bradley_terry(given, features=judge.table(given.items), scale=_SCALE, ties=ties)
    known = bayesrl.preferences.infer(jax.random.key(seed), believed)
    options = {"beta": float(beta)} if attitude in ("pessimistic", "optimistic") else {}
    middle = np.full(given.num_items, 1 / given.num_items)
    reward = replace(judge, belief=rewards.uncertain(known, attitude=attitude, reference=middle, **options))
    policy = write(asked, reward=reward, metrics=gold)
    held_out = lm.encode_prompts(unseen, model.tokenizer)
    return bayesrl.Problem(
        policy,
        beta=float(beta),
        fit_options=fit_options(rank=rank, num_particles=num_particles, num_steps=num_steps),
        held_out=(held_out,),
        sections=(_sections(known, gold=bool(gold)), partial(lm.text_sections, held_out=held_out)),
        about=f"{say_counts(known.model.data)}; reward: {attitude}",
    )


@dataclass(frozen=True, eq=False)
class Judge(Reward):
    """Reads a reply as the words in it, and as those words for that prompt, and may score what it reads.

    Attributes:
        words: that it knows.
        prompts: for each of which words are worth something of their own.
        belief: what the words may be worth; None reads only.
    """

    words: tuple[str, ...]
    prompts: tuple[str, ...]
    belief: Any = None

    @classmethod
    def of(cls, data: Any) -> "Judge":
        """Know the words and prompts of what was judged."""
        counts = Counter(word for item in data.items for word in words_of(item["completion"]))
        prompts = tuple(dict.fromkeys(item.get("prompt", "") for item in data.items))
        return cls(
            tuple(word for word, _ in counts.most_common(_MOST_WORDS)), prompts if len(prompts) <= _MOST_PROMPTS else ()
        )

    def table(self, items: Sequence[Mapping[str, Any]]) -> np.ndarray:
        """Count words, [items, features]."""
        known = {word: at for at, word in enumerate(self.words)}
        counts = np.zeros((len(items), 1 + len(self.prompts), len(known)))
        for row, item in zip(counts, items, strict=True):
            for word in words_of(item["completion"]):
                if word in known:
                    row[0, known[word]] += 1
            if item.get("prompt", "") in self.prompts:
                row[1 + self.prompts.index(item["prompt"])] = row[0]
        return counts.reshape(len(items), -1)

    def __call__(self, completions: Any) -> jax.Array:
        """Score completions."""
        examples, width = completions.examples, (1 + len(self.prompts)) * len(self.words)

        def read(index: np.ndarray, tokens: np.ndarray, mask: np.ndarray) -> np.ndarray:
            texts = decode_completions(examples, tokens, mask)
            asked = [examples[int(at)]["prompt"] for at in index.reshape(-1)]
            items = [{"prompt": prompt, "completion": text} for prompt, text in zip(asked, texts, strict=True)]
            return self.table(items).astype(np.float32).reshape(*index.shape, width)

        shape = jax.ShapeDtypeStruct((*completions.index.shape, width), np.float32)
        return self.belief(host_call(read, shape, completions.index, completions.tokens, completions.mask))


def words_of(text: str) -> list[str]:
    """Split a text at what is no letter."""
    return re.findall(r"[a-z']+", text.lower())


def gold_score(text: str, example: Mapping[str, Any]) -> float:
    """Score a reply as the simulated people do: for the right step, briefly and politely said.

    2 for the right step, and 1 more for its detail; −1 for each step of something else, for each evasion and for each
    phrase that was said before; 0.5 for one courtesy; −0.5 for each phrase after the third.
    """
    said = [phrase.strip() for phrase in text.strip().rstrip(".").split(",")]
    step, detail = _TOPICS[example["topic"]]
    others = {other for other, _ in _TOPICS.values()} - {step}
    right = step in said
    score = 2.0 * right + 1.0 * (right and detail in said)
    score -= sum(phrase in others or phrase in _EVASIONS for phrase in said)
    score += 0.5 * any(phrase in (*_OPENINGS, *_CLOSINGS) for phrase in said)
    return score - 0.5 * max(len(said) - 3, 0) - (len(said) - len(set(said)))


def rewards_of_gold() -> dict[str, Any]:
    """The gold score as a metric of `lm.policy`."""
    return {"gold": lm.rewards.text_reward(gold_score)}


def compared(key: Any, policy: Any, comparisons: int, seed: int, gold: Callable[..., float] = gold_score) -> Any:
    """Let the policy write two replies for each comparison, and simulated people compare them."""
    rng = np.random.default_rng([seed, 20])
    rounds = -(-3 * comparisons // len(policy.prompts))
    tokens = np.asarray(bayesrl.importance(key, policy, beta=1e6, num_samples=2 * rounds).sites["text"])
    examples = policy.prompts.examples
    rows = []
    for at in range(rounds):
        for number, example in enumerate(examples):
            first, second = (policy.read("text", tokens[2 * at + side, number]) for side in (0, 1))
            if first == second or not first.strip() or not second.strip():
                continue
            won = rng.logistic() < gold(first, example) - gold(second, example)
            chosen, rejected = (first, second) if won else (second, first)
            rows.append({"prompt": example["prompt"], "chosen": chosen, "rejected": rejected})
    return bayesrl.preferences.read([rows[at] for at in rng.permutation(len(rows))[:comparisons]])


def _replies(seed: int, num: int = 1500) -> list[dict[str, str]]:
    """Draw prompts with replies of mixed quality, from the right step to none."""
    rng = np.random.default_rng([seed, 19])
    steps, rows = list(_TOPICS.values()), []
    for _ in range(num):
        topic = list(_TOPICS)[rng.integers(len(_TOPICS))]
        step, detail = _TOPICS[topic] if rng.random() < 0.5 else steps[rng.integers(len(steps))]
        said = [str(rng.choice(_OPENINGS))] * int(rng.random() < 0.4)
        said += [str(rng.choice(_EVASIONS)) for _ in range(rng.integers(0, 3))]
        if rng.random() < 0.6:
            said += [step, *[detail] * int(rng.random() < 0.5)]
        said += [str(rng.choice(_CLOSINGS))] * int(rng.random() < 0.3)
        text = ", ".join(said or [str(rng.choice(_EVASIONS))])
        question = _ASKED[rng.integers(2)].format(topic)
        rows.append({"prompt": question, "answer": f" {text}.", "topic": topic})
    return rows


def _texts_of(data: Any) -> list[dict[str, str]]:
    rows = [{"prompt": item.get("prompt", ""), "answer": item["completion"]} for item in data.items]
    if not all(isinstance(value, str) and value.strip() for row in rows for value in row.values()):
        raise bayesrl.errors.PreferenceError(
            "the file holds prompts or answers that are no texts, or empty; write each judgement with the texts "
            "prompt, chosen and rejected"
        )
    return rows


def _prompts(records: Sequence[Mapping[str, str]], *, known: bool) -> tuple[list[Any], list[Any]]:
    """Choose prompts for the fit, and others to hold out."""
    different = {row["prompt"]: {name: row[name] for name in row if name != "answer"} for row in records}
    if known:
        marks = [form.partition("{")[0] for form in _ASKED]
        return tuple([row for asked, row in different.items() if asked.startswith(mark)] for mark in marks)
    rows = list(different.values())
    cut = max(1, len(rows) * 3 // 4)
    return rows[:cut], rows[cut:] or rows[:1]


def _writer(records: Sequence[Mapping[str, str]], checkpoint: str, steps: int, seed: int) -> lm.Pretrained:
    if checkpoint:
        return lm.load_pretrained(checkpoint)
    tokenizer = lm.train_bpe([row["prompt"] + row["answer"] for row in records], 700)
    return lm.train_small_lm(
        jax.random.key(seed), "helpful_text", records, tokenizer, num_steps=steps, width=64, depth=2
    )


def _sections(known: Any, *, gold: bool) -> Callable[..., Any]:
    def sections(key: Any, posterior: Any) -> list[Any]:
        beta = float(np.min(posterior.beta))
        one = posterior.select(beta=beta) if np.ndim(posterior.beta) else posterior
        both = lm.sample_texts(key, one, 64)
        found = [judgements_section(known.model.data), held_out_section(key, known.model)]
        found += [_examples(known), _gains(known, one.programs.policy, both, gold=gold)]
        found += [_questions(key, known, one.programs.policy, both)]
        return [section for section in found if section is not None]

    return sections


def _examples(known: Any) -> Any:
    order, names = np.argsort(-known.mean.mean, kind="stable"), item_names(known.model.data)
    shown = [*order[:4], *order[len(order) // 2 :][:2], *order[-4:]]
    rows = [[*names[at], f"{known.mean.mean[at]:.2f} ± {known.sd[at]:.2f}"] for at in dict.fromkeys(shown)]
    return bayesrl.Section(
        "What the judge has learnt",
        "Some of the answers that people compared: the best, two in the middle and the worst by the judge's score, ± "
        "what it does not know. Good: you would put them in about the same order.",
        [["asked", "answer", "score"], *rows],
    )


def _gains(known: Any, policy: Any, both: Any, *, gold: bool) -> Any:
    rows = [["", "before", "after the fit"]]
    ways = (both.prior, both.fitted)
    means = [_mean_scores(known, policy, one.tokens) for one in ways]
    values = {"what the fit maximises": [one.reward for one in ways], "the judge's mean score": means}
    values |= {"gold score, which people follow": [one.metrics["gold"] for one in ways]} if gold else {}
    for told, parts in values.items():
        rows.append([told, *(f"{np.mean(part):.2f} ± {_se(np.asarray(part)):.2f}" for part in parts)])
    rows.append(["tokens of an answer", *(f"{np.mean(one.mask.sum(-1)):.1f}" for one in ways)])
    advice = "Good: the gold score rises with the judge's." if gold else "Good: you like the new answers better too."
    return bayesrl.Section(
        "Did the answers become better, or only the judge's opinion of them?",
        f"{advice} A judge's score that rises alone has been exploited: use a larger β, or ask people for more.",
        rows,
    )


def _mean_scores(known: Any, policy: Any, tokens: np.ndarray) -> np.ndarray:
    """Return the judge's mean scores of completions, relative to what was compared, [samples, prompts]."""
    asked = [row["prompt"] for row in policy.prompts.examples]
    texts = [[(asked[at], policy.read("text", own)) for at, own in enumerate(row)] for row in tokens]
    different = list(dict.fromkeys(text for row in texts for text in row))
    items = [{"prompt": prompt, "completion": text} for prompt, text in different]
    scores = known.scores_of(items, features=next(iter(policy.rewards.values())).table(items)).mean(0)
    worth = dict(zip(different, scores - known.mean.mean.mean(), strict=True))
    return np.array([[worth[text] for text in row] for row in texts])


def _se(values: np.ndarray) -> float:
    return float(values.mean(1).std(ddof=1) / len(values) ** 0.5)


def _questions(key: Any, known: Any, policy: Any, both: Any) -> Any:
    """Ask about what the policy writes now, where the judge was never trained."""
    texts = [
        dict.fromkeys(policy.read("text", tokens) for tokens in both.fitted.tokens[:, at].astype(np.int32))
        for at in range(both.fitted.tokens.shape[1])
    ]
    rows = [
        {"prompt": example["prompt"], "chosen": first, "rejected": second}
        for example, own in zip(policy.prompts.examples, texts, strict=True)
        for first, second in zip(list(own)[:8:2], list(own)[1:8:2], strict=False)
        if first.strip() and second.strip()
    ]
    if not rows or known.model.data.kind != "pairs":
        return None
    data = bayesrl.preferences.read(rows)
    features = next(iter(policy.rewards.values())).table(data.items)
    written = replace(known, model=known.model.with_data(data, features))
    asked = control.pairs_to_ask(key, written, num_pairs=8)
    names = item_names(written.model.data)
    shown = [
        [names[first][0], names[first][1], names[second][1], f"{p:.0%}", f"{bits:.3f}"]
        for (first, second), p, bits in zip(asked.pairs, asked.p_first, asked.about_best / np.log(2), strict=True)
    ]
    return bayesrl.Section(
        "What to ask people next",
        "Pairs of answers that the policy writes now, whose comparison is expected to tell most about which of them is "
        "the best (1 bit would settle one of two). Add the answers to the file, and fit again.",
        [["asked", "this answer", "or this", "the former wins", "tells (bits)"], *shown],
    )

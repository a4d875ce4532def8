"""Numbers from digits to English words, and on to French and German: a small GPT-2, rewarded by chrF."""

from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

import bayesrl
from bayesrl import lm
from bayesrl.lm import rewards
from bayesrl.lm.small_models import check_counts, fit_options

NEEDS = {"tokenizers": {}, "sacrebleu": {}, "num2words": {"pairs": ""}}

_LARGEST = 1000
_LANGUAGES = ("fr", "de")
_UNTRANSLATED = 1 / 3
"""Share of training pairs that are left untranslated."""


def problem(
    *,
    checkpoint: str = "",
    pairs: str = "",
    num_prompts: int = 64,
    max_new_tokens: int = 16,
    batch: int = 12,
    num_particles: int = 12,
    num_steps: int = 100,
    rank: int = 0,
    training_steps: int = 200,
    beta: float = 0.05,
    seed: int = 0,
) -> bayesrl.Problem:
    """Make the problem.

    The reference is a model briefly trained on other numbers, a third of them left untranslated. The reward is the
    mean of chrF, between 0 and 1, and of an exact match; the metrics report both. A part of the sentences is held out.

    Args:
        checkpoint: folder or hub id of a causal model to use instead.
        pairs: path of a file with a prompt, a tab and its translation in each line; by default, numbers as num2words
            spells them.
        num_prompts: number of sentences to train on.
        max_new_tokens: length of the longest translation, its end included.
        batch: number of sentences in each step.
        num_particles: number of translations of each sentence.
        num_steps: steps of the fit.
        rank: rank of low-rank paths; 0 trains all parameters.
        training_steps: training steps of the reference.
        beta: temperature, reward units per nat.
        seed: seed of the choice of sentences and of the model.

    Raises:
        bayesrl.errors.LanguageModelError: the file cannot be read, or a line has no tab.
    """
    check_counts(num_prompts=num_prompts, training_steps=training_steps)
    rows = read_pairs(pairs) if pairs else numbers()
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(rows))
    cut = max(1, min(num_prompts, len(rows) // 3))
    train, held_out, others = ([rows[i] for i in part] for part in np.split(order, [cut, cut + max(1, cut // 2)]))
    if checkpoint:
        model = lm.load_pretrained(checkpoint)
    else:
        tokenizer = lm.train_bpe([row["prompt"] + row["answer"] for row in rows], 400)
        careless = [_now_and_then_untranslated(row, rng) for row in others]
        further = [row["prompt"] for row in rows]
        model = lm.train_small_lm(
            jax.random.key(seed), "translation", careless, tokenizer, num_steps=training_steps, room_for=further
        )
    quality, exact = rewards.text_reward(chrf), rewards.exact_match("answer")
    policy = lm.policy(
        model,
        train,
        reward=0.5 * quality + 0.5 * exact,
        metrics={"chrF": 100 * quality, "exact match": exact},
        max_new_tokens=max_new_tokens,
        batch_size=batch,
    )
    unseen = lm.encode_prompts(held_out, model.tokenizer)
    return bayesrl.Problem(
        policy,
        beta=beta,
        fit_options=fit_options(rank=rank, num_particles=num_particles, num_steps=num_steps),
        held_out=(unseen,),
        sections=(partial(lm.text_sections, held_out=unseen),),
    )


def chrf(text: str, example: Any) -> float:
    """Compute chrF of a translation, between 0 and 1 (Popović 2015), as sacrebleu does."""
    from sacrebleu.metrics import CHRF

    score: float = CHRF().sentence_score(text, [example["answer"]]).score
    return score / 100


def numbers() -> list[dict[str, str]]:
    """Spell all numbers below a thousand: digits to English, and English to French and German."""
    from num2words import num2words

    rows = []
    for number in range(_LARGEST):
        english = num2words(number)
        rows.append({"prompt": f"en: {number} =", "answer": f" {english}"})
        rows += [
            {"prompt": f"{language}: {english} =", "answer": f" {num2words(number, lang=language)}"}
            for language in _LANGUAGES
        ]
    return rows


def _now_and_then_untranslated(row: dict[str, str], rng: np.random.Generator) -> dict[str, str]:
    """Replace some translations by the prompt's own words, so that rewards have something to teach."""
    if rng.random() >= _UNTRANSLATED:
        return row
    words = row["prompt"].rpartition(":")[2].removesuffix("=").strip()
    return {**row, "answer": f" {words or row['prompt']}"}


def read_pairs(path: str) -> list[dict[str, str]]:
    """Read lines of a prompt, a tab and its translation."""
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise bayesrl.errors.LanguageModelError(f"pairs={path!r} cannot be read: {error}") from error
    rows = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        prompt, tab, answer = line.partition("\t")
        if not tab or not answer.strip():
            raise bayesrl.errors.LanguageModelError(
                f"line {number} of {path} has no translation; write the prompt, a tab and the translation"
            )
        rows.append({"prompt": prompt, "answer": answer.strip()})
    if len(rows) < 3:
        raise bayesrl.errors.LanguageModelError(f"{path} holds {len(rows)} pairs; at least 3 are needed")
    return rows

"""Questions with one right answer, sums and look-ups: a small GPT-2, rewarded for exact matches."""

from functools import partial
from typing import Any

import jax
import numpy as np

import bayesrl
from bayesrl import lm
from bayesrl.lm import rewards
from bayesrl.lm.prompts import read_json_lines
from bayesrl.lm.small_models import check_counts, fit_options

NEEDS = {"tokenizers": {}}

_FIELDS = "abc"
_LARGEST = 9
_MOST = 2_500
_WRONG = 0.35
"""Share of wrong answers among those that the reference learns from."""


def problem(
    *,
    checkpoint: str = "",
    questions: str = "",
    num_prompts: int = 240,
    max_new_tokens: int = 6,
    batch: int = 24,
    num_particles: int = 16,
    num_steps: int = 100,
    rank: int = 0,
    training_steps: int = 700,
    beta: float = 0.1,
    seed: int = 0,
) -> bayesrl.Problem:
    """Make the problem.

    The reference is a model briefly trained on questions of the same kind, a third of them with wrong answers, so that
    it is partly right. The reward is 1 for an answer that is right to the letter. A fifth of the questions is held
    out.

    Args:
        checkpoint: folder or hub id of a causal model to use instead; it gets the questions as they are.
        questions: path of a JSON-lines file of records with `prompt` and `answer`; by default, they are made up.
        num_prompts: number of questions to train on.
        max_new_tokens: length of the longest answer, its end included.
        batch: number of questions in each step.
        num_particles: number of answers to each question.
        num_steps: steps of the fit.
        rank: rank of low-rank paths; 0 trains all parameters.
        training_steps: training steps of the reference.
        beta: temperature, reward units per nat.
        seed: seed of the questions and of the model.

    Raises:
        bayesrl.errors.LanguageModelError: a file cannot be read or lacks a field.
    """
    check_counts(num_prompts=num_prompts, training_steps=training_steps)
    further = max(1, num_prompts // 4)
    rows = read_questions(questions) if questions else made_up(num_prompts + further, seed)
    order = np.random.default_rng(seed).permutation(len(rows))
    cut = max(1, min(num_prompts, len(rows) * 4 // 5 if questions else num_prompts))
    train, held_out = [rows[i] for i in order[:cut]], [rows[i] for i in order[cut:]]
    model = (
        lm.load_pretrained(checkpoint)
        if checkpoint
        else _train_reference(train if questions else None, rows, training_steps, seed)
    )
    policy = lm.policy(
        model,
        train,
        reward=rewards.exact_match("answer"),
        metrics={"length": rewards.length()},
        max_new_tokens=max_new_tokens,
        batch_size=batch,
    )
    others = lm.encode_prompts(held_out, model.tokenizer)
    return bayesrl.Problem(
        policy,
        beta=beta,
        fit_options=fit_options(rank=rank, num_particles=num_particles, num_steps=num_steps),
        held_out=(others,),
        sections=(partial(lm.text_sections, held_out=others),),
    )


def made_up(count: int, seed: int) -> list[dict[str, str]]:
    """Make up different questions: sums and differences of digits, and fields to look up."""
    if count > _MOST:
        raise bayesrl.errors.LanguageModelError(
            f"num_prompts asks for {count} different questions with those held out, and at most {_MOST} are made up; "
            "lower it"
        )
    rng = np.random.default_rng([seed, 1])
    rows: dict[str, dict[str, str]] = {}
    while len(rows) < count:
        row = _look_up(rng) if rng.random() < 0.5 else _sum(rng)
        rows.setdefault(row["prompt"], row)
    return list(rows.values())


def _sum(rng: np.random.Generator) -> dict[str, str]:
    first, second = sorted(map(int, rng.integers(0, _LARGEST + 1, 2)), reverse=True)
    plus = rng.random() < 0.5
    sign, result = ("+", first + second) if plus else ("-", first - second)
    return {"prompt": f"{first}{sign}{second}=", "answer": str(result)}


def _look_up(rng: np.random.Generator) -> dict[str, str]:
    digits = rng.integers(0, 10, len(_FIELDS))
    field = int(rng.integers(len(_FIELDS)))
    context = " ".join(f"{name}{digit}" for name, digit in zip(_FIELDS, digits, strict=True))
    return {"prompt": f"{context} {_FIELDS[field]}?", "answer": str(digits[field])}


def read_questions(path: str) -> list[dict[str, Any]]:
    """Read records with `prompt` and `answer`, one JSON object per line."""
    rows = read_json_lines(path)
    for number, row in enumerate(rows, 1):
        if not all(isinstance(row.get(name), str) for name in ("prompt", "answer")):
            raise bayesrl.errors.LanguageModelError(
                f"record {number} of {path} has no text under prompt and answer; it has {sorted(row)}"
            )
    if len(rows) < 2:
        raise bayesrl.errors.LanguageModelError(f"{path} holds {len(rows)} questions; at least 2 are needed")
    return rows


def _train_reference(
    questions: list[dict[str, Any]] | None, rows: list[dict[str, Any]], steps: int, seed: int
) -> lm.Pretrained:
    """Train a small model on questions of the same kind, or on those of a file, some of them with wrong answers."""
    rng = np.random.default_rng([seed, 2])
    seen: list[dict[str, Any]]
    if questions is None:
        seen = [_sum(rng) if rng.random() < 0.5 else _look_up(rng) for _ in range(20_000)]
        wrong = [str(answer) for answer in range(2 * _LARGEST)]
    else:
        seen, wrong = questions, [row["answer"] for row in questions]
    seen = [row if rng.random() > _WRONG else {**row, "answer": wrong[rng.integers(len(wrong))]} for row in seen]
    tokenizer = lm.char_tokenizer("".join(row["prompt"] + row["answer"] for row in [*seen, *rows]))
    further = [row["prompt"] for row in rows]
    return lm.train_small_lm(
        jax.random.key(seed), "question_answering", seen, tokenizer, num_steps=steps, room_for=further
    )

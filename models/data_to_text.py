"""Records to sentences: a small GPT-2 that leaves things out, rewarded for saying all that a record holds."""

from collections.abc import Set
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

_SLOTS = {
    "name": ("Aromi", "Bibimbap", "Cotto", "Fitzbillies", "Strada", "Wildwood", "Zizzi", "Loch Fyne"),
    "food": ("Thai", "French", "Indian", "Italian", "Japanese", "English"),
    "area": ("riverside", "city centre", "harbour", "old town"),
    "price": ("cheap", "moderate", "expensive"),
}
_FORMS = (
    "{name} is a restaurant{food}{area}{price}.",
    "{name} serves{food} food{price}{area}.",
    "In the {area} there is {name}{food}{price}.",
)
_PIECES = (
    {"food": " that serves {} food", "area": " in the {}", "price": ", with {} prices"},
    {"food": " {}", "price": " at {} prices", "area": " in the {}"},
    {"food": ", a {} place", "price": ", which is {}"},
)
_SAID = 0.6
"""Probability that a training sentence says a value that it may leave out."""


def problem(
    *,
    checkpoint: str = "",
    records: str = "",
    num_prompts: int = 64,
    max_new_tokens: int = 20,
    batch: int = 12,
    num_particles: int = 12,
    num_steps: int = 100,
    rank: int = 0,
    training_steps: int = 300,
    beta: float = 0.05,
    seed: int = 0,
) -> bayesrl.Problem:
    """Make the problem.

    The reference is a model briefly trained on sentences that each leave out a part of their record. The reward is
    slot coverage: the share of a record's values that the sentence says, minus a tenth for each value of another
    record that it makes up. Other records are held out.

    Args:
        checkpoint: folder or hub id of a causal model to use instead.
        records: path of a JSON-lines file, each line an object of texts; by default, restaurants.
        num_prompts: number of records to train on.
        max_new_tokens: length of the longest sentence, its end included.
        batch: number of records in each step.
        num_particles: number of sentences for each record.
        num_steps: steps of the fit.
        rank: rank of low-rank paths; 0 trains all parameters.
        training_steps: training steps of the reference.
        beta: temperature, reward units per nat.
        seed: seed of the records and of the model.

    Raises:
        bayesrl.errors.LanguageModelError: the file cannot be read, or a line is not an object of texts.
    """
    check_counts(num_prompts=num_prompts, training_steps=training_steps)
    rng = np.random.default_rng([seed, 2])
    known = read_records(records) if records else _restaurants()
    rows = [_row(known[i], rng) for i in rng.permutation(len(known))]
    cut = max(1, min(num_prompts, len(rows) * 2 // 5))
    unseen_end = cut + max(1, cut // 2)
    train, held_out, others = rows[:cut], rows[cut:unseen_end], rows[unseen_end:]
    if checkpoint:
        model = lm.load_pretrained(checkpoint)
    else:
        tokenizer = lm.train_bpe([row["prompt"] + row["answer"] for row in rows], 400)
        further = [row["prompt"] for row in rows]
        model = lm.train_small_lm(
            jax.random.key(seed), "data_to_text", others, tokenizer, num_steps=training_steps, room_for=further
        )
    coverage = rewards.text_reward(slot_coverage)
    invented = rewards.text_reward(
        partial(made_up_values, known=frozenset(value for row in known for value in row.values()))
    )
    policy = lm.policy(
        model,
        train,
        reward=coverage - 0.1 * invented,
        metrics={"slot coverage": coverage, "made up": invented, "length": rewards.length()},
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


def slot_coverage(text: str, example: Any) -> float:
    """Compute the share of a record's values that a sentence says."""
    values = example["record"].values()
    return sum(value.lower() in text.lower() for value in values) / len(values)


def made_up_values(text: str, example: Any, *, known: Set[str]) -> float:
    """Count the `known` values of all records that a sentence says though its own record does not hold them."""
    own = {value.lower() for value in example["record"].values()}
    return float(sum(value.lower() in text.lower() for value in known if value.lower() not in own))


def read_records(path: str) -> list[dict[str, str]]:
    """Read objects of texts from a JSON-lines file, one per line."""
    rows = read_json_lines(path)
    for number, row in enumerate(rows, 1):
        if not row or not all(isinstance(value, str) and value for value in row.values()):
            raise bayesrl.errors.LanguageModelError(f"record {number} of {path} is {row!r}; use an object of texts")
    if len(rows) < 5:
        raise bayesrl.errors.LanguageModelError(f"{path} holds {len(rows)} records; at least 5 are needed")
    return rows


def _restaurants() -> list[dict[str, str]]:
    """Make all restaurants: every name with every food, area and price."""
    grids = np.meshgrid(*(np.arange(len(values)) for values in _SLOTS.values()), indexing="ij")
    rows = np.stack([grid.ravel() for grid in grids], 1)
    return [{slot: _SLOTS[slot][i] for slot, i in zip(_SLOTS, row, strict=True)} for row in rows]


def _row(record: dict[str, str], rng: np.random.Generator) -> dict[str, Any]:
    """Write a record as a prompt and a sentence about a part of it."""
    prompt = "; ".join(f"{slot}: {value}" for slot, value in record.items()) + " ->"
    if set(record) != set(_SLOTS):
        said = [value for value in record.values() if rng.random() < _SAID] or list(record.values())[:1]
        return {"prompt": prompt, "record": record, "answer": " " + ", ".join(said) + "."}
    which = rng.integers(len(_FORMS))
    said = {slot: piece.format(record[slot]) if rng.random() < _SAID else "" for slot, piece in _PIECES[which].items()}
    return {"prompt": prompt, "record": record, "answer": " " + _FORMS[which].format(**{**record, **said})}

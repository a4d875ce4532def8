"""The ready problems of language models: their data against plain Python, and a fit of each for a moment."""

import json
import re
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import bayesrl
from bayesrl import lm
from bayesrl.errors import LanguageModelError
from bayesrl.ready_models import model_folder

TINY = {"training_steps": 2, "num_steps": 2, "num_prompts": 4, "batch": 2, "num_particles": 4}
TASKS = ("text_generation", "translation", "question_answering", "data_to_text")


def module(name: str) -> Any:
    sys.path.insert(0, str(model_folder()))
    try:
        return import_module(name)
    finally:
        sys.path.pop(0)


@pytest.mark.parametrize("name", TASKS)
def test_held_out_prompts_are_others(name: str) -> None:
    problem = bayesrl.load_problem(name, **TINY)
    assert problem.held_out is not None
    trained = {row["prompt"] for row in problem.policy.prompts.examples}  # type: ignore[attr-defined]
    held_out = {row["prompt"] for row in problem.held_out[0].examples}
    assert held_out
    assert name == "text_generation" or not trained & held_out, "first words may be the same, whole prompts are not"


@pytest.mark.parametrize("name", ["text_generation", "question_answering"])
def test_a_task_is_fitted_and_told(name: str) -> None:
    problem = bayesrl.load_problem(name, **TINY)
    posterior = bayesrl.fit(jax.random.key(0), problem.policy, beta=problem.beta, progress=False, **problem.fit_options)
    titles = [section.title for section in problem.sections_of(jax.random.key(0), posterior)]
    assert "Before and after, on held-out prompts" in titles
    assert not any("missing" in title for title in titles)


def test_questions_have_the_right_answers() -> None:
    rows = module("question_answering").made_up(300, 0)
    assert len({row["prompt"] for row in rows}) == 300
    for row in rows:
        if row["prompt"].endswith("="):
            first, sign, second = re.fullmatch(r"(\d+)([+-])(\d+)=", row["prompt"]).groups()  # type: ignore[union-attr]
            right = int(first) + int(second) if sign == "+" else int(first) - int(second)
        else:
            told = {word[0]: word[1:] for word in row["prompt"].split()[:-1]}
            right = int(told[row["prompt"][-2]])
        assert row["answer"] == str(right)


def test_numbers_are_spelled() -> None:
    rows = {row["prompt"]: row["answer"] for row in module("translation").numbers()}
    assert len(rows) == 3000
    assert rows["en: 217 ="] == " two hundred and seventeen"
    assert rows["fr: eighty ="] == " quatre-vingts"
    assert rows["de: twenty-one ="] == " einundzwanzig"


def test_chrf_is_one_for_the_same_and_less_for_others() -> None:
    task = module("translation")
    assert task.chrf(" cent dix", {"answer": " cent dix"}) == pytest.approx(1.0)
    assert 0 < task.chrf(" cent six", {"answer": " cent dix"}) < 1


def test_no_more_questions_are_asked_for_than_there_are() -> None:
    with pytest.raises(LanguageModelError, match=r"num_prompts asks for 3000 different questions.*at most 2500"):
        module("question_answering").problem(num_prompts=2400)


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("option", ["num_prompts", "training_steps"])
def test_counts_are_checked_before_anything_is_trained(name: str, option: str) -> None:
    with pytest.raises(LanguageModelError, match=f"{option}=0; use a whole number of at least"):
        module(name).problem(**{option: 0})


def test_slots_are_counted() -> None:
    task = module("data_to_text")
    record = {"name": "Aromi", "food": "Thai", "area": "harbour", "price": "cheap"}
    assert task.slot_coverage(" Aromi serves Thai food.", {"record": record}) == 0.5
    known = frozenset(value for values in task._SLOTS.values() for value in values)
    text = " Aromi serves Thai and French food by the riverside."
    assert task.made_up_values(text, {"record": record}, known=known) == 2
    assert task.made_up_values(text, {"record": record}, known=frozenset({"Thai", "Greek"})) == 0
    rng = np.random.default_rng(0)
    for _ in range(50):
        row = task._row(record, rng)
        assert task.slot_coverage(row["answer"], row) >= 0.25
        assert task.made_up_values(row["answer"], row, known=known) == 0
        assert "{" not in row["answer"]


def test_paragraphs_are_prose_or_code() -> None:
    found = module("text_generation")._paragraphs(
        "A sentence about it.\n\n   x = f(1)\n   y = 2\n\nTitle\n*****\n\nMore."
    )
    assert found == [("A sentence about it.", "prose"), ("x = f(1)\ny = 2", "code"), ("More.", "prose")]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> tuple[lm.GPT2, str]:
    tokenizer = lm.byte_tokenizer()
    config = lm.GPT2Config(vocab_size=tokenizer.vocab_size, max_length=96, width=8, depth=1, heads=2)
    model, folder = lm.GPT2.init(jax.random.key(0), config), tmp_path_factory.mktemp("checkpoint") / "model"
    lm.save_pretrained(folder, model, tokenizer)
    return model, str(folder)


def test_files_of_ones_own(tmp_path: Path) -> None:
    questions, pairs, records = (tmp_path / name for name in ("questions.jsonl", "pairs.tsv", "records.jsonl"))
    questions.write_text("\n".join(json.dumps({"prompt": f"{i}?", "answer": str(i)}) for i in range(6)))
    pairs.write_text("\n".join(f"word {i}\tmot {i}" for i in range(9)))
    records.write_text("\n".join(json.dumps({"who": f"person {i}", "what": "sings"}) for i in range(10)))
    for name, option, path in (
        ("question_answering", "questions", questions),
        ("translation", "pairs", pairs),
        ("data_to_text", "records", records),
    ):
        problem = bayesrl.load_problem(name, **TINY, **{option: str(path)})
        assert len(problem.policy.prompts) >= 2  # type: ignore[attr-defined]


def test_a_checkpoint_takes_the_place_of_the_model(checkpoint: tuple[lm.GPT2, str]) -> None:
    model, folder = checkpoint
    problem = bayesrl.load_problem("data_to_text", **TINY, checkpoint=folder, rank=2)
    held: Any = problem.policy
    np.testing.assert_array_equal(held.model.token.weight, model.token.weight)
    assert problem.fit_options["guide"] == lm.LoRA(2)


BAD = {
    "no such questions": ("question_answering", {"questions": "nowhere.jsonl"}, "nowhere.jsonl cannot be read"),
    "no such pairs": ("translation", {"pairs": "nowhere.tsv"}, "nowhere.tsv' cannot be read"),
    "no such text": ("text_generation", {"text": "nowhere.txt"}, "nowhere.txt' cannot be read"),
    "no such checkpoint": ("translation", {"checkpoint": "./nowhere"}, "nowhere"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named(case: str) -> None:
    name, options, told = BAD[case]
    with pytest.raises(LanguageModelError, match=re.escape(told)):
        bayesrl.load_problem(name, **TINY, **options)


@pytest.mark.parametrize(
    ("line", "told"),
    [("[1]", "line 1 of"), ("{", "is not JSON"), ('{"prompt": "a"}', "has no text under prompt and answer")],
)
def test_bad_lines_are_named(tmp_path: Path, line: str, told: str) -> None:
    path = tmp_path / "questions.jsonl"
    path.write_text(f"{line}\n{line}\n")
    with pytest.raises(LanguageModelError, match=told):
        bayesrl.load_problem("question_answering", **TINY, questions=str(path))

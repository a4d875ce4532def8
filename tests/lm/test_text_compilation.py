"""What fits of language models compile: counts are exact, unlike times."""

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import bayesrl
from bayesrl import lm
from bayesrl.compilation import jit as compiling
from bayesrl.compilation.jit import clear_programs
from bayesrl.diagnostics.evidence.bounds import evaluate_fit
from bayesrl.posterior.posterior import Posterior
from tests.counting import compilations

TOKENIZER = lm.char_tokenizer("abcdefgh ")
CONFIG = lm.GPT2Config(vocab_size=TOKENIZER.vocab_size, max_length=24, width=8, depth=1, heads=2)
PROMPTS = ["abc", "d", "gh ", "a b", "f"]


def model() -> lm.Pretrained:
    return lm.Pretrained(lm.GPT2.init(jax.random.key(0), CONFIG), TOKENIZER)


def share_of_a(text: str) -> float:
    return text.count("a") / 4


def policy(reward: Any) -> Any:
    return lm.policy(model(), PROMPTS, reward=reward, max_new_tokens=4, batch_size=2)


def finetuned(seed: int, reward: Any) -> Posterior:
    return bayesrl.fit(
        jax.random.key(seed), policy(reward), beta=0.1, guide=lm.FullParameters(), num_steps=3, progress=False
    )


@pytest.fixture(scope="module", params=["text", "tokens"])
def reward(request: pytest.FixtureRequest) -> Any:
    return share_of_a if request.param == "text" else lm.rewards.token_reward(lambda tokens, mask: (tokens == 0).sum())


@pytest.fixture(scope="module")
def posterior(reward: Any) -> Posterior:
    key, asked = jax.random.key(0), policy(reward)
    clear_programs()
    with compilations() as names:
        made = bayesrl.fit(key, asked, beta=0.1, guide=lm.FullParameters(), num_steps=3, progress=False)
    assert len(names) <= 7, names
    return made


def test_another_key_and_a_model_made_anew_compile_nothing(posterior: Posterior, reward: Any) -> None:
    key, asked = jax.random.key(1), policy(reward)
    with compilations() as names:
        bayesrl.fit(key, asked, beta=0.2, guide=lm.FullParameters(), num_steps=4, progress=False)
    assert names == []


def test_any_number_of_draws_of_other_prompts_of_a_width_compiles_nothing(posterior: Posterior) -> None:
    key, others = jax.random.key(2), lm.encode_prompts(["hh", "e a", "gfe", "c", "b", "a", "abcdefg"], TOKENIZER)
    posterior.estimate(key, 3)
    with compilations() as names:
        posterior.estimate(key, 50)
        posterior.estimate(key, 7, others)
        evaluate_fit(key, posterior, others, max_count=1)
        bayesrl.evidence(key, posterior, method="importance", num_samples=256)
    assert names == []


def test_texts_of_a_report_compile_nothing(posterior: Posterior, tmp_path: Path) -> None:
    held_out = lm.encode_prompts(["hh", "e a"], TOKENIZER)
    with compilations() as names:
        lm.text_sections(jax.random.key(0), posterior, held_out=held_out)
    assert names == []


def test_draws_do_not_depend_on_how_many_there_are(posterior: Posterior) -> None:
    few, many = (np.asarray(posterior.sample(jax.random.key(3), num)["text"]) for num in (3, 40))
    assert np.array_equal(few, many[:, :3])
    asked = lm.encode_prompts(PROMPTS, TOKENIZER)
    first, whole = (
        np.asarray(posterior.sample(jax.random.key(3), 5, part)["text"]) for part in (asked.take(range(2)), asked)
    )
    assert np.array_equal(first, whole[:, :, :2])


def test_no_program_of_a_fit_by_texts_calls_python(posterior: Posterior, reward: Any) -> None:
    """What calls Python is not kept on disk by JAX, and would be compiled by every process."""
    if reward is not share_of_a:
        pytest.skip("of tokens the reward is part of the step")
    assert [program.name for (form, _), program in kept().items() if "callback" in str(form)] == []


def kept() -> dict[Any, Any]:
    return dict(compiling._programs)

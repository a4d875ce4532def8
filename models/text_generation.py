"""English continued by a small GPT-2, rewarded by a BERT classifier that tells prose from code."""

import textwrap
from functools import partial
from importlib import import_module
from pathlib import Path

import jax
import numpy as np

import bayesrl
from bayesrl import lm
from bayesrl.lm import rewards
from bayesrl.lm.small_models import check_counts, fit_options

NEEDS = {"tokenizers": {}}

_LABELS = ("code", "prose")
_ENGINES = ("importance", "importance_from_fit", "rejection", "smc_sequential", "fit")
"""Engines that reach texts; particles along temperatures write every text anew, and looking ahead asks the classifier
after every token."""
_RATE = 3e-4
"""Of all parameters, less than is usual: at three times of it the first steps spend more KL than they earn back."""

_WORDS = 4
"""Number of words in a prompt, from the start of a paragraph."""

_PIECE = 24
"""Number of words in a text that the classifier learns from."""


def problem(
    *,
    checkpoint: str = "",
    judge: str = "",
    label: str = "prose",
    text: str = "",
    num_prompts: int = 40,
    max_new_tokens: int = 16,
    batch: int = 10,
    num_particles: int = 12,
    num_steps: int = 150,
    rank: int = 0,
    training_steps: int = 280,
    beta: float = 0.3,
    seed: int = 0,
) -> bayesrl.Problem:
    """Make the problem.

    The reference is a model of byte pairs briefly trained on a text: by default the documentation of Python in the
    standard library's `pydoc_data.topics`, prose and code alike. The reward is the log-probability, in nats, that a
    classifier gives to the label; the classifier, too, is briefly trained, on indented and other paragraphs. Prompts
    are the first words of paragraphs, a third of which is held out.

    Args:
        checkpoint: folder or hub id of a causal model to use instead.
        judge: folder or hub id of a BERT classifier to use instead.
        label: name of the class to reward.
        text: path of a text file, for training and for prompts.
        num_prompts: number of prompts to train on.
        max_new_tokens: number of tokens to write; no end token stops the model.
        batch: number of prompts in each step.
        num_particles: number of completions of each prompt.
        num_steps: steps of the fit.
        rank: rank of low-rank paths; 0 trains all parameters.
        training_steps: training steps of the reference and of the classifier.
        beta: temperature, reward units per nat.
        seed: seed of the choice of prompts and of the models.

    Raises:
        bayesrl.errors.LanguageModelError: the text cannot be read or is too short.
    """
    check_counts(num_prompts=num_prompts, training_steps=training_steps)
    paragraphs = _paragraphs(read_text(text))
    words = [" ".join(paragraph.split()) for paragraph, _ in paragraphs]
    rng = np.random.default_rng(seed)
    starts = [" ".join(line.split()[:_WORDS]) for line in words if len(line.split()) > 2 * _WORDS]
    if len(starts) < 3:
        raise bayesrl.errors.LanguageModelError(f"the text has {len(starts)} paragraphs of some length; 3 are needed")
    starts = [starts[i] for i in rng.permutation(len(starts))]
    cut = max(1, min(num_prompts, len(starts) * 2 // 3))
    model = lm.load_pretrained(checkpoint) if checkpoint else _writer(words, training_steps, seed)
    judged = lm.load_pretrained(judge) if judge else _judge(paragraphs, model, training_steps, seed)
    policy = lm.policy(
        model,
        starts[:cut],
        reward=rewards.classifier(judged, label),
        metrics={f"P({label})": rewards.classifier(judged, label, scale="probability")},
        max_new_tokens=max_new_tokens,
        batch_size=batch,
        stop_at_eos=False,
    )
    unseen = lm.encode_prompts(starts[cut : cut + max(1, cut // 2)], model.tokenizer)
    return bayesrl.Problem(
        policy,
        beta=beta,
        fit_options=fit_options(rank=rank, num_particles=num_particles, num_steps=num_steps)
        | ({} if rank else {"learning_rate": _RATE}),
        held_out=(unseen,),
        sections=(partial(lm.text_sections, held_out=unseen),),
        engines={"budget": 32 * num_particles, "engines": _ENGINES},
    )


def read_text(path: str) -> str:
    """Read a file, or the default text."""
    if not path:
        return "\n\n".join(import_module("pydoc_data.topics").topics.values())
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise bayesrl.errors.LanguageModelError(f"text={path!r} cannot be read: {error}") from error


def _paragraphs(text: str) -> list[tuple[str, str]]:
    """Cut a text at empty lines and drop headings; indented paragraphs are code, unless they begin like prose."""
    passages = []
    for paragraph in text.split("\n\n"):
        lines = [line for line in paragraph.splitlines() if line.strip()]
        if not lines or set(lines[-1].strip()) <= set('*=-~^"'):
            continue
        indented = all(line.startswith("   ") for line in lines)
        coded = indented and not lines[0].strip().endswith((".", ","))
        passages.append((textwrap.dedent("\n".join(lines)), "code" if coded else "prose"))
    return passages


def _writer(words: list[str], steps: int, seed: int) -> lm.Pretrained:
    tokenizer = lm.train_bpe(words, 512)
    return lm.train_small_lm(
        jax.random.key(seed), "text_generation", "\n".join(words), tokenizer, num_steps=steps, length=32
    )


def _judge(paragraphs: list[tuple[str, str]], model: lm.Pretrained, steps: int, seed: int) -> lm.Pretrained:
    """Train on pieces as long as the texts to judge, from anywhere in a paragraph, the same number of each class."""
    rng = np.random.default_rng([seed, 3])
    pieces: dict[str, list[str]] = {name: [] for name in _LABELS}
    for paragraph, name in paragraphs:
        words = paragraph.split()
        for first in range(0, max(1, len(words) - 3), 6):
            pieces[name].append(" " + " ".join(words[first : first + int(rng.integers(4, _PIECE // 2))]))
    least = min(map(len, pieces.values()))
    if least == 0:
        raise bayesrl.errors.LanguageModelError(
            "the text has no indented paragraphs beside others, so there are no two classes; pass judge=, a classifier"
        )
    chosen = {name: [own[i] for i in rng.permutation(len(own))[:least]] for name, own in pieces.items()}
    texts = [piece for own in chosen.values() for piece in own]
    labels = [name for name, own in chosen.items() for _ in own]
    tokenizer = model.tokenizer if model.tokenizer is not None else lm.byte_tokenizer()
    return lm.train_small_classifier(
        jax.random.key(seed), "prose_or_code", texts, labels, tokenizer, num_steps=steps // 2 + 1
    )

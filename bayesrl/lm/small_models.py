"""`train_small_lm` and `train_small_classifier`: models that two cores train in about a minute; they are cached."""

import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import numpy as np
import optax

from bayesrl.arguments import Count, CountOrZero, Positive, UnusedOption, checked
from bayesrl.cache import cache_folder
from bayesrl.compilation.jit import closure_jit
from bayesrl.compilation.random_keys import key_data, split_keys
from bayesrl.compilation.status import activity
from bayesrl.errors import LanguageModelError
from bayesrl.files.regular_files import file_name
from bayesrl.lm.checkpoints.pretrained import Pretrained, load_pretrained, save_pretrained
from bayesrl.lm.guides import FullParameters, LoRA
from bayesrl.lm.prompts import NOT_COLUMNS
from bayesrl.lm.supervised import (
    LabelLikelihood,
    TextLikelihood,
    classification,
    finetuned,
    language_modeling,
    sft,
    text_field,
)
from bayesrl.lm.tokenization.tokenizer import Tokenizer
from bayesrl.lm.transformers.base import Config, Transformer, check_model_room
from bayesrl.lm.transformers.bert import BertClassifier
from bayesrl.lm.transformers.bert_config import BertConfig
from bayesrl.lm.transformers.gpt2 import GPT2, GPT2Config
from bayesrl.objectives import ReverseKL
from bayesrl.svi.fitting import train
from bayesrl.typing import PRNGKey
from bayesrl.value_checks import is_count

_ROOM = 32
"""Extra context length, beyond the longest training text."""


@checked(LanguageModelError)
def fit_options(*, rank: CountOrZero, num_particles: Count, num_steps: Count) -> dict[str, Any]:
    """Return the options of `fit` that the ready problems with language models share.

    Example:
        >>> fit_options(rank=4, num_particles=8, num_steps=100)["guide"].rank
        4
    """
    return {
        "guide": LoRA(rank) if rank else FullParameters(),
        "objective": ReverseKL(num_particles=num_particles),
        "num_steps": num_steps,
    }


def check_counts(**counts: Any) -> None:
    """Refuse options of a ready problem that are not counts, before training anything."""
    for name, value in counts.items():
        if not is_count(value, least=1):
            raise LanguageModelError(f"{name}={value!r}; use a whole number of at least 1")


@checked(LanguageModelError)
def train_small_classifier(
    key: PRNGKey,
    name: str,
    texts: Sequence[str],
    labels: Sequence[str],
    tokenizer: Tokenizer,
    *,
    num_steps: Count,
    width: Count = 64,
    depth: Count = 1,
    learning_rate: Positive = 2e-3,
    batch_size: Count = 64,
) -> Pretrained:
    """Train a small BERT to classify texts, for `rewards.classifier`, or load it from the cache.

    Args:
        key: for the start and the mini-batches; consumed whole.
        name: of the model in the cache folder.
        texts: to learn from.
        labels: the class of each text.
        tokenizer: of the model; if it is the policy's too, the reward is part of the compiled step.
        num_steps: gradient steps.
        width: of the model.
        depth: number of blocks.
        learning_rate: the highest rate.
        batch_size: texts per step.

    Raises:
        LanguageModelError: as `classification`.

    Example:
        >>> from bayesrl.lm import char_tokenizer, train_small_classifier
        >>> options = {"num_steps": 1, "width": 4}
        >>> texts, labels, tokenizer = ["ab", "cd"], ["good", "bad"], char_tokenizer("abcd")
        >>> judge = train_small_classifier(jax.random.key(0), "tiny_judge", texts, labels, tokenizer, **options)
        >>> judge.model.config.labels
        ('bad', 'good')
    """
    longest = max(map(len, tokenizer.encode(list(texts))), default=1)
    config = BertConfig(
        vocab_size=tokenizer.vocab_size,
        max_length=longest + _ROOM,
        width=width,
        depth=depth,
        heads=4,
        inner=4 * width,
        labels=tuple(sorted(set(labels))),
    )

    def begin(key: PRNGKey) -> LabelLikelihood:
        start = random_model(key, BertClassifier, config)
        return classification(start, texts, labels, tokenizer=tokenizer, batch_size=batch_size)

    options = (num_steps, learning_rate, batch_size)
    return _trained(key, name, [list(texts), list(labels)], tokenizer, [width, depth], options, begin)


def _trained(
    key: PRNGKey,
    name: str,
    data: Any,
    tokenizer: Tokenizer,
    shape: list[int],
    options: tuple[int, float, int],
    begin: Callable[[PRNGKey], Callable[..., Any]],
) -> Pretrained:
    """Train the program of `begin`, whose model is random, or load the result of the same training from the cache."""
    num_steps, learning_rate, _ = options
    spec = {
        "data": hashlib.sha256(json.dumps(data).encode()).hexdigest(),
        "tokenizer": [tokenizer.digest, *tokenizer.eos_ids, tokenizer.pad, tokenizer.bos],
        "shape": shape,
        # Big-endian, so that one key has one folder on every machine.
        "training": [*options, int.from_bytes(np.asarray(key_data(key)).astype(">u4").tobytes(), "big")],
    }

    def make() -> Pretrained:
        start_key, fit_key = split_keys(key)
        optimizer = _adam(learning_rate, num_steps)
        return finetuned(train(fit_key, begin(start_key), optimizer=optimizer, num_steps=num_steps))

    return cached_model(name, spec, make)


def random_model[Model: Transformer](key: PRNGKey, kind: type[Model], shape: Config) -> Model:
    """Make a model with random weights, by one compiled program."""
    check_model_room(shape)
    # Compiled functions return arrays alone; the tree around them comes from tracing shapes.
    treedef = jax.tree.structure(eqx.filter_eval_shape(kind.init, key, shape))
    made = closure_jit(lambda key: jax.tree.leaves(kind.init(key, shape)), name="random_model")
    model: Model = jax.tree.unflatten(treedef, made(key))
    return model


def _adam(learning_rate: float, num_steps: int) -> optax.GradientTransformation:
    # Optax refuses a decay of no steps, so the warm-up must leave one.
    warm_up = min(max(num_steps // 10, 1), num_steps - 1)
    rate = optax.warmup_cosine_decay_schedule(0.0, learning_rate, warm_up, num_steps)
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adam(rate))


_ONLY_RECORDS = "only records have answers and prompts"


@checked(
    LanguageModelError,
    UnusedOption("answer", lambda given: isinstance(given["data"], str), _ONLY_RECORDS),
    UnusedOption("room_for", lambda given: isinstance(given["data"], str), _ONLY_RECORDS),
    UnusedOption("length", lambda given: not isinstance(given["data"], str), "only a text is cut into pieces"),
)
def train_small_lm(
    key: PRNGKey,
    name: str,
    data: str | Sequence[Mapping[str, Any]],
    tokenizer: Tokenizer,
    *,
    num_steps: Count,
    answer: str = "answer",
    room_for: Sequence[str] = (),
    length: Count = 64,
    width: Count = 128,
    depth: Count = 2,
    learning_rate: Positive = 3e-3,
    batch_size: Count = 64,
) -> Pretrained:
    """Train a small GPT-2 on a text, or on prompts with answers, or load it from the cache.

    Uses Adam with a short warm-up and a cosine decay, and clips gradients at norm 1.

    Args:
        key: for the start and the mini-batches; consumed whole.
        name: of the model in the cache folder.
        data: a text, or records with the text under `prompt` and the answer under `answer`.
        tokenizer: of the model.
        num_steps: gradient steps.
        answer: the name of that field.
        room_for: further prompts that must fit into the context.
        length: tokens of each piece of a text.
        width: of the model.
        depth: number of blocks.
        learning_rate: the highest rate.
        batch_size: pieces, or records, per step.

    Raises:
        LanguageModelError: a record lacks a field, or the data are too short.

    Example:
        >>> from bayesrl.lm import char_tokenizer, train_small_lm
        >>> options = {"num_steps": 1, "length": 4, "width": 4, "depth": 1}
        >>> train_small_lm(jax.random.key(0), "tiny_lm", "abab" * 9, char_tokenizer("ab"), **options).model.config.width
        4
    """
    content: Any = data
    longest = length
    if not isinstance(data, str):
        prompts, answers = text_field("prompt", data), text_field(answer, data)
        content = [list(both) for both in zip(prompts, answers, strict=True)]
        before, after = tokenizer.encode([*prompts, *room_for]), tokenizer.encode(answers)
        # One more, for the token that ends the answer.
        longest = max(map(len, before), default=0) + max(map(len, after), default=0) + 1
    config = GPT2Config(vocab_size=tokenizer.vocab_size, max_length=longest + _ROOM, width=width, depth=depth, heads=4)

    def begin(key: PRNGKey) -> TextLikelihood:
        start = random_model(key, GPT2, config)
        if isinstance(data, str):
            return language_modeling(start, data, tokenizer=tokenizer, length=length, batch_size=batch_size)
        # The other fields of the records are there for rewards.
        kept = [{name: value for name, value in row.items() if name in (answer, *NOT_COLUMNS)} for row in data]
        return sft(start, kept, answer=answer, tokenizer=tokenizer, batch_size=batch_size)

    options = (num_steps, learning_rate, batch_size)
    return _trained(key, name, content, tokenizer, [width, depth, longest + _ROOM], options, begin)


@checked(LanguageModelError)
def cached_model(name: str, spec: Mapping[str, Any], train: Callable[[], Pretrained]) -> Pretrained:
    """Load a model that was trained from the same `spec`, or train it now and store it.

    Args:
        name: of the model; part of its folder's name, without characters that a file name cannot have.
        spec: everything that the model depends on: options, and fingerprints of the data.
        train: trains the model; called if the cache does not have it.

    Example:
        >>> config = GPT2Config(vocab_size=5, max_length=8, width=4, depth=1, heads=1)
        >>> make = lambda: Pretrained(GPT2.init(jax.random.key(0), config), None)
        >>> first, again = cached_model("tiny", {"seed": 0}, make), cached_model("tiny", {"seed": 0}, make)
        >>> first.folder == again.folder
        True
    """
    try:
        # Another version may train otherwise, and must not find this folder.
        identity = json.dumps([name, {"bayesrl": version("bayesrl"), **spec}], sort_keys=True)
    except TypeError as error:
        raise LanguageModelError(f"what model {name!r} is made of cannot be written as JSON: {error}") from error
    folder = cache_folder() / f"{file_name(name)}-{hashlib.sha256(identity.encode()).hexdigest()[:16]}"
    if folder.is_dir() and not folder.is_symlink():
        try:
            return load_pretrained(folder)
        except LanguageModelError:
            shutil.rmtree(folder, ignore_errors=True)  # damaged: train again
    with activity(f"training {name}, once on this machine"):
        trained = train()
    try:
        if folder.is_symlink() or not folder.is_dir():
            folder.unlink(missing_ok=True)  # a file or link of this name is not ours
        folder.parent.mkdir(parents=True, exist_ok=True)
        # Renaming is atomic within one file system, so no process sees half a model.
        with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
            staged = Path(temporary) / "model"
            save_pretrained(staged, trained.model, trained.tokenizer)
            if not folder.exists():
                staged.rename(folder)
        # Read back, so that the first run returns just what later ones will.
        return load_pretrained(folder)
    except (OSError, LanguageModelError):
        return trained  # without a writable cache, only the next training costs time

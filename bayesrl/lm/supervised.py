"""Train models on text by maximum likelihood, as a program without rewards, and extract the model of a fit."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import jax
import numpy as np
import numpyro
import numpyro.distributions as dist
from jaxtyping import Array, Bool, Int

from bayesrl.arguments import Count, CountAboveOne, checked
from bayesrl.display.formatting import pluralize
from bayesrl.errors import LanguageModelError
from bayesrl.lm.checkpoints.pretrained import Pretrained, unwrap
from bayesrl.lm.generation import model_with_params
from bayesrl.lm.guides import ModelGuide, declare_parameters
from bayesrl.lm.prompts import Prompts, encode_prompts, unread_fields
from bayesrl.lm.text_distribution import CausalLMDistribution, EosTokens
from bayesrl.lm.tokenization.chat_templates import MESSAGES, is_conversation, render_answer
from bayesrl.lm.tokenization.tokenizer import Tokenizer
from bayesrl.lm.transformers.base import CausalLM
from bayesrl.lm.transformers.bert import BertClassifier
from bayesrl.lm.transformers.bert_config import ONE_LABEL
from bayesrl.lm.transformers.layers.linear_and_norm import merge_adapters
from bayesrl.lm.twisted_model import TwistedLM
from bayesrl.posterior.posterior import Posterior


@dataclass(frozen=True, eq=False)
class TextLikelihood:
    """Texts under a language model, as a program without rewards: fitting it trains the model.

    Made by `language_modeling` and `sft`.

    Attributes:
        model: the initial model.
        tokenizer: of the model.
        prompts: the texts' prompts.
        tokens: the texts, [rows, T], padded after their end.
        eos: the token that ends a text, or several, or None if rows are pieces of a longer text.
        pad: the token after the end.
        batch_size: rows per step.
        source: the `Pretrained` that the model came in, if it came with settings.
    """

    model: CausalLM
    tokenizer: Tokenizer
    prompts: Prompts = field(repr=False)
    tokens: Int[Array, "rows length"] = field(repr=False)
    eos: EosTokens
    pad: int
    batch_size: int
    source: Pretrained | None = None

    def __call__(self) -> None:
        """Run as a program: Σ log p(text | prompt) over the rows."""
        model = declare_parameters(self.model)
        count = self.tokens.shape[0]
        with numpyro.plate("row", count, subsample_size=min(self.batch_size, count)) as index:
            prompt, mask = self.prompts.tokens[index], self.prompts.mask[index]
            texts = CausalLMDistribution(
                model, prompt, mask, num_steps=self.tokens.shape[1], eos=self.eos, pad=self.pad
            )
            numpyro.sample("text", texts, obs=self.tokens[index])


@checked(LanguageModelError)
def language_modeling(
    model: CausalLM | Pretrained,
    text: str,
    *,
    tokenizer: Tokenizer | None = None,
    length: CountAboveOne,
    batch_size: Count = 32,
) -> TextLikelihood:
    """Make a program from one long text, cut into pieces; fit it to train the model on the text.

    Args:
        model: the initial model; for random weights, `GPT2.init(key, config)`.
        text: to learn from.
        tokenizer: of the model, if the model brings none.
        length: tokens per piece; each piece predicts all but its first token.
        batch_size: pieces per step.

    Raises:
        LanguageModelError: the text is shorter than one piece, or a piece longer than the context.

    Example:
        >>> import jax
        >>> from bayesrl.lm import GPT2, GPT2Config, char_tokenizer, language_modeling
        >>> model = GPT2.init(jax.random.key(0), GPT2Config(vocab_size=6, max_length=8, width=8, depth=1, heads=2))
        >>> language_modeling(model, "abcabc" * 9, tokenizer=char_tokenizer("abc"), length=6).tokens.shape
        (9, 5)
    """
    start, tokenizer, source = _start(CausalLM, model, tokenizer)
    (token_ids,) = tokenizer.encode([text])
    rows = len(token_ids) // length
    if rows == 0:
        raise LanguageModelError(
            f"the text has {pluralize(len(token_ids), 'token')}, fewer than one piece of length={length}; add text"
        )
    # One more than the context: the last token of a piece is predicted and never read.
    if length > start.config.max_length + 1:
        raise LanguageModelError(
            f"pieces of {length} tokens exceed the model's context of {start.config.max_length}; lower length"
        )
    pieces = np.asarray(token_ids[: rows * length], np.int32).reshape(rows, length)
    pad = tokenizer.pad if tokenizer.pad is not None else 0
    return TextLikelihood(
        start,
        tokenizer,
        encode_prompts(pieces[:, :1]),
        jax.device_put(pieces[:, 1:]),
        None,
        pad,
        batch_size,
        source,
    )


@checked(LanguageModelError)
def sft(
    model: CausalLM | Pretrained,
    examples: Sequence[Mapping[str, Any]],
    *,
    answer: str | None = None,
    tokenizer: Tokenizer | None = None,
    batch_size: Count = 32,
) -> TextLikelihood:
    """Make a program from prompts and their answers; fit it to train the model to answer like this.

    Args:
        model: the initial model.
        examples: records with the text under `prompt`, and its exact continuation under `answer`, so that one of them
            must have the blank between the two. For conversations (see `encode_prompts`), both are lists of messages,
            or the answer is the last of `messages`, with whatever the chat template adds after it. Other fields are
            named in a warning.
        answer: the name of that field; by default `answer`, or `completion` where all records have that and no answer.
        tokenizer: of the model, if the model brings none; it needs an eos token.
        batch_size: records per step.

    Raises:
        LanguageModelError: a record lacks a field; there is no token to end with; an answer is too long.

    Example:
        >>> import jax
        >>> from bayesrl.lm import GPT2, GPT2Config, char_tokenizer, sft
        >>> model = GPT2.init(jax.random.key(0), GPT2Config(vocab_size=6, max_length=8, width=8, depth=1, heads=2))
        >>> sft(model, [{"prompt": "a", "answer": "bc"}], tokenizer=char_tokenizer("abc")).tokens.tolist()
        [[4, 5, 1]]
    """
    start, tokenizer, source = _start(CausalLM, model, tokenizer)
    prompts = encode_prompts(examples, tokenizer)
    answer = _answer_field(prompts.examples) if answer is None else answer
    if tokenizer.eos is None:
        raise LanguageModelError("the tokenizer has no eos token, so an answer could not end; give it one")
    token_ids, ends = encode_answers(answer, prompts.examples, tokenizer), tokenizer.eos_ids
    longest = max(map(len, token_ids))
    before, room = prompts.tokens.shape[1], start.config.max_length
    if before + longest > room + 1:
        raise LanguageModelError(
            f"prompts of {before} tokens and answers of up to {longest} exceed the model's context of {room}; leave "
            "the longest out, or take a model with a longer context"
        )
    # Any token will do behind the end, where nothing counts.
    pad = tokenizer.pad if tokenizer.pad is not None else tokenizer.eos
    rows = np.full((len(token_ids), longest), pad, np.int32)
    for row, ids in zip(rows, token_ids, strict=True):
        row[: len(ids)] = ids
    if unread := unread_fields(prompts.examples, {answer}):
        warnings.warn(
            f"sft reads {answer!r}, and nothing reads the fields {', '.join(map(repr, unread))} of these records; "
            "leave them out, or name the answer by answer=",
            stacklevel=3,
        )
    eos = ends[0] if len(ends) == 1 else ends
    return TextLikelihood(start, tokenizer, prompts, jax.device_put(rows), eos, pad, batch_size, source)


def _answer_field(examples: Sequence[Any]) -> str:
    completed = all("completion" in row and "answer" not in row for row in examples)
    return "completion" if completed else "answer"


def encode_answers(name: str, examples: Sequence[Any], tokenizer: Tokenizer) -> list[list[int]]:
    """Return the tokens of each answer up to its end; in a conversation, what the chat template writes of it."""
    records = []
    for row in examples:
        answer = row.get(name) if isinstance(row, Mapping) else None
        is_chat = isinstance(row, Mapping) and MESSAGES in row and is_conversation(answer)
        records.append({**row, name: render_answer(row, answer, tokenizer)} if is_chat else row)
    encoded = tokenizer.encode(text_field(name, records), special=False, continues=True)
    return [_cut_at_eos(ids, tokenizer) for ids in encoded]


def _cut_at_eos(ids: list[int], tokenizer: Tokenizer) -> list[int]:
    """Return the tokens of an answer up to its end, which a chat template may have written."""
    first = next((index for index, token in enumerate(ids) if token in tokenizer.eos_ids), None)
    end = [] if tokenizer.eos is None else [tokenizer.eos]
    return [*ids, *end] if first is None else ids[: first + 1]


@dataclass(frozen=True, eq=False)
class LabelLikelihood:
    """Texts with labels under a classifier, as a program without rewards: fitting it trains the classifier.

    Made by `classification`.

    Attributes:
        model: the initial model.
        tokenizer: of the model.
        tokens: the texts, [texts, L], padded on the right.
        mask: True for tokens that are not padding, [texts, L].
        labels: their classes, [texts].
        batch_size: texts per step.
        source: the `Pretrained` that the model came in, if it came with settings.
    """

    model: BertClassifier
    tokenizer: Tokenizer
    tokens: Int[Array, "texts length"] = field(repr=False)
    mask: Bool[Array, "texts length"] = field(repr=False)
    labels: Int[Array, "texts"] = field(repr=False)
    batch_size: int
    source: Pretrained | None = None

    def __call__(self) -> None:
        """Run as a program: Σ log P(label | text) over the texts."""
        model = declare_parameters(self.model)
        count = self.tokens.shape[0]
        with numpyro.plate("row", count, subsample_size=min(self.batch_size, count)) as index:
            logits = jax.vmap(model)(self.tokens[index], self.mask[index])
            numpyro.sample("label", dist.Categorical(logits=logits), obs=self.labels[index])


@checked(LanguageModelError)
def classification(
    model: BertClassifier | Pretrained,
    texts: Sequence[str],
    labels: Sequence[str],
    *,
    tokenizer: Tokenizer | None = None,
    length: Count | None = None,
    batch_size: Count = 64,
) -> LabelLikelihood:
    """Make a program from texts with labels; fit it to train a BERT classifier, for `rewards.classifier`.

    Args:
        model: the initial model; for random weights, `BertClassifier.init(key, config)`.
        texts: to learn from.
        labels: the class of each text, by its name in the model's configuration.
        tokenizer: of the model, if the model brings none.
        length: the most tokens of a text, which is cut there; by default the length of the longest.
        batch_size: texts per step.

    Raises:
        LanguageModelError: no texts; labels that the model does not have; no tokenizer, or one that does not fit.

    Example:
        >>> import jax
        >>> from bayesrl.lm import BertClassifier, BertConfig, char_tokenizer, classification
        >>> config = BertConfig(vocab_size=6, max_length=8, width=4, depth=1, heads=2, inner=8, labels=("bad", "good"))
        >>> model = BertClassifier.init(jax.random.key(0), config)
        >>> classification(model, ["ab", "c"], ["good", "bad"], tokenizer=char_tokenizer("abc")).labels.tolist()
        [1, 0]
    """
    start, tokenizer, source = _start(BertClassifier, model, tokenizer)
    if not texts or len(texts) != len(labels):
        found = f"{pluralize(len(texts), 'text')} and {pluralize(len(labels), 'label')}"
        raise LanguageModelError(f"classification got {found}; pass one label for each")
    if start.config.problem != ONE_LABEL:
        raise LanguageModelError(
            f"classification got a model of {start.config.problem}, and would teach it one label for each text; "
            f"pass one whose configuration has problem={ONE_LABEL!r}"
        )
    if unknown := sorted(set(labels) - set(start.config.labels)):
        raise LanguageModelError(f"label {unknown[0]!r} is not one of the model's, which are {start.config.labels}")
    _, after = tokenizer.special_affixes
    token_ids = tokenizer.encode(list(texts))
    width = min(max(1, *map(len, token_ids)) if length is None else length, start.config.max_length)
    rows = np.full((len(token_ids), width), tokenizer.pad if tokenizer.pad is not None else 0, np.int32)
    mask = np.zeros(rows.shape, bool)
    for index, row in enumerate(token_ids):
        # Cut the text, not the special tokens after it.
        ids = row if len(row) <= width else [*row[: max(width - len(after), 0)], *after][:width]
        rows[index, : len(ids)], mask[index, : len(ids)] = ids, True
    classes = np.asarray([start.config.labels.index(label) for label in labels], np.int32)
    put = jax.device_put
    return LabelLikelihood(start, tokenizer, put(rows), put(mask), put(classes), batch_size, source)


def text_field(name: str, examples: Sequence[Any]) -> list[str]:
    """Return the text of each record under a name."""
    for index, row in enumerate(examples):
        if not (isinstance(row, Mapping) and isinstance(row.get(name), str)):
            found = f"it has {sorted(map(str, row))}" if isinstance(row, Mapping) else f"it is {row!r:.60}"
            raise LanguageModelError(f"example {index} has no text under {name!r}; {found}")
    return [row[name] for row in examples]


@checked(LanguageModelError)
def finetuned(posterior: Posterior, *, merge: bool = True) -> Pretrained:
    """Return the language model of a fit.

    Args:
        posterior: of a program made by `policy`, `language_modeling`, `sft` or `classification`, at one temperature;
            the result is its best restart.
        merge: whether to add low-rank paths to the weights, or leave them separate, for `save_adapter`.

    Returns:
        The model with its tokenizer and its other settings; save it by `save_pretrained`, or use it as the next
        reference.

    Raises:
        LanguageModelError: the posterior is of another kind.
        PolicyError: it has several temperatures.

    Example:
        >>> import jax, bayesrl
        >>> from bayesrl.lm import GPT2, GPT2Config, char_tokenizer, finetuned, language_modeling
        >>> model = GPT2.init(jax.random.key(0), GPT2Config(vocab_size=6, max_length=8, width=8, depth=1, heads=2))
        >>> program = language_modeling(model, "abcabc" * 9, tokenizer=char_tokenizer("abc"), length=6)
        >>> fit = bayesrl.fit(jax.random.key(1), program, num_steps=2, progress=False)
        >>> finetuned(fit).model.config == model.config
        True
    """
    programs, params = (posterior if posterior.num_restarts == 1 else posterior.select(restart="best")).unbatched()
    guide, program = programs.guide, programs.policy
    owner: Any
    declare: Callable[[], Any]
    if isinstance(guide, ModelGuide):
        owner, declare = guide.policy, guide.declare
    elif isinstance(program, TextLikelihood | LabelLikelihood):
        owner, declare = program, partial(declare_parameters, program.model)
    else:
        raise LanguageModelError(
            "the posterior holds no language model; fit what lm.policy (with guide=LoRA() or FullParameters()), "
            "lm.language_modeling, lm.sft or lm.classification makes"
        )
    model = model_with_params(declare, programs.constrain(params))
    if isinstance(model, TwistedLM):
        raise LanguageModelError(
            "a twist has no checkpoint: its head stands beside the reference; draw from the fit by lm.sample_texts, or "
            "fit a model by bayesrl.fit(..., guide=lm.FullParameters())"
        )
    origin = owner.source or Pretrained(model, owner.tokenizer)
    adapter = {} if merge else {"base_model_name_or_path": None if origin.folder is None else str(origin.folder)}
    model = merge_adapters(model) if merge else model
    # No folder: these are not the weights that lie there.
    return replace(origin, model=model, tokenizer=owner.tokenizer, folder=None, adapter=adapter)


def _start(kind: type[Any], model: Any, tokenizer: Tokenizer | None) -> tuple[Any, Tokenizer, Pretrained | None]:
    """Return the initial model, its tokenizer, and the `Pretrained` it came in, or refuse them."""
    start, tokenizer, source = unwrap(model, tokenizer)
    if tokenizer is None:
        raise LanguageModelError("texts need a tokenizer; pass tokenizer=, such as lm.byte_tokenizer()")
    if not isinstance(start, kind):
        raise LanguageModelError(f"a {type(start).__name__} cannot be trained on texts so; pass a {kind.__name__}")
    return start, tokenizer, source

"""`TextScores`: scores of texts by a last layer on a language model or a classifier."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Annotated, Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from numpyro import handlers

from bayesrl.argument_types import Requirement
from bayesrl.arguments import Count, checked
from bayesrl.compilation.jit import closure_jit
from bayesrl.compilation.random_keys import key_from_seed
from bayesrl.display.formatting import pluralize
from bayesrl.errors import PreferenceError
from bayesrl.lm.checkpoints.pretrained import Pretrained, unwrap
from bayesrl.lm.guides import FullParameters, LoRA
from bayesrl.lm.tokenization.chat_templates import is_conversation, render_conversation
from bayesrl.lm.tokenization.tokenizer import Tokenizer, pad_left
from bayesrl.lm.transformers.base import CausalLM, Transformer
from bayesrl.lm.transformers.bert import BertClassifier
from bayesrl.preferences.records.preference_data import PreferenceData
from bayesrl.preferences.records.record_formats import Item
from bayesrl.preferences.score_models import WEIGHTS, LinearScores, ScoreModel, as_whole
from bayesrl.typing import Params
from bayesrl.value_checks import format_value

_MOST_NAMED = 8
_AT_ONCE = 16

type Trained = LoRA | FullParameters | None


@checked(PreferenceError)
@dataclass(frozen=True, eq=False)
class TextScores:
    """Scores of texts by a last layer, s = weights · h(prompt, completion) / √width, for `features=` of a model.

    h is what the last layer of the model reads: of a language model at the last token, of a classifier where it pools.
    The weights are N(0, scale²), so that scores have about that prior standard deviation.

    Args:
        model: a language model or a classifier with its tokenizer.
        tokenizer: of the model, if it brings none; token ids do not need it.
        train: what is trained underneath by `infer(..., method="fit")`: `lm.LoRA()`, `lm.FullParameters()`, or None,
            which computes h once for each text.
        max_length: the most tokens of a text with its prompt; by default the model's context.

    Raises:
        PreferenceError: the model is no language model and no classifier.

    Example:
        >>> import jax
        >>> from bayesrl import lm, preferences
        >>> tokenizer = lm.char_tokenizer("abc ")
        >>> config = lm.GPT2Config(vocab_size=tokenizer.vocab_size, max_length=8, width=8, depth=1, heads=2)
        >>> reader = preferences.TextScores(lm.Pretrained(lm.GPT2.init(jax.random.key(0), config), tokenizer))
        >>> data = preferences.read([{"prompt": "a ", "chosen": "b", "rejected": "cc"}])
        >>> preferences.bradley_terry(data, features=reader).priors
        {'weights': (1.0, (8,))}
    """

    model: Pretrained | CausalLM | BertClassifier
    tokenizer: Tokenizer | None = None
    train: Annotated[
        Trained,
        Requirement(
            "lm.LoRA(), lm.FullParameters() or None",
            lambda value: value is None or isinstance(value, LoRA | FullParameters),
            any_type=True,
        ),
    ] = None
    max_length: Count | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.body, CausalLM | BertClassifier):
            raise PreferenceError(f"TextScores got {format_value(self.body)}; pass a language model or a classifier")

    @cached_property
    def _parts(self) -> tuple[Transformer, Tokenizer | None]:
        body, tokenizer, _ = unwrap(self.model, self.tokenizer)
        return body, tokenizer

    @property
    def body(self) -> Any:
        """The model itself."""
        return self._parts[0]

    @property
    def room(self) -> int:
        """The most tokens of a text."""
        context: int = self.body.config.max_length
        return context if self.max_length is None else min(self.max_length, context)

    def fitting(self, data: PreferenceData) -> PreferenceData:
        """Leave out rows with texts that are longer than the model's context, and name them in `left_out`.

        Raises:
            PreferenceError: no row is left.
        """
        lengths = np.asarray([len(ids) for ids in self.encode(data.items)])
        longest = np.where(data.members >= 0, lengths[data.members], 0).max(-1)
        kept = np.flatnonzero(longest <= self.room)
        if not len(kept):
            raise PreferenceError(f"all {len(data)} rows are longer than {self.room} tokens; take a longer context")
        reasons = {int(row): f"{longest[row]} tokens, and the context is {self.room}" for row in range(len(data))}
        gone = {row: reason for row, reason in reasons.items() if longest[row] > self.room}
        used, members = np.unique(data.members[kept], return_inverse=True)
        numbers = np.cumsum(used >= 0) - 1  # −1 stays −1
        short = data.take(kept)
        items = tuple(data.items[at] for at in used if at >= 0)
        return replace(
            short,
            items=items,
            members=numbers[members].reshape(short.members.shape),
            left_out={**data.left_out, **gone},
        )

    def score_model(self, data: PreferenceData, scale: float) -> ScoreModel:
        """Return the scores of the items of some data.

        Raises:
            PreferenceError: texts are longer than the context; token ids are not the model's; there is no tokenizer.
        """
        tokens, mask = self.tokens_of(data.items, data)
        if self.train is not None:
            return TrainedTextScores(self, scale, tokens, mask)
        return LastLayerScores(self.features_of(tokens, mask), scale, self)

    def tokens_of(self, items: Sequence[Item], data: PreferenceData | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Return tokens and mask of items, [items, longest], padded on the side that the model needs."""
        rows = self.encode(items)
        self._check_room(rows, data)
        pad = self._parts[1].pad if self._parts[1] is not None and self._parts[1].pad is not None else 0
        tokens, mask = pad_left(rows, pad)
        if isinstance(self.body, CausalLM):
            return tokens, mask
        return np.stack([np.roll(row, len(ids)) for row, ids in zip(tokens, rows, strict=True)]), mask[:, ::-1].copy()

    def features_of(self, tokens: np.ndarray, mask: np.ndarray) -> np.ndarray:
        """Return h / √width of texts, [items, width], a few at a time."""
        arrays, rest = eqx.partition(self.body, eqx.is_array)

        def run(arrays: Any, tokens: Array, mask: Array) -> Array:
            body = eqx.combine(arrays, rest)
            return lax.map(lambda text: read_text(body, *text), (tokens, mask), batch_size=min(_AT_ONCE, len(tokens)))

        return np.asarray(closure_jit(run, name="features")(arrays, tokens, mask), float)

    def encode(self, items: Sequence[Item]) -> list[list[int]]:
        """Return the token ids of each prompt and completion.

        Raises:
            PreferenceError: a text and no tokenizer, or token ids that the model does not know.
        """
        given = [self._ids_of(item) for item in items]
        waiting = [at for at, ids in enumerate(given) if ids is None]
        tokenizer = self._parts[1]
        if waiting and tokenizer is None:
            raise PreferenceError("the items are texts, and the model has no tokenizer; pass tokenizer=")
        if waiting:
            assert tokenizer is not None
            for at, ids in zip(
                waiting, _encode_texts([items[at] for at in waiting], tokenizer, self.body), strict=True
            ):
                given[at] = ids
        rows = [ids for ids in given if ids is not None]
        self._check_vocabulary(rows)
        return rows

    def _ids_of(self, item: Item) -> list[int] | None:
        """Return the ids of an item that was given as such."""
        prompt, completion = item.get("prompt", []), item["completion"]
        if not isinstance(completion, list) or is_conversation(completion):
            return None
        if not isinstance(prompt, list) or is_conversation(prompt):
            raise PreferenceError("a completion is token ids, and its prompt is a text; give both as one or the other")
        return [*prompt, *completion]

    def _check_vocabulary(self, rows: Sequence[Sequence[int]]) -> None:
        size = self.body.config.vocab_size
        for at, ids in enumerate(rows):
            if wrong := [index for index in ids if index >= size]:
                raise PreferenceError(
                    f"item {at} holds token {wrong[0]}, and the model knows 0 to {size - 1}; was it encoded by another "
                    "tokenizer? Pass texts, or ids of the model's own"
                )

    def _check_room(self, rows: Sequence[Sequence[int]], data: PreferenceData | None) -> None:
        lengths = np.asarray([len(ids) for ids in rows])
        long = np.flatnonzero(lengths > self.room)
        if not long.size:
            return
        told = f"{pluralize(len(long), 'item')} of {len(rows)}"
        if data is not None:
            hit = np.flatnonzero(np.isin(data.members, long).any(-1))
            named = ", ".join(map(str, hit[:_MOST_NAMED])) + (", …" if len(hit) > _MOST_NAMED else "")
            told += f", in {pluralize(len(hit), 'row')} of {len(data)} ({named}),"
        raise PreferenceError(
            f"{told} exceed {self.room} tokens (the longest has {lengths.max()}), and nothing is cut in silence; "
            "shorten them, or leave their rows out by text_scores.fitting(data)"
        )


def _encode_texts(items: Sequence[Item], tokenizer: Tokenizer, body: Any) -> list[list[int]]:
    """Return the ids of texts and conversations; a language model's end with the token that ends texts."""
    chats = [is_conversation(item["completion"]) for item in items]
    rendered = [_whole_text(item, tokenizer) if chat else "" for item, chat in zip(items, chats, strict=True)]
    if isinstance(body, BertClassifier):
        whole = [
            text if chat else item.get("prompt", "") + item["completion"]
            for item, text, chat in zip(items, rendered, chats, strict=True)
        ]
        return tokenizer.encode(whole)
    end = [] if tokenizer.eos is None else [tokenizer.eos]
    before = tokenizer.encode(["" if chat else item.get("prompt", "") for item, chat in zip(items, chats, strict=True)])
    after = tokenizer.encode(
        [text if chat else item["completion"] for item, text, chat in zip(items, rendered, chats, strict=True)],
        special=False,
        continues=True,
    )
    # A chat template writes special tokens itself, its ends too.
    return [ids if chat else [*prompt, *ids, *end] for prompt, ids, chat in zip(before, after, chats, strict=True)]


def _whole_text(item: Item, tokenizer: Tokenizer) -> str:
    prompt = item.get("prompt", [])
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    return render_conversation(tokenizer, [*prompt, *item["completion"]], item, answered=True)


def read_text(body: Any, tokens: Array, mask: Array) -> Array:
    """Return h / √width of one text, [width]."""
    if isinstance(body, CausalLM):
        hidden, _ = body.extend(tokens, mask, body.start(tokens.shape[0]))
        read = hidden[-1]
    else:
        read = body.features(tokens, mask)
    return read.astype(jnp.float32) / jnp.sqrt(jnp.float32(read.shape[-1]))


@dataclass(frozen=True, eq=False)
class LastLayerScores(LinearScores):
    """A last layer on features that were computed once."""

    source: TextScores

    def for_items(self, items: Sequence[Item]) -> "LastLayerScores":
        """Return the same layer on the features of other texts."""
        return replace(self, features=self.source.features_of(*self.source.tokens_of(items)))


@dataclass(frozen=True, eq=False)
class TrainedTextScores(ScoreModel):
    """A last layer on a model that is trained underneath."""

    source: TextScores
    scale: float
    tokens: np.ndarray
    mask: np.ndarray
    site = WEIGHTS

    @property
    def size(self) -> int:
        """One weight for each number that the last layer reads."""
        return int(self.source.body.config.width)

    def declare(self) -> Any:
        """Declare what is trained, and return the model with it."""
        train: Any = self.source.train
        return train.declare(key_from_seed(0), self.source.body)

    def scores(self, latent: Array, items: Any, body: Any = None) -> Array:
        """Read the texts, and map what was read to scores."""
        body = self.source.body if body is None else body
        flat = jnp.reshape(items, (-1,))
        read = jax.vmap(lambda tokens, mask: read_text(body, tokens, mask))
        features = read(as_whole(self.tokens)[flat], jnp.asarray(self.mask)[flat])
        return (features @ latent).reshape(jnp.shape(items))

    def for_items(self, items: Sequence[Item]) -> "TrainedTextScores":
        """Return the same model of other texts."""
        tokens, mask = self.source.tokens_of(items)
        return replace(self, tokens=tokens, mask=mask)

    def frozen(self, params: Mapping[str, Any]) -> LastLayerScores:
        """Return the last layer on the model with these parameters, which stay."""
        made = handlers.seed(handlers.substitute(self.declare, data=dict(params)), rng_seed=key_from_seed(0))()
        model: Any = self.source.model
        model = replace(model, model=made) if isinstance(model, Pretrained) else made
        source = replace(self.source, model=model, train=None)
        return LastLayerScores(source.features_of(self.tokens, self.mask), self.scale, source)

    def trainable(self) -> Params:
        """Return what is trained, by name."""
        traced = handlers.trace(handlers.seed(self.declare, rng_seed=key_from_seed(0))).get_trace()
        return {name: site["value"] for name, site in traced.items() if site["type"] == "param"}

    def learning_rate(self, params: Params) -> float:
        """Suggest a rate for the parameters underneath."""
        assert self.source.train is not None
        return self.source.train.learning_rate_for(params)

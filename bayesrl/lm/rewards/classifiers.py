"""Rewards from a classifier: a BERT in the compiled step, or a scikit-learn pipeline on the host."""

from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from bayesrl.arguments import checked
from bayesrl.compilation.callbacks import host_call
from bayesrl.errors import LanguageModelError
from bayesrl.lm.checkpoints.pretrained import Pretrained, check_vocabulary
from bayesrl.lm.prompts import Completions
from bayesrl.lm.rewards.base import Reward
from bayesrl.lm.rewards.text import TextReward, decode_completions, require_tokenizer, text_reward
from bayesrl.lm.tokenization.tokenizer import Tokenizer
from bayesrl.lm.transformers.bert import BertClassifier
from bayesrl.lm.transformers.bert_config import REGRESSION, SEVERAL_LABELS
from bayesrl.value_checks import is_count

_SHORTEST, _RATIO = 32, 4
"""Texts are padded to one of a few lengths, each of which is compiled: the shortest, and multiples by this ratio."""


type Scale = Literal["log_prob", "probability", "logit"]


@dataclass(frozen=True, eq=False)
class ClassifierReward(Reward):
    """The score of a BERT classifier; see `classifier`."""

    model: BertClassifier
    tokenizer: Tokenizer
    label: int
    scale: Scale
    with_prompt: bool
    separate = True
    fields = frozenset()

    def __call__(self, completions: Completions) -> Array:
        """Return the score of the label for each completion, [...]."""
        theirs = require_tokenizer(completions.examples, "classifier")
        shape = completions.index.shape
        if theirs.digest == self.tokenizer.digest:
            tokens, mask = self._classifier_tokens(completions)
            scores = _scores(self.model, tokens.reshape(-1, tokens.shape[-1]), mask.reshape(-1, mask.shape[-1]))
        else:
            given = (completions.index, completions.tokens, completions.mask)
            width = self.model.config.max_length
            out = [jax.ShapeDtypeStruct((*shape, width), dtype) for dtype in (jnp.int32, jnp.bool_)]
            tokens, mask = host_call(lambda *arrays: list(self._reencode(completions, *arrays)), out, *given)
            # Arguments, not part of a closure: the rule for vmap must learn which of them have a batch.
            arrays, rest = eqx.partition(self.model, eqx.is_array)
            scores = _bucketed(rest)(arrays, tokens.reshape(-1, width), mask.reshape(-1, width))
        return self._scaled(scores).reshape(shape)

    def _scaled(self, logits: Array) -> Array:
        if self.scale == "logit":
            return logits[..., self.label]
        logits = logits.astype(jnp.float32)
        if self.model.config.problem == SEVERAL_LABELS:
            normal = jax.nn.log_sigmoid(logits)[..., self.label]
        else:
            normal = jax.nn.log_softmax(logits, axis=-1)[..., self.label]
        # Said outright: from its operations alone, no bound of a normalised logarithm can be proven.
        normal = jnp.minimum(normal, 0.0)
        return normal if self.scale == "log_prob" else jnp.exp(normal)

    # ---- the tokens of the classifier ---------------------------------------------------------

    def _classifier_tokens(self, completions: Completions) -> tuple[Array, Array]:
        """Return the policy's tokens without special ones, between the special tokens of the classifier."""
        tokens, mask = completions.tokens, completions.mask
        if self.with_prompt:
            tokens = jnp.concatenate([completions.prompt, tokens], -1)
            mask = jnp.concatenate([completions.prompt_mask, mask], -1)
        if self._special.size:
            mask = mask & ~jnp.isin(tokens, self._special)
        before, after = self.tokenizer.special_affixes
        count = mask.sum(-1, keepdims=True)
        room = self.model.config.max_length - len(before) - len(after)
        skipped = jnp.maximum(count - room, 0) if self.with_prompt else jnp.zeros_like(count)
        # A stable sort of the mask brings the tokens that count to the front, in their order.
        order = jnp.argsort(~mask, axis=-1, stable=True)
        places = jnp.arange(min(room, tokens.shape[-1]))
        # Places behind the last token get some token or other, which padding covers below.
        chosen = jnp.minimum(places + skipped, tokens.shape[-1] - 1)
        kept = jnp.take_along_axis(jnp.take_along_axis(tokens, order, -1), chosen, -1)
        count = jnp.minimum(count, room)
        lead = tokens.shape[:-1]
        parts = [jnp.broadcast_to(jnp.asarray(before, jnp.int32), (*lead, len(before))), kept.astype(jnp.int32)]
        whole = jnp.concatenate([*parts, jnp.full((*lead, max(len(after), 1)), self._pad, jnp.int32)], -1)
        place = jnp.arange(whole.shape[-1]) - len(before) - count
        if after:  # the place right behind the text is 0
            closing = jnp.asarray(after, jnp.int32)[jnp.clip(place, 0, len(after) - 1)]
            whole = jnp.where((place >= 0) & (place < len(after)), closing, whole)
        whole = jnp.where(place < len(after), whole, self._pad)
        least = jnp.arange(whole.shape[-1]) == 0  # a model must look at something
        longest = self.model.config.max_length
        return whole[..., :longest], ((place < len(after)) | least)[..., :longest]

    def _reencode(
        self, completions: Completions, index: np.ndarray, tokens: np.ndarray, mask: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Encode the text in the classifier's tokens, padded on the right to the most that it can read."""
        examples, width = completions.examples, self.model.config.max_length
        texts = decode_completions(examples, tokens, mask)
        if self.with_prompt:
            texts = [examples[at]["prompt"] + text for at, text in zip(index.reshape(-1), texts, strict=True)]
        before, after = self.tokenizer.special_affixes
        room = width - len(before) - len(after)
        whole = np.full((len(texts), width), self._pad, np.int32)
        fine = np.zeros((len(texts), width), bool)
        fine[:, 0] = True
        for row, code in enumerate(self.tokenizer.encode(texts, special=False)):
            kept = code if len(code) <= room else (code[len(code) - room :] if self.with_prompt else code[:room])
            kept = [*before, *kept, *after]
            whole[row, : len(kept)], fine[row, : len(kept)] = kept, True
        return whole.reshape(*index.shape, width), fine.reshape(*index.shape, width)

    @cached_property
    def _special(self) -> np.ndarray:
        added = self.tokenizer.core.get_added_tokens_decoder()
        return np.asarray([index for index, token in added.items() if token.special], np.int32)

    @property
    def _pad(self) -> int:
        return self.tokenizer.pad if self.tokenizer.pad is not None else 0


@checked(LanguageModelError)
def classifier(
    pretrained: Pretrained, label: int | str, *, scale: Scale = "log_prob", with_prompt: bool = False
) -> ClassifierReward:
    """Make a reward from a BERT's classification of the text, such as log P(positive | text).

    If policy and classifier have the same tokenizer, the classifier reads the policy's own tokens, except special ones.
    Otherwise the host decodes the text and encodes it again. In both cases the model itself runs inside the compiled
    step, and its result is a constant: no gradient flows through it. Texts that are too long lose their end or, with
    the prompt, their beginning.

    Args:
        pretrained: the result of `load_pretrained`: a `BertClassifier` with its tokenizer.
        label: the class, by its index or by its name in config.json.
        scale: "log_prob", nats; "probability", in [0, 1]; or "logit", before the softmax. If several labels can hold
            at once (`problem_type` in config.json), the probability of each is the logistic function of its logit.
        with_prompt: whether the classifier reads the prompt too, directly before the completion.

    Raises:
        LanguageModelError: the model is not a classifier, has no tokenizer, or has no such label; the scale is unknown,
            or needs a probability that the model does not have.

    Example:
        >>> import jax, tempfile
        >>> from bayesrl.lm import BertClassifier, BertConfig, char_tokenizer, load_pretrained, save_pretrained
        >>> config = BertConfig(vocab_size=6, max_length=8, width=4, depth=1, heads=2, inner=8, labels=("bad", "good"))
        >>> model = BertClassifier.init(jax.random.key(0), config)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_pretrained(folder, model, char_tokenizer("abc"))
        ...     good = classifier(load_pretrained(folder), "good")
        >>> good.label
        1
    """
    model = pretrained.model
    if not isinstance(model, BertClassifier):
        raise LanguageModelError(
            f"classifier got a {type(model).__name__}; pass what load_pretrained gave for a classifier of BERT"
        )
    if pretrained.tokenizer is None:
        raise LanguageModelError(
            f"classifier got a model without a tokenizer ({pretrained.folder} has no tokenizer.json); save it there"
        )
    labels, problem = model.config.labels, model.config.problem
    if scale != "logit" and (problem == REGRESSION or (len(labels) == 1 and problem != SEVERAL_LABELS)):
        raise LanguageModelError(
            f"classifier got scale={scale!r} for a model of {problem} with {len(labels)} labels, whose outputs are no "
            "probabilities of classes; use scale='logit'"
        )
    check_vocabulary(model, pretrained.tokenizer)
    return ClassifierReward(model, pretrained.tokenizer, _label_index(label, labels), scale, with_prompt)


def _label_index(label: Any, labels: tuple[Any, ...]) -> int:
    if label in labels and isinstance(label, str):
        return labels.index(label)
    if is_count(label, least=0) and label < len(labels):
        return int(label)
    told = ", ".join(f"{index}: {name!r}" for index, name in enumerate(labels[:20]))
    raise LanguageModelError(f"the classifier has no label {label!r}; use one of {told}, by place or by name")


# ---- running the model ----------------------------------------------------------------------


def _scores(model: BertClassifier, tokens: Array, mask: Array) -> Array:
    """Return the logits [n, labels] of texts [n, length]."""
    arrays, rest = eqx.partition(model, eqx.is_array)
    frozen = eqx.combine(lax.stop_gradient(arrays), rest)
    return jax.vmap(frozen)(tokens, mask)


def _bucketed(rest: Any) -> Any:
    """Make a function from (arrays of the model, tokens [n, longest], mask) to logits [n, labels].

    It runs at the least of a few lengths that fits every text. Under vmap it joins the texts of the batch, because a
    choice that differs within the batch would run every alternative.
    """

    @jax.custom_batching.custom_vmap
    def scores(arrays: Any, tokens: Array, mask: Array) -> Array:
        model = eqx.combine(arrays, rest)
        lengths = _lengths(tokens.shape[-1])
        longest = jnp.max(jnp.where(mask, jnp.arange(1, tokens.shape[-1] + 1), 0))
        which = jnp.searchsorted(jnp.asarray(lengths), longest)

        def cut(length: int) -> Any:
            return lambda: _scores(model, tokens[:, :length], mask[:, :length])

        return lax.switch(which, [cut(length) for length in lengths])

    @scores.def_vmap
    def _(size: int, batched: Any, arrays: Any, tokens: Array, mask: Array) -> tuple[Array, bool]:
        arrays_batched, *texts_batched = batched
        tokens, mask = (
            x if own else jnp.broadcast_to(x, (size, *x.shape))
            for x, own in zip((tokens, mask), texts_batched, strict=True)
        )
        if any(jax.tree.leaves(arrays_batched)):  # several classifiers at once: there is no common text

            def one(at: Array) -> Array:
                own_arrays = jax.tree.map(lambda leaf, own: leaf[at] if own else leaf, arrays, arrays_batched)
                return scores(own_arrays, tokens[at], mask[at])

            return lax.map(one, jnp.arange(size)), True
        flat = scores(arrays, tokens.reshape(-1, tokens.shape[-1]), mask.reshape(-1, mask.shape[-1]))
        return flat.reshape(size, -1, flat.shape[-1]), True

    return scores


def _lengths(longest: int) -> list[int]:
    lengths = [_SHORTEST]
    while lengths[-1] < longest:
        lengths.append(lengths[-1] * _RATIO)
    return [*lengths[:-1], longest]


# ---- scikit-learn ---------------------------------------------------------------------------


def _pipeline_scores(texts: list[str], *, pipeline: Any, place: int | None, scale: Scale) -> list[float]:
    """Return the scores of a pipeline for texts, [texts]."""
    if place is None:
        return list(np.asarray(pipeline.predict(texts)))
    if scale == "logit":
        margin = np.asarray(pipeline.decision_function(texts))
        # For two classes, scikit-learn returns only the margin of the second.
        return list(margin[:, place] if margin.ndim == 2 else margin * (1 if place == 1 else -1))
    chance = np.asarray(pipeline.predict_proba(texts))[:, place]
    # log 0 is −∞, which forbids a text.
    with np.errstate(divide="ignore"):
        return list(chance if scale == "probability" else np.log(chance))


@checked(LanguageModelError)
def sklearn_pipeline(pipeline: Any, label: Any = None, *, scale: Scale = "log_prob") -> TextReward:
    """Make a reward from a fitted scikit-learn pipeline that reads raw texts.

    Args:
        pipeline: a fitted one, such as `make_pipeline(TfidfVectorizer(), LogisticRegression())`; or a regressor.
        label: the class, as in its `classes_`; None for a regressor, whose prediction is the reward.
        scale: "log_prob", nats, or "probability", by `predict_proba`; "logit" is `decision_function`.

    Raises:
        LanguageModelError: it is not fitted, has no such class, or does not have that scale.

    Example:
        >>> from sklearn.feature_extraction.text import CountVectorizer
        >>> from sklearn.linear_model import LogisticRegression
        >>> from sklearn.pipeline import make_pipeline
        >>> mood = make_pipeline(CountVectorizer(), LogisticRegression())
        >>> mood = mood.fit(["so good", "good fun", "so bad", "bad taste"], ["+", "+", "-", "-"])
        >>> chance = sklearn_pipeline(mood, "+", scale="probability")
        >>> bool(chance.scores([0], ["good"], [{"prompt": ""}])[0] > 0.5)
        True
    """
    try:
        from sklearn.exceptions import NotFittedError
        from sklearn.utils.validation import check_is_fitted
    except ImportError as error:
        raise LanguageModelError(
            "sklearn_pipeline needs scikit-learn, which is not installed: install bayesrl[digits] or scikit-learn"
        ) from error
    kind = type(pipeline).__name__
    if not hasattr(pipeline, "predict"):
        raise LanguageModelError(f"sklearn_pipeline got a {kind}, which cannot predict; pass a fitted pipeline")
    try:
        check_is_fitted(pipeline)
    except (NotFittedError, TypeError) as error:
        raise LanguageModelError(f"sklearn_pipeline got a {kind} that is not fitted; call its fit first") from error
    classes = list(getattr(pipeline, "classes_", []))
    if label is None and classes:
        raise LanguageModelError(f"sklearn_pipeline got a classifier and no label; pass one of {classes!r:.200}")
    if label is not None and label not in classes:
        told = f"pass one of {classes!r:.200}" if classes else "it is a regressor: leave the label out"
        raise LanguageModelError(f"sklearn_pipeline has no class {label!r}; {told}")
    needed = "predict" if label is None else "decision_function" if scale == "logit" else "predict_proba"
    if not hasattr(pipeline, needed):
        other = "scale='probability'" if needed == "decision_function" else "scale='logit'"
        raise LanguageModelError(f"sklearn_pipeline got scale={scale!r}, and the {kind} has no {needed}; use {other}")
    place = None if label is None else classes.index(label)
    scores = partial(_pipeline_scores, pipeline=pipeline, place=place, scale=scale)
    return text_reward(scores, name="sklearn_pipeline", batched=True)

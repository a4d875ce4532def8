"""Log-ratios log q/π₀ of judged texts under a language model in training and its reference."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from bayesrl.compilation.jit import closure_jit
from bayesrl.core.programs import Programs
from bayesrl.display.formatting import pluralize
from bayesrl.errors import ObjectiveError, PreferenceError
from bayesrl.lm.generation import model_with_params
from bayesrl.lm.guides import ModelGuide
from bayesrl.lm.prompted_policy import PromptedPolicy
from bayesrl.lm.prompts import Prompts, encode_prompts
from bayesrl.lm.text_distribution import EosTokens
from bayesrl.lm.tokenization.chat_templates import SETTINGS, is_conversation, render_answer
from bayesrl.lm.tokenization.tokenizer import Tokenizer
from bayesrl.lm.transformers.base import CausalLM
from bayesrl.objectives.base import guide_params
from bayesrl.preferences.direct.scored_items import ItemLogRatios, ScoredItems
from bayesrl.preferences.records.preference_data import PreferenceData
from bayesrl.preferences.records.record_formats import Item
from bayesrl.preferences.score_models import as_whole
from bayesrl.typing import Params

_AT_ONCE = 64
_MOST_NAMED = 8


@dataclass(frozen=True, eq=False)
class TextItems(ScoredItems):
    """Items that are completions of prompts.

    Attributes:
        prompts: each prompt once.
        prompt: the number of each item's prompt, [items].
        tokens: completions with their ends, padded, [items, T].
        log_prior: log π₀ of each, nats, [items].
        lengths: tokens of each, its end included, [items].
        one_prompt: whether the items of each row share their prompt, which the model then reads only once.
    """

    prompts: Prompts
    prompt: np.ndarray
    tokens: np.ndarray
    log_prior: np.ndarray
    lengths: np.ndarray
    one_prompt: bool

    @classmethod
    def of(cls, data: PreferenceData, programs: Programs) -> "TextItems":
        """Encode items for a policy's model, and score them under its reference, once for all steps.

        Raises:
            ObjectiveError: the guide is none of a language model.
            PreferenceError: completions or prompts are too long; tokens that the model does not know.
        """
        policy: Any = programs.policy
        if not isinstance(programs.guide, ModelGuide):
            raise ObjectiveError(
                "judgements of texts train a language model; pass guide=lm.LoRA() or lm.FullParameters()"
            )
        prompts, prompt, completions = _encode(data.items, policy)
        _check_lengths(data, policy, np.asarray(prompts.mask).sum(-1)[prompt], completions)
        _check_vocabulary(policy.model, prompts, completions)
        tokens = np.full((len(completions), max(map(len, completions))), _padding(policy), np.int32)
        for row, ids in zip(tokens, completions, strict=True):
            row[: len(ids)] = ids
        members = data.members
        own = np.where(members >= 0, prompt[members], prompt[members[:, :1]])
        shared = bool((own == own[:, :1]).all())
        lengths = np.asarray([len(ids) for ids in completions])
        bare = cls(prompts, prompt, tokens, np.zeros(len(tokens), np.float32), lengths, shared)
        with jax.ensure_compile_time_eval():
            return replace(bare, log_prior=bare.reference_scores(policy))

    def reference_scores(self, policy: PromptedPolicy) -> np.ndarray:
        """Return log π₀ of all items, some at a time."""
        numbers = np.arange(-(-len(self.tokens) // _AT_ONCE) * _AT_ONCE) % len(self.tokens)

        def score(numbers: Array) -> Array:
            return lax.map(lambda some: self.log_probs(policy, policy.model, some, some), numbers)

        scored = closure_jit(score, name="reference_scores")(as_whole(numbers.reshape(-1, _AT_ONCE)))
        return np.asarray(scored, np.float32).reshape(-1)[: len(self.tokens)]

    def log_probs(self, policy: PromptedPolicy, model: CausalLM, asked: Array, answers: Array) -> Array:
        """Return the log-probability of the completions of some items after the prompts of others.

        Args:
            policy: whose options count.
            model: any of the reference's shape.
            asked: items whose prompts to take, [rows].
            answers: items whose completions to take, [*any, rows].

        Returns:
            [*any, rows], nats.
        """
        whole = replace(policy, options={**policy.options, "num_steps": self.tokens.shape[1]})
        at = as_whole(self.prompt)[asked]
        answered = whole.distribution(model, self.prompts.tokens[at], self.prompts.mask[at])
        scored: Array = answered.log_prob(jnp.asarray(self.tokens)[answers])
        return scored

    def under(self, params: Params, programs: Programs) -> ItemLogRatios:
        """Let the model read the items that are asked for; see `ScoredItems.under`."""
        guide: Any = programs.guide
        policy: Any = guide.policy
        model = model_with_params(guide.declare, programs.constrain(guide_params(params)))

        def log_ratios(items: Array) -> Array:
            if self.one_prompt and items.ndim == 2:
                log_q = self.log_probs(policy, model, items[:, 0], items.T).T
            else:
                flat = items.reshape(-1)
                log_q = self.log_probs(policy, model, flat, flat).reshape(items.shape)
            return log_q - jnp.asarray(self.log_prior)[items]

        def divergence(items: Array) -> Array:
            # Texts that answer another prompt stand in for draws of q: KTO's own estimate.
            others = jnp.roll(items, 1)
            ours, theirs = (self.log_probs(policy, one, items, others) for one in (model, policy.model))
            return lax.stop_gradient((ours - theirs).mean())

        return ItemLogRatios(log_ratios, divergence, None)


def _encode(items: Sequence[Item], policy: PromptedPolicy) -> tuple[Prompts, np.ndarray, list[list[int]]]:
    """Return each prompt once, the number of each item's prompt, and the tokens of the completions with their ends."""
    tokenizer = policy.tokenizer
    records = [_record_of(item) for item in items]
    first: dict[str, int] = {}
    keys = [repr(sorted(record.items())) for record in records]
    for at, key in enumerate(keys):
        first.setdefault(key, at)
    place = {key: number for number, key in enumerate(first)}
    prompts = encode_prompts([records[at] for at in first.values()], tokenizer)
    number = np.asarray([place[key] for key in keys])
    texts = [_text_of(item, prompts.examples[at], tokenizer) for item, at in zip(items, number, strict=True)]
    waiting = [text for text in texts if isinstance(text, str)]
    if waiting and tokenizer is None:
        raise PreferenceError("the items are texts, and the model has no tokenizer; pass tokenizer= to lm.policy")
    encoded = iter([] if tokenizer is None else tokenizer.encode(waiting, special=False, continues=True))
    ids = [next(encoded) if isinstance(text, str) else text for text in texts]
    return prompts, number, [_ended(one, policy.options["eos"], policy.options["num_steps"]) for one in ids]


def _record_of(item: Item) -> dict[str, Any]:
    """Return the record of an item's prompt, as `lm.encode_prompts` takes it."""
    prompt: Any = item.get("prompt", "")
    if isinstance(prompt, str) and is_conversation(item["completion"]):
        prompt = [{"role": "user", "content": prompt}]
    return {"prompt": prompt} | {name: item[name] for name in SETTINGS if name in item}


def _text_of(item: Item, example: Any, tokenizer: Tokenizer | None) -> str | list[int]:
    """Return the text of a completion, with what a chat template adds to it; or its token ids."""
    completion: Any = item["completion"]
    if is_conversation(completion):
        if tokenizer is None:
            raise PreferenceError("an item is a conversation, and the model has no tokenizer with a chat template")
        return render_answer(example, completion, tokenizer)
    return completion if isinstance(completion, str) else [int(one) for one in completion]


def _ended(ids: list[int], eos: EosTokens, most: int) -> list[int]:
    """Return tokens up to their end, which is added if it is missing, unless the policy would not write it there."""
    ends = (eos,) if isinstance(eos, int) else eos or ()
    found = next((at for at, token in enumerate(ids) if token in ends), None)
    if found is not None:
        return ids[: found + 1]
    return [*ids, ends[0]] if ends and len(ids) != most else ids


def _padding(policy: PromptedPolicy) -> int:
    pad, eos = policy.options["pad"], policy.options["eos"]
    first = eos[0] if isinstance(eos, tuple) and eos else eos
    chosen: int = pad if pad is not None else first if isinstance(first, int) else 0
    return chosen


def _check_lengths(data: PreferenceData, policy: PromptedPolicy, before: np.ndarray, ids: list[list[int]]) -> None:
    """Refuse texts that the policy could not write, and name the rows that hold them."""
    lengths, most, context = np.asarray([len(one) for one in ids]), policy.options["num_steps"], policy.model.config
    if policy.options["eos"] is None and (short := np.flatnonzero(lengths < most)).size:
        raise PreferenceError(
            f"item {short[0]} has {pluralize(int(lengths[short[0]]), 'token')}, and the policy always writes {most}; "
            "pass texts of that length, or a policy that stops at an end token"
        )
    # The last token of a text is written and never read, so it needs no place in the context.
    room, whole = context.max_length + 1, before + lengths
    bounds = [
        (lengths, most, f"completions of more than max_new_tokens={most}", "raise max_new_tokens of lm.policy"),
        (whole, room, f"more tokens than the context of {context.max_length}", "shorten them"),
    ]
    for sizes, bound, what, remedy in bounds:
        if (rows := np.flatnonzero(((data.members >= 0) & (sizes > bound)[data.members]).any(-1))).size:
            named = ", ".join(map(str, rows[:_MOST_NAMED])) + (", …" if len(rows) > _MOST_NAMED else "")
            raise PreferenceError(
                f"{pluralize(len(rows), 'row')} of {len(data)} ({named}) have {what}, up to {sizes.max()}, and nothing "
                f"is cut in silence; {remedy}, or keep the others: data.take(rows)"
            )
    widest = int(before.max() + lengths.max())
    if widest > room:
        raise PreferenceError(
            f"the longest prompt has {before.max()} tokens and the longest completion {lengths.max()}, padded together "
            f"more than the context of {context.max_length}; leave out the longest of either: data.take(rows)"
        )


def _check_vocabulary(model: CausalLM, prompts: Prompts, completions: list[list[int]]) -> None:
    size = model.config.vocab_size
    asked = np.asarray(prompts.tokens)
    for at, ids in enumerate([asked[np.asarray(prompts.mask)], *map(np.asarray, completions)]):
        if ids.size and not 0 <= ids.min() <= ids.max() < size:
            wrong = int(ids.max() if ids.max() >= size else ids.min())
            whose = "a prompt" if at == 0 else f"item {at - 1}"
            raise PreferenceError(
                f"{whose} holds token {wrong}, and the model knows 0 to {size - 1}; was it encoded by another "
                "tokenizer? Pass texts, or ids of the model's own"
            )

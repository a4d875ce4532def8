"""`policy`: a language model that answers prompts, as a program for `bayesrl.fit`."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, ClassVar

import jax
import numpy as np
import numpyro
from jax import Array

from bayesrl.arguments import Count, CountOrZero, Positive, UnitInterval, checked, real_range
from bayesrl.core.primitives import reward as reward_site
from bayesrl.display.formatting import pluralize
from bayesrl.errors import LanguageModelError
from bayesrl.lm.checkpoints.generation_config import sampling_settings
from bayesrl.lm.checkpoints.pretrained import Pretrained, unwrap
from bayesrl.lm.prompts import Completions, Prompts, encode_prompts, unread_fields
from bayesrl.lm.rewards.base import Reward, evaluate
from bayesrl.lm.rewards.text import as_reward
from bayesrl.lm.text_distribution import CausalLMDistribution, is_eos
from bayesrl.lm.tokenization.tokenizer import Tokenizer
from bayesrl.lm.transformers.base import CausalLM

TEXT, PLATE = "text", "prompt"
"""Names of the action site, and of the plate of prompts."""


@checked(LanguageModelError)
@dataclass(frozen=True, eq=False)
class PromptedPolicy:
    """A language model that answers prompts, as a program; made by `policy`.

    Attributes:
        model: the reference π₀.
        tokenizer: of the model, or None.
        prompts: the prompts to answer if the program gets no others as its argument.
        rewards: by the name of the reward site.
        metrics: by the name of the deterministic site.
        batch_size: how many prompts a step sees; None means all.
        options: of `CausalLMDistribution`.
        source: the `Pretrained` that the model came in, if it came with settings.
    """

    model: CausalLM
    tokenizer: Tokenizer | None
    prompts: Prompts = field(repr=False)
    rewards: Mapping[str, Reward]
    metrics: Mapping[str, Reward]
    batch_size: int | None
    options: Mapping[str, Any]
    source: Pretrained | None = field(default=None, repr=False)
    sampler: ClassVar[Any] = None
    """Writes its draws where there is no guide; `TextDraws` enters itself here."""

    def __call__(self, prompts: Prompts | None = None) -> Array:
        """Run as a program: answer the prompts, by default its own, and collect rewards."""
        return self.run(self.model, prompts)

    @property
    def truncated(self) -> bool:
        """Whether truncation excludes some tokens."""
        return self.options["top_k"] is not None or self.options["top_p"] < 1 or self.options["min_p"] > 0

    def read(self, site: str, value: Any) -> str | None:
        """Decode a value of a site for reports; None for other sites, or without a tokenizer."""
        if site != TEXT or self.tokenizer is None:
            return None
        tokens = np.asarray(value).reshape(-1)
        ended = np.cumsum(is_eos(tokens, self.options["eos"])) > 0
        return self.tokenizer.decode([tokens[~ended]], continues=True)[0]

    def distribution(self, model: CausalLM, prompt: Array, mask: Array | None) -> CausalLMDistribution:
        """Return the distribution of a model's answers to prompts [*batch, P], truncated as the reference is.

        The model is any of the reference's shape; the mask is True for tokens that are not padding, or None.
        """
        support_model = self.model if self.truncated and model is not self.model else None
        return CausalLMDistribution(model, prompt, mask, support_model=support_model, **self.options)

    def run(self, model: CausalLM, prompts: Prompts | None = None, *, rewarded: bool = True) -> Array:
        """Run with another model instead of the reference, with or without rewards and metrics."""
        encoded = self.resolve_prompts(prompts)
        count = len(encoded)
        # Prompts from outside are all answered; only its own come in mini-batches.
        size = self.batch_size if prompts is None and self.batch_size is not None and self.batch_size < count else None
        with numpyro.plate(PLATE, count, subsample_size=size) as index:
            prompt, mask = encoded.tokens[index], encoded.mask[index]
            answers = self.distribution(model, prompt, mask)
            tokens = numpyro.sample(TEXT, answers)
            if not rewarded:
                return tokens
            completions = Completions(index, prompt, mask, tokens, answers.text_mask(tokens), encoded.examples)
            for name, reward in self.rewards.items():
                reward_site(name, evaluate(reward, completions, name))
            for name, metric in self.metrics.items():
                numpyro.deterministic(name, evaluate(metric, completions, name))
        return tokens

    def over_all_data(self) -> "PromptedPolicy":
        """Return the same policy without mini-batches of prompts."""
        return self if self.batch_size is None else replace(self, batch_size=None)

    def resolve_prompts(self, prompts: Any = None) -> Prompts:
        """Return its own prompts, or check that others have the same tokenizer and leave room to answer."""
        if prompts is None:
            return self.prompts
        encoded = encode_prompts(prompts, self.tokenizer)
        _check_tokenizer(encoded, self.tokenizer)
        if not isinstance(prompts, Prompts):
            _check_fields(encoded, [*self.rewards.values(), *self.metrics.values()])
        # While JAX traces, there are no lengths to check.
        if not isinstance(encoded.tokens, jax.core.Tracer):
            _check_room(self.model, encoded, self.options["num_steps"])
        return encoded

    def __repr__(self) -> str:
        """Describe the policy in one line."""
        prompts, rewards = pluralize(len(self.prompts), "prompt"), ", ".join(self.rewards)
        return f"policy({type(self.model).__name__}, {prompts}, rewards {rewards})"


@checked(LanguageModelError)
def policy(
    model: Pretrained | CausalLM,
    prompts: Prompts | Sequence[str | Mapping[str, Any]] | Any,
    *,
    reward: Reward | Callable[..., Any] | Mapping[str, Reward | Callable[..., Any]],
    max_new_tokens: Count | None = None,
    tokenizer: Tokenizer | None = None,
    metrics: Mapping[str, Reward | Callable[..., Any]] | None = None,
    batch_size: Count | None = None,
    temperature: Positive | None = None,
    top_k: CountOrZero | None = None,
    top_p: Annotated[float, real_range(above=0, most=1)] | None = None,
    min_p: UnitInterval | None = None,
    stop_at_eos: bool = True,
) -> PromptedPolicy:
    """Make a policy from a language model: π₀(x | prompt) over its completions, with rewards for them.

    Prompts are contexts: each is a separate problem with its own evidence, and J is their average. The program draws
    the site `text`, [prompts, max_new_tokens], and takes other prompts as its argument:
    `posterior.estimate(key, 100, held_out)`.

    Args:
        model: the reference, which stays unchanged: the result of `load_pretrained`, or a model.
        prompts: texts, records with the text under `prompt`, an array of tokens, or `Prompts`.
        reward: a `Reward`, or a function of the text (see `rewards.text_reward`); several by name add up.
        max_new_tokens: the most new tokens; by default the value in the model's generation_config.json.
        tokenizer: of the model, if `model` brings none.
        metrics: further numbers to report for the completions, by name, given like rewards.
        batch_size: prompts per step; by default all.
        temperature: divides the logits of both policies. It is part of the distribution, as are the next three. The
            default of each is the sampling value in the model's generation_config.json, or else one without effect.
        top_k: how many of the likeliest tokens may follow; 0 for all.
        top_p: only the likeliest tokens that together have this probability may follow. The reference decides which.
        min_p: only tokens with at least this share of the likeliest token's probability may follow.
        stop_at_eos: whether a text ends at any of the tokenizer's `eos_ids`; otherwise it always has `max_new_tokens`.

    Raises:
        LanguageModelError: no prompts; prompts longer than the context; a model that cannot write; an option out
            of range; a tokenizer that does not fit the model.

    Example:
        >>> import jax, jax.numpy as jnp, bayesrl
        >>> from bayesrl.lm import GPT2, GPT2Config, policy, rewards
        >>> model = GPT2.init(jax.random.key(0), GPT2Config(vocab_size=4, max_length=4, width=8, depth=1, heads=2))
        >>> ones = rewards.token_reward(lambda tokens, mask: jnp.sum(tokens == 1))
        >>> writer = policy(model, jnp.zeros((1, 1), int), reward=ones, max_new_tokens=3)
        >>> exact = bayesrl.enumerate_posterior(writer, beta=1.0)
        >>> exact.sites["text"].shape
        (64, 1, 3)
    """
    reference, tokenizer, source = unwrap(model, tokenizer)
    if not isinstance(reference, CausalLM):
        raise LanguageModelError(
            f"a {type(reference).__name__} cannot write; pass a causal model: GPT2, Llama, or what load_pretrained gave"
        )
    encoded = encode_prompts(prompts, tokenizer)
    _check_tokenizer(encoded, tokenizer)
    generation = (source and source.generation) or (tokenizer.generation if tokenizer is not None else {})
    given = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
    settings = sampling_settings(generation, encoded.tokens.shape[1], max_new_tokens, given)
    _check_room(reference, encoded, settings["num_steps"])
    rewards = reward if isinstance(reward, Mapping) else {"reward": reward}
    if not rewards:
        raise LanguageModelError("reward={} names no reward; pass at least one")
    named_rewards = {name: as_reward(one) for name, one in rewards.items()}
    named_metrics = {name: as_reward(one) for name, one in (metrics or {}).items()}
    if repeated := sorted({TEXT, PLATE, *named_rewards} & set(named_metrics) | ({TEXT, PLATE} & set(named_rewards))):
        raise LanguageModelError(f"the name {repeated[0]!r} is taken; give the reward or metric another")
    _check_fields(encoded, [*named_rewards.values(), *named_metrics.values()])
    ends = tokenizer.eos_ids if tokenizer is not None and stop_at_eos else ()
    pad = tokenizer.pad if tokenizer is not None else None
    options = {**settings, "eos": ends[0] if len(ends) == 1 else ends or None, "pad": pad}
    return PromptedPolicy(reference, tokenizer, encoded, named_rewards, named_metrics, batch_size, options, source)


def _check_fields(prompts: Prompts, rewards: Sequence[Reward]) -> None:
    """Name the fields of the prompts' records that no reward reads; refuse pairs of answers among them."""
    known = [reward.fields for reward in rewards]
    if None in known:
        return
    unread = unread_fields(prompts.examples, {name for fields in known if fields is not None for name in fields})
    pair = [name for name in ("chosen", "rejected") if name in unread]
    if pair:
        raise LanguageModelError(
            f"the prompts are records of preferences, with {' and '.join(map(repr, pair))}, and no reward reads them; "
            "pass the prompts alone, [record['prompt'] for record in records], and learn a reward from the answers by "
            "bayesrl.preferences.read(records)"
        )
    if unread:
        warnings.warn(
            f"no reward or metric reads the fields {', '.join(map(repr, unread))} of the prompts' records; leave them "
            "out, or read them in a reward of (text, example)",
            stacklevel=4,
        )


def _check_tokenizer(prompts: Prompts, tokenizer: Tokenizer | None) -> None:
    """Refuse prompts that another tokenizer encoded."""
    theirs = prompts.examples.tokenizer
    if theirs is not None and tokenizer is not None and theirs.digest != tokenizer.digest:
        raise LanguageModelError(
            f"the prompts were encoded by another tokenizer (fingerprint {theirs.digest}) than the model's "
            f"({tokenizer.digest}); make them by lm.encode_prompts(texts, tokenizer) with that of the model"
        )


def _check_room(model: CausalLM, prompts: Prompts, max_new_tokens: int) -> None:
    """Refuse unknown tokens, and prompts that leave no room to answer."""
    vocab_size = model.config.vocab_size
    tokens, mask = np.asarray(prompts.tokens), np.asarray(prompts.mask)  # NumPy, because JAX may be tracing here
    extremes = int(tokens.max()), int(tokens.min())
    if extremes[0] >= vocab_size or extremes[1] < 0:
        raise LanguageModelError(
            f"a prompt holds token {extremes[0] if extremes[0] >= vocab_size else extremes[1]}, and the model knows 0 "
            f"to {vocab_size - 1}; was it encoded by another tokenizer?"
        )
    lengths = mask.sum(-1)
    longest, room = int(lengths.max()), model.config.max_length
    # One more than the context has room for: the last new token is written and never read.
    if tokens.shape[1] + max_new_tokens > room + 1:
        worst = int(lengths.argmax())
        raise LanguageModelError(
            f"prompt {worst} ({prompts.examples[worst]['prompt'][:40]!r}) has {longest} tokens, and with "
            f"max_new_tokens={max_new_tokens} exceeds the model's context of {room}; shorten one of them"
        )

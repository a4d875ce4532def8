"""The distribution of a language model over completions of a prompt."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from operator import or_
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jax import Array, lax
from numpyro.distributions import constraints

from bayesrl.argument_types import Requirement
from bayesrl.arguments import Count, CountOrZero, FlagsOrNone, Positive, UnitInterval, UnusedOption, checked, real_range
from bayesrl.core.rng import draw_category
from bayesrl.errors import LanguageModelError
from bayesrl.typing import PRNGKey
from bayesrl.value_checks import are_integers

_MOST_VALUES = 2**20
"""A distribution over more sentences than this counts as one without a finite support."""

_PROMPT_IS_SHORT = 4
"""A prompt is short if there are at least this many times as many new tokens."""

_IMPOSSIBLE = -jnp.inf

type EosTokens = CountOrZero | tuple[CountOrZero, ...] | None
"""The token that ends a text, or several, or None if no token does."""


def is_eos(tokens: Any, eos: EosTokens) -> Any:
    """Mark the tokens that end a text, in a NumPy or JAX array."""
    marks = [tokens == one for one in ((eos,) if isinstance(eos, int) else eos or ())]
    return reduce(or_, marks) if marks else np.zeros(np.shape(tokens), bool)


def text_mask(tokens: Any, eos: EosTokens) -> Any:
    """Mark the tokens [..., T] that belong to a text, up to and including its first end, in a NumPy or JAX array."""
    marks = is_eos(tokens, eos).astype(int)
    # Up to the first end, the count of ends so far equals the token's own mark; behind it, it is larger.
    return marks.cumsum(-1) == marks


@dataclass(frozen=True)
class TokenSequences(Sequence[Any]):
    """Every sequence of at most `length` tokens, padded to it: the support of a small `CausalLMDistribution`."""

    vocabulary: int  # number of tokens
    length: int
    eos: EosTokens
    pad: int  # follows the end

    def __len__(self) -> int:
        num_ends = int(np.sum(is_eos(np.arange(self.vocabulary), self.eos)))
        going_on = self.vocabulary - num_ends
        # Texts that end after n other tokens, and those that never end.
        return sum(num_ends * going_on**n for n in range(self.length)) + going_on**self.length

    def __getitem__(self, index: Any) -> Any:
        return self.__array__()[index]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """List the sentences, [sentences, length]; the last token varies fastest."""
        tokens = np.arange(self.vocabulary)
        open_rows = np.zeros((1, 0), int)
        closed = []
        for _ in range(self.length):
            longer = np.concatenate(
                [np.repeat(open_rows, self.vocabulary, 0), np.tile(tokens, len(open_rows))[:, None]], 1
            )
            ended = is_eos(longer[:, -1], self.eos)
            closed.append(longer[ended])
            open_rows = longer[~ended]
        rows = [np.pad(part, ((0, 0), (0, self.length - part.shape[1])), constant_values=self.pad) for part in closed]
        return np.concatenate([*rows, open_rows]).astype(int if dtype is None else dtype)


_IS_MODEL = Requirement("a causal language model", lambda model: hasattr(model, "config"), any_type=True)
_IS_PROMPT = Requirement(
    "whole numbers [..., length]", lambda prompt: are_integers(prompt) and np.ndim(prompt) > 0, any_type=True
)


@checked(
    LanguageModelError,
    UnusedOption(
        "support_model",
        lambda given: given["top_k"] is None and given["top_p"] == 1 and given["min_p"] == 0,
        "without top_k, top_p or min_p all tokens may follow",
    ),
)
class CausalLMDistribution(dist.Distribution):
    """A language model's completions of a prompt: a distribution over sequences of tokens.

    log p(x | prompt) = Σ_t log softmax(f(prompt, x_<t) / temperature)[x_t], where the sum goes up to and including the
    token that ends the text; `pad` follows it and does not count. Truncation to the `top_k` likeliest tokens, or to
    the likeliest that together have probability `top_p`, or to those of at least `min_p` times the probability of the
    likeliest, is part of the distribution: drawing and scoring use the same truncation.

    Args:
        model: a causal language model.
        prompt: tokens, padded on the left, [*batch, P] with P ≥ 1.
        mask: True for tokens that are not padding, [*batch, P]; None if there is no padding.
        num_steps: largest number of new tokens T.
        eos: the token that ends the text, or several that do, or None to always write T tokens.
        pad: the token after the end; by default `eos`, the first of several, or 0.
        temperature: divides the logits; above 0.
        top_k: how many tokens may follow, or None for all.
        top_p: probability of the tokens that may follow, in (0, 1].
        min_p: least probability of a token that may follow, as a share of that of the likeliest, in [0, 1].
        support_model: the model whose truncation counts, if it is not `model` itself. A fitted policy keeps to
            the tokens of its reference, so that the KL is finite.

    Raises:
        LanguageModelError: an option is out of range; prompt and new tokens exceed the model's context.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from bayesrl.lm import GPT2, CausalLMDistribution, GPT2Config
        >>> model = GPT2.init(jax.random.key(0), GPT2Config(vocab_size=5, max_length=8, width=8, depth=1, heads=2))
        >>> text = CausalLMDistribution(model, jnp.array([[0, 1]]), num_steps=3)
        >>> tokens = jax.jit(lambda key: text.sample(key, (10,)))(jax.random.key(1))
        >>> log_prob, by_step = jax.jit(lambda tokens: (text.log_prob(tokens), text.log_prob_by_step(tokens)))(tokens)
        >>> tokens.shape, log_prob.shape, by_step.shape
        ((10, 1, 3), (10, 1), (10, 1, 3))

    References:
        Holtzman, Buys, Du, Forbes & Choi (2020), "The curious case of neural text degeneration", for top-p; Nguyen,
        Baker, Neo, Roush, Kirsch & Shwartz-Ziv (2025), "Turning up the heat: min-p sampling", equation 2.
    """

    arg_constraints: dict[str, Any] = {}  # noqa: RUF012  (NumPyro's own form)
    pytree_data_fields = ("model", "prompt", "mask", "support_model")
    pytree_aux_fields = ("num_steps", "eos", "pad", "temperature", "top_k", "top_p", "min_p")
    guide_remedy = "pass guide=bayesrl.lm.LoRA(rank=8), or guide=bayesrl.lm.FullParameters()"

    def __init__(
        self,
        model: Annotated[Any, _IS_MODEL],
        prompt: Annotated[Any, _IS_PROMPT],
        mask: FlagsOrNone = None,
        *,
        num_steps: Count,
        eos: EosTokens = None,
        pad: CountOrZero | None = None,
        temperature: Positive = 1.0,
        top_k: Count | None = None,
        top_p: Annotated[float, real_range(above=0, most=1)] = 1.0,
        min_p: UnitInterval = 0.0,
        support_model: Annotated[Any, _IS_MODEL] | None = None,
    ) -> None:
        self.model, self.support_model = model, support_model
        self.prompt = jnp.asarray(prompt)
        self.mask = jnp.ones(self.prompt.shape, bool) if mask is None else jnp.asarray(mask)
        if self.mask.shape != self.prompt.shape:
            raise LanguageModelError(
                f"CausalLMDistribution got a mask of shape {self.mask.shape} and a prompt of shape "
                f"{self.prompt.shape}; pass True for each token that is not padding"
            )
        self.num_steps, self.eos = num_steps, eos
        first = eos[0] if isinstance(eos, tuple) and eos else eos
        self.pad = pad if pad is not None else (first if isinstance(first, int) else 0)
        self.temperature, self.top_k, self.top_p, self.min_p = temperature, top_k, top_p, min_p
        longest = model.config.max_length
        if self.prompt.shape[-1] + num_steps > longest + 1:
            raise LanguageModelError(
                f"prompts of {self.prompt.shape[-1]} tokens and {num_steps} new ones exceed the model's context of "
                f"{longest}; shorten the prompts, or lower max_new_tokens"
            )
        super().__init__(self.prompt.shape[:-1], (num_steps,))

    @constraints.dependent_property(is_discrete=True, event_dim=1)  # type: ignore[untyped-decorator]
    def support(self) -> Any:
        """Sequences of T tokens."""
        return constraints.independent(constraints.integer_interval(0, self.model.config.vocab_size - 1), 1)

    @property
    def finite_values(self) -> TokenSequences | None:
        """All sentences, if they are few enough to list; else None."""
        every = TokenSequences(self.model.config.vocab_size, self.num_steps, self.eos, self.pad)
        # A bound by logarithms first, because the exact count may have thousands of digits.
        small = self.num_steps * math.log(max(every.vocabulary, 2)) < math.log(_MOST_VALUES) + 1
        return every if small and len(every) <= _MOST_VALUES else None

    def sample(self, key: PRNGKey, sample_shape: tuple[int, ...] = ()) -> Array:
        """Write [*sample_shape, *batch, T] tokens, with a cache of keys and values."""
        batch, lead = math.prod(self.batch_shape), math.prod(sample_shape)
        keys = jax.random.split(key, (lead, batch))
        prompt, mask = self._flat_prompts()
        written = jax.vmap(jax.vmap(self._generate), in_axes=(0, None, None))(keys, prompt, mask)
        return written.reshape(*sample_shape, *self.batch_shape, self.num_steps)

    def log_prob(self, value: Any) -> Array:
        """Score sentences [..., *batch, T]: nats, [..., *batch]."""
        return self.log_prob_by_step(value).sum(-1)

    def log_prob_by_step(self, value: Any) -> Array:
        """Score sentences token by token, [..., *batch, T]: nats, 0 after the end of the text."""
        value = jnp.asarray(value)

        def score(prompt: Array, mask: Array, tokens: Array) -> Array:
            logits = self._all_logits(prompt, mask, tokens)
            # Gather, then normalize: log_softmax would write all [T, V] numbers for the T that are wanted.
            chosen = jnp.take_along_axis(logits, tokens[:, None], -1)[:, 0]
            own = chosen - jax.nn.logsumexp(logits, axis=-1)
            # A value with anything but padding behind its end is not in the support.
            behind = jnp.where(tokens == self.pad, 0.0, _IMPOSSIBLE)
            return jnp.where(self.text_mask(tokens), own, behind)

        return self._map_texts(score, value)

    def next_token_log_probs(self, value: Any) -> Array:
        """Return the log-probability of every token at every step of given sentences, [..., *batch, T, V], nats."""

        def score(prompt: Array, mask: Array, tokens: Array) -> Array:
            return jax.nn.log_softmax(self._all_logits(prompt, mask, tokens), axis=-1)

        return self._map_texts(score, jnp.asarray(value))

    def kl_by_step(self, other: "CausalLMDistribution", value: Any) -> Array:
        """Return KL(self‖other) of the next token, summed over the vocabulary, at each step of given sentences.

        Its sum over steps, averaged over sentences drawn from this distribution, is KL(self‖other) of whole texts, with
        far less noise than log-ratios of the drawn tokens (Amini, Vieira & Cotterell 2025, equation 9).

        Returns:
            [..., *batch, T], nats; 0 after the end of the text.
        """
        kl = next_token_kl(self.next_token_log_probs(value), other.next_token_log_probs(value))
        return jnp.where(self.text_mask(jnp.asarray(value)), kl, 0.0)

    def text_mask(self, tokens: Array) -> Array:
        """Mark the tokens that belong to the text, its end included, [..., T]."""
        return jnp.asarray(text_mask(tokens, self.eos))

    # ---- one sentence ------------------------------------------------------------------------

    def _generate(self, key: PRNGKey, prompt: Array, mask: Array) -> Array:
        keys = jax.random.split(key, self.num_steps)
        # One slot fewer than tokens: the last one is never read.
        hidden, caches = self._extend(prompt, mask, self._start(len(prompt) + self.num_steps - 1))
        first = draw_category(keys[0], self._logits([h[-1] for h in hidden])).astype(prompt.dtype)

        def step(carry: tuple[Array, Array, Any], key: PRNGKey) -> tuple[tuple[Array, Array, Any], Array]:
            token, done, caches = carry
            hidden, caches = self._extend(token[None], jnp.ones(1, bool), caches)
            drawn = draw_category(key, self._logits([h[0] for h in hidden])).astype(token.dtype)
            new = jnp.where(done, self.pad, drawn)
            return (new, done | is_eos(new, self.eos), caches), new

        _, rest = lax.scan(step, (first, is_eos(first, self.eos), caches), keys[1:])
        return jnp.concatenate([first[None], rest])

    def _all_logits(self, prompt: Array, mask: Array, tokens: Array) -> Array:
        """Return the logits that every token is drawn from, [T, V]."""
        return self._logits(self._all_hidden(prompt, mask, tokens))

    def _all_hidden(self, prompt: Array, mask: Array, tokens: Array) -> list[Array]:
        """Return the state of each model before every token, [T, width].

        A long prompt is read once for all sentences that follow it; a short one is read again with each sentence.
        """
        length = prompt.shape[0]
        if _PROMPT_IS_SHORT * length <= self.num_steps:
            whole = jnp.concatenate([prompt, tokens[:-1].astype(prompt.dtype)])
            there = jnp.concatenate([mask, jnp.ones(self.num_steps - 1, bool)])
            read, _ = self._extend(whole, there, self._start(len(whole)))
            return [hidden[length - 1 :] for hidden in read]
        before, caches = self._extend(prompt, mask, self._start(length + self.num_steps - 1))
        # The state after the prompt's last token gives the first new one.
        last = [h[-1:] for h in before]
        if self.num_steps > 1:
            after, _ = self._extend(tokens[:-1], jnp.ones(self.num_steps - 1, bool), caches)
            last = [jnp.concatenate(pair) for pair in zip(last, after, strict=True)]
        return last

    @property
    def _models(self) -> list[Any]:
        return [self.model] if self.support_model is None else [self.model, self.support_model]

    def _start(self, capacity: int) -> list[Any]:
        return [model.start(capacity) for model in self._models]

    def _extend(self, tokens: Array, mask: Array, caches: list[Any]) -> tuple[list[Array], list[Any]]:
        read = [model.extend(tokens, mask, cache) for model, cache in zip(self._models, caches, strict=True)]
        return [hidden for hidden, _ in read], [cache for _, cache in read]

    def _logits(self, hidden: list[Array]) -> Array:
        """Return the logits at the temperature, with −inf for tokens outside the truncation."""
        logits = [model.logits(h) / self.temperature for model, h in zip(self._models, hidden, strict=True)]
        if self.top_k is None and self.top_p >= 1 and self.min_p <= 0:
            return logits[0]
        # The last model decides what may follow; without `support_model` it is the only one.
        return jnp.where(truncation_mask(logits[-1], self.top_k, self.top_p, self.min_p), logits[0], _IMPOSSIBLE)

    # ---- many --------------------------------------------------------------------------------

    def _flat_prompts(self) -> tuple[Array, Array]:
        width = self.prompt.shape[-1]
        mask = jnp.broadcast_to(self.mask, self.prompt.shape)
        return self.prompt.reshape(-1, width), mask.reshape(-1, width)

    def _map_texts(self, score: Any, value: Array) -> Array:
        """Map a function of (prompt, mask, tokens) over values [..., *batch, T]."""
        batch = math.prod(self.batch_shape)
        shape = (*value.shape[: value.ndim - 1 - len(self.batch_shape)], *self.batch_shape)
        flat = jnp.broadcast_to(value, (*shape, self.num_steps)).reshape(-1, batch, self.num_steps)
        prompt, mask = self._flat_prompts()
        result = jax.vmap(jax.vmap(score), in_axes=(None, None, 0))(prompt, mask, flat)
        return result.reshape(*shape, *result.shape[2:])


def next_token_kl(log_q: Array, log_p: Array) -> Array:
    """Return KL(q‖p) of the next token, [...], from its log-probabilities, [..., V]; nats."""
    possible = log_q > -jnp.inf
    log_q, log_p = (jnp.where(possible, x, 0.0) for x in (log_q, log_p))  # -inf - -inf would make the gradient nan
    return jnp.where(possible, jnp.exp(log_q) * (log_q - log_p), 0.0).sum(-1)


def truncation_mask(logits: Array, top_k: int | None, top_p: float, min_p: float = 0.0) -> Array:
    """Mark the tokens that a truncation keeps, [..., V]; it always keeps the likeliest.

    Args:
        logits: at the temperature of sampling, [..., V].
        top_k: how many tokens to keep; ties are kept too.
        top_p: the least total probability of the kept tokens.
        min_p: the least probability of each, as a share of that of the likeliest.
    """
    fine = jnp.ones(logits.shape, bool)
    if min_p > 0:
        # On logits, because the normalizer cancels.
        fine &= logits >= logits.max(-1, keepdims=True) + math.log(min_p)
    if top_k is None and top_p >= 1:
        return fine
    ordered = jnp.flip(jnp.sort(logits, axis=-1), -1)
    if top_k is not None and top_k < logits.shape[-1]:
        fine &= logits >= ordered[..., top_k - 1, None]
        ordered = jnp.where(jnp.arange(logits.shape[-1]) < top_k, ordered, -jnp.inf)
    if top_p < 1:
        # A token stays while the likelier ones together have less than top_p, so that the likeliest always does. After
        # top_k, shares are of what it has left, as in transformers.
        shares = jax.nn.softmax(ordered, axis=-1)
        before = jnp.cumsum(shares, axis=-1) - shares
        least = jnp.min(jnp.where(before < top_p, ordered, jnp.inf), axis=-1, keepdims=True)
        fine &= logits >= least
    return fine

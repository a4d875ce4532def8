"""Write texts with a fitted model or its reference, and score them under both; one compiled program for any number."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from numpyro import handlers

from bayesrl.compilation.jit import ClosureJit
from bayesrl.compilation.random_keys import as_hash_key, fold_in
from bayesrl.core.rng import category_at
from bayesrl.lm.prompted_policy import PromptedPolicy
from bayesrl.lm.prompts import Prompts
from bayesrl.lm.text_distribution import CausalLMDistribution, is_eos, next_token_kl
from bayesrl.monte_carlo.particles.resampling import Moves
from bayesrl.typing import Params, PRNGKey

GROUP = 8
"""This many completions of one prompt are written together, so that the model reads the prompt once for all."""

MOST_ROWS = 128
_NUMBERS_AT_ONCE = 2**26
"""Bounds the numbers that writing takes at once, so that a large model writes fewer completions together."""

_WIDTHS = 8
"""Prompts are padded to a multiple of this many tokens, so that prompts of similar length share a program."""


class ScoredTexts(NamedTuple):
    """Completions scored under both models, [*rows, T]; numbers are in nats, and 0 after the end."""

    tokens: Any
    log_q: Any  # of each token under the fitted model
    log_prior: Any  # of each token under the reference
    kl: Any  # KL(q‖π₀) of each next token, summed over the vocabulary


def generate(
    key: PRNGKey,
    guide: Any,
    params: Params,  # of one fit
    prompts: Prompts,
    index: np.ndarray,  # which prompts each draw answers, [num, n]
    *,
    by_fit: bool = True,  # rather than by the reference
    given: np.ndarray | None = None,  # completions to score instead of writing new ones, [num, n, T]
    together: tuple[int, int] | None = None,  # how many prompts at once, and how often each; by default what fits
) -> ScoredTexts:
    """Generate completions, [num, n, T], in batches of one size; NumPy arrays.

    A completion depends only on the key, the number of its draw and the number of its prompt.
    """
    num, width = index.shape
    steps = guide.policy.options["num_steps"]
    at_once, group = together or (max_rows(guide.policy, prompts) // GROUP, GROUP)
    slot, lane, prompt_of_slot, numbers = _pack(index, at_once, group)
    given_slots = np.zeros((*numbers.shape, steps), np.int32)
    if given is not None:
        given_slots[slot, lane] = np.asarray(given).reshape(-1, steps)
    tokens, mask = pad_prompts(prompts, guide.policy.model.config.max_length + 1 - steps)
    fixed = (as_hash_key(key), dict(params))
    # Arrays rather than Python booleans, so that writing and scoring share one program.
    flags = (np.asarray(by_fit), np.asarray(given is not None))
    static = (guide.origin, guide.origin.policy)
    run, parts = None, []
    for first in range(0, len(prompt_of_slot), at_once):
        rows = slice(first, first + at_once)
        at = prompt_of_slot[rows]
        batch = (tokens[at], mask[at], at, numbers[rows], given_slots[rows])
        # Traced once: `_pack` makes all batches equally large.
        run = run or _generate.prepare(static, *fixed, *batch, *flags)
        parts.append(jax.device_get(run(*fixed, *batch, *flags)))
    whole = jax.tree.map(lambda *xs: np.concatenate(xs)[slot, lane].reshape(num, width, steps), *parts)
    return ScoredTexts(*whole)


def max_rows(policy: PromptedPolicy, prompts: Prompts) -> int:
    """Return how many completions to write at once."""
    config, num_steps = policy.model.config, policy.options["num_steps"]
    numbers = (prompts.tokens.shape[-1] + num_steps) * 16 * int(config.width) + int(config.vocab_size)
    rows = MOST_ROWS * (1 if jax.default_backend() == "cpu" else 8)
    while rows > GROUP and rows * numbers > _NUMBERS_AT_ONCE:
        rows //= 2
    return rows


def _pack(index: np.ndarray, at_once: int, group: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Pack completions into slots of one prompt each, and round the number of slots up to whole batches.

    Returns:
        Slot and lane of each completion, [num·n]; the prompt of each slot; the numbers of its draws, [slots, each].
    """
    num, width = index.shape
    prompt, number = index.reshape(-1), np.repeat(np.arange(num), width)
    # Stable, so that completions of a prompt keep the order of their draws.
    order = np.argsort(prompt, kind="stable")
    counts = np.bincount(prompt) if prompt.size else np.zeros(1, int)
    slots = -(-counts // group)
    first = np.cumsum(counts) - counts
    # Each completion's rank among those of its prompt.
    place = np.empty(prompt.size, int)
    place[order] = np.arange(prompt.size) - first[prompt[order]]
    slot, lane = (np.cumsum(slots) - slots)[prompt] + place // group, place % group
    # At least one batch, so that no completions at all give arrays of the right shape too.
    total = max(-(-int(slots.sum()) // at_once), 1) * at_once
    prompt_of_slot, numbers = np.zeros(total, np.int32), np.zeros((total, group), np.int32)
    prompt_of_slot[slot], numbers[slot, lane] = prompt, number
    return slot, lane, prompt_of_slot, numbers


def pad_prompts(prompts: Prompts, room: int, *, closely: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Pad prompts on the left to one of a few widths, if there is room.

    Every token reads the padding too; `closely` allows widths of 1, 2 and 4, for more programs that each run faster.
    """
    tokens, mask = np.asarray(prompts.tokens), np.asarray(prompts.mask)
    length = tokens.shape[1]
    width = 1 << (length - 1).bit_length() if closely and length < _WIDTHS else -(-length // _WIDTHS) * _WIDTHS
    padding = [(0, 0), (min(width, max(room, length)) - length, 0)]
    return np.pad(tokens.astype(np.int32), padding), np.pad(mask, padding)


def model_with_params(declare: Callable[[], Any], params: Params) -> Any:
    """Return the model that `declare` makes from these parameters."""
    return handlers.seed(handlers.substitute(declare, data=params), rng_seed=jax.random.key(0))()


@partial(ClosureJit, name="write")
def _generate(
    static: Any,
    key: PRNGKey,
    params: Params,
    prompt: Array,
    mask: Array,
    index: Array,
    numbers: Array,
    given: Array,
    by_fit: Array,
    is_given: Array,
) -> ScoredTexts:
    guide, policy = static
    ours = policy.distribution(model_with_params(guide.declare, params), prompt, mask)
    theirs = policy.distribution(policy.model, prompt, mask)
    steps = given.shape[-1]

    def uniform(number: Array, place: Array) -> Array:
        return jax.random.uniform(fold_in(fold_in(key, number), place), (steps,))

    chance = jax.vmap(jax.vmap(uniform, in_axes=(0, None)))(numbers, index)
    return generate_and_score(ours, theirs, chance, given, by_fit, is_given)


def generate_and_score(
    ours: CausalLMDistribution,
    theirs: CausalLMDistribution,  # the reference, for the same prompts
    uniforms: Array,  # choose the tokens, [prompts, each, T]
    given: Array,  # completions to read, [prompts, each, T]
    by_fit: Array,  # whether the fit writes
    is_given: Array,  # whether to read `given` instead of writing
) -> ScoredTexts:
    """Write or read completions of prompts token by token, [prompts, each, T], until the last one has ended.

    Both models read every token as it is written, so that scoring needs no second pass.
    """
    slots, group, steps = uniforms.shape
    rows = slots * group
    # One model reads the texts once where the reference writes alone.
    alone = ours.model is theirs.model
    models = (theirs.model,) if alone else (ours.model, theirs.model)
    width = ours.prompt.shape[-1]
    # One slot fewer than tokens: no model reads the last one.
    starts = [model.start(width + steps - 1) for model in models]

    def feed(model: Any, tokens: Array, mask: Array, cache: Any, axes: Any) -> Any:
        return jax.vmap(model.extend, in_axes=(0, 0, axes), out_axes=(0, cache.axes))(tokens, mask, cache)

    read = [feed(model, ours.prompt, ours.mask, start, None) for model, start in zip(models, starts, strict=True)]
    hidden = [jnp.repeat(h[:, -1], group, 0) for h, _ in read]
    caches = [
        jax.tree.map(lambda leaf, axis: leaf if axis is None else jnp.repeat(leaf, group, 0), cache, cache_axes(cache))
        for _, cache in read
    ]
    chances, given_rows = uniforms.reshape(rows, steps), given.reshape(rows, steps)

    def choose(t: Array, hidden: list[Array], done: Array) -> tuple[Array, tuple[Array, ...]]:
        # With a truncation `ours` holds the reference too, which decides what may follow, and needs its state.
        both = ours._logits(hidden[:1] if ours.support_model is None else hidden)
        logits = both, both if alone else theirs._logits(hidden[1:])
        log_q, log_prior = (jax.nn.log_softmax(x, axis=-1) for x in logits)
        drawn = category_at(chances[:, t, None], jnp.where(by_fit, log_q, log_prior)).astype(given_rows.dtype)
        token = jnp.where(is_given, given_rows[:, t], jnp.where(done, ours.pad, drawn))
        chosen = (jnp.take_along_axis(x, token[:, None], -1)[:, 0] for x in (log_q, log_prior))
        return token, (*chosen, next_token_kl(log_q, log_prior))

    def goes_on(carry: tuple[Any, ...]) -> Array:
        # Given texts are read to the last step: what stands behind an end must be padding for them to be possible.
        return (carry[0] < steps) & (~carry[2].all() | is_given)

    def step(carry: tuple[Any, ...]) -> tuple[Any, ...]:
        t, token, done, caches, columns = carry
        there = jnp.ones((rows, 1), bool)
        pairs = zip(models, caches, strict=True)
        hidden, caches = zip(
            *(feed(model, token[:, None], there, cache, cache.axes) for model, cache in pairs), strict=True
        )
        token, scores = choose(t, [h[:, 0] for h in hidden], done)
        return t + 1, token, done | is_eos(token, ours.eos), list(caches), _record(columns, t, (token, *scores))

    # Steps come first, so that each turn of the loop writes one contiguous row.
    blank = jnp.full((steps, rows), ours.pad, given_rows.dtype), *(jnp.zeros((steps, rows)) for _ in range(3))
    token, scores = choose(jnp.zeros((), jnp.int32), hidden, jnp.zeros(rows, bool))
    columns = _record(blank, jnp.zeros((), jnp.int32), (token, *scores))
    if steps > 1:
        first = (jnp.ones((), jnp.int32), token, jnp.zeros(rows, bool) | is_eos(token, ours.eos), caches, columns)
        columns = lax.while_loop(goes_on, step, first)[-1]
    tokens, log_q, log_prior, kl = (x.T.reshape(slots, group, steps) for x in columns)
    counts = ours.text_mask(tokens)
    # A given text with anything but padding behind its end is impossible, as in `log_prob`.
    behind = jnp.where(tokens == ours.pad, 0.0, -jnp.inf)
    log_q, log_prior = (jnp.where(counts, x, behind) for x in (log_q, log_prior))
    return ScoredTexts(tokens, log_q, log_prior, jnp.where(counts, kl, 0.0))


def _record(columns: tuple[Array, ...], t: Array, values: tuple[Array, ...]) -> tuple[Array, ...]:
    return tuple(
        lax.dynamic_update_index_in_dim(all_, value.astype(all_.dtype), t, 0)
        for all_, value in zip(columns, values, strict=True)
    )


def cache_axes(cache: Any) -> Any:
    """Mark the leaves of a cache that all rows share, for `jax.tree.map`."""
    return jax.tree.map(lambda leaf, axis: axis, cache, cache.axes, is_leaf=lambda x: x is None)


def feed(model: Any, tokens: Array, mask: Array, cache: Any, axes: Any) -> tuple[Array, Any]:
    """Let a model read tokens [rows, T], each row with its part of a cache of these axes."""
    run = jax.vmap(model.extend, in_axes=(0, 0, axes), out_axes=(0, cache.axes))
    fed: tuple[Array, Any] = run(tokens, mask, cache)
    return fed


def move_rows(caches: list[Any], moves: Moves) -> list[Any]:
    """Let rows of the caches take the place of others."""
    if jax.default_backend() != "cpu":
        # A loop would start a kernel for every row.
        return [map_cache(lambda x: x[moves.parents], cache) for cache in caches]

    # The caches are most of the memory: on a CPU, copying them whole took a third of the time of writing.
    def move(i: Array, caches: list[Any]) -> list[Any]:
        def of_row(x: Array) -> Array:
            row = lax.dynamic_slice_in_dim(x, moves.source[i], 1)
            return lax.dynamic_update_slice_in_dim(x, row, moves.target[i], 0)

        return [map_cache(of_row, cache) for cache in caches]

    moved: list[Any] = lax.fori_loop(0, moves.num_moved, move, caches)
    return moved


def map_cache(function: Any, cache: Any) -> Any:
    """Map over the leaves of a cache that have a row for each text."""
    return jax.tree.map(lambda x, axis: x if axis is None else function(x), cache, cache_axes(cache))

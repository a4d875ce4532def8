"""The two programs behind a posterior, and draws of them over all lanes."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from bayesrl.compilation.jit import ClosureJit, to_host, trace_cache
from bayesrl.compilation.keys import as_hash_key, key_from_seed
from bayesrl.core.draws import Draws, Totals
from bayesrl.core.handlers import full_data
from bayesrl.core.programs import Pair
from bayesrl.core.structure import Structure, as_arrays, inspect
from bayesrl.statistics.averages import library_of
from bayesrl.statistics.estimates import Estimate
from bayesrl.statistics.quantities import is_conditioned
from bayesrl.typing import Numbers, Params, PRNGKey, Program


@dataclass(frozen=True)
class Programs:
    """The two programs behind a posterior, and what is known of them.

    Attributes:
        policy: with its own parameters frozen.
        guide: as fitted, or None where the policy has nothing to draw.
        args: arguments of both.
        structure: of the policy with these arguments.
        transforms: of the guide's parameters.
        learned: whether the policy's own parameters were trained.
        episodes: plays whole episodes, where the environment is no program; see `Source`.
        marginal: finds log p(y), where data stand beside rewards.
    """

    policy: Program
    guide: Program | None
    args: tuple[Any, ...]
    structure: Structure
    transforms: Mapping[str, Any]
    learned: bool
    episodes: Any = None
    marginal: "Marginal | None" = None

    def pair(self, args: tuple[Any, ...] | None = None) -> Pair:
        """Bind the programs to their arguments, or to others."""
        if args is None:
            return Pair(self.policy, self.guide, self.structure, self.args, self.transforms, self.learned)
        structure = inspect(key_from_seed(0), self.policy, *args)
        return Pair(self.policy, self.guide, structure, as_arrays(args), self.transforms, self.learned)

    def over_all_data(self, *new_args: Any) -> "Programs":
        """Give the same programs over all of their data instead of mini-batches, or over other data.

        What is compiled for one of them serves the next, for the programs inside are the same ones every time.
        """
        if new_args:
            return self._whole_with(as_arrays(new_args))
        return self._over_all if self.structure.subsampled else self

    @cached_property
    def _over_all(self) -> "Programs":
        return self._whole_with(self.args)

    @cached_property
    def _whole(self) -> tuple[Program, Program | None]:
        return _without_batches(self.policy), None if self.guide is None else _without_batches(self.guide)

    def _whole_with(self, args: tuple[Any, ...]) -> "Programs":
        structure = inspect(key_from_seed(0), self._whole[0], *args)
        return Programs(*self._whole, args, structure, self.transforms, self.learned, marginal=self.marginal)

    def log_marginal(self, key: PRNGKey, params: Params, new_args: tuple[Any, ...] = ()) -> Estimate | None:
        """Give log p(y) averaged over contexts, nats: nan where it is not known, None without data beside rewards.

        Args:
            key: consumed whole, where it has to be drawn for.
            params: of one fit, whose draws help.
            new_args: other arguments for the programs.
        """
        if not is_conditioned(self.structure):
            return None
        known = None if self.marginal is None else self.marginal(key, self.over_all_data(*new_args), params)
        return Estimate(np.asarray(np.nan), np.asarray(np.nan)) if known is None else known


class Marginal(Protocol):
    """Finds log p(y), averaged over contexts, nats; gives None where it cannot be known."""

    def __call__(self, key: PRNGKey, programs: Programs, params: Params) -> Estimate | None:
        """Find it for programs over all of their data; `params` are those of one fit."""


def _without_batches(program: Program) -> Program:
    """Give a program on all of its data: in its own way, where it has one."""
    own: Program | None = getattr(program, "over_all_data", None)
    return own() if own is not None else full_data(program)


MOST_AT_ONCE = 1024
_NUMBERS_AT_ONCE = 2**22
"""Draws are made so many at once, few where each takes many numbers, whatever number is asked for: one compiled
program serves them all."""


def batch_of(structure: Structure) -> int:
    """Tell how many draws of a program are made at once."""
    batch = MOST_AT_ONCE
    while batch > 1 and batch * structure.width > _NUMBERS_AT_ONCE:
        batch //= 2
    return batch


def draw_fit(key: PRNGKey, pair: Pair, params: Params, num: int) -> tuple[Draws, Totals]:
    """Draw from one fit, NumPy's arrays [num, ...], with scores summed over sites and time, [num, *contexts].

    A draw does not depend on how many are asked for. Of the scores by site only the rewards are kept, summed over time.

    Args:
        key: consumed whole.
        pair: policy and guide; without a guide, the policy itself.
        params: unconstrained parameters of the guide, of one fit.
        num: number of draws.
    """
    sampler = _guide_sampler(pair, (key, params))
    if sampler is not None:
        return sampler.draw(key, pair, params, num, by_fit=True)
    return _in_parts(_draw, key, pair, params, num)


def draw_start(key: PRNGKey, pair: Pair, params: Params, num: int) -> tuple[Draws, Totals]:
    """Draw from the policy before a fit as `draw_fit` does; log q is that of the fit with these parameters."""
    sampler = _guide_sampler(pair, (key, params))
    if sampler is not None:
        return sampler.draw(key, pair, params, num, by_fit=False)
    return _in_parts(_draw_prior, key, pair, params, num)


def score_draws(pair: Pair, params: Params, sites: Mapping[str, Any]) -> Totals:
    """Score given values of all latent sites under one fit and its policy, [draws, *contexts]."""
    sampler = _guide_sampler(pair, params)
    if sampler is not None:
        return sampler.score(pair, params, sites)
    held = {name: np.asarray(value) for name, value in sites.items()}
    num, batch = len(next(iter(held.values()))), batch_of(pair.structure)
    run, parts = None, []
    for start in range(0, max(num, 1), batch):
        index = np.minimum(np.arange(start, start + batch), max(num - 1, 0))
        part = {name: value[index] for name, value in held.items()}
        run = run or _score.prepare(_static(pair), dict(pair.transforms), pair.args, params, part)
        parts.append(jax.device_get(run(dict(pair.transforms), pair.args, params, part)))
    return jax.tree.map(lambda *xs: np.concatenate(xs)[:num], *parts)


@runtime_checkable
class GuideSampler(Protocol):
    """Makes draws of a guide by a program of its own, where that takes less than running both programs for each."""

    def supports(self, pair: Pair) -> bool:
        """Whether it knows how to draw from a pair."""

    def contexts_are_independent(self, pair: Pair) -> bool:
        """Whether it is known that the elements of context plates do not read one another."""

    def draw(self, key: PRNGKey, pair: Pair, params: Params, num: int, *, by_fit: bool) -> tuple[Draws, Totals]:
        """Draw as `draw_fit` does, or as `draw_start`."""

    def score(self, pair: Pair, params: Params, sites: Mapping[str, Any]) -> Totals:
        """Score as `score_draws` does."""

    def source(self, pair: Pair, objective: Any) -> "Source | None":
        """Give a source of the draws of a step, where they are better made apart from its update."""


def _guide_sampler(pair: Pair, given: Any) -> GuideSampler | None:
    """Find who makes a guide's draws, where that is not the guide run beside its policy."""
    sampler: GuideSampler | None = getattr(pair.guide, "sampler", None)
    return sampler if sampler is not None and sampler.supports(pair) and not _is_traced(given) else None


def _is_traced(tree: Any) -> bool:
    return any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(tree))


def _static(pair: Pair) -> tuple[Any, ...]:
    return pair.policy, pair.guide, pair.structure, pair.learned


def _pair(static: tuple[Any, ...], transforms: Any, args: Any) -> Pair:
    policy, guide, structure, learned = static
    return Pair(policy, guide, structure, args, transforms, learned)


def _in_parts(draw: ClosureJit, key: PRNGKey, pair: Pair, params: Params, num: int) -> tuple[Draws, Totals]:
    fixed = (dict(pair.transforms), pair.args, as_hash_key(key), params)
    if _is_traced((key, params)):  # the caller compiles, or vectorises, what is made of the draws
        traced: tuple[Draws, Totals] = draw.fn((*_static(pair), num), *fixed, None)
        return traced
    batch = batch_of(pair.structure)
    run = draw.prepare((*_static(pair), batch), *fixed, np.zeros((), np.int32))
    parts = [jax.device_get(run(*fixed, np.asarray(first, np.int32))) for first in range(0, max(num, 1), batch)]
    whole: tuple[Draws, Totals] = jax.tree.map(lambda *xs: np.concatenate(xs)[:num], *parts)
    return whole


@partial(ClosureJit, name="draw")
def _draw(
    static: Any, transforms: Any, args: Any, key: PRNGKey, params: Params, first: Array | None
) -> tuple[Draws, Totals]:
    *programs, num = static
    pair = _pair(tuple(programs), transforms, args)
    return _kept(pair, pair.draw(key, params, num, share=False, first=first), num)


@partial(ClosureJit, name="draw_prior")
def _draw_prior(
    static: Any, transforms: Any, args: Any, key: PRNGKey, params: Params, first: Array | None
) -> tuple[Draws, Totals]:
    *programs, num = static
    pair = _pair(tuple(programs), transforms, args)
    if pair.guide is None:
        alone = replace(pair, learned=False)
        return _kept(pair, alone.draw(key, {}, num, share=False, first=first), num)
    return _kept(pair, pair.draw_policy(key, params, num, first=first), num)


@partial(ClosureJit, name="score")
def _score(static: Any, transforms: Any, args: Any, params: Params, sites: dict[str, Array]) -> Totals:
    pair = _pair(static, transforms, args)
    num = len(next(iter(sites.values())))
    return pair.score(params, Draws.from_sites(sites)).totals((num, *pair.structure.context_shape))


def _kept(pair: Pair, draws: Draws, num: int) -> tuple[Draws, Totals]:
    shape = (num, *pair.structure.context_shape)
    rewards = {name: jnp.broadcast_to(values.sum(-1), shape) for name, values in draws.rewards.items()}
    kept = Draws.from_sites(draws.sites)._replace(plates=draws.plates, metrics=draws.metrics, rewards=rewards)
    return kept, draws.totals(shape)


type Source = Callable[[PRNGKey, Params, Pair], Draws]
"""Makes draws on the host: a fresh key, one lane's parameters, and the pair they belong to.

It may have further methods: `lane(i)` gives the source of the i-th of several fits made side by side; where the
environment is no program, `episodes(key, params, pair, num)` plays whole episodes and gives (Draws, Totals);
`close()` is called when a fit ends, also by an error. `remaining_updates` is how many more updates the last draws
serve: that many are made at once, and `count_updates(count)` says so. `one_batch` says that all draws given at a time
are of one mini-batch.
"""


def draw_outside(
    keys: Sequence[PRNGKey], episodes: Any, pair: Pair, params: Params, num_samples: int
) -> tuple[Draws, Totals]:
    """Draw from every lane as `draw_fit` does, in the environment itself; shorter episodes are padded (nan, −1)."""
    lanes = [episodes(keys[i], jax.tree.map(lambda x, i=i: x[i], params), pair, num_samples) for i in range(len(keys))]

    def together(*parts: Numbers) -> np.ndarray:
        longest = np.max([part.shape for part in parts], axis=0)
        blank = np.nan if jnp.issubdtype(parts[0].dtype, jnp.floating) else -1

        def padded(part: Numbers) -> np.ndarray:
            widths = [(0, int(most - own)) for most, own in zip(longest, part.shape, strict=True)]
            return np.pad(part, widths, constant_values=blank)

        return np.stack([padded(part) for part in parts])

    draws, totals = jax.tree.map(together, *lanes)
    return draws, totals


def draw_lanes(
    keys: Sequence[PRNGKey], episodes: Any, pair: Pair, params: Params, num_samples: int
) -> tuple[Draws, Totals]:
    """Draw from every lane, NumPy's arrays [lanes, num_samples, ...], by the program or in the environment outside."""
    if episodes is not None:
        return draw_outside(keys, episodes, pair, params, num_samples)
    pair.structure.check_complete("nothing can be drawn from it")
    pair.structure.check_memory(num_samples * len(keys))
    params = to_host(params)
    own = [jax.tree.map(lambda x, i=i: x[i], params) for i in range(len(keys))]
    with trace_cache():
        drawn = [draw_fit(key, pair, lane, num_samples) for key, lane in zip(keys, own, strict=True)]
    draws, totals = jax.tree.map(lambda *parts: library_of(parts).stack(parts), *drawn)
    return draws, totals


def draw_prior(key: PRNGKey, programs: Programs, params: Params, num_samples: int) -> tuple[Draws, Totals]:
    """Draw from the policy before the fit, NumPy's arrays [num_samples, ...].

    Args:
        key: consumed whole.
        programs: of the fit.
        params: of one fit, by which log q is scored where the environment is a program.
        num_samples: number of draws.
    """
    pair = programs.pair()
    if programs.episodes is not None:
        played = draw_outside([key], programs.episodes, replace(pair, guide=None), {"_": np.zeros(1)}, num_samples)
        return jax.tree.map(lambda x: x[0], played)
    pair.structure.check_memory(num_samples)
    return draw_start(key, pair, params, num_samples)

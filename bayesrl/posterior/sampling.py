"""Draws of a fit and of the policy before it, with their scores; one compiled program makes any number of them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from bayesrl.compilation.jit import ClosureJit, has_tracers, trace_cache
from bayesrl.compilation.random_keys import as_hash_key
from bayesrl.core.draws import Draws, Totals
from bayesrl.core.programs import Programs
from bayesrl.core.structure import Structure
from bayesrl.statistics.averages import library_of
from bayesrl.typing import Numbers, Params, PRNGKey

MOST_AT_ONCE = 1024
_NUMBERS_AT_ONCE = 2**22
"""Limits of a batch, in draws and in numbers. The batch size does not depend on the number of draws that a caller
wants, so one compiled program serves every call."""


def batch_of(structure: Structure) -> int:
    """Return how many draws of a program to make at once."""
    batch = MOST_AT_ONCE
    while batch > 1 and batch * structure.width > _NUMBERS_AT_ONCE:
        batch //= 2
    return batch


def draw_fit(
    key: PRNGKey, programs: Programs, params: Params, num: int, *, by_fit: bool = True
) -> tuple[Draws, Totals]:
    """Draw from one fit, NumPy arrays [num, ...], with scores summed over sites and time, [num, *contexts].

    A draw does not depend on `num`. Of the scores per site, only the rewards stay, summed over time. With
    `by_fit=False` the policy before the fit draws, and log q is still that of the fit with these parameters.
    """
    if (sampler := _guide_sampler(programs, (key, params))) is not None:
        return sampler.draw(key, programs, params, num, by_fit=by_fit)
    draw = _draw if by_fit else _draw_prior
    fixed = (dict(programs.transforms), programs.args, as_hash_key(key), params)
    if has_tracers((key, params)):  # the caller compiles or vectorises this, so return traced draws in one part
        traced: tuple[Draws, Totals] = draw.fn((*_static(programs), num), *fixed, None)
        return traced
    batch = batch_of(programs.structure)
    run = draw.prepare((*_static(programs), batch), *fixed, np.zeros((), np.int32))
    # At least one batch, which tells the shapes even if no draw is wanted.
    parts = [jax.device_get(run(*fixed, np.asarray(first, np.int32))) for first in range(0, max(num, 1), batch)]
    whole: tuple[Draws, Totals] = jax.tree.map(lambda *xs: np.concatenate(xs)[:num], *parts)
    return whole


def score_draws(programs: Programs, params: Params, sites: Mapping[str, Any]) -> Totals:
    """Score given values of all latent sites under one fit and its policy, [draws, *contexts]."""
    if (sampler := _guide_sampler(programs, (params, sites))) is not None:
        return sampler.score(programs, params, sites)
    if has_tracers((params, sites)):
        return _score.fn(_static(programs), dict(programs.transforms), programs.args, params, dict(sites))
    held = {name: np.asarray(value) for name, value in sites.items()}
    num, batch = len(next(iter(held.values()))), batch_of(programs.structure)
    run, parts = None, []
    for start in range(0, max(num, 1), batch):
        # Repeat the last draw to fill the batch, so that its shape, and the compiled program, stay the same.
        index = np.minimum(np.arange(start, start + batch), max(num - 1, 0))
        part = {name: value[index] for name, value in held.items()}
        run = run or _score.prepare(_static(programs), dict(programs.transforms), programs.args, params, part)
        parts.append(jax.device_get(run(dict(programs.transforms), programs.args, params, part)))
    return jax.tree.map(lambda *xs: np.concatenate(xs)[:num], *parts)


@runtime_checkable
class GuideSampler(Protocol):
    """Draws from a guide by its own program, where that costs less than running both programs for each draw."""

    def supports(self, programs: Programs) -> bool:
        """Whether it can draw from this guide beside this policy."""

    def contexts_are_independent(self, programs: Programs) -> bool:
        """Whether the elements of context plates are known not to read one another."""

    def draw(self, key: PRNGKey, programs: Programs, params: Params, num: int, *, by_fit: bool) -> tuple[Draws, Totals]:
        """Draw as `draw_fit` does."""

    def score(self, programs: Programs, params: Params, sites: Mapping[str, Any]) -> Totals:
        """Score as `score_draws` does."""

    def source(self, programs: Programs, objective: Any) -> "Source | None":
        """Return a source of a step's draws, if they are better made apart from its update."""


def writes_draws(programs: Programs) -> bool:
    """Whether the guide's own sampler writes the draws, as it does texts."""
    return _guide_sampler(programs, ()) is not None


def _guide_sampler(programs: Programs, given: Any) -> GuideSampler | None:
    """Return the guide's own sampler, without a guide the policy's, or None if draws come from running programs."""
    writer = programs.policy if programs.guide is None else programs.guide
    sampler: GuideSampler | None = getattr(writer, "sampler", None)
    return sampler if sampler is not None and sampler.supports(programs) and not has_tracers(given) else None


def _static(programs: Programs) -> tuple[Any, ...]:
    return programs.policy, programs.guide, programs.structure, programs.learned


def _programs_of(static: tuple[Any, ...], transforms: Any, args: Any) -> Programs:
    policy, guide, structure, learned = static
    return Programs(policy, guide, structure, args, transforms, learned)


@partial(ClosureJit, name="draw")
def _draw(
    static: Any, transforms: Any, args: Any, key: PRNGKey, params: Params, first: Array | None
) -> tuple[Draws, Totals]:
    *programs, num = static
    programs = _programs_of(tuple(programs), transforms, args)
    return _kept(programs, programs.draw(key, params, num, share=False, first=first), num)


@partial(ClosureJit, name="draw_prior")
def _draw_prior(
    static: Any, transforms: Any, args: Any, key: PRNGKey, params: Params, first: Array | None
) -> tuple[Draws, Totals]:
    *programs, num = static
    programs = _programs_of(tuple(programs), transforms, args)
    if programs.guide is None:
        # Without `learned`, the policy's own parameters keep their first values.
        alone = replace(programs, learned=False)
        return _kept(programs, alone.draw(key, {}, num, share=False, first=first), num)
    return _kept(programs, programs.draw_policy(key, params, num, first=first), num)


@partial(ClosureJit, name="score")
def _score(static: Any, transforms: Any, args: Any, params: Params, sites: dict[str, Array]) -> Totals:
    programs = _programs_of(static, transforms, args)
    num = len(next(iter(sites.values())))
    return programs.score(params, Draws.from_sites(sites)).totals((num, *programs.structure.context_shape))


def _kept(programs: Programs, draws: Draws, num: int) -> tuple[Draws, Totals]:
    shape = (num, *programs.structure.context_shape)
    rewards = {name: jnp.broadcast_to(values.sum(-1), shape) for name, values in draws.rewards.items()}
    kept = Draws.from_sites(draws.sites)._replace(plates=draws.plates, metrics=draws.metrics, rewards=rewards)
    return kept, draws.totals(shape)


type Source = Callable[[PRNGKey, Params, Programs], Draws]
"""Makes draws on the host, from a fresh key, one lane's parameters and the programs they belong to.

A source may have more members. `lane(i)` returns the source for the i-th of several fits made side by side.
`episodes(key, params, programs, num)` plays whole episodes and returns (Draws, Totals), if the environment is not a
program. The fit calls `close()` when it ends, even by an error. `remaining_updates` is how many more updates the last
draws serve; the fit makes that many at once, and reports them by `count_updates(count)`. `one_batch` says that all
draws of one call have the same mini-batch. `off_policy` says that draws may be of other policies than the present one,
which only some objectives can learn from. `save_state()` returns arrays by name for a checkpoint, and
`restore_state(arrays)` takes them back when the run resumes.
"""


def draw_outside(
    keys: Sequence[PRNGKey], episodes: Any, programs: Programs, lanes: Sequence[Params], num_samples: int
) -> tuple[Draws, Totals]:
    """Draw from every lane as `draw_fit` does, in the environment itself; pad shorter episodes (nan, −1)."""

    def together(*parts: Numbers) -> np.ndarray:
        longest = np.max([part.shape for part in parts], axis=0)
        blank = np.nan if jnp.issubdtype(parts[0].dtype, jnp.floating) else -1

        def padded(part: Numbers) -> np.ndarray:
            widths = [(0, int(most - own)) for most, own in zip(longest, part.shape, strict=True)]
            return np.pad(part, widths, constant_values=blank)

        return np.stack([padded(part) for part in parts])

    played = [episodes(key, params, programs, num_samples) for key, params in zip(keys, lanes, strict=True)]
    draws, totals = jax.tree.map(together, *played)
    return draws, totals


def draw_lanes(
    keys: Sequence[PRNGKey], episodes: Any, programs: Programs, lanes: Sequence[Params], num_samples: int
) -> tuple[Draws, Totals]:
    """Draw from every lane, NumPy arrays [lanes, num_samples, ...], by the program or in the outside environment."""
    if episodes is not None:
        return draw_outside(keys, episodes, programs, lanes, num_samples)
    programs.structure.check_complete("nothing can be drawn from it")
    programs.structure.check_memory(num_samples * len(keys))
    with trace_cache():
        drawn = [draw_fit(key, programs, params, num_samples) for key, params in zip(keys, lanes, strict=True)]
    draws, totals = jax.tree.map(lambda *parts: library_of(parts).stack(parts), *drawn)
    return draws, totals


def draw_prior(key: PRNGKey, programs: Programs, params: Params, num_samples: int) -> tuple[Draws, Totals]:
    """Draw from the policy before the fit, NumPy arrays [num_samples, ...]; `params` score log q in a program."""
    if programs.episodes is not None:
        alone, unread = replace(programs, guide=None), {"_": np.zeros(())}
        played = draw_outside([key], programs.episodes, alone, [unread], num_samples)
        return jax.tree.map(lambda x: x[0], played)
    programs.structure.check_memory(num_samples)
    return draw_fit(key, programs, params, num_samples, by_fit=False)

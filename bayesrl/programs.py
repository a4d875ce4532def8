"""The two programs behind a posterior, and draws of them over all lanes."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from bayesrl.core.compiling import Compiled
from bayesrl.core.draws import Draws, Totals
from bayesrl.core.estimates import Estimate, Estimates
from bayesrl.core.handlers import whole
from bayesrl.core.pairing import Pair
from bayesrl.core.structure import Structure, as_arrays, inspect
from bayesrl.typing import Params, PRNGKey, PRNGKeys, Program


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
    """

    policy: Program
    guide: Program | None
    args: tuple[Any, ...]
    structure: Structure
    transforms: Mapping[str, Any]
    learned: bool
    episodes: Any = None

    def pair(self, args: tuple[Any, ...] | None = None) -> Pair:
        """Bind the programs to their arguments, or to others."""
        if args is None:
            return Pair(self.policy, self.guide, self.structure, self.args, self.transforms, self.learned)
        structure = inspect(jax.random.key(0), self.policy, *args)
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
        return whole(self.policy), None if self.guide is None else whole(self.guide)

    def _whole_with(self, args: tuple[Any, ...]) -> "Programs":
        structure = inspect(jax.random.key(0), self._whole[0], *args)
        return Programs(*self._whole, args, structure, self.transforms, self.learned)


@Compiled
def draw_lanes(
    programs: Any, transforms: Any, args: Any, keys: PRNGKeys, params: Params, num_samples: int
) -> tuple[Draws, Totals]:
    """Draw from every lane, [lanes, num_samples, ...], with scores summed; compiled once per programs and number."""
    policy, guide, structure, learned = programs
    pair = Pair(policy, guide, structure, args, transforms, learned)

    def one(key: PRNGKey, params: Params) -> tuple[Draws, Totals]:
        draws = pair.draw(key, params, num_samples, share=False)
        totals = draws.totals((num_samples, *structure.context_shape))
        kept = Draws.held(draws.sites)._replace(plates=draws.plates, metrics=draws.metrics)
        return kept, totals

    return jax.vmap(one)(keys, params)


type Source = Callable[[PRNGKey, Params, Pair], Draws]
"""Makes draws on the host: a fresh key, one lane's parameters, and the pair they belong to.

It may have further methods: `lane(i)` gives the source of the i-th of several fits made side by side; where the
environment is no program, `episodes(key, params, pair, num)` plays whole episodes and gives (Draws, Totals);
`close()` is called when a fit ends, also by an error. Where `further` tells how many more updates the draws just given
serve, that many are made at once, and `serve(count)` says so.
"""


def draw_outside(keys: PRNGKeys, episodes: Any, pair: Pair, params: Params, num_samples: int) -> tuple[Draws, Totals]:
    """Draw from every lane as `draw_lanes` does, in the environment itself; shorter episodes are padded (nan, −1)."""
    lanes = [
        episodes(keys[i], jax.tree.map(lambda x, i=i: x[i], params), pair, num_samples) for i in range(keys.shape[0])
    ]

    def together(*parts: Array) -> Array:
        longest = np.max([part.shape for part in parts], axis=0)
        blank = jnp.nan if jnp.issubdtype(parts[0].dtype, jnp.floating) else -1

        def padded(part: Array) -> Array:
            widths = [(0, int(most - own)) for most, own in zip(longest, part.shape, strict=True)]
            return jnp.pad(part, widths, constant_values=blank)

        return jnp.stack([padded(part) for part in parts])

    draws, totals = jax.tree.map(together, *lanes)
    return draws, totals


def draw_fits(keys: PRNGKeys, episodes: Any, pair: Pair, params: Params, num_samples: int) -> tuple[Draws, Totals]:
    """Draw from every lane, [lanes, num_samples, ...], by the program or in the environment outside of it."""
    if episodes is not None:
        return draw_outside(keys, episodes, pair, params, num_samples)
    pair.structure.check_complete("nothing can be drawn from it")
    static = (pair.policy, pair.guide, pair.structure, pair.learned)
    draws, totals = draw_lanes(static, pair.transforms, pair.args, keys, params, num_samples)
    return draws, totals


def draw_prior(key: PRNGKey, programs: Programs, num_samples: int) -> tuple[Draws, Totals]:
    """Draw from the policy before the fit, [num_samples, ...]."""
    pair = programs.pair()
    keys = key[None]
    if programs.episodes is not None:
        played = draw_outside(keys, programs.episodes, replace(pair, guide=None), {"_": jnp.zeros(1)}, num_samples)
        return jax.tree.map(lambda x: x[0], played)
    result = draw_lanes(
        (pair.policy, None, pair.structure, False), {}, pair.args, keys, {"_": jnp.zeros(1)}, num_samples
    )
    return jax.tree.map(lambda x: x[0], result)


def summarise(totals: Totals, metrics: Mapping[str, Array], beta: Any, lead: int) -> Estimates:
    """Average draws [*lead, sample, *contexts]; standard errors are over samples, contexts being fixed."""
    scale = jnp.asarray(1.0 if beta is None else beta, float)
    by_lane = scale.reshape(scale.shape + (1,) * (lead - scale.ndim))
    by_draw = by_lane.reshape(by_lane.shape + (1,) * (totals.reward.ndim - lead))

    def estimate(values: Array) -> Estimate:
        per_draw = values.mean(tuple(range(lead + 1, values.ndim)))
        num = per_draw.shape[lead]
        return Estimate(per_draw.mean(lead), per_draw.std(lead, ddof=1) / jnp.sqrt(num))

    objective = estimate(totals.log_weight(by_draw))
    return Estimates(
        objective=Estimate(by_lane * objective.mean, by_lane * objective.se),
        reward=estimate(totals.reward),
        kl=estimate(totals.log_q - totals.log_prior),
        metrics={name: estimate(jnp.asarray(value, float)) for name, value in metrics.items()},
    )

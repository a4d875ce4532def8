"""`ReplayDraws`: a source that mixes new draws with a memory of earlier ones, or with stored data."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import jax
import numpy as np

from bayesrl.arguments import CountAboveOne, NonNegative, UnitInterval, checked
from bayesrl.compilation.jit import to_host, trace_once
from bayesrl.compilation.random_keys import as_hash_key, fold_in, key_data
from bayesrl.core.draws import Draws
from bayesrl.core.programs import Programs
from bayesrl.errors import FitError
from bayesrl.typing import Params, PRNGKey, SiteArrays

_MOST_KEPT = 2**28
"""The most bytes of a memory that a checkpoint holds."""

_DISCRETE, _CONTINUOUS = ("biu", np.int32, "whole"), ("biuf", np.float32, "real")
"""The kinds of stored numbers that may be values of a site, the least type that they get, and a word for them."""

_STORED = "stored"
"""The name of the number of stored draws in a checkpoint."""

_CLOSE = 1e-3
"""How far scores of stored draws may be off, relative to their size, nats."""


@checked(FitError)
@dataclass(eq=False)
class ReplayDraws:
    """Learn from a memory: each batch holds new draws, and earlier draws or stored data that are drawn again.

    Replayed draws are of another policy than the present one, so use an objective whose fixed point does not depend on
    who drew: `TrajectoryBalance`. A replayed draw of rank r by total reward is chosen with probability ∝ r^(−priority).
    With stored data alone (`replay_fraction=1`), no draw is ever one of the fitted policy; p* is then found where
    the data reach every x that it holds. A run folder keeps the memory with each checkpoint, so that a run resumes bit
    for bit; a memory of more than 256 MiB is not kept, and then starts anew.

    Args:
        num_particles: draws of a batch, for each context.
        replay_fraction: share of a batch that comes from the memory.
        prior_fraction: share of the new draws that come from the prior.
        priority: 0 replays uniformly; the larger, the more often the best draws.
        capacity: how many draws the memory holds; the oldest new ones leave first, stored data never.
        stored: values of all latent sites, {site: [draws, ...]}, or `Draws` of the same program; their density and
            reward under the policy are computed.

    Raises:
        FitError: an option is out of range; on use, if stored data lack a site, have another shape, have probability 0
            under the policy or the guide, or are draws of another policy; or if the program has mini-batches.
        ObjectiveError: on use, the objective learns from draws of the present policy alone.

    Example:
        >>> import jax, jax.numpy as jnp, numpyro, numpyro.distributions as dist, bayesrl
        >>> def bandit():
        ...     arm = numpyro.sample("arm", dist.Categorical(logits=jnp.zeros(3)))
        ...     bayesrl.reward("payoff", jnp.array([0.0, 1.0, 2.0])[arm])
        >>> source = bayesrl.ReplayDraws(replay_fraction=1.0, stored={"arm": jnp.arange(3)})
        >>> objective = bayesrl.objectives.TrajectoryBalance(form="variance")
        >>> options = {"beta": 1.0, "objective": objective, "source": source, "num_steps": 300, "progress": False}
        >>> posterior = bayesrl.fit(jax.random.key(0), bandit, **options)
        >>> round(float(jnp.exp(posterior.log_prob({"arm": jnp.array([2])})[0, 0])), 2)  # e² / (1 + e + e²)
        0.67

    References:
        Priorities by rank: Schaul, Quan, Antonoglou & Silver (2016), "Prioritized experience replay", equation 1.
    """

    num_particles: CountAboveOne = 64
    replay_fraction: UnitInterval = 0.5
    prior_fraction: UnitInterval = 0.0
    priority: NonNegative = 0.0
    capacity: CountAboveOne = 10_000
    stored: SiteArrays | Draws | None = field(default=None, repr=False)
    _memory: Draws | None = field(default=None, init=False, repr=False)
    _kept: int = field(default=0, init=False, repr=False)
    off_policy: ClassVar[bool] = True
    _draw: Callable[..., Draws] | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        if self._num_new == 0 and self.stored is None:
            raise FitError(
                f"ReplayDraws(replay_fraction={self.replay_fraction}) makes no new draw of {self.num_particles}, and "
                "has nothing stored; pass stored=..., or a smaller fraction"
            )

    @property
    def _num_new(self) -> int:
        return self.num_particles - round(self.replay_fraction * self.num_particles)

    def lane(self, index: int) -> "ReplayDraws":
        """Return a source for one of several fits made side by side; each has a memory of its own."""
        return ReplayDraws(
            self.num_particles, self.replay_fraction, self.prior_fraction, self.priority, self.capacity, self.stored
        )

    def __call__(self, key: PRNGKey, params: Params, programs: Programs) -> Draws:
        """Return a batch, [num_particles, ...]: new draws first."""
        if programs.structure.subsampled:
            raise FitError(
                f"ReplayDraws would mix mini-batches of plate {programs.structure.subsampled[0]!r}; use all data, or "
                "objective=TrajectoryBalance() without a source"
            )
        if self._memory is None and self.stored is not None:
            self._memory = scored_data(self.stored, params, programs)
            self._kept = _count(self._memory)
        new = self._new(key, params, programs) if self._num_new else None
        if new is not None:
            self._remember(new)
        num = self.num_particles - self._num_new
        if num == 0 and new is not None:
            return new
        # The memory is on the host, so choose there, with the key as seed.
        chosen = self._chosen(np.random.default_rng(np.asarray(key_data(key)).ravel()), num)
        again = jax.tree.map(lambda x: x[chosen], self._memory)
        return again if new is None else jax.tree.map(lambda a, b: np.concatenate([a, b]), new, again)

    def _new(self, key: PRNGKey, params: Params, programs: Programs) -> Draws:
        from_prior = round(self.prior_fraction * self._num_new)
        from_guide = self._num_new - from_prior

        def draw(key: PRNGKey, params: Params) -> list[Draws]:
            parts = [programs.draw(key, params, from_guide, share=False)] if from_guide else []
            if from_prior:
                prior = replace(programs, guide=None).draw(fold_in(key, 1), {}, from_prior, share=False)
                parts.append(programs.again(params, prior)._replace(log_behaviour=prior.scores))
            return [_bare(part) for part in parts]

        if self._draw is None:
            self._draw = trace_once(draw, name="draw_new")
        parts = to_host(self._draw(as_hash_key(key), params))
        if from_prior:
            _check_probable(parts[-1], "draws of the prior")
        return parts[0] if len(parts) == 1 else jax.tree.map(lambda *xs: np.concatenate(xs), *parts)

    def _remember(self, new: Draws) -> None:
        """Put new draws behind the old ones, and forget the oldest that were not stored."""
        if self._memory is None:
            self._memory = new
            return
        excess = max(0, _count(self._memory) - self._kept + _count(new) - self.capacity)

        def joined(old: np.ndarray, own: np.ndarray) -> np.ndarray:
            # Stored data lie in front, and the oldest new draws right behind them.
            return np.concatenate([old[: self._kept], old[self._kept + excess :], own])

        self._memory = jax.tree.map(joined, self._memory, new)

    def _chosen(self, rng: np.random.Generator, num: int) -> np.ndarray:
        assert self._memory is not None
        held = _count(self._memory)
        if self.priority == 0:
            return rng.integers(held, size=num)
        totals = sum(np.asarray(x, float).reshape(held, -1).sum(-1) for x in self._memory.rewards.values())
        ranks = np.empty(held)
        ranks[np.argsort(-np.broadcast_to(totals, held), kind="stable")] = np.arange(1, held + 1)
        weights = ranks**-self.priority
        return rng.choice(held, size=num, p=weights / weights.sum())

    def save_state(self) -> dict[str, np.ndarray]:
        """Return the memory for a checkpoint; see `Source`."""
        arrays = {} if self._memory is None else self._memory.as_arrays()
        if sum(array.nbytes for array in arrays.values()) > _MOST_KEPT:
            return {}
        return arrays and arrays | {_STORED: np.asarray(self._kept)}

    def restore_state(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Put back what `save_state` returned."""
        self._memory, self._kept = Draws.from_arrays(arrays), int(arrays[_STORED])

    def close(self) -> None:
        """Forget the memory, and the program that drew it."""
        self._memory, self._draw, self._kept = None, None, 0


def scored_data(stored: SiteArrays | Draws, params: Params, programs: Programs) -> Draws:
    """Score stored values of sites under a policy and its guide; who drew them may be unknown (nan).

    Raises:
        FitError: a site is missing or has another shape, values have no probability, or they are draws of another
            policy.
    """
    structure = programs.structure
    given = stored if isinstance(stored, Draws) else None
    values: Mapping[str, Any] = given.sites if given is not None else stored  # type: ignore[assignment]
    latent = structure.names("action", "environment")
    for name in values:
        if name not in latent + structure.names("metric"):
            raise FitError(
                f"the stored draws hold site {name!r}, which the policy does not draw: they are of another policy; "
                f"pass values of {list(latent)}"
            )
    sites, num = {}, None
    for name in latent:
        if name not in values:
            raise FitError(f"the stored draws lack site {name!r} of the policy; pass values of {list(latent)}")
        value = np.asarray(values[name])
        shape = structure[name].shape
        if value.ndim == 0 or value.shape[1:] != shape or len(value) == 0 or len(value) != (num or len(value)):
            wanted = ", ".join(["draws", *map(str, shape)])
            raise FitError(
                f"the stored draws of site {name!r} have shape {value.shape}; pass [{wanted}], as many for every site"
            )
        kinds, drawn_as, numbers = _DISCRETE if structure[name].discrete else _CONTINUOUS
        if value.dtype.kind not in kinds:
            raise FitError(f"the stored draws of site {name!r} are {value.dtype}; pass {numbers} numbers")
        sites[name], num = value.astype(np.promote_types(value.dtype, drawn_as)), len(value)
    found = _bare(to_host(trace_once(programs.score, name="score_stored")(params, Draws.from_sites(sites))))
    _check_probable(found, "stored draws")
    if given is None:
        return found._replace(log_behaviour=_unknown(found))
    pairs = (("log π₀", given.log_prior, found.log_prior), ("rewards", given.rewards, found.rewards))
    for what, before, now in pairs:
        for name, scores in now.items():
            earlier = np.asarray(before.get(name, scores), float)
            if earlier.shape != scores.shape or not np.allclose(earlier, scores, rtol=_CLOSE, atol=_CLOSE):
                raise FitError(
                    f"the stored draws were made by another policy: the {what} at site {name!r} that they tell are not "
                    "those of this policy; pass their .sites alone, to score them anew"
                )
    told = {name: np.asarray(x) for name, x in given.log_behaviour.items() if name in found.scores}
    return found._replace(log_behaviour=_unknown(found) | told)


def _check_probable(draws: Draws, what: str) -> None:
    """Refuse draws that the policy or its guide cannot make, whose log-ratio is infinite."""
    checks = (("the policy", draws.log_prior), ("the guide", draws.log_q))
    for whose, scores in checks:
        for name, score in scores.items():
            bad = ~np.isfinite(score.reshape(len(score), -1)).all(-1)
            if bad.any():
                remedy = "leave them out" if whose == "the policy" else "use a guide with the prior's support"
                raise FitError(
                    f"{whose} gives {int(bad.sum())} of {len(bad)} {what} probability 0 at site {name!r} (the "
                    f"first is draw {int(bad.argmax())}), so their log-ratio is infinite; {remedy}"
                )
    for name, reward in draws.rewards.items():
        if np.isnan(reward).any() or (reward == np.inf).any():
            raise FitError(f"reward site {name!r} is nan or inf for {what}; leave these out")


def _unknown(draws: Draws) -> dict[str, Any]:
    """Return densities of a behaviour that nobody knows."""
    return {name: np.full_like(score, np.nan) for name, score in draws.scores.items()}


def _bare(draws: Draws) -> Draws:
    """Leave out what belongs to one guide alone, so that draws of several fit together."""
    return draws._replace(log_ratio={}, doubt={})


def _count(draws: Draws) -> int:
    return len(next(iter(draws.sites.values())))

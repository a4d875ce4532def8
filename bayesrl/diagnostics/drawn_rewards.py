"""The rewards of a program under joint draws of what is not known of them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bayesrl.compilation.callbacks import host_errors
from bayesrl.core.programs import Programs
from bayesrl.errors import EngineError
from bayesrl.exact.grid import BatchEvaluator, run_with_sites, score_trace
from bayesrl.statistics.reward_beliefs import RewardBelief, given_draws, recorded_beliefs

_BLOCKS = (2048, 64)
_NUMBERS_AT_ONCE = 2**24
_TOTAL = ""
"""In the place of a site's name: the total reward."""


class DrawnRewards(NamedTuple):
    """What rows of site values earn, per context.

    Attributes:
        proxy: total reward of the program, [rows, contexts], reward units.
        true: what is not known, under each joint draw, [rows, draws, contexts].
        gold: the gold metric, [rows, contexts]; None if none was asked.
    """

    proxy: np.ndarray
    true: np.ndarray
    gold: np.ndarray | None


@dataclass(frozen=True)
class RewardDraws:
    """A program with joint draws of what it does not know of its rewards.

    Attributes:
        programs: its policy, structure and arguments.
        latents: joint draws, [draws, ...], by the `id` of what the beliefs were made from.
        site: the deterministic site that holds the unknown reward; None for the total reward.
        gold: the deterministic site that holds the true one; None if there is none.
    """

    programs: Programs
    latents: Mapping[int, np.ndarray]
    site: str | None
    gold: str | None

    @classmethod
    def of(
        cls, rng: np.random.Generator, programs: Programs, site: str | None, gold: str | None, num_draws: int
    ) -> "RewardDraws":
        """Find what the program's rewards do not know, and draw it.

        Raises:
            EngineError: its rewards are all known; or a site does not exist.
        """
        structure = programs.structure
        metrics = structure.names("metric")
        for name, given in (("belief", site), ("gold", gold)):
            if given is not None and given not in metrics:
                known = ", ".join(map(repr, metrics)) or "none"
                raise EngineError(f"{name}={given!r} is not a deterministic site of the policy; it has {known}")
        called = beliefs_of(programs)
        if not called:
            raise EngineError(
                "the rewards and metrics of the policy are all known: none is bayesrl.rewards.uncertain(...), so "
                "nothing says what the true reward may be; make the reward one, or add one as a numpyro.deterministic "
                "site and pass its name as belief="
            )
        drawn = {key: np.asarray(belief.latent_draws(rng, num_draws)) for key, belief in called.items()}
        most = max(map(len, drawn.values()))
        latents = {
            # Beliefs that were made from different things are independent.
            key: value if len(value) == most else value[rng.integers(len(value), size=most)]
            for key, value in drawn.items()
        }
        return cls(programs, latents, site, gold)

    @property
    def num_draws(self) -> int:
        """How many joint draws there are."""
        return len(next(iter(self.latents.values())))

    def evaluate(self, sites: Mapping[str, Any]) -> DrawnRewards:
        """Evaluate rows of all latent sites, [rows, ...].

        Raises:
            EngineError: a site mixes contexts, or the unknown reward does not depend on what is not known.
        """
        programs, keys = self.programs, list(self.latents)

        def run(args: tuple[Any, ...], values: Mapping[str, Any]) -> dict[str, Any]:
            own_args, latents = args

            def under(latent: tuple[Any, ...]) -> Any:
                with given_draws(dict(zip(keys, latent, strict=True))):
                    return _values(programs, values, own_args)[_TOTAL if self.site is None else self.site]

            plain = _values(programs, values, own_args)
            gold = {} if self.gold is None else {"gold": plain[self.gold]}
            return {"proxy": plain[_TOTAL], "true": jax.vmap(under)(latents), **gold}

        latents = tuple(jnp.asarray(self.latents[key]) for key in keys)
        evaluate = BatchEvaluator(run, (programs.args, latents), programs.structure)
        each = self.num_draws * programs.structure.num_contexts
        block = next((size for size in _BLOCKS if size * each <= _NUMBERS_AT_ONCE), _BLOCKS[-1])
        num = len(next(iter(sites.values())))
        with host_errors():
            parts = [
                evaluate({name: value[start : start + block] for name, value in sites.items()})
                for start in range(0, num, block)
            ]
        found = {name: np.concatenate([np.asarray(part[name], float) for part in parts]) for name in parts[0]}
        if self.num_draws > 1 and not np.ptp(found["true"], axis=1).any():
            raise EngineError(
                "what is uncertain in the policy does not reach "
                f"{'its total reward' if self.site is None else repr(self.site)}; pass belief=, the name of the "
                "deterministic site that holds the uncertain reward"
            )
        return DrawnRewards(found["proxy"], found["true"], found.get("gold"))


def beliefs_of(programs: Programs) -> dict[int, RewardBelief]:
    """Return what the rewards and metrics of a program do not know, by the `id` of what the beliefs were made from."""
    with recorded_beliefs() as called, host_errors():
        # Run, and not scored: mini-batches have fewer rewards than there are contexts.
        jax.eval_shape(
            lambda: [site.value for site in run_with_sites(programs.policy, {}, programs.args).sites.values()]
        )
    return called


def _values(programs: Programs, sites: Mapping[str, Any], args: tuple[Any, ...]) -> dict[str, Any]:
    """Return the total reward and each metric that is known per context, [contexts]."""
    structure = programs.structure
    names = structure.names("reward", "metric")
    scores = score_trace(run_with_sites(programs.policy, sites, args), structure, names)
    total = sum(scores.rewards.values(), start=jnp.zeros(structure.num_contexts))
    return {_TOTAL: total, **scores.metrics}

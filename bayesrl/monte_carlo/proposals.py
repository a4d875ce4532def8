"""Proposals of rejection sampling, and the accepted ones: filled rows and running sums."""

from dataclasses import dataclass

import numpy as np

from bayesrl.core.draws import Draws
from bayesrl.core.programs import Programs
from bayesrl.errors import EngineError, PolicyError
from bayesrl.exact.weighted_draws import context_axes

_ROUNDING = 1e-6


def refuse_bad_rewards(rewards: dict[str, np.ndarray]) -> None:
    """Refuse rewards by site, [draws, ...], that cannot form a weight; the message names the site."""
    for name, value in rewards.items():
        bad = (np.isnan(value) | (value == np.inf)).reshape(len(value), -1).any(-1)
        if bad.any():
            raise PolicyError(
                f"reward site {name!r} returned nan or inf for {int(bad.sum())} of {len(bad)} draws; "
                "rewards are finite, or -inf for what must never happen"
            )


@dataclass(frozen=True)
class ProposalSums:
    """Sums over proposals, each [lanes, contexts].

    With w = exp(d/β) and d = R − B, `moments` are the sums of w, w², w·d, w²·d and w²·d².
    """

    number: int
    accepted: np.ndarray
    moments: np.ndarray

    @classmethod
    def empty(cls, shape: tuple[int, ...]) -> "ProposalSums":
        """Return sums over no proposals."""
        return cls(0, np.zeros(shape, int), np.zeros((5, *shape)))

    def plus(self, other: "ProposalSums") -> "ProposalSums":
        """Add the sums of more proposals."""
        return ProposalSums(self.number + other.number, self.accepted + other.accepted, self.moments + other.moments)


class AcceptedDraws:
    """Exact draws as they arrive: each lane and context fills its own rows.

    Rows are filled in place, because a copy per batch would cost more than the draws.
    """

    def __init__(
        self,
        program: Programs,
        bound: np.ndarray,
        betas: np.ndarray,
        num_samples: int,
        *,
        declared: bool,
        regularizer: str,
        quasi: bool,
    ) -> None:
        self.axes = context_axes(program.structure)
        self.context_shape = program.structure.context_shape
        self.bound, self.betas, self.num_samples, self.declared = bound, betas, num_samples, declared
        self.quasi, self.kept_excess = quasi, quasi or regularizer != "kl"
        self.filled = np.zeros((len(betas), len(bound)), int)
        self.rows: dict[str, np.ndarray] = {}
        self.excess: list[np.ndarray] = []
        """R − B of every proposal, [proposals, contexts], if `kept_excess`."""
        self.spans: np.ndarray | None = None
        """s, [lanes, contexts], for chances max(0, 1 + (R − B)/s) in the place of exp((R − B)/β)."""

    def take(self, batch: Draws, rng: np.random.Generator) -> ProposalSums:
        """Accept or reject proposals, and store accepted ones until the rows are full."""
        excess = self.excess_of(batch)
        values = {name: self._by_context(name, value) for name, value in batch.sites.items()}
        accepted, moments = [], []
        for lane, beta in enumerate(self.betas):
            weight = np.exp(excess / beta) if self.spans is None else np.maximum(1 + excess / self.spans[lane], 0.0)
            kept = rng.random(excess.shape) < weight
            # A reward of −∞ has weight 0; their product would be nan.
            finite = np.where(weight > 0, excess, 0.0)
            square, both = weight**2, weight * finite
            parts = (weight, square, both, weight * both, both**2)
            moments.append([part.sum(0) for part in parts])
            accepted.append(kept.sum(0))
            self._keep(lane, kept, values)
        return ProposalSums(len(excess), np.stack(accepted), np.stack(moments, 1))

    def excess_of(self, batch: Draws) -> np.ndarray:
        """Return min(R − B, 0) of proposals, [proposals, contexts]; refuse rewards above the bound."""
        refuse_bad_rewards(batch.rewards)
        total = np.asarray(sum(value.astype(float) for value in batch.rewards.values())).reshape(-1, len(self.bound))
        excess = total - self.bound
        if self.kept_excess:
            self.excess.append(excess)
        if self.quasi:
            return np.minimum(excess, 0.0)
        # Rounding may lift a reward slightly above its bound, which is clipped; anything more is an error.
        scale = np.maximum(np.abs(self.bound).max(), np.abs(total[np.isfinite(total)]).max(initial=0.0))
        if excess.max() > _ROUNDING * scale:
            row, context = np.unravel_index(excess.argmax(), excess.shape)
            drawn = {name: self._by_context(name, v)[row, context] for name, v in batch.sites.items()}
            shown = ", ".join(f"{name}={np.array2string(np.squeeze(v), threshold=8)}" for name, v in drawn.items())
            where = f" in context {tuple(map(int, np.unravel_index(context, self.context_shape)))}"
            raise EngineError(
                f"the draw {shown} has total reward {total[row, context]:.6g}{where if self.context_shape else ''}, "
                f"above {'reward_bound=' if self.declared else 'the proven bound '}{self.bound[context]:.6g}, so "
                "accepting would not be exact; pass a reward_bound that nothing exceeds"
            )
        return np.minimum(excess, 0.0)

    def _by_context(self, name: str, value: np.ndarray) -> np.ndarray:
        """Lay out a site as [rows, contexts, *shape of one context]."""
        own = [1 + axis for axis in self.axes[name] if axis is not None]
        moved = np.moveaxis(value, own, range(1, 1 + len(own)))
        return moved.reshape(len(value), len(self.bound), *moved.shape[1 + len(own) :])

    def _keep(self, lane: int, kept: np.ndarray, values: dict[str, np.ndarray]) -> None:
        place = self.filled[lane] + np.cumsum(kept, 0) - 1
        # Accepted proposals beyond the last row are dropped; the sums still count them.
        row, context = np.nonzero(kept & (place < self.num_samples))
        for name, value in values.items():
            shape = (len(self.betas), self.num_samples, *value.shape[1:])
            held = self.rows.setdefault(name, np.zeros(shape, value.dtype))
            held[lane, place[row, context], context] = value[row, context]
        self.filled[lane] = np.minimum(self.filled[lane] + kept.sum(0), self.num_samples)

    def sites(self, lane: int, num: int) -> dict[str, np.ndarray]:
        """Return the first rows of one lane as values of sites, [num, ...]."""
        result = {}
        for name, held in self.rows.items():
            own = [1 + axis for axis in self.axes[name] if axis is not None]
            value = held[lane, :num].reshape(num, *self.context_shape, *held.shape[3:])
            result[name] = np.moveaxis(value, range(1, 1 + len(own)), own)
        return result

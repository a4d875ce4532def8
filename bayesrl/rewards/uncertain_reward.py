"""`uncertain`: an ordinary reward from a posterior over rewards and an attitude to what is not known."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any, cast

import jax.numpy as jnp
import numpy as np
from jax import Array

from bayesrl.argument_types import CHECKED_IN_BODY
from bayesrl.arguments import Level, NonNegative, Positive, UnusedOption, checked
from bayesrl.display.tables import Displayable, DisplayBlock, Line, Table
from bayesrl.errors import PreferenceError
from bayesrl.lm.prompts import Completions
from bayesrl.lm.rewards.base import Reward
from bayesrl.preferences.reward_posterior import RewardPosterior
from bayesrl.rewards.attitudes import EXPONENTIAL, Attitude, AttitudeName
from bayesrl.rewards.beliefs import EnsembleRewardBelief, LinearRewardBelief, belief_of
from bayesrl.statistics.reward_beliefs import latent_now
from bayesrl.value_checks import format_value, is_traced

_SHOWN = 20


@checked(PreferenceError)
@dataclass(frozen=True, repr=False, eq=False)
class UncertainReward(Reward, Displayable):
    """A reward that is not known, judged with an attitude; see `uncertain`.

    Call it with item numbers (whole numbers of any shape), with features (real numbers, the last axis features), or
    with the `Completions` of a language model; it returns one number for each. An ensemble hands on what it gets.

    Attributes:
        belief: what the reward may be.
        attitude: how that is judged.

    Example:
        >>> import numpy as np
        >>> from bayesrl import rewards
        >>> reward = rewards.uncertain((np.array([0.0, 1.0]), np.diag([0.1, 3.0])), attitude="pessimistic", beta=1.0)
        >>> reward.values.round(3).tolist(), round(float(reward(0)), 3)
        ([-0.05, -0.5], -0.05)
    """

    belief: Any
    attitude: Any

    def __call__(self, what: Any) -> Array:
        """Return the reward of items by number, of features, of completions, or what members make of it.

        Item numbers that do not exist have the reward nan, which a fit refuses by name.

        Raises:
            PreferenceError: it is not called with what its posterior knows.
        """
        latent = latent_now(self.belief)
        if isinstance(self.belief, EnsembleRewardBelief):
            values = self.belief.values(what)
            return values[latent] if latent is not None else self.attitude.of_draws(values, jnp, exact=True)
        if not isinstance(what, Completions):
            what = _as_array(what)
            if jnp.issubdtype(what.dtype, jnp.integer):
                return self._of_items(what, latent)
        return self._of_features(self.belief.features_of(what), latent)

    def _of_items(self, items: Array, latent: Any) -> Array:
        num = self.belief.num_items
        if not is_traced(items) and items.size and not 0 <= int(items.min()) <= int(items.max()) < num:
            raise PreferenceError(f"the reward was called with items {format_value(items)}; use 0 to {num - 1}")
        table = jnp.asarray(self.values) if latent is None else self._table_at(latent)
        # Far outside, also of numbers below 0, which would count from the end.
        return jnp.where((items >= 0) & (items < num), table[jnp.clip(items, 0, num - 1)], jnp.nan)

    def _table_at(self, latent: Any) -> Array:
        latent = jnp.asarray(latent)
        if self.belief.table is None:
            return latent - jnp.asarray(self.belief.shift, latent.dtype) @ latent
        return jnp.asarray(self.belief.items, latent.dtype) @ latent

    def _of_features(self, features: Array, latent: Any) -> Array:
        if latent is not None:
            return features @ jnp.asarray(latent, features.dtype)
        if self.belief.normal:
            mean, root = (jnp.asarray(part, features.dtype) for part in (self.belief.mean, self.belief.root))
            return jnp.asarray(self.attitude.of_normal(features @ mean, ((features @ root) ** 2).sum(-1)))
        draws = jnp.moveaxis(features @ jnp.asarray(self.belief.draws, features.dtype).T, -1, 0)
        return jnp.asarray(self.attitude.of_draws(draws, jnp, exact=False))

    @property
    def separate(self) -> bool:
        """Whether a completion's number is known not to depend on others; see `Reward.separate`."""
        members = self.belief.members if isinstance(self.belief, EnsembleRewardBelief) else ()
        return all(isinstance(member, Reward) and member.separate for member in members)

    @property
    def fields(self) -> frozenset[str] | None:
        """The fields of records that members read; see `Reward.fields`."""
        members = self.belief.members if isinstance(self.belief, EnsembleRewardBelief) else ()
        if (
            isinstance(self.belief, LinearRewardBelief)
            and self.belief.reader is not None
            and self.belief.reader.reference
        ):
            return frozenset({self.belief.reader.reference})
        found = [member.fields if isinstance(member, Reward) else None for member in members]
        return None if None in found else frozenset().union(*cast(list[frozenset[str]], found))

    def close(self) -> None:
        """Close members that hold resources."""
        for member in self.belief.members if isinstance(self.belief, EnsembleRewardBelief) else ():
            if isinstance(member, Reward):
                member.close()

    @cached_property
    def values(self) -> np.ndarray:
        """The reward of each item that the posterior knows by number, [items], double precision."""
        belief = self._with_items()
        if belief.normal:
            return np.asarray(self.attitude.of_normal(self.mean, self.sd**2))
        return np.asarray(self.attitude.of_draws(_draws_of(belief), np, exact=False))

    @cached_property
    def mean(self) -> np.ndarray:
        """Posterior means, less that of the reference, [items]."""
        belief = self._with_items()
        return np.asarray(belief.items @ belief.mean)

    @cached_property
    def sd(self) -> np.ndarray:
        """Posterior standard deviations of the differences from the reference, [items]."""
        belief = self._with_items()
        if belief.root is not None:
            return np.sqrt(((belief.items @ belief.root) ** 2).sum(-1))
        return _draws_of(belief).std(0, ddof=1 if len(_draws_of(belief)) > 1 else 0)

    def _with_items(self) -> LinearRewardBelief:
        if isinstance(self.belief, EnsembleRewardBelief):
            raise PreferenceError("an ensemble of functions has no items; call the reward with what they read")
        belief: LinearRewardBelief = self.belief
        return belief

    def _blocks(self) -> Sequence[DisplayBlock]:
        if isinstance(self.belief, EnsembleRewardBelief):
            return [Line(f"UncertainReward: {self.attitude}, an ensemble of {len(self.belief.members)}")]
        source = self.belief.origin
        how = "normal" if self.belief.normal else f"{len(self.belief.draws):,} draws"
        of = f"a RewardPosterior by {source.method}" if isinstance(source, RewardPosterior) else how
        relative = ", relative to a reference" if self.belief.shift.any() else ""
        order = np.argsort(-self.values, kind="stable")
        rows = [
            [self.belief.names[at][:40], *(f"{part[at]:.3f}" for part in (self.mean, self.sd, self.values))]
            for at in order[:_SHOWN]
        ]
        more = [Line(f"({len(order) - _SHOWN} further items)")] if len(order) > _SHOWN else []
        told = Line(f"UncertainReward: {self.attitude}, of {of}{relative}")
        return [told, Table(["item", "mean", "sd", "reward"], rows, "lrrr"), *more]


@checked(
    PreferenceError,
    UnusedOption("beta", lambda given: given["attitude"] not in EXPONENTIAL, "the attitude has no temperature"),
    UnusedOption("level", lambda given: given["attitude"] != "quantile", "only a quantile has a level"),
    UnusedOption("sds", lambda given: given["attitude"] != "sd_penalty", "only 'sd_penalty' subtracts them"),
)
def uncertain(
    posterior: Annotated[Any, CHECKED_IN_BODY],
    *,
    attitude: AttitudeName = "neutral",
    beta: Positive | None = None,
    level: Level = 0.05,
    sds: NonNegative = 1.0,
    reference: Annotated[Any, CHECKED_IN_BODY] = None,
) -> UncertainReward:
    """Make an ordinary reward of a reward r that is not known, with a stated attitude to risk.

    - "neutral", E[r(x)]: r is unknown and averaged over; best in expectation;
    - "optimistic", β·log E e^{r(x)/β}, for a normal r μ + s²/2β: as if the policy chose r too;
    - "pessimistic", −β·log E e^{−r(x)/β}, for a normal r μ − s²/2β: as if nature chose r against x, at a price of β·KL;
    - "quantile", of r(x) at `level`; "worst", the least draw, or member of an ensemble; "sd_penalty", E[r] − sds·sd[r].

    An attitude judges each x for itself, so call the reward once for all that a draw of the policy earns: judged step
    by step, risks that go together would be counted as if they did not.

    Args:
        posterior: what r may be. A `preferences.RewardPosterior`: closed forms where it is normal ("laplace", "fit"),
            its draws elsewhere. An array of draws [draw, item]. A pair (mean [item], covariance [item, item]) of a
            normal law. A list of functions, or of rewards of texts: an ensemble, whose members are all there is.
        attitude: the name.
        beta: β of the exponential attitudes, reward units per nat. Use that of the fit, if policy and nature are to pay
            the same price; a program does not know the β at which it will be tilted. s²/2β grows without bound as β
            falls: where that is more caution than is meant, take a larger one, or "sd_penalty".
        level: of the quantile.
        sds: number of standard deviations.
        reference: what r is relative to. Comparisons tell a reward only up to a constant, and an attitude other than
            "neutral" counts what is not known of that constant too: differently for each x, unless it is independent of
            the differences. An item number, or probabilities of the items such as those of the prior policy, whose mean
            reward is then subtracted draw by draw; for texts also the name of a field of the prompts' records that
            holds a reference completion. None takes the scores as the model has them, around its own prior.

    Returns:
        `UncertainReward`, to be used as `bayesrl.reward("r", reward(item))`, as `reward(features)`, and as `reward=` of
        `lm.policy`, where the posterior's scores are `preferences.TextScores`.

    Raises:
        PreferenceError: there is no beta for an exponential attitude; draws do not tell E e^{±r/β}, or it is infinite;
            a normal law has no worst; or the posterior or the reference is of another kind.

    Example:
        >>> import jax, jax.numpy as jnp, numpyro, numpyro.distributions as dist, bayesrl
        >>> from bayesrl import preferences, rewards
        >>> data = preferences.PreferenceData.of_pairs([0] * 9 + [2], [1] * 9 + [0], [1] * 6 + [0] * 3 + [1])
        >>> posterior = preferences.infer(jax.random.key(0), preferences.bradley_terry(data))
        >>> wary = rewards.uncertain(posterior, attitude="pessimistic", beta=0.25)
        >>> def bandit():
        ...     item = numpyro.sample("item", dist.Categorical(logits=jnp.zeros(3)))
        ...     bayesrl.reward("score", wary(item))
        >>> exact = bayesrl.enumerate_posterior(bandit, beta=0.25)
        >>> int(posterior.mean.mean.argmax()), int(exact.log_weights.argmax())  # item 2 was compared once
        (2, 0)

    References:
        Howard & Matheson (1972), "Risk-sensitive Markov decision processes", for the exponential attitudes;
        Coste, Anwar, Kirk & Krueger (2024), "Reward model ensembles help mitigate overoptimization", for "worst".
    """
    if attitude in EXPONENTIAL and beta is None:
        raise PreferenceError(f"attitude={attitude!r} needs beta=, in reward units per nat; use that of the fit")
    chosen = Attitude(attitude, beta, level, sds)
    belief = belief_of(posterior, reference)
    if isinstance(belief, LinearRewardBelief):
        if attitude == "worst" and belief.normal:
            raise PreferenceError(
                "attitude='worst' has no value here: a normal posterior is unbounded below; use attitude='quantile' or "
                "'pessimistic', or pass some draws: uncertain(posterior.scores[:5], attitude='worst')"
            )
        if not belief.normal:
            _refuse_untold(chosen, belief)
    return UncertainReward(belief, chosen)


def _refuse_untold(attitude: Attitude, belief: LinearRewardBelief) -> None:
    """Refuse an exponential attitude whose expectation a draw or two would decide."""
    draws = _draws_of(belief)
    if (found := attitude.untold(draws)) is None:
        return
    at, share, khat = found
    what, high = ("e^{r/β}", "high") if attitude.name == "optimistic" else ("e^{−r/β}", "low")
    raise PreferenceError(
        f"attitude={attitude.name!r} is unbounded for this posterior, or {len(draws):,} draws do not tell it: of E "
        f"{what} of item {belief.names[at]!r} at beta={attitude.beta:g} one draw carries {share:.0%} (k̂ {khat:.2g}), "
        f"and {high} rewards may have a heavy tail; its sd is {draws[:, at].std():.3g}. Use a larger beta, more draws, "
        "a posterior in closed form such as preferences.infer(..., method='laplace'), or attitude='quantile'"
    )


def _draws_of(belief: LinearRewardBelief) -> np.ndarray:
    """Return draws of the rewards of items, [draws, items]."""
    assert belief.draws is not None
    if belief.table is None:
        return belief.draws - (belief.draws @ belief.shift)[:, None]
    return belief.draws @ belief.items.T


def _as_array(what: Any) -> Array:
    try:
        array = jnp.asarray(what)
    except (TypeError, ValueError) as error:
        raise PreferenceError(
            f"the reward was called with {format_value(what)}; pass item numbers, features, or completions"
        ) from error
    if not jnp.issubdtype(array.dtype, jnp.integer) and not jnp.issubdtype(array.dtype, jnp.floating):
        raise PreferenceError(f"the reward was called with {array.dtype}; pass whole item numbers, or real features")
    return array

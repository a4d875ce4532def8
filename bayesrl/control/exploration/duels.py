"""Which pairs of items to ask about: by information, or by double Thompson sampling."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from bayesrl.arguments import Count, FiniteNumbersOrNone, checked, user_code
from bayesrl.compilation.random_keys import fold_in, split_keys
from bayesrl.control.exploration.beliefs import Belief, SampleBelief
from bayesrl.control.exploration.rules import Exploration, Rule, best_action
from bayesrl.display.tables import Displayable, DisplayBlock, Line, Table
from bayesrl.errors import ControlError
from bayesrl.preferences.outcome_information import outcome_information
from bayesrl.preferences.outcome_log_probs import log_probs_of_pairs
from bayesrl.preferences.reward_posterior import RewardPosterior
from bayesrl.typing import PRNGKey
from bayesrl.value_checks import are_integers, array_of

type About = Literal["best", "scores"]

_TRIES = 50
"""How often a rule may name pairs it has named before, for each pair wanted."""
_AT_ONCE = 2**22
_SHOWN = 20


@dataclass(frozen=True)
class DoubleThompson(Exploration):
    """See `double_thompson`."""

    committed: ClassVar[bool] = False

    def __call__(self, key: PRNGKey, belief: Belief, time: Any) -> Array:
        """Choose; see `Exploration`."""
        return jnp.argmax(belief.sample(key), -1)


@dataclass(frozen=True)
class MostInformative(Exploration):
    """See `most_informative`."""

    about: About = "best"

    def __call__(self, key: PRNGKey, belief: Belief, time: Any) -> Array:
        """Choose the first item of the best pair, or, if one is not allowed, the best partner for that."""
        scores = getattr(belief, "samples", None)
        if scores is None or scores.ndim != 2 or belief.allowed is None:
            raise ControlError(
                "most_informative compares two items by draws of their scores, and this is another choice; use it with "
                "Duels, or thompson() here"
            )
        information = information_of_pairs(scores, self.about)
        first = jnp.argmin(belief.allowed)
        values = jnp.where(belief.allowed.all(), information.max(-1), information[first])
        return best_action(key, jnp.where(belief.allowed, values, -jnp.inf))


def information_of_pairs(scores: Any, about: About) -> Any:
    """Compute what the answers of all pairs tell under Bradley and Terry's model, nats, [items, items].

    Args:
        scores: draws of the scores, log-odds, [draws, items].
        about: "best" or "scores".
    """
    xp = scores.__array_namespace__()
    wins = (1 + xp.tanh((scores[:, :, None] - scores[:, None, :]) / 2)) / 2
    return outcome_information(xp.stack([wins, 1 - wins], -1), best_of_draws(scores) if about == "best" else None)


def best_of_draws(scores: Any) -> Any:
    """Say which item is the best in each draw, [draws, items]; the first of several equal ones is."""
    xp = scores.__array_namespace__()
    return scores.argmax(-1)[:, None] == xp.arange(scores.shape[-1])


def double_thompson() -> Exploration:
    """Take the best item of one draw of the posterior, and against it the best other item of a second draw.

    For `Duels` and `pairs_to_ask`. Unlike `thompson()`, which keeps one draw for both items, it draws anew.

    Example:
        >>> from bayesrl import control
        >>> control.double_thompson()
        DoubleThompson()

    References:
        Wu & Liu (2016), "Double Thompson sampling for dueling bandits", of which this is the form for scores: the best
        item of a draw is its Condorcet winner.
    """
    return DoubleThompson()


@checked(ControlError)
def most_informative(about: About = "best") -> Exploration:
    """Take the pair whose answer is expected to tell most.

    For `Duels` and `pairs_to_ask`. About "best": I(answer; which item is best), which loses interest in items that are
    surely not the best. About "scores": I(answer; all scores), known as BALD. The tilted policy ∝ π₀·exp(score/β) is a
    one-to-one function of the scores up to a constant, so that this is also the information about that policy at any β.

    Args:
        about: "best" or "scores".

    Raises:
        ControlError: `about` is another text.

    Example:
        Two items are close at the top, the third is far below; the answer that counts is between those two:

        >>> import jax, jax.numpy as jnp, numpy as np
        >>> from bayesrl import control
        >>> from bayesrl.control.exploration.beliefs import SampleBelief
        >>> draws = np.random.default_rng(0).normal([2.0, 1.8, -2.0], [0.5, 0.5, 2.0], (2000, 3))
        >>> belief = SampleBelief(jnp.asarray(draws), None, jnp.array([True, False, True]))  # the first is item 1
        >>> int(control.most_informative("best")(jax.random.key(0), belief, 0))
        0
        >>> int(control.most_informative("scores")(jax.random.key(0), belief, 0))
        2

    References:
        Houlsby, Huszár, Ghahramani & Lengyel (2011), "Bayesian active learning for classification and preference
        learning"; Hennig & Schuler (2012), "Entropy search for information-efficient global optimization".
    """
    return MostInformative(about)


@checked(ControlError)
@dataclass(frozen=True, eq=False, repr=False)
class PairsToAsk(Displayable):
    """Pairs of items worth asking about, the best first.

    Attributes:
        pairs: numbers of items, [pairs, 2].
        p_first: P(the first is preferred), [pairs].
        about_best: what each answer is expected to tell about which item is the best, nats, [pairs].
        about_scores: what it tells about all scores, nats, [pairs]; at least as much.
        names: what to call each pair.
    """

    pairs: np.ndarray
    p_first: np.ndarray
    about_best: np.ndarray
    about_scores: np.ndarray
    names: tuple[tuple[str, str], ...]

    def __len__(self) -> int:
        return len(self.pairs)

    def _blocks(self) -> Sequence[DisplayBlock]:
        rows = [
            [first[:40], second[:40], f"{p:.2f}", f"{best:.4f}", f"{scores:.4f}"]
            for (first, second), p, best, scores in zip(
                self.names[:_SHOWN], self.p_first, self.about_best, self.about_scores, strict=False
            )
        ]
        heads = ["first", "second", "P(first is better)", "tells of the best (nats)", "of all scores (nats)"]
        further = [Line(f"({len(self) - _SHOWN} further pairs)")] if len(self) > _SHOWN else []
        return [Table(heads, rows, "llrrr"), *further]


@checked(ControlError)
def pairs_to_ask(
    key: PRNGKey,
    posterior: RewardPosterior,
    *,
    exploration: Rule | None = None,
    num_pairs: Count = 10,
    pairs: FiniteNumbersOrNone = None,
) -> PairsToAsk:
    """Choose the pairs to ask people about next, given what is known of the scores.

    Items are only compared with items of the same prompt, and the best item is the best of its prompt. Pairs are judged
    one by one: the answers of several alike tell less than the sum, so ask few at a time and infer again.

    Args:
        key: random key; do not use it again.
        posterior: of the scores, as `preferences.infer` gives it.
        exploration: `most_informative()`, the default, ranks all pairs by what they tell of the best item;
            `most_informative("scores")` by what they tell of all scores; `double_thompson()` or any other rule of
            bandits chooses an item and then another one for it.
        num_pairs: how many pairs, or fewer if there are not so many.
        pairs: the pairs that may be asked, [pairs, 2], for `most_informative`; by default, all of one prompt.

    Raises:
        ControlError: there are no pairs; a pair names an item that is not there; the rule keeps naming the same pairs,
            or needs another posterior.

    Example:
        >>> import jax
        >>> from bayesrl import control, preferences
        >>> data = preferences.PreferenceData.of_pairs([0] * 8 + [1] * 8, [1] * 8 + [2] * 8, [0] * 4 + [1] * 12)
        >>> posterior = preferences.infer(jax.random.key(0), preferences.bradley_terry(data))
        >>> control.pairs_to_ask(jax.random.key(1), posterior, num_pairs=1).pairs.tolist()
        [[0, 1]]
    """
    rule = most_informative() if exploration is None else exploration
    groups = _groups(posterior)
    if isinstance(rule, MostInformative):
        chosen = _candidates(groups, pairs, posterior.model.data.num_items)
        described = _describe(posterior, groups, chosen)
        worth = described.about_best if rule.about == "best" else described.about_scores
        order = np.argsort(-worth, kind="stable")[:num_pairs]
    else:
        if pairs is not None:
            raise ControlError("pairs= is for most_informative, which ranks them; leave it out")
        described = _describe(posterior, groups, _by_rule(key, posterior, groups, rule, num_pairs))
        order = np.arange(len(described))
    return PairsToAsk(
        described.pairs[order],
        described.p_first[order],
        described.about_best[order],
        described.about_scores[order],
        tuple(described.names[at] for at in order),
    )


def _groups(posterior: RewardPosterior) -> list[np.ndarray]:
    """Return the numbers of the items of each prompt that has two or more."""
    members: dict[str, list[int]] = {}
    for number, item in enumerate(posterior.model.data.items):
        members.setdefault(repr(item.get("prompt")), []).append(number)
    groups = [np.asarray(group) for group in members.values() if len(group) > 1]
    if not groups:
        raise ControlError("no prompt has two items to compare; add another answer to one")
    return groups


def _candidates(groups: list[np.ndarray], pairs: Any, num_items: int) -> np.ndarray:
    """Return pairs of numbers, [pairs, 2]."""
    if pairs is None:
        return np.concatenate([group[np.stack(np.triu_indices(len(group), 1), -1)] for group in groups])
    given = np.asarray(array_of(pairs))
    fits = given.ndim == 2 and given.shape[1:] == (2,) and len(given) and are_integers(given)
    if not fits or given.min() < 0 or given.max() >= num_items or (given[:, 0] == given[:, 1]).any():
        raise ControlError(f"pairs must be numbers of two different items each, [pairs, 2], from 0 to {num_items - 1}")
    return given.astype(int)


def _describe(posterior: RewardPosterior, groups: list[np.ndarray], chosen: np.ndarray) -> PairsToAsk:
    """Compute what the answers of pairs tell."""
    model, draws = posterior.model, posterior.scores
    group_of = np.full(model.data.num_items, -1)
    for number, group in enumerate(groups):
        group_of[group] = number
    if (group_of[chosen[:, 0]] != group_of[chosen[:, 1]]).any():
        raise ControlError("a pair is of two prompts, whose answers nobody can compare; pass pairs of one prompt each")
    if model.name == "gaussian_ratings":
        raise ControlError("the posterior is of ratings, which do not say how pairs are judged; compare items instead")
    link = "probit" if model.name == "thurstone" else "logit"
    tie = None if model.ties is None else jnp.asarray(posterior.draws["tie"]).reshape(len(draws), -1)[:, :1]
    # Of two items, Davidson and Luce's ties of rankings are Davidson's.
    ties = "davidson" if model.ties == "davidson_luce" else model.ties
    about_best, about_scores, p_first = np.zeros((3, len(chosen)))
    for number in np.unique(group_of[chosen[:, 0]]):
        rows = np.flatnonzero(group_of[chosen[:, 0]] == number)
        is_best = best_of_draws(draws[:, groups[number]])
        for part in np.array_split(rows, -(-len(rows) * len(draws) // _AT_ONCE)):
            difference = draws[:, chosen[part, 0]] - draws[:, chosen[part, 1]]
            probs = np.exp(np.asarray(log_probs_of_pairs(jnp.asarray(difference), link, tie, ties), float))
            about_best[part] = outcome_information(probs, is_best)
            about_scores[part] = outcome_information(probs)
            p_first[part] = probs[..., 0].mean(0)
    names = model.data.names
    return PairsToAsk(
        chosen, p_first, about_best, about_scores, tuple((names[first], names[second]) for first, second in chosen)
    )


def _by_rule(key: PRNGKey, posterior: RewardPosterior, groups: list[np.ndarray], rule: Any, number: int) -> np.ndarray:
    """Let a rule choose an item, and then another for it, until it has named enough different pairs."""
    sizes = np.asarray([len(group) for group in groups])
    wanted = min(number, int((sizes * (sizes - 1) // 2).sum()))
    rng = np.random.default_rng(np.asarray(jax.random.bits(fold_in(key, 0), (4,))).tolist())
    found: dict[tuple[int, int], None] = {}
    for attempt in range(_TRIES * wanted):
        if len(found) == wanted:
            break
        group = groups[rng.choice(len(groups), p=sizes / sizes.sum())]
        keys = split_keys(fold_in(key, attempt + 1), 2)
        samples, allowed = jnp.asarray(posterior.scores[:, group]), np.ones(len(group), bool)
        with user_code(f"the exploration rule {rule!r}", ControlError, "let it give integers"):
            first = int(rule(keys[0], SampleBelief(samples, None, jnp.asarray(allowed)), attempt))
            allowed[first] = False
            second = int(rule(keys[1], SampleBelief(samples, None, jnp.asarray(allowed)), attempt))
        low, high = sorted((int(group[first]), int(group[second])))
        if low != high:
            found[low, high] = None
    if len(found) < wanted:
        raise ControlError(
            f"{rule!r} named {len(found)} different pairs in {_TRIES * wanted} tries, and {wanted} are wanted; ask for "
            "fewer, or use most_informative()"
        )
    return np.asarray(list(found), int)

"""Log-ratios log q/π₀ of judged items under a policy in training, for policies with few actions and for texts."""

import abc
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from bayesrl.core.draws import Draws
from bayesrl.core.programs import Programs
from bayesrl.display.formatting import pluralize
from bayesrl.errors import ObjectiveError, PreferenceError
from bayesrl.objectives.gradient_plan import GradientPlan, joint_size
from bayesrl.preferences.records.preference_data import PreferenceData
from bayesrl.preferences.records.record_formats import Item
from bayesrl.preferences.score_models import as_whole
from bayesrl.typing import Params


class ItemLogRatios(NamedTuple):
    """What judgements and the history read of a policy in training.

    Attributes:
        log_ratios: from numbers of items to log q/π₀, nats, of the shape of the numbers.
        divergence: from the numbers of the items of a mini-batch, [rows], to KL(q‖π₀), nats, as it can be had; no
            gradient flows through it.
        table: all values of the actions, [values, ...], with their scores, if they are few; else None.
    """

    log_ratios: Callable[[Array], Array]
    divergence: Callable[[Array], Array]
    table: Draws | None


class ScoredItems(abc.ABC):
    """Judged items, prepared for a policy.

    Attributes:
        lengths: tokens of each item, [items]; 1 for an action.
    """

    lengths: np.ndarray

    @abc.abstractmethod
    def under(self, params: Params, programs: Programs) -> ItemLogRatios:
        """Return the log-ratios of the items with these parameters. Pure."""


@dataclass(frozen=True, eq=False)
class ActionItems(ScoredItems):
    """Items that are values of the action sites of a finite policy.

    Attributes:
        values: all joint values, {site: [values, *site shape]}.
        value: the number of each item's value, [items].
        context: the number of each item's context, [items].
        lengths: 1 for each.
    """

    values: Mapping[str, Any]
    value: np.ndarray
    context: np.ndarray
    lengths: np.ndarray

    @classmethod
    def of(cls, data: PreferenceData, programs: Programs) -> "ActionItems":
        """Find the values that the items name: `completion` is a number of a value, `prompt` one of a context.

        Raises:
            ObjectiveError: the policy has no list of values, or something else than actions.
            PreferenceError: an item names no value, or no context.
        """
        structure = programs.structure
        wrong = {
            "environment": "and judgements of outcomes of nature are none of its choices",
            "observed": "and its prior given the data has an unknown factor",
        }
        for site in structure.sites:
            if site.kind in wrong:
                raise ObjectiveError(f"the policy has {site.kind} site {site.name!r}, {wrong[site.kind]}; leave it out")
        if structure.subsampled:
            raise ObjectiveError(
                f"the policy takes mini-batches of plate {structure.subsampled[0]!r}, and judgements may be of any "
                "element; pass bayesrl.full_data(policy), and batch_size= to the objective"
            )
        count = joint_size(structure)
        if count is None:
            raise ObjectiveError(
                "judgements name actions by number, and the values of this policy cannot be listed: its action sites "
                "need finite supports, outside of scans, and no plates but contexts; texts need lm.policy(...) with "
                "guide=lm.LoRA() or lm.FullParameters()"
            )
        contexts = structure.num_contexts
        value = np.asarray([_number(item, "completion", count, "values", at) for at, item in enumerate(data.items)])
        named = [
            0 if contexts == 1 and "prompt" not in item else _number(item, "prompt", contexts, "contexts", at)
            for at, item in enumerate(data.items)
        ]
        values = GradientPlan((), (), (), structure.actions, 1).branches(structure)
        return cls({name: np.asarray(x) for name, x in values.items()}, value, np.asarray(named), np.ones(len(value)))

    def under(self, params: Params, programs: Programs) -> ItemLogRatios:
        """Score all values; see `ScoredItems.under`."""
        draws = programs.score(params, Draws.from_sites({name: jnp.asarray(x) for name, x in self.values.items()}))
        num = len(next(iter(self.values.values())))
        totals = draws.totals((num, *programs.structure.context_shape))
        table = -totals.ratio.reshape(num, -1)

        def log_ratios(items: Array) -> Array:
            return table[as_whole(self.value)[items], as_whole(self.context)[items]]

        def divergence(items: Array) -> Array:
            q = jnp.exp(totals.log_q.reshape(num, -1))
            own = jnp.where(q > 0, q * table, 0.0).sum(0)
            return lax.stop_gradient(own[as_whole(self.context)[items]].mean())

        return ItemLogRatios(log_ratios, divergence, draws)


def _number(item: Item, field: str, count: int, of: str, at: int) -> int:
    """Read the number that an item has under a field."""
    given = item.get(field)
    number = int(given) if isinstance(given, str) and given.strip().isdecimal() else -1
    if not 0 <= number < count:
        raise PreferenceError(
            f"item {at} has {field} {given!r:.60}, and the policy has {pluralize(count, of.removesuffix('s'))}; name "
            f"them by number, from '0' to '{count - 1}', as PreferenceData.of_pairs does"
            + (
                ""
                if field == "completion"
                else ", with the number of the context as the prompt: preferences.read([{'prompt': '0', 'chosen': '1', "
                "'rejected': '2'}])"
            )
        )
    return number

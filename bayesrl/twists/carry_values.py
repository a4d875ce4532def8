"""Values of a scan's carry with parameters: a table where the carry is finite, else a small network."""

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
from jax import Array

from bayesrl.compilation.random_keys import fold_in
from bayesrl.core.structure import FiniteSupport
from bayesrl.guides.policy_analysis import PolicyAnalysis, analyze_policy, prior_moments
from bayesrl.monte_carlo.particles.time_steps import TimeSteps, context_axes_of_carries
from bayesrl.monte_carlo.particles.twists import Axes, by_context
from bayesrl.typing import Params, PRNGKey

_MOST_CODES = 4096
_MOST_ONE_HOT = 64
_NUM_DRAWS = 64
_STEP = 0.1
"""Parameters of networks are stored at 1 / _STEP of their size, so that the rate of tables suits them, as in
`AutoTilt`."""

_PREFIX = "twist."


@dataclass(frozen=True, eq=False)
class CarryLeaf:
    """One leaf of a carry that draws move.

    Attributes:
        index: of the leaf.
        axes: where the context plates lie in it.
        width: how many numbers each context has.
        range: all values that these can take, or None.
        centre: of its numbers under the prior.
        scale: of its numbers under the prior.
    """

    index: int
    axes: Axes
    width: int
    range: FiniteSupport | None
    centre: float
    scale: float

    @property
    def num_codes(self) -> float:
        """Number of joint values; infinite without a range."""
        return math.inf if self.range is None else float(len(self.range)) ** self.width

    @property
    def one_hot(self) -> bool:
        """Whether the network reads indicators of its values."""
        return self.range is not None and len(self.range) * self.width <= _MOST_ONE_HOT

    def index_of(self, value: Array) -> Array:
        """Return the index of each number in the range."""
        return (value[..., None] == jnp.asarray(self.range)).argmax(-1)


@dataclass(frozen=True, eq=False)
class CarryValues:
    """A function of step and carry, one number for each context, with a value before the first step and after each.

    A table has an entry for each step, context and joint value of the leaves. A network shares its hidden layer
    among steps and contexts; each of these has a last layer of its own, beside a linear map. All start at 0.

    Attributes:
        leaves: that the values read.
        shape: of the contexts.
        length: steps of the scan.
        hidden: width of the network.
    """

    leaves: tuple[CarryLeaf, ...]
    shape: tuple[int, ...]
    length: int
    hidden: int

    @classmethod
    def of(cls, key: PRNGKey, steps: TimeSteps, hidden: int) -> "CarryValues":
        """Find out what the carry holds; the key is consumed.

        Raises:
            EngineError: the contexts cannot be told apart in the carry.
            GuideError: an action site is of an unknown kind.
        """
        programs = steps.programs
        structure, args = programs.structure, programs.args
        axes, _ = context_axes_of_carries(steps, {})
        facts = analyze_policy(fold_in(key, 0), programs.policy, structure, args, {})
        moments = prior_moments(fold_in(key, 1), programs.policy, structure, args, facts, _NUM_DRAWS)
        leaves = [
            _leaf(index, own, facts, moments, structure.context_shape)
            for index, own in enumerate(axes)
            if facts.carries[0][index].numeric and facts.carries[0][index].reached
        ]
        return cls(tuple(leaves), structure.context_shape, steps.length, hidden)

    @property
    def is_table(self) -> bool:
        """Whether a table holds the values."""
        return math.prod(leaf.num_codes for leaf in self.leaves) <= _MOST_CODES

    @property
    def num_features(self) -> int:
        """How many numbers of a context a network reads."""
        return sum(leaf.width * len(leaf.range or ()) if leaf.one_hot else leaf.width for leaf in self.leaves)

    def declare(self, key: PRNGKey) -> Params:
        """Declare the parameters, and return their values."""
        lead = (self.length + 1, math.prod(self.shape))
        if self.is_table:
            codes = int(math.prod(leaf.num_codes for leaf in self.leaves))
            return {"table": jnp.asarray(numpyro.param(f"{_PREFIX}table", jnp.zeros((*lead, codes))))}
        features, wide = self.num_features, self.hidden

        def random(_: Any = None) -> Array:
            return jax.random.normal(key, (wide, features)) / math.sqrt(features) / _STEP

        starts: dict[str, Any] = {
            "hidden": random,
            "bias": jnp.zeros(wide),
            "out": jnp.zeros((*lead, wide)),
            "skip": jnp.zeros((*lead, features)),
            "level": jnp.zeros(lead),
        }
        return {name: jnp.asarray(numpyro.param(f"{_PREFIX}{name}", start)) for name, start in starts.items()}

    def given(self, params: Params) -> Params:
        """Read the values of the parameters from those of a fit."""
        return {
            name.removeprefix(_PREFIX): jnp.asarray(value) for name, value in params.items() if name.startswith(_PREFIX)
        }

    def __call__(self, params: Params, step: Any, carry: Any) -> Array:
        """Return the value after a step, from −1 (before the first) on, [*contexts], nats."""
        place = step + 1
        if self.is_table:
            table = params["table"][place]
            value = jnp.take_along_axis(table, self._codes(carry)[:, None], -1)[:, 0]
            return value.reshape(self.shape)
        features = self._features(carry)
        own = {name: _STEP * value for name, value in params.items()}
        states = jnp.tanh(features @ own["hidden"].T + own["bias"])
        value = (own["out"][place] * states).sum(-1) + (own["skip"][place] * features).sum(-1) + own["level"][place]
        return value.reshape(self.shape)

    def _read(self, leaf: CarryLeaf, carry: Any) -> Array:
        """Return the numbers of a leaf, [contexts, width]."""
        value = jnp.asarray(jax.tree.leaves(carry)[leaf.index])
        return by_context(value[None], leaf.axes, self.shape)[0]

    def _codes(self, carry: Any) -> Array:
        code = jnp.zeros(math.prod(self.shape), jnp.int32)
        for leaf in self.leaves:
            for number in jnp.moveaxis(leaf.index_of(self._read(leaf, carry)), -1, 0):
                code = code * len(leaf.range or ()) + number.astype(jnp.int32)
        return code

    def _features(self, carry: Any) -> Array:
        parts = []
        for leaf in self.leaves:
            value = self._read(leaf, carry)
            if leaf.one_hot:
                parts.append(jax.nn.one_hot(leaf.index_of(value), len(leaf.range or ())).reshape(len(value), -1))
            else:
                number = (value.astype(float) - leaf.centre) / leaf.scale
                parts.append(jnp.sign(number) * jnp.log1p(jnp.abs(number)))
        return jnp.concatenate(parts, -1)


def _leaf(index: int, axes: Axes, facts: PolicyAnalysis, moments: Any, shape: tuple[int, ...]) -> CarryLeaf:
    fact, moment = facts.carries[0][index], moments[f"carry 0 {index}"]
    own = math.prod(n for n, axis in zip(shape, axes, strict=True) if axis is not None)
    width = math.prod(fact.shape) // own
    known = fact.range if fact.range is None or len(fact.range) <= _MOST_CODES else None
    return CarryLeaf(index, axes, width, known, float(np.ravel(moment.centre)[0]), float(np.ravel(moment.scale)[0]))

"""Guides of language models: train all parameters, or low-rank paths beside frozen weights."""

import abc
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpyro
from jax import Array

from bayesrl.arguments import Count, Positive, checked
from bayesrl.core.handlers import power
from bayesrl.core.structure import Structure
from bayesrl.errors import GuideError
from bayesrl.guides import AutoGuide, PolicyGuide
from bayesrl.lm.checkpoints.pretrained import Pretrained
from bayesrl.lm.policy_draws import TextDraws
from bayesrl.lm.prompted_policy import PromptedPolicy
from bayesrl.lm.transformers.base import CausalLM, Transformer
from bayesrl.lm.transformers.layers.linear_and_norm import Linear, is_linear
from bayesrl.moments.features import TiltedPolicy
from bayesrl.typing import Params, PRNGKey, Program
from bayesrl.value_checks import format_value

_MAX_RATE = 1e-3
_RATE_TIMES_WIDTH = 0.04
"""Rates fall as 1/width, with an upper bound for narrow models: at higher rates, Adam's first steps destroy a trained
model."""


class ModelGuide(PolicyGuide):
    """A guide of a `PromptedPolicy`: the same program with the model that `declare` makes of its parameters."""

    def __init__(self, policy: PromptedPolicy, declare: Callable[[], CausalLM]) -> None:
        super().__init__(lambda *args: policy.run(declare(), *args), within_prior=True)
        self.policy, self.declare = policy, declare
        self.origin, self.sampler = self, TextDraws()

    def __call__(self, *args: Any) -> Array:
        """Run as a guide: write, without rewards."""
        return self.policy.run(self.declare(), *args, rewarded=False)

    def with_policy(self, policy: Program) -> "ModelGuide":
        """Return the same guide of another policy of the same model, for its prompts and rewards."""
        if not isinstance(policy, PromptedPolicy):
            raise GuideError(f"the guide writes texts, and {format_value(policy)} was not made by bayesrl.lm.policy")
        return ModelGuide(policy, self.declare)

    def over_all_data(self) -> "ModelGuide":
        """Return the same guide without mini-batches of prompts."""
        if self.policy.batch_size is None:
            return self
        whole = ModelGuide(self.policy.over_all_data(), self.declare)
        whole.origin = self.origin
        return whole


@dataclass(frozen=True, kw_only=True)
class AutoModelGuide(AutoGuide):
    """Base of all guides of language models."""

    start: Pretrained | None = field(default=None, compare=False)  # of the same shape, instead of the reference

    @abc.abstractmethod
    def declare(self, key: PRNGKey, model: CausalLM) -> CausalLM:
        """Declare the trainable parameters, and return the model with them."""

    def build(self, key: PRNGKey, policy: Program, structure: Structure, args: tuple[Any, ...]) -> Program:
        """Build the guide; see `AutoGuide.build`."""
        policy = _prior_of(policy)
        if not isinstance(policy, PromptedPolicy):
            raise GuideError(
                f"{type(self).__name__} is for policies made by bayesrl.lm.policy, and {format_value(policy)} is not; "
                "use bayesrl.guides.AutoTilt()"
            )
        model = reference_of(policy, self.start)
        return ModelGuide(policy, lambda: self.declare(key, model))


def reference_of(policy: PromptedPolicy, start: Pretrained | None) -> CausalLM:
    """Return the model to start from: the reference, or another of its shape."""
    return policy.model if start is None else _check_start(start, policy)


def _prior_of(policy: Program) -> Program:
    """Return the policy inside a power, or inside one with given moments: its model is the same."""
    while isinstance(policy, power | TiltedPolicy):
        policy = policy.fn if isinstance(policy, power) else policy.policy
    return policy


@checked(GuideError)
@dataclass(frozen=True, kw_only=True)
class FullParameters(AutoModelGuide):
    """Train all parameters of the model, from a copy of the reference, so that the fit starts at the prior.

    Parameters are stored in float32, whatever dtype the model computes in, so that rounding does not lose small steps.

    Example:
        >>> from bayesrl.lm import FullParameters
        >>> FullParameters().learning_rate_for({})
        0.001
    """

    def learning_rate_for(self, params: Params) -> float:
        """Suggest an Adam rate: smaller for wider models."""
        return min(_MAX_RATE, _RATE_TIMES_WIDTH / _width(params))

    def declare[Model: Transformer](self, key: PRNGKey, model: Model) -> Model:
        """Declare one parameter per array; see `AutoModelGuide.declare`."""
        return declare_parameters(model)

    def overdispersed_init(self, key: PRNGKey, params: Params) -> Params:
        """Add noise of a tenth of its size to each array; see `AutoGuide.overdispersed_init`."""
        noise = {
            name: jax.random.normal(jax.random.fold_in(key, i), params[name].shape, params[name].dtype)
            for i, name in enumerate(sorted(params))
        }
        return {name: x + 0.1 * jnp.sqrt(jnp.mean(x**2)) * noise[name] for name, x in params.items()}


@checked(GuideError)
@dataclass(frozen=True)
class LoRA(AutoModelGuide):
    """Train low-rank paths U·D beside the frozen linear maps of the blocks: W·x + (scale / rank)·U·(D·x).

    The frozen weights are those of the reference, stored once. U starts at zero, so that the fit starts at the prior.

    Args:
        rank: of each path.
        scale: α; the path is multiplied by α / rank. By default twice the rank.

    Raises:
        GuideError: an option is out of range.

    Example:
        >>> from bayesrl.lm import LoRA
        >>> LoRA(rank=8).rank
        8

    References:
        Hu et al. (2022), "LoRA: low-rank adaptation of large language models", equation 3.
    """

    rank: Count = 8
    scale: Positive | None = None

    def learning_rate_for(self, params: Params) -> float:
        """Suggest an Adam rate: several times that of all parameters, since the paths start at zero."""
        return min(5 * _MAX_RATE, 10 * _RATE_TIMES_WIDTH / _width(params))

    def declare[Model: Transformer](self, key: PRNGKey, model: Model) -> Model:
        """Declare U and D of each linear map of the blocks; see `AutoModelGuide.declare`."""
        factor = (2.0 * self.rank if self.scale is None else self.scale) / self.rank
        leaves, treedef = jax.tree_util.tree_flatten_with_path(model, is_leaf=is_linear)
        adapted = [
            self._with_path(jax.random.fold_in(key, index), jax.tree_util.keystr(path), leaf, factor)
            # A path of one step leads to the head, which is not in a block.
            if is_linear(leaf) and len(path) > 1
            else leaf
            for index, (path, leaf) in enumerate(leaves)
        ]
        result: Model = jax.tree.unflatten(treedef, adapted)
        return result

    def _with_path(self, key: PRNGKey, name: str, linear: Linear, factor: float) -> Linear:
        out, wide = linear.weight.shape
        rank = min(self.rank, out, wide)

        # 1/√wide makes D·x about as large as x. NumPyro passes its own key, which depends on the order of sites.
        down = numpyro.param(f"model{name}.down", lambda _=None: jax.random.normal(key, (rank, wide)) / math.sqrt(wide))
        up = numpyro.param(f"model{name}.up", jnp.zeros((out, rank)))
        whole = linear.merge()  # an adapter of the reference stays part of the reference
        return Linear(whole.weight, whole.bias, down, up, factor)

    def overdispersed_init(self, key: PRNGKey, params: Params) -> Params:
        """Draw U so that each path adds about a tenth to its linear map; see `AutoGuide.overdispersed_init`."""
        result = {}
        for index, (name, value) in enumerate(sorted(params.items())):
            noise = jax.random.normal(jax.random.fold_in(key, index), value.shape, value.dtype)
            result[name] = value + 0.1 * noise / math.sqrt(value.shape[-1]) if name.endswith(".up") else value
        return result


def declare_parameters[Model: Transformer](model: Model) -> Model:
    """Declare every array of a model as a parameter in float32, and return the model that computes with them."""
    arrays, rest = eqx.partition(model, eqx.is_inexact_array)
    leaves, treedef = jax.tree_util.tree_flatten_with_path(arrays)
    own = [
        numpyro.param(f"model{jax.tree_util.keystr(path)}", leaf.astype(jnp.float32)).astype(leaf.dtype)
        for path, leaf in leaves
    ]
    result: Model = eqx.combine(jax.tree.unflatten(treedef, own), rest)
    return result


def _check_start(start: Pretrained, policy: PromptedPolicy) -> CausalLM:
    """Refuse a model whose shape or tokenizer differs from the reference's."""
    if (
        start.tokenizer is not None
        and policy.tokenizer is not None
        and start.tokenizer.digest != policy.tokenizer.digest
    ):
        raise GuideError(
            f"start= encodes texts differently (fingerprint {start.tokenizer.digest}) from the reference "
            f"({policy.tokenizer.digest}), so their log-probabilities cannot be compared; start from a model with the "
            "reference's tokenizer"
        )
    ours, theirs = (eqx.filter(model, eqx.is_array) for model in (policy.model, start.model))
    # The structure holds static fields as well, and so the configuration.
    same = bool(jax.tree.structure(ours) == jax.tree.structure(theirs))  # type: ignore[operator]
    if not same or any(a.shape != b.shape for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True)):
        raise GuideError(
            f"start= is a {type(start.model).__name__} of another shape than the reference "
            f"({start.model.config} and {policy.model.config}); start from a model of the same shape"
        )
    model: CausalLM = start.model  # type: ignore[assignment]
    return model


def _width(params: Params) -> int:
    """Return the width of a model: the most common last axis of its matrices."""
    # U has as many columns as the rank, which says nothing about the model.
    sizes = [int(value.shape[-1]) for name, value in params.items() if value.ndim >= 2 and not name.endswith(".up")]
    return max(sizes, key=sizes.count) if sizes else 1

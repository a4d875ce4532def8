"""A language model whose next token is tilted by a learned twist, and the guide that trains it."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpyro
from jax import Array
from numpyro.primitives import Messenger

from bayesrl.arguments import Count
from bayesrl.compilation.random_keys import fold_in
from bayesrl.core.structure import Structure
from bayesrl.errors import EngineError, GuideError, LanguageModelError
from bayesrl.guides import AutoGuide
from bayesrl.guides.networks import TiltNetwork
from bayesrl.lm.guides import AutoModelGuide, ModelGuide, reference_of
from bayesrl.lm.prompted_policy import TEXT, PromptedPolicy
from bayesrl.lm.text_distribution import CausalLMDistribution
from bayesrl.lm.transformers.base import CausalLM, Config
from bayesrl.lm.transformers.checkpoint_names import CheckpointTensor
from bayesrl.objectives.twist_learning import LIVE, TWIST
from bayesrl.twists.learning import register_twists
from bayesrl.typing import Params, PRNGKey, Program
from bayesrl.value_checks import format_value

_HEAD_RATE = 0.01


class _Caches(eqx.Module):
    """The caches of the reference and of the model that the twist reads with."""

    reference: Any
    reader: Any

    @property
    def axes(self) -> "_Caches":
        """The axes that `jax.vmap` needs; see `Cache.axes`."""
        return _Caches(self.reference.axes, self.reader.axes)


class TwistedLM(CausalLM):
    """A model of π₀·exp(ψ): the logits of the reference plus a twist of every next token.

        ψ(x_{1:t}) = head(h)[x_t] + (logits of the reader − logits of the reference)[x_t],   h = state before x_t

    Attributes:
        config: of the reference.
        reference: π₀.
        reader: a copy of it that is trained, or None: h is then the state of the reference, and the head all there is.
        head: a small network from the state to all tokens.
        temperature: that divides the logits; the twist is not divided.
    """

    config: Config = eqx.field(static=True)
    reference: CausalLM
    reader: CausalLM | None
    head: TiltNetwork
    temperature: float = eqx.field(static=True)

    @classmethod
    def init(cls, key: PRNGKey, config: Any, *, dtype: Any = jnp.float32) -> "TwistedLM":
        """Refuse: it is made from a reference."""
        raise LanguageModelError("a TwistedLM is made from its reference; call bayesrl.fit_twist")

    @classmethod
    def tensors(cls, config: Any) -> Iterator[CheckpointTensor]:
        """Refuse: no family of transformers has a twist."""
        raise LanguageModelError("a twist has no checkpoint of transformers; fit by guide=lm.LoRA() to save a model")

    def start(self, capacity: int) -> Any:
        """Make empty caches; see `CausalLM.start`."""
        own = self.reference.start(capacity)
        return own if self.reader is None else _Caches(own, self.reader.start(capacity))

    def extend(self, tokens: Array, mask: Array, cache: Any) -> tuple[Array, Any]:
        """Feed n tokens to both models; see `CausalLM.extend`. The states stand behind one another."""
        if self.reader is None:
            return self.reference.extend(tokens, mask, cache)
        theirs, first = self.reference.extend(tokens, mask, cache.reference)
        ours, second = self.reader.extend(tokens, mask, cache.reader)
        return jnp.concatenate([theirs, ours], -1), _Caches(first, second)

    def logits(self, hidden: Array) -> Array:
        """Return the tilted logits, which are then divided by the temperature; see `CausalLM.logits`."""
        own = self.reference.logits(hidden[..., : self.config.width])
        return own + self.temperature * self.twists(hidden)

    def twists(self, hidden: Array) -> Array:
        """Return ψ of every next token, [..., V], nats."""
        width = self.config.width
        theirs, ours = hidden[..., :width], hidden[..., -width:]
        flat = ours.reshape(-1, width).astype(jnp.float32)
        value = jax.vmap(self.head)(flat).reshape(*ours.shape[:-1], -1)
        if self.reader is None:
            return value
        return value + (self.reader.logits(ours) - self.reference.logits(theirs)) / self.temperature


def twist_by_step(answers: CausalLMDistribution, value: Array) -> Array:
    """Return ψ after each token of given texts, [..., *batch, T], nats; behind the end it stays as it was there."""

    def score(prompt: Array, mask: Array, tokens: Array) -> Array:
        twists = answers.model.twists(answers._all_hidden(prompt, mask, tokens)[0])
        chosen = jnp.take_along_axis(twists, tokens[:, None], -1)[:, 0]
        end = answers.text_mask(tokens).sum(-1) - 1
        return chosen[jnp.minimum(jnp.arange(len(tokens)), end)]

    return answers._map_texts(score, value)


class _TellTwists(Messenger):
    """Adds the sites that objectives of twists read."""

    def postprocess_message(self, msg: dict[str, Any]) -> None:
        if msg["type"] == "sample" and msg["name"] == TEXT:
            numpyro.deterministic(TWIST, twist_by_step(msg["fn"], msg["value"]))
            numpyro.deterministic(LIVE, msg["fn"].text_mask(msg["value"]))


class TwistedGuide(ModelGuide):
    """A guide that writes with a `TwistedLM`: π₀ tilted by the twist, token by token."""

    proposes = True

    def twist_values(self, params: Params) -> Any:
        """Refuse: texts have no carry."""
        raise EngineError(
            "the twist was learned of texts, and this program is none; fit a twist of it by bayesrl.fit_twist"
        )

    def __call__(self, *args: Any) -> Array:
        """Run as a guide: write, and tell the twist."""
        # Outside of the plate nothing would change, so the handler need not stand inside.
        with _TellTwists(None):
            return super().__call__(*args)


@dataclass(frozen=True, kw_only=True)
class TwistHead(AutoModelGuide):
    """Train the head of a `TwistedLM`, and what is trained underneath, if anything.

    Args:
        underneath: what to train below the head: `LoRA`, `FullParameters`, or None for the head alone.
        hidden: width of the head's hidden layer.
    """

    underneath: AutoModelGuide | None = None
    hidden: Count = 64

    def build(self, key: PRNGKey, policy: Program, structure: Structure, args: tuple[Any, ...]) -> Program:
        """Build the guide; see `AutoGuide.build`."""
        if not isinstance(policy, PromptedPolicy):
            raise GuideError("a twist of texts is for policies made by bayesrl.lm.policy")
        return TwistedGuide(policy, lambda: self._twisted(key, policy))

    def declare(self, key: PRNGKey, model: CausalLM) -> CausalLM:
        """Declare the trained part underneath; see `AutoModelGuide.declare`."""
        assert self.underneath is not None
        return self.underneath.declare(key, model)

    def _twisted(self, key: PRNGKey, policy: PromptedPolicy) -> TwistedLM:
        config = policy.model.config
        reader = None
        if self.underneath is not None:
            reader = self.declare(fold_in(key, 1), reference_of(policy, self.underneath.start))
        network = TiltNetwork(
            fold_in(key, 0), num_features=config.width, num_outputs=config.vocab_size, width=self.hidden
        )
        arrays, rest = eqx.partition(network, eqx.is_inexact_array)
        leaves, treedef = jax.tree_util.tree_flatten_with_path(arrays)
        own = [numpyro.param(f"head{jax.tree_util.keystr(path)}", leaf) for path, leaf in leaves]
        head = eqx.combine(jax.tree.unflatten(treedef, own), rest)
        return TwistedLM(config, policy.model, reader, head, policy.options["temperature"])

    def learning_rate_for(self, params: Params) -> float:
        """Suggest an Adam rate: that of what is trained underneath."""
        below = {name: value for name, value in params.items() if not name.startswith("head")}
        return _HEAD_RATE if self.underneath is None else self.underneath.learning_rate_for(below)

    def overdispersed_init(self, key: PRNGKey, params: Params) -> Params:
        """Perturb what is trained underneath, or the head alone; see `AutoGuide.overdispersed_init`."""
        below = {name: value for name, value in params.items() if not name.startswith("head")}
        if self.underneath is not None:
            return params | self.underneath.overdispersed_init(key, below)
        return {
            name: value + 0.1 * jax.random.normal(fold_in(key, i), value.shape, value.dtype)
            for i, (name, value) in enumerate(sorted(params.items()))
        }


def _head_of(guide: AutoGuide | None) -> TwistHead:
    if guide is not None and (not isinstance(guide, AutoModelGuide) or isinstance(guide, TwistHead)):
        raise GuideError(
            f"guide={format_value(guide)} trains no language model; use lm.LoRA(rank=8) or lm.FullParameters(), or "
            "None for the head alone"
        )
    return TwistHead(underneath=guide)


register_twists(PromptedPolicy, _head_of)

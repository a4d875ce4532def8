"""`Experts`: several feed-forward layers, of which each token chooses some."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from bayesrl.lm.transformers.layers.linear_and_norm import Linear
from bayesrl.typing import PRNGKey


class Expert(eqx.Module):
    """One gated feed-forward layer: narrow(act(gate(x)) ⊙ widen(x))."""

    gate: Linear
    widen: Linear
    narrow: Linear


class Experts(eqx.Module):
    """Gated feed-forward layers, mixed by the probabilities of those that a token chooses.

        y = Σ_{e ∈ chosen} p_e·expert_e(x),   p = softmax(R·x), made to sum to 1 over the chosen

    Every expert runs for every token, most with weight 0, so that tokens need no sorting by expert.

    Args:
        router: R.
        each: the layers.

    References:
        Jiang et al. (2024), "Mixtral of experts", section 2.1.
    """

    router: Linear
    each: tuple[Expert, ...]

    @classmethod
    def init(
        cls, key: PRNGKey, count: int, width: int, inner: int, *, scale: float, output_scale: float, dtype: Any
    ) -> "Experts":
        """Draw the weights; the key is consumed."""
        first, *keys = jax.random.split(key, 1 + 3 * count)
        plain: dict[str, Any] = {"bias": False, "dtype": dtype}
        each = tuple(
            Expert(
                gate=Linear.init(one, width, inner, scale=scale, **plain),
                widen=Linear.init(two, width, inner, scale=scale, **plain),
                narrow=Linear.init(three, inner, width, scale=output_scale, **plain),
            )
            # One iterator three times: each expert takes the next three keys.
            for one, two, three in zip(*[iter(keys)] * 3, strict=True)
        )
        return cls(Linear.init(first, width, count, scale=scale, **plain), each)

    def __call__(
        self, x: Float[Array, "n width"], act: Callable[[Array], Array], chosen: int
    ) -> Float[Array, "n width"]:
        """Feed each token to the experts that it chooses."""
        # Float32 logits: chances that bfloat16 rounds to one number would tie, and `top_k` breaks ties by index.
        chances = jax.nn.softmax(self.router.scores(x), axis=-1)
        best, which = jax.lax.top_k(chances, chosen)
        best = best / best.sum(-1, keepdims=True)
        weights = (best[..., None] * jax.nn.one_hot(which, chances.shape[-1])).sum(-2).astype(x.dtype)
        fed = [expert.narrow(act(expert.gate(x)) * expert.widen(x)) for expert in self.each]
        return jnp.einsum("ne,enw->nw", weights, jnp.stack(fed))

"""`Samples`: what a fitted language model writes, scored token by token beside what its reference writes."""

from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Bool, Float, Int

from bayesrl.arguments import Count, CountAboveOne, check_memory, checked
from bayesrl.compilation.keys import split_keys
from bayesrl.errors import LanguageModelError
from bayesrl.lm.checkpoints.saving import counted, write
from bayesrl.lm.completions import Prompts
from bayesrl.lm.guides import ModelGuide
from bayesrl.lm.prompted_policy import PromptedPolicy
from bayesrl.lm.sampling import reward_values
from bayesrl.posterior.posterior import Posterior
from bayesrl.statistics.estimates import Estimate
from bayesrl.typing import Params, PRNGKey


class Written(NamedTuple):
    """Completions of one model, [samples, prompts, ...].

    Attributes:
        tokens: [samples, prompts, T].
        real: which of them count, [samples, prompts, T].
        reward: the sum of all rewards, reward units, [samples, prompts].
        metrics: by name, [samples, prompts].
        log_q: of each token under the fitted model, nats, [samples, prompts, T].
        log_prior: of each token under the reference, nats, [samples, prompts, T].
        kl: KL(q‖π₀) of each next token, summed over the vocabulary, nats, [samples, prompts, T].
    """

    tokens: Int[np.ndarray, "samples prompts T"]
    real: Bool[np.ndarray, "samples prompts T"]
    reward: Float[np.ndarray, "samples prompts"]
    metrics: dict[str, Any]
    log_q: Float[np.ndarray, "samples prompts T"]
    log_prior: Float[np.ndarray, "samples prompts T"]
    kl: Float[np.ndarray, "samples prompts T"]

    @property
    def log_ratio(self) -> np.ndarray:
        """How much likelier the fit made each token, log q/π₀ in nats; 0 behind the end of a text."""
        return np.where(self.real, self.log_q - self.log_prior, 0.0)


class Samples(NamedTuple):
    """What a fit and its reference write for the same prompts.

    Attributes:
        prompts: that were answered.
        fitted: by the fit.
        prior: by the reference.
    """

    prompts: Prompts
    fitted: Written
    prior: Written

    def of(self, chosen: slice) -> "Samples":
        """Take what was written for some of the prompts."""
        fitted, prior = (jax.tree.map(lambda x: x[:, chosen], written) for written in (self.fitted, self.prior))
        return Samples(self.prompts.take(range(*chosen.indices(len(self.prompts)))), fitted, prior)


@checked(LanguageModelError)
def write_samples(key: PRNGKey, posterior: Posterior, num_samples: Count, prompts: Prompts | None = None) -> Samples:
    """Let a fit and its reference answer prompts, and score every token under both.

    Args:
        key: consumed whole.
        posterior: of a program made by `policy`; one temperature, the best restart is taken.
        num_samples: completions of each prompt.
        prompts: others than those fitted, or None.

    Raises:
        LanguageModelError: the posterior is of another kind; no sample was asked for.
        PolicyError: it holds several temperatures.
    """
    policy, guide, params = parts_of(posterior)
    asked = policy.prompts if prompts is None else prompts
    fit_key, prior_key = split_keys(key)
    fitted = _written(fit_key, guide, params, asked, num_samples, by_fit=True)
    return Samples(asked, fitted, _written(prior_key, guide, params, asked, num_samples, by_fit=False))


@checked(LanguageModelError)
def kl_of(
    key: PRNGKey, posterior: Posterior, num_samples: CountAboveOne = 64, prompts: Prompts | None = None
) -> tuple[Estimate, Estimate]:
    """Estimate KL(q‖π₀) of whole completions and of each position, with sums over the vocabulary.

    KL = Σ_t E_q[Σ_v q(v|x_<t)·log q(v|x_<t)/π₀(v|x_<t)]: the mean over samples of a sum that knows every next token,
    and so less noisy than log-ratios of what was drawn. For reports; why not in gradients is told in `ReverseKL`.

    Args:
        key: consumed whole.
        posterior: of a program made by `policy`.
        num_samples: completions of each prompt, at least 2.
        prompts: others than those fitted, or None.

    Returns:
        KL in nats per completion, and by position [T]; means over prompts, standard errors over samples.

    Raises:
        LanguageModelError: as `write_samples`; fewer than 2 samples.

    Example:
        >>> import jax, jax.numpy as jnp, bayesrl
        >>> from bayesrl.lm import GPT2, FullParameters, GPT2Config, kl_of, policy, rewards
        >>> model = GPT2.random(jax.random.key(0), GPT2Config(vocab_size=4, max_length=4, width=8, depth=1, heads=2))
        >>> ones = rewards.on_tokens(lambda tokens, real: jnp.sum(tokens == 1))
        >>> writer = policy(model, jnp.zeros((1, 1), int), reward=ones, max_new_tokens=3)
        >>> fit = bayesrl.fit(jax.random.key(1), writer, beta=1.0, guide=FullParameters(), num_steps=2, progress=False)
        >>> whole, by_position = kl_of(jax.random.key(2), fit)
        >>> by_position.mean.shape
        (3,)

    References:
        Amini, Vieira & Cotterell (2025), "Better estimation of the KL divergence between language models", equation 9.
    """
    policy, guide, params = parts_of(posterior)
    asked = policy.prompts if prompts is None else prompts
    index = _of_all(asked, num_samples)
    kl = write(key, guide, params, asked, index).kl.astype(float).mean(1)

    def estimate(values: np.ndarray) -> Estimate:
        return Estimate(values.mean(0), values.std(0, ddof=1) / np.sqrt(len(values)))

    return estimate(kl.sum(-1)), estimate(kl)


def prefix_rewards(policy: PromptedPolicy, asked: Prompts, written: Written, positions: np.ndarray) -> np.ndarray:
    """Give the reward of what was written up to some positions, [positions, samples, prompts]."""
    steps = np.arange(written.tokens.shape[-1])
    kept = np.stack([written.real & (steps <= position) for position in positions])
    index = np.broadcast_to(np.arange(len(asked)), kept.shape[:-1])
    tokens = np.broadcast_to(written.tokens, kept.shape)
    parts = list(reward_values(policy.rewards, asked, index, tokens, kept).values())
    return np.sum(parts, axis=0, dtype=float)


def _of_all(asked: Prompts, num_samples: int) -> np.ndarray:
    """Let every sample answer every prompt, [samples, prompts]."""
    what = f"{num_samples:,} completions of {len(asked):,} prompts"
    check_memory(24.0 * num_samples * len(asked), what, "ask for fewer", LanguageModelError)
    return np.broadcast_to(np.arange(len(asked), dtype=np.int32), (num_samples, len(asked)))


def _written(
    key: PRNGKey, guide: ModelGuide, params: Params, asked: Prompts, num_samples: int, *, by_fit: bool
) -> Written:
    """Write completions, and score them and give them their rewards."""
    policy, index = guide.policy, _of_all(asked, num_samples)
    texts = write(key, guide, params, asked, index, by_fit=by_fit)
    real = counted(policy, texts.tokens)
    found = reward_values({**policy.rewards, **policy.metrics}, asked, index, texts.tokens, real)
    total = np.sum([found[name] for name in policy.rewards], axis=0, dtype=np.float32)
    metrics = {name: found[name] for name in policy.metrics}
    return Written(texts.tokens, real, total, metrics, texts.log_q, texts.log_prior, texts.kl)


def parts_of(posterior: Posterior) -> tuple[PromptedPolicy, ModelGuide, Params]:
    """Give the policy, the guide and its parameters, of the best restart.

    Raises:
        LanguageModelError: the posterior is of another kind.
        PolicyError: it holds several temperatures, or was loaded without its policy.
    """
    one = posterior if posterior.num_restarts == 1 else posterior.select(restart="best")
    pair, params = one.unbatched()
    if not isinstance(pair.guide, ModelGuide):
        raise LanguageModelError(
            "the posterior is of no language model; fit what lm.policy makes, with guide=LoRA() or FullParameters()"
        )
    return pair.guide.policy, pair.guide, pair.constrain(params)

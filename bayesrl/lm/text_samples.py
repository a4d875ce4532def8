"""`TextSamples`: completions of a fitted language model and of its reference, scored token by token."""

from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Bool, Float, Int

from bayesrl.arguments import Count, CountAboveOne, check_memory, checked
from bayesrl.compilation.random_keys import split_keys
from bayesrl.errors import LanguageModelError
from bayesrl.lm.generation import generate
from bayesrl.lm.guides import ModelGuide
from bayesrl.lm.policy_draws import reward_texts, reward_values
from bayesrl.lm.prompted_policy import PromptedPolicy
from bayesrl.lm.prompts import Prompts
from bayesrl.lm.rewards.text import decode_completions
from bayesrl.lm.tokenization.chat_templates import MESSAGES
from bayesrl.posterior.posterior import Posterior
from bayesrl.statistics.estimates import Estimate, mean_of_draws
from bayesrl.typing import Params, PRNGKey


class ModelSamples(NamedTuple):
    """Completions of one model, [samples, prompts, ...].

    Attributes:
        tokens: [samples, prompts, T].
        mask: which tokens count, [samples, prompts, T].
        reward: the sum of all rewards, reward units, [samples, prompts].
        metrics: by name, [samples, prompts].
        log_q: of each token under the fitted model, nats, [samples, prompts, T].
        log_prior: of each token under the reference, nats, [samples, prompts, T].
        kl: KL(q‖π₀) of each next token, summed over the vocabulary, nats, [samples, prompts, T].
    """

    tokens: Int[np.ndarray, "samples prompts T"]
    mask: Bool[np.ndarray, "samples prompts T"]
    reward: Float[np.ndarray, "samples prompts"]
    metrics: dict[str, Any]
    log_q: Float[np.ndarray, "samples prompts T"]
    log_prior: Float[np.ndarray, "samples prompts T"]
    kl: Float[np.ndarray, "samples prompts T"]

    @property
    def log_ratio(self) -> np.ndarray:
        """How much likelier the fit made each token, log q/π₀ in nats; 0 after the end of a text."""
        return np.where(self.mask, self.log_q - self.log_prior, 0.0)


class TextSamples(NamedTuple):
    """Completions of a fit and of its reference for the same prompts.

    Attributes:
        prompts: the prompts.
        fitted: completions of the fit.
        prior: completions of the reference.
    """

    prompts: Prompts
    fitted: ModelSamples
    prior: ModelSamples

    def of(self, chosen: slice) -> "TextSamples":
        """Take the completions of some of the prompts."""
        fitted, prior = (jax.tree.map(lambda x: x[:, chosen], written) for written in (self.fitted, self.prior))
        return TextSamples(self.prompts.take(range(*chosen.indices(len(self.prompts)))), fitted, prior)

    def records(self, *, prior: bool = False) -> list[dict[str, Any]]:
        """Write completions as records: the prompt's own, with `completion`, `score` (the reward), and metrics by name.

        `bayesrl.preferences.read` knows them as ratings, and trainers as prompts with completions.

        Args:
            prior: whether to write the completions of the reference.
        """
        written = self.prior if prior else self.fitted
        examples, count = self.prompts.examples, len(self.prompts)
        tokens, mask = (x.reshape(-1, x.shape[-1]) for x in (written.tokens, written.mask))
        texts: list[Any] = [row[kept].tolist() for row, kept in zip(tokens, mask, strict=True)]
        if examples.tokenizer is not None:
            texts = decode_completions(examples, tokens, mask)
        prompt, there = np.asarray(self.prompts.tokens), np.asarray(self.prompts.mask)
        rows = []
        for at, text in enumerate(texts):
            own, example = divmod(at, count)
            row, answer = dict(examples[example]), text
            if examples.tokenizer is None:
                row["prompt"] = prompt[example][there[example]].tolist()
            elif MESSAGES in row:
                row["prompt"], answer = row.pop(MESSAGES), [{"role": "assistant", "content": text}]
            numbers = {"score": written.reward, **written.metrics}
            rows.append({**row, "completion": answer, **{name: float(x[own, example]) for name, x in numbers.items()}})
        return rows


@checked(LanguageModelError)
def sample_texts(key: PRNGKey, posterior: Posterior, num_samples: Count, prompts: Prompts | None = None) -> TextSamples:
    """Let a fit and its reference answer prompts, and score every token under both.

    Args:
        key: consumed whole.
        posterior: of a program made by `policy`, at one temperature; its best restart answers.
        num_samples: completions per prompt.
        prompts: prompts other than those of the fit, or None.

    Raises:
        LanguageModelError: the posterior is of another kind; `num_samples` is 0.
        PolicyError: it has several temperatures.

    Example:
        >>> import jax, jax.numpy as jnp, bayesrl
        >>> from bayesrl.lm import GPT2, FullParameters, GPT2Config, policy, rewards, sample_texts
        >>> model = GPT2.init(jax.random.key(0), GPT2Config(vocab_size=4, max_length=4, width=8, depth=1, heads=2))
        >>> writer = policy(model, jnp.zeros((1, 1), int), reward=rewards.length(), max_new_tokens=3)
        >>> fit = bayesrl.fit(jax.random.key(1), writer, beta=1.0, guide=FullParameters(), num_steps=2, progress=False)
        >>> sample_texts(jax.random.key(2), fit, 5).fitted.tokens.shape
        (5, 1, 3)
    """
    policy, guide, params = unpack_posterior(posterior)
    prompts = policy.prompts if prompts is None else prompts
    fit_key, prior_key = split_keys(key)
    fitted = _sample(fit_key, guide, params, prompts, num_samples, by_fit=True)
    return TextSamples(prompts, fitted, _sample(prior_key, guide, params, prompts, num_samples, by_fit=False))


@checked(LanguageModelError)
def estimate_kl(
    key: PRNGKey,
    posterior: Posterior,
    num_samples: CountAboveOne = 64,
    prompts: Prompts | None = None,
    *,
    by_position: bool = False,
) -> Estimate:
    """Estimate KL(q‖π₀) of whole completions, or of each position, with sums over the vocabulary.

    KL = Σ_t E_q[Σ_v q(v|x_<t)·log q(v|x_<t)/π₀(v|x_<t)]: the mean over samples of a sum over every next token, which
    is less noisy than log-ratios of the drawn tokens. For reports, not for gradients: see `ReverseKL`.

    Args:
        key: consumed whole.
        posterior: of a program made by `policy`.
        num_samples: completions per prompt, at least 2.
        prompts: prompts other than those of the fit, or None.
        by_position: whether to estimate the KL of each position, [T], rather than that of the whole completion.

    Returns:
        KL in nats, a mean over prompts, with the standard error over samples.

    Raises:
        LanguageModelError: as `sample_texts`; fewer than 2 samples.

    Example:
        >>> import jax, jax.numpy as jnp, bayesrl
        >>> from bayesrl.lm import GPT2, FullParameters, GPT2Config, estimate_kl, policy, rewards
        >>> model = GPT2.init(jax.random.key(0), GPT2Config(vocab_size=4, max_length=4, width=8, depth=1, heads=2))
        >>> writer = policy(model, jnp.zeros((1, 1), int), reward=rewards.length(), max_new_tokens=3)
        >>> fit = bayesrl.fit(jax.random.key(1), writer, beta=1.0, guide=FullParameters(), num_steps=2, progress=False)
        >>> estimate_kl(jax.random.key(2), fit, by_position=True).mean.shape
        (3,)

    References:
        Amini, Vieira & Cotterell (2025), "Better estimation of the KL divergence between language models", equation 9.
    """
    policy, guide, params = unpack_posterior(posterior)
    prompts = policy.prompts if prompts is None else prompts
    kl = generate(key, guide, params, prompts, _prompt_index(prompts, num_samples)).kl.astype(float).mean(1)
    values = kl if by_position else kl.sum(-1)
    return estimate_mean(values)


def estimate_mean(values: np.ndarray) -> Estimate:
    """Average over draws [draws, ...], with the standard error."""
    return mean_of_draws(values)


def prefix_rewards(
    policy: PromptedPolicy, prompts: Prompts, samples: ModelSamples, positions: np.ndarray
) -> np.ndarray:
    """Return the reward of the text up to some positions, [positions, samples, prompts]."""
    steps = np.arange(samples.tokens.shape[-1])
    # Rewards read only what the mask counts, so a text is cut short by its mask alone.
    masks = np.stack([samples.mask & (steps <= position) for position in positions])
    index = np.broadcast_to(np.arange(len(prompts)), masks.shape[:-1])
    tokens = np.broadcast_to(samples.tokens, masks.shape)
    parts = list(reward_values(policy.rewards, prompts, index, tokens, masks).values())
    return np.sum(parts, axis=0, dtype=float)


def _prompt_index(prompts: Prompts, num_samples: int) -> np.ndarray:
    """Let every sample answer every prompt, [samples, prompts]."""
    what = f"{num_samples:,} completions of {len(prompts):,} prompts"
    check_memory(24.0 * num_samples * len(prompts), what, "ask for fewer", LanguageModelError)
    return np.broadcast_to(np.arange(len(prompts), dtype=np.int32), (num_samples, len(prompts)))


def _sample(
    key: PRNGKey, guide: ModelGuide, params: Params, prompts: Prompts, num_samples: int, *, by_fit: bool
) -> ModelSamples:
    """Write completions, score them and compute their rewards."""
    policy, index = guide.policy, _prompt_index(prompts, num_samples)
    texts = generate(key, guide, params, prompts, index, by_fit=by_fit)
    rewarded = reward_texts(policy, prompts, index, texts.tokens)
    scores = (texts.log_q, texts.log_prior, texts.kl)
    return ModelSamples(texts.tokens, rewarded.mask, rewarded.total, rewarded.metrics, *scores)


def unpack_posterior(posterior: Posterior) -> tuple[PromptedPolicy, ModelGuide, Params]:
    """Return the policy, the guide and its parameters, of the best restart."""
    one = posterior if posterior.num_restarts == 1 else posterior.select(restart="best")
    programs, params = one.unbatched()
    if not isinstance(programs.guide, ModelGuide):
        raise LanguageModelError(
            "the posterior holds no language model; fit what lm.policy makes, with guide=LoRA() or FullParameters()"
        )
    return programs.guide.policy, programs.guide, programs.constrain(params)

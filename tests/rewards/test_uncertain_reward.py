"""Rewards that are not known: closed forms, enumeration, and what is refused."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from scipy.special import logsumexp, softmax
from scipy.stats import norm

import bayesrl
from bayesrl import lm, preferences, rewards
from bayesrl.errors import PreferenceError
from bayesrl.lm.prompts import Completions
from bayesrl.preferences.engines.laplace_approximation import Gaussian
from bayesrl.preferences.text_scores import LastLayerScores
from bayesrl.statistics.reward_beliefs import given_draws, recorded_beliefs

MEAN, SD = np.array([0.5, 1.0, 0.2]), np.array([0.1, 0.6, 0.0])
NORMAL = (MEAN, np.diag(SD**2))
RNG = np.random.default_rng(0)


def posterior(features: np.ndarray | None = None) -> preferences.RewardPosterior:
    """A posterior as Laplace's approximation gives it, without the cost of finding a mode."""
    data = preferences.PreferenceData.of_pairs([0] * 9 + [2], [1] * 9 + [0], [1] * 6 + [0] * 3 + [1])
    model = preferences.bradley_terry(data, features=features)
    # Information of ten comparisons at p = ½, beside the prior.
    design = np.eye(3) if features is None else features
    pairs = design[data.members[:, 0]] - design[data.members[:, 1]]
    covariance = np.linalg.inv(np.eye(design.shape[1]) + pairs.T @ pairs / 4)
    gaussian = Gaussian(covariance @ pairs.T @ (data.outcomes - 0.5), covariance)
    draws = {model.score_model.site: gaussian.draw(RNG, 1000)}
    return preferences.RewardPosterior(model, "laplace", draws, gaussian, None, None)


FREE = posterior()


def test_closed_forms_of_a_normal_law() -> None:
    for attitude, options, expected in (
        ("neutral", {}, MEAN),
        ("optimistic", {"beta": 0.3}, MEAN + SD**2 / 0.6),
        ("pessimistic", {"beta": 0.3}, MEAN - SD**2 / 0.6),
        ("quantile", {"level": 0.1}, norm.ppf(0.1, MEAN, np.maximum(SD, 1e-300))),
        ("sd_penalty", {"sds": 2.0}, MEAN - 2 * SD),
    ):
        made = rewards.uncertain(NORMAL, attitude=attitude, **options)  # type: ignore[arg-type]
        np.testing.assert_allclose(made.values, expected, rtol=1e-12)
        np.testing.assert_allclose(made(np.array([[2, 1]])), expected[None, [2, 1]], rtol=1e-6)


def test_exponential_attitudes_are_expectations() -> None:
    """The closed form is a sum over a fine grid of the normal law."""
    z = np.linspace(-12, 12, 4001)
    log_mass = norm.logpdf(z) - logsumexp(norm.logpdf(z))
    for sign, attitude in ((1, "optimistic"), (-1, "pessimistic")):
        by_sum = sign * 0.3 * logsumexp(sign * (MEAN[:, None] + SD[:, None] * z) / 0.3 + log_mass, axis=1)
        made = rewards.uncertain(NORMAL, attitude=attitude, beta=0.3)  # type: ignore[arg-type]
        np.testing.assert_allclose(made.values, by_sum, rtol=1e-9)


def test_few_draws_are_corrected() -> None:
    """Of 8,000 posteriors by 40 draws: the plain log of a mean is biased by 5 standard errors, ours by less than 3."""
    draws = RNG.normal(size=(40, 8000))
    plain = logsumexp(draws, axis=0) - np.log(40)
    attitude = rewards.uncertain(NORMAL, attitude="optimistic", beta=1.0).attitude
    ours = attitude.of_draws(draws, np, exact=False)
    # One draw carries more than half of a mean in one of a thousand cases, which have no value.
    told = np.isfinite(ours)
    truth, se = 0.5, ours[told].std() / 8000**0.5
    assert plain.mean() < truth - 5 * se
    assert told.mean() > 0.99
    assert abs(np.where(told, ours, plain).mean() - truth) < 3 * se
    np.testing.assert_allclose(attitude.of_draws(jnp.asarray(draws), jnp, exact=False), ours, atol=1e-4)


def test_draws_and_ensembles() -> None:
    draws = RNG.normal(MEAN, SD, size=(4000, 3))
    sampled = rewards.uncertain(draws, attitude="pessimistic", beta=1.0)
    assert abs(sampled.values - (MEAN - SD**2 / 2)).max() < 4 * 0.6 / 4000**0.5
    np.testing.assert_allclose(rewards.uncertain(draws, attitude="worst").values, draws.min(0))
    np.testing.assert_allclose(rewards.uncertain(draws, attitude="quantile").values, np.quantile(draws, 0.05, axis=0))
    members = [lambda x: x, lambda x: 1.0 - x]
    ensemble = rewards.uncertain(members, attitude="optimistic", beta=0.5)
    np.testing.assert_allclose(ensemble(jnp.array(0.1)), 0.5 * np.log((np.exp(0.2) + np.exp(1.8)) / 2), rtol=1e-6)
    np.testing.assert_allclose(
        rewards.uncertain(members, attitude="worst")(jnp.array([0.1, 0.7])), [0.1, 0.3], rtol=1e-6
    )


def test_unknown_is_averaged_and_chosen_is_optimistic() -> None:
    """Two worlds, drawn by nature or by the policy: enumeration gives the tilts by the mean and by log E exp."""
    table = jnp.array([[0.5, 0.0, -1.0], [0.5, 1.0, 1.4]])
    members, beta = [table[0].__getitem__, table[1].__getitem__], 0.2

    def with_world(draw: Any) -> Any:
        def program() -> None:
            world = draw("world", dist.Categorical(probs=jnp.array([0.5, 0.5])))
            item = numpyro.sample("item", dist.Categorical(logits=jnp.zeros(3)))
            bayesrl.reward("r", table[world, item])

        return program

    def judged(attitude: Any, **options: Any) -> np.ndarray:
        reward = rewards.uncertain(members, attitude=attitude, **options)

        def program() -> None:
            bayesrl.reward("r", reward(numpyro.sample("item", dist.Categorical(logits=jnp.zeros(3)))))

        return np.exp(bayesrl.enumerate_posterior(program, beta=beta).log_weights)

    def marginal(program: Any) -> np.ndarray:
        exact = bayesrl.enumerate_posterior(program, beta=beta)
        return np.bincount(np.asarray(exact.sites["item"]), np.exp(exact.log_weights), 3)

    unknown = with_world(lambda name, law: bayesrl.environment(name, law, observable=False))
    np.testing.assert_allclose(marginal(unknown), judged("neutral"), atol=1e-5)
    np.testing.assert_allclose(judged("neutral"), softmax(np.array([0.5, 0.5, 0.2]) / beta), atol=1e-5)
    np.testing.assert_allclose(marginal(with_world(numpyro.sample)), judged("optimistic", beta=beta), atol=1e-5)
    assert judged("pessimistic", beta=beta)[0] > 0.8


def test_a_posterior_by_items_features_and_draws() -> None:
    free = rewards.uncertain(FREE, attitude="pessimistic", beta=0.5)
    np.testing.assert_allclose(free.values, FREE.mean.mean - FREE.sd**2, rtol=1e-9)
    features = np.array([[1.0, 0.2], [0.3, -1.0], [-0.5, 0.8]])
    linear = posterior(features)
    wary = rewards.uncertain(linear, attitude="pessimistic", beta=0.5)
    np.testing.assert_allclose(wary.values, linear.mean.mean - linear.sd**2, rtol=1e-9)
    np.testing.assert_allclose(wary(features.astype(np.float32)), wary.values, rtol=1e-5)
    sampled = replace(linear, method="nuts", gaussian=None)
    by_draws = rewards.uncertain(sampled, attitude="pessimistic", beta=2.0)
    assert abs(by_draws.values - (linear.mean.mean - linear.sd**2 / 4)).max() < 4 * linear.sd.max() / 1000**0.5
    np.testing.assert_allclose(by_draws(features.astype(np.float32)), by_draws.values, rtol=1e-4)
    assert "pessimistic at β = 0.5, of a RewardPosterior by laplace" in repr(wary)


def test_differences_from_a_reference_do_not_depend_on_the_origin_of_features() -> None:
    features = np.array([[1.0, 0.2], [0.3, -1.0], [-0.5, 0.8]])
    moved, prior = posterior(features + 3.0), np.array([0.2, 0.3, 0.5])
    kept = {reference is None: [] for reference in (None, prior)}  # type: dict[bool, list[np.ndarray]]
    for one in (posterior(features), moved):
        for reference in (None, prior):
            made = rewards.uncertain(one, attitude="pessimistic", beta=0.5, reference=reference)
            kept[reference is None].append(made.values - made.values[0])
    assert abs(kept[True][0] - kept[True][1]).max() > 0.3
    np.testing.assert_allclose(*kept[False], atol=1e-2)
    to_item = rewards.uncertain(FREE, attitude="pessimistic", beta=0.5, reference=1)
    assert to_item.values[1] == to_item.sd[1] == 0
    contrast = np.array([1.0, -1.0, 0.0])
    np.testing.assert_allclose(to_item.sd[0] ** 2, contrast @ FREE.covariance @ contrast, rtol=1e-9)
    sampled = rewards.uncertain(FREE.scores, reference=[0.5, 0.5, 0.0])
    np.testing.assert_allclose(sampled.mean[:2].sum(), 0.0, atol=1e-9)


def test_a_joint_draw_takes_the_place_of_the_attitude() -> None:
    """Also under a jit of the user's, which JAX would otherwise not trace again."""
    first, second = rewards.uncertain(FREE), rewards.uncertain(FREE, attitude="quantile", reference=1)
    both = jax.jit(lambda item: first(item) + 0.0 * second(item))
    summary = both(0)
    with recorded_beliefs() as called:
        jax.eval_shape(both, 0)
    assert list(called) == [id(FREE)]
    draws = called[id(FREE)].latent_draws(np.random.default_rng(0), 5)
    for draw in draws:
        with given_draws({id(FREE): draw}):
            np.testing.assert_allclose(both(0), draw[0], rtol=1e-6)
            np.testing.assert_allclose(second(0), draw[0] - draw[1], rtol=1e-5)
    np.testing.assert_allclose(both(0), summary)


def test_texts_are_scored_by_what_the_last_layer_reads() -> None:
    tokenizer = lm.char_tokenizer("abc ")
    config = lm.GPT2Config(vocab_size=tokenizer.vocab_size, max_length=8, width=8, depth=1, heads=2)
    model = lm.Pretrained(lm.GPT2.init(jax.random.key(0), config), tokenizer)
    reader = preferences.TextScores(model)
    items = [{"prompt": "a ", "completion": text} for text in ("bb", "c")]
    features = reader.features_of(*reader.tokens_of(items))
    data = preferences.read([{"prompt": "a ", "chosen": "b", "rejected": "cc"}])
    known = preferences.bradley_terry(data, features=np.eye(2, 8))
    own = LastLayerScores(np.eye(2, 8), 1.0, reader)
    gaussian = Gaussian(np.linspace(-1, 1, 8), np.diag(np.linspace(0.1, 1, 8)))
    fitted = preferences.RewardPosterior(
        replace(known, score_model=own), "laplace", {"weights": gaussian.draw(RNG, 9)}, gaussian, None, None
    )
    wary = rewards.uncertain(fitted, attitude="pessimistic", beta=0.5)
    relative = rewards.uncertain(fitted, reference="known")
    prompts = lm.encode_prompts([{"prompt": "a ", "known": "bb"}], tokenizer)
    tokens = jnp.array(tokenizer.encode(["bb", "cc"], special=False))
    mask = jnp.array([[True, True], [True, False]])
    index, prompt = jnp.zeros(2, int), jnp.repeat(prompts.tokens, 2, 0)
    written = Completions(index, prompt, prompt >= 0, tokens, mask, prompts.examples)
    found, less = jax.jit(lambda tokens: [r(replace(written, tokens=tokens)) for r in (0.5 * wary, relative)])(tokens)
    np.testing.assert_allclose(less, (features - features[0]) @ gaussian.mean, rtol=1e-4, atol=1e-5)
    assert relative.fields == {"known"}
    expected = features @ gaussian.mean - np.einsum("nd,de,ne->n", features, gaussian.covariance, features)
    np.testing.assert_allclose(found, 0.5 * expected, rtol=1e-4, atol=1e-5)
    assert wary.separate
    assert wary.fields == frozenset()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: rewards.uncertain(FREE, attitude="optimistic"), "needs beta="),
        (lambda: rewards.uncertain(FREE, beta=0.5), "the attitude has no temperature"),
        (lambda: rewards.uncertain(FREE, attitude="worst"), "a normal posterior is unbounded below"),
        (lambda: rewards.uncertain(RNG.standard_t(2, size=(4000, 3)), attitude="optimistic", beta=3.0),
         "attitude='optimistic' is unbounded for this posterior"),
        (lambda: rewards.uncertain(RNG.normal(size=(100, 2)), attitude="pessimistic", beta=0.01), "one draw carries"),
        (lambda: rewards.uncertain(np.zeros((2, 0))), r"of shape \(2, 0\)"),
        (lambda: rewards.uncertain((np.zeros(2), -np.eye(2))), "no negative eigenvalue"),
        (lambda: rewards.uncertain(FREE, reference=3), "from 0 to 2"),
        (lambda: rewards.uncertain(FREE, reference=[0.5, 0.2, 0.1]), "probabilities of the 3 items"),
        (lambda: rewards.uncertain([abs], reference=0), "an ensemble of functions has none"),
        (lambda: rewards.uncertain(FREE)(3), "use 0 to 2"),
        (lambda: rewards.uncertain(FREE)(np.array([0.5, 1.0])), "pass item numbers"),
        (lambda: rewards.uncertain(FREE)("a"), "pass item numbers, features, or completions"),
        (lambda: rewards.uncertain([lambda x: x, lambda x: x[None]])(jnp.zeros(2)), "members of the ensemble"),
    ],
)  # fmt: skip
def test_bad_input_is_refused(call: Any, message: str) -> None:
    with pytest.raises(PreferenceError, match=message):
        call()


def test_items_that_do_not_exist_have_no_reward() -> None:
    assert np.isnan(jax.jit(rewards.uncertain(FREE))(jnp.array([-1, 3]))).all()

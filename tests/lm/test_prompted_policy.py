"""Language models as policies: fits, gradients and evidence against all 125 sentences of a small one.

The model has five tokens and writes three, after two prompts, each a context. J* = β·mean log Z by hand.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import optax
import pytest
from jax import Array
from numpyro import handlers
from scipy.special import logsumexp

import bayesrl
from bayesrl.core.programs import Programs
from bayesrl.core.structure import inspect
from bayesrl.errors import BayesRLError, FitError, GuideError, LanguageModelError, RunFolderError
from bayesrl.lm import (
    GPT2,
    BertClassifier,
    BertConfig,
    CausalLMDistribution,
    FullParameters,
    GPT2Config,
    LoRA,
    Pretrained,
    char_tokenizer,
    encode_prompts,
    finetuned,
    load_pretrained,
    policy,
    rewards,
    save_pretrained,
)
from bayesrl.lm.prompted_policy import PromptedPolicy
from bayesrl.objectives import ClippedKL, ForwardKL, ReverseKL
from bayesrl.posterior.posterior import Posterior

V, T, BETA = 5, 3, 0.5
CONFIG = GPT2Config(vocab_size=V, max_length=8, width=8, depth=1, heads=2, tied=False, initializer_range=0.4)
TOKENS = np.array([[0, 3], [2, 4]])
TOKENIZER = char_tokenizer("ab")
RECORDS = [{"prompt": text} for text in ("a", "b", "ab", "bba", "")]
PAIR = {"prompt": "a", "chosen": "b", "rejected": "ab"}
K_SIGMA = 6.0


def ones(tokens: Any, mask: Any) -> Any:
    return jnp.sum((tokens == 1) & mask) - 0.5 * (tokens[0] == 2)


@pytest.fixture(scope="module")
def model() -> GPT2:
    return GPT2.init(jax.random.key(3), CONFIG)


@pytest.fixture(scope="module")
def writer(model: GPT2) -> PromptedPolicy:
    return policy(model, TOKENS, reward=rewards.token_reward(ones), max_new_tokens=T)


@pytest.fixture(scope="module")
def answerer(model: GPT2) -> PromptedPolicy:
    """Answers five prompts of unequal length, two at a time; its eos token ends an answer."""
    tall = rewards.token_reward(lambda tokens, mask: 1.0 * jnp.sum(tokens == 3))
    return policy(
        Pretrained(model, TOKENIZER),
        RECORDS,
        reward={"tall": tall, "brief": -0.25 * rewards.length()},
        metrics={"length": rewards.length()},
        max_new_tokens=T,
        batch_size=2,
    )


@pytest.fixture(scope="module")
def sweep(writer: PromptedPolicy) -> Posterior:
    return bayesrl.fit(
        jax.random.key(0),
        writer,
        beta=np.array([BETA, 2.0]),
        guide=FullParameters(),
        num_steps=200,
        num_restarts=2,
        optimizer=optax.adam(optax.cosine_decay_schedule(0.02, 200)),
        progress=False,
    )


@pytest.fixture(scope="module")
def one(sweep: Posterior) -> Posterior:
    return sweep.select(beta=BETA, restart="best")


@jax.jit
def scored(sentences: CausalLMDistribution, tokens: Array) -> Array:
    return sentences.log_prob(tokens)


class Exact:
    """J of any model on a policy's prompts, by listing all sentences."""

    def __init__(self, policy: PromptedPolicy, beta: float, asked: Any = None) -> None:
        asked = policy.prompts if asked is None else asked
        self.policy, self.asked, self.beta = policy, asked, beta
        rows = np.asarray(self.sentences(policy.model).finite_values)
        self.rows = jnp.asarray(np.repeat(rows[:, None], len(asked), 1))
        mask = np.asarray(self.sentences(policy.model).text_mask(jnp.asarray(rows)))
        count = (rows == 3).sum(-1) - 0.25 * mask.sum(-1) if policy.tokenizer else by_hand(rows)
        self.reward = count[:, None].astype(float)
        self.log_prior = np.asarray(scored(self.sentences(policy.model), self.rows), float)

    def sentences(self, model: Any) -> CausalLMDistribution:
        return self.policy.distribution(model, self.asked.tokens, self.asked.mask)

    @property
    def log_evidence(self) -> np.ndarray:
        return logsumexp(self.log_prior + self.reward / self.beta, axis=0)

    def objective(self, model: Any) -> float:
        log_q = np.asarray(scored(self.sentences(model), self.rows), float)
        return float((np.exp(log_q) * (self.reward - self.beta * (log_q - self.log_prior))).sum(0).mean())

    def share(self, model: Any) -> float:
        """Which share of what there was to gain a model has, (J − J(π₀)) / (J* − J(π₀))."""
        best, start = self.beta * float(self.log_evidence.mean()), self.objective(self.policy.model)
        return (self.objective(model) - start) / (best - start)


def by_hand(rows: np.ndarray) -> np.ndarray:
    return (rows == 1).sum(-1) - 0.5 * (rows[:, 0] == 2)


@pytest.fixture(scope="module")
def exact(writer: PromptedPolicy) -> Exact:
    return Exact(writer, BETA)


# ---- evidence ----------------------------------------------------------------------------------


def test_enumeration_agrees_with_a_sum_by_hand(writer: PromptedPolicy, exact: Exact) -> None:
    found = bayesrl.enumerate_posterior(writer, beta=BETA)
    assert found.sites["text"].shape == (V**T, 2, T)
    np.testing.assert_allclose(found.log_evidence.mean, exact.log_evidence, rtol=1e-4)
    np.testing.assert_allclose(found.estimates.objective.mean, BETA * exact.log_evidence.mean(), rtol=1e-4)


def test_importance_covers_the_evidence(writer: PromptedPolicy, exact: Exact) -> None:
    """Both contexts within 5 standard errors: 1.2e-6 false alarms."""
    found = bayesrl.importance(jax.random.key(0), writer, beta=BETA, num_samples=4000)
    assert (found.log_evidence.se < 0.1).all()
    assert (np.abs(found.log_evidence.mean - exact.log_evidence) < 5 * found.log_evidence.se).all()


# ---- fits --------------------------------------------------------------------------------------


def test_a_sweep_with_restarts_gets_close_to_every_optimum(
    writer: PromptedPolicy, sweep: Posterior, exact: Exact
) -> None:
    """At least 85 % of J* − J(π₀), both at β = .5 and 2, and in both restarts."""
    assert sweep.batch_shape == (2, 2)
    for beta in (BETA, 2.0):
        truth = exact if beta == BETA else Exact(writer, beta)
        for restart in range(2):
            made = finetuned(sweep.select(beta=beta, restart=restart)).model
            assert 0.85 < truth.share(made) < 1.0 + 1e-6


def test_forward_kl_gets_close_to_the_optimum(writer: PromptedPolicy, exact: Exact) -> None:
    """At least 95 % of J* − J(π₀)."""
    posterior = bayesrl.fit(
        jax.random.key(1),
        writer,
        beta=BETA,
        guide=FullParameters(),
        objective=ForwardKL(128),
        num_steps=150,
        optimizer=optax.adam(optax.cosine_decay_schedule(0.02, 150)),
        progress=False,
    )
    assert exact.share(finetuned(posterior).model) > 0.95


def test_the_reference_stays_as_it_is(model: GPT2, writer: PromptedPolicy, one: Posterior, exact: Exact) -> None:
    for now, then in zip(*map(jax.tree.leaves, (writer.model, GPT2.init(jax.random.key(3), CONFIG))), strict=True):
        np.testing.assert_array_equal(now, then)
    totals = one.totals(jax.random.key(5), 20)
    drawn = one.sample(jax.random.key(5), 20)["text"]
    assert drawn.shape == (1, 20, 2, T)
    np.testing.assert_allclose(totals.log_prior, scored(exact.sentences(model), drawn), atol=1e-5)
    np.testing.assert_allclose(totals.log_q, scored(exact.sentences(finetuned(one).model), drawn), atol=1e-4)
    assert np.abs(np.asarray(totals.log_q) - np.asarray(totals.log_prior)).max() > 0.5


def bound(program: PromptedPolicy, guide: Any) -> tuple[Programs, dict[str, Array]]:
    structure = inspect(jax.random.key(0), program)
    built = guide.build(jax.random.key(1), program, structure, ())
    programs = Programs(program, built, structure, (), {})

    @jax.jit  # which leaves out what a draw takes
    def declare_parameters() -> dict[str, Array]:
        recorded = handlers.trace(handlers.seed(built, jax.random.key(2))).get_trace()
        return {name: site["value"] for name, site in recorded.items() if site["type"] == "param"}

    return programs, declare_parameters()


@pytest.mark.parametrize("guide", [FullParameters(), LoRA(rank=2)])
def test_a_fit_starts_at_the_prior(writer: PromptedPolicy, guide: Any) -> None:
    programs, params = bound(writer, guide)
    drawn = jax.jit(lambda: programs.draw(jax.random.key(0), params, 30))()
    np.testing.assert_array_equal(drawn.log_q["text"], drawn.log_prior["text"])
    spread = guide.overdispersed_init(jax.random.key(4), params)
    moved = jax.jit(programs.log_q)(spread, drawn)["text"]
    assert 0.01 < np.abs(np.asarray(moved) - np.asarray(drawn.log_prior["text"])).mean() < 2.0
    if isinstance(guide, LoRA):
        # Four linear maps: rank × (in + out) numbers each.
        assert sum(value.size for value in params.values()) == 2 * (8 + 24 + 8 + 8 + 8 + 32 + 32 + 8)
    else:
        assert sum(value.size for value in params.values()) == sum(x.size for x in jax.tree.leaves(writer.model))


def test_the_gradient_is_unbiased(writer: PromptedPolicy, exact: Exact) -> None:
    """1,408 coordinates within K_SIGMA = 6 standard errors, means of 1,500 gradients: 3e-6 false alarms."""
    programs, params = bound(writer, FullParameters())
    params = FullParameters().overdispersed_init(jax.random.key(7), params)
    ready = ReverseKL(16, enumerated=()).prepare(jax.random.key(1), programs, params)
    assert not ready.plan.enumerated  # type: ignore[union-attr]

    @jax.jit
    def moments(keys: Array) -> Any:
        def one(key: Array) -> Any:
            return jax.grad(lambda p: -BETA * ready.evaluate(key, p, programs, BETA)[0])(params)

        found = jax.lax.map(one, keys, batch_size=250)
        return jax.tree.map(lambda g: (g.mean(0), g.std(0) / len(keys) ** 0.5), found)

    @jax.jit
    @jax.grad
    def truth(params: Any) -> Array:
        model = handlers.substitute(programs.guide.declare, data=params)()  # type: ignore[union-attr]
        log_q = exact.sentences(model).log_prob(exact.rows)
        gain = exact.reward - BETA * (log_q - exact.log_prior)
        return (jnp.exp(log_q) * gain).sum(0).mean()

    wanted, found = jax.tree.map(np.asarray, (truth(params), moments(jax.random.split(jax.random.key(2), 1500))))
    largest = max(np.abs(value).max() for value in wanted.values())
    assert largest > 0.01
    for name, value in wanted.items():
        mean, error = found[name]
        assert (np.abs(mean - value) <= K_SIGMA * error + 2e-5 * largest).all(), name


def test_the_fitted_policy_is_the_next_prior(one: Posterior, exact: Exact) -> None:
    """Tilting q by the reward again: its evidence is Σ q·exp(R/β); within 5 standard errors, 1.2e-6 false alarms."""
    found = bayesrl.importance(jax.random.key(0), one.policy, beta=2.0, num_samples=2000)
    log_q = np.asarray(scored(exact.sentences(finetuned(one).model), exact.rows), float)
    wanted = logsumexp(log_q + exact.reward / 2.0, axis=0)
    assert (np.abs(found.log_evidence.mean - wanted) < 5 * found.log_evidence.se + 1e-4).all()
    assert (found.log_evidence.se < 0.1).all()


def test_a_fitted_model_is_saved_and_loaded(answered: Posterior, answerer: PromptedPolicy, tmp_path: Path) -> None:
    """Low-rank paths are added to the weights: merged, saved and loaded, the model is the guide."""
    made = finetuned(answered)
    assert made.tokenizer is answerer.tokenizer
    assert jax.tree.structure(made.model) == jax.tree.structure(answerer.model)
    asked = answerer.prompts
    drawn = answered.sample(jax.random.key(5), 20, asked)["text"]
    log_q = answered.totals(jax.random.key(5), 20, asked).log_q
    save_pretrained(tmp_path, made.model, made.tokenizer)
    loaded = load_pretrained(tmp_path)
    for model in (made.model, loaded.model):
        sentences = answerer.distribution(model, asked.tokens, asked.mask)
        np.testing.assert_allclose(scored(sentences, drawn), log_q, atol=2e-4)
    prior = scored(answerer.distribution(answerer.model, asked.tokens, asked.mask), drawn)
    assert np.abs(np.asarray(prior) - np.asarray(log_q)).max() > 0.5


# ---- prompts -----------------------------------------------------------------------------------

FITTED: dict[str, Any] = {"guide": LoRA(rank=4), "objective": ClippedKL()}
STEPS = 240


def adam() -> optax.GradientTransformation:
    return optax.adam(optax.cosine_decay_schedule(0.03, STEPS))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("run") / "fit"


@pytest.fixture(scope="module")
def answered(answerer: PromptedPolicy, folder: Path) -> Posterior:
    return bayesrl.fit(
        jax.random.key(0),
        answerer,
        beta=BETA,
        **FITTED,
        source=bayesrl.ReuseDraws(32, num_updates=4),
        optimizer=adam(),
        num_steps=STEPS,
        directory=folder,
        progress=False,
    )


def test_reused_draws_and_low_rank_get_close_to_the_optimum(answerer: PromptedPolicy, answered: Posterior) -> None:
    """At least 75 % of J* − J(π₀), over all five prompts."""
    assert Exact(answerer, BETA).share(finetuned(answered).model) > 0.75
    assert {"metrics/length", "metrics/clipped"} <= set(answered.history)
    assert answered.history["metrics/clipped"].max() > 0, "some ratios were clipped"


def test_prompts_are_a_plate_that_is_subsampled(answerer: PromptedPolicy, answered: Posterior) -> None:
    seen = answered.sample(jax.random.key(0), 200)
    assert seen["text"].shape == (1, 200, 2, T)
    structure = inspect(jax.random.key(0), answerer)
    assert structure.context_shape == (2,)
    recorded: dict[str, Any] = {}

    def trace() -> None:
        recorded.update(handlers.trace(handlers.seed(answerer, jax.random.key(0))).get_trace())

    jax.eval_shape(trace)
    assert recorded["prompt"]["args"] == (5, 2)
    assert recorded["text"]["scale"] == 2.5
    assert recorded["text"]["value"].shape == (2, T)


def test_held_out_prompts_are_an_argument(answerer: PromptedPolicy, answered: Posterior) -> None:
    """J, E[R] and the metric on other prompts, within 5 standard errors of sums over all sentences: 2e-6 false alarms."""
    asked = encode_prompts(["aab", "bb", "baba"], TOKENIZER)
    found = answered.estimate(jax.random.key(3), 1000, asked)
    truth, made = Exact(answerer, BETA, asked), finetuned(answered).model
    q = np.exp(np.asarray(scored(truth.sentences(made), truth.rows), float))
    length = np.asarray(truth.sentences(made).text_mask(truth.rows)).sum(-1)
    wanted = {
        "objective": truth.objective(made),
        "reward": (q * truth.reward).sum(0).mean(),
        "length": (q * length).sum(0).mean(),
    }
    told = {"objective": found.objective, "reward": found.reward, "length": found.metrics["length"]}
    for name, value in wanted.items():
        assert abs(float(told[name].mean[0]) - value) < 5 * float(told[name].se[0]) + 1e-4, name
        assert float(told[name].se[0]) < 0.05


def test_several_rewards_add_up_and_metrics_are_told(answerer: PromptedPolicy, answered: Posterior) -> None:
    drawn, totals = answered.sample(jax.random.key(1), 50), answered.totals(jax.random.key(1), 50)
    ended = np.cumsum(drawn["text"] == TOKENIZER.eos, -1) > 0
    length = np.minimum((~ended).sum(-1) + 1, T)
    np.testing.assert_array_equal(drawn["length"], length)
    np.testing.assert_allclose(totals.reward, (drawn["text"] == 3).sum(-1) - 0.25 * length, atol=1e-6)


def test_values_are_read_as_text(answerer: PromptedPolicy, writer: PromptedPolicy) -> None:
    assert answerer.read("text", np.array([3, 4, TOKENIZER.eos])) == "ab"
    assert answerer.read("text", np.array([TOKENIZER.eos, 3, 4])) == ""
    assert answerer.read("length", np.array(3.0)) is None
    assert writer.read("text", np.array([1, 2, 3])) is None
    assert "5 prompts, rewards tall, brief" in repr(answerer)


def test_a_run_folder_is_loaded_and_continued(answerer: PromptedPolicy, answered: Posterior, folder: Path) -> None:
    options = {**FITTED, "source": bayesrl.ReuseDraws(32, num_updates=4), "optimizer": adam()}
    loaded = bayesrl.load(folder, answerer, **options)
    np.testing.assert_array_equal(loaded.draws["text"], answered.draws["text"])
    for name, value in answered.params.items():
        np.testing.assert_array_equal(loaded.params[name], value)
    np.testing.assert_array_equal(
        loaded.sample(jax.random.key(0), 10)["text"], answered.sample(jax.random.key(0), 10)["text"]
    )
    assert "text" in bayesrl.load(folder).draws
    other = replace(answerer, model=GPT2.init(jax.random.key(8), CONFIG))
    with pytest.raises(RunFolderError, match="first draws"):
        bayesrl.load(folder, other, **options)


# ---- where to start ----------------------------------------------------------------------------


def test_a_fit_may_start_from_another_model(answerer: PromptedPolicy) -> None:
    start = GPT2.init(jax.random.key(8), CONFIG)
    for guide in (FullParameters(start=Pretrained(start, TOKENIZER)), LoRA(start=Pretrained(start, None))):
        programs, params = bound(answerer, guide)
        drawn = jax.jit(lambda programs=programs, params=params: programs.draw(jax.random.key(0), params, 4))()
        index = drawn.plates["prompt"][0]
        asked = answerer.prompts.tokens[index], answerer.prompts.mask[index]
        for model, found in ((start, drawn.log_q), (answerer.model, drawn.log_prior)):
            wanted = scored(answerer.distribution(model, *asked), drawn.sites["text"])
            np.testing.assert_allclose(found["text"].sum(-1), wanted, atol=1e-5)


def test_a_start_that_does_not_fit_is_refused(answerer: PromptedPolicy) -> None:
    wide = GPT2.init(jax.random.key(0), replace(CONFIG, width=16))
    deep = GPT2.init(jax.random.key(0), replace(CONFIG, depth=2))
    for other in (wide, deep):
        with pytest.raises(GuideError, match="of another shape than the reference"):
            bound(answerer, FullParameters(start=Pretrained(other, TOKENIZER)))
    strange = Pretrained(answerer.model, char_tokenizer("xy"))
    with pytest.raises(GuideError, match="encodes texts differently"):
        bound(answerer, LoRA(start=strange))


def test_guides_are_for_language_models_only() -> None:
    def bandit() -> None:
        arm = numpyro.sample("arm", numpyro.distributions.Categorical(logits=jnp.zeros(3)))
        bayesrl.reward("payoff", 1.0 * arm)

    with pytest.raises(GuideError, match=r"LoRA is for policies made by bayesrl.lm.policy"):
        bayesrl.fit(jax.random.key(0), bandit, beta=1.0, guide=LoRA(), num_steps=1, progress=False)
    for options in ({"rank": 0}, {"scale": -1.0}):
        with pytest.raises(GuideError, match="LoRA got"):
            LoRA(**options)


# ---- bad input ---------------------------------------------------------------------------------


def bert() -> BertClassifier:
    config = BertConfig(vocab_size=V, max_length=8, width=8, depth=1, heads=2, inner=8, labels=("a", "b"))
    return BertClassifier.init(jax.random.key(0), config)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"prompts": []}, "there are no prompts; pass at least one"),
        ({"prompts": "ab"}, "encode_prompts got one text, 'ab'; pass a list of texts"),
        ({"prompts": {"prompt": "a"}}, "encode_prompts got one record, .* pass a list of texts"),
        ({"prompts": 5}, "encode_prompts got '5'; pass a list of texts"),
        ({"prompts": encode_prompts(["x"], char_tokenizer("xy"))}, "the prompts were encoded by another tokenizer"),
        ({"prompts": [3]}, "prompt 0 is 3; pass a text, token ids"),
        ({"prompts": ["a", PAIR]}, r"records of preferences, with 'chosen' and 'rejected', .*preferences\.read"),
        ({"prompts": [{"question": "a"}]}, "or a record with one of these under 'prompt'"),
        ({"prompts": np.zeros((0, 2), int)}, "prompts of shape"),
        ({"prompts": np.zeros((2, 2))}, "pass whole numbers"),
        ({"prompts": np.array([[1, 7]])}, "a prompt holds token 7, and the model knows 0 to 4"),
        ({"prompts": np.array([[-1, 2]])}, "a prompt holds token -1"),
        ({"prompts": ["a", "abababa"]}, r"prompt 1 \('abababa'\) has 7 tokens, and with max_new_tokens=3 exceeds"),
        ({"tokenizer": char_tokenizer("abc")}, "the tokenizer has 6 tokens and the model knows 5"),
        ({"tokenizer": None}, "prompts are texts, and the model has no tokenizer"),
        ({"reward": 3.0}, "reward=3.0; use a Reward or a function"),
        ({"reward": {}}, "reward={} names no reward"),
        ({"reward": {"text": len}}, "the name 'text' is taken"),
        ({"metrics": {"reward": len}}, "the name 'reward' is taken"),
        ({"metrics": {"prompt": len}}, "the name 'prompt' is taken"),
        ({"batch_size": 0}, "batch_size=0; use a whole number"),
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
        ({"top_p": 2.0}, "top_p=2.0"),
        ({"model": bert}, "model=a BertClassifier; use a Pretrained, .* or a CausalLM"),
        (
            {"model": lambda: Pretrained(GPT2.init(jax.random.key(0), CONFIG), char_tokenizer("xy"))},
            "tokenizer= encodes",
        ),
    ],
)
def test_bad_input_is_refused(model: GPT2, changed: dict[str, Any], message: str) -> None:
    given = {"model": model, "prompts": ["a", "b"], "reward": len, "max_new_tokens": T, "tokenizer": TOKENIZER}
    given |= changed
    if callable(made := given.pop("model")) and not isinstance(made, eqx.Module):
        made = made()
    with pytest.raises(LanguageModelError, match=message):
        policy(made, given.pop("prompts"), **given)


def test_fields_that_no_reward_reads_are_named(model: GPT2) -> None:
    given: dict[str, Any] = {"max_new_tokens": T}
    records = [{"prompt": "a", "answer": "b", "source": "web"}]
    with pytest.warns(UserWarning, match="reads the fields 'source' of the prompts"):
        made = policy(Pretrained(model, TOKENIZER), records, reward=0.5 * rewards.exact_match(), **given)
    with pytest.raises(LanguageModelError, match="no reward reads them"):
        made.resolve_prompts([PAIR])
    # A reward of (text, example) may read whatever it likes.
    policy(Pretrained(model, TOKENIZER), [PAIR], reward=lambda text, example: text == example["chosen"], **given)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("reward", "message"),
    [
        (lambda text: float("nan"), "returned nan"),
        (rewards.text_reward(lambda texts: [1.0], batched=True), "returned 1 value for"),
        (rewards.token_reward(lambda tokens, mask: tokens), r"returned shape \(3,\) for one completion"),
        (rewards.token_reward(lambda tokens, mask: jnp.nan * tokens[0]), "nan"),
    ],
)
def test_rewards_that_give_no_number_are_told(model: GPT2, reward: Any, message: str) -> None:
    writer = policy(Pretrained(model, TOKENIZER), ["a", "b"], reward=reward, max_new_tokens=T)
    with pytest.raises(BayesRLError, match=message):
        bayesrl.fit(jax.random.key(0), writer, beta=1.0, guide=FullParameters(), num_steps=1, progress=False)


def test_a_reward_of_another_shape_is_told(model: GPT2) -> None:
    class Flat(rewards.Reward):
        def __call__(self, completions: Any) -> Array:
            return jnp.zeros(3)

    with pytest.raises(LanguageModelError, match=r"reward 'reward' returned shape \(3,\) for completions \[2\]"):
        inspect(jax.random.key(0), policy(model, TOKENS, reward=Flat(), max_new_tokens=T))


def test_reuse_refuses_what_is_out_of_range() -> None:
    for options in ({"num_particles": 1}, {"num_updates": 0}):
        with pytest.raises(FitError, match="ReuseDraws got"):
            bayesrl.ReuseDraws(**options)

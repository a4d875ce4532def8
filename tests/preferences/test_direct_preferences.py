"""Fits to judgements: their fixed points by enumeration, their losses by the published formulas, and bad input."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from scipy.special import expit
from scipy.stats import norm

import bayesrl
from bayesrl import lm
from bayesrl.errors import BayesRLError, ObjectiveError, PreferenceError
from bayesrl.lm.generation import model_with_params
from bayesrl.lm.guides import ModelGuide
from bayesrl.posterior.policy_and_guide import Bound, bind_programs
from bayesrl.preferences import DirectPreference, PreferenceData, TextScores, bradley_terry, read, thurstone
from bayesrl.preferences.direct.judgement_losses import implicit_reward, ipo_losses, kto_losses, likelihood_losses
from bayesrl.preferences.direct.minibatch_rows import choose_rows
from bayesrl.preferences.outcome_log_probs import log_probs_of_pairs

STRENGTH = np.array([1.0, 2.0, 3.0])
PRIOR = np.array([0.5, 0.3, 0.2])
BETAS = np.array([0.5, 1.0, 2.0])
ARMS = {"arm": jnp.arange(3)}
TABLE = "arm$table"


def bandit() -> None:
    arm = numpyro.sample("arm", dist.Categorical(probs=jnp.asarray(PRIOR)))
    bayesrl.reward("log_strength", jnp.log(jnp.asarray(STRENGTH))[arm])


def judged(share_flipped: int = 0) -> PreferenceData:
    """Return pairs of which exactly the share won that Bradley–Terry says, after 1 in `share_flipped` was flipped."""
    rows = []
    for i, j in ((0, 1), (0, 2), (1, 2)):
        a, b = int(STRENGTH[i]), int(STRENGTH[j])
        won, lost = (a, b) if not share_flipped else ((share_flipped - 1) * a + b, (share_flipped - 1) * b + a)
        rows += [(i, j, 1)] * won + [(i, j, 0)] * lost
    first, second, outcome = np.asarray(rows).T
    return PreferenceData.of_pairs(first, second, outcome)


def exact(beta: float, **options: Any) -> np.ndarray:
    weighted = bayesrl.enumerate_posterior(bandit, beta=beta, **options)
    return np.exp(np.asarray(weighted.log_weights, float)).reshape(-1)


@pytest.fixture(scope="module")
def bound() -> Bound:
    return bind_programs(jax.random.key(0), bandit, (), 1.0, None)


def is_minimum(bound: Bound, objective: DirectPreference, probs: np.ndarray, betas: Any = 1.0) -> bool:
    """Whether the loss has no slope at these probabilities, [*beta, arm], and is greater around them."""
    ready = objective.prepare(jax.random.key(0), bound.programs, bound.params)
    own = objective.init_params(jax.random.key(0), bound.programs)
    # The guide tilts the prior, so that its table is log q/π₀.
    tables = jnp.log(jnp.asarray(np.reshape(probs, (-1, 3)) / PRIOR))
    around = 0.1 * jax.random.normal(jax.random.key(1), (20, 3)) + jnp.array([0.2, 0.0, 0.0])

    def loss(table: Any, beta: Any) -> Any:
        return ready.evaluate(jax.random.key(0), {**own, TABLE: table}, bound.programs, beta)[0]

    def look(table: Any, beta: Any) -> Any:
        value, slope = jax.value_and_grad(loss)(table, beta)
        return value, slope, jax.vmap(loss, in_axes=(0, None))(table + around, beta)

    value, slope, others = jax.jit(jax.vmap(look))(tables, jnp.reshape(jnp.asarray(betas), -1))
    return bool((jnp.abs(slope) < 1e-6).all() and (others > value[:, None]).all())


# ---- fixed points --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def dpo() -> bayesrl.Posterior:
    objective = DirectPreference(judged())
    options: dict[str, Any] = {"num_steps": 1000, "learning_rate": 0.1, "progress": False}
    return bayesrl.fit(jax.random.key(0), bandit, beta=BETAS, objective=objective, **options)


def test_dpo_ends_at_the_tilted_posterior_of_the_reward_behind_the_judgements(dpo: bayesrl.Posterior) -> None:
    probs = np.exp(np.asarray(dpo.log_prob(ARMS), float))[:, 0]
    for beta, found in zip(BETAS, probs, strict=True):
        by_hand = PRIOR * STRENGTH ** (1 / beta)
        np.testing.assert_allclose(found, by_hand / by_hand.sum(), atol=5e-6)
    # The history has J of the policy's own reward, exactly, and the share of pairs that the reward orders rightly.
    optimum = bayesrl.enumerate_posterior(bandit, beta=BETAS).optimum
    np.testing.assert_allclose(dpo.history["objective"][-1, :, 0], np.ravel(optimum), atol=1e-5)
    assert dpo.history["metrics/accuracy"][-1].ravel() == pytest.approx(8 / 12)


def test_the_verdict_tells_how_far_from_the_optimum_of_the_given_reward(dpo: bayesrl.Posterior) -> None:
    one = dpo.select(beta=1.0)
    # A fit to texts has no J along its training.
    unknown = {"objective": np.full_like(one.history["objective"], np.nan)}
    diagnosis = bayesrl.diagnose(jax.random.key(2), replace(one, history=one.history | unknown))
    assert diagnosis.verdict == "pass"
    assert diagnosis["convergence"].outcome == "pass"
    assert "learns from judgements (12 pairs, loss bradley_terry)" in diagnosis.explanation
    assert "learns from judgements" in str(one)

    def other() -> None:
        arm = numpyro.sample("arm", dist.Categorical(probs=jnp.asarray(PRIOR)))
        bayesrl.reward("estimate", jnp.array([1.0, 0.0, 0.0])[arm])

    judged_otherwise = bayesrl.diagnose(jax.random.key(3), one.judged_by(other))
    q, aim = exact(1.0), PRIOR * np.exp([1.0, 0.0, 0.0])
    gap = float((q * np.log(q / aim * aim.sum())).sum())
    assert judged_otherwise.evidence is not None
    assert judged_otherwise.evidence.gap is not None
    assert float(judged_otherwise.evidence.gap.mean) == pytest.approx(gap, abs=1e-5)
    assert judged_otherwise.verdict == "fail"
    assert "the judgements lead elsewhere than this reward" in judged_otherwise["gap"].explanation


def test_robust_dpo_sees_through_flipped_labels(bound: Bound) -> None:
    weight = PRIOR * STRENGTH ** (1 / BETAS[:, None])
    at = weight / weight.sum(-1, keepdims=True)
    assert is_minimum(bound, DirectPreference(judged(share_flipped=4), loss="robust", label_smoothing=0.25), at, BETAS)


def test_smoothing_is_the_cross_entropy_of_smoothed_labels() -> None:
    # As without smoothing, on labels of which 1 in 4 was flipped, up to what is the same for every policy.
    difference = jnp.linspace(-3.0, 3.0, 7)
    outcome = dist.Categorical(logits=log_probs_of_pairs(difference, "logit", None, None))
    won, lost = (likelihood_losses(outcome, jnp.full(7, side), 0.0, robust=False) for side in (0, 1))
    smoothed = likelihood_losses(outcome, jnp.zeros(7, int), 0.25, robust=False)
    np.testing.assert_allclose(smoothed, 0.75 * won + 0.25 * lost, rtol=1e-6)


def test_ipo_ends_at_the_posterior_of_the_chance_to_win(bound: Bound) -> None:
    # All pairs equally often, in 60 comparisons each, so that the winning shares are exact.
    rows = [
        (i, j, int(k < 60 * STRENGTH[i] / (STRENGTH[i] + STRENGTH[j])))
        for i, j in ((0, 1), (0, 2), (1, 2))
        for k in range(60)
    ]
    wins = STRENGTH[:, None] / (STRENGTH[:, None] + STRENGTH)
    # h is the difference of the mean chances to win against an item drawn uniformly, over β.
    weight = PRIOR * np.exp(wins.mean(1) / BETAS[:, None])
    ipo = DirectPreference(PreferenceData.of_pairs(*np.asarray(rows).T), loss="ipo")
    assert is_minimum(bound, ipo, weight / weight.sum(-1, keepdims=True), BETAS)


@pytest.mark.parametrize(
    "options",
    [
        {"regularizer": "chi_squared_kl"},
        {"regularizer": "jensen_shannon_sum"},
        {"regularizer": "alpha", "alpha": 0.5},
    ],
    ids=lambda options: options["regularizer"],
)
def test_other_regularizers_end_at_their_own_optimum(bound: Bound, options: dict[str, Any]) -> None:
    """The first one is χPO."""
    # A clip that no difference reaches changes nothing.
    objective = DirectPreference(judged(), **options, clip=20.0)
    assert is_minimum(bound, objective, exact(1.0, **options))
    assert objective.told == {"direct": "12 pairs, loss bradley_terry", **options}


def test_a_clip_holds_the_difference_back() -> None:
    clipped = DirectPreference(judged(), clip=0.5)._clipped(jnp.array([[3.0, 1.0], [0.1, 0.0]]), 0.5)
    np.testing.assert_allclose(clipped, [[2.5, 1.5], [0.1, 0.0]], atol=1e-6)


def test_kto_raises_what_most_call_good(bound: Bound) -> None:
    labels = [1, 1, 1, 0, 0, 1, 1, 0, 0, 0, 0, 0, 0, 0, 1]
    data = PreferenceData.of_labels([0] * 5 + [1] * 5 + [2] * 5, labels)

    def slopes(table: Any, **options: Any) -> Any:
        ready = DirectPreference(data, loss="kto", **options).prepare(jax.random.key(0), bound.programs, bound.params)

        def loss(table: Any) -> Any:
            return ready.evaluate(jax.random.key(0), {TABLE: table}, bound.programs, 0.5)[0]

        return jax.jit(jax.value_and_grad(loss))(table)

    # The gradient of Σ λ·σ(∓(R − z₀))/15 with R = β·log q/π₀ and z₀ = β·KL(q‖π₀), which no gradient flows through.
    table = np.array([0.4, -0.3, 0.1])
    weight = PRIOR * np.exp(table)
    q = weight / weight.sum()
    ratio = np.log(q / PRIOR)
    good = np.array([3, 2, 1])
    distance = expit(0.5 * (ratio - (q * ratio).sum()))
    net = 2.0 * good - (5 - good)
    value, slope = slopes(jnp.asarray(table), desirable_weight=2.0)
    assert float(value) == pytest.approx((2.0 * good * (1 - distance) + (5 - good) * distance).sum() / 15, abs=1e-6)
    by_reward = -0.5 * net * distance * (1 - distance) / 15
    np.testing.assert_allclose(slope, by_reward - q * by_reward.sum(), atol=1e-6)
    # At the prior, with equal weights: up what most call good, down the others.
    up = -np.asarray(slopes(jnp.zeros(3))[1])
    assert up[0] > 0 > up[2]


def test_effects_of_the_model_are_fitted_beside_the_policy(bound: Bound) -> None:
    tied = PreferenceData.of_pairs([0, 0, 1] * 2, [1, 2, 2] * 2, [0.5, 0, 0, 0, 0, 0.5])
    direct = DirectPreference(bradley_terry(tied, ties="davidson"))
    ready = direct.prepare(jax.random.key(0), bound.programs, bound.params)
    assert set(direct.init_params(jax.random.key(0), bound.programs)) == {"objective$tie"}
    table, tie = jnp.array([0.2, -0.1, 0.5]), 0.3

    def loss(tie: Any) -> Any:
        params = {TABLE: table, "objective$tie": tie}
        return ready.evaluate(jax.random.key(0), params, bound.programs, 1.0)[0]

    value, slope = jax.jit(jax.value_and_grad(loss))(tie)
    difference = np.asarray(table)[tied.members[:, 0]] - np.asarray(table)[tied.members[:, 1]]
    scores = np.stack([difference / 2, -difference / 2, np.full(6, tie)], -1)
    share = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
    seen = share[np.arange(6), [2, 1, 1, 1, 1, 2]]
    # The prior of `tie` is N(0, 1).
    by_hand = -np.log(seen).mean() + (tie**2 / 2 + np.log(2 * np.pi) / 2) / 6
    assert float(value) == pytest.approx(by_hand, abs=1e-5)
    assert float(slope) == pytest.approx((share[:, 2].sum() - 2 + tie) / 6, abs=1e-5)


def test_rankings_end_where_items_are_chosen_as_often_as_expected(bound: Bound) -> None:
    # Every ranking in six, with the shares of Plackett and Luce of strengths 1, 2 and 3.
    orders = [(i, j, 3 - i - j) for i in range(3) for j in range(3) if i != j]
    share = [STRENGTH[i] / 6 * STRENGTH[j] / (6 - STRENGTH[i]) for i, j, _ in orders]
    counts = np.rint(np.asarray(share) * 60).astype(int)
    assert counts == pytest.approx(60 * np.asarray(share))
    rankings = [order for order, count in zip(orders, counts, strict=True) for _ in range(count)]
    direct = DirectPreference(PreferenceData.of_rankings(rankings))
    assert direct.told == {"direct": "60 rankings, loss plackett_luce"}
    assert is_minimum(bound, direct, exact(1.0))


def test_ratings_are_normal_around_the_reward_and_an_offset(bound: Bound) -> None:
    data = PreferenceData.of_ratings([0, 1, 2, 2], [1.0, 2.0, 4.0, 3.0])
    direct = DirectPreference(data)
    ready = direct.prepare(jax.random.key(0), bound.programs, bound.params)
    params = {TABLE: jnp.array([0.2, -0.1, 0.5]), "objective$offset": jnp.asarray(1.5)}
    value, info = jax.jit(lambda: ready.evaluate(jax.random.key(0), params, bound.programs, 2.0))()
    table = np.array([0.2, -0.1, 0.5])
    reward = 2.0 * (table - np.log((PRIOR * np.exp(table)).sum()))
    normal = norm(reward[[0, 1, 2, 2]] + 1.5, direct.model.noise)
    scale = direct.model.priors["offset"][0]
    by_hand = -normal.logpdf([1.0, 2.0, 4.0, 3.0]).mean() - norm(0, scale).logpdf(1.5) / 4
    assert float(value) == pytest.approx(by_hand, abs=1e-5)
    assert float(info.metrics["accuracy"]) == 1.0


def test_items_of_contexts_are_named_by_their_prompts() -> None:
    def arms() -> None:
        with numpyro.plate("user", 2):
            arm = numpyro.sample("arm", dist.Categorical(logits=jnp.zeros((2, 3))))
            bayesrl.reward("payoff", (arm == 1).astype(float))

    programs, params, _, _ = bind_programs(jax.random.key(0), arms, (), 1.0, None)
    data = read([{"prompt": "0", "chosen": "1", "rejected": "0"}, {"prompt": "1", "chosen": "2", "rejected": "0"}])
    ready = DirectPreference(data).prepare(jax.random.key(0), programs, params)
    table = np.arange(6.0).reshape(2, 3) ** 2
    assert ready.items is not None
    ratios = ready.items.under({TABLE: jnp.asarray(table)}, programs).log_ratios(jnp.asarray(data.members))
    np.testing.assert_allclose(np.asarray(ratios)[:, 0] - np.asarray(ratios)[:, 1], [1.0, 16.0], rtol=1e-5)
    with pytest.raises(PreferenceError, match="item 0 has prompt None, and the policy has 2 contexts"):
        DirectPreference(judged()).prepare(jax.random.key(0), programs, params)


def test_rows_of_a_mini_batch_are_all_as_likely_and_none_comes_twice() -> None:
    keys = jax.random.split(jax.random.key(0), 4000)
    rows = np.asarray(jax.jit(jax.vmap(lambda key: choose_rows(key, 12, 5)))(keys))
    assert all(len(set(row)) == 5 for row in rows.tolist())
    # 4,000 draws of 5 of 12: each row comes in 1,667 of them, with a standard deviation of 31; 5 of them for all 12.
    np.testing.assert_allclose(np.bincount(rows.reshape(-1), minlength=12), 4000 * 5 / 12, atol=5 * 31)


# ---- formulas ------------------------------------------------------------------------------------


def _trl_losses(chosen: np.ndarray, rejected: np.ndarray, beta: float, smoothing: float) -> dict[str, np.ndarray]:
    """Write the losses as trainers compute them from log-ratios of chosen and rejected answers."""
    logits = chosen - rejected
    good, bad = np.log(expit(beta * logits)), np.log(expit(-beta * logits))
    return {
        "likelihood": -good,
        "smoothed": -(1 - smoothing) * good - smoothing * bad,
        "robust": (-(1 - smoothing) * good + smoothing * bad) / (1 - 2 * smoothing),
        "ipo": (logits - 1 / (2 * beta)) ** 2,
        "kto": np.concatenate([1.5 * (1 - expit(beta * (chosen - 0.3))), 1 - expit(beta * (0.3 - rejected))]),
    }


def test_losses_and_gradients_are_those_of_the_published_formulas() -> None:
    rng = np.random.default_rng(0)
    chosen, rejected, beta, smoothing = rng.normal(size=6), rng.normal(size=6), 0.3, 0.2
    winners = jnp.zeros(6, int)

    def outcome(pair: Any) -> Any:
        return dist.Categorical(logits=log_probs_of_pairs(beta * (pair[0] - pair[1]), "logit", None, None))

    own: dict[str, Callable[[Any], Any]] = {
        "likelihood": lambda pair: likelihood_losses(outcome(pair), winners, 0.0, robust=False),
        "smoothed": lambda pair: likelihood_losses(outcome(pair), winners, smoothing, robust=False),
        "robust": lambda pair: likelihood_losses(outcome(pair), winners, smoothing, robust=True),
        "ipo": lambda pair: ipo_losses(pair[0] - pair[1], jnp.ones(6), beta),
        "kto": lambda pair: jnp.concatenate(
            [
                kto_losses(beta * pair[0], jnp.ones(6, bool), jnp.asarray(beta * 0.3), 1.5, 1.0),
                kto_losses(beta * pair[1], jnp.zeros(6, bool), jnp.asarray(beta * 0.3), 1.5, 1.0),
            ]
        ),
    }
    pair = jnp.asarray(np.stack([chosen, rejected]))
    theirs = _trl_losses(chosen, rejected, beta, smoothing)
    for name, loss in own.items():
        np.testing.assert_allclose(loss(pair), theirs[name], rtol=1e-5, err_msg=name)
        gradient = jax.grad(lambda pair, loss=loss: loss(pair).sum())(pair)
        for side in range(2):
            step = np.zeros((2, 6))
            step[side] = 1e-5
            above, below = (
                _trl_losses(*(np.stack([chosen, rejected]) + sign * step), beta, smoothing)[name] for sign in (1, -1)
            )
            change = (above - below) / 2e-5
            change = change if name != "kto" else change.reshape(2, 6)[side]
            np.testing.assert_allclose(gradient[side], change, atol=2e-5, err_msg=name)


def test_implicit_rewards_are_slopes_of_the_regularizer() -> None:
    ratio = np.array([0.2, 0.9, 1.0, 3.0])
    x = jnp.log(jnp.asarray(ratio))
    slopes = {
        "kl": np.log(ratio),
        "chi_squared": ratio - 1,
        "chi_squared_kl": ratio - 1 + np.log(ratio),
        "forward_kl": 1 - 1 / ratio,
        "jensen_shannon_sum": np.log(2 * ratio / (1 + ratio)),
    }
    for name, slope in slopes.items():
        np.testing.assert_allclose(implicit_reward(x, name, None), slope, atol=1e-5, err_msg=name)  # type: ignore[arg-type]


# ---- texts ---------------------------------------------------------------------------------------

TOKENIZER = lm.char_tokenizer("abc ")
CONFIG = lm.GPT2Config(vocab_size=TOKENIZER.vocab_size, max_length=10, width=8, depth=1, heads=2, initializer_range=0.4)
MODEL = lm.Pretrained(lm.GPT2.init(jax.random.key(0), CONFIG), TOKENIZER)
PAIRS = [
    {"prompt": "b", "chosen": "a", "rejected": "b"},
    {"prompt": "b", "chosen": "aa", "rejected": "cb"},
    {"prompt": "cc", "chosen": "caa", "rejected": "b"},
]


WRITER = lm.policy(
    MODEL, ["b", "cc"], reward=lm.rewards.token_reward(lambda tokens, mask: jnp.sum(tokens == 4)), max_new_tokens=3
)


@pytest.fixture(scope="module")
def writing() -> Bound:
    return bind_programs(jax.random.key(0), WRITER, (), 0.5, lm.LoRA(rank=2))


def test_log_ratios_of_texts_are_those_of_all_enumerated_ones(writing: Bound) -> None:
    programs, guide = writing.programs, writing.programs.guide
    assert isinstance(guide, ModelGuide)
    noise = jax.random.split(jax.random.key(1), len(writing.params))
    params = {
        name: x + 0.3 * jax.random.normal(key, x.shape)
        for key, (name, x) in zip(noise, writing.params.items(), strict=True)
    }
    data = read(PAIRS)
    ready = DirectPreference(data).prepare(jax.random.key(0), programs, params)
    assert ready.items is not None
    grid = np.asarray(WRITER.distribution(WRITER.model, WRITER.prompts.tokens, None).finite_values)

    @jax.jit
    def look() -> Any:
        model = model_with_params(guide.declare, params)
        every = jnp.repeat(jnp.asarray(grid)[:, None], 2, 1)
        log_q, log_prior = (
            WRITER.distribution(one, WRITER.prompts.tokens, WRITER.prompts.mask).log_prob(every)
            for one in (model, WRITER.model)
        )
        policy = ready.items.under(params, programs)  # type: ignore[union-attr]
        divergence = policy.divergence(jnp.asarray([0, 3, 4]))
        step = jax.value_and_grad(lambda params: ready.evaluate(jax.random.key(0), params, programs, 0.5)[0])(params)
        by_token = replace(DirectPreference(data, loss="ipo", per_token=True), items=ready.items)
        ipo = by_token.evaluate(jax.random.key(0), params, programs, 0.5)[0]
        return log_q, log_prior, policy.log_ratios(jnp.asarray(data.members)), divergence, ipo, step

    *arrays, (loss, slope) = look()
    log_q, log_prior, found, divergence, ipo = map(np.asarray, arrays)
    np.testing.assert_allclose(np.exp(log_q).sum(0), 1.0, atol=1e-4)

    def ratio(prompt: str, text: str) -> float:
        ids = [*TOKENIZER.encode([text], special=False)[0], TOKENIZER.eos][:3]
        ids += [WRITER.options["pad"]] * (3 - len(ids))
        at = int(np.flatnonzero((grid == ids).all(-1))[0]), ["b", "cc"].index(prompt)
        return float(log_q[at] - log_prior[at])

    for row, pair in zip(found, PAIRS, strict=True):
        assert row == pytest.approx([ratio(pair["prompt"], pair[side]) for side in ("chosen", "rejected")], abs=1e-4)
    each = found / [[2, 2], [3, 3], [3, 2]]  # tokens with their end, where there is room for it
    assert float(ipo) == pytest.approx(((each[:, 0] - each[:, 1] - 1.0) ** 2).mean(), abs=1e-4)
    assert float(loss) == pytest.approx(-np.log(expit(0.5 * (found[:, 0] - found[:, 1]))).mean(), abs=1e-5)
    assert all(float(jnp.abs(x).max()) > 0 for x in slope.values())
    # KTO's estimate of KL: the answers of other prompts.
    shifted = [ratio("b", "caa"), ratio("b", "a"), ratio("cc", "cb")]
    assert float(divergence) == pytest.approx(np.mean(shifted), abs=1e-4)


# ---- bad input -----------------------------------------------------------------------------------


def _prepare_texts(records: Any) -> DirectPreference:
    programs, params, _, _ = bind_programs(jax.random.key(0), WRITER, (), 0.5, lm.LoRA(rank=2))
    return DirectPreference(read(records)).prepare(jax.random.key(0), programs, params)


def _prepare(objective: DirectPreference, policy: Any = bandit) -> DirectPreference:
    programs, params, _, _ = bind_programs(jax.random.key(0), policy, (), 1.0, None)
    return objective.prepare(jax.random.key(0), programs, params)


def _latent() -> None:
    rain = bayesrl.environment("rain", dist.Bernoulli(0.5), observable=True)
    bayesrl.reward("dry", 1.0 * (numpyro.sample("arm", dist.Bernoulli(0.5)) == rain))


TOO_LONG = [*PAIRS, {"prompt": "b", "chosen": "abca", "rejected": "a"}]
BAD: dict[str, tuple[Callable[[], Any], type[BayesRLError], str]] = {
    "equal": (lambda: read([{"prompt": "b", "chosen": "a", "rejected": "a"}]), PreferenceError, "row 0"),
    "one side": (lambda: read([{"prompt": "b", "chosen": "a", "rejected": None}]), PreferenceError, "row 0"),
    "label": (lambda: PreferenceData.of_labels([0, 1], [1, 2]), PreferenceError, "label must be 0 or 1"),
    "nothing": (lambda: DirectPreference(judged().take([])), PreferenceError, "no rows"),
    "too long": (lambda: _prepare_texts(TOO_LONG), PreferenceError, r"1 row of 4 \(3\) have completions of more than"),
    "context": (
        lambda: _prepare_texts([{"prompt": "abcabcabc", "chosen": "ab", "rejected": "a"}, PAIRS[0]]),
        PreferenceError,
        r"1 row of 2 \(0\) have more tokens than the context of 10",
    ),
    "foreign ids": (
        lambda: _prepare_texts([{"prompt": [4], "chosen": [5, 99], "rejected": [6]}]),
        PreferenceError,
        "token 99, and the model knows 0 to",
    ),
    "source": (
        lambda: DirectPreference(judged()).for_source(bayesrl.ReuseDraws()),
        ObjectiveError,
        "leave source= out",
    ),
    "nature": (lambda: _prepare(DirectPreference(judged()), _latent), ObjectiveError, "environment site 'rain'"),
    "unknown arm": (
        lambda: _prepare(DirectPreference(PreferenceData.of_pairs([0], [3]))),
        PreferenceError,
        "item 3 has completion '3', and the policy has 3 values",
    ),
    "features": (
        lambda: DirectPreference(bradley_terry(judged(), features=np.eye(3))),
        PreferenceError,
        "the policy itself gives the scores",
    ),
    "text scores": (
        lambda: DirectPreference(bradley_terry(read(PAIRS), features=TextScores(MODEL))),
        PreferenceError,
        "the policy itself gives the scores",
    ),
    "ipo of labels": (
        lambda: DirectPreference(PreferenceData.of_labels([0], [1]), loss="ipo"),
        PreferenceError,
        "got labels; pass pairs",
    ),
    "kto of ties": (
        lambda: DirectPreference(PreferenceData.of_pairs([0], [1], [0.5]), loss="kto"),
        PreferenceError,
        "1 ties, of which neither",
    ),
    "robust": (lambda: DirectPreference(judged(), loss="robust"), PreferenceError, "share of flipped labels"),
    "smoothed ipo": (
        lambda: DirectPreference(judged(), loss="ipo", label_smoothing=0.1),
        PreferenceError,
        "label_smoothing",
    ),
    "ties": (
        lambda: DirectPreference(PreferenceData.of_pairs([0, 0], [1, 1], [1, 0.5])),
        PreferenceError,
        "1 row of 2 tied",
    ),
    "effects": (
        lambda: DirectPreference(bradley_terry(judged(), ties="davidson"), loss="ipo"),
        PreferenceError,
        "effects beside scores",
    ),
    "alpha": (lambda: DirectPreference(judged(), regularizer="alpha"), PreferenceError, "needs its order"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused_by_name(name: str) -> None:
    call, kind, words = BAD[name]
    with pytest.raises(kind, match=words):
        call()


def test_a_probit_model_is_a_likelihood_too() -> None:
    direct = DirectPreference(thurstone(judged()))
    assert direct.told == {"direct": "12 pairs, loss thurstone"}
    assert direct == DirectPreference(thurstone(judged()))
    assert direct != DirectPreference(judged())

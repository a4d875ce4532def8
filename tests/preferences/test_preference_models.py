"""Models of preference: densities written out by hand, and bad input."""

from dataclasses import replace
from itertools import combinations, permutations, product
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import expit
from scipy.stats import norm

from bayesrl.errors import PreferenceError
from bayesrl.preferences import PreferenceData, bradley_terry, gaussian_ratings, plackett_luce, read, thurstone
from bayesrl.preferences.outcome_log_probs import DavidsonLuceRanks, PlackettLuceRanks
from bayesrl.preferences.preference_program import PreferenceModel

SCORES = np.array([0.7, -0.2, 0.4])
ALL = PreferenceData.of_pairs([0, 1, 0, 2], [1, 2, 2, 0], [1, 0, 0.5, 1], annotator=["a", "b", "a", "b"], shown=True)
WON = ALL.take([0, 1, 3])


def probs(model: PreferenceModel, **sites: Any) -> np.ndarray:
    given = {"score": jnp.asarray(SCORES), **{name: jnp.asarray(value) for name, value in sites.items()}}
    run = jax.jit(lambda given: jnp.exp(model.outcome_given(given, np.arange(len(model.data))).logits))
    return np.asarray(run(given))


def test_bradley_terry_and_its_ties() -> None:
    d = SCORES[[0, 1, 0, 2]] - SCORES[[1, 2, 2, 0]]
    plain = probs(bradley_terry(WON))
    np.testing.assert_allclose(plain, np.stack([expit(d), expit(-d)], -1)[[0, 1, 3]], rtol=1e-5)
    nu, pi = np.exp(-0.3), np.exp(SCORES)
    a, b = pi[[0, 1, 0, 2]], pi[[1, 2, 2, 0]]
    davidson = np.stack([a, b, nu * np.sqrt(a * b)], -1) / (a + b + nu * np.sqrt(a * b))[:, None]
    np.testing.assert_allclose(probs(bradley_terry(ALL, ties="davidson"), tie=-0.3), davidson, rtol=1e-5)
    theta = 1 + nu
    kupper = np.stack([a / (a + theta * b), b / (b + theta * a), np.zeros(4)], -1)
    kupper[:, 2] = (theta**2 - 1) * a * b / ((a + theta * b) * (b + theta * a))
    np.testing.assert_allclose(probs(bradley_terry(ALL, ties="rao_kupper"), tie=-0.3), kupper, rtol=1e-5)
    np.testing.assert_allclose(kupper.sum(-1), 1)
    assert np.asarray(bradley_terry(ALL, ties="davidson").observed).tolist() == [0, 1, 2, 0]


def test_thurstone_and_its_ties() -> None:
    d = SCORES[[0, 1, 0, 2]] - SCORES[[1, 2, 2, 0]]
    np.testing.assert_allclose(probs(thurstone(WON))[:, 0], norm.cdf(d / 2**0.5)[[0, 1, 3]], rtol=1e-5)
    model = thurstone(ALL, ties="glenn_david")
    t = np.exp(-0.3)
    first, second = norm.cdf((d - t) / 2**0.5), norm.cdf((-d - t) / 2**0.5)
    wanted = np.stack([first, second, 1 - first - second], -1)
    np.testing.assert_allclose(probs(model, tie=-0.3), wanted, rtol=1e-5)
    # Far out, a tie keeps its small probability, and its gradient is finite.
    far = {"score": jnp.array([40.0, 0.0, 20.0]), "tie": jnp.array(-2.0)}

    def log_tie(sites: Any) -> Any:
        return model.outcome_given(sites, np.arange(4)).logits[:, 2].sum()

    assert all(np.isfinite(x).all() for x in jax.tree.leaves(jax.jit(jax.value_and_grad(log_tie))(far)))


def test_effects_of_annotators_position_and_length() -> None:
    records = [
        {"prompt": "p", "first": "a", "second": "bcd", "outcome": 1, "annotator": "x"},
        {"prompt": "p", "first": "bcd", "second": "efghijk", "outcome": 0, "annotator": "y"},
        {"prompt": "p", "first": "efghijk", "second": "a", "outcome": 1, "annotator": "x"},
        {"prompt": "p", "first": "a", "second": "bcd", "outcome": 1, "annotator": "y"},
    ]
    model = bradley_terry(read(records), annotators=True, position=True, length=True)
    assert set(model.priors) == {"score", "position", "length", "log_temperature"}
    log_lengths = np.log([2.0, 4.0, 8.0])
    lengths = (log_lengths - log_lengths.mean()) / log_lengths.std()
    s = SCORES + 0.8 * lengths
    temperature = np.exp([0.5, -0.5, 0.5, -0.5])
    d = (s[[0, 1, 2, 0]] - s[[1, 2, 0, 1]]) / temperature + 0.3
    got = probs(model, position=0.3, length=0.8, log_temperature=[0.5, -0.5])
    np.testing.assert_allclose(got[:, 0], expit(d), rtol=1e-5)


def test_labels_are_above_a_threshold() -> None:
    data = PreferenceData.of_labels([0, 1, 2], [1, 0, 1])
    np.testing.assert_allclose(probs(bradley_terry(data), threshold=0.1)[:, 1], expit(SCORES - 0.1), rtol=1e-5)
    np.testing.assert_allclose(
        probs(thurstone(data), threshold=0.1)[:, 1], norm.cdf((SCORES - 0.1) / 2**0.5), rtol=1e-5
    )


def test_scores_are_linear_in_features() -> None:
    features = np.array([[1.0, 0.5], [0.0, 1.0], [2.0, 0.0]])
    weights = np.array([0.3, -0.7])
    linear = bradley_terry(WON, features=features, scale=2.0)
    assert linear.priors == {"weights": (2.0, (2,))}
    s = features @ weights
    got = probs(linear, weights=weights)
    np.testing.assert_allclose(got[:, 0], expit(s[[0, 1, 2]] - s[[1, 2, 0]]), rtol=1e-5)


def test_plackett_luce_is_a_distribution_over_rankings() -> None:
    present = jnp.array([True, False, True, True])
    ranking = PlackettLuceRanks(jnp.array([0.7, 9.0, -0.2, 0.4]), present)
    values = np.array([[a, -1, b, c] for a, b, c in permutations(range(3))])
    run = jax.jit(lambda key, values: (ranking.log_prob(values), ranking.sample(key, (4000,))))
    log_probs, drawn = map(np.asarray, run(jax.random.key(0), values))
    by_hand = []
    for row in values[:, [0, 2, 3]]:
        s = SCORES[np.argsort(row)]
        by_hand.append(s[0] + s[1] - np.log(np.exp(s).sum()) - np.log(np.exp(s[1:]).sum()))
    np.testing.assert_allclose(log_probs, by_hand, rtol=1e-5)
    np.testing.assert_allclose(np.exp(log_probs).sum(), 1, rtol=1e-5)
    # Draws: shares within 5 standard errors, a false alarm in 3e-6 of runs for 6 rankings.
    assert (drawn[:, 1] == -1).all()
    shares = np.asarray([(drawn == row).all(-1).mean() for row in values])
    p = np.exp(by_hand)
    assert (np.abs(shares - p) < 5 * np.sqrt(p * (1 - p) / 4000)).all()


def test_rankings_of_two_are_pairs() -> None:
    pairs = PreferenceData.of_pairs([0, 1], [1, 2], [1, 0])
    given = {"score": jnp.asarray(SCORES)}
    bt, pl = bradley_terry(pairs), plackett_luce(pairs)
    run = jax.jit(lambda given: [m.outcome_given(given, np.arange(2)).log_prob(m.observed) for m in (bt, pl)])
    np.testing.assert_allclose(*run(given), rtol=1e-5)
    broken = PreferenceData.of_rankings([[2, 0, 1]]).as_pairs()
    assert (broken.members.tolist(), broken.outcomes.tolist()) == ([[2, 0], [2, 1], [0, 1]], [1, 1, 1])


def test_davidson_luce_is_a_distribution_over_rankings_with_ties() -> None:
    log_delta = np.array([-0.3, 0.2])
    ranking = DavidsonLuceRanks(
        jnp.array([0.7, 9.0, -0.2, 0.4]), jnp.array([True, False, True, True]), jnp.array(log_delta)
    )
    # The 13 weak orders of three items.
    orders = [row for row in product(range(3), repeat=3) if set(row) == set(range(len(set(row))))]
    values = np.array([[a, -1, b, c] for a, b, c in orders])
    run = jax.jit(lambda key, values: (ranking.log_prob(values), ranking.sample(key, (4000,))))
    log_probs, drawn = map(np.asarray, run(jax.random.key(0), values))

    def weight(items: Any) -> Any:
        return np.exp([0, *log_delta][len(items) - 1] + SCORES[list(items)].mean())

    by_hand = []
    for row in np.array(orders):
        left, value = [0, 1, 2], 0.0
        for place in range(max(row) + 1):
            total = sum(weight(items) for size in (1, 2, 3) for items in combinations(left, size))
            value += np.log(weight([at for at in left if row[at] == place]) / total)
            left = [at for at in left if row[at] != place]
        by_hand.append(value)
    np.testing.assert_allclose(log_probs, by_hand, atol=1e-5)
    p = np.exp(by_hand)
    np.testing.assert_allclose(p.sum(), 1)
    # Draws: shares within 5 standard errors, a false alarm in 7e-6 of runs for 13 rankings.
    shares = np.asarray([(drawn == row).all(-1).mean() for row in values])
    np.testing.assert_allclose(shares.sum(), 1)
    assert (np.abs(shares - p) < 5 * np.sqrt(p * (1 - p) / 4000)).all()


def test_ties_of_two_are_those_of_davidson() -> None:
    given = {"score": jnp.asarray(SCORES), "tie": jnp.array(-0.3)}
    pairs, ranks = bradley_terry(ALL, ties="davidson"), plackett_luce(ALL, ties="davidson_luce")
    assert ranks.priors["tie"] == (1.0, (1,))

    def score(sites: Any) -> list[Any]:
        both = (pairs, sites), (ranks, sites | {"tie": sites["tie"][None]})
        return [model.outcome_given(own, np.arange(4)).log_prob(model.observed) for model, own in both]

    np.testing.assert_allclose(*jax.jit(score)(given), rtol=1e-5)
    # Three that tie are more than data of pairs can tell of.
    three = read([{"completions": ["0", "1", "2"], "ranks": [1, 1, 1]}])
    assert (three.most_tied, plackett_luce(three, ties="davidson_luce").priors["tie"]) == (3, (1.0, (2,)))
    with pytest.raises(
        PreferenceError, match="3 items share a place in these rankings, and the model knows ties of up"
    ):
        plackett_luce(TIED, ties="davidson_luce").with_data(replace(TIED, ranks=np.zeros((1, 3), int)))


def test_items_are_found_again_by_their_texts() -> None:
    known = read(
        [{"prompt": "p ", "chosen": "a b", "rejected": "c"}, {"prompt": "p ", "chosen": "a b", "rejected": "d"}]
    )
    for other in ({"prompt": "p ", "chosen": "d", "rejected": "a b"}, {"chosen": "p d", "rejected": "p a b"}):
        moved = bradley_terry(known, features=np.eye(3), length=True).with_data(read([other]))
        assert (moved.data.members.tolist(), moved.data.items) == ([[2, 0]], known.items)
    with pytest.raises(PreferenceError, match=r"1 of 2 are not among the model's \('p e'\); leave their rows out"):
        bradley_terry(known).with_data(read([{"prompt": "p ", "chosen": "e", "rejected": "d"}]))
    # Two items with one text are told apart by where the prompt ends, or not at all.
    split = read([{"prompt": "p ", "chosen": "a", "rejected": "b"}, {"prompt": "p", "chosen": " a", "rejected": "c"}])
    assert (
        bradley_terry(split).with_data(read([{"prompt": "p", "chosen": " a", "rejected": "c"}])).data.members[0, 0] == 2
    )
    with pytest.raises(PreferenceError, match="other items have no score here"):
        bradley_terry(split).with_data(read([{"chosen": "p a", "rejected": "pc"}]))


def test_held_out_data_are_of_what_the_model_knows() -> None:
    model = bradley_terry(ALL, ties="davidson", annotators=True)
    assert len(model.with_data(WON.take([0])).data) == 1
    other = replace(PreferenceData.of_pairs([0], [1], num_items=3), items=WON.items)
    swapped = other._with_annotators(["b"])
    assert model.with_data(swapped).data.annotator.tolist() == [1]  # type: ignore[union-attr]
    with pytest.raises(PreferenceError, match="knows no temperature of annotator 'z'"):
        model.with_data(other._with_annotators(["z"]))
    with pytest.raises(PreferenceError, match="knows no temperature of an annotator without a name"):
        model.with_data(other)
    with pytest.raises(PreferenceError, match="other items have no score here"):
        model.with_data(PreferenceData.of_pairs([0], [1], num_items=4))
    with pytest.raises(PreferenceError, match="the model is of pairs, and the data are labels"):
        model.with_data(PreferenceData.of_labels([0], [1]))
    with pytest.raises(PreferenceError, match="1 row of 1 tied, and the model has no ties"):
        bradley_terry(WON).with_data(ALL.take([2]))


RANKINGS = PreferenceData.of_rankings([[0, 1, 2]])
LABELS = PreferenceData.of_labels([0, 1], [1, 0])
TIED = read([{"prompt": "p", "completions": ["a", "b", "c"], "ranks": [1, 1, 2]}])
ONCE = PreferenceData.of_pairs([0, 1], [1, 2], annotator=["a", "b"])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: bradley_terry(ALL), "1 row of 4 tied, and the model has no ties; pass ties='davidson'"),
        (lambda: thurstone(ALL), "pass ties='glenn_david'"),
        (lambda: plackett_luce(TIED), "pass ties='davidson_luce'"),
        (lambda: gaussian_ratings(LABELS), "gaussian_ratings got labels; use bradley_terry, thurstone"),
        (lambda: bradley_terry(PreferenceData.of_ratings([0], [3.5])), "bradley_terry got ratings; use gaussian_rat"),
        (lambda: bradley_terry(RANKINGS), "bradley_terry got rankings; use plackett_luce"),
        (lambda: plackett_luce(LABELS), "plackett_luce got labels, which rank nothing"),
        (lambda: bradley_terry(LABELS, ties="davidson"), "got ties=, and labels are of one item at a time"),
        (lambda: bradley_terry(LABELS, position=True), "got position=, and labels are of one item"),
        (lambda: bradley_terry(ONCE, position=True), "do not say which of each pair was shown first"),
        (lambda: bradley_terry(LABELS, annotators=True), "the data name no annotators"),
        (lambda: bradley_terry(ONCE, annotators=True), "each of 2 annotators judged once, which tells nothing"),
        (lambda: bradley_terry(ONCE, length=True), "all items are of one length"),
        (lambda: bradley_terry(ONCE, features=np.ones((2, 1))), r"features have shape \(2, 1\); give finite numbers"),
        (
            lambda: bradley_terry(ONCE, features=np.full((3, 1), np.nan)),
            r"use finite numbers \[items, features\], preferences.TextScores",
        ),
        (lambda: bradley_terry(ONCE.take([])), "the data have no rows"),
        (LABELS.as_pairs, "as_pairs breaks rankings, and these are labels"),
        (lambda: bradley_terry(ONCE, scale=0.0), "scale=0.0; use a number above 0"),
    ],
)
def test_bad_input_is_refused(call: Any, message: str) -> None:
    with pytest.raises(PreferenceError, match=message):
        call()


def test_annotators_with_one_judgement_are_named() -> None:
    data = PreferenceData.of_pairs([0, 1, 0], [1, 2, 2], annotator=["a", "a", "seldom"])
    with pytest.warns(UserWarning, match=r"1 of 2 annotators judged only once \(seldom\)"):
        bradley_terry(data, annotators=True)

"""Gold score against KL of a text policy that follows a learnt judge: point estimates, ensemble and posteriors.

The task of `bayesrl fit helpful_text`: its reference writes the same replies for all, which make the pool: the prior is
the uniform law over the draws of a prompt, so that tilts by any judge, their KL and their gold score are exact sums.
For each seed, simulated people compare 200 pairs of draws with Bradley–Terry noise; every judge counts words and learns
from the same comparisons. β is chosen for each judge and prompt so that KL is what the column says; ± is the standard
error over seeds, and differences are paired over seeds.

- likelihood: the point estimate without regularisation to speak of (prior standard deviation of a word's worth 10);
- MAP: the point estimate under the prior of the posteriors (0.5), which is also Laplace's posterior mean;
- ensemble: the worst of 5 MAP judges, each of its own resample of the comparisons;
- Laplace and full posterior (Gibbs, 4 chains): mean, and mean − 1 sd, relative to the mean of what was compared.

With a right posterior its mean is the best in expectation. Here it is not right: the judge counts words, and people
take off for repetition and length, so that caution pays where the policy has left what was compared.
"""

import sys
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import jax
import numpy as np

from benchmarks.results import table, target

SEEDS, COMPARISONS, DRAWS, PROMPTS, KLS = 5, 200, 2**15, 2, (0.5, 1.0, 2.0, 4.0, 6.0, 8.0, 10.0)
SCALE, WEAK = 0.5, 10.0


def run() -> str:
    """Draw the pool once, and let all judges learn and tilt it."""
    pool = _pool()
    print(f"{len(pool['gold'])} different replies in {PROMPTS * DRAWS} draws", file=sys.stderr, flush=True)
    found: dict[str, list[np.ndarray]] = {}
    for seed in range(SEEDS):
        for name, scores in _judges(pool, seed).items():
            found.setdefault(name, []).append(_curve(pool, scores))
            print(seed, name, np.round(found[name][-1], 2), file=sys.stderr, flush=True)
    rows = [[name, *(_told(column) for column in np.transpose(curves))] for name, curves in found.items()]
    best = _curve(pool, pool["gold"])
    rows.append(["gold score itself", *(f"{value:.2f}" for value in best)])
    words = [(__doc__ or "").partition("\n\n")[2].strip(), f"The reference scores {pool['prior']:.2f}."]
    for point in ("likelihood", "MAP"):
        for name in ("Laplace, mean − 1 sd", "full posterior, mean", "full posterior, mean − 1 sd"):
            gain = np.asarray(found[name])[:, -1] - np.asarray(found[point])[:, -1]
            se = gain.std(ddof=1) / len(gain) ** 0.5
            words.append(
                target(
                    f"at KL {KLS[-1]:g}, {name} above {point} by 2 standard errors ({gain.mean():.2f} ± {se:.2f})",
                    met=bool(gain.mean() > 2 * se),
                )
            )
    return "\n\n".join([table(["gold score at KL", *(f"{kl:g}" for kl in KLS)], rows), *words])


def _pool() -> dict[str, Any]:
    """Draw replies, and read each different one once: numbers, counts, features and gold scores."""
    import bayesrl
    from bayesrl import lm

    problem: Any = bayesrl.load_problem("helpful_text")
    policy: Any = problem.policy
    model = lm.Pretrained(policy.model, policy.tokenizer)
    asked = list(policy.prompts.examples)[:PROMPTS]
    writer = lm.policy(model, asked, reward=policy.metrics["gold"], max_new_tokens=policy.options["num_steps"])
    tokens = np.asarray(bayesrl.importance(jax.random.key(7), writer, beta=1e6, num_samples=DRAWS).sites["text"])
    gold_of = policy.metrics["gold"].fn
    items, members, counts, gold = [], [], [], []
    for at, example in enumerate(asked):
        rows, count = np.unique(_until_end(tokens[:, at], policy.options["eos"]), axis=0, return_counts=True)
        texts: dict[str, int] = {}
        for row, number in zip(rows, count, strict=True):
            text = policy.read("text", row)
            texts[text] = texts.get(text, 0) + int(number)
        items += [{"prompt": example["prompt"], "completion": text} for text in texts]
        gold += [gold_of(text, example) for text in texts]
        members.append(np.arange(len(items) - len(texts), len(items)))
        counts.append(np.asarray(list(texts.values()), float))
    judge = replace(next(iter(policy.rewards.values())), prompts=tuple(example["prompt"] for example in asked))
    features = judge.table(items)
    scores = np.asarray(gold)
    prior = float(np.mean([count @ scores[own] / count.sum() for own, count in zip(members, counts, strict=True)]))
    return {"features": features, "gold": scores, "members": members, "counts": counts, "prior": prior}


def _until_end(tokens: np.ndarray, ends: Any) -> np.ndarray:
    """Blank what follows the end of each text."""
    ended = np.isin(tokens, np.atleast_1d(ends))
    after = np.cumsum(ended, -1) - ended > 0
    return np.where(after, np.atleast_1d(ends)[0], tokens)


def _judges(pool: Mapping[str, Any], seed: int) -> dict[str, np.ndarray]:
    """Learn every judge from the same comparisons; return the scores of all replies, [replies]."""
    from bayesrl import preferences

    rng = np.random.default_rng([seed, 21])
    pairs = []
    while len(pairs) < COMPARISONS:
        at = rng.integers(PROMPTS)
        pair = rng.choice(pool["members"][at], 2, p=pool["counts"][at] / pool["counts"][at].sum())
        if pair[0] != pair[1]:
            pairs.append(pair)
    shown = np.asarray(pairs)
    difference = pool["gold"][shown[:, 0]] - pool["gold"][shown[:, 1]]
    won = (rng.logistic(size=COMPARISONS) < difference).astype(int)
    # Each side is an item of its own, so that all seeds share one compiled program.
    known, all_of = pool["features"][shown.reshape(-1)], pool["features"] - pool["features"][shown].mean((0, 1))
    sides = np.arange(2 * COMPARISONS).reshape(-1, 2)

    def believed(rows: Any, scale: float, **options: Any) -> Any:
        first, second = sides[rows].T
        data = preferences.PreferenceData.of_pairs(first, second, won[rows], num_items=2 * COMPARISONS)
        model = preferences.bradley_terry(data, features=known, scale=scale)
        return preferences.infer(jax.random.key(seed), model, num_samples=600, **options)

    def at_mode(rows: Any, scale: float) -> np.ndarray:
        return np.asarray(all_of @ believed(rows, scale).gaussian.mean)

    everything = np.arange(COMPARISONS)
    normal = believed(everything, SCALE).gaussian
    full = _moments(believed(everything, SCALE, method="gibbs", num_warmup=100).draws["weights"], all_of)
    mode, sd = all_of @ normal.mean, np.sqrt(((all_of @ normal.root) ** 2).sum(-1))
    ensemble = [at_mode(rng.integers(COMPARISONS, size=COMPARISONS), SCALE) for _ in range(5)]
    return {
        "likelihood": at_mode(everything, WEAK),
        "MAP": mode,
        "ensemble": np.min(ensemble, 0),
        "Laplace, mean − 1 sd": mode - sd,
        "full posterior, mean": full[0],
        "full posterior, mean − 1 sd": full[0] - full[1],
    }


def _moments(draws: np.ndarray, features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return means and standard deviations of scores, a part of the replies at a time, [replies] each."""
    parts = [draws @ part.T for part in np.array_split(features, 1 + len(features) // 2000)]
    return np.concatenate([part.mean(0) for part in parts]), np.concatenate([part.std(0) for part in parts])


def _curve(pool: Mapping[str, Any], scores: np.ndarray) -> np.ndarray:
    """Return the gold score of tilts by a judge, a mean over prompts, at each KL; nan where no tilt goes so far."""
    found = []
    for own, counts in zip(pool["members"], pool["counts"], strict=True):
        log_prior = np.log(counts / counts.sum())
        found.append([_tilt(log_prior, scores[own], kl) @ pool["gold"][own] for kl in KLS])
    return np.mean(found, 0)


def _tilt(log_prior: np.ndarray, scores: np.ndarray, kl: float) -> np.ndarray:
    """Return the tilt by exp(score/β) that is so many nats away, by bisection of log β."""
    low, high = -14.0, 6.0
    for _ in range(60):
        middle = (low + high) / 2
        logits = log_prior + (scores - scores.max()) / np.exp(middle)
        log_q = logits - np.logaddexp.reduce(logits)
        far = float(np.exp(log_q) @ (log_q - log_prior))
        low, high = (middle, high) if far > kl else (low, middle)
    return np.exp(log_q) if abs(far - kl) < 0.05 else np.full(len(scores), np.nan)


def _told(values: np.ndarray) -> str:
    if np.isnan(values).any():
        return "—"
    return f"{values.mean():.2f} ± {values.std(ddof=1) / len(values) ** 0.5:.2f}"

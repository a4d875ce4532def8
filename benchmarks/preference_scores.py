"""Bradley–Terry of three items by every method, beside sums over a grid; and the memory of a last layer.

Three items with N(0, 1) scores; 1 beat 2 in 7 of 10, 2 beat 3 in 6 of 10, 1 beat 3 in 9 of 10. The truth is a sum over
a grid of 241³ points between −6 and 6 in double precision, written out here. Quadrature and Laplace use double
precision too; z is the greatest distance of a mean in its own standard errors, where the method has some. KL is from
the normal approximation to the posterior, from weighted draws. Seconds hold compilation.

The classifier is a BERT of 124 million random weights in float32, with 48 texts of 16 tokens. Memory is the greatest
resident size of a process that scores the texts, and of one that also infers a posterior of the last layer by Laplace.
"""

import math
import resource
import subprocess
import sys
import time
from typing import Any

import jax
import numpy as np
from scipy.special import log_expit, logsumexp

from benchmarks.results import table, target

PAIRS, WINS, GAMES = ((0, 1), (1, 2), (0, 2)), (7, 6, 9), 10
METHODS: dict[str, dict[str, Any]] = {
    "quadrature": {},
    "laplace": {},
    "nuts": {"num_samples": 20_000},
    "gibbs": {"num_samples": 20_000},
    "fit": {},
}
TEXTS, LENGTH = 48, 16


def run() -> str:
    """Infer by every method, and measure the memory of two processes."""
    from bayesrl import preferences

    first, second = (np.repeat([pair[side] for pair in PAIRS], GAMES) for side in (0, 1))
    outcome = np.concatenate([np.arange(GAMES) < wins for wins in WINS]).astype(int)
    model = preferences.bradley_terry(preferences.PreferenceData.of_pairs(first, second, outcome))
    truth, rows, found = by_grid(), [], {}
    rows.append(
        ["truth", *_numbers(truth["mean"]), *_numbers(truth["sd"]), f"{truth['log_evidence']:.5f}", "", "", "", ""]
    )
    for method, options in METHODS.items():
        start = time.perf_counter()
        posterior = preferences.infer(jax.random.key(0), model, method=method, **options)
        seconds = time.perf_counter() - start
        assert posterior.log_evidence is not None
        mean, se = posterior.mean
        z = float(np.abs((mean - truth["mean"]) / se).max()) if np.all(se > 0) else math.nan
        gap = float(posterior.log_evidence.mean) - truth["log_evidence"]
        found[method] = {"z": z, "gap": gap, "off": float(np.abs(mean - truth["mean"]).max()), "posterior": posterior}
        kl = "" if posterior.divergence is None else f"{posterior.divergence.mean:.4f} ± {posterior.divergence.se:.4f}"
        cells = [*_numbers(mean), *_numbers(posterior.sd), f"{posterior.log_evidence.mean:.5f}"]
        rows.append(
            [
                method,
                *cells,
                f"{posterior.p_best.mean[0]:.4f}",
                "" if math.isnan(z) else f"{z:.1f}",
                kl,
                f"{seconds:.0f}",
            ]
        )
        print(rows[-1], file=sys.stderr, flush=True)
    header = ["method", "mean 1", "2", "3", "sd 1", "2", "3", "log p(y)", "P(1 is best)", "z", "KL", "s"]
    own = found["laplace"]["posterior"].diagnostics["laplace_log_evidence"]
    exact, sizes = found["quadrature"], [memory(mode) for mode in ("score", "infer")]
    low, off = truth["log_evidence"] - own, found["laplace"]["off"]
    said = (
        f"Laplace's own log p(y) is {own:.5f}, {low:.4f} nats too low, and its means are off by up to {off:.3f}; its "
        f"weighted draws are off by {abs(found['laplace']['gap']):.4f} nats."
    )
    words = [
        (__doc__ or "").partition("\n\n")[2].strip(),
        said,
        target("quadrature to 5 digits", met=exact["off"] < 5e-6 and abs(exact["gap"]) < 5e-6),
        target("NUTS within 3 standard errors", met=found["nuts"]["z"] < 3),
        f"Scoring alone: {sizes[0]:.0f} MB; with the posterior: {sizes[1]:.0f} MB, {sizes[1] / sizes[0]:.3f} times.",
        target("a last-layer posterior in less than 1.1 times the memory of scoring", met=sizes[1] < 1.1 * sizes[0]),
    ]
    return "\n\n".join([table(header, rows), *words])


def _numbers(values: Any) -> list[str]:
    return [f"{value:.5f}" for value in values]


def by_grid() -> dict[str, Any]:
    """Sum over a grid: means, standard deviations and log evidence."""
    axis = np.linspace(-6, 6, 241)
    step = axis[1] - axis[0]
    theta = np.meshgrid(axis, axis, axis, indexing="ij", sparse=True)
    log_p = sum((-0.5 * x**2 - 0.5 * math.log(2 * math.pi) for x in theta), start=np.zeros(()))
    for (a, b), wins in zip(PAIRS, WINS, strict=True):
        d = theta[a] - theta[b]
        log_p = log_p + wins * log_expit(d) + (GAMES - wins) * log_expit(-d)
    evidence = float(logsumexp(log_p))
    share = np.exp(log_p - evidence)
    mean = np.asarray([float((share * x).sum()) for x in theta])
    sd = np.sqrt([float((share * (x - m) ** 2).sum()) for x, m in zip(theta, mean, strict=True)])
    return {"log_evidence": evidence + 3 * math.log(step), "mean": mean, "sd": sd}


def memory(mode: str) -> float:
    """Measure the greatest resident size of a process of its own, MB."""
    code = f"from benchmarks.preference_scores import last_layer; last_layer({mode!r})"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)  # noqa: S603
    return float(done.stdout.split()[-1])


def last_layer(mode: str) -> None:
    """Score texts by a large classifier, and perhaps infer its last layer; print the greatest resident size, MB."""
    from bayesrl import lm, preferences

    config = lm.BertConfig(
        vocab_size=50_265, max_length=128, width=768, depth=12, heads=12, inner=3072, labels=("bad", "good")
    )
    judge = lm.BertClassifier.init(jax.random.key(0), config)
    rng = np.random.default_rng(0)
    ids = [{"prompt": [0], "completion": rng.integers(5, 50_000, LENGTH - 1).tolist()} for _ in range(TEXTS)]
    reader = preferences.TextScores(judge)
    if mode == "score":
        features = reader.features_of(*reader.tokens_of(ids))
        scores = features @ np.ones(features.shape[1])
        assert np.isfinite(scores).all()
    else:
        pairs = zip(ids[::2], ids[1::2], strict=True)
        records = [{"prompt": [0], "chosen": a["completion"], "rejected": b["completion"]} for a, b in pairs]
        model = preferences.bradley_terry(preferences.read(records), features=reader)
        posterior = preferences.infer(jax.random.key(1), model)
        assert np.isfinite(posterior.mean.mean).all()
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)

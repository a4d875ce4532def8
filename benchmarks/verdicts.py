"""Verdicts of `diagnose` on good fits and on fits made bad by recipe.

Good: exact gap under 1% of J* − J(π₀), and less than a tenth of p* missed. Bad: exact gap over 5%, made
by recipe. Of each half is diagnosed with enumeration switched off. Only pass on good and fail on bad count
as right. k̂ alone would say good where Pareto k̂ of the fit's own weights is under its threshold, or not
defined since the weights are tied.
"""

import math
import sys
from collections import Counter
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import bayesrl
from bayesrl.diagnostics.diagnosis import diagnose
from bayesrl.guides import AutoTilt
from bayesrl.svi.step import FitState
from benchmarks.random_fits import STEPS, Fitted, Fitter
from benchmarks.random_programs import Shape, make_shape
from benchmarks.results import table, target

SHAPES, PER_SHAPE = 10, 100
RECIPES = ("stopped early", "mode dropped", "wrong family", "stuck restart")
TRIES = 12


def run() -> str:
    """Make the fits, diagnose each, and count."""
    rng = np.random.default_rng(21)
    counts: dict[str, Counter[str]] = {kind: Counter() for kind in ("good", *RECIPES)}
    by_khat: Counter[str] = Counter()
    how: dict[bool, Counter[str]] = {False: Counter(), True: Counter()}
    for s in range(SHAPES):
        shape = make_shape(rng, nature=False)
        makers = _makers(jax.random.key(s), shape, rng)
        for i in range(2 * PER_SHAPE):
            kind = "good" if i % 2 == 0 else RECIPES[(i // 2) % len(RECIPES)]
            fitted = _make(kind, makers, rng, jax.random.fold_in(jax.random.key(7000 + s), i))
            if fitted is None:
                counts[kind]["not made"] += 1
                continue
            exact = (i // 2) % 2 == 0
            key = jax.random.fold_in(jax.random.key(8000 + s), i)
            found = diagnose(key, fitted.posterior, method="auto" if exact else "rejection")
            counts[kind][found.verdict] += 1
            wanted = "pass" if kind == "good" else "fail"
            how[exact][
                "right" if found.verdict == wanted else found.verdict if found.verdict == "unknown" else "wrong"
            ] += 1
            khat = found["weights"]
            says_good = math.isnan(khat.value) or khat.value < khat.threshold
            by_khat["right" if says_good == (kind == "good") else "wrong"] += 1
        print(f"{s + 1} of {SHAPES} shapes", file=sys.stderr, flush=True)
    return _told(counts, how, by_khat)


def _makers(key: jax.Array, shape: Shape, rng: np.random.Generator) -> dict[str, Fitter]:
    rich = Fitter(key, shape, rng)
    return {"rich": rich, "constant": Fitter(key, shape, rng, AutoTilt(tilt="constant"))}


def _make(kind: str, makers: dict[str, Fitter], rng: np.random.Generator, key: jax.Array) -> Fitted | None:
    """Try programs until a fit is of the wanted kind; None if there is none."""
    for fitted in _candidates(kind, makers, rng, key):
        share = (fitted.truth.optimum - fitted.truth.objective) / (fitted.truth.optimum - fitted.truth.prior_objective)
        good = share < 0.01 and fitted.missed < 0.1
        if good if kind == "good" else share > 0.05:
            return fitted
    return None


def _candidates(kind: str, makers: dict[str, Fitter], rng: np.random.Generator, key: jax.Array) -> Iterator[Fitted]:
    for i in range(TRIES):
        own = jax.random.fold_in(key, i)
        fitter = makers["constant" if kind == "wrong family" else "rich"]
        numbers = fitter.shape.numbers(rng)
        beta = float(np.exp(rng.uniform(np.log(0.05), np.log(5))))
        steps = {"stopped early": int(rng.integers(2, 40)), "stuck restart": 60}.get(kind, STEPS)
        state = fitter.start()
        if kind == "stuck restart":
            state = _moved(state, own, 6.0)
        history = []
        for _ in range(8):
            state = fitter.steps(own, state, beta, numbers, max(steps // 8, 1))
            history.append(0.0)
        if kind == "mode dropped":
            state = _without_best(fitter, state, beta, numbers)
        yield fitter.posterior(state, beta, numbers, np.asarray(history))


def _moved(state: FitState, key: jax.Array, scale: float) -> FitState:
    """Move the start far from the prior, where softmaxes saturate."""
    leaves, tree = jax.tree.flatten(state.params)
    keys = jax.random.split(key, len(leaves))
    far = [leaf + scale * jax.random.normal(k, leaf.shape) for leaf, k in zip(leaves, keys, strict=True)]
    params: dict[str, Any] = jax.tree.unflatten(tree, far)
    return state._replace(params=params, average=params)


def _without_best(fitter: Fitter, state: FitState, beta: float, numbers: Any) -> FitState:
    """Remove the likeliest value of a fit's first action, and keep everything else."""
    posterior: bayesrl.Posterior = fitter.posterior(state, beta, numbers).posterior
    first = fitter.shape.sites[0].name
    drawn = np.asarray(posterior.draws[first]).reshape(-1)
    best = int(np.bincount(drawn).argmax())
    name = f"{first}$table"
    average = {**state.average}
    average[name] = average[name] + jnp.where(jnp.arange(average[name].shape[-1]) == best, -12.0, 0.0)
    return state._replace(average=average)


def _told(counts: dict[str, Counter[str]], how: dict[bool, Counter[str]], by_khat: Counter[str]) -> str:
    rows = []
    for kind, found in counts.items():
        made = sum(found[v] for v in ("pass", "fail", "unknown"))
        rows.append([kind, made, found["pass"], found["fail"], found["unknown"]])
    totals = how[False] + how[True]
    number = sum(totals.values())
    shares = {word: totals[word] / number for word in ("right", "wrong", "unknown")}
    second = [
        ["enumeration on", *(f"{how[True][w] / max(how[True].total(), 1):.1%}" for w in shares)],
        ["enumeration off", *(f"{how[False][w] / max(how[False].total(), 1):.1%}" for w in shares)],
        ["both", *(f"{share:.1%}" for share in shares.values())],
        ["k̂ alone", f"{by_khat['right'] / number:.1%}", f"{by_khat['wrong'] / number:.1%}", ""],
    ]
    met = shares["wrong"] <= 0.02 and shares["unknown"] <= 0.1
    words = target("at most 2% wrong, at most 10% unknown", met=met)
    tables = table(["fit", "made", "pass", "fail", "unknown"], rows), table(["", "right", "wrong", "unknown"], second)
    return "\n\n".join([*tables, __doc__.partition("\n\n")[2].strip(), words])

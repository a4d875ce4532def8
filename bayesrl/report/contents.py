"""Finds what the report shows of a fit, and says what it could not find."""

import platform
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import jax
import numpy as np

from bayesrl.compilation.keys import fold_in, split_keys
from bayesrl.diagnostics.diagnosis import diagnose
from bayesrl.diagnostics.evidence.bounds import estimate_metrics, evaluate_fit
from bayesrl.diagnostics.evidence.by_enumeration import MAX_COUNT
from bayesrl.diagnostics.evidence.by_known_optimum import KnownOptimum
from bayesrl.diagnostics.evidence.result import Evidence
from bayesrl.diagnostics.full_data import full_data_fit, trains_policy
from bayesrl.diagnostics.results import Diagnosis, Frontier
from bayesrl.diagnostics.reward_kl_frontier import frontier as lay_frontier
from bayesrl.errors import BayesRLError, EngineError
from bayesrl.exact.enumeration import enumerate_target
from bayesrl.exact.weighted_draws import WeightedDraws
from bayesrl.posterior.posterior import Posterior
from bayesrl.report.facts import ReportContents
from bayesrl.report.fit_figures import best_over_all_data, betas_of
from bayesrl.statistics.estimates import Estimate
from bayesrl.typing import PRNGKey

_REPEATED = ("num_steps", "num_restarts", "tolerance", "start_beta", "learning_rate")


def collect(
    key: PRNGKey,
    name: str,
    posterior: Posterior,
    *,
    held_out: tuple[Any, ...] | None = None,
    optimum: KnownOptimum | None = None,
    gold: str | None = None,
    diagnosis: Diagnosis | None = None,
    frontier: Frontier | None = None,
    held_out_evidence: Evidence | None = None,
    made: tuple[tuple[str, str], ...] | None = None,
    command: str | None = None,
    missing: tuple[str, ...] = (),
    about: str = "",
) -> ReportContents:
    """Find everything that the report shows of one fit.

    Args:
        key: consumed whole.
        name: of the fit.
        posterior: fitted or loaded; without its policy only what was saved is shown.
        held_out: other arguments of the program, or None.
        optimum: gives the known optimum, or None; as in `evidence`.
        gold: name of a deterministic site, or None.
        diagnosis: made before; by default it is made here.
        frontier: of a fit at several β, made before; by default it is made here.
        held_out_evidence: of the fit on what was held out, found before; by default it is found here.
        made: rows of (setting, value); by default those that the posterior knows.
        command: what makes the fit again; by default a call of `bayesrl.fit`.
        missing: sentences on what is already known to be missing.
        about: one line on what the problem is.
    """
    draw_key, other_key, verdict_key = split_keys(key, 3)
    lacking = [*missing, *_lacking(posterior)]
    told: dict[str, Any] = {}
    metrics = () if posterior.programs is None else posterior.programs.structure.names("metric")
    if gold is not None and posterior.programs is not None and gold not in metrics:
        known = ", ".join(f"“{name}”" for name in metrics) or "none"
        lacking.append(f"The program has no deterministic site “{gold}” to hold against the reward; it has {known}.")
    if held_out is not None and posterior.programs is not None and posterior.statistics and held_out_evidence is None:
        try:
            held_out_evidence = evaluate_fit(other_key, posterior, *held_out)
        except BayesRLError as error:
            lacking.append(f"Held-out data was not scored: {str(error).rstrip('.')}.")
    if diagnosis is None and posterior.programs is not None:
        asked = held_out if held_out_evidence is not None else None
        try:
            diagnosis = diagnose(
                verdict_key, posterior, held_out=asked, optimum=optimum, held_out_evidence=held_out_evidence
            )
        except BayesRLError as error:
            lacking.append(f"No verdict: {str(error).rstrip('.')}.")
    if frontier is None and len(betas_of(posterior)) > 1:
        frontier = _frontier(fold_in(verdict_key, 1), posterior, gold if gold in metrics else None, diagnosis, lacking)
    if posterior.programs is not None and posterior.statistics:
        told["whole"] = best_over_all_data(posterior)
        told["target"] = _target(posterior, diagnosis)
        try:
            told["training"] = _evaluate(draw_key, posterior, diagnosis, frontier, gold)
        except BayesRLError as error:  # what a verdict trips over, scores may trip over too
            lacking.append(f"The fit was not scored: {str(error).rstrip('.')}.")
        told["held_out"] = held_out_evidence
    elif posterior.statistics:
        told["whole"] = posterior.select(restart="best") if posterior.mixture is None else posterior
    return ReportContents(
        name=name,
        posterior=posterior,
        diagnosis=diagnosis,
        frontier=frontier,
        gold=gold,
        missing=tuple(lacking),
        made=tuple(made if made is not None else _made(posterior)),
        command=command if command is not None else _call(posterior),
        about=about,
        **told,
    )


def _frontier(
    key: PRNGKey, posterior: Posterior, gold: str | None, diagnosis: Diagnosis | None, lacking: list[str]
) -> Frontier | None:
    """Lay out the frontier of a sweep that has been diagnosed, or add why not to what is lacking."""
    if diagnosis is None or diagnosis.evidence is None:
        return None
    try:
        return lay_frontier(key, posterior, gold=gold, evidence=diagnosis.evidence)
    except BayesRLError as error:
        lacking.append(f"No frontier: {str(error).rstrip('.')}.")
        return None


def _evaluate(
    key: PRNGKey, posterior: Posterior, diagnosis: Diagnosis | None, frontier: Frontier | None, gold: str | None
) -> Evidence:
    """Give the evidence of the diagnosis with metrics; by itself where there is none."""
    evidence = None if diagnosis is None else diagnosis.evidence
    if evidence is None:
        return evaluate_fit(key, posterior)
    metrics = estimate_metrics(key, full_data_fit(posterior))
    if gold in metrics and frontier is not None and frontier.gold is not None:
        order = np.argsort(np.argsort(np.reshape(np.asarray(evidence.beta), -1)))  # a frontier is by ascending β
        metrics[gold] = Estimate(frontier.gold.mean[order], frontier.gold.se[order])
    return replace(evidence, metrics=metrics)


def _lacking(posterior: Posterior) -> Iterator[str]:
    steps = posterior.history.get("step", np.zeros(0))
    done, total = (int(steps[-1]) if len(steps) else 0), posterior.settings.get("num_steps")
    if posterior.interrupted or (total is not None and done < total and "tolerance" not in posterior.settings):
        of = f" of {total:,}" if total is not None else ""
        yield f"The fit stopped after {done:,}{of} steps; what follows is of the policy as it was then."
    if not len(steps):
        yield "There is no history: no step was recorded."
    if not posterior.statistics:
        yield "There are no draws: they are made when a fit ends, or when it is loaded with its policy."
    if posterior.programs is None:
        yield (
            "It was loaded without its policy, so how far it is from the optimum cannot be found; "
            "load it with bayesrl.load(directory, policy, *args)."
        )


def _target(posterior: Posterior, diagnosis: Diagnosis | None) -> WeightedDraws | None:
    """Enumerate p* where that is possible and was not done for the verdict: pictures show it beside the fit."""
    evidence = None if diagnosis is None else diagnosis.evidence
    if evidence is not None and (evidence.target is not None or evidence.method not in ("known", "draws")):
        return evidence.target
    fit = full_data_fit(posterior)
    programs = fit.programs
    assert programs is not None
    if not programs.structure.actions or trains_policy(programs):
        return None
    try:
        first = jax.tree.map(lambda x: x[0], fit._lanes()[0])
        return enumerate_target(programs, first, fit.beta, MAX_COUNT)
    except EngineError:
        return None


def _made(posterior: Posterior) -> Iterator[tuple[str, str]]:
    settings = posterior.settings
    betas = betas_of(posterior)
    yield "β", "none" if betas == [None] else ", ".join(f"{beta:g}" for beta in betas)
    for name in (*_REPEATED, "optimizer", "seed"):
        if name in settings:
            value = settings[name]
            yield name.replace("_", " "), f"{value:,}" if isinstance(value, int) else str(value)
    packages = [f"{k.removesuffix('_version')} {v}" for k, v in settings.items() if k.endswith("_version")]
    yield "versions", ", ".join([*packages, f"Python {platform.python_version()}"])


def _call(posterior: Posterior) -> str:
    """Write the call that makes a fit again, as far as its settings tell."""
    settings, betas = posterior.settings, betas_of(posterior)
    words = [_key_text(str(settings.get("seed", ""))), "policy", "*args"]
    if betas != [None]:
        told = [f"{beta!r}" for beta in betas]
        words.append(f"beta={told[0]}" if len(posterior.batch_shape) == 1 else f"beta=jnp.array([{', '.join(told)}])")
    words += [f"{name}={settings[name]!r}" for name in _REPEATED if name in settings]
    return f"bayesrl.fit({', '.join(words)})"


def _key_text(seed: str) -> str:
    """Write the key that a fit was given: two words, the first 0 for the keys of small seeds."""
    words = seed.strip("[]").split(",")
    if len(words) == 2 and all(word.strip().isdecimal() for word in words):
        if int(words[0]) == 0:
            return f"jax.random.key({int(words[1])})"
        return f"jax.random.wrap_key_data(jnp.array({seed}, jnp.uint32))"
    return "key"

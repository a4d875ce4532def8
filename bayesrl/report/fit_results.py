"""Everything the report shows of one fit, computed once, and a note of what could not be computed."""

import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from bayesrl.compilation.random_keys import fold_in, split_keys
from bayesrl.diagnostics.diagnosed_fit import full_data_fit, trains_policy
from bayesrl.diagnostics.diagnosis import Diagnosis, diagnose
from bayesrl.diagnostics.engines.engine_table import EngineComparison
from bayesrl.diagnostics.engines.side_by_side import compare_engines_of_fit
from bayesrl.diagnostics.evidence.bounds import estimate_metrics, evaluate_fit
from bayesrl.diagnostics.evidence.by_enumeration import MAX_COUNT
from bayesrl.diagnostics.evidence.by_known_optimum import KnownOptimum
from bayesrl.diagnostics.evidence.result import Evidence
from bayesrl.diagnostics.proxy_gains import Overoptimisation
from bayesrl.diagnostics.proxy_trust import trust_of
from bayesrl.diagnostics.reward_kl_frontier import Frontier
from bayesrl.diagnostics.reward_kl_frontier import frontier as find_frontier
from bayesrl.display.formatting import has_mean
from bayesrl.errors import BayesRLError, EngineError
from bayesrl.exact.enumeration import enumerate_target
from bayesrl.exact.weighted_draws import WeightedDraws
from bayesrl.monte_carlo.best_of_draws import BestOfDraws
from bayesrl.monte_carlo.best_of_draws import best_of as best_of_draws
from bayesrl.posterior.posterior import Posterior
from bayesrl.report.fit_figures import best_over_all_data, betas_of
from bayesrl.statistics.estimates import Estimate
from bayesrl.statistics.regularizer_names import regularizer_of
from bayesrl.typing import PRNGKey

SHOWN_N = (2, 4, 8, 16, 32, 64)
"""Numbers of draws whose best is shown beside a frontier."""

_BEST_OF_DRAWS = 256
_REPEATED = ("num_steps", "num_restarts", "tolerance", "start_beta", "learning_rate", "regularizer", "alpha")


@dataclass(frozen=True)
class FitResults:
    """What we know about one fit; unknown parts are None.

    Attributes:
        name: name of the fit.
        posterior: fitted or loaded posterior.
        best: its best restarts on all data, with draws.
        diagnosis: its verdict.
        frontier: its frontier, for a fit at several β.
        target: p*, if it can be enumerated.
        training: evidence on the data of the fit, with metrics; the diagnosis's own if it has one.
        held_out: the same on other data.
        gold: name of the metric that the reward stands for.
        missing: sentences on what is missing, and why.
        settings: how the fit was made, as rows of (setting, value).
        command: command that makes it again.
        about: one line on what the problem is.
        engines: what other engines say of the same optimum, if that was asked.
        best_of: the best of n draws of the prior, at several n.
        trust: how far the fit may be followed, if its reward is not known.
    """

    name: str
    posterior: Posterior
    best: Posterior | None = None
    diagnosis: Diagnosis | None = None
    frontier: Frontier | None = None
    target: WeightedDraws | None = None
    training: Evidence | None = None
    held_out: Evidence | None = None
    gold: str | None = None
    missing: tuple[str, ...] = ()
    settings: tuple[tuple[str, str], ...] = ()
    command: str = ""
    about: str = ""
    engines: EngineComparison | None = None
    best_of: BestOfDraws | None = None
    trust: Overoptimisation | None = None

    @property
    def evidence(self) -> Evidence | None:
        """The evidence that the diagnosis rests on."""
        return None if self.diagnosis is None else self.diagnosis.evidence

    @property
    def optimum(self) -> np.ndarray | None:
        """J* of each β, reward units, [*beta] flat; None unless it is known on both sides."""
        # J of a fit to the best of n has no optimum.
        rows = [] if self.evidence is None or self.evidence.best_of is not None else self.evidence.rows
        if rows and all(row.gap is not None and has_mean(row.optimum) for row in rows):
            return np.asarray([float(row.optimum.mean) for row in rows])
        return None


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
    settings: tuple[tuple[str, str], ...] | None = None,
    command: str | None = None,
    missing: tuple[str, ...] = (),
    about: str = "",
    engines: EngineComparison | Mapping[str, Any] | None = None,
    best_of: Sequence[int] | None = None,
    trust: Overoptimisation | None = None,
) -> FitResults:
    """Compute everything that the report shows of one fit, but for what is given: diagnosis, frontier, evidence.

    Without its policy the report shows only what was saved. The fields of `FitResults` say what the arguments are;
    `held_out` are other arguments of the program, and `optimum` returns the known optimum, as in `evidence`.
    `best_of` are numbers n for the best of n draws; by default `SHOWN_N` where they are sums and have a place.
    By default the settings are those that the posterior knows, and the command is a call of `bayesrl.fit`. `engines`
    are options of `compare_engines`, by which to compare, or a comparison that exists.
    """
    draw_key, held_out_key, verdict_key = split_keys(key, 3)
    missing_parts = [*missing, *_missing(posterior)]
    best = target = training = curve = None

    def attempt[T](failure: str, make: Callable[[], T]) -> T | None:
        """Make a part of the report, or record why it failed."""
        try:
            return make()
        except BayesRLError as error:
            missing_parts.append(f"{failure}: {str(error).rstrip('.')}.")
            return None

    programs = posterior.programs
    metrics = () if programs is None else programs.structure.names("metric")
    if gold is not None and programs is not None and gold not in metrics:
        missing_parts.append(_no_gold(gold, metrics))
    if held_out is not None and programs is not None and posterior.statistics and held_out_evidence is None:
        held_out_evidence = attempt(
            "Held-out data was not scored", lambda: evaluate_fit(held_out_key, posterior, *held_out)
        )
    if trust is None and diagnosis is not None and diagnosis.trust is not None and gold is None:
        trust = diagnosis.trust
    elif trust is None:
        trust = attempt(
            "What the reward is worth is not shown", lambda: trust_of(fold_in(draw_key, 2), posterior, gold)
        )
    if diagnosis is None and programs is not None:
        args = held_out if held_out_evidence is not None else None
        diagnosis = attempt(
            "No verdict",
            lambda: diagnose(
                verdict_key,
                posterior,
                held_out=args,
                optimum=optimum,
                held_out_evidence=held_out_evidence,
                overoptimisation=trust,
            ),
        )
    several = len(betas_of(posterior)) > 1 and "best_of_n" not in posterior.settings
    if frontier is None and several and diagnosis is not None and diagnosis.evidence is not None:
        shared, metric = diagnosis.evidence, gold if gold in metrics else None
        frontier = attempt(
            "No frontier", lambda: find_frontier(fold_in(verdict_key, 1), posterior, gold=metric, evidence=shared)
        )
    if programs is not None and posterior.statistics:
        best, target = best_over_all_data(posterior), _target(posterior, diagnosis)
        # Whatever makes the verdict fail may make the scores fail too.
        training = attempt("The fit was not scored", lambda: _evaluate(draw_key, posterior, diagnosis, frontier, gold))
        if isinstance(engines, Mapping):
            options = {"optimum": optimum, **engines}
            own_key = fold_in(verdict_key, 2)
            engines = attempt("Engines were not compared", lambda: _compared(own_key, posterior, diagnosis, options))
        if numbers := _numbers_of_draws(posterior, target, best_of):
            n_key = fold_in(draw_key, 1)
            curve = attempt("The best of n draws is not shown", lambda: _best_of(n_key, posterior, numbers))
    elif posterior.statistics:
        held_out_evidence = None
        best = posterior.select(restart="best") if posterior.mixture is None else posterior
    settings = tuple(settings if settings is not None else _settings(posterior))
    command = command if command is not None else _command(posterior)
    made = (best, diagnosis, frontier, target, training, held_out_evidence)
    told = (gold, tuple(missing_parts), settings, command, about)
    return FitResults(name, posterior, *made, *told, None if isinstance(engines, Mapping) else engines, curve, trust)


def _compared(
    key: PRNGKey, posterior: Posterior, diagnosis: Diagnosis | None, options: Mapping[str, Any]
) -> EngineComparison:
    objective = None if diagnosis is None or diagnosis.evidence is None else diagnosis.evidence.objective
    return compare_engines_of_fit(key, posterior, objective, **options)


def _no_gold(gold: str, metrics: Sequence[str]) -> str:
    known = ", ".join(f"“{name}”" for name in metrics) or "none"
    return f"The program has no deterministic site “{gold}” to compare with the reward; its sites: {known}."


def _numbers_of_draws(posterior: Posterior, target: WeightedDraws | None, given: Sequence[int] | None) -> Sequence[int]:
    """Choose n for the best of n: by default beside a frontier or a fit to such a law, if the program is finite."""
    of_fit = posterior.settings.get("best_of_n")
    if given is not None or posterior.beta is None or regularizer_of(posterior.settings)[0] != "kl":
        return given or ()
    beside = of_fit is not None or len(betas_of(posterior)) > 1
    # Whole assignments are there, so that all numbers are sums.
    finite = target is not None and bool(target.sites)
    return sorted({*SHOWN_N, *([of_fit] if of_fit else [])}) if beside and finite else ()


def _best_of(key: PRNGKey, posterior: Posterior, numbers: Sequence[int]) -> BestOfDraws:
    programs = full_data_fit(posterior)._programs_for()
    return best_of_draws(key, programs.policy, *programs.args, n=list(numbers), num_samples=_BEST_OF_DRAWS)


def _evaluate(
    key: PRNGKey, posterior: Posterior, diagnosis: Diagnosis | None, frontier: Frontier | None, gold: str | None
) -> Evidence:
    """Return the diagnosis's evidence with metrics, or fresh evidence if there is none."""
    evidence = None if diagnosis is None else diagnosis.evidence
    if evidence is None:
        return evaluate_fit(key, posterior)
    metrics = estimate_metrics(key, full_data_fit(posterior))
    # The frontier drew gold with its own draws; the report shows that estimate, not a second one.
    if gold in metrics and frontier is not None and frontier.gold is not None:
        order = np.argsort(np.argsort(np.reshape(np.asarray(evidence.beta), -1)))  # frontiers are in ascending β
        metrics[gold] = Estimate(frontier.gold.mean[order], frontier.gold.se[order])
    return replace(evidence, metrics=metrics)


def _missing(posterior: Posterior) -> Iterator[str]:
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
    """Enumerate p*, if that is possible and the verdict did not do it: figures show it beside the fit."""
    evidence = None if diagnosis is None else diagnosis.evidence
    if evidence is not None and (evidence.target is not None or evidence.method in ("nuts", "hindsight")):
        return evidence.target
    fit = full_data_fit(posterior)
    programs = fit.programs
    assert programs is not None
    if not programs.structure.actions or trains_policy(programs):
        return None
    try:
        first = fit._lanes()[0]
        regularizer, alpha = fit.settings.get("regularizer", "kl"), fit.settings.get("alpha")
        best_of = fit.settings.get("best_of_n")
        own = {"best_of": best_of} if best_of is not None else {"regularizer": regularizer, "alpha": alpha}
        return enumerate_target(programs, first, fit.beta, MAX_COUNT, **own)
    except EngineError:
        return None


def _settings(posterior: Posterior) -> Iterator[tuple[str, str]]:
    settings = posterior.settings
    betas = betas_of(posterior)
    yield "β", "none" if betas == [None] else ", ".join(f"{beta:g}" for beta in betas)
    for name in (*_REPEATED, "optimizer", "seed", "trained"):
        if name in settings:
            value = settings[name]
            yield name.replace("_", " "), f"{value:,}" if isinstance(value, int) else str(value)
    if "best_of_n" in settings:
        yield "objective", f"the best of n = {settings['best_of_n']} draws"
    if "direct" in settings:
        yield "objective", str(settings["direct"])
    packages = [f"{k.removesuffix('_version')} {v}" for k, v in settings.items() if k.endswith("_version")]
    yield "versions", ", ".join([*packages, f"Python {platform.python_version()}"])


def _command(posterior: Posterior) -> str:
    """Write the call that makes a fit again, as far as its settings say."""
    settings, betas = posterior.settings, betas_of(posterior)
    elsewhere = posterior.trained_elsewhere
    first = ["policy", "guide", "params"] if elsewhere else [_key_text(str(settings.get("seed", ""))), "policy"]
    words = [*first, "*args"]
    if betas != [None]:
        several = f"jnp.array([{', '.join(map(repr, betas))}])"
        words.append(f"beta={betas[0]!r}" if len(posterior.batch_shape) == 1 else f"beta={several}")
    words += [f"{name}={settings[name]!r}" for name in _REPEATED if name in settings]
    if "best_of_n" in settings:
        words.append(f"objective=bayesrl.objectives.BestOfN(n={settings['best_of_n']})")
    if "direct" in settings:
        words.append("objective=preferences.DirectPreference(...)")
    return f"bayesrl.{'Posterior.at' if elsewhere else 'fit'}({', '.join(words)})"


def _key_text(seed: str) -> str:
    """Write the key of a fit: two words, the first 0 for the keys of small seeds."""
    words = seed.strip("[]").split(",")
    if len(words) == 2 and all(word.strip().isdecimal() for word in words):
        if int(words[0]) == 0:
            return f"jax.random.key({int(words[1])})"
        return f"jax.random.wrap_key_data(jnp.array({seed}, jnp.uint32))"
    return "key"

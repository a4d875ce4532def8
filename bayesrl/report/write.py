"""`write_report`: write everything known about one fit or several as one HTML file."""

import os
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from bayesrl import run_folder
from bayesrl.arguments import Location, Untraced, UnusedOption, checked
from bayesrl.compilation.jit import trace_cache
from bayesrl.compilation.random_keys import split_keys
from bayesrl.diagnostics.diagnosis import Diagnosis
from bayesrl.diagnostics.engines.engine_table import EngineComparison
from bayesrl.diagnostics.proxy_gains import Overoptimisation
from bayesrl.diagnostics.reward_kl_frontier import Frontier
from bayesrl.display.section import Section
from bayesrl.errors import PolicyError, RunFolderError
from bayesrl.files.digests import blank, stamped
from bayesrl.monte_carlo.best_of_draws import Counts
from bayesrl.posterior.posterior import Posterior
from bayesrl.report.fit_results import FitResults, collect
from bayesrl.report.html_page import Part, html_page
from bayesrl.report.sections import report_parts
from bayesrl.typing import PRNGKey
from bayesrl.value_checks import format_value

_FITTED = "A policy fitted as a Bayesian posterior: how far it is from the best, and how sure that is."
type PartsFn = Callable[[PRNGKey, Mapping[str, Any], Sequence[Section]], list[Part]]

_REPORTS: dict[type, PartsFn] = {}
"""How to report results other than fits, such as those of `bayesrl.control.learn`, a layer above this package."""
_LEARNED = "What was learned from experience, what it cost, and how sure it is."


@checked(
    PolicyError,
    *(
        UnusedOption(name, lambda given: _own_report(given["posteriors"]) is not None, "it is of fits alone")
        for name in ("held_out", "gold", "diagnoses", "frontiers", "engines", "best_of", "overoptimisation")
    ),
    Untraced("call it outside: it compiles its own programs"),
)
@trace_cache()
def write_report(
    key: PRNGKey,
    path: Location,
    posteriors: Any,
    sections: Sequence[Section] = (),
    *,
    held_out: tuple[Any, ...] | None = None,
    gold: str | None = None,
    diagnoses: Mapping[str, Diagnosis] | None = None,
    frontiers: Mapping[str, Frontier] | None = None,
    engines: Mapping[str, EngineComparison] | None = None,
    best_of: Counts | None = None,
    overoptimisation: Mapping[str, Overoptimisation] | None = None,
) -> Path:
    """Write a report of one fit, or of several side by side, as one self-contained HTML file.

    It begins with the verdict and ends with how the fit was made; each figure says what a good result
    looks like. The report names what it cannot find, such as the verdict of a fit that was loaded without
    its policy, and shows the rest. The same key gives the same report of the same fits.

    Args:
        key: for the draws that the report makes; consumed whole.
        path: path of the file to write; an existing file is replaced.
        posteriors: a fit, or several by name; or the result of `bayesrl.control.learn`: one run, or several by name,
            where each name may have a list of independent runs.
        sections: further parts, for instance from a domain.
        held_out: other arguments of the program, on which to score the fits too.
        gold: name of a `numpyro.deterministic` site that the reward stands for: it is drawn against KL.
        diagnoses: existing verdicts by name (`fit` for a single posterior); missing ones are made.
        frontiers: existing frontiers of fits at several β, by name in the same way.
        engines: what `compare_engines` found of the same fits, by name in the same way. It is shown only if it is
            given: it costs several times what the rest of a report does.
        best_of: numbers n of draws of the prior: E[R] and KL of the best of n are drawn on the axes of the frontier. By
            default 2 to 64 for fits at several β of a program that can be enumerated. Elsewhere they take 256 × max(n)
            draws, and you must ask for them.
        overoptimisation: what `overoptimisation` found of the same fits, by name in the same way. It is found from a
            few draws where the total reward is a `rewards.uncertain`.

    Returns:
        The path.

    Raises:
        PolicyError: `posteriors` is empty or holds something other than posteriors; or a section, a diagnosis, a
            frontier or a comparison has the wrong type or belongs to another fit.
        RunFolderError: the path is a folder or cannot be written; its previous content is intact.

    Example:
        >>> import jax, numpyro, numpyro.distributions as dist, bayesrl, tempfile, pathlib
        >>> def bandit():
        ...     arm = numpyro.sample("arm", dist.Bernoulli(0.5))
        ...     bayesrl.reward("payoff", 1.0 * arm)
        >>> posterior = bayesrl.fit(jax.random.key(0), bandit, beta=1.0, num_steps=10, progress=False)
        >>> path = bayesrl.write_report(jax.random.key(1), pathlib.Path(tempfile.mkdtemp()) / "report.html", posterior)
        >>> path.read_text(encoding="utf-8").startswith("<!DOCTYPE html>")
        True
    """
    check_path(path)
    check_sections(sections)
    if (own := _own_report(posteriors)) is not None:
        title, parts_fn = own
        return write_parts(path, title, parts_fn(key, sections))
    named = {"fit": posteriors} if isinstance(posteriors, Posterior) else posteriors
    given = list(named.items()) if isinstance(named, Mapping) else []
    if not given or not all(isinstance(name, str) and isinstance(one, Posterior) for name, one in given):
        raise PolicyError(
            f"posteriors must be a Posterior, {Posterior.GIVEN_BY}, or several by name, such as {{'a': a, 'b': b}}, "
            f"got {format_value(posteriors)}"
        )
    _check_made(named, "diagnoses", diagnoses, Diagnosis)
    _check_made(named, "frontiers", frontiers, Frontier)
    _check_made(named, "engines", engines, EngineComparison)
    _check_made(named, "overoptimisation", overoptimisation, Overoptimisation)
    keys = split_keys(key, len(named))
    fits = [
        collect(
            one,
            name,
            posterior,
            held_out=held_out,
            gold=gold,
            diagnosis=(diagnoses or {}).get(name),
            frontier=(frontiers or {}).get(name),
            engines=(engines or {}).get(name),
            best_of=None if best_of is None else [int(n) for n in np.atleast_1d(best_of)],
            trust=(overoptimisation or {}).get(name),
        )
        for one, (name, posterior) in zip(keys, named.items(), strict=True)
    ]
    return write_fits(path, fits, sections)


def check_path(path: Any) -> None:
    """Refuse a path that cannot be written, before any computation.

    Raises:
        RunFolderError: the path is a folder or a device, or its folder does not exist or cannot be written.
    """
    file = Path(path)
    try:
        if file.is_dir():
            wrong = "it is a folder; name a file, such as report.html"
        elif file.exists() and not file.is_file():
            wrong = "it is a device or a pipe, which a file would take the place of; name a file"
        elif not file.parent.is_dir():
            wrong = f"there is no folder {file.parent}; make it first"
        elif not os.access(file.parent, os.W_OK):
            wrong = f"folder {file.parent} cannot be written; choose another"
        else:
            return
    except OSError as error:
        wrong = f"{error.strerror}; choose another name"
    raise RunFolderError(f"cannot write the report to {file}: {wrong}")


def check_sections(sections: Any) -> None:
    """Refuse sections that cannot be shown, before any computation.

    Raises:
        PolicyError: one is not a `Section`, or its title, caption or body cannot be shown.
    """
    if isinstance(sections, str | Section) or not isinstance(sections, Sequence):
        raise PolicyError(
            f"sections must be a list of bayesrl.Section(title, caption, body), got {format_value(sections)}"
        )
    for section in sections:
        if not isinstance(section, Section):
            raise PolicyError(f"a section must be a bayesrl.Section(title, caption, body), got {format_value(section)}")
        for name in ("title", "caption"):
            if not isinstance(getattr(section, name), str):
                raise PolicyError(
                    f"the {name} of section {section.title!r} must be text, got {getattr(section, name)!r}"
                )
        if not _can_be_shown(section.body):
            raise PolicyError(
                f"the body of section {section.title!r} must be a Matplotlib figure, text, or rows of cells with the "
                f"headings first, got {format_value(section.body)}"
            )


def _can_be_shown(body: Any) -> bool:
    from matplotlib.figure import Figure

    if isinstance(body, str | Figure):
        return True
    rows = (Sequence, np.ndarray)
    return isinstance(body, rows) and all(isinstance(row, rows) and not isinstance(row, str) for row in body)


def _check_made(named: Mapping[str, Posterior], what: str, made: Any, kind: type[Any]) -> None:
    """Refuse diagnoses, frontiers or comparisons that do not belong to these fits."""
    if made is None:
        return
    if not isinstance(made, Mapping):
        raise PolicyError(f"{what} must be by the name of their fit, such as {{'fit': ...}}, got {format_value(made)}")
    for name, one in made.items():
        if name not in named:
            raise PolicyError(f"{what} has a {name!r}, which is not among the fits; choose from {', '.join(named)}")
        if not isinstance(one, kind):
            maker = {"EngineComparison": "compare_engines"}.get(kind.__name__, kind.__name__.lower())
            raise PolicyError(f"{what}[{name!r}] must be the result of bayesrl.{maker}(...), got {format_value(one)}")
        if isinstance(one, Overoptimisation):  # it may be of other β, or of the best of n
            continue
        evidence, own = getattr(one, "evidence", one), named[name].beta
        if evidence is not None and np.shape(evidence.beta if evidence.beta is not None else ()) != np.shape(
            own if own is not None else ()
        ):
            raise PolicyError(
                f"{what}[{name!r}] is of β = {evidence.beta}, the fit of β = {own}; make it of the same posterior"
            )


def write_fits(path: str | Path, fits: Sequence[FitResults], sections: Sequence[Section] = ()) -> Path:
    """Write the report of fits whose contents were collected already.

    Raises:
        PolicyError: a section cannot be shown.
        RunFolderError: the path cannot be written; its previous content is intact.
    """
    check_sections(sections)
    title = fits[0].name if len(fits) == 1 else f"{len(fits)} fits side by side"
    return write_parts(path, title, report_parts(fits, sections), _FITTED)


def write_parts(path: str | Path, title: str, parts: Sequence[Part], subtitle: str = _LEARNED) -> Path:
    """Write a page of parts, by default about what was learned from experience.

    Raises:
        RunFolderError: the path cannot be written; its previous content is intact.
    """
    page = html_page(title, subtitle, parts, f"Written by bayesrl {version('bayesrl')}.")
    # The stamp is a comment after the end of the page.
    # “replace”, as lone surrogates in a user's text have no UTF-8.
    run_folder.write_file(path, stamped(f"{page}<!-- {blank('report')} -->\n".encode("utf-8", "replace")))
    return Path(path)


def _own_report(made: Any) -> tuple[str, Callable[[PRNGKey, Sequence[Section]], list[Part]]] | None:
    """Return the title and the function that makes the parts, for results with their own report; None for fits."""
    named = made if isinstance(made, Mapping) else {"run": made}
    first = next(iter(named.values()), None)
    first = first[0] if isinstance(first, list | tuple) and first else first
    parts_fn = next((fn for kind, fn in _REPORTS.items() if isinstance(first, kind)), None)
    if parts_fn is None:
        return None
    title = "What was learned" if len(named) == 1 else f"{len(named)} ways to learn side by side"
    return title, lambda key, sections: parts_fn(key, named, sections)


def register_report(kind: type) -> Callable[[PartsFn], PartsFn]:
    """Register the function that maps a key, results of this kind by name and sections to the parts of a report."""

    def register(parts_fn: PartsFn) -> PartsFn:
        _REPORTS[kind] = parts_fn
        return parts_fn

    return register

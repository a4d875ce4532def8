"""`compare`: put fits of one problem side by side, with paired errors on common draws."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import equinox as eqx
import jax
import numpy as np
from scipy.special import logsumexp

from bayesrl.arguments import CountAboveOne, Untraced, checked
from bayesrl.compilation.jit import trace_cache
from bayesrl.compilation.random_keys import fold_in, split
from bayesrl.core.draws import Totals
from bayesrl.core.programs import Programs
from bayesrl.core.structure import Structure
from bayesrl.diagnostics.diagnosed_fit import full_data_fit, refuse_without_actions
from bayesrl.diagnostics.evidence.stratified_estimator import StratifiedEstimator
from bayesrl.display.formatting import estimate_at, format_estimate, pluralize
from bayesrl.display.tables import Displayable, DisplayBlock, Line, Table
from bayesrl.errors import EngineError, PolicyError
from bayesrl.posterior.posterior import Posterior
from bayesrl.posterior.regularized import divergence_of
from bayesrl.statistics.averages import DivergenceFn
from bayesrl.statistics.definitions import divergence
from bayesrl.statistics.estimates import Estimate, InfluenceEstimate, Interval
from bayesrl.statistics.regularizer_names import regularizer_of, regularizer_symbol
from bayesrl.typing import Numbers, PRNGKey

_LEAST_EACH = 64
_CELLS = 2**24
_ELEMENTS = 2**22
_EPS = float(np.finfo(np.float32).eps)
_SAME = 1e-4


@checked(EngineError)
@dataclass(frozen=True, repr=False)
class Comparison(Displayable):
    """Fits of one problem side by side, on common draws.

    Attributes:
        names: names of the fits; differences are to the first.
        objective: J of each, reward units, [fit].
        reward: E[R] of each.
        kl: KL(q‖π₀) of each, nats.
        delta_objective: J minus that of the first, with paired standard error, [fit].
        delta_reward: the same for E[R].
        delta_kl: the same for KL.
        log_marginal: log p(y), nats, [fit], the same for all fits; None unless there are data beside rewards.
        divergence: the divergence that takes the place of KL in J of each; None for KL.
        delta_divergence: the same for the differences.
        regularizer: symbol of the divergence in J, such as KL or χ².
    """

    names: Sequence[str]
    objective: Interval
    reward: Interval
    kl: Interval
    delta_objective: Interval
    delta_reward: Interval
    delta_kl: Interval
    log_marginal: Interval | None = None
    divergence: Interval | None = None
    delta_divergence: Interval | None = None
    regularizer: str = "KL"

    def table(self) -> Table:
        """One row per fit, with its differences to the first."""
        columns = [self.objective, self.delta_objective, self.reward, self.delta_reward, self.kl, self.delta_kl]
        headings = ["fit", "J", "ΔJ", "E[R]", "ΔE[R]", "KL", "ΔKL"]
        if self.divergence is not None and self.delta_divergence is not None:
            columns[4:4] = [self.divergence, self.delta_divergence]
            headings[5:5] = [self.regularizer, f"Δ{self.regularizer}"]
        rows = [
            (name, *("" if i == 0 and k % 2 else format_estimate(estimate_at(one, i)) for k, one in enumerate(columns)))
            for i, name in enumerate(self.names)
        ]
        if self.log_marginal is not None:
            headings.append("log p(y)")
            rows = [(*row, format_estimate(estimate_at(self.log_marginal, i))) for i, row in enumerate(rows)]
        return Table(headings, rows)

    def _blocks(self) -> Sequence[DisplayBlock]:
        other = "" if self.regularizer == "KL" else f" J = E[R] − β·{self.regularizer}."
        return (
            self.table(),
            Line(f"Δ is the difference to the first, on common draws; ± is one standard error.{other}"),
        )


@checked(EngineError, Untraced("call it outside: it compiles its own programs"))
@trace_cache()
def compare(key: PRNGKey, posteriors: Mapping[str, Posterior], *, num_samples: CountAboveOne = 16_384) -> Comparison:
    """Compare fits of one problem: J, E[R] and KL of each, and their differences to the first.

    Every fit contributes an equal share of the draws, so together they are draws of the mixture m = Σₖ qₖ/K.
    Every draw is scored under every fit: E_qₖ[f] = E_m[(qₖ/m)·f]. The ratios are at most K, so no fit
    rests on a few draws of another. The means of qₖ/m − 1 are known to be 0, so these serve as control
    variates. Differences are taken draw by draw, so the noise that two similar fits share cancels. If a
    posterior has several restarts, its best enters, or the mixture if you selected one. Fits on mini-batches
    are scored on all data. Fits with another regulariser than KL are compared by their own J, if all have the same one.

    Args:
        key: consumed whole.
        posteriors: at least two posteriors by name, with their programs; differences are to the first.
        num_samples: total number of draws; fewer if many contexts would exhaust memory.

    Returns:
        `Comparison`, each number [fit]: J and E[R] in reward units (nats without rewards), KL in nats.

    Raises:
        PolicyError: there are fewer than two fits, or one is not a posterior, was loaded without its policy, or
            has an array of β; the fits differ in sites, arguments, β, regularisers or rewards; or a draw has an
            infinite or undefined score.
        EngineError: there are too few draws, or a policy draws nothing.

    Example:
        >>> import jax, jax.numpy as jnp, numpyro, numpyro.distributions as dist, bayesrl
        >>> def bandit():
        ...     arm = numpyro.sample("arm", dist.Categorical(logits=jnp.zeros(3)))
        ...     bayesrl.reward("payoff", jnp.array([0.0, 1.0, 2.0])[arm])
        >>> def fit(steps):
        ...     return bayesrl.fit(jax.random.key(0), bandit, beta=1.0, num_steps=steps, progress=False)
        >>> found = bayesrl.compare(jax.random.key(1), {"short": fit(3), "long": fit(300)})
        >>> bool(found.delta_objective.lower[1] > 0), found.delta_objective.mean.shape
        (True, (2,))

    References:
        Owen & Zhou (2000), "Safe and effective importance sampling", section 4; Veach & Guibas (1995),
        "Optimally combining sampling techniques for Monte Carlo rendering", section 3.2.
    """
    if len(posteriors) < 2:
        raise PolicyError(
            f"compare got {pluralize(len(posteriors), 'fit')}; pass at least two by name: "
            "compare(key, {'a': a, 'b': b})"
        )
    fits = [_ready(name, posterior) for name, posterior in posteriors.items()]
    for other in fits[1:]:
        _refuse_unlike(fits[0], other)
    if num_samples < _LEAST_EACH * len(fits):
        raise EngineError(
            f"num_samples={num_samples} are too few for {len(fits)} fits; draw at least {_LEAST_EACH * len(fits)}"
        )
    contexts = math.prod(fits[0].programs.structure.context_shape)
    # Every fit scores every draw of every fit, so memory grows with the square of their number.
    each = max(_LEAST_EACH, min(num_samples // len(fits), _CELLS // (contexts * len(fits) ** 2)))
    scores = _score_common(key, fits, each)
    _check(fits, scores)
    marginal = fits[0].posterior.log_marginal(fold_in(key, len(fits)))
    trained = any(fit.programs.learned for fit in fits)
    names, first = [fit.name for fit in fits], fits[0]
    compared = _compare(names, scores, first.beta, marginal, divergence_of(first.posterior.settings), trained=trained)
    return replace(compared, regularizer=regularizer_symbol(*first.regularizer))


class _Fit(NamedTuple):
    """One fit on all data: the best restart, or a mixture."""

    name: str
    posterior: Posterior
    programs: Programs
    beta: float | None
    regularizer: tuple[str, float | None]


def _ready(name: str, posterior: Posterior) -> _Fit:
    if posterior.beta is not None and np.ndim(posterior.beta) > 0:
        given = ", ".join(f"{beta:g}" for beta in np.ravel(posterior.beta))
        raise PolicyError(
            f"posterior {name!r} holds {np.size(posterior.beta)} temperatures ({given}); "
            "choose one with select(beta=...)"
        )
    whole = full_data_fit(posterior, what=f"posterior {name!r}")
    programs = whole._programs_for()
    refuse_without_actions(programs, f" of {name!r}", "to compare")
    if programs.learned and posterior.mixture is not None:
        raise PolicyError(
            f"the restarts of {name!r} have trained a policy each, and no mixture of policies is defined; "
            "use select(restart='best')"
        )
    beta = None if posterior.beta is None else float(posterior.beta)
    return _Fit(name, whole, programs, beta, regularizer_of(posterior.settings))


def _refuse_unlike(first: _Fit, other: _Fit) -> None:
    """Refuse fits of different problems and name the first difference."""
    names = f"{first.name!r} and {other.name!r}"
    difference = unlike_sites(first.programs.structure, other.programs.structure)
    if difference:
        raise PolicyError(f"{names} are fits of different policies: {difference}; compare fits of one policy")
    ours, theirs = first.programs.args, other.programs.args
    if len(ours) != len(theirs):
        raise PolicyError(
            f"{names} were fitted with {len(ours)} and {len(theirs)} arguments; fit both with the same arguments"
        )
    for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        if not eqx.tree_equal(a, b):
            raise PolicyError(
                f"{names} were fitted with different data: argument {i} of the program differs; "
                "fit both with the same arguments"
            )
    if (first.beta is None) != (other.beta is None) or (
        first.beta is not None and other.beta is not None and not math.isclose(first.beta, other.beta, rel_tol=1e-4)
    ):
        raise PolicyError(
            f"{names} have beta={first.beta} and beta={other.beta}, so their J are different objectives; "
            "fit both at one temperature, or choose it with select(beta=...)"
        )

    if first.regularizer != other.regularizer:
        own, its = (regularizer_symbol(*fit.regularizer) for fit in (first, other))
        raise PolicyError(
            f"{names} maximise E[R] − β·{own} and E[R] − β·{its}, so their J are different objectives; "
            "fit both with one regulariser, or compare their E[R] and KL by posterior.estimate"
        )


def unlike_sites(one: Structure, other: Structure) -> str:
    """Name the first site that differs and how it differs; empty if none does."""
    ours, theirs = ({site.name: site for site in structure.sites} for structure in (one, other))
    for name in (*ours, *theirs):
        if (name in ours) != (name in theirs):
            return f"only one has site {name!r}"
        a, b = ours[name], theirs[name]
        for field in ("kind", "shape", "support", "discrete", "hidden", "frames", "scan", "length", "event_dim"):
            if getattr(a, field) != getattr(b, field):
                return f"site {name!r} has {field}={getattr(a, field)!r} in one and {getattr(b, field)!r} in the other"
    return ""


# ---- draws -----------------------------------------------------------------------------------


def _score_common(key: PRNGKey, fits: Sequence[_Fit], each: int) -> list[Totals]:
    """Score the draws of all fits under each of them, [draws, contexts], contexts flat; draws are ordered by fit."""
    parts: list[list[Totals]] = [[] for _ in fits]
    for own_key, drawn_from in zip(split(key, len(fits)), fits, strict=True):
        for sites in _batches(own_key, drawn_from, each):
            for scored, fit in zip(parts, fits, strict=True):
                scored.append(_scores(fit, sites))
    return [jax.tree.map(lambda *xs: np.concatenate(xs), *own) for own in parts]


def _batches(key: PRNGKey, fit: _Fit, each: int) -> Iterator[dict[str, Numbers]]:
    """Draw the latent sites of one fit, [draws, ...], in batches of bounded memory."""
    structure = fit.programs.structure
    latent = structure.names("action", "environment")
    size = sum(math.prod(structure[name].shape) for name in latent) + 4 * math.prod(structure.context_shape)
    batch = max(1, min(each, _ELEMENTS // size))
    for i, start in enumerate(range(0, each, batch)):
        # Every batch has the same size, so that one compiled program serves them all; the last is cut.
        sites = fit.posterior.sample(fold_in(key, i), batch)
        yield {name: sites[name][0, : each - start] for name in latent}


def _scores(fit: _Fit, sites: dict[str, Numbers]) -> Totals:
    """Score draws under one fit: policy, rewards and q, as double-precision arrays [draws, contexts]."""
    scored = fit.posterior.scores(sites)
    return Totals(*(np.asarray(x, float)[0].reshape(x.shape[1], -1) for x in (*scored[:4], scored.ratio)))


def _check(fits: Sequence[_Fit], scores: Sequence[Totals]) -> None:
    """Refuse scores that would spoil every average, and policies that score the same draw differently."""
    for fit, own in zip(fits, scores, strict=True):
        rewards = list(fit.programs.structure.names("reward"))
        for what, values in (
            (f"the rewards {rewards}", own.reward),
            ("log π₀", own.log_prior),
            ("the log-likelihood of the data", own.log_likelihood),
        ):
            bad = int((~np.isfinite(values)).any(1).sum())
            if bad:
                raise PolicyError(
                    f"{what} of the policy of {fit.name!r} are not finite for {bad} of {len(values)} draws of the "
                    "fits, so J is not either; make them finite for everything that a fit draws"
                )
        if np.isnan(own.log_q).any():
            raise PolicyError(
                f"log q of {fit.name!r} is nan for {int(np.isnan(own.log_q).any(1).sum())} of {len(own.log_q)} "
                "draws of the fits; guides must score every value of the policy's support"
            )
        numbers = [("rewards", own.reward, scores[0].reward)]
        # Policies that were trained differ rightly in log π₀ and likelihood; only rewards must agree.
        if not (fit.programs.learned or fits[0].programs.learned):
            numbers.append(("log π₀", own.log_prior, scores[0].log_prior))
            numbers.append(("likelihoods", own.log_likelihood, scores[0].log_likelihood))
        for what, ours, theirs in numbers:
            apart = float(np.abs(np.asarray(ours) - np.asarray(theirs)).max())
            if apart > _SAME * max(1.0, float(np.abs(np.asarray(theirs)).max())):
                raise PolicyError(
                    f"{fits[0].name!r} and {fit.name!r} are fits of different policies: {what} of one and "
                    f"the same draw differ by {apart:.3g}; compare fits of one policy"
                )


# ---- estimates -------------------------------------------------------------------------------


def _compare(
    names: Sequence[str],
    scores: Sequence[Totals],
    beta: float | None,
    marginal: Estimate | None,
    other: DivergenceFn | None,
    *,
    trained: bool,
) -> Comparison:
    # A common π₀ cancels from the weights, and the ratio is more accurate than log q; trained policies differ in π₀.
    log_q = np.stack([np.asarray(own.log_q if trained else -own.ratio) for own in scores])
    ratios = np.exp(log_q - (logsumexp(log_q, axis=0) - math.log(len(scores))))
    estimator = StratifiedEstimator(ratios - 1, len(scores))
    control_doubts, scale = np.array([_rounding(own) for own in log_q]), 1.0 if beta is None else beta

    def average(k: int, values: np.ndarray, doubt: float) -> tuple[InfluenceEstimate, float]:
        """Average over fit k; also return the possible error of single precision."""
        found, slopes = estimator.regress(ratios[k] * np.where(ratios[k] > 0, values, 0.0))
        # The mean of a control is 0 only up to the rounding of its log q, which the slope multiplies.
        return found.over_contexts(), doubt + float((np.abs(slopes) * control_doubts).sum(1).mean())

    def interval(found: InfluenceEstimate, doubt: float) -> Interval:
        if found.mean == 0 and not found.influence.any():  # no draw distinguishes the two fits
            return Interval.exact(0.0)
        # If fits take no more values than there are fits, controls remove all noise and only rounding is left.
        numbers = estimator.interval(found, doubt)
        return numbers._replace(se=np.hypot(numbers.se, doubt))

    averages: dict[str, list[tuple[InfluenceEstimate, float]]] = {"objective": [], "reward": [], "kl": []}
    for k, own in enumerate(scores):
        rewards = np.asarray(own.reward) / scale
        doubts = [_rounding(np.asarray(x)) for x in (own.log_prior, own.log_q, own.log_likelihood, rewards)]
        if other is None:
            averages["objective"].append(average(k, own.log_weight(scale), sum(doubts)))
        else:
            terms = np.asarray(other(-own.ratio), float)
            averages["objective"].append(average(k, rewards - terms, sum(doubts)))
            averages.setdefault("divergence", []).append(average(k, terms, doubts[0] + doubts[1]))
        averages["reward"].append(average(k, rewards, doubts[3]))
        averages["kl"].append(average(k, divergence(own, conditioned=marginal is not None), doubts[0] + doubts[1]))
    # log p(y) is common to all fits, so differences do not carry its error.
    known, error = (0.0, 0.0) if marginal is None else (float(marginal.mean), 2 * float(marginal.se))
    fields: dict[str, Any] = {}
    for name, found in averages.items():
        sign, unit = {"objective": (-1, scale), "reward": (0, scale), "kl": (1, 1.0)}.get(name, (0, 1.0))
        first, first_doubt = found[0]
        shown = [interval(x._replace(mean=x.mean + sign * known), d + abs(sign) * error) for x, d in found]
        less = [interval(x.plus(first, -1.0), d + first_doubt) for x, d in found]
        for field, parts in ((name, shown), (f"delta_{name}", less)):
            fields[field] = Interval(*np.asarray(parts).T) * unit
    repeated = None if marginal is None else [np.full(len(names), float(part)) for part in marginal]
    return Comparison(
        tuple(names), **fields, log_marginal=None if repeated is None else Interval.normal(repeated[0], repeated[1])
    )


def _rounding(scores: np.ndarray) -> float:
    """Bound the rounding of single precision: two units in the last place of a typical score."""
    return 2 * _EPS * float(np.abs(scores[np.isfinite(scores)]).mean())

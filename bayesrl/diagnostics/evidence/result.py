"""The result of `evidence`: log Z from both sides, J of the fit, and the gap; readable without JAX."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from bayesrl.arguments import checked
from bayesrl.display.evidence_cells import evidence_cells, objective_columns, weight_columns
from bayesrl.display.formatting import pluralize
from bayesrl.display.tables import Displayable, DisplayBlock, Line, Table
from bayesrl.errors import EngineError
from bayesrl.statistics.described_estimates import describe_estimates, read_estimates
from bayesrl.statistics.estimates import Estimate, Interval
from bayesrl.statistics.regularizer_names import distils, regularizer_formula, regularizer_symbol

if TYPE_CHECKING:
    from bayesrl.exact.weighted_draws import WeightedDraws

type Method = Literal["enumeration", "rejection", "importance", "nuts", "smc", "hindsight", "dual", "known", "draws"]
NO_WEIGHTS = "nature's luck or a discount moves the weights of draws, whatever the fit"
NO_TARGET = "no weights of draws to this optimum were taken"
TIED = "the weights are tied or all alike, and have no tail for k̂ to judge"

_METHODS = {
    "enumeration": "by enumeration",
    "rejection": "by rejection, whose draws are of p* itself",
    "importance": "by weighting draws",
    "nuts": "by weighting draws, checked by a Markov chain (NUTS)",
    "smc": "by particles: forward runs below, runs that hold a draw of p* above",
    "hindsight": "by hindsight: an upper bound with nature's draws fixed",
    "dual": "by weighting draws in the dual problem, whose value at any λ is a bound from above",
    "known": "by what is known of the problem",
}
_COPIED = ("method", "caveat", "num_samples", "num_weighed", "num_contexts", "regularizer", "alpha", "best_of")
_PLAIN = (*_COPIED, "metrics")
_LATER = {
    "regularizer": "kl",
    "alpha": None,
    "divergence": None,
    "best_of": None,
}  # what the files of earlier versions lack
_UNWRITTEN = ("by_context", "target")
"""Fields that files omit: they are large, and no display needs them."""


@checked(EngineError)
@dataclass(frozen=True, repr=False)
class Evidence(Displayable):
    """How far a fit is from the optimum: log Z from both sides, and the gap, per context, [*beta].

    It holds every quantity of a fit once: tables, figures, checks, reports and files show these numbers and no others,
    and J + gap = J*. If only one side of J* is known, J* and the gap have an end but no mean. The gap's end is the end
    of J* minus J, and has J's standard error. `evidence[i]` is the evidence at one of several temperatures.

    Without environment sites J* = β·log Z and gap = β·KL(q‖p*). With environment sites `optimum` is
    that of control, and `log_evidence` and both KLs to p* are None. With another regulariser J = E[R] − β·`divergence`,
    p* is where it is greatest, and there is no log Z and no KL(q‖p*), which is infinite where p* leaves out actions.

    Attributes:
        beta: temperatures, [*beta], reward units per nat; None without rewards.
        method: how log Z, or the optimum of control, was found.
        lower: an estimate whose expectation is below log Z (ELBO, IWAE), nats; below J*/β where there is no log Z.
        upper: one whose expectation is above (EUBO); None if only a lower bound is honest.
        caveat: why `upper` is None, or why there is no calibrated interval; empty otherwise.
        log_evidence: log Z averaged over contexts, nats; None with environment sites.
        log_marginal: log p(y), nats; None unless there are observed sites beside rewards. `log_evidence` is then
            log Z − log p(y).
        optimum: J*, reward units (nats without rewards).
        prior_objective: J(π₀), reward units; None if the policy itself was trained.
        objective: J(q), reward units.
        reward: E_q[R], reward units.
        kl: KL(q‖π₀), nats.
        gap: J* − J(q), reward units; None if J* has no upper bound at all.
        kl_reverse: KL(q‖p*), nats; None with environment sites or without an upper bound.
        kl_forward: KL(p*‖q), nats; None in the same cases.
        ess: effective number of the fit's own draws, as draws of p*, least over contexts, [*beta]; nan if nature's
            luck or a discount moves their weights.
        khat: Pareto k̂ of the weights p*/q of these draws, greatest over contexts, [*beta]; nan if their tail is
            tied, or as for `ess`.
        missed_mass: mass of p* where q puts less than a tenth of it, [*beta]; nan if unknown.
        num_samples: number of draws used, 0 if everything is exact.
        num_weighed: number of the fit's own draws behind `ess` and `khat`; the draws it carries if all is exact.
        num_contexts: number of separate problems that each number averages over.
        metrics: means of the program's deterministic sites under the fit, by name; empty unless requested.
        by_context: log Z of each context, [*beta, *contexts]; None with environment sites.
        target: p*, if it was enumerated.
        regularizer: what keeps the fit near the prior: "kl", or another name of `enumerate_posterior`.
        alpha: order of regularizer="alpha".
        divergence: D_f(q‖π₀) of another regulariser than KL; None for KL.
        best_of: n, if the fit distils the best of n draws: p* is then their law pₙ, `objective` −β·KL(q‖pₙ) with
            `optimum` 0, `gap` β·KL(q‖pₙ), and `prior_objective` −β·KL(pₙ‖π₀), the distance that there was to go.

    Example:
        >>> import jax, jax.numpy as jnp, numpyro, numpyro.distributions as dist, bayesrl
        >>> def bandit():
        ...     arm = numpyro.sample("arm", dist.Categorical(logits=jnp.zeros(3)))
        ...     bayesrl.reward("payoff", jnp.array([0.0, 1.0, 2.0])[arm])
        >>> posterior = bayesrl.fit(jax.random.key(0), bandit, beta=1.0, num_steps=500, progress=False)
        >>> evidence = bayesrl.evidence(jax.random.key(1), posterior)
        >>> round(float(evidence.optimum.mean), 3), bool(evidence.gap.mean < 0.001)  # J* = log((1 + e + e²) / 3)
        (1.309, True)
    """

    beta: np.ndarray | None
    method: Method
    lower: Estimate
    upper: Estimate | None
    caveat: str
    log_evidence: Interval | None
    log_marginal: Interval | None
    optimum: Interval
    prior_objective: Interval | None
    objective: Interval
    reward: Interval
    kl: Interval
    gap: Interval | None
    kl_reverse: Interval | None
    kl_forward: Interval | None
    ess: np.ndarray
    khat: np.ndarray
    missed_mass: np.ndarray
    num_samples: int
    num_weighed: int = 0
    num_contexts: int = 1
    metrics: Mapping[str, Estimate] = field(default_factory=dict)
    by_context: Interval | None = None
    target: "WeightedDraws | None" = None
    regularizer: str = "kl"
    alpha: float | None = None
    divergence: Interval | None = None
    best_of: int | None = None

    @classmethod
    def unbracketed(
        cls,
        beta: Any,
        objective: Interval,
        reward: Interval,
        kl: Interval,
        caveat: str,
        *,
        prior_objective: Interval | None = None,
        log_marginal: Interval | None = None,
        num_samples: int = 0,
    ) -> "Evidence":
        """Make the evidence of a fit whose J, E[R] and KL are known, but whose optimum is only known to exceed J.

        Args:
            beta: temperatures, [*beta]; None without rewards.
            objective: J(q).
            reward: E_q[R].
            kl: KL(q‖π₀).
            caveat: why the optimum is unknown.
            prior_objective: J(π₀).
            log_marginal: log p(y), if there are data beside rewards.
            num_samples: number of draws behind J.
        """
        nothing, scale = np.full_like(objective.mean, np.nan), np.asarray(1.0 if beta is None else beta, float)
        return cls(
            beta=None if beta is None else scale,
            method="draws",
            lower=Estimate(objective.mean / scale, objective.se / scale),
            upper=None,
            caveat=caveat,
            log_evidence=None,
            log_marginal=log_marginal,
            optimum=Interval.between(objective.conservative_lower, np.full_like(objective.mean, np.inf)),
            prior_objective=prior_objective,
            objective=objective,
            reward=reward,
            kl=kl,
            gap=None,
            kl_reverse=None,
            kl_forward=None,
            ess=nothing,
            khat=nothing,
            missed_mass=nothing,
            num_samples=num_samples,
        )

    def without_divergences(self) -> "Evidence":
        """Leave out everything about p* if nature draws too: no policy reaches her part of it."""
        nothing = np.asarray(np.nan)
        fields: dict[str, Any] = dict.fromkeys(("log_evidence", "by_context", "kl_reverse", "kl_forward"))
        return dataclasses.replace(self, **fields, ess=nothing, khat=nothing, missed_mass=nothing, num_weighed=0)

    # ---- temperatures ------------------------------------------------------------------------

    @property
    def betas(self) -> list[float | None]:
        """Temperatures as a list; one None without rewards."""
        return [None] if self.beta is None else [float(b) for b in np.atleast_1d(self.beta)]

    def __getitem__(self, index: int | np.ndarray) -> "Evidence":
        """Take one temperature, or several in a given order; the index is into the flat axis [*beta]."""
        lead, num = np.ndim(1.0 if self.beta is None else self.beta), len(self.betas)
        return self._combine(lambda x: x.reshape(num, *x.shape[lead:])[index], self)

    @property
    def rows(self) -> list["Evidence"]:
        """The evidence at each temperature, with numbers instead of arrays."""
        return [self[i] for i in range(len(self.betas))]

    @staticmethod
    def stack(rows: Sequence["Evidence"], lead: tuple[int, ...]) -> "Evidence":
        """Join the evidence of each temperature, [*beta]."""
        methods: list[Method] = [row.method for row in rows]
        joined = Evidence._combine(lambda *x: np.stack(x).reshape((*lead, *x[0].shape)), *rows)
        return dataclasses.replace(
            joined,
            method=max(set(methods), key=methods.count),
            caveat="; ".join(dict.fromkeys(row.caveat for row in rows if row.caveat)),
            num_samples=max(row.num_samples for row in rows),
            num_weighed=max(row.num_weighed for row in rows),
        )

    @staticmethod
    def _combine(change: Callable[..., np.ndarray], *rows: "Evidence") -> "Evidence":
        """Change every array, or combine those of several rows; the rest is copied from the first."""

        def combine(*values: Any) -> Any:
            first = values[0]
            if any(value is None for value in values):
                return None
            if isinstance(first, tuple):
                return type(first)(*(combine(*parts) for parts in zip(*values, strict=True)))
            if isinstance(first, dict):
                return {name: combine(*(value[name] for value in values)) for name in first}
            if isinstance(first, np.ndarray | np.generic | float):
                return np.asarray(change(*(np.asarray(value, float) for value in values)))
            return first

        names = [one.name for one in dataclasses.fields(Evidence)]
        combined = {name: combine(*(getattr(row, name) for row in rows)) for name in names if name not in _COPIED}
        return Evidence(**combined | {name: getattr(rows[0], name) for name in _COPIED})

    # ---- what follows from it ----------------------------------------------------------------

    @property
    def relative_gap(self) -> Interval | None:
        """The gap as a share of the possible gain J* − J(π₀); None if unknown.

        If only one end of J* is known, so is one end of the share: that same end, since the share grows with J*.
        """
        if self.gap is None or self.prior_objective is None:
            return None
        one_sided, above = np.isnan(self.gap.mean), np.isfinite(self.gap.conservative_upper)
        end = np.where(above, self.optimum.conservative_upper, self.optimum.conservative_lower)
        with np.errstate(divide="ignore", invalid="ignore"):
            # A one-sided gap is divided by the gain at the one known end of J*.
            gain = np.where(one_sided, end, self.optimum.mean) - self.prior_objective.mean
            share = self.gap * np.where(gain > 0, 1 / gain, np.nan)
        return share._replace(conservative_upper=np.where(one_sided & ~above, np.inf, share.conservative_upper))

    @property
    def explanation(self) -> str:
        """How the optimum was reached, in a sentence."""
        draws = pluralize(self.num_samples, "draw")
        if self.best_of is not None:
            how = "by sums over all values" if self.method == "enumeration" else f"from {draws}: {self.caveat}"
            return f"{distils(self.best_of)} KL(q‖pₙ) was found {how.rstrip('.')}."
        if self.method == "draws":
            drawn = f" J is the mean of {draws}." if self.num_samples else ""
            return f"The optimum is not known: {self.caveat.rstrip('.')}.{drawn}"
        drawn = f"; J of the fit was estimated from {draws}" if self.num_samples else ", exactly"
        if self.num_samples and self.method not in ("enumeration", "known"):
            drawn = f" ({draws})"
        caveat = f" But {self.caveat.rstrip('.')}." if self.caveat else ""
        of = f" with {self.symbol} in the place of KL" if self.regularizer != "kl" else ""
        return f"The optimum{of} was reached {_METHODS[self.method]}{drawn}.{caveat}"

    @property
    def symbol(self) -> str:
        """The divergence in J, such as KL or χ²."""
        return regularizer_symbol(self.regularizer, self.alpha)

    @property
    def no_khat(self) -> str:
        """Why there is no k̂ at this temperature; empty if there is one."""
        if not math.isnan(float(self.khat)):
            return ""
        if not math.isnan(float(self.ess)):
            return TIED
        nothing = NO_WEIGHTS if self.regularizer == "kl" and self.best_of is None else NO_TARGET
        return nothing if self.num_weighed == 0 else "no weight is finite"

    @property
    def weighed(self) -> str:
        """Which draws ESS and k̂ describe, and why k̂ is missing if it is; a sentence."""
        rows = self.rows
        missing = [row.no_khat for row in rows if row.no_khat]
        sentences = [f"ESS and k̂ are of {pluralize(self.num_weighed, 'draw')} of the fit."] if self.num_weighed else []
        at_some = "" if len(missing) == len(rows) else " at some β"
        return " ".join([*sentences, *(f"k̂ is not given{at_some}: {reason}." for reason in dict.fromkeys(missing))])

    # ---- as text -----------------------------------------------------------------------------

    def cells(self) -> dict[str, str]:
        """Write every quantity at one temperature as text, by heading."""
        return evidence_cells(self)

    def table(self) -> Table:
        """One row per temperature: J, J* and the gap between them."""
        return objective_columns(self)

    def weight_table(self) -> Table:
        """One row per temperature: limits of log Z from both sides, the distance to p*, and the weights."""
        return weight_columns(self)

    @property
    def legend(self) -> str:
        """The units of the columns."""
        if self.best_of is not None:
            apart = "β·KL(q‖pₙ) and E[R] in reward units, KL in nats; relative gap = KL(q‖pₙ) / KL(pₙ‖π₀)"
            return f"{apart}; ± is one standard error, [ ] a 95% interval"
        units = "J, J*, gap and E[R] in reward units; KL and log Z in nats" if self.beta is not None else "all in nats"
        if self.regularizer != "kl":
            units = (
                f"J = E[R] − β·{self.symbol}, {regularizer_formula(self.regularizer, self.alpha)}, p* where it is "
                "greatest; J, J*, gap and E[R] in reward units; KL in nats"
            )
        return f"{units}; ± is one standard error, [ ] a 95% interval; relative gap = gap / (J* − J(π₀))"

    def _blocks(self) -> Sequence[DisplayBlock]:
        legend = Line(f"({self.legend}; from below and above: 97.5% limits)")
        first, second = self.table(), self.weight_table()
        last = (legend, Line(f"{self.explanation} {self.weighed}"))
        if len(first.rows) > 1:
            return first, second, *last
        whole = Table((*first.headings, *second.headings[1:]), [(*first.rows[0], *second.rows[0][1:])])
        return whole.transpose(), *last

    # ---- as JSON -----------------------------------------------------------------------------

    def to_json(self) -> dict[str, Any]:
        """Describe it in JSON types, without log Z of each context and p* itself; `nan` and `inf` become strings."""
        names = [one.name for one in dataclasses.fields(self) if one.name not in _UNWRITTEN]
        return {name: describe_estimates(getattr(self, name)) for name in names}

    @classmethod
    def from_json(cls, described: Mapping[str, Any]) -> "Evidence":
        """Restore the evidence that `to_json` described.

        Raises:
            KeyError, TypeError, ValueError: `described` is not such a description.
        """
        names = [one.name for one in dataclasses.fields(cls) if one.name not in _UNWRITTEN]
        described = _LATER | dict(described)
        values = {name: described[name] if name in _PLAIN else read_estimates(described[name]) for name in names}
        metrics = {name: read_estimates(value) for name, value in described["metrics"].items()}
        made = cls(**values | {"metrics": metrics})
        if (made.method != "draws" and made.method not in _METHODS) or not made.symbol:
            raise ValueError(f"method is {made.method!r}")
        shape = np.shape(made.objective.mean)

        def check(array: np.ndarray) -> np.ndarray:
            if array.shape != shape:
                raise ValueError(f"an array has shape {array.shape}, not {shape}")
            return array

        return cls._combine(check, made)

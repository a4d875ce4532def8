"""The result of `calibrate`: ranks of the true values, and whether they are uniform."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import jax.numpy as jnp
import numpy as np

from bayesrl.argument_types import Requirement
from bayesrl.arguments import Count, Level, checked
from bayesrl.display.formatting import format_estimate, format_number, pluralize
from bayesrl.display.tables import Displayable, DisplayBlock, Line, Table
from bayesrl.errors import EngineError
from bayesrl.statistics.estimates import Estimate
from bayesrl.value_checks import are_finite

LIKELIHOOD = "log p(y|θ)"
_LEVEL = 0.01


@checked(EngineError)
@dataclass(frozen=True, repr=False)
class Calibration(Displayable):
    """Ranks of the values that generated the data among draws inferred from the data.

    Attributes:
        names: names of the quantities: every number of every latent site, and log p(y|θ).
        ranks: [replication, quantity], 0 to `num_samples`, ties broken at random.
        num_samples: number of draws that each rank is among.
        pit: the ranks as uniform numbers between 0 and 1.

    Example:
        >>> import numpy as np
        >>> from bayesrl.diagnostics.rank_statistics import Calibration
        >>> ranks = np.random.default_rng(0).integers(0, 100, (200, 1))
        >>> found = Calibration(("theta",), ranks, 99, (ranks + 0.5) / 100)
        >>> found.verdict, bool(0.7 < found.coverage(0.8).mean[0] < 0.9)
        ('pass', True)
    """

    names: tuple[str, ...]
    ranks: Annotated[np.ndarray, Requirement("finite ranks", are_finite)]
    num_samples: Count
    pit: Annotated[np.ndarray, Requirement("numbers from 0 to 1", are_finite)]

    @property
    def p_values(self) -> np.ndarray:
        """P-value of a test of uniformity for each quantity (ArviZ's `pot_c`), [quantity]."""
        # Imported only here: ArviZ takes longer to import than a verdict takes.
        from arviz_stats.base.array import array_stats

        return np.asarray(array_stats.uniformity_test(self.pit, axis=0, method="pot_c")[0], float).reshape(-1)

    @property
    def p_value(self) -> float:
        """P-value of all quantities together, by Bonferroni."""
        return float(min(1.0, self.p_values.min() * len(self.names)))

    @property
    def verdict(self) -> Literal["pass", "fail"]:
        """`fail` if calibrated inference would give ranks this uneven once in a hundred times or less."""
        return "fail" if self.p_value < _LEVEL else "pass"

    @property
    def explanation(self) -> str:
        """What the worst quantity looks like."""
        p_values, replications = self.p_values, len(self.pit)
        if self.verdict == "pass":
            data = pluralize(replications, "data set")
            return f"Ranks of {len(self.names)} quantities over {data} are uniform, as they should be."
        # The last quantity is the log-likelihood, which matters here only if every latent site passes.
        worst = int(p_values[:-1].argmin())
        if p_values[worst] * len(self.names) >= _LEVEL:
            return (
                f"Ranks of {LIKELIHOOD} are not uniform (p = {p_values[-1]:.1g}) though those of the latent sites are: "
                "inference does not use the data as it should."
            )
        centred = self.pit[:, worst] - 0.5
        # For uniform numbers both are 0 in expectation; the factors bring them to a common scale, unit variance.
        shift, spread = centred.mean() * np.sqrt(12), ((centred**2).mean() - 1 / 12) * np.sqrt(180)
        if abs(shift) > abs(spread):
            how = "too low" if shift > 0 else "too high"
        else:
            how = "too narrow" if spread > 0 else "too wide"
        return f"Draws of {self.names[worst]} are {how}: its ranks are not uniform (p = {p_values[worst]:.1g})."

    def coverage(self, level: Level) -> Estimate:
        """How often the central interval of this level held the true value, with standard error, [quantity].

        Raises:
            EngineError: the level is not between 0 and 1.
        """
        inside = np.abs(self.pit - 0.5) <= level / 2
        mean = inside.mean(0)
        return Estimate(jnp.asarray(mean), jnp.asarray(np.sqrt(mean * (1 - mean) / len(inside))))

    def _blocks(self) -> Sequence[DisplayBlock]:
        p_values = self.p_values
        order = np.argsort(p_values)[:10]
        coverages = [self.coverage(level) for level in (0.5, 0.8, 0.95)]
        rows = [
            (
                self.names[i],
                format_number(float(p_values[i]), 2),
                *(format_estimate(Estimate(one.mean[i], one.se[i])) for one in coverages),
            )
            for i in order
        ]
        listing = Table(("quantity", "p of uniformity", "in 50%", "in 80%", "in 95%"), rows)
        return Line(self.explanation, self.verdict), listing

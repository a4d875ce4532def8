"""The registry: every engine against every problem with a known answer, and by name why others do not apply."""

from typing import Any

import jax
import numpy as np
import pytest
from oracles import ORACLES, standing

from bayesrl.diagnostics.engines.engine_table import ENGINES, EngineComparison, EngineName
from bayesrl.diagnostics.engines.side_by_side import compare_engines

KEY = jax.random.key(7)

NATURE = ("chain_with_nature", "observable", "hidden", "weathers", "answered")
TIME, CONTINUOUS = ("chain", "episode", "walk"), ("gaussian", "walk", "jump")
ENDLESS = (*CONTINUOUS, "mixed", "answered")

TILTED = "it would tilt environment site"
REFUSED: dict[str, dict[EngineName, str]] = {
    name: {
        **dict.fromkeys(("smc_given_twist",), TILTED if name in NATURE else "no twist was given"),
        **({} if name in NATURE else {"hindsight": "nature draws nothing"}),
        **({"enumeration": "continuous support"} if name in ENDLESS else {}),
        **(
            dict.fromkeys(
                (
                    "importance",
                    "importance_from_fit",
                    "rejection",
                    "nuts",
                    *(e for e in ENGINES if e.startswith("smc")),
                ),
                TILTED,
            )
            if name in NATURE
            else {"smc_reward_twist": "twist='reward' is the reward of a text" if name in TIME else "it has no scan"}
        ),
        **({"hindsight": "cannot be enumerated either"} if name == "answered" else {}),
        **({} if name in (*TIME, *NATURE) else dict.fromkeys(("smc_sequential", "smc_exact_twist"), "it has no scan")),
        **({"smc_exact_twist": "continuous support"} if name == "walk" else {}),
        **({} if name in (*CONTINUOUS, *NATURE) else {"nuts": "NUTS cannot draw discrete site"}),
        **({"rejection": "likelihood of observed site 'y' has no bound"} if name == "observed" else {}),
    }
    for name in ORACLES
}
"""What does not apply to an oracle, and words of the reason."""


def compared(name: str) -> EngineComparison:
    oracle = ORACLES[name]()
    return compare_engines(KEY, standing(KEY, oracle), budget=2**15, optimum=lambda beta: oracle.optimum)


@pytest.mark.parametrize("name", sorted(ORACLES))
def test_every_engine_agrees_with_every_oracle(name: str) -> None:
    """Up to 11 rows, each within its limits (5% miss) and 5 standard errors: some 4 false alarms in 100 with new keys.

    The key is fixed, so that none of them comes and goes.
    """
    oracle, found = ORACLES[name](), compared(name)
    assert {row.engine for row in found.rows} | set(REFUSED[name]) == set(ENGINES)
    assert set(found.refusals) == set(REFUSED[name])
    for engine, words in REFUSED[name].items():
        assert words in found.refusals[engine], engine
    # π₀ of data is p(x, y) to the oracle, and p(x|y) to engines.
    log_y = oracle.beta * float(found["enumeration"].optimum.mean) - 0.0 if name == "none" else 0.0
    for row in found.rows:
        check(row, oracle, log_y)
    assert found.objective is not None
    truth = oracle.value(oracle.params) - log_y
    assert abs(float(found.objective.mean) - truth) < 5 * float(found.objective.se) + 1e-4


def check(row: Any, oracle: Any, log_y: float) -> None:
    optimum = oracle.optimum - log_y
    slack = 1e-4 * max(abs(optimum), 1.0)
    assert float(row.optimum.conservative_lower) - slack <= optimum <= float(row.optimum.conservative_upper) + slack, (
        row
    )
    if np.isfinite(row.optimum.mean) and float(row.optimum.se) < 0.2 * oracle.beta:
        assert abs(float(row.optimum.mean) - optimum) < 5 * float(row.optimum.se) + slack, row
    if row.gap is not None and np.isfinite(row.gap.mean):
        gap = optimum - (oracle.value(oracle.params) - log_y)
        assert float(row.gap.conservative_lower) - slack <= gap <= float(row.gap.conservative_upper) + slack, row

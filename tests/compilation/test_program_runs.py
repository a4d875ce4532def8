"""How often a fit runs the user's program in Python: each run of a large program is seconds that nobody sees."""

import sys
from pathlib import Path
from types import FrameType
from typing import Any

import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist

import bayesrl

MEANS = jnp.array([0.1, 0.3, 0.5, 0.7, 0.9])
PACKAGE = str(Path(bayesrl.__file__).parent)


def test_a_fit_on_a_warm_process_runs_its_program_eight_times_and_enters_fifty_files() -> None:
    # Twice to see that it is steady, once each for the guide's plan and its parameters, and policy and guide side by
    # side for draws and for a step. The draws that the posterior carries of the prior are of the guide at its start.
    runs = []

    def bandit() -> None:
        runs.append(1)
        arm = numpyro.sample("arm", dist.Categorical(logits=jnp.zeros(5)))
        bayesrl.reward("payoff", MEANS[arm])

    def fit(seed: int) -> None:
        bayesrl.fit(jax.random.key(seed), bandit, beta=0.1, num_steps=100, progress=False)

    entered: set[str] = set()

    def look(frame: FrameType, event: str, _: Any) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(PACKAGE):
            entered.add(frame.f_code.co_filename)

    fit(0)
    runs.clear()
    before = sys.getprofile()
    sys.setprofile(look)
    try:
        fit(1)
    finally:
        sys.setprofile(before)
    assert len(runs) <= 8
    assert len(entered) <= 50

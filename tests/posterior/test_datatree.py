"""The file that a run leaves is what xarray would have written, whoever wrote it."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr

from bayesrl.posterior.datatree import as_netcdf, from_datatree, to_datatree
from bayesrl.posterior.posterior import Posterior


def posterior(lead: tuple[int, ...], beta: Any, **others: Any) -> Posterior:
    """Make a posterior by hand, [*lead, draw, ...]."""
    random = np.random.default_rng(0)
    made: dict[str, Any] = {
        "history": {
            "step": np.array([10, 20]),
            "loss": random.normal(size=(2, *lead)),
            "metrics/hit": np.ones((2, *lead)),
        },
        "draws": {
            "arm": random.integers(0, 3, (*lead, 5)),
            "x": random.normal(size=(*lead, 5, 2, 3)).astype(np.float32),
        },
        "statistics": {"log_q": np.full((*lead, 5), np.nan, np.float32)},
        "prior_draws": {"arm": random.integers(0, 3, (7,)), "x": random.normal(size=(7, 2, 3))},
        "settings": {
            "num_steps": 20,
            "num_restarts": lead[-1],
            "optimizer": "default",
            "tolerance": 0.5,
            "seed": "[0]",
        },
    }
    return Posterior(beta, {}, **made | others)


CASES = {
    "one fit": ((1,), 0.1, {}),
    "restarts": ((3,), None, {}),
    "a sweep": ((2, 3), np.array([0.1, 1.0]), {}),
    "no draws": ((2,), 1.0, {"draws": {}, "prior_draws": {}, "statistics": {}}),
    "no history": ((2,), 1.0, {"history": {"loss": np.zeros((0, 2)), "step": np.zeros(0, int)}}),
    "truth values": ((1,), 1.0, {"statistics": {"done": np.ones((1, 5), bool)}}),
    "small numbers": ((1,), 1.0, {"statistics": {"tokens": np.ones((1, 5), np.int8)}}),
    "the name of a dimension": ((1,), 1.0, {"draws": {"step": np.ones((1, 5))}}),
    "names of dimensions": ((2,), 1.0, {"draws": {name: np.ones((2, 5, 3)) for name in ("draw", "chain", "draw_")}}),
    "β as a site of a sweep": ((2, 1), np.array([0.1, 1.0]), {"draws": {"beta": np.ones((2, 1, 5))}}),
    "the axis of another site": ((1,), 1.0, {"draws": {"x": np.ones((1, 5, 3)), "x_dim_0": np.ones((1, 5, 4))}}),
    "paths": (
        (1,),
        1.0,
        {"draws": {"agent/arm": np.ones((1, 5)), "agent.arm": np.zeros((1, 5)), "/": np.ones((1, 5))}},
    ),
    "Greek and blanks": ((1,), 1.0, {"draws": {"θ": np.ones((1, 5)), "two words": np.zeros((1, 5, 2))}}),
    "metrics by path": (
        (1,),
        1.0,
        {"history": {"step": np.array([1]), "metrics/a.b": np.ones((1, 1)), "metrics.a/b": np.zeros((1, 1))}},
    ),
    "one temperature": ((1, 2), np.array([0.1]), {}),
    "one of everything": (
        (1, 1),
        np.array([0.1]),
        {"draws": {"x": np.ones((1, 1, 1, 1))}, "history": {"step": np.array([1]), "loss": np.ones((1, 1, 1))}},
    ),
    "one temperature, no history": (
        (1, 2),
        np.array([0.1]),
        {"history": {"loss": np.zeros((0, 1, 2)), "step": np.zeros(0, int)}},
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_the_file_is_that_of_xarray(name: str, tmp_path: Path) -> None:
    lead, beta, others = CASES[name]
    made = posterior(lead, beta, **others)
    (tmp_path / "ours.nc").write_bytes(as_netcdf(made))
    to_datatree(made).to_netcdf(tmp_path / "theirs.nc", engine="h5netcdf")
    with (
        xr.open_datatree(tmp_path / "ours.nc", engine="h5netcdf") as ours,
        xr.open_datatree(tmp_path / "theirs.nc", engine="h5netcdf") as theirs,
    ):
        xr.testing.assert_identical(ours, theirs)
        again = from_datatree(ours.load(), {}, made.settings)
    for part in ("draws", "statistics", "prior_draws", "history"):
        found, wanted = getattr(again, part), getattr(made, part)
        told = {key: value for key, value in wanted.items() if np.size(value)} if part == "history" else wanted
        assert set(told) <= set(found) <= set(wanted)
        for site in told:
            np.testing.assert_array_equal(found[site], wanted[site])
    assert np.shape(again.beta) == np.shape(made.beta)


def test_a_run_is_written_without_xarray(tmp_path: Path) -> None:
    code = (
        "import sys, jax, numpyro, numpyro.distributions as dist, bayesrl\n"
        "def bandit():\n"
        "    arm = numpyro.sample('arm', dist.Bernoulli(0.5))\n"
        "    bayesrl.reward('payoff', 1.0 * arm)\n"
        "bayesrl.fit(jax.random.key(0), bandit, beta=1.0, num_steps=5, progress=False, directory=sys.argv[1])\n"
        "assert not {'xarray', 'pandas'} & set(sys.modules)\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "run")]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=240)
    assert result.returncode == 0, result.stderr
    with xr.open_datatree(tmp_path / "run" / "posterior.nc", engine="h5netcdf") as tree:
        assert set(tree.children) == {"posterior", "prior", "sample_stats", "training"}

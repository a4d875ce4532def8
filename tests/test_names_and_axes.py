"""Any name and any axis of length one survives draws, files, tables and reports, or is refused before the first step."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
import xarray as xr
from numpyro.contrib.control_flow import scan
from readings import adds_up, read_report, several

import bayesrl
from bayesrl.errors import PolicyError
from bayesrl.posterior.datatree import as_netcdf, from_datatree

pytestmark = pytest.mark.xdist_group("names")
KEY = jax.random.key(0)
NAMES = [
    "draw",
    "chain",
    "beta",
    "step",
    "sample",
    "agent/arm",
    "θ",
    "two words",
    "log_weight",
    "total_reward",
    "restart",
    "<b>$1$",
    "Arm and arm",
    "x_dim_0",
    "..",
]


def coin(name: str) -> Callable[[], None]:
    """Draws a site of a name; where it holds two, a second site that differs by case alone."""
    first, _, other = name.partition(" and ")

    def program() -> None:
        side = numpyro.sample(first, dist.Bernoulli(0.5))
        if other:
            numpyro.sample(other, dist.Bernoulli(0.3))
        bayesrl.reward(f"{first} pays", 1.0 * side)
        numpyro.deterministic(f"{first} told", 2.0 * side)

    return program


def fit(program: Callable[..., Any], **options: Any) -> bayesrl.Posterior:
    return bayesrl.fit(KEY, program, **({"beta": jnp.array([0.5]), "num_steps": 2, "progress": False} | options))


def assert_alike(loaded: bayesrl.Posterior, fitted: bayesrl.Posterior) -> None:
    """Every array is there, under its name and with its axes."""
    assert np.shape(loaded.beta) == np.shape(fitted.beta)
    assert loaded.batch_shape == fitted.batch_shape
    for part in ("draws", "prior_draws", "statistics", "history"):
        found, wanted = getattr(loaded, part), getattr(fitted, part)
        assert set(found) == set(wanted), part
        for name, values in wanted.items():
            np.testing.assert_array_equal(found[name], values, err_msg=f"{part} of {name}")


@pytest.fixture(scope="module")
def tossed() -> bayesrl.Posterior:
    return fit(coin("arm"))


def test_every_name_survives_a_file(tossed: bayesrl.Posterior, tmp_path: Path) -> None:
    """The draws of one fit under all names at once, as sites, metrics and columns of statistics and history."""
    sites = [site for name in NAMES for site in name.split(" and ")]
    told = {site: np.asarray(tossed.draws["arm"]) + i for i, site in enumerate(sites)}
    history = {f"metrics/{site}": tossed.history["loss"] + i for i, site in enumerate(sites)}
    named = replace(
        tossed,
        draws=told,
        prior_draws={site: values[0, 0] for site, values in told.items()},
        history=tossed.history | history,
    )
    (tmp_path / "named.nc").write_bytes(as_netcdf(named))
    with xr.open_datatree(tmp_path / "named.nc", engine="h5netcdf") as tree:
        held = {str(v.attrs.get("site", k)): v for k, v in tree["posterior"].data_vars.items()}
        assert set(held) == set(sites)
        for site, values in held.items():
            assert values.dims == ("chain", "draw", "beta")
            np.testing.assert_array_equal(values.transpose("beta", "chain", "draw"), told[site])
        assert_alike(from_datatree(tree.load(), {}, named.settings), named)
    assert all(site in str(named).replace("\n", " ") for site in sites)


@pytest.mark.parametrize("name", ["beta", "agent/arm", "Arm and arm"])
def test_a_name_survives_a_run(name: str, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    posterior = fit(coin(name), directory=folder)
    assert set(posterior.draws) == {*name.split(" and "), f"{name.partition(' and ')[0]} told"}
    assert_alike(bayesrl.load(folder), posterior)


def test_a_name_stands_in_a_report(tmp_path: Path) -> None:
    name = "a/b <b>$1$ θ"
    page = bayesrl.write_report(
        jax.random.key(0), tmp_path / "report.html", fit(coin(name)), gold=f"{name} told"
    ).read_text("utf-8")
    told, text = read_report(page)
    assert several(told) == {}
    assert f"Site “{name}”" in text
    assert f"{name} told" in text


def rows(size: int) -> Callable[[], None]:
    def program() -> None:
        with numpyro.plate("row", size):
            arm = numpyro.sample("arm", dist.Categorical(logits=jnp.zeros(3)))
            bayesrl.reward("payoff", 1.0 * (arm == 1))

    return program


def steps(length: int) -> Callable[[], None]:
    def program() -> None:
        def step(carry: Any, x: Any) -> Any:
            arm = numpyro.sample("arm", dist.Bernoulli(0.5))
            bayesrl.reward("payoff", 1.0 * arm)
            return carry, None

        scan(step, 0, jnp.arange(length))

    return program


@pytest.mark.parametrize(
    ("program", "shape", "contexts", "beta"),
    [
        (rows(1), (1,), (1,), jnp.array([0.5])),
        (coin("arm"), (), (), jnp.array([0.5])),
        (steps(1), (1,), (), 0.5),
    ],
    ids=["one context", "no context", "one step"],
)
def test_axes_of_length_one_stay(
    program: Callable[[], None], shape: tuple[int, ...], contexts: tuple[int, ...], beta: Any, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    posterior = fit(program, beta=beta, directory=folder)
    betas = np.shape(beta)
    lead = (*betas, 1)
    assert posterior.batch_shape == lead
    assert posterior.sample(KEY, 1)["arm"].shape == (*lead, 1, *shape)
    assert posterior.draws["arm"].shape[len(lead) + 1 :] == shape
    assert posterior.statistics["log_weight"].shape[len(lead) + 1 :] == contexts
    assert posterior.estimate(KEY, 2).objective.mean.shape == lead
    assert posterior.log_prob({"arm": np.zeros((1, *shape), int)}).shape == (*lead, 1, *contexts)
    assert_alike(bayesrl.load(folder), posterior)
    assert_alike(bayesrl.load(folder, program), posterior)
    dims = bayesrl.to_datatree(posterior)["posterior"]["arm"].dims
    assert dims == ("chain", "draw", *(["beta"] if betas else []), *(f"arm_dim_{i}" for i in range(len(shape))))
    for chosen in (posterior.select(restart="best"), posterior.select(restart=0)):
        assert chosen.batch_shape == lead
    assert posterior.select(beta=0.5).batch_shape == (1,)
    found = bayesrl.evidence(KEY, posterior)
    assert found.objective.mean.shape == betas
    assert found.by_context is not None
    assert found.by_context.mean.shape == (*betas, *contexts)
    assert len(found.rows) == len(found.table().rows) == 1
    diagnosis = bayesrl.diagnose(KEY, posterior)
    page = bayesrl.write_report(
        jax.random.key(0), tmp_path / "report.html", posterior, diagnoses={"fit": diagnosis}
    ).read_text("utf-8")
    told, _ = read_report(page)
    assert {name for name, _ in told} >= {"J", "J*", "gap", "E[R]", "KL"}
    assert {where for _, where in told} == {"0.5"}
    assert adds_up(told, "0.5")


def empty() -> None:
    nothing = numpyro.sample("nothing", dist.Normal(jnp.zeros(0), 1.0).to_event(1))
    bayesrl.reward("payoff", nothing.sum())


@pytest.mark.parametrize(
    ("program", "words"),
    [
        (rows(0), "a plate of size 0 .line"),
        (empty, r"site 'nothing' has shape \(0,\)"),
        (steps(0), r"site 'arm' has shape \(0,\)"),
        (coin("a\0b"), r"of the name 'a\\x00b'"),
        (coin("half \ud800"), r"of the name 'half \\ud800'"),
    ],
    ids=["empty plate", "no elements", "no steps", "zero byte", "half a character"],
)
def test_what_cannot_be_kept_is_refused_before_the_first_step(
    program: Callable[[], None], words: str, tmp_path: Path
) -> None:
    with pytest.raises(PolicyError, match=words):
        fit(program, directory=tmp_path / "run")
    assert not (tmp_path / "run").exists()

"""One number, one value: what a report tells of a fit is the same wherever it stands, and J + gap = J*."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from readings import adds_up, numbers_of, read_pairs, read_report, several

import bayesrl
from bayesrl import control
from bayesrl.control.learning.result import summary
from bayesrl.diagnostics.checks import GOOD_SHARE, Check
from bayesrl.diagnostics.evidence.result import Evidence
from bayesrl.display.formatting import format_with_limit
from bayesrl.guides import AutoTilt
from bayesrl.posterior.posterior import Posterior
from bayesrl.report.fit_results import collect
from bayesrl.report.write import write_fits

pytestmark = pytest.mark.xdist_group("one_value")
KEY = jax.random.key(0)
MEANS = jnp.linspace(0.1, 0.9, 5)


def bandit() -> None:
    arm = numpyro.sample("arm", dist.Categorical(logits=jnp.zeros(5)))
    bayesrl.reward("payoff", MEANS[arm])
    numpyro.deterministic("hit", 1.0 * (arm == 4))


def climb() -> None:
    """No bound from above is known of its rewards, nor can they be enumerated."""
    x = numpyro.sample("x", dist.Normal(0.0, 1.0))
    ahead = numpyro.sample("ahead", dist.Bernoulli(0.5))
    bayesrl.reward("height", x + 0.1 * ahead)


def near() -> None:
    x = numpyro.sample("x", dist.Normal(jnp.zeros(3), 1.0).to_event(1))
    bayesrl.reward("near", jnp.exp(-((x - 1) ** 2).sum()))


def rows(labels: jax.Array) -> None:
    with numpyro.plate("row", len(labels)):
        guess = numpyro.sample("guess", dist.Categorical(logits=jnp.zeros(3)))
        bayesrl.reward("right", 1.0 * (guess == labels))


def heard() -> None:
    state = numpyro.sample("state", dist.Bernoulli(0.5))
    numpyro.sample("y", dist.Bernoulli(0.3 + 0.4 * state), obs=jnp.array(1))
    bayesrl.reward("payoff", 1.0 * state)


def data() -> None:
    z = numpyro.sample("z", dist.Bernoulli(0.5))
    numpyro.sample("y", dist.Normal(1.0 * z, 1.0), obs=jnp.array(0.8))


def umbrella() -> None:
    rain = bayesrl.environment("rain", dist.Bernoulli(0.3), observable=True)
    take = numpyro.sample("take", dist.Bernoulli(0.5))
    bayesrl.reward("dry", 1.0 * (take == rain))


def fit(program: Callable[..., Any], *args: Any, **options: Any) -> Posterior:
    return bayesrl.fit(KEY, program, *args, **({"num_steps": 20, "progress": False} | options))


def sea() -> tuple[Posterior, dict[str, Any]]:
    """A rollout whose policy is evaluated by planning, which the report tells twice."""
    mdp = control.deep_sea(size=3)
    posterior = fit(control.tabular_rollout(mdp), beta=0.1, guide=control.TablePolicy(), num_steps=3)
    return posterior, {
        "optimum": control.TabularOptimum(mdp),
        "sections": list(control.tabular_sections(mdp)(jax.random.key(0), posterior)),
    }


CASES: dict[str, Callable[[], tuple[Posterior, dict[str, Any]]]] = {
    "bandit": lambda: (fit(bandit, beta=0.1, num_restarts=2), {"gold": "hit"}),
    "sweep": lambda: (fit(bandit, beta=jnp.array([1.0, 0.1])), {"gold": "hit"}),
    "unbounded": lambda: (fit(climb, beta=0.5, guide=AutoTilt(tilt="constant")), {}),
    "bounded, continuous": lambda: (fit(near, beta=0.3, guide=AutoTilt(tilt="constant")), {}),
    "contexts": lambda: (fit(rows, jnp.array([0, 1, 2, 0]), beta=0.2), {"held_out": (jnp.array([1, 1, 2, 0]),)}),
    "data and rewards": lambda: (fit(heard, beta=0.5), {}),
    "data": lambda: (fit(data), {}),
    "nature": lambda: (fit(umbrella, beta=0.5), {}),
    "control": sea,
}


@pytest.mark.parametrize("name", CASES)
def test_a_report_tells_each_quantity_once(name: str, tmp_path: Path) -> None:
    posterior, options = CASES[name]()
    sections = options.pop("sections", ())
    if name in ("unbounded", "bounded, continuous"):
        options["diagnosis"] = bayesrl.diagnose(jax.random.key(1), posterior, num_samples=2**12)
    facts = collect(jax.random.key(1), name, posterior, **options)
    assert facts.evidence is not None
    page = write_fits(tmp_path / "report.html", [facts], sections).read_text(encoding="utf-8")
    told, text = read_report(page)
    assert {quantity for quantity, _ in told} >= {"J", "J*", "gap", "relative gap", "E[R]", "KL", "k̂"}
    assert several(told) == {}
    shown = str(facts.diagnosis)
    for row in facts.evidence.rows:
        cells = row.cells()
        beta = cells["β"]
        assert adds_up(told, beta)
        for quantity in ("J", "J*", "gap", "relative gap", "E[R]", "KL"):
            assert told[quantity, beta] == {cells[quantity]}
            assert cells[quantity] in shown, "a diagnosis prints what its report tells"
        assert told["k̂", beta] == {cells["k̂"]}
        assert (cells["k̂"] == "—") == (row.no_khat != "")
        assert row.no_khat in text
        assert (("log p(y)", beta) in told) == (name == "data and rewards")
        assert Evidence.from_json(json.loads(json.dumps(row.to_json()))).cells() == cells
    # What a check says of the gap is an end or the middle of the share that is told, and it says ESS as it is told.
    assert facts.diagnosis is not None
    shares = [number for row in facts.evidence.rows for number, _ in numbers_of(row.cells()["relative gap"])]
    said = re.search(r"([\d.]+%)(?: ± [\d.]+%)? of what there was to gain is left", facts.diagnosis["gap"].explanation)
    if said is not None:
        (value, unit), *_ = numbers_of(said[1])
        assert any(abs(value - one) <= 2 * unit for one in shares)
    if "draws of the fit are worth" in (explanation := facts.diagnosis["weights"].explanation):
        worth = re.search(r"are worth (\S+) of p\*", explanation)
        assert worth is not None
        assert worth[1] in {row.cells()["ESS"] for row in facts.evidence.rows}


def test_a_heading_is_the_name_of_its_attribute() -> None:
    found = bayesrl.evidence(KEY, fit(bandit, beta=0.1))
    headings = {*found.table().headings, *found.weight_table().headings}
    for name in ("relative gap", "missed mass"):
        assert name in headings & found.cells().keys()
        assert hasattr(found, name.replace(" ", "_"))
    assert not {"share", "missed"} & headings


def test_runs_of_learning_tell_each_number_once(tmp_path: Path) -> None:
    mdp = control.deep_sea(size=3)
    agent = control.BayesianAgent(control.TabularModel.of(mdp, noise=0.01))
    learned = [
        control.learn(jax.random.key(i), mdp, agent, exploration=control.thompson(), num_episodes=6, progress=False)
        for i in range(2)
    ]
    page = bayesrl.write_report(jax.random.key(0), tmp_path / "report.html", {"runs": learned}).read_text(
        encoding="utf-8"
    )
    _, text = read_report(page)
    rows, told = dict(summary(learned)), read_pairs(page)
    assert {name: told[name] for name in rows} == {name: {value} for name, value in rows.items()}
    assert f"earned {rows['mean return of the last episode']} on average" in text
    assert f"where {rows['optimum']} is the most" in text


def test_a_limit_shows_on_which_side_a_number_is() -> None:
    for value, limit in ((0.02243, GOOD_SHARE), (0.0223999, 0.0224), (0.66669, 0.66671), (1e-9, 0.0), (3.0, 3.0)):
        for told in (format_with_limit(value, limit), format_with_limit(limit, value)):
            (first, _), (second, _) = (numbers_of(text)[0] for text in told)
            assert np.sign(first - second) == np.sign(value - limit) * (
                1 if told == format_with_limit(value, limit) else -1
            )
    least, most = Check("a", 0.4, 0.5, "warn", "", "", least=True), Check("a", 0.02243, GOOD_SHARE, "warn", "", "")
    assert least.limit == "≥ 0.500"
    assert (most.value_text, most.limit) == ("0.02243", "≤ 0.02240")

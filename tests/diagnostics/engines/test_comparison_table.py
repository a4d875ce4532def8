"""What a comparison of engines shows, and what `compare_engines` refuses, by name."""

import json
import math
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from oracles import Still

import bayesrl
from bayesrl.diagnostics.engines.particle_answers import _num_temperatures
from bayesrl.errors import EngineError, PolicyError
from bayesrl.report.evidence_figures import engines_figure
from tests.handmade import engine_comparison

KEY = jax.random.key(0)


@pytest.mark.parametrize("betas", [0.1, np.array([0.1, 0.3, 1.0])])
def test_it_is_legible_at_80_columns(betas: Any) -> None:
    text = str(engine_comparison(betas))
    assert max(map(len, text.splitlines())) <= 80
    for words in ("7.536", "(7.500 ± 0.010)", "SMC exact twist", "exact", "4,096", "8,192", "means of 3 contexts"):
        assert words in text, words
    assert "NUTS, SMC tempered: not applied: NUTS cannot draw" in " ".join(text.split())
    assert ("β = 0.3" in text) == (np.ndim(betas) == 1)
    assert engine_comparison(betas)._repr_html_().count("<tr") > 8


def test_rows_are_read_by_name_and_as_json() -> None:
    found = engine_comparison(np.array([0.1, 0.3]))
    assert found.tightest == "enumeration"
    assert "fit" in found
    assert "nuts" not in found
    assert found["fit"].width() == math.inf
    described = json.loads(json.dumps(found.to_json()))
    assert described["rows"][0]["log_evidence"]["mean"] == [7.536, 7.536]
    assert described["rows"][1]["log_evidence"]["conservative_upper"] == ["inf", "inf"]
    assert described["refusals"]["nuts"].startswith("NUTS")
    with pytest.raises(EngineError, match="'nuts' has no row: NUTS cannot"):
        found["nuts"]
    with pytest.raises(EngineError, match="'hindsight' was not compared; the rows are"):
        found["hindsight"]


@pytest.mark.parametrize("betas", [0.1, np.array([0.1, 0.3, 1.0])])
def test_the_figure_has_a_place_for_every_engine(betas: Any) -> None:
    axes = engines_figure(engine_comparison(betas)).axes[0]
    assert [text.get_text() for text in axes.get_yticklabels()] == [
        "enumeration",
        "importance",
        "SMC exact twist",
        "fit",
    ]
    low, high = axes.get_xlim()
    assert all((low <= np.asarray(line.get_xdata(), float)).all() for line in axes.lines)
    assert low < high < 20


def test_the_number_of_temperatures_is_planned() -> None:
    """Steps that keep 90% of Gaussian particles effective have variances of .105, so σ/√.105 of them suffice."""
    w = np.random.default_rng(0).normal(size=(4000, 1))
    assert _num_temperatures(0.1 * w) == 1
    assert _num_temperatures(w) in (3, 4, 5)
    assert 20 < _num_temperatures(10 * w) < 80


def bandit(payoffs: Any = (0.0, 1.0, 2.0)) -> None:
    arm = numpyro.sample("arm", dist.Categorical(logits=jnp.zeros(3)))
    bayesrl.reward("payoff", jnp.asarray(payoffs)[arm])


@pytest.fixture(scope="module")
def posterior() -> Any:
    return bayesrl.fit(KEY, bandit, beta=1.0, objective=Still(), num_steps=1, num_restarts=2, progress=False)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"budget": np.asarray(3)}, EngineError, "use a whole number of at least 256"),
        ({"budget": 2.5}, EngineError, "budget=2.5"),
        ({"engines": ["enumeration", "guess"]}, EngineError, "'guess'.*'known_optimum', 'enumeration'"),
        ({"engines": []}, EngineError, "names none; choose from known_optimum, enumeration"),
        ({"engines": ["nuts", "hindsight"]}, EngineError, "no engine applies.*nuts: .*discrete.*hindsight: nature"),
        ({"beta": None}, PolicyError, "needs a temperature"),
        ({"beta": -1.0}, PolicyError, "beta=-1.0"),
        ({"engines": ["known_optimum"], "optimum": lambda beta: "high"}, EngineError, "no engine applies.*gave 'high'"),
        (
            {"engines": ["smc_tempered"], "budget": 256, "beta": 0.01},
            EngineError,
            "budget=256 is too small for 16 runs of 2 particles",
        ),
    ],
)
def test_bad_input_is_named(options: dict[str, Any], error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        bayesrl.compare_engines(KEY, bandit, **({"beta": 1.0} | options))


@pytest.mark.usefixtures("unchecked")
def test_fits_that_engines_cannot_use(posterior: Any) -> None:
    with pytest.raises(EngineError, match="the posterior has its own temperature"):
        bayesrl.compare_engines(KEY, posterior, beta=2.0)
    with pytest.raises(EngineError, match=r"mixture of restarts.*select"):
        bayesrl.compare_engines(KEY, posterior.select(restart="mixture"))
    other = replace(posterior, settings={**posterior.settings, "regularizer": "chi_squared"})
    with pytest.raises(PolicyError, match=r"regularizer='chi_squared'.*p\* of KL"):
        bayesrl.compare_engines(KEY, other)
    with pytest.raises(PolicyError, match="loaded without its policy"):
        bayesrl.compare_engines(KEY, replace(posterior, programs=None))
    with pytest.raises(PolicyError, match="engines"):
        bayesrl.write_report(KEY, "report.html", posterior, engines={"fit": 3})  # type: ignore[dict-item]
    with pytest.raises(PolicyError, match="a NumPyro program, or a Posterior"):
        bayesrl.compare_engines(KEY, 3.0, beta=1.0)


def test_rewards_that_no_engine_can_weigh() -> None:
    """nan is named, whichever engines were asked."""
    with pytest.raises(EngineError, match=r"no engine applies.*nan"):
        bayesrl.compare_engines(
            KEY, bandit, (0.0, math.nan, 1.0), beta=1.0, budget=256, engines=["enumeration", "importance"]
        )

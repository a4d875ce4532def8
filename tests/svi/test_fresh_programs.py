"""Whatever a program reads when it runs is what the answer is of: every way of reading, every engine that answers."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from counting import compilations
from numpyro.contrib.control_flow import scan

import bayesrl

BETA = 0.5
BEFORE, AFTER = np.array([0.1, 0.6], np.float32), np.array([0.9, -0.4], np.float32)

payoffs: Any = BEFORE
scale: Any = 1.0
reversed_: Any = False


def total(values: Any) -> Any:
    """Read globals two calls below the program."""
    return scale * jnp.asarray(values)


def draw(values: Any) -> None:
    arm = numpyro.sample("arm", dist.Bernoulli(0.5))
    bayesrl.reward("payoff", jnp.asarray(values)[arm])


def by_global() -> None:
    draw(total(payoffs))


def step(carry: Any, _: Any) -> tuple[Any, None]:
    """The body of a scan that is no closure: JAX keeps what it traced of such functions, NumPyro and bayesrl do not."""
    arm = numpyro.sample("arm", dist.Bernoulli(0.5))
    bayesrl.reward("payoff", total(payoffs)[arm] / 2)
    return carry, None


def by_scan() -> None:
    scan(step, 0.0, None, length=2)


class Kiosk:
    """Reads attributes, of itself and of its class."""

    factor = 1.0

    def __init__(self) -> None:
        self.values = BEFORE

    def __call__(self) -> None:
        draw(self.factor * jnp.asarray(self.values))

    def play(self) -> None:
        self()


Way = tuple[Callable[[], None], Callable[[np.ndarray], None]]


def ways() -> dict[str, Way]:
    """Give programs, each with what makes it read other payoffs."""
    held = BEFORE
    box, listed, array, table = SimpleNamespace(values=BEFORE), BEFORE.tolist(), BEFORE.copy(), {"values": BEFORE}
    kiosk, other, flags = Kiosk(), Kiosk(), {"which": 0}

    def by_closure() -> None:
        draw(held)

    def rebind(values: np.ndarray) -> None:
        nonlocal held
        held = values

    def set_global(values: np.ndarray) -> None:
        globals().update(payoffs=values)

    def by_default(values: Any = BEFORE) -> None:
        draw(values)

    def by_keyword(*, values: Any = BEFORE) -> None:
        draw(values)

    def by_flag() -> None:
        if flags["which"] == 0:
            draw(BEFORE)
        else:
            draw(AFTER)

    def by_list() -> None:
        draw(jnp.array(listed))

    def choose(values: np.ndarray) -> None:
        flags["which"] = int(values is not BEFORE)

    def attribute(name: str, thing: Any) -> Callable[[np.ndarray], None]:
        return lambda values: setattr(thing, name, values)

    return {
        "closure": (by_closure, rebind),
        "global": (by_global, set_global),
        "default": (by_default, lambda values: setattr(by_default, "__defaults__", (values,))),
        "keyword default": (by_keyword, lambda values: by_keyword.__kwdefaults__.update(values=values)),
        "partial": ((bound := partial(by_keyword, values=array)), lambda values: bound.keywords.update(values=values)),
        "namespace": (lambda: draw(box.values), attribute("values", box)),
        "attribute": (kiosk, attribute("values", kiosk)),
        "method": (other.play, attribute("values", other)),
        "list": (by_list, lambda values: listed.__setitem__(slice(None), values.tolist())),
        "array in place": (lambda: draw(array), lambda values: array.__setitem__(slice(None), values)),
        "dictionary": (lambda: draw(table["values"]), lambda values: table.update(values=values)),
        "flag": (by_flag, choose),
        "scan": (by_scan, set_global),
        "iterator": (
            lambda: draw(np.stack(tuple(iter(listed)))),
            lambda v: listed.__setitem__(slice(None), v.tolist()),
        ),
    }


@pytest.fixture(autouse=True)
def as_before() -> Any:
    yield
    globals().update(payoffs=BEFORE, scale=1.0)
    Kiosk.factor = 1.0


def optimum(values: Any) -> float:
    return float(BETA * np.log(np.exp(np.asarray(values, float) / BETA).mean()))


def scanned(values: Any) -> float:
    return float(2 * BETA * np.log(np.exp(np.asarray(values, float) / 2 / BETA).mean()))


@pytest.mark.parametrize("name", list(ways()))
def test_enumeration_and_weights(name: str) -> None:
    """Exact to single precision; weights of 2,000 draws of so small a program are within 5 of their errors (6e-7)."""
    program, change = ways()[name]
    truth = scanned if name == "scan" else optimum
    for values in (BEFORE, AFTER, BEFORE):
        change(values)
        assert float(bayesrl.enumerate_posterior(program, beta=BETA).optimum) == pytest.approx(truth(values), abs=1e-5)
        weighted = bayesrl.importance(jax.random.key(0), program, beta=BETA, num_samples=2000)
        assert abs(BETA * float(weighted.log_evidence.mean) - truth(values)) < 5 * BETA * float(
            weighted.log_evidence.se
        )


@pytest.mark.parametrize("name", ["closure", "global", "flag", "scan"])
def test_fits_and_what_is_asked_of_them(name: str) -> None:
    """A fit made anew is of what is read now; one made before is asked about what is read now."""
    program, change = ways()[name]
    truth = scanned if name == "scan" else optimum
    change(BEFORE)

    def fit() -> bayesrl.Posterior:
        return bayesrl.fit(jax.random.key(0), program, beta=BETA, num_steps=300, progress=False)

    old = fit()
    was = float(bayesrl.evidence(jax.random.key(1), old).objective.mean)
    assert was == pytest.approx(truth(BEFORE), abs=1e-3)
    change(AFTER)
    with compilations() as names:
        new = fit()
        assert float(new.estimate(jax.random.key(2), 500).objective.mean[0]) == pytest.approx(truth(AFTER), abs=1e-3)
        assert float(new.history["objective"][-1, 0]) == pytest.approx(truth(AFTER), abs=1e-3)
        told = bayesrl.evidence(jax.random.key(1), old)
        assert float(told.optimum.mean) == pytest.approx(truth(AFTER), abs=1e-5)
        assert float(told.objective.mean) < truth(AFTER) - 0.05
        assert bayesrl.diagnose(jax.random.key(1), new).verdict == "pass"
        assert bayesrl.diagnose(jax.random.key(1), old).verdict == "fail"
        both = bayesrl.compare(jax.random.key(3), {"old": old, "new": new}, num_samples=512)
        assert float(both.delta_objective.mean[1]) == pytest.approx(truth(AFTER) - float(told.objective.mean), abs=0.02)
        earned = float(old.estimate(jax.random.key(4), 4000).reward.mean[0])
    assert abs(earned - float(told.reward.mean)) < 5 * float(np.ptp(AFTER)) / 2 / np.sqrt(4000)
    assert "fit_step" not in names or name == "flag"


def test_rejection_frontier_report_and_rounds(tmp_path: Path) -> None:
    program, change = ways()["closure"]

    def rejected() -> float:
        found = bayesrl.rejection(jax.random.key(0), program, beta=BETA, num_samples=2000)
        return float(np.mean(np.asarray(found.sites["arm"])))

    def chance(values: np.ndarray) -> float:
        odds = np.exp(values.astype(float) / BETA)
        return float(odds[1] / odds.sum())

    for values in (BEFORE, AFTER):
        change(values)
        assert abs(rejected() - chance(values)) < 5 * np.sqrt(0.25 / 2000)
        sweep = bayesrl.fit(
            jax.random.key(0), program, beta=np.array([0.4, BETA]), num_steps=100, progress=False, num_restarts=1
        )
        optima = bayesrl.frontier(jax.random.key(1), sweep).evidence.optimum.mean
        assert float(optima[1]) == pytest.approx(optimum(values), abs=1e-4)
        bayesrl.write_report(jax.random.key(0), tmp_path / "report.html", sweep.select(beta=BETA))
        assert f"{optimum(values):.4g}"[:5] in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_what_a_tilted_policy_and_the_next_prior_read() -> None:
    """`tilt` and `posterior.policy` are programs like others."""
    program, change = ways()["attribute"]
    posterior = bayesrl.fit(jax.random.key(0), program, beta=BETA, num_steps=100, progress=False)
    for values in (AFTER, BEFORE):
        change(values)
        again = bayesrl.importance(jax.random.key(0), posterior.policy, beta=BETA, num_samples=1000)
        share = float(jax.nn.sigmoid(np.asarray(posterior.params["arm$table"]).reshape(())))
        odds = np.array([1 - share, share]) @ np.exp(values.astype(float) / BETA)
        assert abs(float(again.log_evidence.mean) - np.log(odds)) < 5 * float(again.log_evidence.se)
        density = bayesrl.log_density(program, {"arm": jnp.array(1)}, beta=BETA)
        assert float(density.log_target) == pytest.approx(np.log(0.5) + values[1] / BETA, abs=1e-5)


def test_classes_defaults_and_nested_functions() -> None:
    program, _ = ways()["attribute"]
    Kiosk.factor = 2.0
    assert float(bayesrl.enumerate_posterior(program, beta=BETA).optimum) == pytest.approx(
        optimum(2 * BEFORE), abs=1e-5
    )
    globals().update(scale=3.0)
    assert float(bayesrl.enumerate_posterior(by_global, beta=BETA).optimum) == pytest.approx(
        optimum(3 * BEFORE), abs=1e-5
    )


def test_a_flag_that_adds_a_site_is_another_program() -> None:
    """A fit of what is no longer there cannot be asked: that is an error of ours, and names the site."""
    flags = {"more": False}

    def program() -> None:
        draw(BEFORE)
        if flags["more"]:
            extra = numpyro.sample("extra", dist.Bernoulli(0.5))
            bayesrl.reward("bonus", 1.0 * extra)

    posterior = bayesrl.fit(jax.random.key(0), program, beta=BETA, num_steps=50, progress=False)
    flags["more"] = True
    assert float(bayesrl.enumerate_posterior(program, beta=BETA).optimum) == pytest.approx(
        optimum(BEFORE) + optimum(np.array([0.0, 1.0])), abs=1e-5
    )
    for ask in (
        lambda: posterior.estimate(jax.random.key(0), 100),
        lambda: posterior.sample(jax.random.key(0), 100),
        lambda: bayesrl.evidence(jax.random.key(0), posterior),
    ):
        with pytest.raises(bayesrl.errors.BayesRLError, match="extra"):
            ask()  # type: ignore[no-untyped-call]

"""Objects that show themselves: 80 columns in a terminal, escaped tables in a notebook."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest

import bayesrl
from bayesrl.diagnostics.comparison import Comparison
from bayesrl.display.formatting import format_estimate, format_interval, format_number, format_percent, truncate
from bayesrl.display.tables import Displayable, Line, Table, format_text, tag
from bayesrl.posterior.posterior import Posterior
from bayesrl.statistics.estimates import Estimate, Interval
from tests.handmade import HOSTILE, diagnosis, evidence, frontier, interval

NAN, INF = float("nan"), float("inf")


def coin() -> None:
    side = numpyro.sample("side", dist.Bernoulli(0.5))
    bayesrl.reward("win", 1.0 * side)


@pytest.fixture(scope="module")
def posterior() -> Posterior:
    return bayesrl.fit(jax.random.key(0), coin, beta=jnp.array([0.5, 1.0]), num_steps=5, num_restarts=2, progress=False)


def shown_objects() -> list[Displayable]:
    many = list(np.geomspace(0.01, 10, 16))
    three = interval([0.1, 0.2, 0.3])
    compared = Comparison(("a", "b", "c"), three, three, three, three, three, three)
    return [
        evidence(),
        evidence(None),
        evidence(many),
        evidence([0.1, 1.0], bounded=False),
        diagnosis("fail", many),
        diagnosis("unknown"),
        frontier(),
        compared,
    ]


@pytest.mark.parametrize("shown", shown_objects(), ids=lambda shown: type(shown).__name__)
def test_text_keeps_to_80_columns(shown: Displayable) -> None:
    for text in (str(shown), repr(shown)):
        assert max(len(line) for line in text.splitlines()) <= 80
    html = shown._repr_html_()
    assert html.startswith("<div>")
    assert "<table>" in html


def test_a_diagnosis_begins_with_its_verdict() -> None:
    text = str(diagnosis("fail"))
    assert text.startswith("✗ FAIL: ")
    assert "! warn" in text
    assert "? unknown" in text
    assert "J(π₀)" in text


def test_a_posterior_says_what_it_holds(posterior: Posterior) -> None:
    text = str(posterior)
    assert text.startswith("Posterior: 2 temperatures × 2 restarts, 5 steps")
    assert "Draws: side" in text
    kept = posterior.estimates
    np.testing.assert_allclose(kept.objective.mean, posterior.objective_by_restart(), rtol=1e-5)
    best = int(np.argmax(kept.objective.mean[1]))
    cell = format_estimate(Estimate(kept.reward.mean[1, best], kept.reward.se[1, best]))  # type: ignore[arg-type]
    assert cell in text
    beta = np.asarray(posterior.beta)[:, None]
    np.testing.assert_allclose(kept.reward.mean - beta * kept.kl.mean, kept.objective.mean, rtol=1e-4, atol=1e-5)
    assert "cannot draw anew" in str(Posterior(0.5, {}, {}, {}, {}, {}, {}))


def test_hostile_text_is_text() -> None:
    html = diagnosis(explanation=HOSTILE)._repr_html_()
    assert "<script" not in html
    assert "<img" not in html
    assert "&lt;script&gt;" in html
    assert "\x1b" not in html + str(diagnosis(explanation=HOSTILE))
    assert tag("a", '"<&', title='"><b>') == '<a title="&quot;&gt;&lt;b&gt;">&quot;&lt;&amp;</a>'


def test_text_cannot_turn_lines_around_or_leave_its_cell() -> None:
    three = interval([0.1, 0.2])
    names = ("up\u202eside\u2066", "two\nlines " + "x" * 200)
    compared = Comparison(names, three, three, three, three, three, three)
    text, html = str(compared), compared._repr_html_()
    assert max(len(line) for line in text.splitlines()) <= 80
    assert "two lines xx" in text
    assert not {"\u202e", "\u2066"} & {*text, *html}


def test_a_temperature_stays_on_one_line() -> None:
    for size in range(60, 80):
        assert "β = 1" in format_text([Line("x" * size + " at β = 1.")])


def test_both_sides_of_log_z_are_limits() -> None:
    told = dict(zip(evidence().weight_table().headings, evidence().weight_table().rows[0], strict=True))
    assert (told["from below"], told["from above"]) == ("1.950", "2.050")


def test_wide_tables_are_cut_by_columns() -> None:
    listing = Table(["name", *"abcdef"], [["x", *["y" * 20] * 6]])
    text = format_text([Line("before"), listing])
    assert text.count("name") == 2
    assert max(len(line) for line in text.splitlines()) <= 80


def made(mean: float, low: float, high: float, floor: float = -INF, ceiling: float = INF, se: float = 0.1) -> Interval:
    return Interval(*(np.asarray(x) for x in (mean, se, low, high, floor, ceiling)))


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (format_number(0.00012345), "1.2e-04"),
        (format_number(12345.678), "12346"),
        (format_number(NAN), "—"),
        (format_number(INF), "∞"),
        (format_number(0.0), "0"),
        (format_estimate(Estimate(1.23456, 0.012)), "1.235 ± 0.012"),  # type: ignore[arg-type]
        (format_estimate(Estimate(-1.04982212, 2.5e-9)), "-1.0498221200 ± 2.5e-09"),  # type: ignore[arg-type]
        (format_estimate(Estimate(1.2e-5, 2.5e-9)), "1.20000e-05 ± 2.5e-09"),  # type: ignore[arg-type]
        (format_estimate(Estimate(1.23456, 0.0)), "1.235"),  # type: ignore[arg-type]
        (format_estimate(Estimate(1.23456, NAN)), "1.235 ± —"),  # type: ignore[arg-type]
        (format_estimate(Estimate(INF, NAN)), "∞"),  # type: ignore[arg-type]
        (format_interval(made(1.0, 0.9, 1.1)), "1.00 [0.90, 1.10]"),
        (format_interval(made(1.0, NAN, NAN, 0.5, 1.5)), "1.0 [0.5, 1.5]"),
        (format_interval(made(1.0, NAN, NAN)), "1.000"),
        (format_interval(made(0.1, NAN, NAN, -1e23, 1e23)), "0.1000 [-1.0e+23, 1.0e+23]"),
        (format_interval(made(1.0, NAN, NAN, ceiling=2.0)), "1.000 (≤ 2.000)"),
        (format_interval(Interval.exact(0.25)), "0.2500"),
        (format_percent(0.00001), "<0.01%"),
        (format_percent(0.25), "25%"),
        (truncate(np.arange(100), 20), "0 1 2 3 4 5 6 7 8 …"),
        (truncate(np.asarray([0.12345, 2.0])), "0.123 2"),
    ],
)
def test_numbers_in_words(value: str, text: str) -> None:
    assert value == text


def test_a_table_prints_as_text() -> None:
    assert str(Table(("β", "J"), [("0.1", "0.75")])).splitlines()[-1].split() == ["0.1", "0.75"]

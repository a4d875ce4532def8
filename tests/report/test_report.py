"""The report, opened in a real browser: what it shows, how it is laid out, and that nothing in it runs."""

import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from matplotlib.figure import Figure
from playwright.sync_api import Browser, Page, sync_playwright

import bayesrl
from bayesrl.diagnostics.diagnosis import diagnose
from bayesrl.display.section import Section
from bayesrl.errors import BayesRLError, PolicyError, RunFolderError
from bayesrl.posterior.posterior import Posterior
from bayesrl.report import html_page as page_module
from bayesrl.report import write as writing
from bayesrl.report.fit_results import FitResults, collect
from bayesrl.report.html_page import CaptionedFigure, Cell, Part, html_page
from bayesrl.report.write import write_fits, write_report
from tests.handmade import HOSTILE, diagnosis, engine_comparison, evidence, frontier

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
BETAS = [0.1, 0.3, 1.0]
PICTURES = "figure svg, figure img"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    found = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    if found is None:
        pytest.fail(
            f"no browser on PATH ({', '.join(BROWSERS)}): the report is tested in one; "
            "install it, on Debian with `apt-get install chromium`",
            pytrace=False,
        )
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def visit(browser: Browser) -> Iterator[Callable[..., Page]]:
    """Open a file; a console error, a failed page or a request for anything but the file fails the test."""
    troubles: list[str] = []
    contexts = []

    def go(path: Path, width: int = 1280, scheme: Any = "light") -> Page:
        contexts.append(browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme))
        page = contexts[-1].new_page()
        address = path.resolve().as_uri()
        page.on("console", lambda message: troubles.append(f"console: {message.text}"))
        page.on("pageerror", lambda error: troubles.append(f"page: {error}"))
        page.on("dialog", lambda dialog: troubles.append(f"dialog: {dialog.message}"))
        page.on("request", lambda asked: asked.url.startswith(("data:", address)) or troubles.append(asked.url))
        page.goto(address)
        return page

    yield go
    for context in contexts:
        context.close()
    assert troubles == []


def bandit(name: str = "arm") -> Callable[[], None]:
    def program() -> None:
        arm = numpyro.sample(name, dist.Categorical(logits=jnp.zeros(3)))
        bayesrl.reward("payoff", jnp.array([0.0, 1.0, 2.0])[arm])
        numpyro.deterministic("gold", 1.0 * (arm == 1))

    return program


def fit(policy: Callable[..., None], *args: object, beta: object = 1.0, **options: Any) -> Posterior:
    return bayesrl.fit(jax.random.key(0), policy, *args, beta=beta, num_steps=30, progress=False, **options)


@pytest.fixture(scope="module")
def sweep() -> Posterior:
    return fit(bandit(), beta=jnp.array(BETAS), num_restarts=2)


@pytest.fixture(scope="module")
def full(sweep: Posterior) -> FitResults:
    """A fit of which everything is known, with a frontier made by hand."""
    engines = engine_comparison(np.asarray(BETAS))
    made: dict[str, Any] = {"diagnosis": diagnosis("fail", BETAS), "frontier": frontier(BETAS), "engines": engines}
    return collect(jax.random.key(1), "sweep", sweep, held_out=(), gold="gold", **made)


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report whose names, advice, tables and figures are all hostile."""
    posterior = fit(bandit(HOSTILE))
    figure = Figure()
    figure.subplots().set_title(HOSTILE.replace("$", "").replace("\x1b", ""))
    rows = [(HOSTILE, "n"), (HOSTILE, 3)]
    sections = [Section(HOSTILE, HOSTILE, body) for body in (HOSTILE, rows, figure)]
    facts = collect(jax.random.key(1), HOSTILE, posterior, diagnosis=diagnosis("pass", 1.0, HOSTILE), about=HOSTILE)
    return write_fits(tmp_path_factory.mktemp("hostile") / "report.html", [facts], sections)


def test_hostile_text_is_shown_and_never_run(hostile: Path, visit: Callable[..., Page]) -> None:
    without_policy = hostile.with_name("without.html")
    content = hostile.read_text(encoding="utf-8")
    assert "Content-Security-Policy" in content
    without_policy.write_text(re.sub(r"<meta http-equiv[^>]*>", "", content), encoding="utf-8")
    for path in (hostile, without_policy):
        page = visit(path)
        assert page.title() != "taken"
        assert page.locator("script").count() == 0
        assert page.locator("[onerror], [onload], a[href^=javascript]").count() == 0
        shown = page.inner_text("body")
        assert shown.count("</td><script>document.title='taken'</script>") > 8
        assert "\x1b" not in content
        axis_labels = page.locator("svg text", has_text="<script>")
        assert axis_labels.count() >= 2, "the site's name stands on its axis, and the title on the domain's figure"


def test_every_picture_has_size_a_caption_and_ids_of_its_own(
    full: FitResults, tmp_path: Path, visit: Callable[..., Page]
) -> None:
    page = visit(write_fits(tmp_path / "report.html", [full]))
    pictures = page.locator(PICTURES)
    assert pictures.count() >= 11
    for picture in pictures.all():
        box = picture.bounding_box()
        assert box is not None
        assert box["width"] > 200
        assert box["height"] > 120
    captions = page.locator("figcaption").all_inner_texts()
    assert len(captions) == pictures.count()
    assert all("Good" in caption for caption in captions)
    ids = page.eval_on_selector_all("[id]", "all => all.map(one => one.id)")
    assert len(ids) == len(set(ids))
    used = page.eval_on_selector_all(
        "svg *",
        r"all => all.flatMap(one => [...one.outerHTML.matchAll(/(?:href=\"|url\()#([^\")]+)/g)].map(m => m[1]))",
    )
    assert set(used) <= set(ids)


def test_the_parts_are_there_verdict_first(full: FitResults, tmp_path: Path, visit: Callable[..., Page]) -> None:
    path = write_fits(tmp_path / "report.html", [full], [Section("From the domain", "Good: all of it.", "text")])
    page = visit(path)
    assert page.locator("h2").all_inner_texts() == [
        "Verdict",
        "Checks",
        "Numbers",
        "Training",
        "Policy, prior and target",
        "Draws",
        "Weights",
        "What each engine says of the same optimum",
        "Restarts",
        "Frontier",
        "Best of n",
        "Over-optimisation",
        "Training and held-out data",
        "From the domain",
        "How it was made",
    ]
    assert "✗ Failed" in page.inner_text(".card")
    assert "The best of 16 draws of the prior earns E[R] = " in page.inner_text("body")
    assert "“gold” is greatest at β = 0.3" in page.inner_text("body")
    outcomes = page.locator(".checks .mark").all_inner_texts()
    assert {"✗ fail", "! warn", "? unknown", "✓ pass"} <= set(outcomes)
    assert "bayesrl.fit(jax.random.key(0)" in page.inner_text("pre")
    draws = page.locator("section", has=page.locator("h2", has_text="Draws")).inner_text()
    assert re.search(r"best\s+2\.000\s+\S+\s+2", draws)
    engines = page.locator("section", has=page.locator("h2", has_text="What each engine says")).inner_text()
    assert "SMC exact twist, β = 0.3" in engines
    assert "not applied: NUTS cannot draw discrete site" in engines
    assert path.stat().st_size < 3_000_000


def test_a_telephone_needs_no_sideways_scrolling(full: FitResults, tmp_path: Path, visit: Callable[..., Page]) -> None:
    path = write_fits(tmp_path / "report.html", [full, replace(full, name="b" * 200)])
    for width in (320, 390, 1280):
        page = visit(path, width)
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        boxes = [picture.bounding_box() for picture in page.locator(PICTURES).all()]
        assert all(box is not None and box["x"] + box["width"] <= width for box in boxes)


def test_several_fits_stand_side_by_side(full: FitResults, tmp_path: Path, visit: Callable[..., Page]) -> None:
    page = visit(write_fits(tmp_path / "report.html", [full, replace(full, name="other")]))
    for section in page.locator("section").all():
        cells = [cell.bounding_box() for cell in section.locator(".cell").all()]
        assert len(cells) in (1, 2)
        if len(cells) == 2:
            assert cells[0]["y"] == cells[1]["y"]
            assert cells[0]["x"] + cells[0]["width"] <= cells[1]["x"]
    rows = page.locator("section", has=page.locator("h2", has_text="Side by side")).locator("tbody tr")
    assert rows.count() == 2 * len(BETAS)


def test_the_dark_and_paper(full: FitResults, tmp_path: Path, visit: Callable[..., Page]) -> None:
    path = write_fits(tmp_path / "report.html", [full])

    def lightness(page: Page, selector: str, style: str) -> float:
        told = page.eval_on_selector(selector, f"one => getComputedStyle(one)['{style}']")
        return float(np.mean([float(part) for part in re.findall(r"[\d.]+", told)[:3]]) / 255)

    light, dark = visit(path), visit(path, scheme="dark")
    for selector, style in (("p", "color"), ("svg text", "fill"), (".headline", "color")):
        assert lightness(light, "body", "backgroundColor") - lightness(light, selector, style) > 0.5
        assert lightness(dark, selector, style) - lightness(dark, "body", "backgroundColor") > 0.4
    dark.emulate_media(media="print")
    assert lightness(dark, "body", "backgroundColor") > 0.95
    assert lightness(dark, "svg text", "fill") < 0.2
    assert dark.pdf(format="A4").startswith(b"%PDF")


def test_the_same_fit_gives_the_same_report(full: FitResults, tmp_path: Path) -> None:
    first, second = (write_fits(tmp_path / name, [full]).read_bytes() for name in ("a.html", "b.html"))
    assert first == second


def test_a_page_keeps_to_its_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    figures = [Figure(figsize=(8, 6)) for _ in range(6)]
    for i, figure in enumerate(figures):
        figure.subplots().scatter(*np.random.default_rng(i).normal(size=(2, 1500)), s=np.arange(1500) % 7)
    part = Part("many", "", [Cell("", [CaptionedFigure(figure, f"{i}") for i, figure in enumerate(figures)])])
    whole = html_page("t", "", [part], "")
    monkeypatch.setattr(page_module, "BUDGET", len(whole) // 3)
    coarse = html_page("t", "", [part], "")
    assert len(coarse) <= len(whole) // 3 + 10_000
    assert coarse.count("<figure>") == 6
    assert "data:image/png;base64," in coarse


def test_long_lines_become_pixels() -> None:
    figure = Figure()
    figure.subplots().plot(np.random.default_rng(0).normal(size=100_000))
    page = html_page("t", "", [Part("one", "", [Cell("", [CaptionedFigure(figure, "noise")])])], "")
    assert len(page) < 500_000


def test_a_figure_that_cannot_be_drawn_is_named() -> None:
    figure = Figure()
    figure.subplots().set_title(r"$\frac{$")
    page = html_page("t", "", [Part("one", "", [Cell("", [CaptionedFigure(figure, "broken")])])], "")
    assert "This figure cannot be drawn" in page


def test_a_fit_loaded_without_its_policy_shows_what_it_has(
    sweep: Posterior, tmp_path: Path, visit: Callable[..., Page]
) -> None:
    loaded = replace(sweep, programs=None)
    text = visit(write_report(jax.random.key(0), tmp_path / "report.html", loaded)).inner_text("body")
    assert "No verdict" in text
    assert "loaded without its policy" in text
    assert "Training" in text
    assert "Draws" in text


def test_an_empty_fit_says_what_is_missing(sweep: Posterior, tmp_path: Path, visit: Callable[..., Page]) -> None:
    empty = Posterior(0.5, {}, {}, {}, {}, {}, {"num_steps": 100}, interrupted=True)
    stopped = replace(sweep, interrupted=True, settings=sweep.settings | {"num_steps": 100})
    page = visit(
        write_report(
            jax.random.key(0),
            tmp_path / "report.html",
            {"empty": empty, "stopped": stopped},
            diagnoses={"stopped": diagnosis("unknown", BETAS)},
        )
    )
    text = page.inner_text("body")
    for sentence in ("The fit stopped after 0 of 100 steps", "There is no history", "There are no draws", "no curves"):
        assert sentence in text
    assert "The fit stopped after 30 of 100 steps" in text


def test_paths_that_cannot_be_written_are_refused(sweep: Posterior, tmp_path: Path) -> None:
    loaded = replace(sweep, programs=None)
    with pytest.raises(RunFolderError, match="it is a folder; name a file"):
        write_report(jax.random.key(0), tmp_path, loaded)
    with pytest.raises(RunFolderError, match="there is no folder"):
        write_report(jax.random.key(0), tmp_path / "nowhere" / "report.html", loaded)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(RunFolderError, match="there is no folder"):
        write_report(jax.random.key(0), tmp_path / "file" / "report.html", loaded)
    with pytest.raises(PolicyError, match=r"posteriors must be a Posterior, .*, got \{\}"):
        write_report(jax.random.key(0), tmp_path / "report.html", {})
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_report_of_a_fit_finds_its_verdict(tmp_path: Path, visit: Callable[..., Page]) -> None:
    posterior = fit(bandit())
    page = visit(write_report(jax.random.key(0), tmp_path / "report.html", posterior, held_out=(), gold="no_such_site"))
    text = page.inner_text("body")
    assert re.search(r"(Passed|Failed)", page.inner_text(".headline"))
    assert "no deterministic site “no_such_site”; it has gold" in text
    assert page.locator("figcaption", has_text="Good: the fit (q) lies on the target (p*)").count() == 1


def test_tables_of_domains(tmp_path: Path, sweep: Posterior) -> None:
    rows = [("word", "count", "score"), ("a", 1200, 0.123456), ("b", 3, float("nan")), ("short",)]
    sections = [Section("words", "", rows), Section("none", "", []), Section("long", "", "x" * 30_000)]
    text = write_report(jax.random.key(0), tmp_path / "r.html", replace(sweep, programs=None), sections).read_text(
        encoding="utf-8"
    )
    assert "1,200" in text
    assert "0.1235" in text
    assert "There is nothing to show." in text
    assert "10,000 more characters" in text


def test_evidence_without_an_upper_side_claims_no_optimum(tmp_path: Path) -> None:
    told = replace(diagnosis("unknown"), evidence=evidence(0.5, bounded=False))
    posterior = fit(bandit(), beta=0.5)
    text = write_report(jax.random.key(0), tmp_path / "r.html", posterior, diagnoses={"fit": told}).read_text(
        encoding="utf-8"
    )
    assert "? Unknown" in text
    assert "meets the dashed optimum" not in text
    assert "But the weights have no bound." in text


def test_a_program_without_rewards_is_told_in_nats(tmp_path: Path) -> None:
    def program() -> None:
        mean = numpyro.sample("mean", dist.Normal(0.0, 1.0))
        numpyro.sample("data", dist.Normal(mean, 1.0), obs=jnp.array(1.0))

    posterior = fit(program, beta=None)
    told = replace(diagnosis("pass"), evidence=evidence(None))
    text = write_report(jax.random.key(0), tmp_path / "r.html", posterior, diagnoses={"fit": told}).read_text(
        encoding="utf-8"
    )
    assert re.search(r"<dd>0\.020 \[0\.012, 0\.028\] nats</dd>", text)
    assert "without rewards" in text
    assert "Without rewards J is the ELBO" in text
    assert "log p(y|x)" in text
    assert "reward units" not in text
    assert "E[R]  (" not in text


def test_what_cannot_be_shown_is_refused_before_anything_is_computed(sweep: Posterior, tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    many, one = diagnosis("pass", BETAS), diagnosis("pass", 1.0)
    for made, words in (
        ({"other": many}, "diagnoses has a 'other', which is not among the fits; choose from fit"),
        ({"fit": one}, "is of β = 1.0, the fit of β ="),
    ):
        with pytest.raises(PolicyError, match=words):
            write_report(jax.random.key(0), path, sweep, diagnoses=made)
    with pytest.raises(PolicyError, match=r"is of β = 0.5, the fit of β ="):
        write_report(jax.random.key(0), path, sweep, engines={"fit": engine_comparison(0.5)})
    for section, words in (
        (
            Section("mine", "", None),
            "the body of section 'mine' must be a Matplotlib figure, text, or rows of cells .*, got None",
        ),
        (Section("mine", "", [1, 2]), "the body of section 'mine' must be a Matplotlib figure, text, or rows of cells"),
        (Section(None, "", "text"), "the title of section None must be text, got None"),  # type: ignore[arg-type]
    ):
        with pytest.raises(PolicyError, match=words):
            write_report(jax.random.key(0), path, sweep, [section])
    for words, sections in (
        (r"sections must be a list of bayesrl.Section.*, got a Section", Section("a", "b", "c")),
        (r"a section must be a bayesrl.Section.*, got \(\)", [()]),
    ):
        with pytest.raises(PolicyError, match=words):
            writing.check_sections(sections)
    for odd in (3, None, "a\0b"):
        with pytest.raises(BayesRLError, match="use a path"):
            write_report(jax.random.key(0), odd, sweep)  # type: ignore[arg-type]
    with pytest.raises(RunFolderError, match="too long"):
        writing.check_path(tmp_path / ("a" * 300))
    with pytest.raises(RunFolderError, match="it is a device or a pipe"):
        writing.check_path("/dev/null")
    assert not list(tmp_path.iterdir())


def test_a_gold_metric_that_is_not_there_costs_no_frontier(sweep: Posterior) -> None:
    facts = collect(jax.random.key(1), "sweep", sweep, gold="silver", diagnosis=diagnose(jax.random.key(2), sweep))
    assert facts.frontier is not None
    assert facts.missing == (
        "The program has no deterministic site “silver” to compare with the reward; its sites: “gold”.",
    )

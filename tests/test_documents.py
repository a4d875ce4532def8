"""The documents: examples run and print what stands beside them, figures are those of the results, links lead on."""

import contextlib
import io
import re
from pathlib import Path

import pytest

from benchmarks.results import PAGES, RESULTS

DOCUMENTS = Path(__file__).parents[1] / "docs"
NUMBER = re.compile(r"True|False|-?\d+(?:\.\d+)?(?:e-?\d+)?")


@pytest.mark.parametrize(
    ("page", "least"), [("engines.md", 10), ("unknown_rewards.md", 4), ("direct_preferences.md", 4)]
)
def test_examples_print_what_they_say(page: str, least: int) -> None:
    text = (DOCUMENTS / page).read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(blocks) >= least
    shared: dict[str, object] = {}
    for block in blocks:
        said = [found for line in block.splitlines() for found in _said(line)]
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(block, shared)  # noqa: S102
        found = NUMBER.findall(printed.getvalue())
        assert len(found) == len(said), (block, printed.getvalue())
        for one, other in zip(found, said, strict=True):
            assert _agree(one, other), (block, printed.getvalue())


def _said(line: str) -> list[str]:
    return NUMBER.findall(line.rpartition("#")[2]) if "print(" in line and "#" in line else []


def _agree(found: str, said: str) -> bool:
    """Compare words as they are, and numbers to the digits that are said."""
    if said in ("True", "False"):
        return found == said
    digits = len(said.partition(".")[2])
    return float(found) == pytest.approx(float(said), abs=0.51 * 10.0**-digits)


@pytest.mark.parametrize("name", PAGES)
def test_pages_show_the_figures_of_the_results(name: str) -> None:
    results, page = (path.read_text(encoding="utf-8") for path in (RESULTS, PAGES[name]))
    section, shown = (_between(name, text) for text in (results, page))
    assert shown.count("|") > 100
    assert shown in section


def _between(name: str, text: str) -> str:
    return text.partition(f"<!-- {name} -->\n")[2].partition(f"<!-- end of {name} -->")[0].strip()


def test_links_between_documents_lead_somewhere() -> None:
    for page in [*DOCUMENTS.glob("*.md"), DOCUMENTS.parent / "README.md"]:
        for target in re.findall(r"\]\((?!http)([^)#]+)\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), (page.name, target)

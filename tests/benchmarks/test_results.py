"""RESULTS.md: a benchmark rewrites its own section and leaves all others, also those that it does not know."""

from pathlib import Path

import pytest

from benchmarks import results


def test_other_sections_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(results, "RESULTS", tmp_path / "RESULTS.md")
    for name in ("first", "newer", "second"):
        results.write_section(name, name.title(), f"Of {name}.", ("first", "newer", "second"))
    results.write_section("second", "Second", "Again.", ("first", "second"))
    text = (tmp_path / "RESULTS.md").read_text(encoding="utf-8")
    assert all(f"<!-- {name} -->" in text for name in ("first", "newer", "second"))
    assert ("Of first." in text, "Of newer." in text, "Of second." in text, "Again." in text) == (
        True,
        True,
        False,
        True,
    )

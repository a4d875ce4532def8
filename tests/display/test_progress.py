"""The progress line in a terminal: what is done is told with its seconds, and no silence is long."""

import itertools
import os
import re
import select
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bayesrl.compilation.status import activity, has_display, show_activities
from bayesrl.display.progress import Progress, ProgressLine, show_progress

pytestmark = [
    pytest.mark.xdist_group("cli"),
    pytest.mark.skipif(sys.platform == "win32", reason="Windows has no pseudo-terminals"),
]
LONGEST_SILENCE = 2.0
COLUMNS = 80


def watched(code: str, *args: str) -> list[tuple[float, str]]:
    """Run a script in a terminal of 80 columns, and give what it showed with the times of that."""
    import fcntl
    import pty
    import struct
    import termios

    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, COLUMNS, 0, 0))
    environment = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "LINES")} | {"TERM": "xterm"}
    process = subprocess.Popen(
        [sys.executable, "-c", code, *args], stdin=theirs, stdout=theirs, stderr=theirs, env=environment
    )
    os.close(theirs)
    shown, began = [], time.monotonic()
    while select.select([ours], [], [], 240)[0]:
        try:
            part = os.read(ours, 65536)
        except OSError:  # the other end was closed
            break
        if not part:
            break
        shown.append((time.monotonic() - began, part.decode(errors="replace")))
    os.close(ours)
    assert process.wait(timeout=60) == 0, "".join(text for _, text in shown)
    return shown


def lines(shown: list[tuple[float, str]]) -> list[str]:
    """Give the states of the lines, one after another."""
    return [line.rstrip() for line in re.split(r"[\r\n]+", "".join(text for _, text in shown)) if line.strip()]


def test_what_takes_long_is_told_with_its_seconds() -> None:
    """A fake compilation before a bar of ten moves, nested work after it; the bar's clock goes on meanwhile."""
    shown = watched(
        "import time\n"
        "from bayesrl.compilation.status import activity\n"
        "from bayesrl.display.progress import Progress, show_progress\n"
        "with show_progress(True), activity('outside'):\n"
        "    with Progress(1000, 0, show=True) as line:\n"
        "        with activity('compiling the step'):\n"
        "            time.sleep(3.5)\n"
        "        for i in range(10):\n"
        "            time.sleep(2.5 if i == 5 else 0.1)\n"
        "            line.update(100, lambda: 'J=0.8123 E[R]=0.9012 KL=0.123')\n"
        "    with activity('scoring'):\n"
        "        time.sleep(1.3)\n"
        "        with activity('compiling something whose name is long ' + 'x' * 80):\n"
        "            time.sleep(1.5)\n"
        "        with activity('soon done'):\n"
        "            time.sleep(0.01)\n"
        "print('done')\n"
    )
    told = lines(shown)
    for second in ("", ", 1 s", ", 2 s", ", 3 s"):
        assert f"compiling the step{second}" in told
    assert any(re.fullmatch(r" *0% \|.*\| 0/1000 steps, 00:0\d, \? left", line) for line in told)
    clocks = {match[1] for line in told if (match := re.search(r"500/1000 steps, 00:0(\d), ", line))}
    assert len(clocks) >= 2, "the clock goes on while no step is taken"
    assert any(re.search(r"\| 1000/1000 steps, 00:0\d, 00:00 left, J=0.8123", line) for line in told)
    assert {"scoring", "scoring, 1 s"} <= set(told)
    assert any(re.fullmatch(r"compiling something .*x, 1 s", line) for line in told), "seconds stay, words are cut"
    assert "soon done" not in told
    assert told[-1] == "done"
    assert max(map(len, told)) <= COLUMNS
    times = [0.0, *(at for at, _ in shown)]
    started = times[1]
    assert max(b - a for a, b in itertools.pairwise(times) if b > started) < LONGEST_SILENCE


def test_a_command_is_never_silent_for_long(tmp_path: Path) -> None:
    shown = watched(
        "import time\n"
        "import bayesrl.cli.fit as fitting\n"
        "real = fitting.collect_run\n"
        "fitting.collect_run = lambda *args, **given: (time.sleep(3), real(*args, **given))[1]\n"
        "from bayesrl.cli import app\n"
        "app()\n",
        "fit",
        "bernoulli_bandit",
        "--steps",
        "200",
        "--out",
        str(tmp_path / "run"),
    )
    told = lines(shown)
    assert "diagnosing, 2 s" in told
    assert any("200/200 steps" in line for line in told)
    table = next(i for i, line in enumerate(told) if "steps in" in line)
    assert not any(line.startswith(("scoring", "diagnosing", "writing")) for line in told[table:])


def test_nothing_is_shown_elsewhere(capsys: pytest.CaptureFixture[str]) -> None:
    with show_progress(True), activity("compiling the step"), Progress(10, 0, show=True) as line:
        assert not has_display()
        time.sleep(0.5)
        line.update(1, lambda: pytest.fail("nobody reads this"))
    assert capsys.readouterr() == ("", "")


def test_who_asks_for_silence_has_it(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("bayesrl.display.progress.is_visible", lambda: True)
    with show_progress(True):
        assert has_display()
        with show_progress(True):
            assert has_display(), "one line serves all"
        with show_progress(False), activity("compiling the step"):
            assert not has_display()
            time.sleep(0.6)
        assert has_display()
    assert not has_display()
    assert "compiling" not in capsys.readouterr().err


def test_an_error_leaves_no_line_behind(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("bayesrl.display.progress.is_visible", lambda: True)

    def fail() -> None:
        with show_progress(True), activity("compiling the step"):
            time.sleep(0.8)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    shown = capsys.readouterr().err
    assert "compiling the step" in shown
    assert re.search(r"\r +\r$", shown), "the line is blank, and the cursor at its start"
    assert not has_display()


def test_threads_keep_what_they_do_to_themselves() -> None:
    """A display is that of the context that opened it; other threads say nothing on it."""
    import threading

    found: list[bool] = []
    with ProgressLine() as line, show_activities(line.describe):
        thread = threading.Thread(target=lambda: found.append(has_display()))
        thread.start()
        thread.join()
        assert has_display()
    assert found == [False]

"""The command line, as a stranger meets it: what it prints, what it leaves, and how it refuses."""

import html
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from readings import adds_up, read_report, read_table, several
from typer.testing import CliRunner

from bayesrl import run_folder
from bayesrl.cli import app
from bayesrl.display.formatting import format_number
from bayesrl.errors import BayesRLError
from bayesrl.ready_models import model_names
from bayesrl.svi import training_loop as running
from bayesrl.svi.saved_fits import load

pytestmark = pytest.mark.xdist_group("cli")
COMMAND = [sys.executable, "-c", "from bayesrl.cli import app; app()"]
MODEL = """
import jax.numpy as jnp, numpyro, numpyro.distributions as dist, bayesrl

def problem(*, high: float = 1.0) -> bayesrl.Problem:
    def coin():
        side = numpyro.sample("side", dist.Bernoulli(0.5))
        bayesrl.reward("win", high * side)
    return bayesrl.Problem(coin, beta=1.0, fit_options={"num_steps": 40}, about="a coin [that pays]")
"""


def invoke(*args: object) -> tuple[int, str, str]:
    """Run a command in this process and give its exit code, what it printed, and its errors."""
    result = CliRunner().invoke(app, [str(arg) for arg in args], env={"COLUMNS": "80"})
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, result.stderr


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """One small sweep, fitted by the command line: its folder and what it printed."""
    folder = tmp_path_factory.mktemp("runs") / "bandit"
    options = ("--beta", "0.1,0.5", "--steps", 60, "--restarts", 2, "--set", "arms=3", "--set", "best=1")
    code, out, err = invoke("fit", "bernoulli_bandit", *options, "--out", folder)
    assert (code, err) == (0, "")
    return folder, out


def test_fit_prints_a_table_within_80_columns(run: tuple[Path, str]) -> None:
    _, out = run
    assert "\x1b" not in out
    title, _, table = out.partition("\n")
    assert title.startswith("bernoulli_bandit: ")
    assert max(len(line) for line in table.splitlines()) <= 80
    assert re.search(r"β +J +E\[R\] +KL +log Z +J\* +gap +relative gap", table)
    assert len(re.findall(r"^fit +0\.[15] ", table, flags=re.MULTILINE)) == 2
    assert "the best of 2 restarts" in table
    assert re.search(r"^(✓ PASS|✗ FAIL): ", table, flags=re.MULTILINE)
    assert "report:" in table


def test_fit_leaves_a_run_folder(run: tuple[Path, str]) -> None:
    folder, _ = run
    pictures = {f"{name}.{suffix}" for name in ("training", "policy") for suffix in ("png", "svg")}
    kept = {"problem.json", "checkpoint.safetensors", "posterior.nc", "model.json", "scores.json", "report.html"}
    kept |= {run_folder.PREVIOUS_CHECKPOINT}
    assert {path.name for path in folder.iterdir()} == pictures | kept
    told = run_folder.load_json(folder, run_folder.MODEL, run_folder.MODEL_SCHEMA)
    assert told == {"model": "bernoulli_bandit", "options": {"arms": 3, "best": 1}}
    assert (folder / "training.png").read_bytes().startswith(b"\x89PNG")


def test_the_report_of_a_fit(run: tuple[Path, str]) -> None:
    folder, _ = run
    text = html.unescape((folder / "report.html").read_text(encoding="utf-8"))
    assert text.startswith("<!DOCTYPE html>")
    assert "Arms with known win rates" in text
    command = "bayesrl fit bernoulli_bandit --beta 0.1,0.5 --steps 60 --restarts 2 --seed 0 --set arms=3 --set best=1"
    assert command in text
    assert "arms=3, best=1" in text
    assert "60 of 60" in text
    assert "Frontier" in text


def test_what_is_printed_is_what_the_report_and_the_files_tell(run: tuple[Path, str]) -> None:
    folder, out = run
    told, _ = read_report((folder / "report.html").read_text(encoding="utf-8"))
    printed = read_table(out, "fit")
    assert {beta for _, beta in printed} == {"0.1", "0.5"}
    for where, texts in printed.items():
        assert texts == told[where]
    for beta in ("0.1", "0.5"):
        assert adds_up(printed, beta)
    assert several(told) == {}
    assert read_table(invoke("show", folder)[1], "fit") == printed
    scores = json.loads((folder / "scores.json").read_text(encoding="utf-8"))
    means = (scores["fit"][name]["mean"] for name in ("objective", "optimum", "gap"))
    for beta, j, optimum, gap in zip(scores["fit"]["beta"], *means, strict=True):
        assert j + gap == pytest.approx(optimum, abs=1e-12)
        assert format_number(j) in told["J", f"{beta:g}"]


OLDER = {
    "beta": 0.1, "restart": 1, "start": [0.5, 0.0], "optimum": 0.8, "log_evidence": 8.0,
    "estimates": {
        "objective": [0.7, 0.0], "reward": [0.85, 0.0], "kl": [1.5, 0.0], "metrics": {"wins": [0.4, 0.01]},
        "log_marginal": None,
    },
}  # fmt: skip
MEASURED = {
    "beta": 0.1, "ess": 900.0, "khat": None, "num_weighed": 1000, "log_evidence": [8.0, 0.0, 8.0, 8.0, 8.0, 8.0],
    "objective": [0.7, 0.0, 0.7, 0.7, 0.7, 0.7], "reward": [0.85, 0.0, 0.85, 0.85, 0.85, 0.85],
    "kl": [1.5, 0.0, 1.5, 1.5, 1.5, 1.5], "optimum": [0.8, 0.0, None, None, 0.79, 0.81],
    "gap": [0.1, 0.0, None, None, 0.09, 0.11], "share": [0.3333, 0.0, None, None, 0.3, 0.35],
    "start": [0.5, 0.0, 0.5, 0.5, 0.5, 0.5], "log_marginal": None,
}  # fmt: skip


@pytest.mark.parametrize("measured", [None, [MEASURED]])
def test_scores_of_an_older_version_are_shown(measured: Any, run: tuple[Path, str], tmp_path: Path) -> None:
    folder = tmp_path / "older"
    shutil.copytree(run[0], folder)
    board = {"rows": [OLDER], "contexts": 1, "note": ""}
    scores = json.loads((folder / "scores.json").read_text(encoding="utf-8"))
    scores |= {"fit": board, "held_out": board, "measured": measured}
    (folder / "scores.json").unlink()
    run_folder.save_json(folder, run_folder.SCORES, {key: value for key, value in scores.items() if key != "digest"})
    code, out, err = invoke("show", folder)
    assert (code, err) == (0, "")
    printed = read_table(out, "fit")
    assert printed["J", "0.1"] == {"0.7000"}
    assert all(text.startswith("0.8") for text in printed["J*", "0.1"])
    assert all(text.startswith("33.3%") for text in printed["relative gap", "0.1"])
    assert "0.400 ± 0.010" in out
    assert "J(π₀) = 0.5000" in out


def test_report_of_several_runs(run: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, _ = run
    copied = tmp_path / "bandit"
    shutil.copytree(folder, copied)
    (copied / "report.html").unlink()
    code, out, _ = invoke("report", copied)
    assert code == 0
    assert re.search(r"^(✓ PASS|✗ FAIL): ", out)
    assert (copied / "report.html").stat().st_size < 3_000_000
    monkeypatch.chdir(tmp_path)
    assert invoke("report", folder, copied, "--quiet") == (0, "", "")
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "Side by side" in text
    assert str(folder) in text, "folders of one name are told apart by their paths"


def test_report_shows_what_there_is(run: tuple[Path, str], tmp_path: Path) -> None:
    lost = tmp_path / "lost"
    shutil.copytree(run[0], lost)
    (lost / "model.json").write_text(json.dumps({"model": "gone.py", "options": {}}))
    damaged = tmp_path / "damaged"
    shutil.copytree(run[0], damaged)
    for name in ("model.json", "posterior.nc"):
        (damaged / name).write_text("not what it was")
    empty = tmp_path / "empty"
    empty.mkdir()
    shutil.copy(run[0] / "problem.json", empty)
    code, out, err = invoke("report", lost, damaged, empty, "--out", tmp_path / "all.html")
    assert (code, err) == (0, "")
    assert "PASS" not in out
    for name, sentence in (
        ("lost", "The model cannot be made again"),
        ("damaged", "The saved draws cannot be read"),
        ("empty", "The folder does not say which model it fits"),
    ):
        assert f"! WARN: {name}: {sentence}" in " ".join(out.split())
    text = html.unescape((tmp_path / "all.html").read_text(encoding="utf-8"))
    for sentence in (
        "The model cannot be made again: there is no model 'gone.py'",
        "model.json",
        "does not say which model it fits",
        "loaded without its policy",
        "The saved draws cannot be read",
        "The fit stopped after 0 of 60 steps",
        "No verdict",
    ):
        assert sentence in text


def test_a_sweep_loaded_without_its_policy_can_be_chosen_from(run: tuple[Path, str]) -> None:
    best = load(run[0]).select(beta=0.1, restart="best")
    assert best.batch_shape == (1,)
    assert all(values.shape[0] == 1 for values in best.params.values())


def test_report_refuses_paths(run: tuple[Path, str], tmp_path: Path) -> None:
    code, _, err = invoke("report", run[0], "--out", tmp_path)
    assert (code, err.count("\n")) == (2, 1)
    assert "it is a folder; name a file" in err
    code, _, err = invoke("report", run[0], "--out", tmp_path / "none" / "report.html")
    assert (code, err.count("\n")) == (2, 1)
    assert "there is no folder" in err
    assert list(tmp_path.iterdir()) == []


def test_show_repeats_the_results_without_the_model(run: tuple[Path, str]) -> None:
    folder, out = run
    code, shown, _ = invoke("show", folder)
    assert code == 0
    for line in re.findall(r"^(?:fit |✓|✗).*$", out, flags=re.MULTILINE):
        assert line in shown
    assert "60 of 60" in shown
    assert "arms=3, best=1" in shown
    assert "missing" not in shown
    assert max(len(line) for line in shown.splitlines()) <= 80


def test_fit_again_says_that_it_is_done(run: tuple[Path, str]) -> None:
    folder, out = run
    before = (folder / "checkpoint.safetensors").read_bytes()
    code, again, _ = invoke("fit", "bernoulli_bandit", "--set", "arms=3", "--set", "best=1", "--out", folder)
    assert code == 0
    assert "has done all of its 60 steps" in again
    for line in re.findall(r"^fit .*$", out, flags=re.MULTILINE):
        assert line in again
    assert (folder / "checkpoint.safetensors").read_bytes() == before


def test_another_problem_is_refused_and_the_run_kept(run: tuple[Path, str]) -> None:
    folder, _ = run
    before = (folder / "model.json").read_bytes()
    code, _, err = invoke("fit", "bernoulli_bandit", "--set", "arms=3", "--seed", 5, "--out", folder)
    assert code == 2
    assert "another problem" in err
    assert (folder / "model.json").read_bytes() == before


def test_fit_show_resume_of_a_file(tmp_path: Path) -> None:
    file, folder = tmp_path / "coin.py", tmp_path / "run"
    file.write_text(MODEL)
    code, out, _ = invoke("fit", file, "--set", "high=2.5", "--out", folder)
    assert code == 0
    assert "a coin [that pays]" in out
    code, out, _ = invoke("resume", folder, "--steps", 60)
    assert code == 0
    assert out.startswith("60 steps")
    assert "60 of 60" in invoke("show", folder)[1]
    assert "has done all" in invoke("resume", folder)[1]
    assert json.loads((folder / "model.json").read_text())["model"] == str(file)


def test_annealing_of_a_model_goes_with_any_temperature(tmp_path: Path) -> None:
    """Where the temperature asked for is above the model's start, the fit starts at it; the report tells where."""
    model = tmp_path / "annealed.py"
    model.write_text(MODEL.replace('{"num_steps": 40}', '{"num_steps": 40, "start_beta": 2.0}'))
    for beta, told in (("1", "2"), ("5", "5"), ("1,5", "2")):
        folder = tmp_path / f"run{beta}"
        assert invoke("fit", model, "--beta", beta, "--out", folder)[::2] == (0, "")
        assert re.search(rf"<td[^>]*>start of β</td>\s*<td[^>]*>{told}</td>", (folder / "report.html").read_text())
        assert invoke("fit", model, "--out", folder)[::2] == (0, "")


def test_quiet_prints_nothing(tmp_path: Path) -> None:
    (tmp_path / "coin.py").write_text(MODEL)
    assert invoke("fit", tmp_path / "coin.py", "--steps", 5, "--quiet", "--out", tmp_path / "run") == (0, "", "")


def test_models_lists_every_model_with_its_options() -> None:
    code, out, _ = invoke("models")
    assert code == 0
    for name in model_names():
        assert name in out
    assert "arms=5" in out
    assert max(len(line) for line in out.splitlines()) <= 80


BAD = {
    "unknown model": (("fit", "no_[red]such"), "no model 'no_[red]such'; choose from"),
    "no such file": (("fit", "nowhere.py"), "no model 'nowhere.py'"),
    "unknown option": (("fit", "bernoulli_bandit", "--set", "legs=2"), "has no option 'legs'; its options are arms=5"),
    "option without value": (("fit", "bernoulli_bandit", "--set", "arms"), "not of the form name=value"),
    "option of a wrong type": (
        ("fit", "bernoulli_bandit", "--set", "arms=two"),
        "option arms must be an integer, such as 5, got 'two'",
    ),
    "beta of zero": (("fit", "bernoulli_bandit", "--beta", "0"), "beta must be positive"),
    "negative beta": (("fit", "bernoulli_bandit", "--beta", "0.5,-1"), "beta must be positive"),
    "beta of words": (("fit", "bernoulli_bandit", "--beta", "warm"), "--beta 'warm' is not a number"),
    "no steps": (("fit", "bernoulli_bandit", "--steps", "0"), "num_steps=0"),
    "no restarts": (("fit", "bernoulli_bandit", "--restarts", "0"), "num_restarts=0"),
    "no run to resume": (("resume", "nothing_here"), "not a run folder"),
    "no run to report": (("report", "nothing_here"), "not a run folder"),
    "no run to show": (("show", "nothing_here"), "not a run folder"),
    "no integer": (
        ("fit", "river_swim", "--set", "states=2.5"),
        "option states must be an integer, such as 6, got 2.5",
    ),
    "no number": (
        ("fit", "cliff_walking", "--set", "horizon=x"),
        "option horizon must be an integer, such as 200, got 'x'",
    ),
    "no flag": (("fit", "frozen_lake", "--set", "slippery=no"), "option slippery must be true or false, got 'no'"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    args, text = BAD[name]
    monkeypatch.chdir(tmp_path)
    code, out, err = invoke(*args)
    assert code == 2
    assert err.startswith("error: ")
    assert text in err
    assert err.count("\n") == 1
    assert "Traceback" not in out + err
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


FILES = {
    "does not import": ("import nothing_of_this_name\ndef problem(): ...", "does not import: ModuleNotFoundError"),
    "syntax": ("def problem(:", "does not import: SyntaxError"),
    "no problem": ("x = 1", "defines no function problem"),
    "not a problem": ("def problem(): return 3", "returned int"),
    "no reward": (
        "import numpyro, numpyro.distributions as dist, bayesrl\n"
        "def f(): numpyro.sample('x', dist.Normal(0, 1))\n"
        "def problem(): return bayesrl.Problem(f, beta=1.0)",
        "neither a reward nor an observed site",
    ),
}


@pytest.mark.parametrize("name", FILES)
def test_bad_file_is_one_line(name: str, tmp_path: Path) -> None:
    source, text = FILES[name]
    (tmp_path / "mine.py").write_text(source)
    code, _, err = invoke("fit", tmp_path / "mine.py", "--out", tmp_path / "run")
    assert code == 2
    assert err.startswith("error: ")
    assert text in err
    assert err.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_unusable_folders_are_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    code, _, err = invoke("fit", "bernoulli_bandit", "--out", tmp_path / "file" / "run")
    assert (code, err.count("\n")) == (2, 1)
    assert "cannot make the run folder" in err
    code, _, err = invoke("fit", "bernoulli_bandit", "--out", tmp_path)
    assert code == 2
    assert "not a run folder, and not empty (file)" in err
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_damaged_files_are_named(run: tuple[Path, str], tmp_path: Path) -> None:
    for name in ("scores.json", "model.json"):
        folder = tmp_path / name.removesuffix(".json")
        folder.mkdir()
        for path in run[0].iterdir():
            (folder / path.name).write_bytes(path.read_bytes())
        (folder / name).write_text("{}" if name == "scores.json" else "not json")
        code, _, err = invoke("show", folder)
        assert code == 2
        assert name in err
    (folder / name).unlink()
    code, _, err = invoke("resume", folder)
    assert code == 2
    assert "which model" in err


def test_a_run_stopped_before_its_first_row_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "coin.py").write_text(MODEL)

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(running, "run_chunk", stop)
        code, _, err = invoke("fit", tmp_path / "coin.py", "--out", tmp_path / "run")
    assert code == 130
    assert "stopped at step 0 of 40" in err
    code, shown, _ = invoke("show", tmp_path / "run")
    assert code == 0
    assert "missing: 40 of 40 steps" in shown.replace("\n", " ")
    assert invoke("report", tmp_path / "run")[0] == 0
    assert "The fit stopped after 0 of 40 steps" in (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    code, out, _ = invoke("resume", tmp_path / "run")
    assert code == 0
    assert out.startswith("40 steps")


def test_ctrl_c_says_how_to_go_on(tmp_path: Path) -> None:
    folder = tmp_path / "a run"
    command = [*COMMAND, "fit", "bernoulli_bandit", "--steps", "100000000", "--out", str(folder)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 300
    while not (folder / run_folder.PROBLEM).exists() and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.1)
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=240)
    assert process.returncode == 130, err
    assert "stopped" in err
    assert f"go on with: bayesrl resume '{folder}'" in err
    assert "Traceback" not in out + err
    code, shown, _ = invoke("show", folder)
    assert code == 0
    assert "missing:" in shown


def test_a_pipe_gets_no_colours() -> None:
    environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "80"}
    result = subprocess.run(
        [*COMMAND, "fit", "nothing"], capture_output=True, text=True, env=environment, check=False, timeout=120
    )
    assert result.returncode == 2
    assert result.stderr.startswith("error: there is no model 'nothing'")
    assert "\x1b" not in result.stderr


def test_every_refusal_is_a_bayesrl_error() -> None:
    with pytest.raises(BayesRLError):
        run_folder.read_problem("nothing_here")

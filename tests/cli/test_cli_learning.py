"""`bayesrl learn`, as a stranger meets it: what it prints, what it leaves, how it goes on and how it refuses."""

import re
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from bayesrl import run_folder
from bayesrl.cli import app

pytestmark = pytest.mark.xdist_group("cli")
MODEL = """
from bayesrl import control
import bayesrl

def learning(*, horizon: int = 6) -> bayesrl.LearningProblem:
    swim = control.river_swim(num_states=3, horizon=horizon)
    agent = control.BayesianAgent(control.TabularModel.of(swim, noise=0.1))
    return bayesrl.LearningProblem(
        swim, agent, num_episodes=12, num_runs=2, about="a river [that is short]",
        sections=(control.learning_maps(swim),),
    )
"""


def invoke(*args: object) -> tuple[int, str, str]:
    """Run a command in this process and give its exit code, what it printed, and its errors."""
    result = CliRunner().invoke(app, [str(arg) for arg in args], env={"COLUMNS": "80"})
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, result.stderr


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A small problem, learned by the command line: its folder and what was printed."""
    folder = tmp_path_factory.mktemp("learned")
    (folder / "river.py").write_text(MODEL)
    code, out, err = invoke("learn", folder / "river.py", "--set", "horizon=5", "--out", folder / "run")
    assert (code, err) == (0, "")
    return folder / "run", out


def test_learn_prints_a_table_within_80_columns(run: tuple[Path, str]) -> None:
    folder, out = run
    title, _, table = out.partition("\n")
    assert title.startswith("river: a river [that is short]")
    assert "24 episodes in 2 runs" in out
    assert "cumulated regret" in out
    told = [line for line in table.splitlines() if not line.startswith("report: ")]
    assert max(map(len, told)) <= 80
    assert {"problem.json", "checkpoint.safetensors", "model.json", "report.html", "run-2"} <= {
        path.name for path in folder.iterdir()
    }


def test_the_report_of_a_run(run: tuple[Path, str]) -> None:
    page = (run[0] / "report.html").read_text(encoding="utf-8")
    for title in ("Verdict", "Checks", "Numbers", "Learning", "Posterior of Q", "How sure it is", "How it was made"):
        assert title in page
    assert "--episodes 12 --runs 2 --seed 0 --set horizon=5" in page


def test_runs_go_on_and_are_shown(run: tuple[Path, str], tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(run[0], folder)
    before = run_folder.read_arrays(folder / run_folder.CHECKPOINT)["history/return"]
    code, out, _ = invoke("resume", folder, "--episodes", 15)
    assert code == 0
    assert "30 episodes in 2 runs" in out
    after = run_folder.read_arrays(folder / run_folder.CHECKPOINT)["history/return"]
    assert after[:12].tolist() == before.tolist()
    assert len(after) == 15
    code, out, _ = invoke("show", folder)
    assert code == 0
    assert re.search(r"^runs +2 *$", out, flags=re.MULTILINE)
    assert re.search(r"^episodes +15 of 15, 15 of 15 *$", out, flags=re.MULTILINE)
    other = run_folder.read_arrays(folder / "run-2" / run_folder.CHECKPOINT)["history/return"]
    mean = re.search(r"^mean return of the last episode +(\S+)", out, flags=re.MULTILINE)
    assert mean is not None
    assert float(mean[1]) == pytest.approx((after[-1] + other[-1]) / 2, abs=0.01)
    assert "Thompson()" in out
    assert max(map(len, out.splitlines())) <= 80


def test_a_report_plays_nothing(run: tuple[Path, str], tmp_path: Path) -> None:
    """Of runs that were broken off, it tells what was played, and `show` still says what is left."""
    folder = tmp_path / "run"
    shutil.copytree(run[0], folder)
    path = folder / "run-2" / run_folder.CHECKPOINT
    for name in (run_folder.CHECKPOINT, run_folder.PREVIOUS_CHECKPOINT):
        (folder / "run-2" / name).unlink()
    problem = run_folder.read_problem(folder)
    run_folder.save_problem(folder, problem | {"settings": problem["settings"] | {"num_episodes": 20}})
    plan = run_folder.load_json(folder, run_folder.MODEL, run_folder.MODEL_SCHEMA)
    assert plan is not None
    run_folder.save_json(folder, run_folder.MODEL, plan | {"learn": plan["learn"] | {"episodes": 20}})
    assert invoke("report", folder, "--out", tmp_path / "a.html")[0] == 0
    assert not path.exists()
    code, out, _ = invoke("show", folder)
    assert code == 0
    assert "12 of 20, 0 of 20" in out
    for name in (run_folder.CHECKPOINT, run_folder.PREVIOUS_CHECKPOINT):
        (folder / name).unlink()
    code, _, err = invoke("report", folder, "--out", tmp_path / "b.html")
    assert code == 2
    assert "holds no episode yet" in err


def test_one_is_not_written_as_several(run: tuple[Path, str], tmp_path: Path) -> None:
    options = ("--runs", 1, "--episodes", 1, "--set", "horizon=5", "--out", tmp_path / "one")
    code, out, _ = invoke("learn", run[0].parent / "river.py", *options)
    assert code == 0
    assert "1 episode in 1 run, " in out
    assert "mean return of the last episode" in out
    assert "mean return of the last episode" in invoke("show", tmp_path / "one")[1]
    assert "Mean regret of the last episode, as a share" in (tmp_path / "one" / "report.html").read_text()


def test_reports_of_several_runs(run: tuple[Path, str], tmp_path: Path) -> None:
    model = run[0].parent / "river.py"
    other = tmp_path / "k"
    assert invoke("learn", model, "--explore", "k_learning", "--set", "horizon=5", "--runs", 1, "--out", other)[0] == 0
    out = tmp_path / "both.html"
    code, told, _ = invoke("report", run[0], other, "--out", out)
    assert code == 0
    assert "report:" in told
    page = out.read_text(encoding="utf-8")
    assert "2 ways to learn side by side" in page
    assert re.search(r"<h3>k</h3>", page)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--explore", "thomson"), "there is no exploration rule 'thomson'; choose from random"),
        (("--explore", "boltzmann"), "boltzmann:0.1"),
        (("--episodes", "0"), "num_episodes=0"),
        (("--runs", "0"), "--runs 0; use at least 1"),
        (("--set", "depth=3"), "has no option 'depth'; its options are horizon=6"),
        (("--set", "horizon=2.5"), "option horizon must be an integer, such as 6, got 2.5"),
    ],
)
def test_refusals_are_one_line(run: tuple[Path, str], tmp_path: Path, arguments: tuple[str, ...], told: str) -> None:
    code, _, err = invoke("learn", run[0].parent / "river.py", *arguments, "--out", tmp_path / "none")
    assert code == 2
    assert err.count("\n") == 1
    assert err.startswith("error: ")
    assert told in err
    assert not (tmp_path / "none").exists()


def test_another_run_is_refused_and_the_first_kept(run: tuple[Path, str]) -> None:
    model = run[0].parent / "river.py"
    before = {path.name: path.read_bytes() for path in run[0].iterdir() if path.is_file()}
    code, _, err = invoke("learn", model, "--set", "horizon=7", "--out", run[0])
    assert (code, "holds runs with another choice of options: {'horizon': 5}, not {'horizon': 7}" in err) == (2, True)
    code, _, err = invoke("learn", model, "--set", "horizon=5", "--seed", 3, "--out", run[0])
    assert (code, "another seed" in err) == (2, True)
    assert before == {path.name: path.read_bytes() for path in run[0].iterdir() if path.is_file()}


def test_fits_and_runs_are_told_apart(run: tuple[Path, str], tmp_path: Path) -> None:
    fitted = tmp_path / "fit"
    assert invoke("fit", "bernoulli_bandit", "--steps", 5, "--quiet", "--out", fitted)[0] == 0
    code, _, err = invoke("report", run[0], fitted)
    assert code == 2
    assert "report them apart" in err
    code, _, err = invoke("learn", "bernoulli_bandit", "--out", tmp_path / "x")
    assert code == 2
    assert "use `bayesrl fit bernoulli_bandit`" in err

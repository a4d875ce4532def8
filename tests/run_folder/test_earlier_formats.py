"""Run folders of earlier versions: written once by them, kept here, and read, shown and continued by this one."""

import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from typer.testing import CliRunner

import bayesrl
from bayesrl import control
from bayesrl.cli import app
from bayesrl.errors import RunFolderError
from bayesrl.run_folder import earlier_formats, read_problem

HERE = Path(__file__).parent
FORMATS = [1, 3]
WRITTEN = {1: 0.753410639711797, 3: 0.753410643081164}
"""J of the bandit's fit as the version that made it enumerated it."""


@pytest.fixture
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A copy of a folder, such as `1/bandit`."""
    number, _, name = request.param.partition("/")
    return Path(shutil.copytree(HERE / f"format_{number}" / name, tmp_path / name))


@pytest.mark.parametrize("folder", [f"{number}/bandit" for number in FORMATS], indirect=True)
def test_fits_are_shown_read_and_continued(folder: Path) -> None:
    number = read_problem(folder)["format"]
    shown = bayesrl.load(folder)
    assert shown.draws["arm"].shape == (1, 1000)
    problem = bayesrl.load_problem("bernoulli_bandit")
    posterior = bayesrl.load(folder, problem.policy, *problem.args)
    evidence = bayesrl.evidence(jax.random.key(0), posterior)
    np.testing.assert_allclose(evidence.objective.lower, WRITTEN[number], rtol=1e-6)
    steps = posterior.history["step"]
    resumed = bayesrl.resume(folder, problem.policy, *problem.args, num_steps=405, progress=False)
    assert list(resumed.history["step"][: len(steps)]) == list(steps)
    assert resumed.history["step"][-1] == 405
    # What was written anew stands beside files of the earlier version, and all of it is read.
    again = bayesrl.load(folder, problem.policy, *problem.args)
    jax.tree.map(np.testing.assert_array_equal, again.params, resumed.params)
    assert read_problem(folder)["format"] == number


@pytest.mark.parametrize("folder", [f"{number}/bandit" for number in FORMATS], indirect=True)
def test_results_are_shown_and_reported(folder: Path) -> None:
    shown = CliRunner().invoke(app, ["show", str(folder)])
    assert shown.exit_code == 0, shown.output
    row = next(line.split() for line in shown.output.splitlines() if line.startswith("fit "))
    assert row[1:7] == ["0.1", "0.7534", "0.8675", "1.141", "7.536", "0.7536"]
    assert "PASS" in shown.output
    reported = CliRunner().invoke(app, ["report", str(folder)])
    assert reported.exit_code == 0, reported.output
    assert "0.7534" in (folder / "report.html").read_text()


@pytest.mark.parametrize("folder", [f"{number}/arms" for number in FORMATS], indirect=True)
def test_learning_is_continued(folder: Path) -> None:
    problem = bayesrl.load_learning_problem("bernoulli_arms")
    learned = control.learn(
        jax.random.key(0), problem.environment, problem.agent, num_episodes=45, directory=folder, progress=False
    )
    assert list(learned.history["episode"]) == list(range(1, 46))
    before = bayesrl.run_folder.read_history(HERE / folder.parent / folder.name)[1]
    np.testing.assert_array_equal(learned.history["return"][:40], before["return"][:40])


@pytest.mark.parametrize("folder", [f"{number}/arms" for number in FORMATS], indirect=True)
def test_an_agent_of_other_numbers_is_another_run(folder: Path) -> None:
    problem = bayesrl.load_learning_problem("bernoulli_arms")
    agent = control.BayesianAgent(control.ArmsModel(control.bandits.BernoulliArms(5, prior_a=2.0)))
    with pytest.raises(RunFolderError, match='numbers was "f5368c8cd7a1454c"'):
        control.learn(jax.random.key(0), problem.environment, agent, num_episodes=45, directory=folder, progress=False)


@pytest.mark.parametrize("folder", ["3/bandit"], indirect=True)
def test_only_the_first_format_goes_without_stamps(folder: Path) -> None:
    path = folder / "checkpoint.safetensors"
    path.write_bytes((HERE / "format_1" / "bandit" / path.name).read_bytes())
    problem = bayesrl.load_problem("bernoulli_bandit")
    with pytest.raises(RunFolderError, match="has no digest"):
        bayesrl.load(folder, problem.policy, *problem.args)


def test_names_that_users_options_bear_are_left_alone() -> None:
    arrays = {"state.opt_state[0].count": np.zeros(1), "state.params['w']": np.ones(1)}
    own = {"format": 1, "identity": {}, "settings": {"optimizer": "given"}}
    assert list(earlier_formats.upgrade_arrays(arrays, own)) == list(arrays)
    default = {"format": 1, "identity": {}, "settings": {"optimizer": "default"}}
    assert list(earlier_formats.upgrade_arrays(arrays, default)) == [
        "state.opt_state.adam[0].count",
        "state.params['w']",
    ]

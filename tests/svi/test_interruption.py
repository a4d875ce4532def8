"""A run may be cut anywhere: nothing is lost, and what follows is bit for bit what would have been."""

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest

import bayesrl
from bayesrl import run_folder
from bayesrl.errors import RunFolderError
from bayesrl.objectives import ReverseKL
from bayesrl.svi import training_loop as running

KEY = jax.random.key(3)
OBJECTIVE = bayesrl.objectives.ReverseKL(num_particles=16, enumerated=())

SCRIPT = """
import sys, time
sys.path.insert(0, {here!r})
from bayesrl.svi import training_loop as running
from test_interruption import KEY, OBJECTIVE, bandit
import bayesrl
running.SECONDS_BETWEEN_CHECKPOINTS = 0.0
bayesrl.fit(KEY, bandit, beta=0.2, objective=OBJECTIVE, num_steps=3000, num_restarts=2, directory={folder!r},
            callback=lambda row: time.sleep(0.02), progress=False)
"""


def bandit() -> None:
    arm = numpyro.sample("arm", dist.Categorical(logits=jnp.zeros(6)))
    bayesrl.reward("payoff", jnp.linspace(0.0, 1.0, 6)[arm])


def fit(num_steps: int, directory: Path | None = None, **options: Any) -> bayesrl.Posterior:
    return bayesrl.fit(
        KEY, bandit, beta=0.2, objective=OBJECTIVE, num_steps=num_steps, num_restarts=2, directory=directory,
        progress=False, **options,
    )  # fmt: skip


def assert_same(one: bayesrl.Posterior, other: bayesrl.Posterior) -> None:
    assert one.history.keys() == other.history.keys()
    for name in one.history:
        np.testing.assert_array_equal(one.history[name], other.history[name], err_msg=name)
    for a, b in zip(
        jax.tree.leaves((one.params, one.draws)), jax.tree.leaves((other.params, other.draws)), strict=True
    ):
        np.testing.assert_array_equal(a, b)


def test_killed_and_resumed_is_bit_for_bit_the_same(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    code = SCRIPT.format(here=str(Path(__file__).parent), folder=str(folder))
    process = subprocess.Popen([sys.executable, "-c", code])
    deadline = time.monotonic() + 240
    while not (folder / run_folder.CHECKPOINT).exists():
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline, "no checkpoint appeared"
        time.sleep(0.05)
    time.sleep(0.3)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    with pytest.raises(RunFolderError, match="has not ended"):
        bayesrl.load(folder)
    cut = bayesrl.load(folder, bandit)
    assert cut.interrupted
    assert 0 < cut.history["step"][-1] < 3000
    assert_same(bayesrl.resume(folder, bandit, progress=False), fit(3000))


def test_ctrl_c_keeps_what_was_fitted(tmp_path: Path) -> None:
    rows = []

    def interrupt(row: dict[str, np.ndarray]) -> None:
        rows.append(row)
        if len(rows) == 40:
            raise KeyboardInterrupt

    cut = fit(200, tmp_path / "run", callback=interrupt)
    assert cut.interrupted
    assert cut.history["step"][-1] == 80
    assert bayesrl.load(tmp_path / "run").interrupted
    assert_same(bayesrl.resume(tmp_path / "run", bandit, progress=False), fit(200))


def test_full_disk_leaves_the_last_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, rows = tmp_path / "run", []
    monkeypatch.setattr(running, "SECONDS_BETWEEN_CHECKPOINTS", 0.0)

    def fill_up(row: dict[str, np.ndarray]) -> None:
        rows.append(row)
        if len(rows) == 10:

            def no_space(_: int) -> None:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

            monkeypatch.setattr(os, "fsync", no_space)

    with pytest.raises(RunFolderError, match=r"cannot write .*No space left.*intact"):
        fit(200, folder, callback=fill_up)
    monkeypatch.undo()
    assert not [path for path in folder.iterdir() if path.name.startswith(".")], "no litter"
    assert bayesrl.load(folder, bandit).history["step"][-1] == 18
    assert_same(bayesrl.resume(folder, bandit, progress=False), fit(200))


def test_a_larger_number_of_steps_extends_a_finished_run(tmp_path: Path) -> None:
    first = fit(100, tmp_path / "run")
    longer = bayesrl.resume(tmp_path / "run", bandit, num_steps=150, progress=False)
    assert not longer.interrupted
    assert longer.history["step"][-1] == 150
    np.testing.assert_array_equal(longer.history["loss"][:100], first.history["loss"])
    assert_same(bayesrl.resume(tmp_path / "run", bandit, progress=False), longer)


def test_other_problems_are_refused_with_what_differs(tmp_path: Path) -> None:
    fit(5, tmp_path / "run")
    with pytest.raises(RunFolderError, match=r"another problem: beta was 0.2, is 0.3"):
        bayesrl.fit(KEY, bandit, beta=0.3, objective=OBJECTIVE, num_restarts=2, directory=tmp_path / "run")
    with pytest.raises(RunFolderError, match="seed was"):
        bayesrl.fit(
            jax.random.key(9), bandit, beta=0.2, objective=OBJECTIVE, num_restarts=2, directory=tmp_path / "run"
        )
    with pytest.raises(RunFolderError, match=r"objective num_particles was 16, is 32; choose"):
        bayesrl.fit(KEY, bandit, beta=0.2, objective=ReverseKL(32, enumerated=()), num_restarts=2,
                    directory=tmp_path / "run")  # fmt: skip
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years of work")
    with pytest.raises(RunFolderError, match=r"not a run folder, and not empty \(thesis.tex\)"):
        fit(5, tmp_path / "mine")
    (tmp_path / "file").write_text("")
    with pytest.raises(RunFolderError, match="cannot make the run folder"):
        fit(5, tmp_path / "file" / "run")
    with pytest.raises(RunFolderError, match="is not a run folder"):
        bayesrl.load(tmp_path / "nowhere")


def test_the_same_sites_with_other_rewards_are_another_problem(tmp_path: Path) -> None:
    def reversed_bandit() -> None:
        arm = numpyro.sample("arm", dist.Categorical(logits=jnp.zeros(6)))
        bayesrl.reward("payoff", jnp.linspace(1.0, 0.0, 6)[arm])

    folder = tmp_path / "run"
    fit(5, folder)
    for reopen in (
        lambda: bayesrl.resume(folder, reversed_bandit, progress=False),
        lambda: bayesrl.load(folder, reversed_bandit),
    ):
        with pytest.raises(RunFolderError, match=r"another problem: first draws payoff was \[.*\], is \[.*\]; choose"):
            reopen()
    assert bayesrl.load(folder, bandit).history["step"][-1] == 5


def test_a_refused_fit_leaves_the_folder_as_it_was(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    fit(5, folder)
    before = contents(folder)
    with pytest.raises(RunFolderError, match='optimizer was "default", is "given"'):
        fit(5, folder, optimizer=optax.sgd(0.1))
    assert contents(folder) == before
    bayesrl.load(folder, bandit)
    assert contents(folder) == before, "loading only reads"


def test_another_optimizer_of_ones_own_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    fit(5, folder, optimizer=optax.adam(0.1))
    before = contents(folder)
    with pytest.raises(RunFolderError, match=r"opt_state.*was the guide or the optimiser changed"):
        fit(9, folder, optimizer=optax.sgd(0.1))
    assert contents(folder) == before


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_damaged_files_are_named(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    fit(5, folder)
    draws, problem = folder / run_folder.POSTERIOR, folder / run_folder.PROBLEM
    draws.write_bytes(draws.read_bytes()[:100])
    with pytest.raises(RunFolderError, match=r"cannot read .*posterior.nc.*load the folder with its policy"):
        bayesrl.load(folder)
    assert bayesrl.load(folder, bandit).history["step"][-1] == 5
    for text, message in (
        ("[]", r"has format \[\]"),
        (f'{{"format": {run_folder.FORMAT}}}', "has no 'identity'"),
        ("{", "cannot read"),
    ):
        problem.write_text(text)
        with pytest.raises(RunFolderError, match=message):
            bayesrl.load(folder, bandit)


def test_keys_of_another_kind_come_back(tmp_path: Path) -> None:
    def run(num_steps: int, **options: Any) -> bayesrl.Posterior:
        key = jax.random.key(3, impl="rbg")
        return bayesrl.fit(key, bandit, beta=0.2, objective=OBJECTIVE, num_steps=num_steps, progress=False, **options)

    run(50, directory=tmp_path / "run", callback=lambda row: row["step"] >= 20)
    assert_same(bayesrl.resume(tmp_path / "run", bandit, progress=False), run(50))


@pytest.mark.parametrize("num_steps", [0, 2.5])
def test_resuming_takes_a_whole_number_of_steps(tmp_path: Path, unchecked: None, num_steps: Any) -> None:
    fit(5, tmp_path / "run")
    with pytest.raises(RunFolderError, match=f"num_steps={num_steps}; use a whole number of at least 1"):
        bayesrl.resume(tmp_path / "run", bandit, num_steps=num_steps)


def test_a_damaged_checkpoint_is_named(tmp_path: Path) -> None:
    fit(5, tmp_path / "run")
    (tmp_path / "run" / run_folder.CHECKPOINT).write_bytes(b"\x00" * 64)
    with pytest.raises(RunFolderError, match=r"cannot read .*checkpoint.safetensors.*damaged"):
        bayesrl.resume(tmp_path / "run", bandit)


def test_saved_draws_come_back_without_the_policy(tmp_path: Path) -> None:
    saved = fit(20, tmp_path / "run")
    loaded = bayesrl.load(tmp_path / "run")
    np.testing.assert_array_equal(loaded.draws["arm"], saved.draws["arm"])
    np.testing.assert_array_equal(loaded.statistics["log_weight"], saved.statistics["log_weight"])
    np.testing.assert_array_equal(loaded.history["objective"], saved.history["objective"])
    assert loaded.beta == saved.beta
    with pytest.raises(bayesrl.errors.PolicyError, match="loaded without its policy"):
        loaded.sample(KEY, 3)

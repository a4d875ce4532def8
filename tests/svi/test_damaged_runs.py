"""Run folders that were damaged, or in which somebody else laid something: named, never silent, never followed."""

import os
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest

import bayesrl
from bayesrl import run_folder
from bayesrl.cli.show import show_run
from bayesrl.errors import RunFolderError
from bayesrl.files.digests import problem_digest, stamped_json
from bayesrl.files.locking import lock_folder
from bayesrl.run_folder import json_files
from benchmarks.robustness_mutations import DAMAGE, FAULTS, LAID, Folder, case

STEERS = "\x1b[2J\x9b31m\u202e"


def bandit() -> None:
    arm = numpyro.sample("arm", dist.Categorical(logits=jnp.zeros(3)))
    bayesrl.reward("payoff", jnp.linspace(0.0, 1.0, 3)[arm])


def fit(folder: Path, **options: Any) -> bayesrl.Posterior:
    return bayesrl.fit(jax.random.key(0), bandit, beta=0.2, num_steps=20, directory=folder, progress=False, **options)


def described(posterior: bayesrl.Posterior) -> str:
    return str([np.asarray(leaf).tolist() for leaf in jax.tree.leaves((posterior.history, posterior.draws))])


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "run"
    fit(folder)
    return folder


@pytest.fixture
def copied(whole: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    return folder


def damage(path: Path, at: int = 60) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("part", range(4))
def test_no_mutation_is_silent_raw_or_led_out(whole: Path, tmp_path: Path, part: int) -> None:
    """A small part of `python -m benchmarks robustness`."""
    files = frozenset({run_folder.PROBLEM, run_folder.CHECKPOINT})
    folder = Folder(whole, {"load": (lambda f: described(bayesrl.load(f)), files | {run_folder.POSTERIOR})})
    wholes = {"load": described(bayesrl.load(whole))}
    kinds = set()
    for number in range(6 * part, 6 * (part + 1)):
        place = tmp_path / str(number)
        place.mkdir()
        told = case(folder, number, place, wholes)
        kinds.add(told["kind"])
        assert not {what for what, _ in told["came"].values()} & set(FAULTS), told
    assert len(kinds & {*DAMAGE, *LAID}) > 2


def test_the_checkpoint_before_is_offered_and_gone_on_from(copied: Path) -> None:
    last = described(bayesrl.load(copied, bandit))
    damage(copied / run_folder.CHECKPOINT, -5)
    offer = r"checkpoint.safetensors.*digest.*damaged: the checkpoint before it, after 10 steps, is whole: delete"
    for use in (lambda: bayesrl.load(copied, bandit), lambda: bayesrl.resume(copied, bandit), lambda: fit(copied)):
        with pytest.raises(RunFolderError, match=offer):
            use()
    (copied / run_folder.CHECKPOINT).unlink()
    assert described(bayesrl.resume(copied, bandit, progress=False)) == last
    damage(copied / run_folder.CHECKPOINT)
    damage(copied / run_folder.PREVIOUS_CHECKPOINT)
    with pytest.raises(RunFolderError, match="damaged: fit anew into another directory"):
        bayesrl.load(copied, bandit)


def test_a_checkpoint_is_read_with_one_reading_of_its_problem(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files, read = [], json_files.read_file

    def noted(path: Path, **options: Any) -> bytes | None:
        files.append(path.name)
        return read(path, **options)

    monkeypatch.setattr(json_files, "read_file", noted)
    assert run_folder.read_history(copied)[0] > 0
    assert files == [run_folder.PROBLEM]


def test_draws_that_do_not_belong_to_the_checkpoint_are_not_mixed_with_it(copied: Path) -> None:
    (copied / run_folder.CHECKPOINT).unlink()
    with pytest.raises(RunFolderError, match=r"posterior.nc.* after 20 steps.*checkpoint.safetensors.* after 10"):
        bayesrl.load(copied)


def test_a_file_of_another_run_is_told_as_such(copied: Path, tmp_path: Path) -> None:
    bayesrl.fit(jax.random.key(1), bandit, beta=0.2, num_steps=20, directory=tmp_path / "other", progress=False)
    for name in (run_folder.CHECKPOINT, run_folder.POSTERIOR):
        shutil.copy(tmp_path / "other" / name, copied / name)
        with pytest.raises(RunFolderError, match=f"{name}: it belongs to another run"):
            bayesrl.load(copied)


@pytest.mark.parametrize("number", [run_folder.FORMAT + 1, 99])
def test_a_newer_version_is_told_as_such(copied: Path, number: int) -> None:
    path = copied / run_folder.PROBLEM
    path.write_text(path.read_text().replace(f'"format": {run_folder.FORMAT}', f'"format": {number}'))
    with pytest.raises(RunFolderError, match=rf"has format {number}, of a newer version of bayesrl.*update bayesrl"):
        bayesrl.load(copied)


VALUES = [None, True, -1, 10**30, float("nan"), "x", STEERS, [], [[0]], {}, {"type": "AutoTilt", "x": 1}]


def places(told: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    for key in told if isinstance(told, dict) else range(len(told)) if isinstance(told, list) else ():
        yield (*path, key)
        yield from places(told[key], (*path, key))


def test_values_of_another_kind_are_never_raw_and_steer_no_terminal(
    copied: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, rng = copied / run_folder.PROBLEM, random.Random(0)  # noqa: S311
    problem = run_folder.read_problem(copied)
    refused = 0
    for place in rng.sample(list(places(problem)), 25):
        changed = run_folder.read_problem(copied)
        inner: Any = changed
        for key in place[:-1]:
            inner = inner[key]
        inner[place[-1]] = rng.choice(VALUES)
        identity = changed["identity"] if isinstance(changed["identity"], dict) else {}
        path.write_bytes(stamped_json(changed, path.name, problem_digest(identity)))
        for use in (show_run, bayesrl.load):
            try:
                use(copied)
            except RunFolderError:
                refused += 1
        path.write_bytes(stamped_json(problem, path.name, problem_digest(problem["identity"])))
    assert refused > 20
    assert not {"\x1b", "\x9b", "\u202e"} & set(capsys.readouterr().out)


@pytest.mark.parametrize("name", [run_folder.PROBLEM, run_folder.CHECKPOINT, run_folder.POSTERIOR, ".lock"])
@pytest.mark.parametrize("kind", ["link", "pipe"])
def test_nothing_outside_is_written_and_nothing_waited_on(copied: Path, tmp_path: Path, kind: str, name: str) -> None:
    path, outside = copied / name, tmp_path / "outside"
    outside.write_bytes(path.read_bytes() if path.exists() else b"theirs")
    theirs = outside.read_bytes()
    path.unlink(missing_ok=True)
    if kind == "link":
        path.symlink_to(outside)
    else:
        os.mkfifo(path)
    with pytest.raises(RunFolderError, match="only plain files"):
        bayesrl.resume(copied, bandit, num_steps=22, progress=False)
    assert outside.read_bytes() == theirs


def test_the_second_in_a_folder_is_refused_before_any_work(copied: Path) -> None:
    before = {path.name: path.read_bytes() for path in copied.iterdir()}
    import threading

    ready, done = threading.Event(), threading.Event()

    def hold() -> None:
        with lock_folder(copied):
            ready.set()
            done.wait(60)

    thread = threading.Thread(target=hold)
    thread.start()
    ready.wait(60)
    try:
        with pytest.raises(RunFolderError, match=f"in use by process {os.getpid()}"):
            bayesrl.resume(copied, lambda: 1 / 0, progress=False)  # the program is not even run
    finally:
        done.set()
        thread.join()
    assert {path.name: path.read_bytes() for path in copied.iterdir()} == before


def test_a_disk_that_is_full_while_draws_are_saved_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fsync = os.fsync
    written = []

    def no_space(descriptor: int) -> None:
        written.append(os.readlink(f"/proc/self/fd/{descriptor}") if Path("/proc/self/fd").exists() else "")
        if "posterior.nc" in written[-1]:
            raise OSError(28, "No space left on device")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(
        RunFolderError, match=r"cannot write .*posterior.nc.*No space.*checkpoint beside it is complete"
    ):
        fit(tmp_path / "run")
    monkeypatch.undo()
    assert not list((tmp_path / "run").glob(".*"))
    assert bayesrl.load(tmp_path / "run", bandit).history["step"][-1] == 20
